"""Label smoothing: the mean over the classes of what each would cost as label, from one row in place of all.

With classes' weights w (1 without) it is (1/V)·Σ_j w_j·(lse − z_j) = w̄·lse − z̄, where z̄ = (1/V)·Σ_j w_j·s·(e·c_j +
bias_j) = s·(e·c̄ + b̄) with a mean row c̄: a pass over the classifier, and in backward one over dC. Of the gradient g_i
of z̄_i: dE_i = s·g_i·c̄, and (s/V)·w_j·Σ_i g_i·e_i for row j. With a softcap there is no such row.

In: this rank's tokens and rows. Out: z̄ of each token, and what its gradient adds to those of the loss.
Collectives: a SUM of D + 2 numbers over the vocabulary group in forward.

Shapes: n tokens of this rank, N of the token group, D hidden, V local rows.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cce_dist.shard import VocabShard

_AT_ONCE = 2048
"""Tokens, or rows, of which there are copies in fp32."""


class MeanRow(NamedTuple):
    """Of the whole vocabulary, in fp32 (fp64 for fp64).

    Attributes:
        row_D, bias: s·c̄ and s·b̄.
        weight: the mean of the classes' weights.
    """

    row_D: Tensor
    bias: Tensor
    weight: Tensor


def mean_row(
    weight_VD: Tensor,
    bias_V: Tensor | None,
    class_weights_V: Tensor | None,
    shard: VocabShard,
    scale: float,
    dtype: torch.dtype,
) -> MeanRow:
    """Of all ranks' rows, padding left out; in ``dtype``, that of the sums."""
    rows, hidden_size = shard.num_real_rows, weight_VD.shape[1]
    weight_VD, bias_V = weight_VD[:rows], None if bias_V is None else bias_V[:rows]
    each_V = class_weights_V[:rows].to(dtype) if class_weights_V is not None else weight_VD.new_ones(rows, dtype=dtype)
    sum_D2 = weight_VD.new_zeros(hidden_size + 2, dtype=dtype)
    if class_weights_V is None:
        sum_D2[:-2] = weight_VD.sum(0, dtype=dtype)
    else:
        for part_v, part_vD in zip(each_V.split(_AT_ONCE), weight_VD.split(_AT_ONCE), strict=True):
            sum_D2[:-2] += part_v @ part_vD.to(dtype)
    if bias_V is not None:
        sum_D2[-2] = each_V @ bias_V.to(dtype)
    sum_D2[-1] = each_V.sum()
    if shard.vocab_group is not None:
        dist.all_reduce(sum_D2, group=shard.vocab_group)
    share = scale / shard.vocab_size
    return MeanRow(sum_D2[:-2] * share, sum_D2[-2] * share, sum_D2[-1] / shard.vocab_size)


def mean_logit(hidden_nD: Tensor, valid_n: Tensor, mean: MeanRow) -> Tensor:
    """[n], 0 of those that are ignored."""
    parts = [part_nD.to(mean.row_D.dtype) @ mean.row_D for part_nD in hidden_nD.split(_AT_ONCE)]
    return (torch.cat(parts) + mean.bias).masked_fill_(~valid_n, 0.0)


def add_to_hidden(grad_hidden_nD: Tensor, grad_n: Tensor, mean_row_D: Tensor) -> None:
    """``grad_n``: the mean logit's upstream gradient, 0 of those that are ignored."""
    for out_nD, part_n in zip(grad_hidden_nD.split(_AT_ONCE), grad_n.split(_AT_ONCE), strict=True):
        out_nD += torch.outer(part_n, mean_row_D)


def add_to_rows(
    grad_weight_VD: Tensor | None,
    grad_bias_V: Tensor | None,
    grad_N: Tensor,
    hidden_ND: Tensor,
    valid_N: Tensor,
    class_weights_V: Tensor | None,
    share: float,
) -> None:
    """To the real rows' gradients, in place. ``grad_N``: as in `add_to_hidden`, of all tokens."""
    if grad_weight_VD is not None:
        sum_D = grad_N.new_zeros(hidden_ND.shape[1])
        for part_N, part_ND, valid in zip(*(x.split(_AT_ONCE) for x in (grad_N, hidden_ND, valid_N)), strict=True):
            sum_D += part_N @ part_ND.to(part_N.dtype).masked_fill(~valid[:, None], 0.0)
        _add(grad_weight_VD, sum_D * share, class_weights_V)
    if grad_bias_V is not None:
        _add(grad_bias_V, grad_N.sum() * share, class_weights_V)


def _add(out_V: Tensor, value: Tensor, class_weights_V: Tensor | None) -> None:
    """The same to each row, or as much as its weight says."""
    if class_weights_V is None:
        out_V += value
        return
    for out_v, each_v in zip(out_V.split(_AT_ONCE), class_weights_V[: out_V.shape[0]].split(_AT_ONCE), strict=True):
        out_v += each_v.to(value.dtype).view(-1, *(1,) * value.ndim) * value
