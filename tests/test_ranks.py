"""The pool of ranks itself: what every distributed test relies on."""

import os
import threading
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool


@dataclass
class Weighted:
    value: float


def _sum_of_ranks(weight: Weighted) -> tuple[int, float, str]:
    x = torch.tensor([weight.value * dist.get_rank()])
    dist.all_reduce(x)
    return dist.get_world_size(), float(x), os.environ["RANK"]


def _fail_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise KeyError("the reason")
    dist.barrier()


def _hang_on_first() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def _subgroup_sum() -> float:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    x = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(x, group=pairs[dist.get_rank() // 2])
    return float(x)


@pytest.mark.parametrize("world", [1, 3, 4, 2])
def test_a_case_gets_a_group_of_exactly_its_ranks(ranks: RankPool, world: int) -> None:
    expected = 2.0 * sum(range(world))
    assert ranks.run(world, _sum_of_ranks, Weighted(2.0)) == [(world, expected, str(rank)) for rank in range(world)]


def test_groups_of_one_case_do_not_reach_the_next(ranks: RankPool) -> None:
    for _ in range(3):
        assert ranks.run(4, _subgroup_sum) == [1, 1, 5, 5]


def _pid_of_many_threads(count: int) -> int:
    for _ in range(count):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return os.getpid()


def test_processes_with_many_threads_are_replaced(ranks: RankPool) -> None:
    first, again, after = (ranks.run(2, _pid_of_many_threads, count) for count in (0, 150, 0))
    assert first == again
    assert not set(first) & set(after)


def _variable() -> str | None:
    return os.environ.get("CCE_DIST_TESTS_OF_THE_POOL")


def test_new_processes_have_the_environment_of_their_start(ranks: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("one", "two"):
        monkeypatch.setenv("CCE_DIST_TESTS_OF_THE_POOL", value)
        ranks.close()
        assert ranks.run(2, _variable) == [value] * 2
    ranks.close()


@pytest.mark.full
def test_an_exception_keeps_its_type_and_shows_the_rank(ranks: RankPool) -> None:
    with pytest.raises(KeyError, match="the reason") as caught:
        ranks.run(3, _fail_on_last)
    assert "rank 2 of 3" in str(caught.value.__cause__)
    assert "_fail_on_last" in str(caught.value.__cause__)
    assert ranks.run(2, _sum_of_ranks, Weighted(1.0))[0][1] == 1


@pytest.mark.full
def test_a_hang_ends_with_the_stacks_and_a_new_pool(ranks: RankPool) -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2") as caught:
        ranks.run(2, _hang_on_first, timeout=2)
    assert "_hang_on_first" in str(caught.value.__cause__)
    assert ranks.run(2, _sum_of_ranks, Weighted(1.0))[0][1] == 1
