"""From the losses of tokens to that of a call, as F.cross_entropy has it, over one rank or many.

Collectives: for a mean over several ranks a SUM of two fp64 numbers in forward and of one in backward.

Shapes: n tokens of this rank.
"""

from torch import Tensor

from cce_dist.collectives import group_mean
from cce_dist.loss.settings import Reduction
from cce_dist.shard import VocabShard


def reduced(
    loss_n: Tensor, counted_n: Tensor, reduction: Reduction, num_valid_tokens: int | Tensor | None, shard: VocabShard
) -> Tensor:
    """The sum, or the mean, of losses that are 0 where a token is ignored.

    Args:
        counted_n: what a token counts in the mean: whether it is valid, or its weight.
        reduction: "sum" or "mean".
        num_valid_tokens: what this rank's sum is divided by instead.
    """
    own_sum = loss_n.sum()
    if reduction == "sum":
        return own_sum
    if num_valid_tokens is not None:
        return own_sum / num_valid_tokens
    group = shard.count_group if shard.count_group is not None else shard.token_group
    return own_sum / counted_n.sum() if group is None else group_mean(own_sum, counted_n.sum(), group)
