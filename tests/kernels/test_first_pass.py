"""The first pass in 8 bits: rounding, the estimate, and that what is refined is as if computed in full.

Triton's interpreter knows no 8-bit floats; there the same numbers are held in fp16.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from dense import dense, is_large, make_logits, padded_lse
from ranks import RankPool
from reference import DEVICE, TRITON_DTYPES, Problem, cce_outcome, make_problem, plain_outcome, relative_error
from sharded import assert_ranks_no_worse, make_rank_problem

from cce_dist import linear_cross_entropy
from cce_dist.kernels.problem import TILE, Estimate, Normaliser
from cce_dist.kernels.triton import backend as triton_backend
from cce_dist.kernels.triton.blocks import LN_2
from cce_dist.kernels.triton.quantise import (
    Common,
    QuantisedHidden,
    QuantisedWeight,
    moments,
    quantise_hidden,
    quantise_weight,
    storage_dtype,
)
from cce_dist.loss import settings

EPS = 2.0**-5
FP8: dict[str, Any] = {"backend": "triton", "first_pass": "fp8"}


def rounding(rows: int = 40, columns: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(rows, columns, generator=draw)
    weight_VD = torch.randn(rows, columns, generator=draw) * 0.1 + torch.randn(columns, generator=draw)
    return hidden_ND.half().to(DEVICE), weight_VD.half().to(DEVICE)


class Rounded(NamedTuple):
    """Both factors in 8 bits, the common rows, what was rounded, and the largest 4-norm of the classifier's rows."""

    hidden: QuantisedHidden
    weight: QuantisedWeight
    hidden_mean_D: torch.Tensor
    weight_mean_D: torch.Tensor
    rest_ND: torch.Tensor
    rest_VD: torch.Tensor
    largest_norm: torch.Tensor

    def rounded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What stands for the two rests, in fp64."""
        factor = math.log2(math.e)  # is in the hidden states' scales
        hidden_ND = self.hidden.rows_ND.double() * (self.hidden.scale_N[:, None] / factor)
        return hidden_ND, self.weight.rows_VD.double() * self.weight.scale_V[:, None]


def in_8_bits(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None = None) -> Rounded:
    """Of hidden states that stand in reverse order."""
    rows = hidden_ND.shape[0]
    token_N = torch.arange(rows - 1, -1, -1, dtype=torch.int32, device=DEVICE)
    n_valid, reversed_ND = torch.full_like(token_N[:1], rows), hidden_ND.flip(0)
    of_hidden, of_weight = moments(reversed_ND, token_N, n_valid), moments(weight_VD)
    hidden = quantise_hidden(reversed_ND, of_hidden, of_weight, token_N, n_valid, 1.0, False)
    memory_VD = torch.empty_like(weight_VD, dtype=storage_dtype(weight_VD))
    largest_norm = torch.zeros(1, device=DEVICE)
    means = of_hidden.mean_D, of_weight.mean_D
    common = Common(*means[::-1], hidden.column_variance)
    weight = quantise_weight(weight_VD, bias_V, None, common, 1.0, False, largest_norm, memory_VD)
    rests = (x.float() - mean_D for x, mean_D in zip((hidden_ND, weight_VD), means, strict=True))
    return Rounded(hidden, weight, *means, *rests, largest_norm)


def test_rows_are_rounded_to_three_bits_of_mantissa_relative_to_the_common_rows() -> None:
    hidden_ND, weight_VD = rounding()
    r = in_8_bits(hidden_ND, weight_VD)
    assert relative_error(r.hidden_mean_D, hidden_ND.double().mean(0)) < 0.2  # of samples, some of them twice
    for got, true in zip(r.rounded(), (r.rest_ND, r.rest_VD), strict=True):
        assert 0.01 < relative_error(got, true) < 0.03
        along = (got * true).sum(1) / (true * true).sum(1)
        assert (along.mean() - 1).abs() < 6e-4, "rounding must not shrink the rows"
    along_N = (r.rounded()[0] * r.rest_ND).sum(1) / (r.rest_ND * r.rest_ND).sum(1)
    assert (along_N - 1).abs().max() < 5e-5, "of a token that error would be in all of its logits"
    norm_N = r.rest_ND.norm(p=4, dim=1)
    assert relative_error(r.hidden.deviation_N / r.hidden.deviation_N.mean(), norm_N / norm_N.mean()) < 1e-5
    assert relative_error(r.largest_norm, r.rest_VD.norm(p=4, dim=1).amax()) < 1e-5


def test_every_number_is_rounded_as_torch_does() -> None:
    draw = torch.Generator().manual_seed(0)
    spread_RD = torch.exp2(torch.randint(-20, 1, (40, 300), generator=draw).float())
    weight_VD = (torch.randn(40, 300, generator=draw) * spread_RD).half().to(DEVICE)
    rest_VD = weight_VD.float() - moments(weight_VD).mean_D
    r = in_8_bits(weight_VD, weight_VD)
    expected_VD = (rest_VD * (448 / rest_VD.abs().amax(1, keepdim=True))).to(torch.float8_e4m3fn)
    # Where the two factors 448 / largest differ in the last bit, a number in the middle may go the other way.
    assert (r.weight.rows_VD.float() != expected_VD.float()).float().mean() < 2e-3


def test_offsets_make_up_for_common_rows_and_for_what_rounding_adds_to_exponentials() -> None:
    """Products and offsets are the logits less half the variance of their errors, of every token and of every column,
    whose sizes differ; a sum of exponentials is then right in the mean."""
    draw = torch.Generator().manual_seed(0)
    hidden_ND = 0.1 * torch.randn(64, 512, generator=draw) * (0.1 + torch.rand(64, 1, generator=draw)) + 0.2
    weight_VD = torch.randn(300, 512, generator=draw) * (0.1 + torch.rand(300, 1, generator=draw)) - 1
    bias_V = torch.randn(300, generator=draw).to(DEVICE)
    hidden_ND, weight_VD = hidden_ND.half().to(DEVICE), weight_VD.half().to(DEVICE)
    r = in_8_bits(hidden_ND, weight_VD, bias_V)
    rounded_ND, rounded_VD = r.rounded()
    offset_NV = (r.hidden.offset_N.double()[:, None] + r.weight.offset_V.double()) / math.log2(math.e)
    errors_ND, errors_VD = rounded_ND - r.rest_ND, rounded_VD - r.rest_VD
    variance_NV = (
        errors_ND.square() @ r.rest_VD.double().square().T + r.rest_ND.double().square() @ errors_VD.square().T
    )
    full_NV = hidden_ND.double() @ weight_VD.double().T + bias_V.double()
    taken_NV = full_NV - r.rest_ND.double() @ r.rest_VD.double().T - offset_NV
    expected_NV = variance_NV / 2
    assert relative_error(taken_NV.mean(), expected_NV.mean()) < 0.05
    assert relative_error(taken_NV.mean(0), expected_NV.mean(0)) < 0.15
    assert relative_error(taken_NV.mean(1), expected_NV.mean(1)) < 0.15
    assert relative_error(r.hidden.variance_N / math.log2(math.e), expected_NV.mean(1)) < 0.15


def test_the_margin_covers_estimates_that_are_off_by_more_than_is_tolerated() -> None:
    """Large logits: eps is lowered by what a pair's mass may be off beyond the 0.9 nats that are tolerated."""
    logits = make_logits(64, 8 * TILE, 64, dtype=torch.float16, spread=60.0, shared=0.0, bias=False)
    estimate = triton_backend.estimate(logits)
    exact = triton_backend.summarise(logits, True, 1 << 20)
    both_TN = []
    for tiles in (estimate.summary.tiles, exact.tiles):
        assert tiles is not None and tiles.reference_SN is not None
        reference_TN = tiles.reference_SN.repeat_interleave(tiles.tiles_per_split, 0)[: logits.num_tiles]
        both_TN.append((tiles.lse_TN.float() + reference_TN) * LN_2)
    off_TN = (both_TN[0] - both_TN[1]).abs()
    assert (off_TN > 0.9).float().mean() > 0.02, "or the margin would have nothing to cover"
    assert (off_TN <= estimate.margin_N + 0.9).float().mean() > 0.999


def test_pairs_near_eps_make_up_for_those_that_their_errors_left_to_the_estimate() -> None:
    """Estimates right in the mean, of which those that are too large are replaced: what is left is too small."""
    off = 0.3
    logits = make_logits(256, 40 * TILE, dtype=torch.float16, spread=2.0, shared=0.5, bias=False)
    logits = logits._replace(target_N=torch.full_like(logits.target_N, -1))
    d = dense(logits)
    summary = triton_backend.summarise(logits, True, 1 << 20)
    assert summary.tiles is not None
    eps = 0.03
    assert 0.1 < (d.mass_NT > eps).double().mean() < 0.5
    lse_N = d.lse_N.float()
    normaliser = Normaliser(lse_N / summary.unit, torch.zeros_like(lse_N), summary.unit)
    noise_TN = off * torch.randn(summary.tiles.lse_TN.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sums = []
    for error_TN in (noise_TN, -noise_TN):  # both, so that their own mean is 0
        estimated_TN = summary.tiles.lse_TN.float() + (error_TN - off * off / 2) / summary.unit
        tiles = summary.tiles._replace(lse_TN=estimated_TN.half())
        refined = triton_backend.refine(
            logits, Estimate(summary._replace(tiles=tiles), torch.zeros_like(lse_N)), normaliser, eps
        )
        sums.append((refined.max_N.double() * refined.unit + refined.sumexp_N.double().log() - d.lse_N).exp())
    off_N = torch.stack(sums).mean(0) - 1
    assert torch.stack(sums).std() > 5e-3, "estimates are left"
    assert off_N.mean().abs() < 5e-3  # without: 0.036


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_becomes_nan_alone(value: float) -> None:
    hidden_ND, weight_VD = rounding()
    hidden_ND[3, 299] = value
    r = in_8_bits(hidden_ND, weight_VD)
    got_ND, _ = r.rounded()
    assert got_ND[3].isnan().all()
    assert got_ND.isfinite().all(1).sum() == 39
    assert r.hidden.offset_N.isfinite().sum() == 39
    assert r.weight.offset_V.isfinite().all()


def test_a_row_like_the_common_one_becomes_zeros() -> None:
    hidden_ND, weight_VD = rounding()
    hidden_ND[:] = hidden_ND[:1]
    r = in_8_bits(hidden_ND, weight_VD)
    assert r.rounded()[0].abs().max() < 1e-3
    full_NV = hidden_ND.double() @ weight_VD.double().T
    offset_NV = (r.hidden.offset_N.double()[:, None] + r.weight.offset_V.double()) / math.log2(math.e)
    assert relative_error(offset_NV, full_NV) < 1e-6


@pytest.mark.parametrize("size", [1e-30, 1e-36, 1e-38])
def test_rows_of_the_smallest_numbers_stay_finite(size: float) -> None:
    """448 / 1e-36 is infinite in fp32."""
    hidden_ND, weight_VD = rounding()
    r = in_8_bits(hidden_ND.float() * size, weight_VD.float())
    assert relative_error(r.rounded()[0], r.rest_ND) < (0.03 if size > 1e-37 else 0.1)
    for x in (*r.hidden[1:], *r.weight[1:]):
        assert x.isfinite().all()
    tiny = in_8_bits(weight_VD.float(), weight_VD.float() * size)
    assert relative_error(tiny.rounded()[1], tiny.rest_VD) < (0.03 if size > 1e-37 else 0.1)
    assert tiny.largest_norm > 0


@pytest.mark.parametrize("case", [{}, {"num_valid": 17}, {"softcap": 6.0, "bias": False}, {"vocab": 9 * TILE + 1}])
def test_large_tiles_are_exact_after_refinement_and_the_others_estimates(case: dict[str, Any]) -> None:
    logits = make_logits(dtype=torch.float16, hidden_size=64, **case)
    d, num_valid = dense(logits), int(logits.n_valid)
    estimate = triton_backend.estimate(logits)
    first = estimate.summary
    estimated_N = first.max_N + first.sumexp_N.log() / first.unit
    off_N = estimated_N[:num_valid].double() * first.unit - d.lse_N
    assert 1e-5 < off_N.abs().max() < 0.5, "an estimate is neither exact nor wild"
    normaliser = Normaliser(first.max_N, first.sumexp_N.log() / first.unit, first.unit)
    refined = triton_backend.refine(logits, estimate, normaliser, EPS)
    assert refined.tiles is not None
    assert refined.tiles.reference_SN is not None
    lse_N = refined.max_N[:num_valid].double() * refined.unit + refined.sumexp_N[:num_valid].double().log()
    assert (lse_N - d.lse_N).abs().max() < 0.3 * off_N.abs().max()
    split_T = torch.arange(logits.num_tiles, device=DEVICE) // refined.tiles.tiles_per_split
    lse_TN = (refined.tiles.lse_TN.double() + refined.tiles.reference_SN.double()[split_T]) * refined.unit
    mass_NT = (lse_TN[:, :num_valid] - padded_lse(logits, d)[:num_valid]).exp().T
    large_NT = is_large(logits, d, 2 * EPS)
    assert large_NT.any()
    assert relative_error(mass_NT[large_NT], d.mass_NT[large_NT]) < 4e-3
    if num_valid < logits.hidden_ND.shape[0]:
        assert refined.sumexp_N[num_valid:].gt(0).all()


def test_tiles_without_a_finite_logit_stay_without_mass() -> None:
    logits = make_logits(vocab=10 * TILE, dtype=torch.float16)
    bias_V = logits.bias_V.clone()
    none = [0, 1, 4, 8, 9]  # the first of each split, and all of the last
    bias_V.view(10, TILE)[none] = -torch.inf
    logits = logits._replace(bias_V=bias_V, target_N=torch.full_like(logits.target_N, -1))
    estimate = triton_backend.estimate(logits)
    first = estimate.summary
    normaliser = Normaliser(first.max_N, first.sumexp_N.log() / first.unit, first.unit)
    refined = triton_backend.refine(logits, estimate, normaliser, EPS)
    for tiles in (first.tiles, refined.tiles):
        assert (tiles.lse_TN[none] == -torch.inf).all()
        assert tiles.reference_SN.isfinite().all()
    off_N = refined.max_N.double() * refined.unit + refined.sumexp_N.double().log() - dense(logits).lse_N
    assert off_N.abs().max() < 0.03


def peaked(**options: Any) -> Problem:
    """Logits of which a tile shares a direction: some tiles of a token are small, others large."""
    problem = make_problem(((40,),), 750, 64, dtype=torch.float32, **{"reduction": "none", **options})
    centre_TD = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight_VD = 0.5 * problem.weight + 0.25 * centre_TD.repeat_interleave(TILE, 0)[:750]
    return replace(problem, hidden=(problem.hidden[0].half(),), weight=weight_VD.half())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.full),
        pytest.param({"softcap": 8.0}, marks=pytest.mark.full),
        {"logit_scale": -0.7},
        pytest.param({"bias": True, "shift": 1}, marks=pytest.mark.full),
    ],
)
def test_loss_and_gradients_are_near_those_of_the_full_pass(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "_LARGEST_ESTIMATED", 1.0)  # of six tiles hardly any is small enough
    problem = peaked(**options)
    truth = plain_outcome(problem, torch.float64)
    for mode in ({"gradient": "unbiased", "seed": 3}, {"gradient": "filtered"}):
        full, fp8 = (
            cce_outcome(problem, **{**FP8, **mode, "filter_eps": EPS, "first_pass": way}) for way in ("full", "fp8")
        )
        assert 1e-7 < relative_error(fp8.loss[0], truth.loss[0]) < 2e-3
        for name in ("dhidden", "dweight"):
            exact, near, plain = (getattr(x, name)[0] for x in (truth, fp8, full))
            assert relative_error(near, exact) < 1.3 * relative_error(plain, exact) + 1e-2


@pytest.mark.full
def test_a_filter_that_leaves_out_much_costs_the_loss_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = peaked()
    truth = plain_outcome(problem, torch.float64)

    def lse_error(eps: float) -> float:
        got = cce_outcome(problem, **FP8, gradient="filtered", filter_eps=eps)
        return relative_error(got.lse[0], truth.lse[0])

    assert lse_error(0.25) < 1.5 * lse_error(2.0**-9.3)
    monkeypatch.setattr(settings, "_LARGEST_ESTIMATED", 1.0)
    assert lse_error(0.25) > 3 * lse_error(2.0**-9.3)


@pytest.mark.parametrize("gradient", ["unbiased", "filtered"])
def test_logits_too_large_for_an_estimate_are_computed_in_full(gradient: str) -> None:
    """Gaps of 10^4: an estimate may be off by hundreds, so nothing may rest on it."""
    problem = make_problem(((14,),), 1100, 16, dtype=torch.float16, spread=0.5, reduction="none")
    problem.weight[:, :2] = 0
    problem.weight[7, 0], problem.weight[700:, 1] = 100, -100
    problem.hidden[0][:, :2] = 100
    problem.hidden[0][::2, 0] = 0
    truth = plain_outcome(problem, torch.float64)
    got = cce_outcome(problem, **FP8, gradient=gradient, filter_eps=1e-3)
    assert relative_error(got.loss[0], truth.loss[0]) < 1e-5
    assert relative_error(got.dhidden[0], truth.dhidden[0]) < 2e-3
    assert relative_error(got.dweight[0], truth.dweight[0]) < 2e-3


def test_row_blocks_whose_estimates_would_all_be_replaced_are_not_estimated() -> None:
    """One number of a token and of a column holds nearly all of them: its error may be many nats."""
    half = 128  # a multiple of the rows of a block
    logits = make_logits(2 * half, 5 * TILE, 32, dtype=torch.float16, bias=False)
    hidden_ND, weight_VD = logits.hidden_ND, logits.weight_VD
    weight_VD[:, 0] = 0
    weight_VD[7, 0] = 60
    hidden_ND[:, 0] = 0
    hidden_ND[logits.token_N[:half].long(), 0] = 10
    hidden_ND[logits.token_N[: half // 2].long(), 0] = -10
    hidden_ND[logits.token_N[half:].long(), 1:] *= 0.2
    d = dense(logits)
    estimate = triton_backend.estimate(logits)
    estimated_N = estimate.summary.max_N > -torch.inf
    assert estimated_N.tolist() == [False] * half + [True] * half
    assert (estimate.margin_N == torch.inf).tolist() == [True] * half + [False] * half
    first = estimate.summary
    refined = triton_backend.refine(
        logits, estimate, Normaliser(first.max_N, first.sumexp_N.log() / first.unit, first.unit), EPS
    )
    off_N = refined.max_N.double() * refined.unit + refined.sumexp_N.double().log() - d.lse_N
    assert off_N[:half].abs().max() < 1e-6 * d.lse_N.abs().max()
    assert off_N[half:].abs().max() < 0.1


def test_a_nan_reaches_its_loss_and_gradient_and_no_other_token() -> None:
    problem = peaked(ignored=0.0)
    problem.hidden[0][3, 5] = torch.nan
    hidden = problem.hidden[0].clone().requires_grad_()
    loss_n = linear_cross_entropy(
        hidden, problem.weight, problem.labels[0], reduction="none", filter_eps=EPS, seed=1, **FP8
    )
    assert loss_n.isnan().nonzero().tolist() == [[3]]
    (gradient,) = torch.autograd.grad(loss_n, hidden, problem.upstream[0])
    assert gradient[3].isnan().any()
    assert gradient[torch.arange(40, device=DEVICE) != 3].isfinite().all()


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("gradient", ["unbiased", "filtered", "exact"])
@pytest.mark.parametrize("options", [{}, {"softcap": 8.0, "bias": True}], ids=str)
def test_a_full_pass_rounds_alike_with_and_without_a_gradient(
    options: dict[str, Any], gradient: str, dtype: torch.dtype
) -> None:
    """With summaries of the tiles and without: the same bits."""
    problem = make_problem(((40,),), 750, 64, dtype=dtype, reduction="none", **options)
    settings = {**problem.options, "bias": problem.bias, "first_pass": "full", "backend": "triton"}
    weight = problem.weight.clone().requires_grad_()
    trained, evaluated = (
        linear_cross_entropy(
            problem.hidden[0], rows, problem.labels[0], gradient=gradient, filter_eps=EPS, return_lse=True, **settings
        )
        for rows in (weight, problem.weight)
    )
    assert trained[0].requires_grad
    assert all(torch.equal(got, expected) for got, expected in zip(trained, evaluated, strict=True))


def test_evaluation_and_exact_gradients_take_no_first_pass() -> None:
    problem = peaked()
    hidden, weight, labels = problem.hidden[0], problem.weight, problem.labels[0]
    full, evaluated = (
        linear_cross_entropy(hidden, weight, labels, backend="triton", first_pass=way) for way in ("full", "fp8")
    )
    exact = linear_cross_entropy(hidden, weight.clone().requires_grad_(), labels, gradient="exact", **FP8)
    assert torch.equal(evaluated, full)
    assert torch.equal(exact, full)


@pytest.mark.parametrize(
    ("dtype", "settings"), [(torch.float32, {}), (torch.float16, {"backend": "torch"}), (torch.float64, {})], ids=str
)
def test_where_it_cannot_be_it_is_refused_with_the_reason(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    hidden, weight = torch.randn(3, 8, dtype=dtype), torch.randn(300, 8, dtype=dtype, requires_grad=True)
    with pytest.raises(ValueError, match='first_pass="fp8" needs 16-bit hidden states'):
        linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3]), first_pass="fp8", **settings)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_over_ranks_everything_large_is_exact(ranks: RankPool, layout: Any) -> None:
    """With eps so small that every pair is computed in full, and an empty shard among the ranks' own."""
    shapes = ((9,),) if layout == "replicated" else ((9,), (4,))
    problem = make_rank_problem(shapes, 600, 16, dtype=torch.float16, reduction="none")
    assert_ranks_no_worse(ranks, 2, problem, layout, **FP8, gradient="unbiased", filter_eps=1e-30)
