"""Distillation on a whole or a sharded vocabulary, without its logits: those of chosen ids, divergences from a teacher.

settings ← topk; divergence,  selected ← kept ← topk_kl; two_heads ← kl_div;
nuclear.
"""

from cce_dist.distillation.kept import linear_kept_logprobs
from cce_dist.distillation.kl_div import linear_kl_div
from cce_dist.distillation.nuclear import logits_nuclear_norm
from cce_dist.distillation.selected import linear_selected_logits
from cce_dist.distillation.topk import TopLogits, linear_topk
from cce_dist.distillation.topk_kl import linear_topk_kl

__all__ = [
    "TopLogits",
    "linear_kept_logprobs",
    "linear_kl_div",
    "linear_selected_logits",
    "linear_topk",
    "linear_topk_kl",
    "logits_nuclear_norm",
]
