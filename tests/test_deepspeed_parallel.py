"""DeepSpeed: the classifier sharded over data-parallel ranks (stages 0 to 2), and over tensor-parallel ranks (all)."""

from collections.abc import Iterator
from typing import Any

import pytest
from ranks import RankPool

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

from deepspeed_runs import (
    EXACT,
    Case,
    assert_trains_as_one_process,
)


@pytest.fixture(scope="module", autouse=True)
def _leave_no_deepspeed_behind(ranks: RankPool) -> Iterator[None]:
    """ZeRO-3 patches torch in its process."""
    yield
    ranks.close()


def _sharded(size: int, **settings: Any) -> Case:
    return Case(section={**EXACT, "vocab_parallel_size": size}, **settings)


@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(2, _sharded(2, stage=0, evaluates=True), id="stage 0"),
        pytest.param(4, _sharded(2, stage=1, tied=True, two_losses=True, vocab_size=101), id="stage 1, 2 x 2, tied"),
        pytest.param(2, _sharded(2, stage=2, evaluates=True), id="stage 2"),
    ],
)
def test_a_classifier_sharded_over_data_parallel_ranks_trains_as_in_one_process(
    ranks: RankPool, world: int, case: Case
) -> None:
    assert_trains_as_one_process(ranks, world, case)


@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(2, Case(tensor_parallel=2, stage=1, evaluates=True), id="AutoTP, stage 1"),
        pytest.param(4, Case(tensor_parallel=2, stage=3, vocab_size=101), id="AutoTP, stage 3, 2 x 2"),
        pytest.param(4, Case(tensor_parallel=2, stage=2, mpu=True, tied=True, two_losses=True), id="mpu, 2 x 2, tied"),
    ],
)
def test_a_classifier_sharded_over_tensor_parallel_ranks_trains_as_in_one_process(
    ranks: RankPool, world: int, case: Case
) -> None:
    assert_trains_as_one_process(ranks, world, case)
