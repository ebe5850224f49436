"""Vocabulary-parallel Cut Cross-Entropy for training language models on many GPUs."""

from importlib.metadata import PackageNotFoundError, version

from cce_dist.config import CCEConfig
from cce_dist.distillation import (
    TopLogits,
    linear_kept_logprobs,
    linear_kl_div,
    linear_selected_logits,
    linear_topk,
    linear_topk_kl,
    logits_nuclear_norm,
)
from cce_dist.heads.sharded_head import ShardedCCEHead
from cce_dist.loss import LabelStatistics, TokenLogprobs, linear_cross_entropy, linear_logprobs, linear_next_token
from cce_dist.shard import VocabShard

try:
    __version__ = version("cce_dist")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = [
    "CCEConfig",
    "LabelStatistics",
    "ShardedCCEHead",
    "TokenLogprobs",
    "TopLogits",
    "VocabShard",
    "__version__",
    "linear_cross_entropy",
    "linear_kept_logprobs",
    "linear_kl_div",
    "linear_logprobs",
    "linear_next_token",
    "linear_selected_logits",
    "linear_topk",
    "linear_topk_kl",
    "logits_nuclear_norm",
]
