"""What trainers log of the logits beside the loss, per token, without forming them: entropy, the most likely token, ...

In: hidden states and local rows. Out: numbers of each token over the whole vocabulary, without a gradient, by one pass
of products over the logits in chunks; the rank of a label takes a second one, since it needs the label's logit.

Shapes: n tokens of this rank, N tokens of the token group, L tokens of a sequence, D hidden, V local rows of the
classifier; c tokens and v rows of a chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cce_dist.kernels.problem import FAR
from cce_dist.loss.call import Inputs
from cce_dist.loss.chunks import Rows, Tokens, first_row, global_rows, logits_of, rows_of, split
from cce_dist.loss.settings import rows_dtype
from cce_dist.loss.tokens import gather_values, own
from cce_dist.shard import VocabShard
from cce_dist.shard.agreement import agree


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


class LabelStatistics(NamedTuple):
    """What ``statistics`` ask for of each token, [..., L - shift], without a gradient; None what they do not.

    In fp32 (fp64 for fp64), 0 where the label is ignored; with p the softmax of the token's logits z over the whole
    vocabulary:

    Attributes:
        top1: int64, the most likely id, the first of several; −1 where ignored, or where logits are no numbers.
        is_top1: bool, whether that is the label, False where ignored; given with ``top1``.
        rank: int64, how many ids are more likely than the label; −1 as for ``top1``.
        sum_sq_probs: Σ p².
        mean_logit: Σ z / vocab_size.
    """

    top1: Tensor | None = None
    is_top1: Tensor | None = None
    rank: Tensor | None = None
    sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None


@torch.no_grad()
def label_statistics(inputs: Inputs, shaped: Callable[[Tensor], Tensor]) -> LabelStatistics:
    """What the settings of a call that the ranks have agreed on ask for.

    Args:
        shaped: makes values [n] those of the labels, [..., L - shift].
    """
    hidden_nD, weight_VD, bias_V, call, adapter_nR, adapter_VR = inputs
    labels_n, settings = call.labels_n, call.settings
    wanted, valid_n = settings.statistics, labels_n != settings.ignore_index
    hidden_nD = hidden_nD.to(rows_dtype(hidden_nD.dtype, weight_VD.dtype, settings.fp32_head))
    of_n, rank_n = statistics_of(
        torch.where(valid_n[:, None], beside(hidden_nD, adapter_nR), 0),  # what is ignored may hold anything
        rows_of(weight_VD, bias_V, call.shard, settings.logit_scale, settings.softcap, adapter_VR),
        call.padded_to,
        temperature_n=call.temperature_n,
        ranked_n=torch.where(valid_n, labels_n, -1) if "rank" in wanted else None,
    )
    known_n = valid_n & ~of_n.entropy.isnan()
    found = {
        "top1": torch.where(known_n, of_n.argmax, -1),
        "is_top1": known_n & (of_n.argmax == labels_n),
        "sum_sq_probs": torch.where(valid_n, of_n.log_sum_sq_probs.exp(), 0),
        "mean_logit": torch.where(valid_n, of_n.mean_logit, 0),
    }
    if rank_n is not None:
        found["rank"] = torch.where(known_n, rank_n, -1)
    return LabelStatistics(
        **{name: shaped(x_n) for name, x_n in found.items() if name.replace("is_top1", "top1") in wanted}
    )


@torch.no_grad()
def token_statistics(
    hidden_nD: Tensor,
    weight_VD: Tensor,
    *,
    bias: Tensor | None,
    shard: VocabShard,
    logit_scale: float,
    softcap: float | None,
    adapter: tuple[Tensor, Tensor] | None = None,
) -> TokenStatistics:
    """One pass over the logits in chunks, each rank over its rows; the arguments are those of `linear_cross_entropy`.

    Every rank of ``shard.vocab_group`` must make the call, also with no token.
    """
    adapter_nR, adapter_VR = (None, None) if adapter is None else adapter
    hidden_nD = beside(hidden_nD, adapter_nR)
    alike = {
        "hidden's last dimension": hidden_nD.shape[1],
        "hidden's dtype": str(hidden_nD.dtype),
        "bias": bias is not None,
        "logit_scale": logit_scale,
        "softcap": softcap,
    }
    most = agree(shard, "statistics of tokens", hidden_nD.shape[0], alike)
    rows = rows_of(weight_VD, bias, shard, logit_scale, softcap, adapter_VR)
    return statistics_of(hidden_nD, rows, most)[0]


def beside(hidden_nD: Tensor, adapter_nR: Tensor | None) -> Tensor:
    """Hidden states and an adapter's a [n, D + R], as `chunks.Rows` takes them."""
    return hidden_nD if adapter_nR is None else torch.cat((hidden_nD, adapter_nR.to(hidden_nD.dtype)), 1)


@torch.no_grad()
def statistics_of(
    hidden_nD: Tensor,
    rows: Rows,
    most: int,
    temperature_n: Tensor | None = None,
    ranked_n: Tensor | None = None,
) -> tuple[TokenStatistics, Tensor | None]:
    """The same of a call that the ranks have agreed on; and how many ids are more likely than the label, int64 [n].

    Args:
        most: tokens that any rank brings.
        temperature_n: what each token's logits are divided by.
        ranked_n: int64, the labels whose rank is wanted, negative where there is none (their rank is 0). None: of none.
    """
    shard = rows.shard
    ranked_N = None if ranked_n is None else gather_values(ranked_n, shard, most, -1)
    tokens = Tokens(
        gather_values(hidden_nD.contiguous(), shard, most, 0),
        None if temperature_n is None else gather_values(temperature_n, shard, most, 1),
        None if ranked_N is None else shard.local_columns(ranked_N),
    )
    chunks = split(tokens)
    with torch.autocast(hidden_nD.device.type, enabled=False):
        summaries = [_summarise(chunk, rows) for chunk in chunks]
        floats_xN = torch.cat([floats for floats, _ in summaries], 1)
        merged = _merge(floats_xN[:5], torch.cat([ids for _, ids in summaries]), shard)
        rank_N: Tensor | None = None
        if ranked_N is not None:
            label_N = floats_xN[5].clone()
            if shard.vocab_group is not None:
                dist.all_reduce(label_N, group=shard.vocab_group)
            label_N = torch.where(ranked_N < 0, torch.inf, label_N)  # nothing is above it
            labels = label_N.split([chunk.hidden_cD.shape[0] for chunk in chunks])
            rank_N = torch.cat([_above(chunk, label_c, rows) for chunk, label_c in zip(chunks, labels, strict=True)])
            if shard.vocab_group is not None:
                dist.all_reduce(rank_N, group=shard.vocab_group)
    number = hidden_nD.shape[0]
    statistics = TokenStatistics(*(own(x_N, number, most, shard) for x_N in merged))
    return statistics, None if rank_N is None else own(rank_N, number, most, shard)


def _is_label(tokens: Tokens, first: int, z_cv: Tensor) -> Tensor:
    assert tokens.column_c is not None
    return torch.arange(first, first + z_cv.shape[1], device=z_cv.device) == tokens.column_c[:, None]


def _summarise(tokens: Tokens, rows: Rows) -> tuple[Tensor, Tensor]:
    """[5 or 6, c]: m = max z, Σ e, Σ e·(z − m), Σ e², Σ z with e = exp(z − m), and the label's z where it is this
    rank's, else 0; and the global row of the max, int64 [c]."""
    hidden_cD, dtype = tokens.hidden_cD, tokens.dtype
    lowest = torch.finfo(dtype).min
    max_c, (sum_c, weighted_c, squares_c, total_c, label_c) = (
        hidden_cD.new_full(hidden_cD.shape[:1], lowest, dtype=dtype),
        hidden_cD.new_zeros((5, hidden_cD.shape[0]), dtype=dtype),
    )
    argmax_c = torch.zeros_like(max_c, dtype=torch.int64)
    for first, z_cv in logits_of(tokens, rows):
        total_c = total_c + z_cv.sum(1)
        if tokens.column_c is not None:
            label_c = label_c + torch.where(_is_label(tokens, first, z_cv), z_cv, 0).sum(1)
        z_cv.clamp_(min=lowest)  # a bias may be −inf
        chunk_max_c, where_c = z_cv.max(1)
        argmax_c = torch.where(chunk_max_c > max_c, first + where_c, argmax_c)
        new_max_c = torch.maximum(max_c, chunk_max_c)
        decay_c, shift_c = torch.exp(max_c - new_max_c), (max_c - new_max_c).clamp(min=FAR)
        z_cv -= new_max_c[:, None]
        e_cv = z_cv.exp()
        sum_before_c, sum_c = sum_c, sum_c * decay_c + e_cv.sum(1)
        weighted_c = decay_c * (weighted_c + sum_before_c * shift_c) + (e_cv * z_cv.clamp_(min=FAR)).sum(1)
        squares_c = squares_c * decay_c**2 + (e_cv * e_cv).sum(1)
        max_c = new_max_c
    floats = [max_c, sum_c, weighted_c, squares_c, total_c, *([label_c] if tokens.column_c is not None else [])]
    return torch.stack(floats), global_rows(argmax_c, rows.shard)


def _above(tokens: Tokens, label_c: Tensor, rows: Rows) -> Tensor:
    """How many of this rank's rows have a larger logit than the label, int64 [c]."""
    above_c = torch.zeros_like(label_c, dtype=torch.int64)
    for first, z_cv in logits_of(tokens, rows):
        above_c += ((z_cv > label_c[:, None]) & ~_is_label(tokens, first, z_cv)).sum(1)
    return above_c


def _merge(floats_5N: Tensor, argmax_N: Tensor, shard: VocabShard) -> TokenStatistics:
    """Combines the shards' summaries: a MAX, a SUM, and a MIN over the candidates for the argmax."""
    max_N, *sums = floats_5N
    if shard.vocab_group is not None:
        own_max_N, max_N = max_N, max_N.clone()
        dist.all_reduce(max_N, dist.ReduceOp.MAX, group=shard.vocab_group)
        shift_N = own_max_N - max_N
        sum_N, weighted_N, squares_N, total_N = sums
        decay_N = shift_N.exp()
        weighted_N = decay_N * (weighted_N + sum_N * shift_N.clamp(min=FAR))
        packed_4N = torch.stack((sum_N * decay_N, weighted_N, squares_N * decay_N**2, total_N))
        dist.all_reduce(packed_4N, group=shard.vocab_group)
        sums = list(packed_4N)
        argmax_N = first_row(argmax_N, own_max_N == max_N, shard)
    sum_N, weighted_N, squares_N, total_N = sums
    return TokenStatistics(
        argmax_N, sum_N.log() - weighted_N / sum_N, squares_N.log() - 2 * sum_N.log(), total_N / shard.vocab_size
    )
