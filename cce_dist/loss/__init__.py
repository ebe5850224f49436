"""The loss: cross-entropy of hidden · weightᵀ whose logits are never formed, on a whole or a sharded vocabulary; and
the log-probabilities of tokens.

settings ← tokens ← autograd ← call, and chunks; call, chunks ← statistics, sampling, capped_mean; these, reduction ←
cross_entropy ← graph ← api; statistics ← logprobs.
"""

from cce_dist.loss.api import linear_cross_entropy
from cce_dist.loss.logprobs import TokenLogprobs, linear_logprobs
from cce_dist.loss.sampling import linear_next_token
from cce_dist.loss.statistics import LabelStatistics

__all__ = ["LabelStatistics", "TokenLogprobs", "linear_cross_entropy", "linear_logprobs", "linear_next_token"]
