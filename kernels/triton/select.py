"""Select: which (token, tile) pairs the sparse backward recomputes, and with what weight.

A pair's softmax mass is s = exp(lse of the tile alone − global lse). It is large, and kept with weight k = 1, when
s > eps, when it holds the token's target, or when s is NaN. Otherwise "filtered" drops it (k = 0) and "unbiased" keeps
it with probability q = s/eps_i and weight k = 1/q: E[k] = 1. eps_i is eps, or more for tokens whose softmax is so flat
that more than `Filter.most_drawn` pairs would be drawn. What is not kept gets R = a·s·(1 − k) through the tail, which
has mean zero in "unbiased": a control variate.

Draws are the first word of Philox4x32-10 of (seed; token, tile key), equal in the torch backend. Stored tile summaries
are fp16 relative to a reference: the test adds their rounding error to s, so that none that is large is dropped.

Shapes: N tokens, T tiles, B blocks of tiles, S splits, V local rows.
"""

import torch
import triton
import triton.language as tl

from ..problem import Filter, Logits, Tiles, Upstream
from .operands import LAUNCH, Kept, Operands, Pairs, operands_of

SMALLEST_DRAW = tl.constexpr(2.0**-32)
_LEAST_MASS = tl.constexpr(1e-37)  # its logarithm is finite
_TOKENS = 1024
_MASS_TOKENS, _TILES = 256, 64


@triton.jit
def pair_mass(operands, pairs, n, valid, tile, TILE: tl.constexpr):
    """(s, is large) of the pairs (n, tile)."""
    place = tile.to(tl.int64) * operands.N + n
    relative = tl.load(pairs.tile_lse_TN + place, mask=valid, other=-float("inf")).to(tl.float32)
    split = tile // pairs.tiles_per_split
    reference = tl.load(pairs.reference_SN + split * operands.N + n, mask=valid, other=0.0)
    offset = reference - tl.load(pairs.lse2_N + n, mask=valid, other=0.0)
    target = tl.load(operands.target_N + n, mask=valid, other=-1)
    # fp16 rounds by at most 2^-11 of the value; −inf + inf would be NaN, so that case is left as it is.
    rounding = tl.where(relative == -float("inf"), 0.0, tl.abs(relative) * 2.0**-10)
    upper = tl.exp2(relative + rounding + offset)
    is_small = (upper <= pairs.eps) & ((target < 0) | (target // TILE != tile))
    return tl.exp2(relative + offset), (is_small == 0) & valid


@triton.jit
def pair_weight(operands, pairs, n, valid, tile, TILE: tl.constexpr):
    """(k, s) of the pairs (n, tile)."""
    mass, large = pair_mass(operands, pairs, n, valid, tile, TILE)
    weight = tl.where(large, 1.0, 0.0)
    if pairs.eps_N is not None:
        chance = mass / tl.load(pairs.eps_N + n, mask=valid, other=1.0)
        if pairs.uniform is not None:
            draw = tl.zeros_like(mass) + pairs.uniform
        else:
            token = tl.load(operands.token_N + n, mask=valid, other=0)
            zero = tl.zeros_like(token)
            key = tl.load(pairs.tile_key_T + tile)
            bits, _, _, _ = tl.philox(tl.load(pairs.seed), token, zero + key, zero, zero)
            draw = bits.to(tl.uint32, bitcast=True).to(tl.float32) * 2.0**-32
        drawn = valid & (large == 0) & (draw < chance) & (chance > SMALLEST_DRAW)
        weight = tl.where(drawn, 1 / chance, weight)
    return weight, mass


@triton.jit
def _list_kernel(kept, operands, pairs, TILE: tl.constexpr, TOKENS: tl.constexpr):
    """The tokens kept with each tile, in order, and their number. Grid: one program a tile. Bytes: 2·T·N read."""
    tile = tl.program_id(0)
    n_valid = tl.load(operands.n_valid)
    list_of_tile = kept.list_TN + tile.to(tl.int64) * kept.stride
    count = 0
    for first in range(0, n_valid, TOKENS):
        n = first + tl.arange(0, TOKENS)
        weight, _ = pair_weight(operands, pairs, n, n < n_valid, tile, TILE)
        is_kept = (weight != 0).to(tl.int32)
        place = count + tl.cumsum(is_kept, 0) - 1
        token = tl.load(operands.token_N + n, mask=is_kept != 0, other=0)
        tl.store(list_of_tile + place, token.to(kept.list_TN.dtype.element_ty), mask=is_kept != 0)
        count += tl.sum(is_kept, 0)
    tl.store(kept.count_T + tile, count)


@triton.jit
def _tail_rows_kernel(
    tail_TN, stride_tail, upstream, operands, pairs, entropy_T, headroom, TILE: tl.constexpr, TOKENS: tl.constexpr
):
    """R_ti = (a_i + γ_i·(log s_ti − H_t))·s_ti·(1 − k_ti)·headroom, H_t the entropy of the tile's profile: log s − H
    is about the mean of log p over the tile. Grid: (tile, block of TOKENS). Bytes: 4·T·N."""
    tile = tl.program_id(0)
    n = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    valid = n < tl.load(operands.n_valid)
    weight, mass = pair_weight(operands, pairs, n, valid, tile, TILE)
    a = tl.load(upstream.softmax_N + n, mask=valid, other=0.0)
    if upstream.log_N is not None:
        mean_log_p = tl.log(tl.maximum(mass, _LEAST_MASS)) - tl.load(entropy_T + tile)
        a += tl.load(upstream.log_N + n, mask=valid, other=0.0) * mean_log_p
    tail = tl.where((weight == 1) | (valid == 0), 0.0, a * mass * (1 - weight) * headroom)
    tl.store(tail_TN + tile.to(tl.int64) * stride_tail + n, tail.to(tail_TN.dtype.element_ty), mask=n < operands.N)


@triton.jit
def _small_mass_kernel(mass_BN, operands, pairs, T, TILE: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr):
    """Mass in small pairs of a block of tiles. Grid: (block of tokens, block of tiles). Bytes: 2·T·N read."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = n < tl.load(operands.n_valid)
    mass_n = tl.zeros([TOKENS], tl.float32)
    first = tl.program_id(1) * TILES
    for index in range(first, min(first + TILES, T)):
        mass, large = pair_mass(operands, pairs, n, valid, tl.cast(index, tl.int32), TILE)
        mass_n += tl.where(valid & (large == 0), mass, 0.0)
    tl.store(mass_BN + tl.program_id(1) * operands.N + n, mass_n, mask=n < operands.N)


def select(logits: Logits, tiles: Tiles, lse2_N: torch.Tensor, filter_: Filter) -> Pairs:
    """What decides on the pairs of a shard. ``lse2_N``: the global log-sum-exp in base 2."""
    assert tiles.reference_SN is not None
    pairs = Pairs(
        tiles.lse_TN,
        tiles.reference_SN,
        tiles.tiles_per_split,
        lse2_N,
        filter_.eps,
        None,
        logits.tile_key_T,
        filter_.seed,
        filter_.uniform,
    )
    if filter_.mode != "unbiased":
        return pairs
    assert filter_.seed is not None or filter_.uniform is not None
    return pairs._replace(eps_N=_drawing_eps(logits, pairs, filter_))


def _drawing_eps(logits: Logits, pairs: Pairs, filter_: Filter) -> torch.Tensor:
    """eps_i of each token."""
    if pairs.num_tiles <= filter_.most_drawn:
        return torch.full_like(pairs.lse2_N, filter_.eps)
    operands, blocks = operands_of(logits), triton.cdiv(pairs.num_tiles, _TILES)
    mass_BN = pairs.lse2_N.new_empty((blocks, operands.N))
    _small_mass_kernel[(triton.cdiv(operands.N, _MASS_TOKENS), blocks)](
        mass_BN, operands, pairs, pairs.num_tiles, TILE=logits.tile, TOKENS=_MASS_TOKENS, TILES=_TILES, **LAUNCH
    )
    return (mass_BN.sum(0) / filter_.most_drawn).clamp_(min=filter_.eps)


def kept_tokens(logits: Logits, pairs: Pairs, scratch_VD: torch.Tensor | None = None) -> Kept:
    """The tokens kept with each tile, in memory of ``scratch_VD``, see `_matrix`."""
    operands = operands_of(logits)
    dtype = torch.int16 if operands.N <= 1 << 15 else torch.int32
    list_TN = _matrix(logits, operands, dtype, scratch_VD)
    count_T = torch.empty(pairs.num_tiles, dtype=torch.int32, device=logits.n_valid.device)
    kept = Kept(list_TN, list_TN.stride(0), count_T)
    _list_kernel[(pairs.num_tiles,)](kept, operands, pairs, TILE=logits.tile, TOKENS=_TOKENS, **LAUNCH)
    return kept


def tail_rows(
    logits: Logits,
    pairs: Pairs,
    upstream: Upstream,
    pi_V: torch.Tensor,
    dtype: torch.dtype,
    headroom: float,
    scratch_VD: torch.Tensor | None = None,
) -> torch.Tensor:
    """R_TN in ``dtype``, times ``headroom``, in memory of ``scratch_VD``, see `_matrix`. ``pi_V``: of `tail_means`."""
    operands = operands_of(logits)
    tail_TN = _matrix(logits, operands, dtype, scratch_VD)
    _tail_rows_kernel[(pairs.num_tiles, triton.cdiv(operands.N, _TOKENS))](
        tail_TN,
        tail_TN.stride(0),
        upstream,
        operands,
        pairs,
        None if upstream.log_N is None else _tile_entropies(logits, pi_V),
        headroom,
        TILE=logits.tile,
        TOKENS=_TOKENS,
        **LAUNCH,
    )
    return tail_TN


def _tile_entropies(logits: Logits, pi_V: torch.Tensor) -> torch.Tensor:
    """−Σ π log π of each tile [T]."""
    entropy_V = torch.special.entr(pi_V)
    padded_V = torch.nn.functional.pad(entropy_V, (0, logits.num_tiles * logits.tile - entropy_V.shape[0]))
    return padded_V.view(-1, logits.tile).sum(1)


def _matrix(logits: Logits, operands: Operands, dtype: torch.dtype, scratch_VD: torch.Tensor | None) -> torch.Tensor:
    """[T, N] to be written: a row where a tile's rows of dC will stand, if those suffice; else in new memory."""
    shape = (logits.num_tiles, operands.N)
    if scratch_VD is not None and scratch_VD.nbytes % dtype.itemsize == 0:
        memory = scratch_VD.view(-1).view(dtype)
        stride = logits.tile * scratch_VD.stride(0) * scratch_VD.element_size() // dtype.itemsize
        if min(stride, memory.shape[0] - (logits.num_tiles - 1) * stride) >= operands.N:
            return memory.as_strided(shape, (stride, 1))
    return torch.empty(shape, dtype=dtype, device=logits.n_valid.device)
