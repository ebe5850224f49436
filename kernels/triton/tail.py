"""Mean-field tail: what the dropped pairs of a tile contribute, as if all tokens' mass lay over it like the average's.

π_j = Σ_i p_ij f'_ij / Σ_i s_i over about 128 sampled tokens whose pair with the tile is not large (it must not depend
on what is drawn, or the unbiased gradient would not be); it sums to 1 in a tile without softcap, and is uniform where
the sample has no mass. c̃_t = Σ_j π_j c_j. With R from `select`: dE += Rᵀ c̃ and dC_j += π_j (R E)_t, two small products.

Grid: one program of one warpgroup a tile, two on a Hopper multiprocessor. FLOPs: 2·128·V·D. Bytes: V·D·2 read from
memory, and again, backwards, so that the last that was read is still in L2.

Shapes: N tokens, D hidden, V local rows, T tiles.
"""

import torch
import triton
import triton.language as tl

from ..problem import Logits
from .blocks import (
    BLOCK_R,
    can_use_tma,
    descriptor,
    is_frequent,
    load_block,
    load_rows,
    logits_of,
    precision,
    products_of_rows,
    without_frequent,
)
from .operands import LAUNCH, Pairs, operands_of
from .select import pair_mass
from .tuning import tuning_for

SAMPLED_TOKENS = 128


@triton.jit
def _tail_mean_kernel(
    pi_V,
    mean_TD,
    mean_TR,
    operands,
    weight,
    pairs,
    factor_ptr,
    SAMPLES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0)
    n_valid = tl.load(operands.n_valid)
    sample = (tl.arange(0, SAMPLES).to(tl.int64) * n_valid // SAMPLES).to(tl.int32)
    valid = sample < n_valid
    token = tl.load(operands.token_N + sample, mask=valid, other=0)
    products = products_of_rows(operands, weight, token, valid, tile, SAMPLES, TILE, BLOCK_D, TMA, PRECISION, STAGES)
    columns = tile * TILE + tl.arange(0, TILE)
    z, slope = logits_of(operands, products, columns, sample, valid)
    z = without_frequent(operands, z, columns)
    _, large = pair_mass(operands, pairs, sample, valid, tile, TILE)
    p = tl.exp2(z - tl.load(pairs.lse2_N + sample, mask=valid, other=0.0)[:, None])
    is_nan = tl.sum((p != p).to(tl.int32), 1) > 0
    use = valid & (large == 0) & (is_nan == 0)
    p = tl.where(use[:, None], p, 0.0)
    mass = tl.sum(p)  # at once: for sm_100 Triton 3.6 cannot compile two sums in a row
    V, D = operands.V, operands.D
    inside = columns < V
    if operands.frequent_V is not None:
        inside = inside & (is_frequent(operands.frequent_V, columns, V) == 0)
    uniform = 1.0 / tl.maximum(tl.sum(inside.to(tl.int32), 0), 1)
    profile = tl.sum(tl.where(use[:, None], p * slope, 0.0), 0)
    pi = tl.where(mass > 0, profile / tl.where(mass > 0, mass, 1.0), uniform)
    pi = tl.where(inside, pi, 0.0)
    tl.store(pi_V + columns, pi, mask=columns < V)
    factor = tl.load(factor_ptr).to(tl.float32)
    steps = tl.cdiv(D, BLOCK_D)
    for step in tl.range(0, steps, num_stages=STAGES):
        d = (steps - 1 - step) * BLOCK_D
        c = load_block(weight, tile * TILE, d, V, D, operands.stride_weight, TILE, BLOCK_D, TMA)
        mean = tl.sum(c.to(tl.float32) * pi[:, None], 0) * factor
        d_range = d + tl.arange(0, BLOCK_D)
        tl.store(mean_TD + tile.to(tl.int64) * D + d_range, mean.to(mean_TD.dtype.element_ty), mask=d_range < D)
    if mean_TR is not None:
        R = operands.R
        for r in range(0, R, BLOCK_R):
            b = load_rows(operands.adapter_VR, columns, columns < V, r, R, R, BLOCK_R)
            mean = tl.sum(b.to(tl.float32) * pi[:, None], 0) * factor
            r_range = r + tl.arange(0, BLOCK_R)
            tl.store(mean_TR + tile.to(tl.int64) * R + r_range, mean.to(mean_TR.dtype.element_ty), mask=r_range < R)


def tail_means(
    logits: Logits, pairs: Pairs, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(π_V in fp32, factor·c̃_TD in the dtype of hidden, the same of an adapter's B); ``factor``: one fp32 number."""
    weight_VD, operands = logits.weight_VD, operands_of(logits)
    tuning = tuning_for(logits.hidden_ND, weight_VD)
    tma = tuning.tma and can_use_tma(weight_VD)
    pi_V = torch.empty(operands.V, dtype=torch.float32, device=weight_VD.device)
    mean_TD = torch.empty((logits.num_tiles, operands.D), dtype=logits.hidden_ND.dtype, device=weight_VD.device)
    mean_TR = None
    if logits.adapter_VR is not None:
        mean_TR = mean_TD.new_empty((logits.num_tiles, logits.adapter_VR.shape[1]))
    _tail_mean_kernel[(logits.num_tiles,)](
        pi_V,
        mean_TD,
        mean_TR,
        operands,
        descriptor(weight_VD, logits.tile, tuning.pair_block_d, tma),
        pairs,
        factor,
        SAMPLES=SAMPLED_TOKENS,
        TILE=logits.tile,
        BLOCK_D=tuning.pair_block_d,
        TMA=tma,
        PRECISION=precision(logits),
        STAGES=tuning.pair_stages,
        num_warps=tuning.pair_warps,
        **LAUNCH,
    )
    return pi_V, mean_TD, mean_TR
