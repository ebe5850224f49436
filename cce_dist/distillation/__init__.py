"""Distillation on a whole or a sharded vocabulary, without its logits: those of chosen ids, divergences from a teacher.

settings ← pairs ← selected.
"""

from cce_dist.distillation.selected import linear_selected_logits

__all__ = ["linear_selected_logits"]
