"""Unbiasedness without luck: with one number u for all draws, the mean over u = (k + ½)/K is exact up to O(1/K).

A pair of mass s below eps is drawn for ⌊K·s/eps⌉ of the K numbers, so that the mean of its weight is off by at most
eps/(2·K·s). That bounds the error of the mean gradient by eps/(2K) per small pair, times how far the pair's own mean
classifier row is from the tail's. An estimator with any bias does not keep to it as K grows.
"""

from types import ModuleType

import pytest
import torch
from dense import EVERYTHING, Dense, dense, gradients, is_large, make_logits, make_upstream, normaliser, profiles
from torch import Tensor

from cce_dist.kernels import pipeline, reference
from cce_dist.kernels.problem import Filter, Logits, Upstream

EPS = 2.0**-2


def error_bound(logits: Logits, d: Dense, upstream: Upstream, count: int) -> tuple[float, float]:
    """Bounds on the norms of the errors of the mean dE and dC."""
    small_NT = ~is_large(logits, d, EPS)
    own_NV = d.softmax_NV * d.slope_NV / d.mass_NT.repeat_interleave(256, 1)[:, : d.z_NV.shape[1]]
    off_NV = own_NV - profiles(logits, d, EPS)
    a_N = upstream.softmax_N[: d.lse_N.shape[0]].abs().double()
    each = EPS / (2 * count) * float(upstream.scale) * logits.logit_scale
    hidden_norm_N = logits.hidden_ND[: d.lse_N.shape[0]].double().norm(dim=1)
    dhidden_N, dweight_V = torch.zeros_like(d.lse_N), []
    for tile, columns in enumerate(torch.arange(off_NV.shape[1]).split(256)):
        use_N = small_NT[:, tile] * a_N * each
        dhidden_N += use_N * (off_NV[:, columns] @ logits.weight_VD[columns].double()).norm(dim=1)
        dweight_V.append(((use_N * hidden_norm_N)[:, None] * off_NV[:, columns].abs()).sum(0))
    return float(dhidden_N.norm()), float(torch.cat(dweight_V).norm())


def mean_gradient(backend: ModuleType, logits: Logits, d: Dense, upstream: Upstream, count: int) -> list[Tensor]:
    tiles = backend.summarise(logits, True, 1 << 20).tiles
    total: list[Tensor] = []
    for k in range(count):
        filter_ = Filter("unbiased", EPS, uniform=(k + 0.5) / count)
        got = backend.differentiate(logits, tiles, normaliser(backend, logits, d), upstream, filter_, EVERYTHING)
        total = (
            [x.double() / count for x in got]
            if not total
            else [t + x.double() / count for t, x in zip(total, got, strict=True)]
        )
    return total


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_mean_over_draws_is_the_exact_gradient(dtype: torch.dtype, softcap: float | None) -> None:
    check(reference, make_logits(dtype=dtype, softcap=softcap, shared=0.4), counts=(1, 4, 16, 64))


def test_the_mean_over_draws_is_the_exact_gradient_in_triton() -> None:
    check(pipeline, make_logits(rows=12, softcap=6.0, shared=0.4), counts=(1, 8))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_mean_over_many_draws_is_the_exact_gradient_in_triton(dtype: torch.dtype) -> None:
    check(pipeline, make_logits(dtype=dtype, softcap=6.0, shared=0.4), counts=(1, 16))


def check(backend: ModuleType, logits: Logits, counts: tuple[int, ...]) -> None:
    d, upstream = dense(logits), make_upstream(logits)
    exact = gradients(logits, d, upstream, Filter("exact"))
    # fp16: what P and R are rounded to, relative to the gradient.
    rounding = {torch.float64: 1e-6, torch.float32: 3e-6, torch.float16: 2e-3}[logits.hidden_ND.dtype]
    errors = []
    for count in counts:
        mean = mean_gradient(backend, logits, d, upstream, count)
        bounds = error_bound(logits, d, upstream, count)
        for got, truth, bound in zip(mean[:2], exact[:2], bounds, strict=True):
            error = float((got[: truth.shape[0]] - truth).norm())
            assert error <= bound + rounding * float(truth.norm()), f"K={count}: {error:.2e}, allowed {bound:.2e}"
        errors.append(float((mean[0][: exact[0].shape[0]] - exact[0]).norm() / exact[0].norm()))
    assert errors[0] > 0.02, "a single draw must be off, or nothing was drawn"
    assert errors[-1] < 4 * errors[0] / counts[-1] + rounding
