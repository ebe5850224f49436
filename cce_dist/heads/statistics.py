"""What trainers log of the logits beside the loss, per token, without forming them: entropy, the most likely token, ...

Shapes: n tokens of this rank, N tokens of the token group, D hidden, V local rows of the classifier; c tokens and v
rows of a chunk.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cce_dist.collectives import gather_tokens
from cce_dist.shard import VocabShard
from cce_dist.shard.agreement import agree

_TOKENS, _ROWS = 4096, 2048
"""Size of a chunk: 32 MiB of fp32, of which about four are alive at a time."""
_FAR = -1e4
"""Below a max by this much nothing counts; a limit, since 0 · −inf is no number."""


class TokenStatistics(NamedTuple):
    """Of each token's p = softmax(z) over the whole vocabulary; [n] each, fp32 (fp64 for fp64), without a gradient.

    Attributes:
        argmax: the most likely token, int64; the first of several.
        entropy: −Σ p log p, in nats.
        log_sum_sq_probs: log Σ p².
        mean_logit: Σ z / vocab_size.
    """

    argmax: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logit: Tensor


@torch.no_grad()
def token_statistics(
    hidden_nD: Tensor,
    weight_VD: Tensor,
    *,
    bias: Tensor | None,
    shard: VocabShard,
    logit_scale: float,
    softcap: float | None,
) -> TokenStatistics:
    """One pass over the logits in chunks, each rank over its rows; the arguments are those of `linear_cross_entropy`.

    Every rank of ``shard.vocab_group`` must make the call, also with no token.
    """
    alike = {
        "hidden's last dimension": hidden_nD.shape[1],
        "hidden's dtype": str(hidden_nD.dtype),
        "bias": bias is not None,
        "logit_scale": logit_scale,
        "softcap": softcap,
    }
    hidden_ND = hidden_nD.contiguous()
    most = agree(shard, "statistics of tokens", hidden_nD.shape[0], alike)
    if shard.token_group is not None:
        hidden_ND = gather_tokens(hidden_ND, most, shard.token_group)
    rows = shard.num_real_rows
    weight_VD, bias_V = weight_VD[:rows], None if bias is None else bias[:rows]
    with torch.autocast(hidden_nD.device.type, enabled=False):
        chunks = [
            _summarise(hidden_cD, weight_VD, bias_V, shard, logit_scale, softcap)
            for hidden_cD in hidden_ND.split(_TOKENS)
        ]
    statistics = _merge(torch.cat([floats for floats, _ in chunks], 1), torch.cat([ids for _, ids in chunks]), shard)
    if shard.token_group is None:
        return statistics
    first = most * dist.get_rank(shard.token_group)
    return TokenStatistics(*(x_N[first : first + hidden_nD.shape[0]] for x_N in statistics))


def _summarise(
    hidden_cD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    shard: VocabShard,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """[5, c]: m = max z, Σ e, Σ e·(z − m), Σ e², Σ z with e = exp(z − m); and the global row of the max, int64 [c]."""
    dtype = torch.promote_types(hidden_cD.dtype, torch.float32)
    lowest = torch.finfo(dtype).min
    max_c, (sum_c, weighted_c, squares_c, total_c) = (
        hidden_cD.new_full(hidden_cD.shape[:1], lowest, dtype=dtype),
        hidden_cD.new_zeros((4, hidden_cD.shape[0]), dtype=dtype),
    )
    argmax_c = torch.zeros_like(max_c, dtype=torch.int64)
    for first in range(0, weight_VD.shape[0], _ROWS):
        v = slice(first, min(first + _ROWS, weight_VD.shape[0]))
        z_cv = (hidden_cD @ weight_VD[v].to(hidden_cD.dtype).T).to(dtype)
        if bias_V is not None:
            z_cv += bias_V[v].to(dtype)
        z_cv *= logit_scale
        if softcap is not None:
            z_cv = softcap * torch.tanh(z_cv / softcap)
        total_c = total_c + z_cv.sum(1)
        z_cv.clamp_(min=lowest)  # a bias may be −inf
        chunk_max_c, where_c = z_cv.max(1)
        argmax_c = torch.where(chunk_max_c > max_c, first + where_c, argmax_c)
        new_max_c = torch.maximum(max_c, chunk_max_c)
        decay_c, shift_c = torch.exp(max_c - new_max_c), (max_c - new_max_c).clamp(min=_FAR)
        z_cv -= new_max_c[:, None]
        e_cv = z_cv.exp()
        sum_before_c, sum_c = sum_c, sum_c * decay_c + e_cv.sum(1)
        weighted_c = decay_c * (weighted_c + sum_before_c * shift_c) + (e_cv * z_cv.clamp_(min=_FAR)).sum(1)
        squares_c = squares_c * decay_c**2 + (e_cv * e_cv).sum(1)
        max_c = new_max_c
    return torch.stack((max_c, sum_c, weighted_c, squares_c, total_c)), _global_rows(argmax_c, shard)


def _global_rows(column_c: Tensor, shard: VocabShard) -> Tensor:
    row_c, offset = column_c, 0
    for start, stop in shard.runs:
        row_c = torch.where((column_c >= offset) & (column_c < offset + stop - start), column_c + start - offset, row_c)
        offset += stop - start
    return row_c


def _merge(floats_5N: Tensor, argmax_N: Tensor, shard: VocabShard) -> TokenStatistics:
    """Combines the shards' summaries: a MAX, a SUM, and a MIN over the candidates for the argmax."""
    max_N, *sums = floats_5N
    if shard.vocab_group is not None:
        own_max_N, max_N = max_N, max_N.clone()
        dist.all_reduce(max_N, dist.ReduceOp.MAX, group=shard.vocab_group)
        shift_N = own_max_N - max_N
        sum_N, weighted_N, squares_N, total_N = sums
        decay_N = shift_N.exp()
        weighted_N = decay_N * (weighted_N + sum_N * shift_N.clamp(min=_FAR))
        packed_4N = torch.stack((sum_N * decay_N, weighted_N, squares_N * decay_N**2, total_N))
        dist.all_reduce(packed_4N, group=shard.vocab_group)
        sums = list(packed_4N)
        argmax_N = torch.where(own_max_N == max_N, argmax_N, shard.vocab_size - 1)
        dist.all_reduce(argmax_N, dist.ReduceOp.MIN, group=shard.vocab_group)
    sum_N, weighted_N, squares_N, total_N = sums
    return TokenStatistics(
        argmax_N, sum_N.log() - weighted_N / sum_N, squares_N.log() - 2 * sum_N.log(), total_N / shard.vocab_size
    )
