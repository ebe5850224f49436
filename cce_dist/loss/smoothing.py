"""Label smoothing: each token's mean logit over the vocabulary, from one row in place of all.

(1/V)·Σ_j s·(e·c_j + bias_j) = s·(e·c̄ + b̄) with the mean row c̄, so that the mean logit costs a pass over the classifier,
and its gradient one over dC: dE_i = s·g_i·c̄, and the same (s/V)·Σ_i g_i·e_i for every row. With a softcap there is no
such row.

In: this rank's tokens and rows. Out: a number of each token, differentiable. Collectives: a SUM of D + 1 numbers over
the vocabulary group in forward, and over the token group in backward.

Shapes: n tokens of this rank, D hidden, V local rows.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cce_dist.loss.autograd import Call

_AT_ONCE = 2048
"""Tokens of which there are copies in fp32."""


class MeanLogit(torch.autograd.Function):
    """(hidden_nD, weight_VD, bias_V, call) -> the mean logit [n] of the tokens, in fp32 (fp64 for fp64); 0 of those
    that are ignored."""

    @staticmethod
    def forward(ctx: Any, hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, call: Call) -> Tensor:
        valid_n = call.labels_n != call.settings.ignore_index
        with torch.autocast(hidden_nD.device.type, enabled=False):
            mean_D1 = _mean_row(hidden_nD, weight_VD, bias_V, call)
            parts = [part_nD.to(mean_D1.dtype) @ mean_D1[:-1] for part_nD in hidden_nD.split(_AT_ONCE)]
        ctx.save_for_backward(hidden_nD, weight_VD, bias_V, mean_D1, valid_n)
        ctx.call = call
        return (torch.cat(parts) + mean_D1[-1]).masked_fill_(~valid_n, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor | None, ...]:
        hidden_nD, weight_VD, bias_V, mean_D1, valid_n = ctx.saved_tensors
        call: Call = ctx.call
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_n = grad_n.masked_fill(~valid_n, 0.0)
        grad_hidden_nD = grad_weight_VD = grad_bias_V = None
        with torch.autocast(grad_n.device.type, enabled=False):
            if wants_hidden:
                grad_hidden_nD = torch.empty_like(hidden_nD)
                for out_nD, part_n in zip(grad_hidden_nD.split(_AT_ONCE), grad_n.split(_AT_ONCE), strict=True):
                    out_nD.copy_(torch.outer(part_n, mean_D1[:-1]))
            if wants_weight or wants_bias:
                sum_D1 = _sum_of_tokens(grad_n, hidden_nD, valid_n, call)
                if wants_weight and call.grad_accumulator_VD is not None:
                    call.grad_accumulator_VD.add_(sum_D1[:-1])
                elif wants_weight:
                    grad_weight_VD = _in_real_rows(sum_D1[:-1], weight_VD, call)
                grad_bias_V = _in_real_rows(sum_D1[-1], bias_V, call) if wants_bias else None
        return grad_hidden_nD, grad_weight_VD, grad_bias_V, None


def _mean_row(hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, call: Call) -> Tensor:
    """s·(c̄, b̄) of the whole vocabulary."""
    dtype, rows = torch.promote_types(hidden_nD.dtype, torch.float32), call.shard.num_real_rows
    mean_D1 = torch.zeros(hidden_nD.shape[1] + 1, dtype=dtype, device=hidden_nD.device)
    mean_D1[:-1] = weight_VD[:rows].sum(0, dtype=dtype)
    if bias_V is not None:
        mean_D1[-1] = bias_V[:rows].sum(dtype=dtype)
    if call.shard.vocab_group is not None:
        dist.all_reduce(mean_D1, group=call.shard.vocab_group)
    return mean_D1.mul_(_share(call))


def _sum_of_tokens(grad_n: Tensor, hidden_nD: Tensor, valid_n: Tensor, call: Call) -> Tensor:
    """(s/V)·Σ g·(e, 1) over all tokens of the token group: the gradient of every row and of its bias."""
    sum_D1 = grad_n.new_zeros(hidden_nD.shape[1] + 1)
    for part_n, part_nD, valid in zip(*(x.split(_AT_ONCE) for x in (grad_n, hidden_nD, valid_n)), strict=True):
        sum_D1[:-1] += part_n @ part_nD.to(part_n.dtype).masked_fill(~valid[:, None], 0.0)
    sum_D1[-1] = grad_n.sum()
    if call.shard.token_group is not None:
        dist.all_reduce(sum_D1, group=call.shard.token_group)
    return sum_D1.mul_(_share(call))


def _share(call: Call) -> float:
    """s/V."""
    return call.settings.scale / call.shard.vocab_size


def _in_real_rows(value: Tensor, parameter: Tensor, call: Call) -> Tensor:
    """The same in each row of the vocabulary, 0 in those of padding; without memory of its own where there are none."""
    rows = call.shard.num_real_rows
    if rows == parameter.shape[0]:
        return value.to(parameter.dtype).expand(parameter.shape)
    grad = torch.zeros_like(parameter)
    grad[:rows] = value
    return grad
