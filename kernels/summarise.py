"""Forward: for every token the max, Σ exp and target logit over this shard, and the log-sum-exp of every tile.

Grid: one program a multiprocessor, each walking over units of (block of rows, split of the vocabulary). A unit passes
over the split's blocks of columns; BLOCK_N x BLOCK_V logits are in registers (128 x 256 on Hopper: two warpgroups with
128 accumulators a thread), some tiles at once. Row blocks of a group run side by side on the same columns, so that a
block of the classifier is read from memory once a group and hidden states stay in L2. Where D is short, one flat loop
over (block, step along D) has the next block's loads under way during a block's epilogue; where it is long, that costs
more than it hides.
FLOPs: 2·N·V·D. Bytes: V·D·2·⌈N / (row_group·BLOCK_N)⌉ + N·D·2 read, 2·T·N of tile summaries written; the products
dominate by far. No atomics and no locks: each split writes its own partial, `_finish_kernel` merges them.

`estimate` is the same over 8-bit copies (see quantise.py) at twice the rate, a chunk of the classifier at a time, so
that its copy is small; its result is close enough to find the tiles that matter, which `refine` then computes in full.
It leaves out row blocks of which that would be most tiles.

Shapes: N tokens, D hidden, V local rows, v rows of a chunk, T tiles, t tiles of a block of columns, S splits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .blocks import LAUNCH, LN_2, LOG2_E, can_use_tma, descriptor, finite, load_block, logits_of, precision, softcapped
from .compact import compacted
from .problem import Estimate, Logits, Summary, Tiles
from .quantise import moments, quantise_hidden, quantise_weight, storage_dtype
from .tuning import Tuning, num_programs, tuning_for

_LN_2 = tl.constexpr(LN_2)
_FINISH_ROWS = 16
Partials = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(max, Σ exp, reference) of each split, [S, N] each."""


class InEightBits(NamedTuple):
    """What turns 8-bit products into logits; see `QuantisedHidden` and `QuantisedWeight`. Arguments of the kernel."""

    row_scale_N: torch.Tensor
    column_scale_V: torch.Tensor
    offset_N: torch.Tensor
    offset_V: torch.Tensor
    variance_N: torch.Tensor
    hopeless_N: torch.Tensor
    largest_norm: torch.Tensor


_COPY_BYTES = 128 << 20  # of the classifier's 8-bit copy: enough columns to fill the GPU several times over


@triton.jit
def _absorb_block(
    products,
    max_n,
    sum_n,
    reference_n,
    block,
    n,
    n_valid,
    bias,
    row_scale_n,
    column_scale_V,
    offset_n,
    offset_V,
    variance_n,
    tile_lse_TN,
    N,
    V,
    scale,
    softcap,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_TILES: tl.constexpr,
    IN_8_BITS: tl.constexpr,
):
    """Adds a block of logits to the running (max, Σ exp), and stores the log-sum-exp of each of its tiles."""
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    if IN_8_BITS:
        column_scale = tl.load(column_scale_V + columns, mask=columns < V, other=0.0)
        column_offset = tl.load(offset_V + columns, mask=columns < V, other=-float("inf"))
        z = products * row_scale_n[:, None] * column_scale[None, :] + (offset_n[:, None] + column_offset[None, :])
        if HAS_SOFTCAP:
            z, slope = softcapped(z, softcap, HAS_SOFTCAP)
            # The mean of exp(f(x + η)) is exp(f)·(1 + (f'² + f'')·σ²/2), and f'' = −2·f·f'/softcap².
            z -= slope * (slope - z * (2 / (LOG2_E * softcap * softcap))) * variance_n[:, None]
            z = tl.where((columns < V)[None, :], z, -float("inf"))
    else:
        z, _slope = logits_of(products, bias, columns, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    z = tl.reshape(z, [BLOCK_N, BLOCK_V // TILE, TILE])
    tile_max_nt = tl.max(z, 2)
    shift_nt = finite(tile_max_nt)
    # NaN logits do not survive the max but do reach this sum, and so the loss.
    tile_sum_nt = tl.sum(tl.exp2(z - shift_nt[:, :, None]), 2)
    if WANT_TILES:
        tile_lse_nt = shift_nt + tl.log2(tile_sum_nt)
        reference_n = tl.where(reference_n == -float("inf"), tl.max(tile_lse_nt, 1), reference_n)
        relative_nt = (tile_lse_nt - finite(reference_n)[:, None]).to(tile_lse_TN.dtype.element_ty)
        tile = block * (BLOCK_V // TILE) + tl.arange(0, BLOCK_V // TILE)
        inside = (n < n_valid)[:, None] & (tile * TILE < V)[None, :]
        tl.store(tile_lse_TN + tile.to(tl.int64)[None, :] * N + n[:, None], relative_nt, mask=inside)
    new_max_n = tl.maximum(max_n, tl.max(tile_max_nt, 1))
    shift_n = finite(new_max_n)
    sum_n = sum_n * tl.exp2(max_n - shift_n) + tl.sum(tile_sum_nt * tl.exp2(tile_max_nt - shift_n[:, None]), 1)
    return new_max_n, sum_n, reference_n


@triton.jit
def _summarise_kernel(
    hidden,
    weight,
    bias,
    row_scale_N,
    column_scale_V,
    offset_N,
    offset_V,
    variance_N,
    hopeless_N,
    largest_norm_ptr,
    n_valid_ptr,
    max_SN,
    sumexp_SN,
    reference_SN,
    tile_lse_TN,
    N,
    V,
    D,
    stride_hidden,
    stride_weight,
    scale,
    softcap,
    splits,
    blocks_per_split,
    row_group,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_TILES: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,
    IN_8_BITS: tl.constexpr,
):
    n_valid = tl.load(n_valid_ptr)
    row_blocks = tl.cdiv(n_valid, BLOCK_N)
    num_blocks = tl.cdiv(V, BLOCK_V)
    for unit in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        first_block = unit // (row_group * splits) * row_group
        blocks_in_group = min(row_blocks - first_block, row_group)
        within = unit - first_block * splits
        row = (first_block + within % blocks_in_group) * BLOCK_N
        split = within // blocks_in_group
        n = row + tl.arange(0, BLOCK_N)
        first_column_block = split * blocks_per_split
        max_n = tl.full([BLOCK_N], -float("inf"), tl.float32)
        sum_n = tl.zeros([BLOCK_N], tl.float32)
        reference_n = tl.full([BLOCK_N], -float("inf"), tl.float32)
        row_scale_n, offset_n, variance_n = sum_n, sum_n, sum_n
        blocks = min(blocks_per_split, num_blocks - first_column_block)
        if IN_8_BITS:
            row_scale_n = tl.load(row_scale_N + n, mask=n < n_valid, other=0.0)
            offset_n = tl.load(offset_N + n, mask=n < n_valid, other=0.0)
            if HAS_SOFTCAP:
                variance_n = tl.load(variance_N + n, mask=n < n_valid, other=0.0)
            hopeless_n = tl.load(hopeless_N + n, mask=n < n_valid, other=float("inf"))
            blocks = tl.where(tl.min(hopeless_n, 0) * tl.load(largest_norm_ptr) > 1, 0, blocks)
        if FLAT:
            products = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
            d_steps = tl.cdiv(D, BLOCK_D)
            for step in tl.range(0, blocks * d_steps, num_stages=STAGES):
                block = first_column_block + step // d_steps
                d = step % d_steps * BLOCK_D
                e = load_block(hidden, row, d, N, D, stride_hidden, BLOCK_N, BLOCK_D, TMA)
                c = load_block(weight, block * BLOCK_V, d, V, D, stride_weight, BLOCK_V, BLOCK_D, TMA)
                products = tl.dot(e, c.T, products, input_precision=PRECISION)
                if d + BLOCK_D >= D:
                    max_n, sum_n, reference_n = _absorb_block(
                        products,
                        max_n,
                        sum_n,
                        reference_n,
                        block,
                        n,
                        n_valid,
                        bias,
                        row_scale_n,
                        column_scale_V,
                        offset_n,
                        offset_V,
                        variance_n,
                        tile_lse_TN,
                        N,
                        V,
                        scale,
                        softcap,
                        TILE,
                        BLOCK_N,
                        BLOCK_V,
                        HAS_BIAS,
                        HAS_SOFTCAP,
                        WANT_TILES,
                        IN_8_BITS,
                    )
                    products = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        else:
            for block in range(first_column_block, first_column_block + blocks):
                products = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
                for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
                    e = load_block(hidden, row, d, N, D, stride_hidden, BLOCK_N, BLOCK_D, TMA)
                    c = load_block(weight, block * BLOCK_V, d, V, D, stride_weight, BLOCK_V, BLOCK_D, TMA)
                    products = tl.dot(e, c.T, products, input_precision=PRECISION)
                max_n, sum_n, reference_n = _absorb_block(
                    products,
                    max_n,
                    sum_n,
                    reference_n,
                    block,
                    n,
                    n_valid,
                    bias,
                    row_scale_n,
                    column_scale_V,
                    offset_n,
                    offset_V,
                    variance_n,
                    tile_lse_TN,
                    N,
                    V,
                    scale,
                    softcap,
                    TILE,
                    BLOCK_N,
                    BLOCK_V,
                    HAS_BIAS,
                    HAS_SOFTCAP,
                    WANT_TILES,
                    IN_8_BITS,
                )
        tl.store(max_SN + split * N + n, max_n, mask=n < n_valid)
        tl.store(sumexp_SN + split * N + n, sum_n, mask=n < n_valid)
        if WANT_TILES:
            tl.store(reference_SN + split * N + n, finite(reference_n), mask=n < n_valid)


@triton.jit
def _finish_kernel(
    hidden,
    weight,
    bias,
    target,
    token_N,
    n_valid_ptr,
    max_SN,
    sumexp_SN,
    max_N,
    sumexp_N,
    target_logit_N,
    N,
    D,
    stride_hidden,
    stride_weight,
    scale,
    softcap,
    splits,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Merges the splits and computes the targets' logits. Grid: one program a BLOCK_N rows. Bytes: 2·N·D·2 read."""
    n_valid = tl.load(n_valid_ptr)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = n < n_valid
    max_n = tl.full([BLOCK_N], -float("inf"), tl.float32)
    sum_n = tl.zeros([BLOCK_N], tl.float32)
    for split in range(splits):
        split_max_n = tl.load(max_SN + split * N + n, mask=valid, other=0.0)
        new_max_n = tl.maximum(max_n, split_max_n)
        shift_n = finite(new_max_n)
        sum_n = sum_n * tl.exp2(max_n - shift_n)
        sum_n += tl.load(sumexp_SN + split * N + n, mask=valid, other=1.0) * tl.exp2(split_max_n - shift_n)
        max_n = new_max_n
    target_n = tl.load(target + n, mask=valid, other=-1)
    owned = target_n >= 0
    token_n = tl.load(token_N + n, mask=owned, other=0)
    product_n = tl.zeros([BLOCK_N], tl.float32)
    for d in range(0, D, BLOCK_D):
        columns = d + tl.arange(0, BLOCK_D)
        use = owned[:, None] & (columns[None, :] < D)
        e = tl.load(hidden + token_n[:, None].to(tl.int64) * stride_hidden + columns[None, :], mask=use, other=0.0)
        c = tl.load(weight + target_n[:, None].to(tl.int64) * stride_weight + columns[None, :], mask=use, other=0.0)
        product_n += tl.sum(e.to(tl.float32) * c.to(tl.float32), 1)
    if HAS_BIAS:
        product_n += tl.load(bias + target_n, mask=owned, other=0.0).to(tl.float32)
    logit_n, _ = softcapped(product_n * scale, softcap, HAS_SOFTCAP)
    tl.store(target_logit_N + n, tl.where(owned, logit_n * _LN_2, 0.0), mask=n < N)
    tl.store(max_N + n, max_n, mask=n < N)
    tl.store(sumexp_N + n, sum_n, mask=n < N)


def summarise(logits: Logits, want_tiles: bool) -> Summary:
    """See `Summary`. Rows that are not valid get max 0, Σ exp S and target logit 0."""
    tuning = tuning_for(logits.hidden_ND)
    num_blocks = triton.cdiv(logits.weight_VD.shape[0], tuning.block_v)
    blocks_per_split = triton.cdiv(num_blocks, tuning.splits)
    partials, lse_TN = _empty_partials(logits, triton.cdiv(num_blocks, blocks_per_split), want_tiles)
    dense = logits._replace(hidden_ND=compacted(logits))
    _launch(dense, None, partials, lse_TN, blocks_per_split, tuning)
    tiles_per_split = blocks_per_split * tuning.block_v // logits.tile
    return _finish(logits, partials, None if lse_TN is None else Tiles(lse_TN, partials[2], tiles_per_split))


def estimate(logits: Logits) -> Estimate:
    """`summarise` with tiles, its logits off by about 4 % of their standard deviation, and sums of their exponentials
    right in the mean; target logits in full."""
    hidden_ND, weight_VD = logits.hidden_ND, logits.weight_VD
    vocab, hidden_size = weight_VD.shape
    tuning = tuning_for(hidden_ND).for_8_bits()
    num_blocks = triton.cdiv(vocab, tuning.block_v)
    chunks = triton.cdiv(num_blocks, max(_COPY_BYTES // (tuning.block_v * hidden_size), tuning.splits))
    # All chunks but the last hold the same number of splits, so that a tile's number tells its split.
    blocks_per_split = triton.cdiv(num_blocks, chunks * tuning.splits)
    rows_per_chunk = blocks_per_split * tuning.splits * tuning.block_v
    partials, lse_TN = _empty_partials(logits, triton.cdiv(num_blocks, blocks_per_split), want_tiles=True)
    max_SN, sumexp_SN, reference_SN = partials
    assert lse_TN is not None
    has_softcap = logits.softcap is not None
    of_weight, of_hidden = moments(weight_VD), moments(hidden_ND, logits.token_N, logits.n_valid)
    form = (logits.logit_scale, has_softcap)
    hidden = quantise_hidden(hidden_ND, of_hidden, of_weight, logits.token_N, logits.n_valid, *form)
    commons = (of_weight.mean_D, of_hidden.mean_D, hidden.column_variance)
    largest_norm = torch.zeros(1, dtype=torch.float32, device=hidden_ND.device)
    copy_vD = torch.empty(
        (min(rows_per_chunk, vocab), hidden_size),
        dtype=storage_dtype(hidden_ND),
        device=hidden_ND.device,
    )
    for first_row in range(0, vocab, rows_per_chunk):
        v = slice(first_row, first_row + rows_per_chunk)
        first_split = first_row // (blocks_per_split * tuning.block_v)
        weight_vD, bias_v = weight_VD[v], None if logits.bias_V is None else logits.bias_V[v]
        memory_vD = copy_vD[: weight_vD.shape[0]]
        weight = quantise_weight(weight_vD, bias_v, *commons, *form, largest_norm, memory_vD)
        _launch(
            logits._replace(hidden_ND=hidden.rows_ND, weight_VD=weight.rows_VD, bias_V=None),  # in the offsets
            InEightBits(
                hidden.scale_N,
                weight.scale_V,
                hidden.offset_N,
                weight.offset_V,
                hidden.variance_N,
                hidden.hopeless_N,
                largest_norm,
            ),
            (max_SN[first_split:], sumexp_SN[first_split:], reference_SN[first_split:]),
            lse_TN[first_row // logits.tile :],
            blocks_per_split,
            tuning,
        )
    tiles = Tiles(lse_TN, partials[2], blocks_per_split * tuning.block_v // logits.tile)
    return Estimate(_finish(logits, partials, tiles), hidden.margin(largest_norm))


def _empty_partials(logits: Logits, splits: int, want_tiles: bool) -> tuple[Partials, torch.Tensor | None]:
    """(max, Σ exp and reference of each split; the tiles' log-sum-exps [T, N] if wanted)."""
    hidden_ND = logits.hidden_ND
    # Apart, since backward keeps the references alone.
    max_SN, sumexp_SN, reference_SN = (
        hidden_ND.new_empty((splits, hidden_ND.shape[0]), dtype=torch.float32) for _ in range(3)
    )
    partials = (max_SN, sumexp_SN, reference_SN)
    if not want_tiles:
        return partials, None
    lse_dtype = torch.float32 if hidden_ND.dtype == torch.float32 else torch.float16
    return partials, hidden_ND.new_empty((logits.num_tiles, hidden_ND.shape[0]), dtype=lse_dtype)


def _launch(
    logits: Logits,
    in_8_bits: InEightBits | None,
    partials: Partials,
    lse_TN: torch.Tensor | None,
    blocks_per_split: int,
    tuning: Tuning,
) -> None:
    """Fills the partials of the splits of ``logits``, whose hidden states are compacted."""
    hidden_ND, weight_VD = logits.hidden_ND, logits.weight_VD
    (rows, hidden_size), vocab = hidden_ND.shape, weight_VD.shape[0]
    tma = tuning.tma and can_use_tma(hidden_ND, weight_VD)
    _summarise_kernel[(num_programs(hidden_ND),)](
        descriptor(hidden_ND, tuning.block_n, tuning.block_d, tma),
        descriptor(weight_VD, tuning.block_v, tuning.block_d, tma),
        logits.bias_V,
        *(in_8_bits or [None] * len(InEightBits._fields)),
        logits.n_valid,
        *partials,
        lse_TN,
        rows,
        vocab,
        hidden_size,
        hidden_ND.stride(0),
        weight_VD.stride(0),
        logits.logit_scale,
        1.0 if logits.softcap is None else logits.softcap,
        triton.cdiv(vocab, blocks_per_split * tuning.block_v),
        blocks_per_split,
        tuning.row_group,
        BLOCK_N=tuning.block_n,
        TILE=logits.tile,
        BLOCK_V=tuning.block_v,
        BLOCK_D=tuning.block_d,
        HAS_BIAS=logits.bias_V is not None,
        HAS_SOFTCAP=logits.softcap is not None,
        WANT_TILES=lse_TN is not None,
        TMA=tma,
        PRECISION=precision(logits),
        STAGES=tuning.stages,
        FLAT=hidden_size <= tuning.flat_below,
        IN_8_BITS=in_8_bits is not None,
        num_warps=tuning.warps,
        **LAUNCH,
    )


def _finish(logits: Logits, partials: Partials, tiles: Tiles | None) -> Summary:
    hidden_ND, weight_VD = logits.hidden_ND, logits.weight_VD
    rows, hidden_size = hidden_ND.shape
    max_SN, sumexp_SN, _ = partials
    merged = max_SN.new_empty((3, rows))
    _finish_kernel[(triton.cdiv(rows, _FINISH_ROWS),)](
        hidden_ND,
        weight_VD,
        logits.bias_V,
        logits.target_N,
        logits.token_N,
        logits.n_valid,
        max_SN,
        sumexp_SN,
        merged[0],
        merged[1],
        merged[2],
        rows,
        hidden_size,
        hidden_ND.stride(0),
        weight_VD.stride(0),
        logits.logit_scale,
        1.0 if logits.softcap is None else logits.softcap,
        max_SN.shape[0],
        BLOCK_N=_FINISH_ROWS,
        BLOCK_D=256,
        HAS_BIAS=logits.bias_V is not None,
        HAS_SOFTCAP=logits.softcap is not None,
        num_warps=4,
        **LAUNCH,
    )
    return Summary(merged[0], merged[1], merged[2], LN_2, tiles)
