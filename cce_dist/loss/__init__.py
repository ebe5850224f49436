"""The loss: cross-entropy of hidden · weightᵀ whose logits are never formed, on a whole or a sharded vocabulary; and
the log-probabilities of tokens.

settings ← tokens ← autograd ← call ← api, logprobs (← statistics).
"""

from cce_dist.loss.api import linear_cross_entropy
from cce_dist.loss.logprobs import TokenLogprobs, linear_logprobs

__all__ = ["TokenLogprobs", "linear_cross_entropy", "linear_logprobs"]
