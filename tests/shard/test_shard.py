"""Which rows a rank holds, how labels map to them, and what a VocabShard refuses at construction."""

import dataclasses
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankPool
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from cce_dist import VocabShard
from cce_dist.shard import new_subgroup
from cce_dist.shard.groups import timeout_of


def test_whole_is_all_rows_in_one_process() -> None:
    shard = VocabShard.whole(12)
    assert (shard.start, shard.stop, shard.num_rows, shard.vocab_size) == (0, 12, 12, 12)
    assert shard.vocab_group is None
    assert shard.token_group is None


def test_a_shard_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VocabShard.whole(12).vocab_size = 13  # type: ignore[misc]


def test_several_runs_have_no_single_start() -> None:
    shard = VocabShard(((2, 5), (8, 9)), 10, None)
    assert shard.num_rows == 4
    with pytest.raises(ValueError, match="runs"):
        _ = shard.start
    with pytest.raises(ValueError, match="runs"):
        _ = shard.stop


def test_an_empty_shard_has_no_rows() -> None:
    for shard in (VocabShard((), 10, None), VocabShard(((4, 4),), 10, None)):
        assert shard.num_rows == 0
        assert shard.start == shard.stop


@pytest.mark.parametrize(
    "runs",
    [((5, 8), (2, 4)), ((2, 5), (4, 8)), ((5, 2),), ((-1, 4),)],
    ids=["descending", "overlap", "reversed", "negative"],
)
def test_runs_that_are_not_ascending_are_refused(runs: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="runs must be ascending"):
        VocabShard(runs, 10, None)


@pytest.mark.parametrize("vocab_size", [0, -3])
def test_a_vocabulary_needs_a_row(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size must be at least 1, got {vocab_size}"):
        VocabShard(((0, 1),), vocab_size, None)


def test_what_is_no_group_is_refused() -> None:
    with pytest.raises(TypeError, match=r"vocab_group must be a process group.*str"):
        VocabShard(((0, 4),), 4, "tp")  # type: ignore[arg-type]


def test_a_zero_divisor_is_refused() -> None:
    with pytest.raises(ValueError, match="grad_divisor"):
        VocabShard(((0, 4),), 4, None, grad_divisor=0.0)


@settings(derandomize=True, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=5), st.integers(0, 8))
def test_labels_map_to_local_columns(gaps_and_lengths: list[tuple[int, int]], padding: int) -> None:
    runs, end = [], 0
    for gap, length in gaps_and_lengths:
        runs.append((end + gap, end + gap + length))
        end += gap + length
    vocab_size = max(end - padding, 1)
    shard = VocabShard(tuple(runs), vocab_size, None)
    held = [row for start, stop in runs for row in range(start, stop)]
    labels = torch.arange(-3, end + 4)
    expected = [held.index(row) if row in held and 0 <= row < vocab_size else -1 for row in labels.tolist()]
    columns = shard.local_columns(labels)
    assert columns.dtype == torch.int32
    assert columns.tolist() == expected
    assert shard.num_rows == len(held)


def _even(vocab_size: int, padded: int | None) -> tuple[tuple[tuple[int, int], ...], int, int]:
    shard = VocabShard.even(vocab_size, dist.group.WORLD, padded_vocab_size=padded)
    return shard.runs, shard.start, shard.num_rows


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("vocab_size", "padded"), [(601, None), (5, None), (3, None), (1, None), (601, 640), (5, 16)])
def test_even_splits_as_torch_chunk(ranks: RankPool, world: int, vocab_size: int, padded: int | None) -> None:
    chunks = torch.arange(padded or vocab_size).chunk(world)
    by_rank = ranks.run(world, _even, vocab_size, padded)
    for rank, (runs, start, num_rows) in enumerate(by_rank):
        if rank < len(chunks):
            assert runs == ((int(chunks[rank][0]), int(chunks[rank][-1]) + 1),)
            assert start == int(chunks[rank][0])
        else:
            assert num_rows == 0


def _padding_below_the_vocabulary() -> str:
    try:
        VocabShard.even(10, dist.group.WORLD, padded_vocab_size=9)
    except ValueError as error:
        return str(error)
    return "no error"


def test_padding_cannot_shrink_the_vocabulary(ranks: RankPool) -> None:
    for said in ranks.run(2, _padding_below_the_vocabulary):
        assert "padded_vocab_size must be at least vocab_size = 10, got 9" in said


def _no_group() -> list[str]:
    said = []
    for group in (None, dist.group.WORLD):
        try:
            VocabShard.even(10, group)
            said.append("no error")
        except ValueError as error:
            said.append(str(error))
    return said


def test_an_even_split_needs_its_group_and_no_group_is_never_all_ranks(ranks: RankPool) -> None:
    outside = "vocab_group must be the group of the ranks to split over, got None, which means a single process"
    for refused, made in ranks.run(2, _no_group):
        assert outside in refused and made == "no error"
    assert all(outside in said for said in _no_group())  # before init_process_group WORLD is None too


def _dtensor_rows(vocab_size: int) -> tuple[tuple[int, int], int, int, bool]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(torch.arange(vocab_size * 2.0).view(vocab_size, 2), mesh, [Shard(0)])
    shard = VocabShard.from_dtensor(weight)
    local = weight.to_local()
    first = int(local[0, 0]) // 2 if local.shape[0] else shard.start
    return (shard.start, shard.stop), first, local.shape[0], shard.vocab_size == vocab_size


@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.parametrize("vocab_size", [601, 5, 2])
def test_from_dtensor_finds_the_local_rows(ranks: RankPool, world: int, vocab_size: int) -> None:
    for (start, stop), first, count, same_size in ranks.run(world, _dtensor_rows, vocab_size):
        assert stop - start == count
        assert start == first
        assert same_size


def _groups_of_a_mesh() -> list[bool]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    shard = VocabShard.even(40, mesh["tp"], count_group=mesh["dp"])
    direct = VocabShard(((0, 40),), 40, mesh["tp"])  # type: ignore[arg-type]
    return [
        shard.vocab_group is mesh.get_group("tp"),
        shard.count_group is mesh.get_group("dp"),
        direct.vocab_group is mesh.get_group("tp"),
        shard.token_group is None,
    ]


def test_a_one_dimensional_mesh_stands_for_its_group(ranks: RankPool) -> None:
    assert ranks.run(4, _groups_of_a_mesh) == [[True] * 4] * 4


def _token_group_alone() -> str:
    try:
        VocabShard(((0, 4),), 4, None, dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_token_group_needs_a_vocabulary_group(ranks: RankPool) -> None:
    for said in ranks.run(2, _token_group_alone):
        assert "token_group" in said
        assert "vocab_group" in said


def _group_of_ranks_with_unequal_numbers_of_groups() -> str:
    dist.new_group([0])
    assert dist.group.WORLD is not None
    try:
        new_subgroup([0, 1], dist.group.WORLD, "gloo")
    except RuntimeError as error:
        return str(error)
    return "made"


def test_a_group_that_torch_cannot_make_is_an_error_on_every_rank(ranks: RankPool) -> None:
    for said in ranks.run(2, _group_of_ranks_with_unequal_numbers_of_groups, timeout=30):
        assert "can make a new group of them only where these numbers are equal" in said


def _timeouts() -> list[timedelta | None]:
    given = dist.new_group([0, 1], timeout=timedelta(seconds=77))
    assert dist.group.WORLD is not None
    grid = VocabShard.even(40, given, dist.new_group([dist.get_rank()], use_local_synchronization=True))
    made = [new_subgroup([0, 1], given), new_subgroup([0, 1], given, "gloo"), grid.replica_group]
    shortened = new_subgroup([0, 1], given, timeout=timedelta(seconds=5))
    return [timeout_of(group) for group in (*made, shortened) if group is not None]


def test_groups_take_the_timeout_of_the_group_that_they_come_from(ranks: RankPool) -> None:
    inherited = timedelta(seconds=77)
    for said in ranks.run(2, _timeouts):
        assert said == [inherited, inherited, inherited, timedelta(seconds=5)]
