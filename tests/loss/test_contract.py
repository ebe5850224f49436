"""The behavioural contract: hard numbers, empty inputs, autograd's corners, NaN, labels out of range.

Shapes of the cases: a few dozen tokens, two or three tiles of the vocabulary.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import (
    DEVICE,
    TRITON_DTYPES,
    Outcome,
    Problem,
    assert_bitwise,
    assert_no_worse,
    assert_repeats,
    cce_outcome,
    fixed_draws,
    grad_of,
    leaf,
    make_problem,
    plain_outcome,
    relative_error,
)
from sharded import Layout, assert_ranks_no_worse, make_rank_problem, sharded_outcome
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from watched import LargestTensor

from cce_dist import VocabShard, linear_cross_entropy
from cce_dist.kernels.problem import TILE

MODES: dict[str, dict[str, Any]] = {
    "exact": {"gradient": "exact"},
    "unbiased": {"gradient": "unbiased", "seed": 1},
    "frequent rows": {"gradient": "unbiased", "seed": 1, "frequent_rows": 50},
    "filtered": {"gradient": "filtered"},
    "drop": {"gradient": "filtered", "tail": False},
}
KEPT: dict[str, Any] = {"gradient": "exact", "workspace_mb": 64}
"""All logits of these cases fit: backward computes none again, but in fp16."""
BACKENDS = ["torch", "triton"]
# The interpreter on several ranks takes seconds.
WORLDS_AND_BACKENDS = [
    (1, "torch"),
    (2, "torch"),
    (4, "torch"),
    (1, "triton"),
    pytest.param(2, "triton", marks=pytest.mark.full),
    pytest.param(4, "triton", marks=pytest.mark.full),
]
# In triton the filtered modes run the code of "unbiased", without its draws.
MODES_AND_BACKENDS = [
    pytest.param(
        mode,
        backend,
        id=f"{name}-{backend}",
        marks=[pytest.mark.full] if backend == "triton" and name in ("filtered", "drop", "frequent rows") else [],
    )
    for backend in BACKENDS
    for name, mode in MODES.items()
] + [pytest.param(KEPT, "triton", id="logits kept-triton", marks=pytest.mark.full)]
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
every_mode_and_backend = pytest.mark.parametrize(("mode", "backend"), MODES_AND_BACKENDS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_world = pytest.mark.parametrize(("world", "backend"), WORLDS_AND_BACKENDS)
every_layout = pytest.mark.parametrize("layout", ["replicated", "sharded"])


def parts(world: int, layout: Layout, tokens: int = 9) -> tuple[tuple[int, ...], ...]:
    """Token shapes: one part for replicated tokens, else one a rank, uneven."""
    return ((tokens,),) if layout == "replicated" else tuple((tokens + rank,) for rank in range(world))


def near_minus_200(problem: Problem) -> Problem:
    """Every logit at −200 plus the noise of the problem."""
    hidden = tuple(torch.cat([torch.ones_like(x[..., :1]), x[..., 1:]], -1) for x in problem.hidden)
    weight = problem.weight.clone()
    weight[:, 0] = -200
    return replace(problem, hidden=hidden, weight=weight)


def gaps_of_10000(problem: Problem) -> Problem:
    """Every second token prefers one row by 10^4, and the last third of the rows lies 10^4 below the rest."""
    hidden = [x.clone() for x in problem.hidden]
    weight = problem.weight.clone()
    weight[:, :2] = 0
    weight[7, 0] = 100
    weight[weight.shape[0] * 2 // 3 :, 1] = -100
    for x in hidden:
        x[..., :2] = 100
        x[::2, 0] = 0
    return replace(problem, hidden=tuple(hidden), weight=weight)


@every_layout
@every_world
@pytest.mark.parametrize("extreme", [near_minus_200, gaps_of_10000])
def test_extreme_logits(ranks: RankPool, extreme: Any, world: int, backend: str, layout: Layout) -> None:
    problem = extreme(make_rank_problem(parts(world, layout), 520, 16, reduction="none", lse_gradient=True))
    assert_ranks_no_worse(ranks, world, problem, layout, backend=backend, gradient="exact")


@every_mode_and_backend
@pytest.mark.parametrize("extreme", [near_minus_200, gaps_of_10000])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_extreme_logits_in_every_mode(extreme: Any, mode: dict[str, Any], backend: str, dtype: torch.dtype) -> None:
    """With gaps of 10^4 a dropped pair has no mass; around −200 all masses are above eps: every mode is exact."""
    problem = extreme(make_problem(((14,),), 520, 16, dtype=dtype, spread=0.5, reduction="none", lse_gradient=True))
    assert_no_worse(cce_outcome(problem, backend=backend, **{"filter_eps": 1e-3, **mode}), problem)


@every_layout
@every_world
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_labels_ignored(ranks: RankPool, reduction: str, world: int, backend: str, layout: Layout) -> None:
    problem = make_rank_problem(parts(world, layout), 300, 8, ignored=1.1, reduction=reduction, bias=True)
    got = sharded_outcome(ranks, world, problem, layout, backend=backend)
    assert all(bool(x.isnan().all()) if reduction == "mean" else not x.any() for x in got.loss)
    assert_zero(*got.lse, *got.dhidden, *got.dweight, *got.dbias)


@every_mode
def test_all_labels_ignored_in_every_mode(mode: dict[str, Any]) -> None:
    got = cce_outcome(make_problem(ignored=1.1), **mode)
    assert got.loss[0].isnan()
    assert_zero(*got.lse, *got.dhidden, *got.dweight)


@every_world
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_rank_without_a_valid_token(ranks: RankPool, reduction: str, world: int, backend: str) -> None:
    problem = make_rank_problem(parts(world, "sharded"), 520, 16, reduction=reduction)
    if world == 1:
        problem = replace(problem, labels=(torch.where(torch.arange(9) < 4, problem.labels[0], -100),))
    else:
        problem = replace(problem, labels=(torch.full_like(problem.labels[0], -100), *problem.labels[1:]))
    got = assert_ranks_no_worse(ranks, world, problem, "sharded", backend=backend, gradient="exact")
    if world > 1:
        assert_zero(got.dhidden[0], got.lse[0])


@every_layout
@every_world
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_token_at_all(ranks: RankPool, reduction: str, world: int, backend: str, layout: Layout) -> None:
    shapes = ((0,),) if layout == "replicated" else ((0,),) * world
    problem = make_rank_problem(shapes, 300, 8, reduction=reduction, bias=True)
    got = sharded_outcome(ranks, world, problem, layout, backend=backend)
    for loss in got.loss:
        assert loss.shape == ((0,) if reduction == "none" else ())
        assert reduction == "none" or (bool(loss.isnan()) if reduction == "mean" else loss == 0)
    assert all(x.shape == (0, 8) for x in got.dhidden)
    assert_zero(*got.dweight, *got.dbias)


@every_mode_and_backend
def test_no_token_in_every_mode(mode: dict[str, Any], backend: str) -> None:
    got = cce_outcome(make_problem(((2, 0),), 300, 8), backend=backend, **mode)
    assert got.loss[0].isnan()
    assert got.dhidden[0].shape == (2, 0, 8)
    assert_zero(*got.dweight)


@every_backend
@pytest.mark.parametrize(("length", "shift"), [(3, 3), (3, 5), (1, 1)])
def test_a_shift_past_the_end_leaves_no_token(length: int, shift: int, backend: str) -> None:
    hidden, weight = leaf(torch.randn(2, length, 8).to(DEVICE)), leaf(torch.randn(40, 8).to(DEVICE))
    labels = torch.zeros(2, length, dtype=torch.int64, device=DEVICE)
    per_token = linear_cross_entropy(hidden, weight, labels, shift=shift, reduction="none", backend=backend)
    assert per_token.shape == (2, 0)
    linear_cross_entropy(hidden, weight, labels, shift=shift, reduction="sum", backend=backend).backward()
    assert_zero(hidden.grad, weight.grad)


@every_layout
@every_world
def test_an_empty_shard(ranks: RankPool, world: int, backend: str, layout: Layout) -> None:
    """Five rows on four ranks are 2, 2, 1 and 0; on two, all on the second."""
    runs = [[((0, 5),)], [(), ((0, 5),)], [], [((0, 2),), ((2, 4),), ((4, 5),), ()]][world - 1]
    problem = make_rank_problem(parts(world, layout), 5, 16, bias=True, lse_gradient=True)
    assert_ranks_no_worse(ranks, world, problem, layout, runs, backend=backend, gradient="exact")


@every_layout
@every_world
def test_uneven_shards_of_partial_tiles(ranks: RankPool, world: int, backend: str, layout: Layout) -> None:
    cuts = {1: [0, 523], 2: [0, 1, 523], 4: [0, 257, 260, 260, 523]}[world]
    runs = [((start, stop),) for start, stop in pairwise(cuts)]
    problem = make_rank_problem(parts(world, layout), 523, 16, bias=True)
    assert_ranks_no_worse(ranks, world, problem, layout, runs, backend=backend, gradient="exact")


@every_layout
@every_world
def test_padding_rows_take_no_part(ranks: RankPool, world: int, backend: str, layout: Layout) -> None:
    """Padding of NaN, so that a single product with it would show; on four ranks the last shard is all padding."""
    problem = make_rank_problem(parts(world, layout), 270, 16, bias=True, padding_rows=110, lse_gradient=True)
    assert problem.bias is not None
    clean = make_rank_problem(parts(world, layout), 270, 16, bias=True, padding_rows=110, lse_gradient=True)
    problem.weight[270:], problem.bias[270:] = torch.nan, torch.nan
    got = sharded_outcome(ranks, world, problem, layout, backend=backend, gradient="exact")
    expected = sharded_outcome(ranks, world, clean, layout, backend=backend, gradient="exact")
    assert_same(got, expected)
    assert_zero(torch.cat(got.dweight)[270:], torch.cat(got.dbias)[270:])
    assert_ranks_no_worse(ranks, world, clean, layout, backend=backend, gradient="exact")


@every_mode_and_backend
def test_padding_rows_take_no_part_in_any_mode(mode: dict[str, Any], backend: str) -> None:
    problem = make_problem(((9,),), 270, 16, padding_rows=10)
    problem.weight[270:] = torch.nan
    got = cce_outcome(problem, shard=VocabShard(((0, 280),), 270, None), backend=backend, **mode)
    expected = cce_outcome(replace(problem, weight=problem.weight[:270]), backend=backend, **mode)
    assert_bitwise(got.loss[0], expected.loss[0])
    assert_repeats(got.dhidden[0], expected.dhidden[0])
    assert_repeats(got.dweight[0][:270], expected.dweight[0])
    assert_zero(got.dweight[0][270:])


# Autograd


def peaked(**options: Any) -> Problem:
    """Some (token, tile) pairs are small, so that modes differ and draws matter."""
    return make_problem(((13,),), 3 * TILE, 16, spread=6.0, **options)


@every_mode_and_backend
def test_a_second_backward_gives_the_same_gradient(mode: dict[str, Any], backend: str) -> None:
    problem = peaked(reduction="none")
    hidden, weight = leaf(problem.hidden[0]), leaf(problem.weight)
    settings = {**mode, "seed": None, "filter_eps": 0.05} if mode["gradient"] != "exact" else mode
    loss = linear_cross_entropy(hidden, weight, problem.labels[0], reduction="none", backend=backend, **settings)  # type: ignore[call-overload]
    first = torch.autograd.grad(loss, (hidden, weight), problem.upstream[0], retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), problem.upstream[0], retain_graph=True)
    scaled = torch.autograd.grad(loss, (hidden, weight), 4 * problem.upstream[0])
    for one, two, four in zip(first, second, scaled, strict=True):
        assert_repeats(one, two)
        assert_repeats(4 * one, four)


@every_mode_and_backend
def test_two_losses_in_one_backward_add_up(mode: dict[str, Any], backend: str) -> None:
    problem, other = peaked(), peaked(seed=1, lse_gradient=True)
    other = replace(other, weight=problem.weight, labels=problem.labels)  # which choose the frequent rows
    alone = [cce_outcome(p, backend=backend, **mode) for p in (problem, other)]
    weight = leaf(problem.weight)
    hidden = [leaf(problem.hidden[0]), leaf(other.hidden[0])]
    total = torch.zeros((), device=DEVICE)
    for p, e in zip((problem, other), hidden, strict=True):
        loss, lse = linear_cross_entropy(
            e, weight, p.labels[0], return_lse=True, backend=backend, **fixed_draws(mode, e)
        )
        total = total + loss * p.upstream[0] + sum((lse * u).sum() for u in p.lse_upstream)
    total.backward()
    assert relative_error(weight.grad, alone[0].dweight[0] + alone[1].dweight[0]) < 1e-6
    for e, one in zip(hidden, alone, strict=True):
        assert_repeats(e.grad, one.dhidden[0])


@every_mode
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "hidden and bias", "weight and bias"])
def test_only_the_wanted_gradients_are_computed(wanted: str, mode: dict[str, Any]) -> None:
    # In triton: tests/kernels/test_gradients.py.
    problem = peaked(bias=True, reduction="none")
    full = cce_outcome(problem, **mode)
    assert problem.bias is not None
    inputs = {"hidden": problem.hidden[0].clone(), "weight": problem.weight.clone(), "bias": problem.bias.clone()}
    for name, x in inputs.items():
        x.requires_grad_(name in wanted)
    loss = linear_cross_entropy(
        inputs["hidden"],
        inputs["weight"],
        problem.labels[0],
        bias=inputs["bias"],
        reduction="none",
        **fixed_draws(mode, inputs["hidden"]),
    )
    loss.backward(problem.upstream[0])
    for name, expected in (("hidden", full.dhidden), ("weight", full.dweight), ("bias", full.dbias)):
        x = inputs[name]
        if name in wanted:
            assert relative_error(x.grad, expected[0]) < 1e-6
        else:
            assert x.grad is None


@every_mode_and_backend
def test_inputs_are_not_changed(mode: dict[str, Any], backend: str) -> None:
    problem = peaked(bias=True, reduction="none", lse_gradient=True)
    assert problem.bias is not None
    labels, upstream, lse_upstream = problem.labels[0], problem.upstream[0], problem.lse_upstream[0]
    tensors = [leaf(problem.hidden[0]), leaf(problem.weight), leaf(problem.bias), labels, upstream, lse_upstream]
    before = [x.detach().clone() for x in tensors]
    loss, lse = linear_cross_entropy(
        tensors[0], tensors[1], labels, bias=tensors[2], reduction="none", return_lse=True, backend=backend, **mode
    )
    loss_before, lse_before = loss.detach().clone(), lse.detach().clone()
    torch.autograd.backward([loss, lse], [upstream, lse_upstream])
    for x, old in zip([*tensors, loss, lse], [*before, loss_before, lse_before], strict=True):
        assert_bitwise(x, old)


@every_backend
def test_a_result_that_is_written_to_cannot_corrupt_the_gradient(backend: str) -> None:
    problem = peaked(reduction="none", lse_gradient=True)
    expected = cce_outcome(problem, backend=backend, gradient="exact")
    hidden, weight = leaf(problem.hidden[0]), leaf(problem.weight)
    loss, lse = linear_cross_entropy(
        hidden, weight, problem.labels[0], reduction="none", return_lse=True, backend=backend, gradient="exact"
    )
    total = (loss * problem.upstream[0]).sum() + (lse * problem.lse_upstream[0]).sum()
    loss.detach().zero_()
    lse.detach().zero_()
    total.backward()
    assert_bitwise(hidden.grad, expected.dhidden[0])


@every_backend
def test_without_grad_there_is_a_loss_and_no_graph(backend: str) -> None:
    problem = make_problem(((9,),), 300, 16)
    expected = cce_outcome(problem, backend=backend).loss[0]
    hidden, weight = leaf(problem.hidden[0]), leaf(problem.weight)
    with torch.no_grad():
        assert_bitwise(linear_cross_entropy(hidden, weight, problem.labels[0], backend=backend), expected)
    with torch.inference_mode():
        assert_bitwise(linear_cross_entropy(hidden, weight, problem.labels[0], backend=backend), expected)
    loss = linear_cross_entropy(hidden.detach(), weight.detach(), problem.labels[0], backend=backend)
    assert_bitwise(loss, expected)
    assert not loss.requires_grad


def test_a_second_derivative_is_refused() -> None:
    problem = make_problem()
    hidden = leaf(problem.hidden[0])
    loss = linear_cross_entropy(hidden, problem.weight, problem.labels[0]) * torch.ones(
        (), device=DEVICE, requires_grad=True
    )
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@every_mode_and_backend
def test_only_lse_used(mode: dict[str, Any], backend: str) -> None:
    """The loss has no upstream gradient at all."""
    problem = replace(make_problem(((9,),), 300, 16, lse_gradient=True), upstream=(torch.zeros((), device=DEVICE),))
    expected = cce_outcome(problem, backend=backend, **mode)
    hidden, weight = leaf(problem.hidden[0]), leaf(problem.weight)
    _, lse = linear_cross_entropy(hidden, weight, problem.labels[0], return_lse=True, backend=backend, **mode)
    lse.backward(problem.lse_upstream[0])
    assert relative_error(hidden.grad, expected.dhidden[0]) < 1e-6
    assert relative_error(weight.grad, expected.dweight[0]) < 1e-6


@every_mode_and_backend
def test_a_zero_upstream_gradient_gives_zero_gradients(mode: dict[str, Any], backend: str) -> None:
    problem = peaked()
    got = cce_outcome(replace(problem, upstream=(torch.zeros((), device=DEVICE),)), backend=backend, **mode)
    assert_zero(*got.dhidden, *got.dweight)


@every_backend
@pytest.mark.parametrize("scale", [1e-20, 2.0**-40, 1e20])
def test_the_size_of_the_upstream_gradient_does_not_matter(scale: float, backend: str) -> None:
    """Loss scaling, and a mean over very many tokens: 16-bit probabilities must neither overflow nor vanish."""
    problem = make_problem(((9,),), 300, 16, reduction="none")
    scaled = replace(problem, upstream=(problem.upstream[0] * scale,))
    got = cce_outcome(scaled, backend=backend, gradient="exact")
    assert_no_worse(got, scaled)


@every_backend
def test_deterministic_mode_repeats_gradients_bitwise(backend: str) -> None:
    problem = peaked(bias=True, lse_gradient=True)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (cce_outcome(problem, backend=backend, seed=1) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(first, second)


@every_mode_and_backend
def test_a_huge_upstream_gradient_overflows_no_sooner_than_the_gradient(mode: dict[str, Any], backend: str) -> None:
    """3e38 is past the largest power of two that fp32 has; the gradients are some 1e36."""
    problem = peaked(reduction="none", ignored=0.0)
    settings = {"filter_eps": 1e-3, **mode, "backend": backend}
    for field, smaller in (("dhidden", 2.0**-8), ("dweight", 2.0**8)):
        scaled = replace(problem, hidden=(problem.hidden[0] / smaller,), weight=problem.weight * smaller)
        one, huge = (
            cce_outcome(replace(scaled, upstream=(torch.full_like(problem.upstream[0], size),)), **settings)
            for size in (1e-3, 3e38)
        )
        expected = getattr(one, field)[0].double() * 3e41
        assert 1e35 < expected.abs().amax() < 1e38
        assert relative_error(getattr(huge, field)[0], expected) < 1e-5


# Draws


@every_backend
def test_seeds_decide_the_draws(backend: str) -> None:
    problem = peaked()
    settings = {"backend": backend, "gradient": "unbiased", "filter_eps": 0.2}
    found = {}
    for number in (11, 12, -11):
        torch.manual_seed(number)
        found[number] = cce_outcome(problem, **settings).dweight[0]
        torch.rand(3, device=DEVICE)  # what others draw is nothing to it
        assert_repeats(cce_outcome(problem, **settings).dweight[0], found[number])
    assert not torch.equal(found[11], found[12])
    assert not torch.equal(found[11], found[-11])
    seeded = [cce_outcome(problem, seed=5, **settings).dweight[0] for _ in range(2)]
    assert_repeats(seeded[0], seeded[1])


def assert_averages_tend_to_exact(backend: str, hiddens: Iterable[Tensor], problem: Problem, **seed: int) -> None:
    """Those of the gradients at ``hiddens``, which are the problem's but for a rounding."""
    truth, grads = plain_outcome(problem, torch.float64).dweight[0], []
    for hidden in hiddens:
        weight = leaf(problem.weight)
        loss = linear_cross_entropy(
            hidden, weight, problem.labels[0], backend=backend, filter_eps=0.2, **seed, **problem.options
        )
        (loss * problem.upstream[0]).sum().backward()
        grads.append(grad_of(weight).double())
    assert len(grads) == 24
    alone = max(relative_error(grad, truth) for grad in grads)
    assert relative_error(torch.stack(grads).mean(0), truth) < 2.5 * alone / 24**0.5


in_triton_full = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.full)])


@in_triton_full
def test_without_a_seed_averages_over_training_tend_to_the_exact_gradient(backend: str) -> None:
    """Losses that a step has changed by a rounding are draws of their own."""
    problem = peaked()
    assert_averages_tend_to_exact(backend, [problem.hidden[0] * (1 + step * 2**-22) for step in range(24)], problem)


@in_triton_full
def test_an_int_as_seed_gives_other_draws_at_each_call(backend: str) -> None:
    """Averaged over calls the gradient tends to the exact one, which it would not if the draws were the same."""
    problem = peaked()
    assert_averages_tend_to_exact(backend, 24 * [problem.hidden[0]], problem, seed=2_000_003)


@every_backend
def test_a_tensor_as_seed_counts_with_its_value_at_the_call(backend: str) -> None:
    problem, seed = peaked(), torch.tensor(5, device=DEVICE)
    settings: dict[str, Any] = {"backend": backend, "filter_eps": 0.2, **problem.options}

    def gradient(advance: int) -> Tensor:
        weight = leaf(problem.weight)
        loss = linear_cross_entropy(problem.hidden[0], weight, problem.labels[0], seed=seed, **settings)
        seed.add_(advance)
        (loss * problem.upstream[0]).sum().backward()
        return grad_of(weight)

    five, six, back = gradient(1), gradient(-1), gradient(0)
    assert_repeats(five, back)
    assert not torch.equal(five, six)
    for wrong in (torch.tensor([5]), torch.tensor(5.0), torch.tensor(5, device="meta")):
        with pytest.raises(ValueError, match="a tensor as seed must be int64, 0-d"):
            linear_cross_entropy(problem.hidden[0], problem.weight, problem.labels[0], seed=wrong)


def test_recomputation_by_checkpointing_draws_the_same() -> None:
    problem = peaked()

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, problem.labels[0], filter_eps=0.2)

    grads = []
    for recompute in (False, True):
        torch.manual_seed(3)
        hidden, weight = leaf(problem.hidden[0]), leaf(problem.weight)
        loss = checkpoint(loss_of, hidden, weight, use_reentrant=False) if recompute else loss_of(hidden, weight)
        torch.rand(3, device=DEVICE)  # the generator moves on before backward
        loss.backward()
        grads.append((hidden.grad, weight.grad))
    assert_repeats(grads[0][0], grads[1][0])
    assert_repeats(grads[0][1], grads[1][1])


# NaN, inf and labels out of range


@every_mode_and_backend
@pytest.mark.parametrize(
    ("value", "softcap"), [(torch.nan, None), (torch.nan, 5.0), (torch.inf, None), (-torch.inf, None)]
)
def test_a_nan_in_a_valid_token_reaches_loss_and_gradients(
    value: float, softcap: float | None, mode: dict[str, Any], backend: str
) -> None:
    problem = peaked(reduction="none", ignored=0.0, softcap=softcap)
    problem.hidden[0][4, 3] = value
    settings = mode if mode["gradient"] == "exact" else {**mode, "filter_eps": 0.05}
    got = cce_outcome(problem, backend=backend, **settings)
    others = torch.arange(13, device=DEVICE) != 4
    assert not got.loss[0][4].isfinite()
    assert not got.lse[0][4].isfinite()
    assert not got.dhidden[0][4].isfinite().all()
    assert not got.dweight[0].isfinite().all()
    for x in (got.loss[0], got.lse[0], got.dhidden[0]):
        assert x[others].isfinite().all(), "other tokens must not be hurt"


@every_world
@every_layout
def test_a_nan_on_one_rank_reaches_all(ranks: RankPool, world: int, backend: str, layout: Layout) -> None:
    for reduction in ("mean", "none"):
        problem = make_rank_problem(parts(world, layout), 520, 16, reduction=reduction, ignored=0.0)
        problem.hidden[0][2, 3] = torch.nan
        got = sharded_outcome(ranks, world, problem, layout, backend=backend)
        if reduction == "mean":
            assert all(x.isnan() for x in got.loss)
        else:
            assert got.loss[0][2].isnan()
            assert all(x.isfinite().all() for x in got.loss[1:] if layout == "sharded")
        assert got.dhidden[0][2].isnan().any()
        assert all(x.isnan().any() for x in got.dweight)


@every_mode_and_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_an_ignored_token_never_matters(value: float, mode: dict[str, Any], backend: str) -> None:
    problem = peaked(reduction="none")
    problem.labels[0][4] = -100
    expected = cce_outcome(problem, backend=backend, **mode)
    problem.hidden[0][4] = value
    got = cce_outcome(problem, backend=backend, **mode)
    for one, other in zip((*got.loss, *got.lse), (*expected.loss, *expected.lse), strict=True):
        assert_bitwise(one, other)
    for one, other in zip((*got.dhidden, *got.dweight), (*expected.dhidden, *expected.dweight), strict=True):
        assert_repeats(one, other)
    assert_zero(got.dhidden[0][4], got.lse[0][4], got.loss[0][4])


@every_backend
def test_a_nan_in_the_classifier_reaches_loss_and_gradients(backend: str) -> None:
    problem = peaked(reduction="none", ignored=0.0)
    problem.weight[300, 2] = torch.nan
    got = cce_outcome(problem, backend=backend)
    assert got.loss[0].isnan().all()
    assert got.dhidden[0].isnan().any(dim=1).all()


@every_backend
@pytest.mark.parametrize("label", [300, -1, -101, 2**40])
def test_a_label_out_of_range_is_named(label: int, backend: str) -> None:
    if backend == "triton" and DEVICE == "cuda":
        pytest.skip("on a GPU it is an assertion of the device: tests/kernels/test_gpu.py")
    problem = make_problem(((9,),), 300, 16, device="cpu")
    problem.labels[0][3] = label
    with pytest.raises(ValueError, match=rf"labels must be in \[0, 300\).*{label}"):
        cce_outcome(problem, backend=backend)


def test_a_label_of_a_padding_row_is_out_of_range() -> None:
    problem = make_problem(((9,),), 270, 16, padding_rows=10, device="cpu")
    problem.labels[0][3] = 275
    with pytest.raises(ValueError, match=r"labels must be in \[0, 270\).*275"):
        cce_outcome(problem, shard=VocabShard(((0, 280),), 270, None))


# Arguments that do not fit

GOOD: dict[str, Any] = {
    "hidden": torch.zeros(2, 5, 8),
    "weight": torch.zeros(40, 8),
    "labels": torch.zeros(2, 5).long(),
}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden": torch.zeros(2, 5, 8).long()}, "hidden must be"),
        ({"hidden": torch.zeros(2, 5, 7)}, r"same D.*\[2, 5, 7\].*\[40, 8\]"),
        ({"weight": torch.zeros(40)}, "weight"),
        ({"weight": torch.zeros(40, 8).long()}, "weight must be"),
        ({"labels": torch.zeros(10).long()}, r"labels.*\[2, 5\].*\[10\]"),
        ({"labels": torch.zeros(2, 5)}, "labels must be integers"),
        ({"labels": torch.zeros(2, 5).bool()}, "labels must be integers"),
        ({"bias": torch.zeros(39)}, r"bias must be.*40.*39"),
        ({"bias": torch.zeros(40, 1)}, "bias must be"),
        ({"bias": torch.zeros(40).long()}, "bias must be"),
        ({"shift": -1}, "shift must be.*-1"),
        ({"softcap": 0.0}, "softcap must be"),
        ({"softcap": -2.0}, "softcap must be"),
        ({"softcap": float("nan")}, "softcap must be"),
        ({"softcap": float("inf")}, "softcap must be"),
        ({"softcap": "30"}, "softcap must be"),
        ({"logit_scale": float("inf")}, "logit_scale must be"),
        ({"logit_scale": "2"}, "logit_scale must be"),
        # A learned scale would silently get no gradient.
        ({"logit_scale": torch.tensor(2.0)}, "logit_scale must be"),
        ({"reduction": "average"}, "reduction must be.*mean.*average"),
        ({"gradient": "approximate"}, "gradient must be.*unbiased.*approximate"),
        ({"backend": "cuda"}, "backend must be.*triton.*cuda"),
        ({"filter_eps": 1.5}, "filter_eps must be.*1.5"),
        ({"filter_eps": -0.1}, "filter_eps must be"),
        ({"filter_eps": "none"}, "filter_eps must be"),
        ({"filter_eps": float("nan")}, "filter_eps must be"),
        ({"num_valid_tokens": 3, "reduction": "sum"}, "num_valid_tokens.*mean"),
        ({"num_valid_tokens": torch.ones(2)}, "num_valid_tokens must be"),
        ({"num_valid_tokens": -1}, "num_valid_tokens must be an int, 0 or more.*-1"),
        ({"weight": torch.tensor(3.0)}, r"weight \[V, D\].*weight \[\]"),
        ({"agreement": "never"}, "agreement must be.*every_call.*never"),
        ({"smoothing": 0.1}, "takes no argument smoothing"),
        ({"shard": 40}, "shard must be a VocabShard or None, got int"),
        ({"workspace_mb": 0}, "workspace_mb must be"),
        ({"workspace_mb": 1.5}, "workspace_mb must be"),
        ({"max_tokens": 10.5}, "max_tokens must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"seed": 1.5}, "seed must be"),
        ({"shift": 1.0}, "shift must be"),
        ({"ignore_index": None}, "ignore_index must be"),
        ({"max_tokens": 9}, "max_tokens must be.*10.*9"),
        ({"shard": VocabShard.whole(41)}, r"weight.*41.*40"),
        ({"hidden": torch.zeros(2, 5, 8).double(), "backend": "triton"}, "backend|fp64|float64"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        linear_cross_entropy(**{**GOOD, **change})


def test_a_workspace_below_one_tile_of_all_tokens_is_refused_with_the_number() -> None:
    """A tile of 128 probabilities a token: in fp32 8192 tokens need 4 MB."""
    hidden, labels = torch.zeros(8192, 8), torch.zeros(8192).long()
    with pytest.raises(ValueError, match=r"workspace_mb must be.*at least 4\b.*got 3"):
        linear_cross_entropy(hidden, GOOD["weight"], labels, workspace_mb=3)
    linear_cross_entropy(hidden, GOOD["weight"], labels, workspace_mb=4)
    linear_cross_entropy(hidden.bfloat16(), GOOD["weight"], labels, workspace_mb=2)


# Autocast, memory


@every_mode_and_backend
def test_autocast_computes_in_its_dtype_and_returns_the_inputs_dtypes(mode: dict[str, Any], backend: str) -> None:
    # The interpreter's bf16 products are wrong.
    dtype = torch.float16 if backend == "triton" and DEVICE == "cpu" else torch.bfloat16
    problem = make_problem(((9,),), 300, 16, bias=True, reduction="none")
    hidden, weight, bias = leaf(problem.hidden[0]), leaf(problem.weight), leaf(problem.bias)  # type: ignore[arg-type]
    with torch.autocast(DEVICE, dtype=dtype):
        loss = linear_cross_entropy(
            hidden, weight, problem.labels[0], bias=bias, reduction="none", backend=backend, **fixed_draws(mode, hidden)
        )
    loss.backward(problem.upstream[0])
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32,) * 3  # type: ignore[union-attr]
    cast = replace(problem, hidden=(problem.hidden[0].to(dtype),))
    expected = cce_outcome(cast, backend=backend, **mode)
    assert_bitwise(loss, expected.loss[0])
    assert relative_error(weight.grad, expected.dweight[0]) < 1e-6
    # dE is rounded to the autocast dtype at most once.
    assert relative_error(hidden.grad, expected.dhidden[0].float()) < torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("mode", "backend"),
    [
        *((mode, "torch") for mode in MODES.values()),
        # All that the filtered modes allocate in triton "unbiased" does, too.
        *(pytest.param(MODES[name], "triton", marks=pytest.mark.full) for name in ("exact", "unbiased")),
    ],
    ids=str,
)
def test_the_logits_never_exist(mode: dict[str, Any], backend: str) -> None:
    tokens, vocab = (1024, 4096) if backend == "torch" else (512, 9 * TILE)  # more than the workspace, in 16 bits too
    problem = make_problem(((tokens,),), vocab, 8)
    with LargestTensor() as seen:
        cce_outcome(problem, backend=backend, workspace_mb=1, **mode)
    assert seen.largest <= 1 << 20 < tokens * vocab * 2


# Several ranks


def _two_backwards(problem: Problem, layout: Layout) -> list[bool]:
    shard = VocabShard.even(problem.vocab_size, dist.group.WORLD, dist.group.WORLD if layout == "sharded" else None)
    part = dist.get_rank() if layout == "sharded" else 0
    torch.manual_seed(dist.get_rank())  # every rank draws a seed of its own
    hidden, weight = leaf(problem.hidden[part]), leaf(problem.weight[shard.start : shard.stop])
    loss = linear_cross_entropy(hidden, weight, problem.labels[part], shard=shard, filter_eps=0.05)
    first = torch.autograd.grad(loss, (hidden, weight), problem.upstream[part], retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), problem.upstream[part])
    return [torch.equal(one, two) for one, two in zip(first, second, strict=True)]


@every_layout
def test_a_second_backward_gives_the_same_gradient_on_ranks(ranks: RankPool, layout: Layout) -> None:
    problem = make_rank_problem(parts(2, layout), 4 * TILE, 16, spread=6.0)
    assert ranks.run(2, _two_backwards, problem, layout) == [[True, True]] * 2


def _two_losses(problems: list[Problem], layout: Layout) -> Tensor:
    first = problems[0]
    shard = VocabShard.even(first.vocab_size, dist.group.WORLD, dist.group.WORLD if layout == "sharded" else None)
    part = dist.get_rank() if layout == "sharded" else 0
    weight = leaf(first.weight[shard.start : shard.stop])
    losses = [
        linear_cross_entropy(leaf(p.hidden[part]), weight, p.labels[part], shard=shard, gradient="exact")
        * p.upstream[part]
        for p in problems
    ]
    (losses[0] + losses[1]).backward()
    assert weight.grad is not None
    return weight.grad


@every_layout
def test_two_losses_in_one_backward_add_up_on_ranks(ranks: RankPool, layout: Layout) -> None:
    one = make_rank_problem(parts(2, layout), 520, 16)
    two = replace(make_rank_problem(parts(2, layout, 5), 520, 16, seed=1), weight=one.weight)
    alone = [sharded_outcome(ranks, 2, p, layout, gradient="exact") for p in (one, two)]
    both = ranks.run(2, _two_losses, [one, two], layout)
    for rank in range(2):
        assert relative_error(both[rank], alone[0].dweight[rank] + alone[1].dweight[rank]) < 1e-6


def _frozen(problem: Problem, layout: Layout, frozen: str) -> tuple[Tensor | None, Tensor | None]:
    shard = VocabShard.even(problem.vocab_size, dist.group.WORLD, dist.group.WORLD if layout == "sharded" else None)
    part = dist.get_rank() if layout == "sharded" else 0
    hidden, weight = leaf(problem.hidden[part]), leaf(problem.weight[shard.start : shard.stop])
    (weight if frozen == "weight" else hidden).requires_grad_(False)
    loss = linear_cross_entropy(hidden, weight, problem.labels[part], shard=shard, gradient="exact")
    (loss * problem.upstream[part]).backward()
    return hidden.grad, weight.grad


@every_layout
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_gradient_may_be_unwanted_on_ranks(ranks: RankPool, layout: Layout, frozen: str) -> None:
    problem = make_rank_problem(parts(2, layout), 520, 16)
    expected = sharded_outcome(ranks, 2, problem, layout, gradient="exact")
    for rank, (dhidden, dweight) in enumerate(ranks.run(2, _frozen, problem, layout, frozen)):
        if frozen == "weight":
            assert dweight is None
            assert_bitwise(dhidden, expected.dhidden[rank])
        else:
            assert dhidden is None
            assert_bitwise(dweight, expected.dweight[rank])


def assert_zero(*tensors: Tensor | None) -> None:
    for x in tensors:
        assert x is not None
        assert not x.any(), f"expected zeros, got {x}"


def assert_same(got: Outcome, expected: Outcome) -> None:
    for name in Outcome._fields:
        for x, y in zip(getattr(got, name), getattr(expected, name), strict=True):
            assert_bitwise(x, y)
