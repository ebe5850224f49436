"""The loss: cross-entropy of hidden · weightᵀ whose logits are never formed, on a whole or a sharded vocabulary.

settings ← tokens ← autograd ← api.
"""

from cce_dist.loss.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
