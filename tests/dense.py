"""The kernels' problem with all logits in fp64: what each stage should give, written without tiles or chunks.

Shapes: N tokens (the valid ones first), D hidden, V local rows, T tiles.
"""

import math
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from reference import DEVICE
from torch import Tensor

from cce_dist.kernels.problem import TILE, Filter, Logits, Normaliser, Upstream, Wanted
from cce_dist.kernels.torch_backend import SAMPLED_ROWS

EVERYTHING = Wanted(True, True, True, torch.float32, 1 << 20)


class Dense(NamedTuple):
    """Of the valid rows: softmax over all columns, slope f', and the softmax mass of each (row, tile)."""

    z_NV: Tensor
    softmax_NV: Tensor
    slope_NV: Tensor
    mass_NT: Tensor
    lse_N: Tensor


def make_logits(
    rows: int = 30,
    vocab: int = 4 * TILE - 40,
    hidden_size: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    num_valid: int | None = None,
    spread: float = 5.0,
    shared: float = 1.0,
    bias: bool = True,
    softcap: float | None = None,
    seed: int = 0,
    adapter: int = 0,
) -> Logits:
    """Peaked logits, part of it ``shared`` by the rows of a tile: a good part of the (row, tile) pairs is small.

    The hidden states of tokens that are not valid are NaN. ``adapter``: the rank of one; 0: there is none.
    """
    draw = torch.Generator().manual_seed(seed)
    num_valid = rows if num_valid is None else num_valid
    tiles = -(-vocab // TILE)
    hidden_ND = torch.randn(rows, hidden_size, generator=draw)
    hidden_ND[num_valid:] = torch.nan
    centre_TD = shared * torch.randn(tiles, hidden_size, generator=draw)
    weight_VD = 0.5 * torch.randn(vocab, hidden_size, generator=draw) + centre_TD.repeat_interleave(TILE, 0)[:vocab]
    bias_V = 0.3 * torch.randn(vocab, generator=draw) if bias else None
    target_N = torch.randint(-1, vocab, (rows,), generator=draw)
    target_N[num_valid:] = -1
    order_N = torch.randperm(rows, generator=draw)
    place_N = order_N.argsort()
    adapter_NR, adapter_VR = torch.randn(rows, adapter, generator=draw), torch.randn(vocab, adapter, generator=draw)
    adapter_NR[num_valid:] = torch.nan
    return Logits(
        hidden_ND[place_N].to(DEVICE, dtype),
        weight_VD.to(DEVICE, dtype),
        None if bias_V is None else bias_V.to(DEVICE),
        target_N.to(DEVICE, torch.int32),
        order_N.to(DEVICE, torch.int32),
        place_N.to(DEVICE, torch.int32),
        torch.arange(0, vocab, TILE, dtype=torch.int32, device=DEVICE),
        torch.tensor([num_valid], dtype=torch.int32, device=DEVICE),
        spread / math.sqrt(hidden_size),
        softcap,
        adapter_NR=adapter_NR[place_N].to(DEVICE, dtype) if adapter else None,
        adapter_VR=(0.3 * adapter_VR).to(DEVICE, dtype) if adapter else None,
    )


def make_clear_logits(rows: int, vocab: int, hidden_size: int, eps: float, **options: Any) -> Logits:
    """As `make_logits`, of tokens none of whose pairs lies so near a threshold that rounding would decide.

    The thresholds are ``eps`` and, for one uniform number of 0.3, 0.3 eps. Summaries are known to 2^-10 of their
    distance from the first tile's, which is below 2^4.
    """
    logits = make_logits(3 * rows, vocab, hidden_size, **options)
    chance_NT = dense(logits).mass_NT / eps
    near_NT = (chance_NT.log().abs() < 0.03) | ((chance_NT / 0.3).log().abs() < 0.03)
    clear_N = (~near_NT.any(1)).nonzero()[:rows, 0]
    assert clear_N.shape[0] == rows
    place_N = logits.token_N[clear_N].argsort()
    return logits._replace(
        hidden_ND=valid_hidden(logits)[clear_N][place_N],
        target_N=logits.target_N[clear_N],
        token_N=place_N.argsort().to(torch.int32),
        place_N=place_N.to(torch.int32),
        n_valid=torch.full_like(logits.n_valid, rows),
    )


def make_upstream(logits: Logits, seed: int = 1, entropy: bool = False) -> Upstream:
    """Different for every token, and through the log-sum-exp as well; with ``entropy`` also through that."""
    draw = torch.Generator().manual_seed(seed)
    rows, num_valid = logits.hidden_ND.shape[0], int(logits.n_valid)
    b_N = torch.randn(rows, generator=draw)
    a_N = b_N + 0.5 * torch.randn(rows, generator=draw)
    a_N[num_valid:], b_N[num_valid:] = 0, 0
    scale = torch.exp2(torch.ceil(torch.log2(torch.maximum(a_N.abs().amax(), b_N.abs().amax()))))
    a_N, b_N, scale = (x.to(DEVICE, logits.accumulator) for x in (a_N / scale, b_N / scale, scale))
    log_N = torch.zeros_like(a_N)
    log_N[:num_valid] = (torch.rand(num_valid, generator=draw) - 0.5).to(log_N)
    return Upstream(a_N, b_N, scale, log_N if entropy else None)


def valid_hidden(logits: Logits) -> Tensor:
    """The hidden states of the valid tokens, compacted."""
    return compacted(logits, logits.hidden_ND)


def compacted(logits: Logits, rows_ND: Tensor) -> Tensor:
    """The rows of the valid tokens, compacted."""
    return rows_ND[logits.token_N[: int(logits.n_valid)].long()]


def dense(logits: Logits) -> Dense:
    x_NV = valid_hidden(logits).double() @ logits.weight_VD.double().T
    if logits.adapter_NR is not None and logits.adapter_VR is not None:
        x_NV = x_NV + compacted(logits, logits.adapter_NR).double() @ logits.adapter_VR.double().T
    if logits.bias_V is not None:
        x_NV = x_NV + logits.bias_V.double()
    x_NV = x_NV * logits.logit_scale
    slope_NV = torch.ones_like(x_NV)
    if logits.softcap is not None:
        slope_NV = 1 - torch.tanh(x_NV / logits.softcap) ** 2
        x_NV = logits.softcap * torch.tanh(x_NV / logits.softcap)
    softmax_NV = x_NV.softmax(1)
    mass_NT = torch.stack([part.sum(1) for part in softmax_NV.split(logits.tile, 1)], 1)
    return Dense(x_NV, softmax_NV, slope_NV, mass_NT, x_NV.logsumexp(1))


def padded_lse(logits: Logits, d: Dense) -> Tensor:
    """lse_N in the accumulator's dtype with the rows that are not valid."""
    lse_N = torch.zeros(logits.hidden_ND.shape[0], dtype=logits.accumulator, device=DEVICE)
    lse_N[: d.lse_N.shape[0]] = d.lse_N
    return lse_N


def normaliser(backend: ModuleType, logits: Logits, d: Dense) -> Normaliser:
    """The log-sum-exp as the backend's `differentiate` takes it."""
    unit = _unit(backend)
    max_N = torch.zeros_like(padded_lse(logits, d))
    max_N[: d.lse_N.shape[0]] = d.z_NV.amax(1)
    max_N /= unit
    return Normaliser(max_N, padded_lse(logits, d) / unit - max_N, unit)


@cache
def _unit(backend: ModuleType) -> float:
    return float(backend.summarise(make_logits(1, 1, 1, dtype=torch.float16), False, 1 << 20).unit)


def is_large(logits: Logits, d: Dense, eps: float) -> Tensor:
    """[N, T]: pairs above eps, and the targets'."""
    tiles_T = torch.arange(logits.num_tiles, device=DEVICE)
    target_N = logits.target_N[: d.lse_N.shape[0], None]
    return (d.mass_NT > eps) | ((target_N >= 0) & (target_N // logits.tile == tiles_T))


def pair_weights(logits: Logits, d: Dense, filter_: Filter) -> Tensor:
    """k [N, T] for "filtered", and for "unbiased" with one uniform number."""
    large_NT = is_large(logits, d, filter_.eps)
    if filter_.mode == "filtered":
        return large_NT.double()
    assert filter_.uniform is not None
    eps_N1 = (d.mass_NT * ~large_NT).sum(1, keepdim=True) / filter_.most_drawn
    chance_NT = d.mass_NT / eps_N1.clamp(min=filter_.eps)
    return torch.where(large_NT, 1.0, torch.where(filter_.uniform < chance_NT, 1 / chance_NT, 0.0))


def profiles(logits: Logits, d: Dense, eps: float) -> Tensor:
    """π_V: within each tile Σ_i p_ij f'_ij / Σ_i mass over the sampled rows whose pair is not large."""
    num_valid = d.lse_N.shape[0]
    sample = torch.tensor([k * num_valid // SAMPLED_ROWS for k in range(SAMPLED_ROWS)], device=DEVICE)
    large_NT = is_large(logits, d, eps)
    pi = []
    for tile, columns in enumerate(torch.arange(d.z_NV.shape[1], device=DEVICE).split(logits.tile)):
        rows = sample[~large_NT[sample, tile]]
        p = d.softmax_NV[rows][:, columns]
        mass = p.sum()
        mean = (p * d.slope_NV[rows][:, columns]).sum(0) / mass
        pi.append(mean if mass > 0 else torch.full_like(mean, 1 / len(columns)))
    return torch.cat(pi)


def shares(logits: Logits, d: Dense, upstream: Upstream, eps: float) -> tuple[Tensor, Tensor]:
    """What the softmax of each (row, column) is multiplied with, and what the mass of each (row, tile) is in the tail:
    a + γ·log p, there with the mean of log p as if p lay over the tile like π."""
    num_valid = d.softmax_NV.shape[0]
    a_N1 = upstream.softmax_N[:num_valid, None].double()
    if upstream.log_N is None:
        return a_N1.expand_as(d.softmax_NV), a_N1.expand_as(d.mass_NT)
    log_N1, pi_V = upstream.log_N[:num_valid, None].double(), profiles(logits, d, eps)
    entropy_T = torch.stack([torch.special.entr(pi_v).sum() for pi_v in pi_V.split(logits.tile)])
    return a_N1 + log_N1 * d.softmax_NV.log(), a_N1 + log_N1 * (d.mass_NT.log() - entropy_T)


def gradients(logits: Logits, d: Dense, upstream: Upstream, filter_: Filter) -> tuple[Tensor, ...]:
    """(dE, dC, dbias) of the valid rows, with an adapter (dE, dB, dbias, da), with the pair weights and the tail of
    ``filter_``, in fp64."""
    num_valid, vocab = d.softmax_NV.shape
    b_N = upstream.target_N[:num_valid].double()
    share_NV, share_NT = shares(logits, d, upstream, filter_.eps)
    target_NV = logits.target_N[:num_valid, None] == torch.arange(vocab, device=DEVICE)
    p_NV = (share_NV * d.softmax_NV - b_N[:, None] * target_NV) * d.slope_NV
    if filter_.mode != "exact":
        weight_NT = pair_weights(logits, d, filter_)
        p_NV = p_NV * weight_NT.repeat_interleave(logits.tile, 1)[:, :vocab]
        if filter_.tail or filter_.mode == "unbiased":
            tail_NT = share_NT * d.mass_NT * (1 - weight_NT)
            p_NV = p_NV + tail_NT.repeat_interleave(logits.tile, 1)[:, :vocab] * profiles(logits, d, filter_.eps)
    p_NV = p_NV * float(upstream.scale)
    p_NV_scaled = p_NV * logits.logit_scale
    of_adapter = () if logits.adapter_VR is None else (p_NV_scaled @ logits.adapter_VR.double(),)
    return (
        p_NV_scaled @ logits.weight_VD.double(),
        p_NV_scaled.T @ compacted(logits, logits.trained[0]).double(),
        p_NV_scaled.sum(0),
        *of_adapter,
    )
