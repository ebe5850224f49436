"""The classifier's gradient added to a buffer of the caller's, in place of one of its own."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool, device
from reference import DEVICE, TRITON_DTYPES, leaf, make_problem, relative_error
from sharded import Layout, local_rows, make_rank_problem, make_shard, part_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from watched import LargestNewTensor

from cce_dist import linear_cross_entropy

MODES: dict[str, dict[str, Any]] = {
    "exact": {"gradient": "exact"},
    "sampled": {"gradient": "unbiased", "filter_eps": 0.02, "seed": 5},
    "filtered, frequent rows": {"gradient": "filtered", "filter_eps": 0.02, "frequent_rows": 40},
    "frequent rows, scale": {
        "gradient": "unbiased",
        "filter_eps": 0.02,
        "seed": 5,
        "frequent_rows": 40,
        "logit_scale": 0.7,
    },
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def seeded(mode: dict[str, Any], device: str) -> dict[str, Any]:
    """The same draws in each call."""
    return {**mode, "seed": torch.tensor(mode["seed"], device=device)} if "seed" in mode else mode


@every_mode
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True, "label_smoothing": 0.2, "shift": 1}, {"label_smoothing": 0.2, "softcap": 3.0}],
    ids=["", "smoothing", "smoothing, softcap"],
)
def test_what_is_added_is_the_gradient_in_fp32(
    mode: dict[str, Any], dtype: torch.dtype, backend: str, options: dict[str, Any]
) -> None:
    problem = make_problem(((3, 17),), 300, 24, dtype=dtype, **options)
    settings = {"backend": backend, **seeded(mode, DEVICE), **problem.options}
    hidden, weight = leaf(problem.hidden[0]), leaf(problem.weight.float())
    bias = None if problem.bias is None else leaf(problem.bias)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    before = torch.randn(300, 24, device=DEVICE)
    onto = before.clone()

    def loss(**more: Any) -> Tensor:
        return linear_cross_entropy(hidden, weight, problem.labels[0], bias=bias, **settings, **more)

    expected = torch.autograd.grad(loss(), inputs, problem.upstream[0])
    got = torch.autograd.grad(loss(grad_accumulator=onto), inputs, problem.upstream[0], allow_unused=True)
    assert got[1] is None
    assert relative_error(onto - before, expected[1]) < 3e-6
    for x, y in zip((got[0], *got[2:]), (expected[0], *expected[2:]), strict=True):
        assert relative_error(x, y) < (3e-6 if dtype == torch.float32 else 1e-3)


def test_two_micro_steps_are_one_of_both_batches() -> None:
    problem = make_problem(((8, 17),), 300, 24)
    weight, onto = leaf(problem.weight), torch.zeros(300, 24, device=DEVICE)
    hidden, labels = leaf(problem.hidden[0]), problem.labels[0]
    linear_cross_entropy(hidden, weight, labels, reduction="sum", gradient="exact").backward()
    for part in (slice(0, 3), slice(3, 8)):
        linear_cross_entropy(
            problem.hidden[0][part], weight, labels[part], reduction="sum", gradient="exact", grad_accumulator=onto
        ).backward()
    assert relative_error(onto, weight.grad) < 1e-6


@every_mode
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_there_is_no_second_buffer(mode: dict[str, Any], backend: str) -> None:
    rows, tokens, dim = 8000, 20, 64
    problem = make_problem(((tokens,),), rows, dim)
    weight, onto = leaf(problem.weight), torch.zeros(rows, dim, device=DEVICE)
    settings = {"backend": backend, "workspace_mb": 1, **seeded(mode, DEVICE)}
    if backend == "torch":
        settings["frequent_rows"] = 0  # whose copies into place are of all rows there
    with LargestNewTensor() as largest:
        loss = linear_cross_entropy(problem.hidden[0], weight, problem.labels[0], grad_accumulator=onto, **settings)
        loss.backward()
    assert onto.any() and weight.grad is None
    assert largest.largest < onto.nbytes


def _on_a_rank(problem: Any, layout: Layout, mode: dict[str, Any]) -> tuple[Tensor, Tensor]:
    where = device()
    problem, rank = problem.to(where), dist.get_rank()
    shard, part = make_shard(problem, layout), part_of(rank, layout)
    weight = leaf(local_rows(problem.weight, shard))
    onto = torch.ones(weight.shape, device=where)

    def loss(**more: Any) -> Tensor:
        return linear_cross_entropy(
            problem.hidden[part], weight, problem.labels[part], shard=shard, **seeded(mode, where), **more
        )

    (expected,) = torch.autograd.grad(loss(), weight, problem.upstream[part])
    assert torch.autograd.grad(loss(grad_accumulator=onto), weight, problem.upstream[part], allow_unused=True) == (
        None,
    )
    return onto - 1, expected


@every_mode
@pytest.mark.parametrize(("world", "layout"), [(2, "replicated"), (3, "sharded"), (4, "grid")])
def test_each_rank_adds_the_gradient_of_its_rows(
    ranks: RankPool, world: int, layout: Layout, mode: dict[str, Any]
) -> None:
    shapes = ((13,), (5,), (2, 4), (9,))[: part_of(world - 1, layout) + 1]
    problem = make_rank_problem(shapes, 301, padding_rows=7)
    for got, expected in ranks.run(world, _on_a_rank, problem, layout, mode):
        assert not expected.shape[0] or relative_error(got, expected) < 3e-6


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(300, 24, dtype=torch.bfloat16),
        torch.zeros(299, 24),
        torch.zeros(24, 300).T,
        torch.zeros(300, 24, requires_grad=True),
    ],
    ids=["bf16", "a row less", "transposed", "with a gradient"],
)
def test_another_buffer_is_refused_by_name(wrong: Tensor) -> None:
    problem = make_problem(((3, 17),), 300, 24, device="cpu")
    with pytest.raises(ValueError, match="grad_accumulator must be a contiguous torch.float32 tensor of"):
        linear_cross_entropy(problem.hidden[0], problem.weight, problem.labels[0], grad_accumulator=wrong)


def test_a_frozen_weight_and_a_buffer_for_its_gradient_are_refused() -> None:
    problem = make_problem(((3, 17),), 300, 24)
    with pytest.raises(ValueError, match="grad_accumulator goes with a weight that requires a gradient"):
        linear_cross_entropy(
            leaf(problem.hidden[0]),
            problem.weight,
            problem.labels[0],
            grad_accumulator=torch.zeros_like(problem.weight),
        )


def test_evaluation_and_a_reentrant_checkpoint_may_name_the_buffer() -> None:
    problem = make_problem(((3, 17),), 300, 24)
    hidden, weight, labels = leaf(problem.hidden[0]), leaf(problem.weight), problem.labels[0]
    onto, wanted = torch.zeros_like(weight), torch.zeros_like(weight)

    def loss(hidden: Tensor, buffer: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight * 1.0, labels, gradient="exact", grad_accumulator=buffer)

    with torch.no_grad():
        evaluated = loss(hidden, onto)
    assert not onto.any()
    recomputed = checkpoint(loss, hidden, onto, use_reentrant=True)
    assert float(recomputed) == float(evaluated)
    recomputed.backward()
    loss(hidden, wanted).backward()
    assert relative_error(onto, wanted) < 1e-6
