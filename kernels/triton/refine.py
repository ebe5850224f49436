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

from ..problem import Estimate, Filter, Logits, Normaliser, Summary
from .blocks import LN_2, can_use_tma, descriptor, finite, logits_of, precision, products_of_rows, without_frequent
from .operands import LAUNCH, operands_of
from .select import kept_tokens, pair_mass, select
from .tuning import tuning_for

_PROGRAMS_PER_TILE = 16
_TOKENS, _TILES = 256, 32
_LN_2 = tl.constexpr(LN_2)
_MOST_OFF = tl.constexpr(0.25)  # nats²: what a squared error of an estimate counts at the most


@triton.jit
def _large_pairs_kernel(
    exact_TN,
    operands,
    weight,
    kept,
    TILE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    PAIR_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """exact_TN[tile, n] = log2 Σ exp2(z) over the tile's columns, for the tokens that are listed."""
    tile = tl.program_id(0)
    count = tl.load(kept.count_T + tile)
    columns = tile * TILE + tl.arange(0, TILE)
    for first in range(tl.program_id(1) * PAIR_ROWS, count, PAIR_ROWS * tl.num_programs(1)):
        listed = first + tl.arange(0, PAIR_ROWS)
        valid = listed < count
        token = tl.load(kept.list_TN + tile.to(tl.int64) * kept.stride + listed, mask=valid, other=0).to(tl.int32)
        products = products_of_rows(
            operands, weight, token, valid, tile, PAIR_ROWS, TILE, PAIR_D, TMA, PRECISION, STAGES
        )
        n = tl.load(operands.place_N + token, mask=valid, other=0)
        z, _slope = logits_of(operands, products, columns, n, valid)
        z = without_frequent(operands, z, columns)
        max_n = finite(tl.max(z, 1))
        exact_n = max_n + tl.log2(tl.sum(tl.exp2(z - max_n[:, None]), 1))
        tl.store(exact_TN + tile.to(tl.int64) * operands.N + n, exact_n, mask=valid)


@triton.jit
def _sum_kernel(
    max_BN,
    sumexp_BN,
    exact_TN,
    operands,
    pairs,
    T,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
):
    """(max, Σ exp2) over a block of tiles: the large pairs' exact log-sum-exps and the others' estimates.

    What is left to estimates are those that were too small more than those that were too large: of the pairs near eps
    an error decides. In the mean their sum lacks eps·(number of pairs in a nat around eps)·(variance of their errors);
    the pairs just above eps, whose errors are known, show it, and count as much more. Their share falls from eps on, so
    a straight line through one octave is taken back to eps: weight 4 − 6x at x octaves above it.

    Backward selects by the tiles' log-sum-exps, so the exact ones replace their estimates. Tokens that are not valid
    get (0, 1).
    """
    N = operands.N
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = n < tl.load(operands.n_valid)
    max_n = tl.full([TOKENS], -float("inf"), tl.float32)
    sum_n = tl.zeros([TOKENS], tl.float32)
    first = tl.program_id(1) * TILES
    target_n = tl.load(operands.target_N + n, mask=valid, other=-1)
    target_tile_n = tl.where(target_n < 0, -1, target_n // TILE)
    threshold_n = tl.load(pairs.lse2_N + n, mask=valid, other=0.0) + tl.log2(pairs.eps)
    for index in range(first, min(first + TILES, T)):
        tile = tl.cast(index, tl.int32)
        _, large = pair_mass(operands, pairs, n, valid, tile, TILE)
        place = tile.to(tl.int64) * N + n
        relative = tl.load(pairs.tile_lse_TN + place, mask=valid, other=0.0).to(tl.float32)
        reference = tl.load(pairs.reference_SN + tile // pairs.tiles_per_split * N + n, mask=valid, other=0.0)
        exact = tl.load(exact_TN + place, mask=large, other=0.0)
        tl.store(pairs.tile_lse_TN + place, (exact - reference).to(pairs.tile_lse_TN.dtype.element_ty), mask=large)
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


@triton.jit
def _sum_blocks_kernel(out_2N, max_BN, sumexp_BN, B, N, TOKENS: tl.constexpr):
    """The blocks' sums put together, always in their order. Grid: blocks of tokens. Bytes: 8·B·N."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    max_n = tl.full([TOKENS], -float("inf"), tl.float32)
    sum_n = tl.zeros([TOKENS], tl.float32)
    for block in range(B):
        block_max_n = tl.load(max_BN + block * N + n, mask=n < N, other=0.0)
        new_max_n = tl.maximum(max_n, block_max_n)
        shift_n = finite(new_max_n)
        block_sum_n = tl.load(sumexp_BN + block * N + n, mask=n < N, other=0.0)
        sum_n = sum_n * tl.exp2(max_n - shift_n) + block_sum_n * tl.exp2(block_max_n - shift_n)
        max_n = new_max_n
    tl.store(out_2N + n, max_n, mask=n < N)
    tl.store(out_2N + N + n, sum_n, mask=n < N)


def refine(logits: Logits, estimate: Estimate, normaliser: Normaliser, eps: float) -> Summary:
    """The estimate's summary with max, Σ exp and large tiles refined; ``normaliser``: all shards' estimates merged."""
    weight_VD, tiles, operands = logits.weight_VD, estimate.summary.tiles, operands_of(logits)
    assert tiles is not None
    tuning = tuning_for(logits.hidden_ND, weight_VD)
    tma = tuning.tma and can_use_tma(weight_VD)
    lse2_N = (normaliser.max_N + normaliser.log_sum_N).sub_(estimate.margin_N, alpha=1 / LN_2)
    pairs = select(logits, tiles, lse2_N, Filter("filtered", eps))
    exact_TN = torch.empty(tiles.lse_TN.shape, dtype=torch.float32, device=weight_VD.device)
    _large_pairs_kernel[(logits.num_tiles, _PROGRAMS_PER_TILE)](
        exact_TN,
        operands,
        descriptor(weight_VD, logits.tile, tuning.pair_block_d, tma),
        kept_tokens(logits, pairs),
        TILE=logits.tile,
        TMA=tma,
        PRECISION=precision(logits),
        PAIR_ROWS=tuning.pair_rows,
        PAIR_D=tuning.pair_block_d,
        STAGES=tuning.pair_stages,
        num_warps=tuning.pair_warps,
        **LAUNCH,
    )
    blocks = triton.cdiv(logits.num_tiles, _TILES)
    max_BN, sumexp_BN = torch.empty((2, blocks, operands.N), dtype=torch.float32, device=weight_VD.device)
    _sum_kernel[(triton.cdiv(operands.N, _TOKENS), blocks)](
        max_BN,
        sumexp_BN,
        exact_TN,
        operands,
        pairs,
        logits.num_tiles,
        TILE=logits.tile,
        TOKENS=_TOKENS,
        TILES=_TILES,
        **LAUNCH,
    )
    out_2N = max_BN.new_empty((2, operands.N))
    _sum_blocks_kernel[(triton.cdiv(operands.N, _TOKENS),)](
        out_2N, max_BN, sumexp_BN, blocks, operands.N, TOKENS=_TOKENS, **LAUNCH
    )
    return estimate.summary._replace(max_N=out_2N[0], sumexp_N=out_2N[1])
