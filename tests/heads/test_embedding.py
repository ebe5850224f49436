"""VocabParallelEmbedding against nn.Embedding."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor, nn

from cce_dist.heads.embedding import make_vocab_parallel
from cce_dist.heads.owner import ModuleOwner
from cce_dist.shard import VocabShard

HIDDEN = 8


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


def _embedding(vocab: int) -> nn.Embedding:
    torch.manual_seed(5)
    return ScaledEmbedding(vocab, HIDDEN, padding_idx=1)


def _ids(rank: int, vocab: int) -> Tensor:
    """Another number of ids on every rank, none on the last of four; the padding token among them."""
    ids = torch.randint(vocab, (2, 3 - rank), generator=torch.Generator().manual_seed(rank))
    ids[:, :1] = 1
    return ids


def _upstream(rows: Tensor, rank: int) -> Tensor:
    return torch.randn(rows.shape, generator=torch.Generator().manual_seed(50 + rank))


def _shard(vocab: int, tokens: bool = True) -> VocabShard:
    return VocabShard.even(vocab, dist.group.WORLD, dist.group.WORLD if tokens else None)  # type: ignore[arg-type]


def _local(vocab: int, tokens: bool = True) -> tuple[nn.Embedding, ModuleOwner]:
    """An embedding whose parameter is this rank's rows."""
    embedding, shard = _embedding(vocab), _shard(vocab, tokens)
    embedding.weight = nn.Parameter(embedding.weight.detach()[shard.start : shard.stop].clone())
    return embedding, ModuleOwner(embedding, shard)


def _look_up(vocab: int, tokens: bool = True) -> tuple[Tensor, Tensor]:
    embedding, owner = _local(vocab, tokens)
    make_vocab_parallel(embedding, owner, lambda: None)
    part = dist.get_rank() if tokens else 0
    rows = embedding(_ids(part, vocab))
    rows.backward(_upstream(rows, part))
    assert embedding.weight.grad is not None
    return rows.detach(), embedding.weight.grad


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("vocab", [5, 23])
def test_rows_and_gradient_equal_those_of_a_plain_embedding(ranks: RankPool, world: int, vocab: int) -> None:
    plain = _embedding(vocab)
    results = ranks.run(world, _look_up, vocab)
    for rank, (rows, _) in enumerate(results):
        expected = plain(_ids(rank, vocab))
        expected.backward(_upstream(expected, rank))
        assert torch.equal(rows, expected)
    gradient = torch.cat([gradient for _, gradient in results])
    assert plain.weight.grad is not None
    assert float((gradient - plain.weight.grad).norm() / plain.weight.grad.norm()) < 1e-6
    assert not gradient[1].any(), "the padding token's row must have no gradient"


def test_the_same_ids_on_all_ranks_are_looked_up_once(ranks: RankPool) -> None:
    plain = _embedding(23)
    expected = plain(_ids(0, 23))
    expected.backward(_upstream(expected, 0))
    results = ranks.run(4, _look_up, 23, False)
    assert all(torch.equal(rows, expected) for rows, _ in results)
    assert plain.weight.grad is not None
    gradient = torch.cat([gradient for _, gradient in results])
    assert float((gradient - plain.weight.grad).norm() / plain.weight.grad.norm()) < 1e-6


def _compute_dtype() -> torch.dtype:
    embedding, owner = _local(9)
    make_vocab_parallel(embedding, owner, lambda: torch.bfloat16)
    return embedding(torch.tensor([3])).dtype


def test_the_rows_come_in_the_compute_dtype(ranks: RankPool) -> None:
    assert ranks.run(2, _compute_dtype) == [torch.bfloat16] * 2


def _errors() -> list[str]:
    texts = []
    embedding, owner = _local(9)
    make_vocab_parallel(embedding, owner, lambda: None)
    bad_id = -1 if dist.get_rank() == 1 else 0
    sparse, sparse_owner = _local(9)
    sparse.sparse = True
    alone = _embedding(9)
    attempts: list[Any] = [
        lambda: embedding(torch.tensor([bad_id])),
        lambda: make_vocab_parallel(sparse, sparse_owner, lambda: None),
        lambda: make_vocab_parallel(alone, ModuleOwner(alone), lambda: None),
        lambda: make_vocab_parallel(nn.Linear(1, 1), owner, lambda: None),  # type: ignore[arg-type]
    ]
    for attempt in attempts:
        with pytest.raises((IndexError, ValueError, TypeError)) as caught:
            attempt()
        texts.append(str(caught.value))
    return texts


def test_what_a_shard_cannot_do_is_an_error_on_every_rank(ranks: RankPool) -> None:
    for texts in ranks.run(2, _errors):
        for text, part in zip(texts, ["[-1]", "sparse", "vocab_group", "Linear"], strict=True):
            assert part in text


def _replicated_ids(on_one_rank: int) -> str:
    embedding, owner = _local(9, tokens=False)
    make_vocab_parallel(embedding, owner, lambda: None)
    ids = torch.tensor([1, 2, on_one_rank if dist.get_rank() == 1 else 3])
    with pytest.raises(ValueError, match="cannot compute|ids differ") as caught:
        embedding(ids)
    return str(caught.value)


@pytest.mark.parametrize(("on_one_rank", "said"), [(4, "ids differ between ranks"), (9, "rank 1: ")])
def test_replicated_ids_that_one_rank_has_wrong_raise_on_every_rank(
    ranks: RankPool, on_one_rank: int, said: str
) -> None:
    for text in ranks.run(2, _replicated_ids, on_one_rank, timeout=20):
        assert said in text
