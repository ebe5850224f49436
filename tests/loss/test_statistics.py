"""Statistics of the logits beside the loss: those of real logits in fp64, over several chunks, and where it is hard;
what the loss gives of them when asked."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import assert_bitwise, grad_of, leaf, make_problem
from sharded import Layout, local_rows, make_rank_problem, make_shard, part_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from cce_dist import LabelStatistics, ShardedCCEHead, VocabShard, linear_cross_entropy
from cce_dist.loss.statistics import token_statistics

EVERY: tuple[Any, ...] = ("top1", "rank", "sum_sq_probs", "mean_logit")


def _statistics(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    whole = VocabShard.whole(weight.shape[0])
    return list(token_statistics(hidden, weight, bias=bias, shard=whole, logit_scale=1.0, softcap=None))


def _reference(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    p = logits.softmax(-1)
    return [logits.argmax(-1), -torch.special.xlogy(p, p).sum(-1), p.square().sum(-1).log(), logits.mean(-1)]


@pytest.mark.parametrize(("tokens", "vocab"), [(5, 2048), (9, 5001), (4100, 2060), (0, 50), (1, 1)])
def test_chunks_make_no_difference(tokens: int, vocab: int) -> None:
    hidden, weight = torch.randn(tokens, 8), torch.randn(vocab, 8)
    for got, wanted in zip(_statistics(hidden, weight), _reference(hidden, weight), strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=2e-6, atol=2e-6)


def test_logits_all_near_minus_200_or_far_apart() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(3000, 8)
    for given in ((hidden, weight, torch.full((3000,), -200.0)), (hidden * 1e4, weight, None)):
        for got, wanted in zip(_statistics(*given), _reference(*given), strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-5, check_dtype=False)


def test_rows_ruled_out_by_a_bias_of_minus_infinity_have_no_part() -> None:
    hidden, weight, bias = torch.randn(4, 8), torch.randn(3000, 8), torch.zeros(3000)
    bias[:2500] = -torch.inf
    argmax, entropy, squares, mean = _statistics(hidden, weight, bias)
    wanted = _reference(hidden, weight[2500:])
    assert torch.equal(argmax, wanted[0] + 2500)
    torch.testing.assert_close(torch.stack([entropy, squares]).double(), torch.stack(wanted[1:3]), rtol=2e-6, atol=0)
    assert (mean == -torch.inf).all()


def test_a_nan_stays_with_its_token() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(3000, 8)
    hidden[2] = torch.nan
    argmax, *numbers = _statistics(hidden, weight)
    assert all(x.isnan().tolist() == [False, False, True, False] for x in numbers)
    assert (argmax < 3000).all()


# Of the loss


def _wanted(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> LabelStatistics:
    """Of full logits in fp64, for labels that are not shifted any more."""
    z = hidden.double() @ weight.double().T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    valid, p = labels != -100, z.softmax(-1)
    own = z.gather(-1, labels.clamp(min=0)[..., None])
    top1, rank, squares = z.argmax(-1), (z > own).sum(-1), p.square().sum(-1)
    ids = (torch.where(valid, x, -1) for x in (top1, rank))
    return LabelStatistics(next(ids), valid & (top1 == labels), next(ids), *(x * valid for x in (squares, z.mean(-1))))


def _assert_told(got: LabelStatistics, wanted: LabelStatistics) -> None:
    for name in ("top1", "is_top1", "rank"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    for name in ("sum_sq_probs", "mean_logit"):
        torch.testing.assert_close(getattr(got, name), getattr(wanted, name).float(), rtol=1e-5, atol=1e-6)


def test_the_loss_tells_ids_and_accuracy_of_its_tokens_when_asked() -> None:
    problem = make_problem(((3, 9),), 300, 24, shift=1, softcap=3.0)
    labels = problem.labels[0]

    def call(**given: Any) -> tuple[Any, Tensor, Tensor]:
        hidden, weight = leaf(problem.hidden[0]), leaf(problem.weight)
        got = linear_cross_entropy(hidden, weight, labels, shift=1, softcap=3.0, gradient="exact", **given)
        (got if isinstance(got, Tensor) else got[0]).backward()
        return got, grad_of(hidden), grad_of(weight)

    plain, told, with_lse = call(), call(statistics=EVERY), call(statistics=["top1"], return_lse=True)
    for (got, *_), one in ((told, 1), (with_lse, 2)):
        assert len(got) == one + 1 and not any(x is not None and x.requires_grad for x in got[one])
    for of in (told, with_lse):
        for x, y in zip((of[0][0].detach(), *of[1:]), (plain[0].detach(), *plain[1:]), strict=True):
            assert_bitwise(x, y)
    _assert_told(told[0][1], _wanted(problem.hidden[0][:, :-1], problem.weight, labels[:, 1:], 3.0))
    only = with_lse[0][2]
    assert torch.equal(only.top1, told[0][1].top1) and only.rank is None and only.mean_logit is None
    with pytest.raises(ValueError, match='statistics must be names out of "top1"'):
        linear_cross_entropy(problem.hidden[0], problem.weight, labels, statistics=("accuracy",))  # type: ignore[call-overload]


def _on_rank(problem: Any, layout: Layout) -> LabelStatistics:
    part, shard = part_of(dist.get_rank(), layout), make_shard(problem, layout)
    rows = local_rows(problem.weight, shard)
    told: LabelStatistics = linear_cross_entropy(
        problem.hidden[part], rows, problem.labels[part], shard=shard, statistics=EVERY
    )[1]
    return told


@pytest.mark.parametrize(("world", "layout"), [(3, "replicated"), (3, "sharded"), (4, "grid")])
def test_ranks_tell_of_their_own_tokens(ranks: RankPool, world: int, layout: Layout) -> None:
    problem = make_rank_problem(((9,), (0,), (2, 3))[: part_of(world - 1, layout) + 1], 301, 24)
    for rank, got in enumerate(ranks.run(world, _on_rank, problem, layout)):
        part = part_of(rank, layout)
        _assert_told(got, _wanted(problem.hidden[part], problem.weight, problem.labels[part], None))


def _on_a_head(problem: Any) -> tuple[Tensor, LabelStatistics]:
    linear = torch.nn.Linear(24, 301, bias=False)
    with torch.no_grad():
        linear.weight.copy_(problem.weight)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    loss, told = ShardedCCEHead.from_linear(linear, mesh)(problem.hidden[0], problem.labels[0], statistics=["top1"])
    return loss.detach(), told


def test_a_sharded_head_tells_likewise(ranks: RankPool) -> None:
    problem = make_rank_problem(((9,),), 301, 24)
    wanted = _wanted(problem.hidden[0], problem.weight, problem.labels[0], None)
    for loss, told in ranks.run(2, _on_a_head, problem):
        assert torch.isfinite(loss)
        assert torch.equal(told.top1, wanted.top1) and torch.equal(told.is_top1, wanted.is_top1)  # type: ignore[arg-type]


def _of_changing_lengths() -> bool:
    group, rank = dist.group.WORLD, dist.get_rank()
    shard, draw = VocabShard.even(61, group, group), torch.Generator().manual_seed(rank)
    weight = torch.randn(61, 8, generator=torch.Generator().manual_seed(9))
    for tokens in (8, 8 + 4 * rank, 5 - rank):
        hidden, labels = torch.randn(tokens, 8, generator=draw), torch.randint(61, (tokens,), generator=draw)
        _, told = linear_cross_entropy(
            hidden,
            weight[shard.start : shard.stop],
            labels,
            shard=shard,
            max_tokens=32,
            agreement="first_call",
            statistics=("top1", "rank"),
        )
        if not torch.equal(told.top1, (hidden @ weight.T).argmax(-1)):
            return False
    return True


def test_ranks_that_agree_once_may_bring_other_numbers_of_tokens(ranks: RankPool) -> None:
    assert all(ranks.run(2, _of_changing_lengths))
