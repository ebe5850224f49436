"""Unbiasedness, without luck and with independent draws.

Without luck: with one number u for all draws, the mean over u = (k + ½)/K is exact up to O(1/K).

A pair of mass s below eps is drawn for ⌊K·s/eps⌉ of the K numbers, so that the mean of its weight is off by at most
eps/(2·K·s). That bounds the error of the mean gradient by eps/(2K) per small pair, times how far the pair's own mean
classifier row is from the tail's. An estimator with any bias does not keep to it as K grows.
"""

import math
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from dense import (
    EVERYTHING,
    Dense,
    dense,
    gradients,
    is_large,
    make_logits,
    make_upstream,
    normaliser,
    profiles,
    shares,
    valid_hidden,
)
from reference import DEVICE, TRITON_DTYPES, cce_outcome, make_problem, plain_outcome
from torch import Tensor

from cce_dist.kernels import torch_backend
from cce_dist.kernels.problem import TILE, Filter, Logits, Upstream
from cce_dist.kernels.triton import backend as triton_backend

EPS = 2.0**-2


def error_bound(logits: Logits, d: Dense, upstream: Upstream, count: int, most_drawn: float) -> tuple[float, float]:
    """Bounds on the norms of the errors of the mean dE and dC."""
    small_NT = ~is_large(logits, d, EPS)
    share_NV, share_NT = shares(logits, d, upstream, EPS)
    mass_NV, of_tail_NV = (x.repeat_interleave(TILE, 1)[:, : d.z_NV.shape[1]] for x in (d.mass_NT, share_NT))
    off_NV = share_NV * d.softmax_NV * d.slope_NV / mass_NV - of_tail_NV * profiles(logits, d, EPS)
    eps_N = ((d.mass_NT * small_NT).sum(1) / most_drawn).clamp(min=EPS)
    each = eps_N / (2 * count) * float(upstream.scale) * logits.logit_scale
    hidden_norm_N = valid_hidden(logits).double().norm(dim=1)
    dhidden_N, dweight_V = torch.zeros_like(d.lse_N), []
    for tile, columns in enumerate(torch.arange(off_NV.shape[1], device=DEVICE).split(TILE)):
        use_N = small_NT[:, tile] * each
        dhidden_N += use_N * (off_NV[:, columns] @ logits.weight_VD[columns].double()).norm(dim=1)
        dweight_V.append(((use_N * hidden_norm_N)[:, None] * off_NV[:, columns].abs()).sum(0))
    return float(dhidden_N.norm()), float(torch.cat(dweight_V).norm())


def mean_gradient(
    backend: ModuleType, logits: Logits, d: Dense, upstream: Upstream, count: int, most_drawn: float
) -> list[Tensor]:
    tiles = backend.summarise(logits, True, 1 << 20).tiles
    norm, total = normaliser(backend, logits, d), list[Tensor]()
    for k in range(count):
        filter_ = Filter("unbiased", EPS, most_drawn=most_drawn, uniform=(k + 0.5) / count)
        got = backend.differentiate(logits, tiles, norm, upstream, filter_, EVERYTHING)[:3]
        total = (
            [x.double() / count for x in got]
            if not total
            else [t + x.double() / count for t, x in zip(total, got, strict=True)]
        )
    return total


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_mean_over_draws_is_the_exact_gradient(dtype: torch.dtype, softcap: float | None) -> None:
    check(torch_backend, make_logits(dtype=dtype, softcap=softcap, shared=0.4), counts=(1, 4, 16, 64))


@pytest.mark.parametrize("backend", [torch_backend, triton_backend], ids=["torch", "triton"])
def test_it_is_where_the_number_of_draws_is_bounded(backend: ModuleType) -> None:
    logits = make_logits(rows=12, vocab=6 * TILE, spread=1.0, shared=0.4)
    small_N = (dense(logits).mass_NT * ~is_large(logits, dense(logits), EPS)).sum(1)
    assert (small_N > EPS).double().mean() > 0.5
    check(backend, logits, counts=(1, 8), most_drawn=1.0)


def test_the_mean_over_draws_is_the_exact_gradient_in_triton() -> None:
    check(triton_backend, make_logits(rows=12, softcap=6.0, shared=0.4), counts=(1, 8))


@pytest.mark.parametrize("backend", [torch_backend, triton_backend], ids=["torch", "triton"])
def test_it_is_that_of_the_entropy_too(backend: ModuleType) -> None:
    check(backend, make_logits(rows=12, softcap=6.0, shared=0.4), counts=(1, 8), entropy=True)


@pytest.mark.full
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_the_mean_over_many_draws_is_the_exact_gradient_in_triton(dtype: torch.dtype) -> None:
    check(triton_backend, make_logits(dtype=dtype, softcap=6.0, shared=0.4), counts=(1, 16))


def check(
    backend: ModuleType,
    logits: Logits,
    counts: tuple[int, ...],
    most_drawn: float = math.inf,
    entropy: bool = False,
) -> None:
    d, upstream = dense(logits), make_upstream(logits, entropy=entropy)
    exact = gradients(logits, d, upstream, Filter("exact"))
    # In 16 bits: what P and R are rounded to, relative to the gradient.
    rounding = {torch.float64: 1e-6, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    rounding = rounding[logits.hidden_ND.dtype]
    errors = []
    for count in counts:
        mean = mean_gradient(backend, logits, d, upstream, count, most_drawn)
        bounds = error_bound(logits, d, upstream, count, most_drawn)
        for got, truth, bound in zip(mean[:2], exact[:2], bounds, strict=True):
            error = float((got[: truth.shape[0]] - truth).norm())
            assert error <= bound + rounding * float(truth.norm()), f"K={count}: {error:.2e}, allowed {bound:.2e}"
        errors.append(float((mean[0][: exact[0].shape[0]] - exact[0]).norm() / exact[0].norm()))
    assert errors[0] > 0.02, "a single draw must be off, or nothing was drawn"
    assert errors[-1] < 4 * errors[0] / counts[-1] + rounding


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.float32),
        *(pytest.param("triton", d, marks=pytest.mark.gpu) for d in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
def test_over_64_seeds_the_mean_gradient_is_off_by_its_standard_error(backend: str, dtype: torch.dtype) -> None:
    """Of each element z = (mean over seeds − exact) / its standard error, which has mean 0 and variance 1.

    The standard error is the deviation over the seeds / √64, and what no draw averages: rounding, as large as the exact
    mode's own error on these inputs (P is rounded to 16 bits there as well).

    Every pair is drawn with a chance of at least 0.1, so that 64 seeds show each one. Draws of different tokens are
    independent, and so are those of different tiles: rows of dE, and dC's tiles, are independent samples of mean z and
    of mean z², and the standard error of the average over them is known from their scatter. 4 of it are allowed. z² is
    expected to be 63/61 (Student's t of 63 degrees of freedom) for normal sums; sums of a few draws of low chance are
    not quite normal: 5 % more are allowed. The forward is a full one: estimated log-sum-exps are off by as much as such
    a mean, and no draw averages that.
    """
    eps, count = 0.2, 64
    problem = make_problem(((64,),), 20 * TILE - 30, 32, dtype=dtype, spread=1.0, ignored=0.0, reduction="none", seed=4)
    draw = torch.Generator().manual_seed(4)
    centre_TD = (0.2 / math.sqrt(32)) * torch.randn(20, 32, generator=draw).to(DEVICE)
    weight = (problem.weight.float() + centre_TD.repeat_interleave(TILE, 0)[: 20 * TILE - 30]).to(dtype).float()
    problem = replace(problem, weight=weight)  # dC returns in fp32
    softmax_NV = (problem.hidden[0].float() @ weight.T).softmax(1)
    mass_NT = torch.stack([part.sum(1) for part in softmax_NV.split(TILE, 1)], 1)
    assert mass_NT.amin() > 0.1 * eps
    assert (mass_NT < eps).float().mean() > 0.8

    exact = plain_outcome(problem, torch.float64)
    runs = [
        cce_outcome(problem, backend=backend, filter_eps=eps, seed=seed, first_pass="full") for seed in range(count)
    ]
    rounded = cce_outcome(problem, backend=backend, gradient="exact")
    for name, sample_size in (("dhidden", 1), ("dweight", TILE)):
        gradients = torch.stack([getattr(run, name)[0].double() for run in runs])
        truth = getattr(exact, name)[0]
        rounding = (getattr(rounded, name)[0] - truth).square().mean(1, keepdim=True)
        variance = gradients.var(0) / count
        assert rounding.mean() < 0.1 * variance.mean(), "or it would hide a bias"
        z = (gradients.mean(0) - truth) / (variance + rounding).sqrt()
        samples = z.split(sample_size)
        means, squares = (torch.stack([(x**power).mean() for x in samples]) for power in (1, 2))
        error = 4 / math.sqrt(len(samples))
        assert abs(means.mean()) < error * means.std()
        assert means.std() < 1, "or the bound would be no bound"
        assert abs(squares.mean() - 63 / 61) < error * squares.std() + 0.05
        assert 0.8 < squares.mean().sqrt() < 1.2
