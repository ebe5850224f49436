"""The collectives of the loss: a few numbers per token, hidden states, and their gradients.

Shapes: n tokens of this rank, M the most tokens that any rank brings, W ranks of the token group, N = W·M, D hidden.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cce_dist.device_check import device_check
from cce_dist.kernels.problem import FAR, SUM_BITS, Normaliser, Summary

# torch 2.13 renamed both and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


_MUST_BE_EQUAL = {
    "tokens": "{} differ between ranks that bring the same tokens: pass the same tokens, in one order, on all ranks "
    "that share the vocabulary, or, where each rank has tokens of its own, their group as token_group.",
    "frequent rows": "the ranks chose different frequent rows, because their counts of labels differ: a rank made a "
    "call, or its backward, that others did not make. Let all ranks make the same calls, or set frequent_rows=0.",
}


class Merged(NamedTuple):
    """Of each token over the whole vocabulary [N]: the log-sum-exp, the target's logit, and the entropy of the softmax
    in nats, if it is wanted."""

    normaliser: Normaliser
    target_N: Tensor
    entropy_N: Tensor | None


def merge_softmax(summary: Summary, group: ProcessGroup | None, equal: Mapping[str, Tensor] | None = None) -> Merged:
    """Combines the shards' (max, Σ exp(z − max), target logit) into the global ones: a MAX, then one packed SUM.

    A NaN reaches every rank through the SUM, because gloo's MAX drops it.

    Args:
        equal: `token_fingerprint` of what must be the same on all ranks of the group, by its name.

    Raises:
        ValueError: on every rank, where that differs; on CUDA a device-side assertion.
    """
    max_N, sumexp_N, target_N, unit, _, weighted_N, _ = summary
    if group is not None:
        own_max_N, max_N = max_N, _largest(max_N, group, equal or {})
        decay_N = torch.exp((own_max_N - max_N) * unit)
        sums = [sumexp_N * decay_N, target_N]
        if weighted_N is not None:
            sums.append((weighted_N + sumexp_N * (own_max_N - max_N).clamp(min=FAR)) * decay_N)
        packed_xN = torch.stack(sums)
        dist.all_reduce(packed_xN, dist.ReduceOp.SUM, group=group)
        sumexp_N, target_N, *rest = packed_xN
        weighted_N = rest[0] if rest else None
    log_sum_N = sumexp_N.log() / unit
    entropy_N = None if weighted_N is None else (log_sum_N - weighted_N / sumexp_N) * unit
    return Merged(Normaliser(max_N, log_sum_N, unit), target_N, entropy_N)


class ExactlyMerged(NamedTuple):
    """The same of sums that do not depend on the order: −log p of the target, and the log-sum-exp, rounded once."""

    normaliser: Normaliser
    nll_N: Tensor
    lse_N: Tensor


def merge_exactly(
    max_N: Tensor,
    units_of: Callable[[Tensor], Tensor],
    unit: float,
    group: ProcessGroup | None,
    equal: Mapping[str, Tensor] | None = None,
) -> ExactlyMerged:
    """Combines tiles of all shards so that no bit depends on who holds them: a MAX, then one SUM of whole numbers.

    −log p is by way of the max, which the target's logit, of the same bits, is not above: it is never below 0.

    Args:
        max_N: of this rank's tiles, in the backend's unit.
        units_of: `exact_units` of this rank's tiles, relative to a max.
        equal: as in `merge_softmax`.

    Raises:
        ValueError: as `merge_softmax`.
    """
    if group is not None:
        max_N = _largest(max_N, group, equal or {})
    units_3N = units_of(max_N)
    if group is not None:
        dist.all_reduce(units_3N, group=group)
    sum_N, bits_N, faults_N = units_3N
    target_N = bits_N.to(torch.int64 if max_N.dtype == torch.float64 else torch.int32).view(max_N.dtype)
    # The largest logit alone is 1 of the sum, whatever exp makes of 0; the sum is 0 where all logits are −inf.
    log_sum_N = (sum_N.double() * 2.0**-SUM_BITS).log().clamp_(min=0).masked_fill_(faults_N > 0, torch.nan)
    lse_N = max_N.double() * unit + log_sum_N
    nll_N = (max_N.double() - target_N.double()) * unit + log_sum_N
    normaliser = Normaliser(max_N, (log_sum_N / unit).to(max_N.dtype), unit)
    return ExactlyMerged(normaliser, nll_N.to(max_N.dtype), lse_N.to(max_N.dtype))


def _largest(max_N: Tensor, group: ProcessGroup, equal: Mapping[str, Tensor]) -> Tensor:
    """The MAX over ranks, and with it the comparison of what must be equal."""
    numbers = [sign * number for number in equal.values() for sign in (1, -1)]
    largest = torch.cat((max_N, torch.stack(numbers).to(max_N.dtype))) if numbers else max_N.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    if numbers:
        largest, pairs = largest.split((max_N.shape[0], len(numbers)))
        for name, pair in zip(equal, pairs.split(2), strict=True):
            _check_equal(pair, name)
    return largest


def token_fingerprint(labels_N: Tensor) -> Tensor:
    """A whole number below 2^24 that depends on every label and its place: exact in fp32. 0-d int64, on the device."""
    weight_N = torch.arange(1, labels_N.shape[0] + 1, device=labels_N.device) * 0x1E3779B97F4A7C15
    weight_N ^= weight_N >> 31  # int64 products wrap
    return ((weight_N * labels_N).sum() >> 40) & 0xFFFFFF


def check_same_tokens(labels_N: Tensor, name: str, group: ProcessGroup | None) -> None:
    """Compares what must be equal on all ranks of a group, by one MAX of two numbers.

    Raises:
        ValueError: on every rank, where they differ; on CUDA a device-side assertion.
    """
    number = token_fingerprint(labels_N)
    pair = torch.stack((number, -number))
    dist.all_reduce(pair, dist.ReduceOp.MAX, group=group)
    _check_equal(pair, name)


def _check_equal(pair: Tensor, name: str) -> None:
    """On the largest of c and of −c over ranks."""
    equal = pair[0] == -pair[1]
    message = _MUST_BE_EQUAL.get(name, _MUST_BE_EQUAL["tokens"]).format(name)
    if pair.is_cuda:
        device_check(equal, message)
    elif not equal:
        raise ValueError(message)


def gather_tokens(own: Tensor, most: int, group: ProcessGroup, fill: float | int = 0) -> Tensor:
    """All-gathers [n, ...] into [W·M, ...]; each rank's part is padded to M rows with ``fill``."""
    shape = own.shape[1:]
    padded = own.new_full((most, *shape), fill)
    padded[: own.shape[0]] = own
    gathered = own.new_empty((most * dist.get_world_size(group), *shape))
    if gathered.numel():
        # As bytes: what a backend can reduce does not limit what it can move.
        _all_gather(_bytes(gathered), _bytes(padded), group=group)
    return gathered


def reduce_scatter_tokens(partial_ND: Tensor, num_tokens: int, group: ProcessGroup) -> Tensor:
    """Sums [W·M, D] over the ranks; returns this rank's own [n, D]."""
    return start_reduce_scatter(partial_ND, num_tokens, group)()


def start_reduce_scatter(partial_ND: Tensor, num_tokens: int, group: ProcessGroup) -> Callable[[], Tensor]:
    """Starts `reduce_scatter_tokens`; its result when called. ``partial_ND`` must be left alone until then."""
    most = partial_ND.shape[0] // dist.get_world_size(group)
    if partial_ND.is_cuda and dist.get_backend(group) == "gloo":  # gloo reduce-scatters CPU tensors only
        first = most * dist.get_rank(group)
        finish = start_all_reduce(partial_ND, group)
        return lambda: finish()[first : first + num_tokens]
    own_MD = partial_ND.new_empty((most, *partial_ND.shape[1:]))
    work = _reduce_scatter(own_MD, partial_ND, group=group, async_op=True) if partial_ND.numel() else None

    def finish_scatter() -> Tensor:
        if work is not None:
            work.wait()
        return own_MD[:num_tokens]

    return finish_scatter


def start_all_reduce(partial: Tensor, group: ProcessGroup) -> Callable[[], Tensor]:
    """Starts summing ``partial`` in place over the ranks; the sum when called."""
    work = dist.all_reduce(partial, group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return partial

    return finish


def start_sum_of_one(part: Tensor, group: ProcessGroup) -> Callable[[], Tensor]:
    """`start_all_reduce`, bit for bit, of what is 0 on all ranks but one, element by element."""
    if not part.numel():
        return lambda: part
    finish = start_all_reduce(_bytes(part), group)  # as bytes: see gather_tokens

    def finish_sum() -> Tensor:
        finish()
        return part

    return finish_sum


def start_exchange_of_rows(rows_v: Tensor, row_K: Tensor, group: ProcessGroup | None) -> Callable[[], Tensor]:
    """Starts bringing K rows together, each of which one rank holds; all of them, when called.

    Args:
        rows_v: of this rank, [v, ...], of one dtype on all.
        row_K: which of them each is; −1: another rank's.
    """
    if group is None:
        return lambda: rows_v.index_select(0, row_K)
    own_K = (row_K >= 0).view(-1, *(1,) * (rows_v.ndim - 1))
    if rows_v.shape[0]:
        part_K = torch.where(own_K, rows_v[row_K.clamp(min=0)], 0)
    else:
        part_K = rows_v.new_zeros((row_K.shape[0], *rows_v.shape[1:]))
    return start_sum_of_one(part_K, group)


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


class _GroupMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_sum: Tensor, own_count: Tensor, group: ProcessGroup) -> Tensor:
        total = torch.stack((own_sum.double(), own_count.double()))
        dist.all_reduce(total, group=group)
        ctx.save_for_backward(total[1])
        ctx.group, ctx.dtype = group, own_sum.dtype
        return (total[0] / total[1]).to(own_sum.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (count,) = ctx.saved_tensors
        upstream = upstream.to(torch.float64, copy=True)
        dist.all_reduce(upstream, group=ctx.group)
        return (upstream / count).to(ctx.dtype), None, None


def group_mean(own_sum: Tensor, own_count: Tensor, group: ProcessGroup) -> Tensor:
    """Σ sums / Σ counts over the group, the same on every rank.

    Its gradient is that of Σ_r u_r·L_r, u_r the upstream of rank r: W times the mean's gradient where all u_r are 1,
    which a framework's averaging over the ranks divides back.
    """
    return _GroupMean.apply(own_sum, own_count, group)
