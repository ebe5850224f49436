"""The triton backend: forward and backward of the loss on one shard, from the stages in this package.

summarise, or estimate -> (the ranks combine) -> refine; -> (the ranks combine) -> select -> tail -> differentiate; or,
in exact mode and under torch.use_deterministic_algorithms, the chunked exact gradient, which is bitwise repeatable.
For log-probabilities that do not depend on the batch: sum_tiles -> (the ranks combine the max) -> exact_units.

Shapes: N tokens, D hidden, V local rows, T tiles.
"""

from collections.abc import Callable

import torch

from ..problem import (
    Estimate,
    Exponentials,
    Filter,
    GlobalTiles,
    Gradients,
    Keep,
    Logits,
    Normaliser,
    Order,
    Ordered,
    OutputGradients,
    Share,
    Summary,
    Tiles,
    TileSums,
    Upstream,
    Wanted,
)
from ..products import add_product, product
from . import compact, tokens
from . import estimate as estimate_stage
from . import exact_sums as exact_sums_stage
from . import refine as refine_stage
from . import summarise as summarise_stage
from .blocks import LN_2
from .differentiate import differentiate as differentiate_pairs
from .exact import differentiate_exactly, differentiate_rows
from .operands import Pairs, Tail
from .select import select, tail_rows
from .tail import tail_means

# fp16 has no range for small probabilities; they are at most about 2 before this factor.
_PROBABILITY_HEADROOM = {torch.float16: 2.0**14}
_TAIL_HEADROOM = {torch.float16: 2.0**10}


def summarise(
    logits: Logits, want_tiles: bool, workspace_bytes: int, want_entropy: bool = False, keep: Keep | None = None
) -> Summary:
    """See `Summary` and `Keep`; forward needs no workspace."""
    if _is_empty(logits):
        return _empty_summary(logits, want_tiles, want_entropy)
    with torch.cuda.device_of(logits.hidden_ND):  # Triton launches on the current device
        return summarise_stage.summarise(logits, want_tiles, want_entropy, keep)


def estimate(logits: Logits) -> Estimate:
    """A summary with tiles, from 8-bit products; once merged over ranks, `refine` makes it exact where it counts."""
    if _is_empty(logits):
        return Estimate(_empty_summary(logits, want_tiles=True), torch.zeros_like(logits.target_N))
    with torch.cuda.device_of(logits.hidden_ND):
        return estimate_stage.estimate(logits)


def refine(logits: Logits, estimate: Estimate, normaliser: Normaliser, eps: float) -> Summary:
    """The estimate's summary, its pairs of mass above ``eps`` in full; ``normaliser``: the shards' estimates merged."""
    if _is_empty(logits):
        return estimate.summary
    with torch.cuda.device_of(logits.hidden_ND):
        return refine_stage.refine(logits, estimate, normaliser, eps)


def sum_tiles(logits: Logits, tiles: GlobalTiles, workspace_bytes: int) -> TileSums:
    """Max, Σ exp and target logit of each (tile, token), the same bits whatever other tokens and tiles there are; no
    workspace is needed."""
    with torch.cuda.device_of(logits.hidden_ND):
        return exact_sums_stage.sum_tiles(logits, tiles)


def exact_units(sums: TileSums, max_N: torch.Tensor, n_valid: torch.Tensor) -> torch.Tensor:
    """See `torch_backend.exact_units`."""
    with torch.cuda.device_of(max_N):
        return exact_sums_stage.exact_units(sums, max_N, n_valid)


def valid_first(labels_N: torch.Tensor, column_N: torch.Tensor, ignore_index: int, vocab_size: int) -> Ordered:
    """The order of the tokens whose label is not ``ignore_index``, and their targets; ``column_N``: of the labels."""
    with torch.cuda.device_of(labels_N):
        return tokens.valid_first(labels_N, column_N, ignore_index, vocab_size)


def losses(normaliser: Normaliser, target_logit_N: torch.Tensor, order: Order) -> tuple[torch.Tensor, torch.Tensor]:
    """(nll [N], lse [N]) in the order before compaction, 0 where not valid."""
    with torch.cuda.device_of(target_logit_N):
        return tokens.losses(normaliser, target_logit_N, order)


def upstream(
    gradients: OutputGradients,
    order: Order,
    hidden_dtype: torch.dtype,
    dtype: torch.dtype,
    entropy_N: torch.Tensor | None = None,
    inverse_temperature_N: torch.Tensor | None = None,
) -> Upstream:
    """What the kernels take of the outputs' gradients. ``entropy_N``: of each token, where its gradient is wanted."""
    assert dtype == torch.float32
    with torch.cuda.device_of(order.token_N):
        return tokens.upstream(gradients, order, hidden_dtype, entropy_N, inverse_temperature_N)


def scatter_rows(
    rows_ND: torch.Tensor, token_N: torch.Tensor, n_valid: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """out[token[n]] = rows[n] in ``dtype`` for the first n_valid rows, 0 for the others."""
    with torch.cuda.device_of(rows_ND):
        return compact.scatter_rows(rows_ND, token_N, n_valid, dtype)


def join(others: Summary, part: Summary, share: Share | None) -> Summary:
    """The summary of two sets of rows, ``part`` of them for a share of the tokens (None: all of them)."""
    with torch.cuda.device_of(others.max_N):
        return summarise_stage.join(others, part, share)


def write_rows(out_VD: torch.Tensor, rows_KD: torch.Tensor, row_K: torch.Tensor, add: bool = False) -> None:
    """out[row[k]] = rows[k], or += if ``add``, but for row −1. ``row_K``: int32. Rows differ."""
    with torch.cuda.device_of(rows_KD):
        compact.write_rows(out_VD, rows_KD, row_K, add)


def _is_empty(logits: Logits) -> bool:
    return logits.num_tokens == 0 or logits.weight_VD.shape[0] == 0


def _empty_summary(logits: Logits, want_tiles: bool, want_entropy: bool = False) -> Summary:
    rows = logits.num_tokens
    zeros_N = torch.zeros(rows, dtype=torch.float32, device=logits.hidden_ND.device)
    tiles = Tiles(zeros_N.new_empty((logits.num_tiles, rows)), zeros_N.new_empty((0, rows)), 1)
    none_N = torch.full_like(zeros_N, -torch.inf)
    weighted_N = zeros_N.clone() if want_entropy else None
    return Summary(none_N, zeros_N, zeros_N.clone(), LN_2, tiles if want_tiles else None, weighted_N)


def differentiate(
    logits: Logits,
    tiles: Tiles | None,
    normaliser: Normaliser,
    upstream: Upstream,
    filter_: Filter,
    wanted: Wanted,
    hidden_ready: Callable[[torch.Tensor], None] | None = None,
    onto_ND: torch.Tensor | None = None,
    onto_NR: torch.Tensor | None = None,
    exponentials: Exponentials | None = None,
) -> Gradients:
    """The gradient of what `Upstream` stands for; see `Filter` and `Gradients`.

    With ``hidden_ready`` the sparse backward makes dE first, hands it over, and computes the kept pairs' probabilities
    once more for dC: what the caller does with dE (its reduction over ranks) runs beside that. ``onto_ND``: fp32, what
    dE is added to, in place; its rows may be apart. ``onto_NR``: the same of an adapter's da.
    ``exponentials``: what forward kept, for an exact gradient that is added to nothing; their labels' entries are
    written anew.
    """
    with torch.cuda.device_of(logits.hidden_ND):
        onto = onto_ND, onto_NR
        return _differentiate(logits, tiles, normaliser, upstream, filter_, wanted, hidden_ready, *onto, exponentials)


def _differentiate(
    logits: Logits,
    tiles: Tiles | None,
    normaliser: Normaliser,
    upstream: Upstream,
    filter_: Filter,
    wanted: Wanted,
    hidden_ready: Callable[[torch.Tensor], None] | None,
    onto_ND: torch.Tensor | None,
    onto_NR: torch.Tensor | None,
    exponentials: Exponentials | None,
) -> Gradients:
    hidden_ND, weight_VD = logits.hidden_ND, logits.weight_VD
    device, dtype = hidden_ND.device, hidden_ND.dtype
    sparse = tiles is not None and not torch.are_deterministic_algorithms_enabled()
    empty = _is_empty(logits)
    make_weight = torch.zeros if empty else torch.empty
    dweight_VD, adds = wanted.onto_VD, wanted.onto_VD is not None
    if wanted.weight and not adds:
        dweight_VD = make_weight(logits.trained[1].shape, dtype=wanted.weight_dtype, device=device)
    scratch_VD = None if adds else dweight_VD
    assert not wanted.bias or logits.bias_V is not None
    dbias_V = make_weight(weight_VD.shape[0], dtype=torch.float32, device=device) if wanted.bias else None
    headroom = _PROBABILITY_HEADROOM.get(dtype, 1.0)
    pairs, dhidden_ND = None, onto_ND if wanted.hidden else None
    dadapter_NR = onto_NR if wanted.adapter else None
    tail = Tail()
    if sparse and tiles is not None and not empty:
        pairs = select(logits, tiles, normaliser.max_N + normaliser.log_sum_N, filter_)
        if filter_.tail or filter_.mode == "unbiased":
            onto = dhidden_ND, dadapter_NR
            dhidden_ND, dadapter_NR, tail = _tail(logits, pairs, upstream, headroom, wanted, onto, scratch_VD)
    if wanted.hidden and dhidden_ND is None:
        dhidden_ND = torch.zeros((logits.num_tokens, hidden_ND.shape[1]), dtype=torch.float32, device=device)
    if wanted.adapter and dadapter_NR is None:
        shape = logits.num_tokens, logits.trained[1].shape[1]
        dadapter_NR = torch.zeros(shape, dtype=torch.float32, device=device)
    if empty:
        pass
    elif pairs is None:
        differentiate_exactly(
            logits,
            normaliser,
            upstream,
            dhidden_ND,
            dweight_VD,
            dbias_V,
            headroom,
            wanted.workspace_bytes,
            hidden_begun=onto_ND is not None,
            add_weight=adds,
            dadapter_NR=dadapter_NR,
            adapter_begun=onto_NR is not None,
            exponentials=exponentials,
        )
    else:
        passes = [Gradients(dhidden_ND, dweight_VD, dbias_V, dadapter_NR)]
        if hidden_ready is not None and dhidden_ND is not None and (wanted.weight or wanted.bias):
            passes = [Gradients(dhidden_ND, None, None, dadapter_NR), Gradients(None, dweight_VD, dbias_V)]
        for out in passes:
            differentiate_pairs(
                logits, pairs, normaliser, upstream, out, tail, headroom, wanted.workspace_bytes, scratch_VD, adds
            )
            if hidden_ready is not None and out.hidden_ND is not None:
                hidden_ready(out.hidden_ND)
    return Gradients(dhidden_ND, dweight_VD, dbias_V, dadapter_NR)


def add_rows(
    logits: Logits,
    row_K: torch.Tensor,
    normaliser: Normaliser,
    upstream: Upstream,
    out: Gradients,
    workspace_bytes: int,
    add_weight: bool = False,
) -> None:
    """Adds the gradient of some rows, exactly: dE to ``out``, their dC and dbias in place of what stands there, or dC
    to it (``add_weight``).

    ``logits.target_N`` are places in ``row_K`` (int32), or −1.
    """
    with torch.cuda.device_of(logits.hidden_ND):
        if not _is_empty(logits):
            headroom = _PROBABILITY_HEADROOM.get(logits.hidden_ND.dtype, 1.0)
            differentiate_rows(logits, row_K, normaliser, upstream, out, headroom, workspace_bytes, add_weight)


def _tail(
    logits: Logits,
    pairs: Pairs,
    upstream: Upstream,
    headroom: float,
    wanted: Wanted,
    onto: tuple[torch.Tensor | None, torch.Tensor | None],
    scratch_VD: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, Tail]:
    """Rᵀ c̃, with which dE begins, or what is added to it; the same of an adapter's da; and what the weight items of
    `differentiate` add to dC.

    In bf16 (R E) is rounded like R; fp16 has no range for it. ``scratch_VD``: dC, to be written later.
    """
    dtype = logits.hidden_ND.dtype
    own_headroom = _TAIL_HEADROOM.get(dtype, 1.0)
    factor = upstream.scale.float() * logits.logit_scale
    # fp16 has no range for means times the gradient's scale.
    late = factor / own_headroom if dtype == torch.float16 else None
    pi_V, mean_TD, mean_TR = tail_means(logits, pairs, factor if late is None else torch.ones_like(factor))
    tail_TN = tail_rows(logits, pairs, upstream, pi_V, dtype, own_headroom, scratch_VD)
    ratio = headroom / own_headroom
    if dtype == torch.bfloat16:  # before dE, so that the copy of the hidden states is gone then
        tail_TD = tail_TN @ compact.compacted(logits, logits.trained[0])
    else:
        tail_TD = product(tail_TN, compact.compacted(logits, logits.trained[0])).mul_(ratio)
    dhidden_ND = _add_means(onto[0], tail_TN, mean_TD, late) if wanted.hidden else None
    dadapter_NR = _add_means(onto[1], tail_TN, mean_TR, late) if wanted.adapter and mean_TR is not None else None
    tail_T = None if logits.bias_V is None else tail_TN.sum(1, dtype=torch.float32) * ratio
    return dhidden_ND, dadapter_NR, Tail(pi_V, tail_TD, tail_T)


def _add_means(
    onto_ND: torch.Tensor | None, tail_TN: torch.Tensor, mean_TD: torch.Tensor, late: torch.Tensor | None
) -> torch.Tensor:
    """Rᵀ c̃, times ``late`` if it is given; added to ``onto_ND``, in place, if there is one."""
    if onto_ND is not None and late is None:
        add_product(onto_ND, tail_TN.T, mean_TD)
        return onto_ND
    sum_ND = product(tail_TN.T, mean_TD)
    if late is not None:
        sum_ND *= late
    return sum_ND if onto_ND is None else onto_ND.add_(sum_ND)
