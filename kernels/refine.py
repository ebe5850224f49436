"""Refine: from an estimate of every (tile, row) to a log-sum-exp that is nearly that of the full products.

The pairs whose estimated softmax mass exceeds eps, and those of the targets, are computed in full; the others keep
their estimate. What is left of the estimate's error is that of the small pairs, independent from pair to pair and
weighted with their mass: on trained models a tenth of what rounding logits to bf16 costs. Its mean is zero: what noise
adds to exponentials is taken out in quantise.py, what choosing by noisy estimates takes away is added in `_sum_kernel`.
Where logits are so large that the estimate may be off by 0.9 nats, eps is lowered by what is beyond, down to all pairs
in full: then nothing rests on the estimate.

Grid: of the products (tiles, 16), each program taking every 16th block of PAIR_ROWS tokens kept with its tile; of the
sums (blocks of rows, blocks of tiles). FLOPs: 2·pairs·TILE·D. No atomics: the result is the same in every run.

Shapes: N tokens, D hidden, V local rows, T tiles, B blocks of tiles.
"""

import torch
import triton
import triton.language as tl

from .blocks import LAUNCH, LN_2, can_use_tma, descriptor, finite, logits_of, precision, products_of_rows
from .problem import Estimate, Filter, Logits, Normaliser, Summary
from .select import Selection, pair_mass
from .tuning import tuning_for

_PROGRAMS_PER_TILE = 16
_ROWS, _TILES = 256, 32
_LN_2 = tl.constexpr(LN_2)
_MOST_OFF = tl.constexpr(0.25)  # nats²: what a squared error of an estimate counts at the most


@triton.jit
def _large_pairs_kernel(
    exact_TN,
    list_TN,
    count_T,
    place_N,
    hidden,
    weight,
    bias,
    N,
    V,
    D,
    stride_hidden,
    stride_weight,
    scale,
    softcap,
    TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    PAIR_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """exact_TN[tile, n] = log2 Σ exp2(z) over the tile's columns, for the tokens that are listed."""
    tile = tl.program_id(0)
    count = tl.load(count_T + tile)
    columns = tile * TILE + tl.arange(0, TILE)
    for first in range(tl.program_id(1) * PAIR_ROWS, count, PAIR_ROWS * tl.num_programs(1)):
        listed = first + tl.arange(0, PAIR_ROWS)
        valid = listed < count
        token = tl.load(list_TN + tile.to(tl.int64) * N + listed, mask=valid, other=0).to(tl.int32)
        products = products_of_rows(
            token,
            valid,
            tile,
            hidden,
            weight,
            V,
            D,
            stride_hidden,
            stride_weight,
            PAIR_ROWS,
            TILE,
            PAIR_D,
            TMA,
            PRECISION,
            STAGES,
        )
        z, _slope = logits_of(products, bias, columns, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        max_n = finite(tl.max(z, 1))
        exact_n = max_n + tl.log2(tl.sum(tl.exp2(z - max_n[:, None]), 1))
        n = tl.load(place_N + token, mask=valid, other=0)
        tl.store(exact_TN + tile.to(tl.int64) * N + n, exact_n, mask=valid)


@triton.jit
def _sum_kernel(
    max_BN,
    sumexp_BN,
    exact_TN,
    tile_lse_TN,
    reference_SN,
    lse2_N,
    target_N,
    n_valid_ptr,
    eps,
    N,
    tiles_per_split,
    T,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """(max, Σ exp2) over a block of tiles: the large pairs' exact log-sum-exps and the others' estimates.

    What is left to estimates are those that were too small more than those that were too large: of the pairs near eps
    an error decides. In the mean their sum lacks eps·(number of pairs in a nat around eps)·(variance of their errors);
    the pairs just above eps, whose errors are known, show it, and count as much more. Their share falls from eps on, so
    a straight line through one octave is taken back to eps: weight 4 − 6x at x octaves above it.

    Backward selects by the tiles' log-sum-exps, so the exact ones replace their estimates. Rows that are not valid get
    (0, 1).
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = n < tl.load(n_valid_ptr)
    max_n = tl.full([ROWS], -float("inf"), tl.float32)
    sum_n = tl.zeros([ROWS], tl.float32)
    first = tl.program_id(1) * TILES
    target_n = tl.load(target_N + n, mask=valid, other=-1)
    target_tile_n = tl.where(target_n < 0, -1, target_n // TILE)
    threshold_n = tl.load(lse2_N + n, mask=valid, other=0.0) + tl.log2(eps)
    for index in range(first, min(first + TILES, T)):
        tile = tl.cast(index, tl.int32)
        _, large = pair_mass(n, valid, tile, tile_lse_TN, reference_SN, lse2_N, target_N, eps, N, tiles_per_split, TILE)
        place = tile.to(tl.int64) * N + n
        relative = tl.load(tile_lse_TN + place, mask=valid, other=0.0).to(tl.float32)
        reference = tl.load(reference_SN + tile // tiles_per_split * N + n, mask=valid, other=0.0)
        exact = tl.load(exact_TN + place, mask=large, other=0.0)
        tl.store(tile_lse_TN + place, (exact - reference).to(tile_lse_TN.dtype.element_ty), mask=large)
        estimated = relative + reference
        lse2_n = tl.where(large, exact, estimated)
        above = estimated - threshold_n
        near = large & (above > 0) & (above < 1) & (target_tile_n != tile)
        error = (exact - estimated) * _LN_2
        more = tl.where(near, 1 + (4 - 6 * above) * (1 / _LN_2) * tl.minimum(error * error, _MOST_OFF), 1.0)
        new_max_n = tl.maximum(max_n, lse2_n)
        shift_n = finite(new_max_n)
        sum_n = sum_n * tl.exp2(max_n - shift_n) + tl.exp2(lse2_n - shift_n) * more
        max_n = new_max_n
    place = tl.program_id(1) * N + n
    tl.store(max_BN + place, tl.where(valid, max_n, 0.0), mask=n < N)
    tl.store(sumexp_BN + place, tl.where(valid, sum_n, 1.0), mask=n < N)


def refine(logits: Logits, estimate: Estimate, normaliser: Normaliser, eps: float) -> Summary:
    """The estimate's summary with max, Σ exp and large tiles refined; ``normaliser``: all shards' estimates merged."""
    hidden_ND, weight_VD, tiles = logits.hidden_ND, logits.weight_VD, estimate.summary.tiles
    assert tiles is not None
    (rows, hidden_size), vocab = hidden_ND.shape, weight_VD.shape[0]
    tuning = tuning_for(hidden_ND)
    tma = tuning.tma and can_use_tma(weight_VD)
    lse2_N = normaliser.max_N + normaliser.log_sum_N - estimate.margin_N / LN_2
    selection = Selection(logits, tiles, lse2_N, Filter("filtered", eps))
    list_TN, count_T = selection.kept_tokens()
    exact_TN = torch.empty(tiles.lse_TN.shape, dtype=torch.float32, device=hidden_ND.device)
    _large_pairs_kernel[(logits.num_tiles, _PROGRAMS_PER_TILE)](
        exact_TN,
        list_TN,
        count_T,
        logits.place_N,
        hidden_ND,
        descriptor(weight_VD, logits.tile, tuning.pair_block_d, tma),
        logits.bias_V,
        rows,
        vocab,
        hidden_size,
        hidden_ND.stride(0),
        weight_VD.stride(0),
        logits.logit_scale,
        1.0 if logits.softcap is None else logits.softcap,
        TILE=logits.tile,
        HAS_BIAS=logits.bias_V is not None,
        HAS_SOFTCAP=logits.softcap is not None,
        TMA=tma,
        PRECISION=precision(logits),
        PAIR_ROWS=tuning.pair_rows,
        PAIR_D=tuning.pair_block_d,
        STAGES=tuning.pair_stages,
        num_warps=tuning.pair_warps,
        **LAUNCH,
    )
    blocks = triton.cdiv(logits.num_tiles, _TILES)
    max_BN, sumexp_BN = torch.empty((2, blocks, rows), dtype=torch.float32, device=hidden_ND.device)
    _sum_kernel[(triton.cdiv(rows, _ROWS), blocks)](
        max_BN,
        sumexp_BN,
        exact_TN,
        *selection.masses,
        logits.n_valid,
        eps,
        *selection.sizes,
        logits.num_tiles,
        TILE=logits.tile,
        ROWS=_ROWS,
        TILES=_TILES,
        **LAUNCH,
    )
    max_N = max_BN.amax(0)
    shift_N = torch.where(max_N == -torch.inf, 0.0, max_N)
    sumexp_N = (sumexp_BN * torch.exp2(max_BN - shift_N)).sum(0)
    return estimate.summary._replace(max_N=max_N, sumexp_N=sumexp_N)
