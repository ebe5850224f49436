"""The loss in one process: every option, dtype and backend against full logits in fp64; modes; shapes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    DEVICE,
    TRITON_DTYPES,
    Problem,
    assert_bitwise,
    assert_no_worse,
    assert_rounding_only,
    assert_within,
    cce_outcome,
    leaf,
    make_problem,
    plain_outcome,
    plain_tokens,
    relative_error,
)

from cce_dist import VocabShard, linear_cross_entropy
from cce_dist.kernels.problem import MOST_DRAWN, TILE
from cce_dist.loss.autograd import Call, filter_of, logits_of
from cce_dist.loss.settings import CallSettings, check_settings, resolve

ALL = {
    "bias": True,
    "softcap": 4.0,
    "logit_scale": 0.7,
    "shift": 1,
    "ignore_index": -7,
    "reduction": "none",
    "lse_gradient": True,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "per token": {"reduction": "none"},
    "through lse": {"lse_gradient": True},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "logit scale": {"logit_scale": 0.5},
    "negative logit scale": {"logit_scale": -1.5},
    "shift": {"shift": 1},
    "shift by 5, per token": {"shift": 5, "reduction": "none"},
    "ignore_index": {"ignore_index": -1},
    "ignore_index inside the vocabulary": {"ignore_index": 3},
    "num_valid_tokens": {"num_valid_tokens": 40},
    "num_valid_tokens as a tensor": {"num_valid_tokens": torch.tensor(40)},
    "all": ALL,
    "all, sum": {**ALL, "reduction": "sum"},
    "all, mean": {**ALL, "reduction": "mean"},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EXACT_WAYS: dict[str, dict[str, Any]] = {
    "exact": {"gradient": "exact"},
    "unbiased, eps 0": {"gradient": "unbiased", "filter_eps": 0},
    "filtered, eps 0": {"gradient": "filtered", "filter_eps": 0.0},
    "drop, eps 0": {"gradient": "filtered", "tail": False, "filter_eps": 0.0},
}
# Masses of all pairs are above this: nothing is dropped, but the sparse path runs.
TINY_EPS: dict[str, dict[str, Any]] = {
    "unbiased, nothing small": {"gradient": "unbiased", "filter_eps": 1e-30},
    "filtered, nothing small": {"gradient": "filtered", "filter_eps": 1e-30},
    "drop, nothing small": {"gradient": "filtered", "tail": False, "filter_eps": 1e-30},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_torch_backend_matches_full_logits(options: dict[str, Any], dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, **options)
    assert_no_worse(cce_outcome(problem, backend="torch", gradient="exact"), problem)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_triton_backend_matches_full_logits(options: dict[str, Any], dtype: torch.dtype) -> None:
    problem = make_problem(((2, 11),), 300, dtype=dtype, **options)
    assert_no_worse(cce_outcome(problem, backend="triton", gradient="exact"), problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [*EXACT_WAYS.items(), *TINY_EPS.items()], ids=lambda mode: mode[0])
def test_modes_without_small_pairs_are_exact(mode: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, **ALL)
    assert_no_worse(cce_outcome(problem, backend="torch", **mode[1]), problem)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("mode", [*EXACT_WAYS.items(), *TINY_EPS.items()], ids=lambda mode: mode[0])
def test_triton_modes_without_small_pairs_are_exact(mode: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    problem = make_problem(((2, 11),), 300, dtype=dtype, **ALL)
    assert_no_worse(cce_outcome(problem, backend="triton", **mode[1]), problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", [*EXACT_WAYS.items(), *TINY_EPS.items()], ids=lambda mode: mode[0])
def test_several_blocks_of_everything_match_full_logits(
    mode: tuple[str, dict[str, Any]], dtype: torch.dtype, dim: int
) -> None:
    problem = make_problem(((513,),), 5000, dim, dtype=dtype, bias=True, reduction="none", lse_gradient=True)
    assert_no_worse(cce_outcome(problem, backend="triton", **mode[1]), problem)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("gradient", ["exact", "unbiased", "filtered"])
def test_loss_and_lse_do_not_depend_on_the_gradient_mode(gradient: str, backend: str) -> None:
    problem = sharp_problem()
    got = cce_outcome(problem, backend=backend, gradient=gradient, filter_eps=0.1)
    truth, plain = plain_outcome(problem, torch.float64), plain_outcome(problem)
    assert_within(got._replace(dhidden=truth.dhidden, dweight=truth.dweight, dbias=truth.dbias), truth, plain)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_tail_makes_filtered_gradients_better_than_dropping(backend: str) -> None:
    problem = sharp_problem()
    truth = plain_outcome(problem, torch.float64)
    errors = {}
    for tail in (True, False):
        got = cce_outcome(problem, backend=backend, gradient="filtered", tail=tail, filter_eps=2.0**-4)
        errors[tail] = [
            relative_error(got.dhidden[0], truth.dhidden[0]),
            relative_error(got.dweight[0], truth.dweight[0]),
        ]
    assert 1e-4 < errors[False][0] < 0.5, "the problem must have pairs to drop, and not drop most"
    assert errors[True][0] < 0.5 * errors[False][0]
    assert errors[True][1] < 0.8 * errors[False][1]


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.full)])
def test_default_gradient_is_unbiased_sampling_of_small_pairs(backend: str) -> None:
    """Averaged over independent seeds the gradient gets closer to the exact one; each alone is off."""
    problem = sharp_problem()
    truth = plain_outcome(problem, torch.float64)
    count = 24
    draws = [cce_outcome(problem, backend=backend, seed=seed, filter_eps=2.0**-4) for seed in range(count)]
    for field in ("dhidden", "dweight"):
        wanted = getattr(truth, field)[0]
        gradients = torch.stack([getattr(draw, field)[0].double() for draw in draws])
        alone = max(relative_error(gradient, wanted) for gradient in gradients)
        assert relative_error(gradients.mean(0), wanted) < 2.5 * alone / count**0.5
        assert len({float(gradient.sum()) for gradient in gradients}) > count / 2, "seeds must differ"


def sharp_problem(**options: Any) -> Problem:
    """Peaked logits over 5 tiles, whose rows share a direction: some tiles are negligible to some tokens."""
    problem = make_problem(((40,),), 5 * TILE - 30, spread=3.0, reduction="none", **options)
    draw = torch.Generator().manual_seed(5)
    centre = torch.randn(5, problem.weight.shape[1], generator=draw).to(DEVICE)
    rows = centre.repeat_interleave(TILE, 0)[: problem.vocab_size]
    return replace(problem, weight=problem.weight * 0.3 + rows * 0.6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_wider_classifier_is_rounded_to_the_hidden_dtype_and_keeps_its_own_gradient_dtype(backend: str) -> None:
    problem = make_problem(((2, 11),), 300, dtype=torch.float16, bias=True, reduction="none")
    problem = replace(problem, weight=problem.weight.float() * 1.0001, bias=problem.bias.float())  # type: ignore[union-attr]
    got = cce_outcome(problem, backend=backend, gradient="exact")
    assert got.dweight[0].dtype == torch.float32
    assert got.dbias[0].dtype == torch.float32
    assert got.dhidden[0].dtype == torch.float16
    assert_no_worse(got, problem)
    # From fp32 sums, not from sums rounded to fp16 on the way.
    truth = plain_outcome(problem, torch.float64)
    if backend == "torch":
        assert relative_error(got.dweight[0], truth.dweight[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_classifier_may_have_another_dtype(dtype: torch.dtype) -> None:
    """Its values are what they are in fp32, and its gradient is rounded to its own dtype once."""
    problem = make_problem(reduction="none")
    weight = problem.weight.bfloat16().to(dtype)
    got = cce_outcome(replace(problem, weight=weight), gradient="exact")
    expected = cce_outcome(replace(problem, weight=weight.float()), gradient="exact")
    assert_bitwise(got.loss[0], expected.loss[0])
    assert_bitwise(got.dhidden[0], expected.dhidden[0])
    assert_bitwise(got.dweight[0], expected.dweight[0].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_have_the_documented_dtypes_and_shapes(dtype: torch.dtype) -> None:
    problem = make_problem(((2, 3, 7),), 40, 8, dtype=dtype, shift=2, reduction="none", lse_gradient=True)
    got = cce_outcome(problem, backend="torch")
    result = torch.float64 if dtype == torch.float64 else torch.float32
    for x in (got.loss[0], got.lse[0]):
        assert (x.dtype, x.shape) == (result, (2, 3, 5))
    assert got.dhidden[0].dtype == dtype
    assert got.dweight[0].dtype == dtype


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_z_loss_reaches_the_gradient_through_lse(backend: str) -> None:
    problem = make_problem(((2, 11),), 300, reduction="mean", ignored=0.3)
    (hidden,), (labels,) = problem.hidden, problem.labels
    results = []
    for dtype, plain in ((torch.float64, True), (torch.float32, True), (torch.float32, False)):
        e, c = leaf(hidden.to(dtype)), leaf(problem.weight.to(dtype))
        if plain:
            nll, lse, valid = plain_tokens(e, c, labels, None, {})
            loss = nll.sum() / valid.sum()
        else:
            loss, lse = linear_cross_entropy(e, c, labels, return_lse=True, gradient="exact", backend=backend)  # type: ignore[call-overload]
        (30 * (loss + 1e-2 * (lse**2).mean())).backward()
        results.append((e.grad, c.grad))
    truth, plain_torch, got = results
    for t, p, g in zip(truth, plain_torch, got, strict=True):
        assert relative_error(g, t) <= 1.5 * relative_error(p, t) + 2.0**-24


@pytest.mark.parametrize("gradient", ["exact", "unbiased", "filtered"])
def test_gradient_checks_against_finite_differences(gradient: str) -> None:
    problem = make_problem(((5,),), TILE + 12, 3, dtype=torch.float64, bias=True, ignored=0.3)

    def function(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return linear_cross_entropy(  # type: ignore[return-value]
            hidden,
            weight,
            problem.labels[0],
            bias=bias,
            softcap=5.0,
            logit_scale=1.3,
            reduction="none",
            return_lse=True,
            gradient=gradient,
            filter_eps=1e-30,
        )

    assert problem.bias is not None
    inputs = (leaf(problem.hidden[0]), leaf(problem.weight), leaf(problem.bias))
    assert torch.autograd.gradcheck(function, inputs)


def test_a_single_token_of_no_axis_is_a_loss() -> None:
    problem = make_problem(((),), 50, 8, ignored=0.0, reduction="none")
    assert_no_worse(cce_outcome(problem, gradient="exact"), problem)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int64])
def test_labels_may_be_any_signed_integers(dtype: torch.dtype) -> None:
    problem = make_problem()
    got = cce_outcome(replace(problem, labels=(problem.labels[0].to(dtype),)), gradient="exact")
    assert_no_worse(got, problem)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strides_do_not_matter(backend: str) -> None:
    problem = make_problem(((3, 7),), 270, 16, reduction="none", lse_gradient=True)
    hidden = problem.hidden[0].transpose(0, 1).contiguous().transpose(0, 1)
    weight = torch.cat((problem.weight, problem.weight), dim=1)[:, :16]
    labels = problem.labels[0].T.contiguous().T
    upstream = problem.upstream[0].T.contiguous().T
    strided = replace(problem, hidden=(hidden,), weight=weight, labels=(labels,), upstream=(upstream,))
    expected = cce_outcome(problem, gradient="exact", backend=backend)
    e, c = hidden.requires_grad_(), weight.requires_grad_()
    loss, lse = linear_cross_entropy(  # type: ignore[call-overload]
        e, c, labels, return_lse=True, gradient="exact", backend=backend, reduction="none"
    )
    torch.autograd.backward([loss, lse], [strided.upstream[0], strided.lse_upstream[0]])
    assert_bitwise(e.grad, expected.dhidden[0])
    assert_bitwise(c.grad, expected.dweight[0])
    assert_bitwise(loss, expected.loss[0])


def test_hidden_expanded_over_an_axis_gets_the_summed_gradient() -> None:
    problem = make_problem(((4,),), 90, 8)
    e = leaf(problem.hidden[0])
    labels = torch.stack([problem.labels[0], (problem.labels[0] + 1).clamp(min=0)])
    linear_cross_entropy(e.expand(2, 4, 8), problem.weight, labels, gradient="exact", reduction="sum").backward()
    e2 = leaf(problem.hidden[0].double())
    for row in labels:
        plain_tokens(e2, problem.weight.double(), row, None, {})[0].sum().backward()
    assert relative_error(e.grad, e2.grad) < 1e-6


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.full)])
@pytest.mark.parametrize("gradient", ["exact", "unbiased", "filtered"])
def test_a_small_workspace_changes_nothing_but_memory(gradient: str, backend: str) -> None:
    """1 MB holds less than two tiles of 1100 tokens, so that there are several chunks or waves."""
    problem = make_problem(((1100,),), 3 * TILE - 40, 8, reduction="none", spread=4.0)
    wide, narrow = (
        cce_outcome(problem, backend=backend, gradient=gradient, filter_eps=1e-3, seed=3, workspace_mb=size)
        for size in (64, 1)
    )
    for field in ("loss", "lse", "dhidden", "dweight"):
        assert relative_error(getattr(narrow, field)[0], getattr(wide, field)[0]) < 1e-6


@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(st.data())
def test_any_shape_matches_full_logits(data: st.DataObject) -> None:
    check_any_shape(data, backend="torch", largest_vocab=700, largest_axis=30)


@pytest.mark.full
@settings(derandomize=True, deadline=None, max_examples=400, database=None)
@given(st.data())
def test_any_shape_matches_full_logits_more(data: st.DataObject) -> None:
    check_any_shape(data, backend="torch", largest_vocab=1500, largest_axis=40)


@pytest.mark.full
@pytest.mark.timeout(600)
# On a GPU most shapes have kernels compiled for them, which takes seconds.
@settings(derandomize=True, deadline=None, max_examples=60 if DEVICE == "cpu" else 15, database=None)
@given(st.data())
def test_any_shape_matches_full_logits_in_triton(data: st.DataObject) -> None:
    check_any_shape(data, backend="triton", largest_vocab=300, largest_axis=13)


def check_any_shape(data: st.DataObject, backend: str, largest_vocab: int, largest_axis: int) -> None:
    shape = data.draw(st.lists(st.integers(1, largest_axis), min_size=1, max_size=2), "shape")
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]), "dtype"
    )
    mode = data.draw(st.sampled_from(["exact", "unbiased", "filtered"]), "mode")
    problem = make_problem(
        (tuple(shape),),
        data.draw(st.integers(1, largest_vocab), "vocab"),
        data.draw(st.integers(1, 70), "dim"),
        dtype=dtype,
        bias=data.draw(st.booleans(), "bias"),
        softcap=data.draw(st.sampled_from([None, 2.0, 30.0]), "softcap"),
        logit_scale=data.draw(st.sampled_from([None, 0.3]), "logit_scale"),
        shift=data.draw(st.integers(0, shape[-1] - 1), "shift"),
        reduction=data.draw(st.sampled_from(["none", "sum"]), "reduction"),
        ignored=data.draw(st.sampled_from([0.0, 0.4]), "ignored"),
        lse_gradient=data.draw(st.booleans(), "lse_gradient"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    assert_rounding_only(cce_outcome(problem, backend=backend, gradient=mode, filter_eps=1e-30), problem)


@pytest.mark.parametrize("rows", [128, 300, 600])
def test_a_shard_draws_its_share_of_the_most_pairs_that_a_token_draws(rows: int) -> None:
    """Of the whole vocabulary's `MOST_DRAWN`, so that the work of flat softmaxes does not grow with the ranks."""
    shard = VocabShard(((0, rows),), 600, None)
    settings = check_settings({"gradient": "unbiased"}, CallSettings)
    hidden, weight, labels = torch.zeros(3, 8), torch.zeros(rows, 8), torch.zeros(3, dtype=torch.int64)
    method = resolve(settings, hidden, labels, shard, needs_grad=True)
    call = Call(labels, shard, settings, method, 3, True)
    order = call.backend.valid_first(labels, labels, -100, 600).order
    logits = logits_of(hidden, weight, None, labels.to(torch.int32), order, call)
    assert filter_of(call, logits, None).most_drawn == pytest.approx(MOST_DRAWN * rows / 600)
