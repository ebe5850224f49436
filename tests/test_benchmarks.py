"""The benchmark commands, as far as they can be tried without a GPU: their own arithmetic on tiny inputs."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cce_dist import linear_cross_entropy
from cce_dist.kernels import tuning
from cce_dist.kernels.problem import TILE
from cce_dist.kernels.tuning import Row, Tuning

ROOT = Path(__file__).parent.parent
MODULES = ("inputs", "loss", "methods", "shards", "timing", "tune")


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[Any]:
    """The modules of benchmarks/, which import each other by name."""
    pytest.importorskip("numpy")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def inputs(benchmarks: Any) -> Any:
    hidden_ND, weight_VD = torch.randn(48, 16), 3 * torch.randn(5 * TILE, 16)
    return benchmarks.inputs.Inputs(hidden_ND, weight_VD, torch.randint(5 * TILE, (48,)), 0.0)


@pytest.mark.parametrize("gradient", ["exact", "unbiased"])
def test_shards_run_alone_give_the_gradient_of_the_whole_loss(benchmarks: Any, inputs: Any, gradient: str) -> None:
    hidden_ND, weight_VD = (x.clone().requires_grad_() for x in inputs[:2])
    linear_cross_entropy(hidden_ND, weight_VD, inputs.labels_N, gradient=gradient, seed=7, backend="torch").backward()
    shards = benchmarks.shards
    parts = [shards.shard_of(inputs, rank, 3, gradient, backend="torch") for rank in range(3)]
    summaries = [shards.summarise(part) for part in parts]
    merged = shards.merge(summaries)
    seed = torch.tensor([7])
    gradients = [
        shards.differentiate(part, summary, merged, seed) for part, summary in zip(parts, summaries, strict=True)
    ]
    if gradient == "unbiased":  # the shards' tiles are others than those of the whole: equal in expectation only
        bound = 0.2
    else:
        bound = 1e-5
    dhidden_ND = sum(part.hidden_ND for part in gradients)
    dweight_VD = torch.cat([part.weight_VD for part in gradients])
    assert (dhidden_ND - hidden_ND.grad).norm() < bound * hidden_ND.grad.norm()
    assert (dweight_VD - weight_VD.grad).norm() < bound * weight_VD.grad.norm()


def test_kept_pairs_are_counted_from_exact_masses(benchmarks: Any, inputs: Any) -> None:
    eps = 0.05
    mass_NT = torch.softmax(inputs.hidden_ND @ inputs.weight_VD.T, 1).view(48, 5, TILE).sum(2)
    large_NT = mass_NT > eps
    large_NT[torch.arange(48), inputs.labels_N // TILE] = True
    pairs = benchmarks.shards.count_pairs(inputs, eps)
    assert pairs.large_T.tolist() == large_NT.sum(0).tolist()
    assert 0 < large_NT.sum() < large_NT.numel()
    expected_T = torch.where(large_NT, 1.0, mass_NT / eps).sum(0)
    torch.testing.assert_close(pairs.expected_T.float(), expected_T)


def test_a_launch_parameter_is_taken_where_it_is_faster_and_right(benchmarks: Any) -> None:
    """splits: 16 is wrong, 32 does not compile, 8 is the fastest; row_group makes no difference."""
    tried = torch.zeros(4, 16)

    def run() -> tuple[torch.Tensor, ...]:
        splits = tuning.tuning_for(tried).splits
        if splits == 32:
            raise RuntimeError("out of resource: shared memory")
        benchmarks.timing.time.sleep(0.002 if splits == 8 else 0.008)
        return (torch.full((3,), 2.0 if splits == 16 else 1.0),)

    stage = benchmarks.tune.Stage("forward", {"splits": (8, 16, 32)}, run, 1e-5)
    row = benchmarks.tune.descend(stage, Tuning(splits=4), None, 2, "cpu")
    assert row == Tuning(splits=8)
    assert benchmarks.tune.descend(stage, Tuning(splits=4), ["stages"], 2, "cpu") == Tuning(splits=4)


def test_a_tuned_row_replaces_the_row_of_its_class(benchmarks: Any) -> None:
    assert [benchmarks.tune.hidden_class(size) for size in (768, 1024, 2304, 4096)] == [
        (None, 1024), (None, 1024), (1024, 3072), (3072, None),
    ]  # fmt: skip
    rows = (Row("H", 2, None, 1024, Tuning()), Row("H", 2, 1024, 3072, Tuning()))
    new = Row("H", 2, None, 1024, Tuning(splits=4))
    other = Row("G", 2, None, 1024, Tuning())
    assert benchmarks.tune.replace_row(rows, new) == [new, rows[1]]
    assert benchmarks.tune.replace_row(rows, other) == [*rows, other]
    parameters = {**benchmarks.tune.FORWARD, **benchmarks.tune.BACKWARD}
    assert set(parameters) <= set(Tuning._fields)


def test_a_shape_is_a_name_or_three_numbers(benchmarks: Any) -> None:
    assert benchmarks.loss.shape_of("gemma") == (8192, 262144, 2304)
    assert benchmarks.loss.shape_of("512x1000x64") == (512, 1000, 64)
    for wrong in ("512x1000", "500x1000x64", "gema", "512x0x64"):
        with pytest.raises(ValueError, match="shape must be one of gemma, llama3"):
            benchmarks.loss.shape_of(wrong)
