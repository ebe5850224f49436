"""Label smoothing under a softcap: the mean of all logits of a token, from every row of the classifier.

z̄_i = (1/V)·Σ_j w_j·f(s·(e_i·c_j + bias_j)), with classes' weights w (1 without). A cap leaves no mean row to stand for
all (see `smoothing`), so this is a pass over chunks of logits of its own, and one in backward with f' = 1 − (z/cap)²:
dE_i = g_i·(s/V)·Σ_j w_j·f'_ij·c_j, and dC_j = (s/V)·w_j·Σ_i g_i·f'_ij·e_i. Products of N·V·D: 1 in forward and 3 in
backward, the library's.

Collectives: forward gathers hidden states as the loss does, and sums N + 1 numbers over the vocabulary group; backward
gathers g, and reduces dE.

Shapes: n tokens of this rank, N of the token group, D hidden, V local rows; c tokens and v rows of a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cce_dist.kernels.products import add_product, product
from cce_dist.loss.autograd import Call
from cce_dist.loss.chunks import Rows, Tokens, chunk_logits, rows_of, split, split_rows
from cce_dist.loss.settings import rows_dtype
from cce_dist.loss.tokens import gather_values, in_reduce_dtype, own, start_sum


class CappedMeanLogit(torch.autograd.Function):
    """(z̄_n, 0 where ignored, and the mean of the classes' weights) of this rank's tokens."""

    @staticmethod
    def forward(
        ctx: Any, hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:
        shard, valid_n = call.shard, call.labels_n != call.settings.ignore_index
        with torch.autocast(hidden_nD.device.type, enabled=False):
            # What is ignored may hold anything.
            given_ND = gather_values(hidden_nD.masked_fill(~valid_n[:, None], 0), shard, call.padded_to, 0)
            rows, hidden_ND = _rows_and_tokens(given_ND, weight_VD, bias_V, call)
            weights_V = _class_weights(call, rows, hidden_ND)
            sums = torch.zeros(hidden_ND.shape[0] + 1, dtype=weights_V.dtype, device=hidden_ND.device)
            for v, of_v in split_rows(rows):
                for n, tokens in _chunks_of_tokens(hidden_ND):
                    sums[n] += chunk_logits(tokens, of_v) @ weights_V[v]
            sums[-1] = weights_V.sum()
            if shard.vocab_group is not None:
                dist.all_reduce(sums, group=shard.vocab_group)
            sums /= shard.vocab_size
        ctx.call, ctx.num_tokens, ctx.dtype = call, hidden_nD.shape[0], hidden_nD.dtype
        ctx.save_for_backward(given_ND, weight_VD, bias_V, valid_n, call.class_weights_V)
        mean_weight = sums[-1].clone()
        ctx.mark_non_differentiable(mean_weight)
        return own(sums[:-1], ctx.num_tokens, call.padded_to, shard).masked_fill(~valid_n, 0.0), mean_weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor, of_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        cap = call.settings.softcap
        assert cap is not None
        given_ND, weight_VD, bias_V, valid_n, class_weights_V = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        shard, onto_VD = call.shard, call.grad_accumulator_VD
        with torch.autocast(grad_n.device.type, enabled=False):
            grad_N = gather_values(grad_n.masked_fill(~valid_n, 0.0), shard, call.padded_to, 0)
            rows, hidden_ND = _rows_and_tokens(given_ND, weight_VD, bias_V, call)
            weights_V = _class_weights(call, rows, hidden_ND, class_weights_V)
            # fp16 has no range for a share of 1/V.
            dtype = torch.float32 if hidden_ND.dtype == torch.float16 else hidden_ND.dtype
            wide = weights_V.dtype
            dhidden_ND = torch.zeros_like(hidden_ND, dtype=wide) if wants_hidden else None
            dweight_VD = torch.zeros_like(weight_VD) if wants_weight and onto_VD is None else None
            sums_VD = onto_VD if wants_weight and dweight_VD is None else dweight_VD
            dbias_V = torch.zeros_like(bias_V) if wants_bias and bias_V is not None else None
            for v, of_v in split_rows(rows):
                sum_vD = torch.zeros_like(of_v.weight_VD, dtype=wide)
                sum_v = torch.zeros_like(weights_V[v])
                for n, tokens in _chunks_of_tokens(hidden_ND):
                    z_cv = chunk_logits(tokens, of_v)
                    p_cv = (1 - (z_cv / cap).square_()).mul_(weights_V[v]).mul_(grad_N[n, None])
                    p_cv *= of_v.logit_scale / shard.vocab_size
                    sum_v += p_cv.sum(0)
                    p_cv = p_cv.to(dtype)
                    if dhidden_ND is not None:
                        add_product(dhidden_ND[n], p_cv, of_v.weight_VD.to(dtype))
                    if wants_weight:
                        sum_vD += product(p_cv.T, tokens.hidden_cD.to(dtype))
                if sums_VD is not None:
                    sums_VD[v] += sum_vD
                if dbias_V is not None:
                    dbias_V[v] = sum_v
            dhidden_nD = None
            if dhidden_ND is not None:
                dhidden_nD = start_sum(in_reduce_dtype(dhidden_ND, shard), ctx.num_tokens, shard)().to(ctx.dtype)
        return dhidden_nD, dweight_VD, dbias_V, None


def _rows_and_tokens(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, call: Call) -> tuple[Rows, Tensor]:
    settings = call.settings
    dtype = rows_dtype(hidden_ND.dtype, weight_VD.dtype, settings.fp32_head)
    return rows_of(weight_VD, bias_V, call.shard, settings.logit_scale, settings.softcap), hidden_ND.to(dtype)


def _class_weights(call: Call, rows: Rows, hidden_ND: Tensor, saved_V: Tensor | None = None) -> Tensor:
    """Of the real rows, in the dtype of logits."""
    given_V, dtype = call.class_weights_V if saved_V is None else saved_V, Tokens(hidden_ND, None, None).dtype
    number = rows.weight_VD.shape[0]
    if given_V is None:
        return torch.ones(number, dtype=dtype, device=hidden_ND.device)
    return given_V[:number].to(dtype)


def _chunks_of_tokens(hidden_ND: Tensor) -> Iterator[tuple[slice, Tokens]]:
    first = 0
    for tokens in split(Tokens(hidden_ND, None, None)):
        end = first + tokens.hidden_cD.shape[0]
        yield slice(first, end), tokens
        first = end
