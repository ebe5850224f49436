"""How rows are cut, and that gathered rows hand each rank the gradient of its own."""

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor

from cce_dist.shard.rows import even_parts, gather_rows, scatter_rows, size_of


@pytest.mark.parametrize("run", [(0, 12), (3, 10), (4, 9), (7, 8), (5, 5)], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_parts_are_those_of_torch_chunk_and_empty_ones_after_them(run: tuple[int, int], parts: int) -> None:
    chunks = [chunk.tolist() for chunk in torch.arange(*run).chunk(parts)]
    found = [list(range(*part)) for part in even_parts(run, parts)]
    assert found == [*chunks, *([[]] * parts)][:parts]
    assert sum(map(size_of, even_parts(run, parts))) == size_of(run)


def _whole(sizes: list[int]) -> Tensor:
    return torch.arange(3.0 * sum(sizes)).view(-1, 3)


def _weights(sizes: list[int], rank: int) -> Tensor:
    """What a rank multiplies all rows by: of rank 0 where all compute the same."""
    return torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(rank))


def _gathered(sizes: list[int], same_tokens: bool) -> tuple[Tensor, Tensor, Tensor]:
    rank = dist.get_rank()
    rows = _whole(sizes).split(sizes)[rank].clone().requires_grad_()
    assert dist.group.WORLD is not None
    whole = gather_rows(rows, sizes, dist.group.WORLD, same_tokens=same_tokens)
    (whole * _weights(sizes, 0 if same_tokens else rank)).sum().backward()
    assert rows.grad is not None
    return whole.detach(), rows.grad, scatter_rows(whole.detach(), sizes, dist.group.WORLD)


@pytest.mark.parametrize("same_tokens", [False, True])
@pytest.mark.parametrize("sizes", [[2, 2, 2], [3, 1, 2], [4, 3, 0], [0, 0, 5]], ids=str)
def test_gathered_rows_are_all_and_their_gradient_is_that_of_one_process(
    ranks: RankPool, sizes: list[int], same_tokens: bool
) -> None:
    expected = sum((_weights(sizes, rank) for rank in range(1 if same_tokens else 3)), torch.zeros(sum(sizes), 3))
    for rank, (whole, grad, summed) in enumerate(ranks.run(3, _gathered, sizes, same_tokens)):
        assert torch.equal(whole, _whole(sizes))
        torch.testing.assert_close(grad, expected.split(sizes)[rank])
        assert torch.equal(summed, 3 * _whole(sizes).split(sizes)[rank])
