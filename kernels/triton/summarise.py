"""Forward: for every token the max, Σ exp and target logit over this shard, and the log-sum-exp of every tile; for the
entropy Σ exp(z − max)·(z − max) too.

Grid: one program a multiprocessor, each walking over units of (block of rows, split of the vocabulary). A unit passes
over the split's blocks of columns; BLOCK_N x BLOCK_V logits are in registers (128 x 256 on Hopper: two warpgroups with
128 accumulators a thread), some tiles at once. Row blocks of a group run side by side on the same columns, so that a
block of the classifier is read from memory once a group and hidden states stay in L2. Where D is short, one flat loop
over (block, step along D) has the next block's loads under way during a block's epilogue; where it is long, that costs
more than it hides.
FLOPs: 2·N·V·D. Bytes: V·D·2·⌈N / (row_group·BLOCK_N)⌉ + N·D·2 read, 2·T·N of tile summaries written; the products
dominate by far. No atomics and no locks: each split writes its own partial, `_finish_kernel` merges them.

What is kept for an exact backward: exp2(z − origin) of the first K columns, 2·N·K bytes written beside the products. A
token's origin must be known before its logits are: the largest of a sample of them. Where it proves to be too far from
the largest logit for 16 bits' exponent, the token's block of rows is computed once more with that one as origin.

In: `Logits`. Out: a `Summary`. estimate.py launches the same kernel on 8-bit copies.

Shapes: N tokens, D hidden, V local rows, T tiles, t tiles of a block of columns, S splits, K kept columns.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..problem import FAR, Exponentials, Keep, Logits, Share, Summary, Tiles
from .blocks import (
    BLOCK_R,
    LN_2,
    add_adapter,
    can_use_tma,
    descriptor,
    finite,
    load_block,
    load_rows,
    logits_of,
    precision,
    softcapped,
)
from .compact import compacted
from .operands import LAUNCH, operands_of
from .parts import PARTS, are_in_parts, columns_of_a_copy, hidden_column, in_parts, width_of
from .quantise import InEightBits, logits_in_8_bits
from .tuning import Tuning, num_programs, tuning_for

_LN_2, _FAR = tl.constexpr(LN_2), tl.constexpr(FAR)
_FINISH_TOKENS = 16
_JOINED = 256
_SAMPLED, _SAMPLED_TOKENS = 64, 64
_COPY_BYTES = 192 << 20  # of a copy of fp32 rows, see parts.py: 16 splits of 512 rows at D = 4096
_BELOW, _ABOVE = tl.constexpr(-1.0), tl.constexpr(60.0)
"""How far above the origin the largest logit may lie, in bits. Of 2^60 and less sums stay far from the largest number;
what is lost at the other end, below 2^-126, is less than 2^-100 of the largest."""


class Partials(NamedTuple):
    """Of each split [S, N]: max, Σ exp, the reference of its tiles' log-sum-exps, and, where the entropy is wanted,
    Σ exp(z − max)·(z − max)."""

    max_SN: torch.Tensor
    sumexp_SN: torch.Tensor
    reference_SN: torch.Tensor
    weighted_SN: torch.Tensor | None = None


class Stored(NamedTuple):
    """Where exp2(z − origin) of the first ``columns`` goes; rows are ``stride`` apart."""

    exp_NK: torch.Tensor
    origin_N: torch.Tensor
    columns: int
    stride: int


@triton.jit
def _block_logits(
    operands,
    in_8_bits,
    products,
    block,
    row_scale_n,
    offset_n,
    variance_n,
    n,
    token_n,
    valid,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    if in_8_bits is not None:
        z = logits_in_8_bits(
            operands, in_8_bits, products, columns, row_scale_n, offset_n, variance_n, token_n, valid, PRECISION
        )
        slope = 1.0
    else:
        z, slope = logits_of(operands, products, columns, n, valid)
    return z, slope


@triton.jit
def _absorb_block(
    z,
    slope,
    max_n,
    sum_n,
    weighted_n,
    reference_n,
    tile_lse_TN,
    operands,
    frequent_V,
    block,
    n,
    n_valid,
    stored,
    origin_n,
    TILE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ENTROPY: tl.constexpr,
    SLOPED: tl.constexpr,
):
    """Adds a block of logits to the running max, Σ exp and, for the entropy, Σ exp(z − max)·(z − max); stores the
    log-sum-exp of each of its tiles, without those of ``frequent_V``, and what is kept of it."""
    z = tl.reshape(z, [z.shape[0], BLOCK_V // TILE, TILE])
    tile_max_nt = tl.max(z, 2)
    shift_nt = finite(tile_max_nt)
    # NaN logits do not survive the max but do reach this sum, and so the loss.
    e = tl.exp2(z - shift_nt[:, :, None])
    if stored is not None:
        # By the tile's max itself: where that is −inf, e is 0, and the power must not be infinite.
        kept = e * tl.exp2(tile_max_nt - origin_n[:, None])[:, :, None]
        if SLOPED:
            kept *= tl.reshape(slope, kept.shape)
        kept = kept.to(stored.exp_NK.dtype.element_ty)
    tile_sum_nt = tl.sum(e, 2)
    if tile_lse_TN is not None:
        stored_nt = tile_sum_nt
        if frequent_V is not None:
            # In the layout of z: a reshaped mask takes registers that are not there.
            columns = block * BLOCK_V + tl.arange(0, BLOCK_V // TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
            frequent = tl.load(frequent_V + columns, mask=columns < operands.V, other=-1) >= 0
            stored_nt = tl.sum(tl.where(frequent[None, :, :], 0.0, e), 2)
        tile_lse_nt = shift_nt + tl.log2(stored_nt)
        reference_n = tl.where(reference_n == -float("inf"), tl.max(tile_lse_nt, 1), reference_n)
        relative_nt = (tile_lse_nt - finite(reference_n)[:, None]).to(tile_lse_TN.dtype.element_ty)
        tile = block * (BLOCK_V // TILE) + tl.arange(0, BLOCK_V // TILE)
        inside = (n < n_valid)[:, None] & (tile * TILE < operands.V)[None, :]
        tl.store(tile_lse_TN + tile.to(tl.int64)[None, :] * operands.N + n[:, None], relative_nt, mask=inside)
    new_max_n = tl.maximum(max_n, tl.max(tile_max_nt, 1))
    shift_n = finite(new_max_n)
    if ENTROPY:
        below = tl.sum(e * tl.maximum(z - shift_nt[:, :, None], _FAR), 2)
        below += tile_sum_nt * tl.maximum(tile_max_nt - shift_n[:, None], _FAR)
        weighted_n = (weighted_n + sum_n * tl.maximum(max_n - shift_n, _FAR)) * tl.exp2(max_n - shift_n)
        weighted_n += tl.sum(below * tl.exp2(tile_max_nt - shift_n[:, None]), 1)
    sum_n = sum_n * tl.exp2(max_n - shift_n) + tl.sum(tile_sum_nt * tl.exp2(tile_max_nt - shift_n[:, None]), 1)
    if stored is not None:
        column = block * BLOCK_V + tl.arange(0, BLOCK_V // TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
        pointers = stored.exp_NK + n.to(tl.int64)[:, None, None] * stored.stride + column[None, :, :]
        inside = (n < n_valid)[:, None, None] & (column < stored.columns)[None, :, :]
        tl.store(pointers, kept, mask=inside)
    return new_max_n, sum_n, weighted_n, reference_n


@triton.jit
def _summarise_kernel(
    partials,
    tile_lse_TN,
    operands,
    hidden,
    weight,
    in_8_bits,
    stored,
    earlier_N,
    splits,
    blocks_per_split,
    row_group,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,
    ENTROPY: tl.constexpr,
    SLOPED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """With ``earlier_N`` it stores once more, and nothing else, for blocks of tokens whose origins are no longer
    those."""
    N, V, D = operands.N, operands.V, operands.D
    if in_8_bits is None:
        apart = operands.frequent_V
    else:
        apart = None  # −inf in the logits
    n_valid = tl.load(operands.n_valid)
    row_blocks = tl.cdiv(n_valid, BLOCK_N)
    num_blocks = tl.cdiv(V, BLOCK_V)
    width = width_of(D, BLOCK_D, PARTS)
    d_steps = tl.cdiv(width, BLOCK_D)
    for unit in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        first_block = unit // (row_group * splits) * row_group
        blocks_in_group = min(row_blocks - first_block, row_group)
        within = unit - first_block * splits
        row = (first_block + within % blocks_in_group) * BLOCK_N
        split = within // blocks_in_group
        n = row + tl.arange(0, BLOCK_N)
        token_n = n
        if operands.adapter_NR is not None:
            token_n = tl.load(operands.token_N + n, mask=n < n_valid, other=0)
        first_column_block = split * blocks_per_split
        max_n = tl.full([BLOCK_N], -float("inf"), tl.float32)
        sum_n = tl.zeros([BLOCK_N], tl.float32)
        reference_n = tl.full([BLOCK_N], -float("inf"), tl.float32)
        row_scale_n, offset_n, variance_n, weighted_n = sum_n, sum_n, sum_n, sum_n
        blocks = min(blocks_per_split, num_blocks - first_column_block)
        origin_n = max_n
        if stored is not None:
            origin_n = tl.load(stored.origin_N + n, mask=n < n_valid, other=0.0)
            if earlier_N is not None:
                changed_n = origin_n != tl.load(earlier_N + n, mask=n < n_valid, other=0.0)
                kept_blocks = tl.cdiv(stored.columns, BLOCK_V) - first_column_block
                blocks = tl.where(tl.max(changed_n.to(tl.int32), 0) > 0, min(blocks, kept_blocks), 0)
        if in_8_bits is not None:
            row_scale_n = tl.load(in_8_bits.row_scale_N + n, mask=n < n_valid, other=0.0)
            offset_n = tl.load(in_8_bits.offset_N + n, mask=n < n_valid, other=0.0)
            if operands.softcap is not None:
                variance_n = tl.load(in_8_bits.variance_N + n, mask=n < n_valid, other=0.0)
            hopeless_n = tl.load(in_8_bits.hopeless_N + n, mask=n < n_valid, other=float("inf"))
            blocks = tl.where(tl.min(hopeless_n, 0) * tl.load(in_8_bits.largest_norm) > 1, 0, blocks)
        if FLAT:
            products = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
            for step in tl.range(0, blocks * d_steps, num_stages=STAGES):
                block = first_column_block + step // d_steps
                d = step % d_steps * BLOCK_D
                of_hidden = hidden_column(d, D, BLOCK_D, PARTS)
                e = load_block(hidden, row, of_hidden, N, D, operands.stride_hidden, BLOCK_N, BLOCK_D, TMA)
                c = load_block(weight, block * BLOCK_V, d, V, width, operands.stride_weight, BLOCK_V, BLOCK_D, TMA)
                products = tl.dot(e, c.T, products, input_precision=PRECISION)
                if d + BLOCK_D >= width:
                    z, slope = _block_logits(
                        operands,
                        in_8_bits,
                        products,
                        block,
                        row_scale_n,
                        offset_n,
                        variance_n,
                        n,
                        token_n,
                        n < n_valid,
                        BLOCK_V,
                        PRECISION,
                    )
                    max_n, sum_n, weighted_n, reference_n = _absorb_block(
                        z,
                        slope,
                        max_n,
                        sum_n,
                        weighted_n,
                        reference_n,
                        tile_lse_TN,
                        operands,
                        apart,
                        block,
                        n,
                        n_valid,
                        stored,
                        origin_n,
                        TILE,
                        BLOCK_V,
                        ENTROPY,
                        SLOPED,
                    )
                    products = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        else:
            for block in range(first_column_block, first_column_block + blocks):
                products = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
                if in_8_bits is None:
                    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
                    products = add_adapter(products, operands, token_n, n < n_valid, columns, None, PRECISION)
                for d in tl.range(0, width, BLOCK_D, num_stages=STAGES):
                    of_hidden = hidden_column(d, D, BLOCK_D, PARTS)
                    e = load_block(hidden, row, of_hidden, N, D, operands.stride_hidden, BLOCK_N, BLOCK_D, TMA)
                    c = load_block(weight, block * BLOCK_V, d, V, width, operands.stride_weight, BLOCK_V, BLOCK_D, TMA)
                    products = tl.dot(e, c.T, products, input_precision=PRECISION)
                z, slope = _block_logits(
                    operands,
                    in_8_bits,
                    products,
                    block,
                    row_scale_n,
                    offset_n,
                    variance_n,
                    n,
                    token_n,
                    n < n_valid,
                    BLOCK_V,
                    PRECISION,
                )
                max_n, sum_n, weighted_n, reference_n = _absorb_block(
                    z,
                    slope,
                    max_n,
                    sum_n,
                    weighted_n,
                    reference_n,
                    tile_lse_TN,
                    operands,
                    apart,
                    block,
                    n,
                    n_valid,
                    stored,
                    origin_n,
                    TILE,
                    BLOCK_V,
                    ENTROPY,
                    SLOPED,
                )
        if earlier_N is None:
            tl.store(partials.max_SN + split * N + n, max_n, mask=n < n_valid)
            tl.store(partials.sumexp_SN + split * N + n, sum_n, mask=n < n_valid)
            if ENTROPY:
                tl.store(partials.weighted_SN + split * N + n, weighted_n, mask=n < n_valid)
            if tile_lse_TN is not None:
                tl.store(partials.reference_SN + split * N + n, finite(reference_n), mask=n < n_valid)


@triton.jit
def _origin_kernel(
    stored,
    operands,
    hidden,
    weight,
    TOKENS: tl.constexpr,
    SAMPLED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The largest of some logits of each token; 0 in what is kept of tokens that are not valid.

    Grid: one program a block of TOKENS. FLOPs: 2·N·D·SAMPLED.
    """
    N, V, D = operands.N, operands.V, operands.D
    n_valid = tl.load(operands.n_valid)
    first = tl.program_id(0) * TOKENS
    n = first + tl.arange(0, TOKENS)
    if first < n_valid:
        row = (tl.arange(0, SAMPLED).to(tl.int64) * V // SAMPLED).to(tl.int32)
        products = tl.zeros([TOKENS, SAMPLED], tl.float32)
        for d in range(0, D, BLOCK_D):
            e = load_block(hidden, first, d, N, D, D, TOKENS, BLOCK_D, False)
            c = load_rows(weight, row, row < V, d, D, operands.stride_weight, BLOCK_D)
            products = tl.dot(e, c.T, products, input_precision=PRECISION)
        z, _slope = logits_of(operands, products, row, n, n < n_valid)
        tl.store(stored.origin_N + n, finite(tl.max(z, 1)), mask=n < n_valid)
    if first + TOKENS > n_valid:
        rows = stored.exp_NK + n.to(tl.int64)[:, None] * stored.stride
        for column in range(0, stored.columns, 128):
            k = column + tl.arange(0, 128)
            inside = ((n >= n_valid) & (n < N))[:, None] & (k < stored.columns)[None, :]
            tl.store(rows + k[None, :], tl.zeros([TOKENS, 128], stored.exp_NK.dtype.element_ty), mask=inside)


@triton.jit
def _finish_kernel(
    merged_4N,
    partials,
    operands,
    weight,
    stored,
    splits,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merges the splits and computes the targets' logits; the last row, if anything is kept, are the origins that the
    largest logits ask for. Grid: one program a BLOCK_N tokens. Bytes: 2·N·D·2 read."""
    N, D = operands.N, operands.D
    n_valid = tl.load(operands.n_valid)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = n < n_valid
    max_n = tl.full([BLOCK_N], -float("inf"), tl.float32)
    sum_n = tl.zeros([BLOCK_N], tl.float32)
    weighted_n = sum_n
    for split in range(splits):
        split_max_n = tl.load(partials.max_SN + split * N + n, mask=valid, other=0.0)
        split_sum_n = tl.load(partials.sumexp_SN + split * N + n, mask=valid, other=1.0)
        new_max_n = tl.maximum(max_n, split_max_n)
        shift_n = finite(new_max_n)
        if partials.weighted_SN is not None:
            split_weighted_n = tl.load(partials.weighted_SN + split * N + n, mask=valid, other=0.0)
            split_weighted_n += split_sum_n * tl.maximum(split_max_n - shift_n, _FAR)
            weighted_n = (weighted_n + sum_n * tl.maximum(max_n - shift_n, _FAR)) * tl.exp2(max_n - shift_n)
            weighted_n += split_weighted_n * tl.exp2(split_max_n - shift_n)
        sum_n = sum_n * tl.exp2(max_n - shift_n)
        sum_n += split_sum_n * tl.exp2(split_max_n - shift_n)
        max_n = new_max_n
    target_n = tl.load(operands.target_N + n, mask=valid, other=-1)
    owned = target_n >= 0
    token_n = tl.load(operands.token_N + n, mask=owned, other=0)
    product_n = tl.zeros([BLOCK_N], tl.float32)
    for d in range(0, D, BLOCK_D):
        e = load_rows(operands.hidden, token_n, owned, d, D, operands.stride_hidden, BLOCK_D)
        c = load_rows(weight, target_n, owned, d, D, operands.stride_weight, BLOCK_D)
        product_n += tl.sum(e.to(tl.float32) * c.to(tl.float32), 1)
    if operands.adapter_NR is not None:
        for r in range(0, operands.R, BLOCK_R):
            a = load_rows(operands.adapter_NR, token_n, owned, r, operands.R, operands.R, BLOCK_R)
            b = load_rows(operands.adapter_VR, target_n, owned, r, operands.R, operands.R, BLOCK_R)
            product_n += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    if operands.bias is not None:
        product_n += tl.load(operands.bias + target_n, mask=owned, other=0.0).to(tl.float32)
    logit_n, _ = softcapped(product_n * operands.scale, operands.softcap)
    if operands.inverse_temperature_N is not None:
        logit_n *= tl.load(operands.inverse_temperature_N + n, mask=valid, other=1.0)
    tl.store(merged_4N + n, max_n, mask=n < N)
    tl.store(merged_4N + N + n, sum_n, mask=n < N)
    tl.store(merged_4N + 2 * N + n, tl.where(owned, logit_n * _LN_2, 0.0), mask=n < N)
    if partials.weighted_SN is not None:
        tl.store(merged_4N + 3 * N + n, weighted_n, mask=n < N)
    if stored is not None:
        origin_n = tl.load(stored.origin_N + n, mask=valid, other=0.0)
        is_near_n = (max_n - origin_n >= _BELOW) & (max_n - origin_n <= _ABOVE)
        last = 3 if partials.weighted_SN is None else 4
        tl.store(merged_4N + last * N + n, tl.where(is_near_n, origin_n, finite(max_n)), mask=n < N)


@triton.jit
def _join_kernel(out_3N, others, part, share, N, TOKENS: tl.constexpr):
    """Grid: one program a block of TOKENS. Bytes: 36·N."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    m, use = n, n < N
    if share is not None:
        m = n - tl.load(share.first) - share.turn
        use = use & (m >= 0) & (m % share.turns == 0) & (m // share.turns < tl.load(share.valid_M))
        m = m // share.turns
    own_max = tl.load(others.max_N + n, mask=n < N, other=0.0)
    own_sum = tl.load(others.sumexp_N + n, mask=n < N, other=0.0)
    target = tl.load(others.target_N + n, mask=n < N, other=0.0)
    part_max = tl.load(part.max_N + m, mask=use, other=-float("inf"))
    part_sum = tl.load(part.sumexp_N + m, mask=use, other=0.0)
    target += tl.load(part.target_N + m, mask=use, other=0.0)
    new_max = tl.maximum(own_max, part_max)
    shift = finite(new_max)
    total = own_sum * tl.exp2(own_max - shift) + part_sum * tl.exp2(part_max - shift)
    tl.store(out_3N + n, new_max, mask=n < N)
    tl.store(out_3N + N + n, total, mask=n < N)
    tl.store(out_3N + 2 * N + n, target, mask=n < N)


class _Sums(NamedTuple):
    max_N: torch.Tensor
    sumexp_N: torch.Tensor
    target_N: torch.Tensor


def join(others: Summary, part: Summary, share: Share | None) -> Summary:
    """See `backend.join`."""
    tokens = others.max_N.shape[0]
    out_3N = others.max_N.new_empty((3, tokens))
    if tokens:
        _join_kernel[(triton.cdiv(tokens, _JOINED),)](
            out_3N,
            _Sums(*others[:3]),
            _Sums(*part[:3]),
            share,
            tokens,
            TOKENS=_JOINED,
            **LAUNCH,
        )
    return others._replace(max_N=out_3N[0], sumexp_N=out_3N[1], target_N=out_3N[2])


def summarise(logits: Logits, want_tiles: bool, want_entropy: bool = False, keep: Keep | None = None) -> Summary:
    """See `Summary`. Rows that are not valid get max 0, Σ exp S and target logit 0."""
    if are_in_parts(logits):
        assert keep is None
        return _summarise_in_parts(logits, want_tiles, want_entropy)
    tuning = tuning_for(logits.hidden_ND, logits.weight_VD)
    num_blocks = triton.cdiv(logits.weight_VD.shape[0], tuning.block_v)
    blocks_per_split = triton.cdiv(num_blocks, tuning.splits)
    splits = triton.cdiv(num_blocks, blocks_per_split)
    partials, lse_TN = _empty_partials(logits, splits, want_tiles, want_entropy)
    dense = logits._replace(hidden_ND=compacted(logits))
    stored = None if keep is None else _begin_storing(dense, keep)
    sloped = keep is not None and keep.sloped and logits.softcap is not None
    launch(dense, None, partials, lse_TN, blocks_per_split, tuning, stored, sloped=sloped)
    tiles = _tiles_of(lse_TN, partials, blocks_per_split * tuning.block_v, logits)
    summary = finish(logits, partials, tiles, stored)
    if stored is None or keep is None or summary.exponentials is None:
        return summary
    once_more = stored._replace(origin_N=summary.exponentials.origin_N)
    partials = partials._replace(weighted_SN=None)
    launch(dense, None, partials, None, blocks_per_split, tuning, once_more, stored.origin_N, sloped)
    return summary._replace(exponentials=summary.exponentials._replace(sloped=keep.sloped))


def _summarise_in_parts(logits: Logits, want_tiles: bool, want_entropy: bool) -> Summary:
    """`summarise` of rows in fp32, by copies of chunks of them."""
    hidden_ND = compacted(logits)
    tuning = tuning_for(hidden_ND, hidden_ND)
    columns = columns_of_a_copy(hidden_ND.shape[1], tuning.block_d)
    row_bytes = columns * hidden_ND.element_size()
    blocks = _COPY_BYTES // (tuning.block_v * row_bytes)  # wide rows leave room for fewer splits
    tuning = tuning._replace(splits=max(min(tuning.splits, blocks), 1))
    chunks = begin_chunks(logits, tuning, row_bytes, _COPY_BYTES, want_tiles, want_entropy)
    copy_vC = hidden_ND.new_empty((chunks.rows, columns))
    for part, partials, lse_tN in each_chunk(logits, chunks):
        rows_vC = in_parts(part.weight_VD, copy_vC[: part.weight_VD.shape[0]])
        copied = part._replace(hidden_ND=hidden_ND, weight_VD=rows_vC)
        launch(copied, None, partials, lse_tN, chunks.blocks_per_split, tuning, parts=PARTS)
    return finish(logits, chunks.partials, chunks.tiles)


class Chunks(NamedTuple):
    """A summary by copies of chunks of the classifier: all but the last hold ``rows`` rows, and the same number of
    splits, so that a tile's number tells its split."""

    rows: int
    rows_per_split: int
    blocks_per_split: int
    partials: Partials
    tiles: Tiles | None


def begin_chunks(
    logits: Logits, tuning: Tuning, row_bytes: int, most_bytes: int, want_tiles: bool, want_entropy: bool = False
) -> Chunks:
    """Chunks whose copies take about ``most_bytes``, and memory for what they give."""
    vocab = logits.weight_VD.shape[0]
    num_blocks = triton.cdiv(vocab, tuning.block_v)
    number = triton.cdiv(num_blocks, max(most_bytes // (tuning.block_v * row_bytes), tuning.splits))
    blocks_per_split = triton.cdiv(num_blocks, number * tuning.splits)
    rows_per_split = blocks_per_split * tuning.block_v
    partials, lse_TN = _empty_partials(logits, triton.cdiv(vocab, rows_per_split), want_tiles, want_entropy)
    tiles = _tiles_of(lse_TN, partials, rows_per_split, logits)
    return Chunks(min(rows_per_split * tuning.splits, vocab), rows_per_split, blocks_per_split, partials, tiles)


def each_chunk(logits: Logits, chunks: Chunks) -> Iterator[tuple[Logits, Partials, torch.Tensor | None]]:
    """Its logits, and where its partials and its tiles' log-sum-exps go."""
    for first in range(0, logits.weight_VD.shape[0], chunks.rows):
        v, split = slice(first, first + chunks.rows), first // chunks.rows_per_split
        part = logits._replace(
            weight_VD=logits.weight_VD[v],
            bias_V=None if logits.bias_V is None else logits.bias_V[v],
            frequent_V=None if logits.frequent_V is None else logits.frequent_V[v],
            adapter_VR=None if logits.adapter_VR is None else logits.adapter_VR[v],
        )
        max_SN, sumexp_SN, reference_SN, weighted_SN = chunks.partials
        own = Partials(
            max_SN[split:],
            sumexp_SN[split:],
            reference_SN[split:],
            None if weighted_SN is None else weighted_SN[split:],
        )
        yield part, own, None if chunks.tiles is None else chunks.tiles.lse_TN[first // logits.tile :]


def _tiles_of(lse_TN: torch.Tensor | None, partials: Partials, rows_per_split: int, logits: Logits) -> Tiles | None:
    return None if lse_TN is None else Tiles(lse_TN, partials.reference_SN, rows_per_split // logits.tile)


def _begin_storing(logits: Logits, keep: Keep) -> Stored:
    """Memory for what is kept, and the tokens' origins; ``logits``: of compacted hidden states."""
    hidden_ND, rows = logits.hidden_ND, logits.num_tokens
    stride = triton.cdiv(keep.columns, logits.tile) * logits.tile  # so that the library's products find rows aligned
    stored = Stored(
        hidden_ND.new_empty((rows, stride)),
        hidden_ND.new_empty(rows, dtype=torch.float32),
        keep.columns,
        stride,
    )
    _origin_kernel[(triton.cdiv(rows, _SAMPLED_TOKENS),)](
        stored,
        operands_of(logits),
        hidden_ND,
        logits.weight_VD,
        TOKENS=_SAMPLED_TOKENS,
        SAMPLED=_SAMPLED,
        BLOCK_D=128 // hidden_ND.element_size(),
        PRECISION=precision(logits),
        num_warps=4,
        **LAUNCH,
    )
    return stored


def _empty_partials(
    logits: Logits, splits: int, want_tiles: bool, want_entropy: bool
) -> tuple[Partials, torch.Tensor | None]:
    """(Those of each split; the tiles' log-sum-exps [T, N] if wanted)."""
    hidden_ND = logits.hidden_ND
    # Apart, since backward keeps the references alone.
    max_SN, sumexp_SN, reference_SN = (
        hidden_ND.new_empty((splits, logits.num_tokens), dtype=torch.float32) for _ in range(3)
    )
    partials = Partials(max_SN, sumexp_SN, reference_SN, torch.empty_like(max_SN) if want_entropy else None)
    if not want_tiles:
        return partials, None
    lse_dtype = torch.float32 if hidden_ND.dtype == torch.float32 else torch.float16
    return partials, hidden_ND.new_empty((logits.num_tiles, logits.num_tokens), dtype=lse_dtype)


def launch(
    logits: Logits,
    in_8_bits: InEightBits | None,
    partials: Partials,
    lse_TN: torch.Tensor | None,
    blocks_per_split: int,
    tuning: Tuning,
    stored: Stored | None = None,
    earlier_N: torch.Tensor | None = None,
    sloped: bool = False,
    parts: int = 1,
) -> None:
    """Fills the partials of the splits of ``logits``, whose hidden states are compacted; see `_summarise_kernel`."""
    hidden_ND, weight_VD, operands = logits.hidden_ND, logits.weight_VD, operands_of(logits)
    tma = tuning.tma and can_use_tma(hidden_ND, weight_VD)
    _summarise_kernel[(num_programs(hidden_ND),)](
        partials,
        lse_TN,
        operands,
        descriptor(hidden_ND, tuning.block_n, tuning.block_d, tma),
        descriptor(weight_VD, tuning.block_v, tuning.block_d, tma),
        in_8_bits,
        stored,
        earlier_N,
        triton.cdiv(operands.V, blocks_per_split * tuning.block_v),
        blocks_per_split,
        tuning.row_group,
        TILE=logits.tile,
        BLOCK_N=tuning.block_n,
        BLOCK_V=tuning.block_v,
        BLOCK_D=tuning.block_d,
        TMA=tma,
        PRECISION=precision(logits),
        STAGES=tuning.stages,
        FLAT=tuning.flat_below >= weight_VD.shape[1] and logits.adapter_NR is None,
        ENTROPY=partials.weighted_SN is not None,
        SLOPED=sloped,
        PARTS=parts,
        num_warps=tuning.warps,
        **LAUNCH,
    )


def finish(logits: Logits, partials: Partials, tiles: Tiles | None, stored: Stored | None = None) -> Summary:
    operands = operands_of(logits)
    of_sums = 3 if partials.weighted_SN is None else 4
    merged_4N = partials.max_SN.new_empty((of_sums if stored is None else of_sums + 1, operands.N))
    _finish_kernel[(triton.cdiv(operands.N, _FINISH_TOKENS),)](
        merged_4N,
        partials,
        operands,
        logits.weight_VD,
        stored,
        partials.max_SN.shape[0],
        BLOCK_N=_FINISH_TOKENS,
        BLOCK_D=256,
        num_warps=4,
        **LAUNCH,
    )
    weighted_N = None if partials.weighted_SN is None else merged_4N[3]
    kept = None
    if stored is not None:
        kept = Exponentials(stored.exp_NK[:, : stored.columns], merged_4N[of_sums], merged_4N[2])
    return Summary(merged_4N[0], merged_4N[1], merged_4N[2], LN_2, tiles, weighted_N, kept)
