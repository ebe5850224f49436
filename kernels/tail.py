"""Mean-field tail: what the dropped pairs of a tile contribute, as if every row's mass lay over it like the average's.

π_j = Σ_i p_ij f'_ij / Σ_i s_i over about 128 sampled rows whose pair with the tile is not large (it must not depend on
what is drawn, or the unbiased gradient would not be); it sums to 1 in a tile without softcap, and is uniform where the
sample has no mass. c̃_t = Σ_j π_j c_j. With R from `select`: dE += Rᵀ c̃ and dC_j += π_j (R E)_t, two small products.

Grid: one program of one warpgroup a tile, two on a Hopper multiprocessor. FLOPs: 2·128·V·D. Bytes: V·D·2 read from
memory, and again, backwards, so that the last that was read is still in L2.

Shapes: N tokens, D hidden, V local rows, T tiles, S sampled tokens.
"""

import torch
import triton
import triton.language as tl

from .blocks import can_use_tma, descriptor, load_block, logits_of, precision
from .problem import Logits
from .select import Selection, pair_mass
from .tuning import tuning_for

SAMPLED_ROWS = 128
_ROWS, _BLOCK_D = 4, 1024


@triton.jit
def _sample(k, n_valid, SAMPLES: tl.constexpr):
    """The compacted row of sample k: evenly spaced."""
    return (k.to(tl.int64) * n_valid // SAMPLES).to(tl.int32)


@triton.jit
def _sample_kernel(
    sampled_SD,
    hidden,
    token_N,
    n_valid_ptr,
    D,
    stride_hidden,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sampled hidden states, which every tile is multiplied with. Grid: (blocks of samples, blocks of D)."""
    n_valid = tl.load(n_valid_ptr)
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = _sample(k, n_valid, SAMPLES)
    valid = sample < n_valid
    token = tl.load(token_N + sample, mask=valid, other=0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = hidden + token[:, None].to(tl.int64) * stride_hidden + d[None, :]
    e = tl.load(rows, mask=valid[:, None] & (d < D)[None, :], other=0.0)
    tl.store(sampled_SD + k[:, None] * D + d[None, :], e, mask=(d < D)[None, :])


@triton.jit
def _tail_mean_kernel(
    pi_V,
    mean_TD,
    sampled,
    weight,
    bias,
    tile_lse_TN,
    reference_SN,
    lse2_N,
    target_N,
    n_valid_ptr,
    factor_ptr,
    eps,
    N,
    tiles_per_split,
    V,
    D,
    stride_weight,
    scale,
    softcap,
    SAMPLES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0)
    n_valid = tl.load(n_valid_ptr)
    sample = _sample(tl.arange(0, SAMPLES), n_valid, SAMPLES)
    valid = sample < n_valid
    products = tl.zeros([SAMPLES, TILE], tl.float32)
    for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        e = load_block(sampled, 0, d, SAMPLES, D, D, SAMPLES, BLOCK_D, TMA)
        c = load_block(weight, tile * TILE, d, V, D, stride_weight, TILE, BLOCK_D, TMA)
        products = tl.dot(e, c.T, products, input_precision=PRECISION)
    columns = tile * TILE + tl.arange(0, TILE)
    z, slope = logits_of(products, bias, columns, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    _, large = pair_mass(
        sample, valid, tile, tile_lse_TN, reference_SN, lse2_N, target_N, eps, N, tiles_per_split, TILE
    )
    p = tl.exp2(z - tl.load(lse2_N + sample, mask=valid, other=0.0)[:, None])
    is_nan = tl.sum((p != p).to(tl.int32), 1) > 0
    use = valid & (large == 0) & (is_nan == 0)
    p = tl.where(use[:, None], p, 0.0)
    mass = tl.sum(tl.sum(p, 1), 0)
    uniform = 1.0 / min(TILE, V - tile * TILE)
    profile = tl.sum(tl.where(use[:, None], p * slope, 0.0), 0)
    pi = tl.where(mass > 0, profile / tl.where(mass > 0, mass, 1.0), uniform)
    pi = tl.where(columns < V, pi, 0.0)
    tl.store(pi_V + columns, pi, mask=columns < V)
    factor = tl.load(factor_ptr).to(tl.float32)
    steps = tl.cdiv(D, BLOCK_D)
    for step in tl.range(0, steps, num_stages=STAGES):
        d = (steps - 1 - step) * BLOCK_D
        c = load_block(weight, tile * TILE, d, V, D, stride_weight, TILE, BLOCK_D, TMA)
        mean = tl.sum(c.to(tl.float32) * pi[:, None], 0) * factor
        d_range = d + tl.arange(0, BLOCK_D)
        tl.store(mean_TD + tile.to(tl.int64) * D + d_range, mean.to(mean_TD.dtype.element_ty), mask=d_range < D)


def tail_means(logits: Logits, selection: Selection, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(π_V in fp32, factor·c̃_TD in the dtype of hidden); ``factor``: one fp32 number."""
    hidden_ND, weight_VD = logits.hidden_ND, logits.weight_VD
    vocab, hidden_size = weight_VD.shape
    tuning = tuning_for(hidden_ND)
    sampled_SD = hidden_ND.new_empty((SAMPLED_ROWS, hidden_size))
    _sample_kernel[(SAMPLED_ROWS // _ROWS, triton.cdiv(hidden_size, _BLOCK_D))](
        sampled_SD,
        hidden_ND,
        logits.token_N,
        logits.n_valid,
        hidden_size,
        hidden_ND.stride(0),
        SAMPLES=SAMPLED_ROWS,
        ROWS=_ROWS,
        BLOCK_D=_BLOCK_D,
    )
    tma = tuning.tma and can_use_tma(sampled_SD, weight_VD)
    pi_V = torch.empty(vocab, dtype=torch.float32, device=hidden_ND.device)
    mean_TD = torch.empty((logits.num_tiles, hidden_size), dtype=hidden_ND.dtype, device=hidden_ND.device)
    _tail_mean_kernel[(logits.num_tiles,)](
        pi_V,
        mean_TD,
        descriptor(sampled_SD, SAMPLED_ROWS, tuning.pair_block_d, tma),
        descriptor(weight_VD, logits.tile, tuning.pair_block_d, tma),
        logits.bias_V,
        *selection.masses,
        logits.n_valid,
        factor,
        selection.draw[2],
        *selection.sizes,
        vocab,
        hidden_size,
        weight_VD.stride(0),
        logits.logit_scale,
        1.0 if logits.softcap is None else logits.softcap,
        SAMPLES=SAMPLED_ROWS,
        TILE=logits.tile,
        BLOCK_D=tuning.pair_block_d,
        HAS_BIAS=logits.bias_V is not None,
        HAS_SOFTCAP=logits.softcap is not None,
        TMA=tma,
        PRECISION=precision(logits),
        STAGES=tuning.pair_stages,
        num_warps=tuning.pair_warps,
    )
    return pi_V, mean_TD
