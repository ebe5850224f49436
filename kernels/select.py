"""Select: which (row, tile) pairs the sparse backward recomputes, and with what weight.

A pair's softmax mass is s = exp(lse of the tile alone − global lse). It is large, and kept with weight k = 1, when
s > eps, when it holds the row's target, or when s is NaN. Otherwise "filtered" drops it (k = 0) and "unbiased" keeps it
with probability q = s/eps_i and weight k = 1/q: E[k] = 1. eps_i is eps, or more in rows whose softmax is so flat that
more than `Filter.most_drawn` pairs would be drawn. What is not kept gets R = a·s·(1 − k) through the tail, which has
mean zero in "unbiased": a control variate.

Draws are the first word of Philox4x32-10 of (seed; token, tile key), equal in the torch backend. Stored tile summaries
are fp16 relative to a reference: the test adds their rounding error to s, so that none that is large is dropped.

Shapes: N tokens, T tiles, B blocks of tiles, S splits.
"""

import torch
import triton
import triton.language as tl

from .blocks import LAUNCH
from .problem import Filter, Logits, Tiles, Upstream

SMALLEST_DRAW = tl.constexpr(2.0**-32)
_ROWS = 1024
_MASS_ROWS, _TILES = 256, 64


@triton.jit
def pair_mass(n, valid, tile, tile_lse_TN, reference_SN, lse2_N, target_N, eps, N, tiles_per_split, TILE: tl.constexpr):
    """(s, is large) of the pairs (n, tile)."""
    relative = tl.load(tile_lse_TN + tile.to(tl.int64) * N + n, mask=valid, other=-float("inf")).to(tl.float32)
    reference = tl.load(reference_SN + tile // tiles_per_split * N + n, mask=valid, other=0.0)
    offset = reference - tl.load(lse2_N + n, mask=valid, other=0.0)
    target = tl.load(target_N + n, mask=valid, other=-1)
    # fp16 rounds by at most 2^-11 of the value; −inf + inf would be NaN, so that case is left as it is.
    rounding = tl.where(relative == -float("inf"), 0.0, tl.abs(relative) * 2.0**-10)
    upper = tl.exp2(relative + rounding + offset)
    is_small = (upper <= eps) & ((target < 0) | (target // TILE != tile))
    return tl.exp2(relative + offset), (is_small == 0) & valid


@triton.jit
def pair_weight(
    n,
    valid,
    tile,
    tile_lse_TN,
    reference_SN,
    lse2_N,
    target_N,
    token_N,
    eps_N,
    key,
    seed_ptr,
    uniform,
    eps,
    N,
    tiles_per_split,
    TILE: tl.constexpr,
    UNBIASED: tl.constexpr,
    HAS_UNIFORM: tl.constexpr,
):
    """(k, s) of the pairs (n, tile)."""
    mass, large = pair_mass(n, valid, tile, tile_lse_TN, reference_SN, lse2_N, target_N, eps, N, tiles_per_split, TILE)
    weight = tl.where(large, 1.0, 0.0)
    if UNBIASED:
        chance = mass / tl.load(eps_N + n, mask=valid, other=1.0)
        if HAS_UNIFORM:
            draw = tl.zeros_like(mass) + uniform
        else:
            token = tl.load(token_N + n, mask=valid, other=0)
            zero = tl.zeros_like(token)
            bits, _, _, _ = tl.philox(tl.load(seed_ptr), token, zero + key, zero, zero)
            draw = bits.to(tl.uint32, bitcast=True).to(tl.float32) * 2.0**-32
        drawn = valid & (large == 0) & (draw < chance) & (chance > SMALLEST_DRAW)
        weight = tl.where(drawn, 1 / chance, weight)
    return weight, mass


@triton.jit
def _list_kernel(
    list_TN,
    stride_list,
    count_T,
    tile_lse_TN,
    reference_SN,
    lse2_N,
    target_N,
    token_N,
    eps_N,
    tile_key_T,
    n_valid_ptr,
    seed_ptr,
    uniform,
    eps,
    N,
    tiles_per_split,
    TILE: tl.constexpr,
    UNBIASED: tl.constexpr,
    HAS_UNIFORM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The tokens kept with each tile, in order, and their number. Grid: one program a tile. Bytes: 2·T·N read."""
    tile = tl.program_id(0)
    n_valid = tl.load(n_valid_ptr)
    key = tl.load(tile_key_T + tile)
    list_of_tile = list_TN + tile.to(tl.int64) * stride_list
    count = 0
    for row in range(0, n_valid, ROWS):
        n = row + tl.arange(0, ROWS)
        weight, _ = pair_weight(
            n,
            n < n_valid,
            tile,
            tile_lse_TN,
            reference_SN,
            lse2_N,
            target_N,
            token_N,
            eps_N,
            key,
            seed_ptr,
            uniform,
            eps,
            N,
            tiles_per_split,
            TILE,
            UNBIASED,
            HAS_UNIFORM,
        )
        kept = (weight != 0).to(tl.int32)
        place = count + tl.cumsum(kept, 0) - 1
        token = tl.load(token_N + n, mask=kept != 0, other=0)
        tl.store(list_of_tile + place, token.to(list_TN.dtype.element_ty), mask=kept != 0)
        count += tl.sum(kept, 0)
    tl.store(count_T + tile, count)


@triton.jit
def _tail_rows_kernel(
    tail_TN,
    stride_tail,
    upstream_N,
    tile_lse_TN,
    reference_SN,
    lse2_N,
    target_N,
    token_N,
    eps_N,
    tile_key_T,
    n_valid_ptr,
    seed_ptr,
    uniform,
    eps,
    N,
    tiles_per_split,
    headroom,
    TILE: tl.constexpr,
    UNBIASED: tl.constexpr,
    HAS_UNIFORM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """R_ti = a_i·s_ti·(1 − k_ti)·headroom. Grid: (tile, block of ROWS rows). Bytes: 4·T·N."""
    tile = tl.program_id(0)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = n < tl.load(n_valid_ptr)
    weight, mass = pair_weight(
        n,
        valid,
        tile,
        tile_lse_TN,
        reference_SN,
        lse2_N,
        target_N,
        token_N,
        eps_N,
        tl.load(tile_key_T + tile),
        seed_ptr,
        uniform,
        eps,
        N,
        tiles_per_split,
        TILE,
        UNBIASED,
        HAS_UNIFORM,
    )
    upstream = tl.load(upstream_N + n, mask=valid, other=0.0)
    tail = tl.where((weight == 1) | (valid == 0), 0.0, upstream * mass * (1 - weight) * headroom)
    tl.store(tail_TN + tile.to(tl.int64) * stride_tail + n, tail.to(tail_TN.dtype.element_ty), mask=n < N)


@triton.jit
def _small_mass_kernel(
    mass_BN,
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
    """Mass in small pairs of a block of tiles. Grid: (block of rows, block of tiles). Bytes: 2·T·N read."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = n < tl.load(n_valid_ptr)
    mass_n = tl.zeros([ROWS], tl.float32)
    first = tl.program_id(1) * TILES
    for index in range(first, min(first + TILES, T)):
        tile = tl.cast(index, tl.int32)
        mass, large = pair_mass(
            n, valid, tile, tile_lse_TN, reference_SN, lse2_N, target_N, eps, N, tiles_per_split, TILE
        )
        mass_n += tl.where(valid & (large == 0), mass, 0.0)
    tl.store(mass_BN + tl.program_id(1) * N + n, mass_n, mask=n < N)


class Selection:
    """The arguments of `pair_weight`, held together for the kernels that call it."""

    def __init__(self, logits: Logits, tiles: Tiles, lse2_N: torch.Tensor, filter_: Filter) -> None:
        assert tiles.reference_SN is not None
        self.rows, self.num_tiles = logits.hidden_ND.shape[0], logits.num_tiles
        self.masses = (tiles.lse_TN, tiles.reference_SN, lse2_N, logits.target_N)
        self.tile_key_T, self.n_valid = logits.tile_key_T, logits.n_valid
        # A pointer must be passed even where nothing is drawn.
        self.draw = (
            filter_.seed if filter_.seed is not None else logits.n_valid,
            -1.0 if filter_.uniform is None else filter_.uniform,
            filter_.eps,
        )
        self.sizes = (self.rows, tiles.tiles_per_split)
        self.flags = {
            "TILE": logits.tile,
            "UNBIASED": filter_.mode == "unbiased",
            "HAS_UNIFORM": filter_.uniform is not None,
        }
        self.tensors = (*self.masses, logits.token_N, self._drawing_eps(filter_, lse2_N))

    def _drawing_eps(self, filter_: Filter, like_N: torch.Tensor) -> torch.Tensor:
        """eps_i of each row."""
        if filter_.mode != "unbiased" or self.num_tiles <= filter_.most_drawn:
            return torch.full_like(like_N, filter_.eps)
        blocks = triton.cdiv(self.num_tiles, _TILES)
        mass_BN = like_N.new_empty((blocks, self.rows))
        _small_mass_kernel[(triton.cdiv(self.rows, _MASS_ROWS), blocks)](
            mass_BN,
            *self.masses,
            self.n_valid,
            filter_.eps,
            *self.sizes,
            self.num_tiles,
            TILE=self.flags["TILE"],
            ROWS=_MASS_ROWS,
            TILES=_TILES,
            **LAUNCH,
        )
        return (mass_BN.sum(0) / filter_.most_drawn).clamp_(min=filter_.eps)

    def _matrix(self, dtype: torch.dtype, scratch_VD: torch.Tensor | None) -> torch.Tensor:
        """[T, N] to be written: a row where a tile's rows of dC will stand, if those suffice; else in new memory."""
        shape = (self.num_tiles, self.rows)
        if scratch_VD is not None and scratch_VD.nbytes % dtype.itemsize == 0:
            memory = scratch_VD.view(-1).view(dtype)
            stride = self.flags["TILE"] * scratch_VD.stride(0) * scratch_VD.element_size() // dtype.itemsize
            if min(stride, memory.shape[0] - (self.num_tiles - 1) * stride) >= self.rows:
                return memory.as_strided(shape, (stride, 1))
        return torch.empty(shape, dtype=dtype, device=self.n_valid.device)

    def kept_tokens(self, scratch_VD: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens kept with each tile [T, N] (the first count of each; 16 bits where they suffice) and count_T.

        In memory of ``scratch_VD``, see `_matrix`.
        """
        dtype = torch.int16 if self.rows <= 1 << 15 else torch.int32
        list_TN = self._matrix(dtype, scratch_VD)
        count_T = torch.empty(self.num_tiles, dtype=torch.int32, device=self.n_valid.device)
        _list_kernel[(self.num_tiles,)](
            list_TN,
            list_TN.stride(0),
            count_T,
            *self.tensors,
            self.tile_key_T,
            self.n_valid,
            *self.draw,
            *self.sizes,
            **self.flags,
            ROWS=_ROWS,
            **LAUNCH,
        )
        return list_TN, count_T

    def tail_rows(
        self, upstream: Upstream, dtype: torch.dtype, headroom: float, scratch_VD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """R_TN in ``dtype``, times ``headroom``, in memory of ``scratch_VD``, see `_matrix`."""
        tail_TN = self._matrix(dtype, scratch_VD)
        _tail_rows_kernel[(self.num_tiles, triton.cdiv(self.rows, _ROWS))](
            tail_TN,
            tail_TN.stride(0),
            upstream.softmax_N,
            *self.tensors,
            self.tile_key_T,
            self.n_valid,
            *self.draw,
            *self.sizes,
            headroom,
            **self.flags,
            ROWS=_ROWS,
            **LAUNCH,
        )
        return tail_TN
