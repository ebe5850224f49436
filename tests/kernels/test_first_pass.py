"""The first pass in 8 bits: rounding, the estimate, and that what is refined is as if computed in full.

Triton's interpreter knows no 8-bit floats; there the same numbers are held in fp16.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from dense import dense, is_large, make_logits, padded_lse
from ranks import RankPool
from reference import DEVICE, Problem, cce_outcome, make_problem, plain_outcome, relative_error
from sharded import assert_ranks_no_worse, make_rank_problem

from cce_dist import linear_cross_entropy
from cce_dist.kernels import pipeline
from cce_dist.kernels.problem import TILE, Normaliser
from cce_dist.kernels.quantise import Quantised, common_row, quantise_hidden, quantise_weight, storage_dtype

EPS = 2.0**-5
FP8: dict[str, Any] = {"backend": "triton", "first_pass": "fp8"}


def rounding(rows: int = 40, columns: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(rows, columns, generator=draw)
    weight_VD = torch.randn(rows, columns, generator=draw) * 0.1 + torch.randn(columns, generator=draw)
    return hidden_ND.half().to(DEVICE), weight_VD.half().to(DEVICE)


def compacted(hidden_ND: torch.Tensor, common_D: torch.Tensor) -> tuple[Quantised, torch.Tensor]:
    """Of hidden states that stand in reverse order."""
    rows = hidden_ND.shape[0]
    token_N = torch.arange(rows - 1, -1, -1, dtype=torch.int32, device=DEVICE)
    return quantise_hidden(hidden_ND.flip(0), common_D, token_N, torch.full_like(token_N[:1], rows))


def test_rows_are_rounded_to_three_bits_of_mantissa_relative_to_the_common_row() -> None:
    hidden_ND, weight_VD = rounding()
    common_D = common_row(weight_VD)
    hidden, offset_N = compacted(hidden_ND, common_D)
    weight = quantise_weight(weight_VD, common_D, torch.empty_like(weight_VD, dtype=storage_dtype(weight_VD)))
    rest_VD = weight_VD.float() - common_D
    for quantised, true in ((hidden, hidden_ND.float()), (weight, rest_VD)):
        got = quantised.rows_RD.float() * quantised.scale_R[:, None]
        assert 0.01 < relative_error(got, true) < 0.03
        assert relative_error(quantised.norm_R, true.norm(p=4, dim=1)) < 1e-5
        along = (got * true).sum(1) / (true * true).sum(1)
        assert (along.mean() - 1).abs() < 6e-4, "rounding must not shrink the rows"
    assert relative_error(offset_N, hidden_ND.double() @ common_D.double()) < 1e-5


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_becomes_nan_alone(value: float) -> None:
    hidden_ND, weight_VD = rounding()
    hidden_ND[3, 299] = value
    hidden, _ = compacted(hidden_ND, common_row(weight_VD))
    got_ND = hidden.rows_RD.float() * hidden.scale_R[:, None]
    assert got_ND[3].isnan().all()
    assert got_ND.isfinite().all(1).sum() == 39


def test_a_row_of_zeros_stays_one() -> None:
    hidden_ND, weight_VD = rounding()
    hidden_ND[5] = 0
    hidden, _ = compacted(hidden_ND, common_row(weight_VD))
    assert not (hidden.rows_RD[5].float() * hidden.scale_R[5]).any()


@pytest.mark.parametrize("case", [{}, {"num_valid": 17}, {"softcap": 6.0, "bias": False}, {"vocab": 9 * TILE + 1}])
def test_large_tiles_are_exact_after_refinement_and_the_others_estimates(case: dict[str, Any]) -> None:
    logits = make_logits(dtype=torch.float16, hidden_size=64, **case)
    d, num_valid = dense(logits), int(logits.n_valid)
    estimate = pipeline.estimate(logits)
    first = estimate.summary
    estimated_N = first.max_N + first.sumexp_N.log() / first.unit
    off_N = estimated_N[:num_valid].double() * first.unit - d.lse_N
    assert 1e-5 < off_N.abs().max() < 0.5, "an estimate is neither exact nor wild"
    normaliser = Normaliser(first.max_N, first.sumexp_N.log() / first.unit, first.unit)
    refined = pipeline.refine(logits, estimate, normaliser, EPS)
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


def peaked(**options: Any) -> Problem:
    """Logits of which a tile shares a direction: some tiles of a token are small, others large."""
    problem = make_problem(((40,),), 750, 64, dtype=torch.float32, **{"reduction": "none", **options})
    centre_TD = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight_VD = 0.5 * problem.weight + 0.25 * centre_TD.repeat_interleave(TILE, 0)[:750]
    return replace(problem, hidden=(problem.hidden[0].half(),), weight=weight_VD.half())


@pytest.mark.parametrize("options", [{}, {"softcap": 8.0}, {"logit_scale": -0.7}, {"bias": True, "shift": 1}])
def test_loss_and_gradients_are_near_those_of_the_full_pass(options: dict[str, Any]) -> None:
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
