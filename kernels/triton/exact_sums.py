"""Sums whose bits do not depend on the batch or on the ranks: (max, Σ exp) and target logit of every (token, tile of
GLOBAL rows), and what they come to in whole numbers, which add up to the same in any order.

What a token's logit is made of must not depend on where the token and the row stand: each comes from tl.dot over all of
D in one order, in a block whose shape follows from GPU, dtype and D alone, and a tile is summed within one block; no
split of D, no running sum over tiles. Block, warps and stages are those of `Tuning`, at most; numbers that follow from
tokens, ranks or rows are not specialised on, so that one binary serves all; matrices begin at multiples of 16 bytes,
so that it is always the same loads.

`_sum_tiles_kernel`. Grid: two programs a multiprocessor, each walking over units of (block of tokens, tile); one's
epilogue runs beside the other's products, which is what the flat loop of `summarise` is for. BLOCK_N x 128 logits are
in registers (128 accumulators a thread on Hopper: one warpgroup). Token blocks of a group run side by side on the same
tile, so that it is read from memory once a group and hidden states stay in L2. FLOPs: 2·N·V·D. Bytes: read as in
`summarise`; 8·T·N written, 1/32 of 16-bit logits.
`_exact_units_kernel`. Grid: (blocks of tokens, groups of tiles). Bytes: 8·T·N read. Its int64 atomics add up to the
same in any order.

In: `Logits`, `GlobalTiles`. Out: `TileSums`, and its units.

Shapes: N tokens, D hidden, V rows, T tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..problem import SUM_BITS, GlobalTiles, Logits, TileSums
from .blocks import LN_2, can_use_tma, descriptor, dot_rows, finite, load_block, logits_of, precision
from .compact import compacted
from .operands import LAUNCH, operands_of
from .tuning import num_programs, tuning_for

_ONE = tl.constexpr(2.0**SUM_BITS)
_PROGRAMS, _STAGES = 2, 3
"""Programs a multiprocessor, and the most stages with which two have room."""
_UNIT_TOKENS, _UNIT_TILES = 128, 32


class _Sums(NamedTuple):
    """As `TileSums`, without the largest max."""

    max_TN: torch.Tensor
    sumexp_TN: torch.Tensor
    target_N: torch.Tensor


class _Rows(NamedTuple):
    """As `GlobalTiles`, on the device."""

    row_T: torch.Tensor
    rows_T: torch.Tensor


@triton.jit(do_not_specialize=["tiles", "N"])
def _sum_tiles_kernel(
    sums,
    rows_of,
    operands,
    hidden,
    weight,
    tiles,
    N,
    row_group,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    D = operands.D
    n_valid = tl.load(operands.n_valid)
    token_blocks = tl.cdiv(n_valid, BLOCK_N)
    for unit in range(tl.program_id(0), token_blocks * tiles, tl.num_programs(0)):
        first_block = unit // (row_group * tiles) * row_group
        blocks_in_group = min(token_blocks - first_block, row_group)
        within = unit - first_block * tiles
        first = (first_block + within % blocks_in_group) * BLOCK_N
        tile = within // blocks_in_group
        n = first + tl.arange(0, BLOCK_N)
        row = tl.load(rows_of.row_T + tile)
        stop = row + tl.load(rows_of.rows_T + tile)
        products = tl.zeros([BLOCK_N, TILE], tl.float32)
        for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            e = load_block(hidden, first, d, n_valid, D, operands.stride_hidden, BLOCK_N, BLOCK_D, TMA)
            c = load_block(weight, row, d, stop, D, operands.stride_weight, TILE, BLOCK_D, TMA)
            products = dot_rows(e, c, products, PRECISION)
        columns = row + tl.arange(0, TILE)
        columns = tl.where(columns < stop, columns, operands.V)  # past the tile's last row: past all
        z, _slope = logits_of(operands, products, columns, n, n < n_valid)
        max_n = tl.max(z, 1)
        # NaN logits do not survive the max but do reach this sum.
        sum_n = tl.sum(tl.exp2(z - finite(max_n)[:, None]), 1)
        at = tile.to(tl.int64) * N + n
        tl.store(sums.max_TN + at, max_n, mask=n < n_valid)
        tl.store(sums.sumexp_TN + at, sum_n, mask=n < n_valid)
        target_n = tl.load(operands.target_N + n, mask=n < n_valid, other=-1)
        logit_n = tl.sum(tl.where(target_n[:, None] == columns[None, :], z, 0.0), 1)
        tl.store(sums.target_N + n, logit_n, mask=(target_n >= row) & (target_n < stop))


@triton.jit(do_not_specialize=["tiles", "N"])
def _exact_units_kernel(units_3N, sums, max_N, n_valid_ptr, tiles, N, BLOCK_N: tl.constexpr, TILES: tl.constexpr):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = n < tl.load(n_valid_ptr)
    shift_n = finite(tl.load(max_N + n, mask=valid, other=0.0))
    units_n = tl.zeros([BLOCK_N], tl.int64)
    faults_n = tl.zeros([BLOCK_N], tl.int64)
    first = tl.program_id(1) * TILES
    for tile in range(first, min(first + TILES, tiles)):
        at = tl.cast(tile, tl.int64) * N + n
        max_n = tl.load(sums.max_TN + at, mask=valid, other=0.0)
        units = tl.load(sums.sumexp_TN + at, mask=valid, other=0.0) * tl.exp2(max_n - shift_n) * _ONE
        is_nan = units != units
        units_n += (tl.where(is_nan, 0.0, units) + 0.5).to(tl.int64)
        faults_n += is_nan.to(tl.int64)
    tl.atomic_add(units_3N + n, units_n, mask=valid)
    tl.atomic_add(units_3N + 2 * N + n, faults_n, mask=valid & (faults_n > 0))


def sum_tiles(logits: Logits, tiles: GlobalTiles) -> TileSums:
    """See `TileSums`."""
    tokens, number = logits.num_tokens, len(tiles.spans)
    hidden_ND, weight_VD = compacted(logits), _aligned(logits.weight_VD)
    max_TN, sumexp_TN = (hidden_ND.new_empty((number, tokens), dtype=torch.float32) for _ in range(2))
    target_N = max_TN.new_zeros(tokens)
    if not number or not tokens:
        return TileSums(max_TN, sumexp_TN, torch.full_like(target_N, -torch.inf), target_N, LN_2)
    dense = logits._replace(hidden_ND=hidden_ND, weight_VD=weight_VD)
    tuning = tuning_for(hidden_ND, weight_VD)
    tma = tuning.tma and can_use_tma(hidden_ND, weight_VD)
    # A number of rows that is a multiple of 16 whatever the shard; and not that of tokens.
    operands = operands_of(dense)._replace(N=0, V=triton.cdiv(weight_VD.shape[0], logits.tile) * logits.tile)
    _sum_tiles_kernel[(_PROGRAMS * num_programs(hidden_ND),)](
        _Sums(max_TN, sumexp_TN, target_N),
        _Rows(tiles.row_T, tiles.rows_T),
        operands,
        descriptor(hidden_ND, tuning.block_n, tuning.block_d, tma),
        descriptor(weight_VD, logits.tile, tuning.block_d, tma),
        number,
        tokens,
        tuning.row_group,
        TILE=logits.tile,
        BLOCK_N=tuning.block_n,
        BLOCK_D=tuning.block_d,
        TMA=tma,
        PRECISION=precision(logits),
        STAGES=min(tuning.stages, _STAGES),
        num_warps=max(tuning.warps * logits.tile // tuning.block_v, 4),
        **LAUNCH,
    )
    is_valid_N = torch.arange(tokens, device=logits.n_valid.device) < logits.n_valid
    return TileSums(max_TN, sumexp_TN, torch.where(is_valid_N, max_TN.amax(0), 0.0), target_N, LN_2)


def exact_units(sums: TileSums, max_N: torch.Tensor, n_valid: torch.Tensor) -> torch.Tensor:
    """See `torch_backend.exact_units`."""
    number, tokens = sums.max_TN.shape
    units_3N = torch.zeros((3, tokens), dtype=torch.int64, device=max_N.device)
    units_3N[1] = sums.target_N.view(torch.int32)
    if number and tokens:
        _exact_units_kernel[(triton.cdiv(tokens, _UNIT_TOKENS), triton.cdiv(number, _UNIT_TILES))](
            units_3N,
            _Sums(sums.max_TN, sums.sumexp_TN, sums.target_N),
            max_N,
            n_valid,
            number,
            tokens,
            BLOCK_N=_UNIT_TOKENS,
            TILES=_UNIT_TILES,
            **LAUNCH,
        )
    return units_3N


def _aligned(weight_VD: torch.Tensor) -> torch.Tensor:
    """Rows that begin at a multiple of 16 bytes, as almost all do: others would be loaded otherwise than a rank's that
    do."""
    return weight_VD if weight_VD.data_ptr() % 16 == 0 else weight_VD.clone()
