"""Divergences from a teacher's stored ids: those of plain torch, in every kind, with and without the tail bucket."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import grad_of, leaf, relative_error
from sharded import Layout, Runs, local_rows, part_of, shard_of
from teachers import all_logits, plain_terms, rows_of, runs_of
from torch import Tensor

from cce_dist import VocabShard, linear_topk, linear_topk_kl

FORM = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.7}
VOCAB = 301
KINDS: dict[str, dict[str, Any]] = {
    "forward": {"kind": "forward"},
    "reverse": {"kind": "reverse"},
    "jsd": {"kind": "jsd"},
    "jsd, 0.1 of the teacher": {"kind": "jsd", "beta": 0.1},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def problem(parts: tuple[int, ...] = (6,), k: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A teacher's k most likely ids, of which some are padding, and of the last token of each part all."""
    draw = torch.Generator().manual_seed(0)
    hidden = [torch.randn(n, 8, generator=draw).to(dtype) for n in parts]
    weight, bias = torch.randn(VOCAB, 8, generator=draw).to(dtype), torch.randn(VOCAB, generator=draw).to(dtype)
    ids, logprobs = [], []
    for x in hidden:
        teacher = (all_logits(x, weight, bias) + torch.randn(x.shape[0], VOCAB, generator=draw)).log_softmax(-1)
        top = teacher.topk(k)
        is_none = torch.rand(top.indices.shape, generator=draw) < 0.2
        is_none[-1:] = True
        ids.append(top.indices.masked_fill(is_none, -1))
        logprobs.append(top.values)
    return {"hidden": hidden, "weight": weight, "bias": bias, "ids": ids, "logprobs": logprobs}


def plain(given: dict[str, Any], tail_bucket: bool, kind: str, beta: float = 0.5) -> dict[str, Any]:
    """In fp64: the losses of each part's tokens, and the gradients of the mean over all valid ones."""
    hidden = [leaf(x.double()) for x in given["hidden"]]
    weight, bias = leaf(given["weight"].double()), leaf(given["bias"].double())
    losses = []
    for x, ids, logprobs in zip(hidden, given["ids"], given["logprobs"], strict=True):
        is_none, of_token = ids == -1, []
        log_s = all_logits(x, weight, bias, **FORM).log_softmax(-1).gather(1, ids.clamp(min=0))
        for s, t, none in zip(log_s, logprobs.double(), is_none, strict=True):
            both = [s[~none], t[~none]]
            both = [torch.cat([p, (1 - p.exp().sum()).log()[None]]) if tail_bucket else p.log_softmax(0) for p in both]
            of_token.append(plain_terms(both[0], both[1], kind, beta).sum() if not none.all() else s.sum() * 0)
        losses.append(torch.stack(of_token) if of_token else torch.zeros(0).double())
    count = sum(int((ids != -1).any(1).sum()) for ids in given["ids"])
    mean = torch.cat(losses).sum() / count
    mean.backward()
    grads = {"dhidden": [grad_of(x) for x in hidden], "dweight": grad_of(weight), "dbias": grad_of(bias)}
    return {"losses": [x.detach() for x in losses], "mean": mean.detach(), **grads}


def computed(given: dict[str, Any], part: int, shard: VocabShard, **settings: Any) -> dict[str, Tensor]:
    hidden = leaf(given["hidden"][part])
    weight, bias = (leaf(local_rows(given[name], shard)) for name in ("weight", "bias"))

    def loss(reduction: str) -> Tensor:
        return linear_topk_kl(
            hidden,
            weight,
            given["ids"][part],
            given["logprobs"][part],
            bias=bias,
            shard=shard,
            reduction=reduction,
            **FORM,
            **settings,
        )

    losses, mean = loss("none").detach(), loss("mean")
    mean.backward()
    grads = {"dhidden": grad_of(hidden), "dweight": grad_of(weight), "dbias": grad_of(bias)}
    return {"losses": losses, "mean": mean.detach(), **grads}


def assert_close(got: dict[str, Tensor], truth: dict[str, Any], part: int, runs: Any, times: int = 1) -> None:
    """``times``: ranks whose means' gradients add up."""
    for name, x in got.items():
        expected = truth[name][part] if isinstance(truth[name], list) else truth[name]
        if name in ("dweight", "dbias"):
            expected = rows_of(expected, runs)
        error = relative_error(x, expected * (times if name.startswith("d") else 1))
        assert error < 2e-5, f"{name}: {error:.1e}"


@every_kind
@pytest.mark.parametrize("tail_bucket", [False, True])
@pytest.mark.parametrize("k", [1, 7])
def test_it_is_that_of_plain_torch(k: int, tail_bucket: bool, kind: dict[str, Any]) -> None:
    given = problem(k=k)
    if k == 1 and not tail_bucket:  # of one outcome there is one distribution
        assert not any(x.any() for x in computed(given, 0, VocabShard.whole(VOCAB), tail_bucket=False, **kind).values())
        return
    got = computed(given, 0, VocabShard.whole(VOCAB), tail_bucket=tail_bucket, **kind)
    assert_close(got, plain(given, tail_bucket, **kind), 0, ((0, VOCAB),))


@every_kind
@pytest.mark.parametrize("tail_bucket", [False, True])
def test_gradients_are_those_of_finite_differences(tail_bucket: bool, kind: dict[str, Any]) -> None:
    hidden, weight = leaf(torch.randn(2, 4).double()), leaf(torch.randn(9, 4).double())
    ids, logprobs = torch.tensor([[3, 8, -1], [1, 0, 7]]), torch.tensor([[0.4, 0.3, 0.1], [0.2, 0.2, 0.1]]).log()

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_topk_kl(hidden, weight, ids, logprobs, tail_bucket=tail_bucket, **kind)

    torch.autograd.gradcheck(function, (hidden, weight))


@every_kind
@pytest.mark.parametrize("tail_bucket", [False, True])
@pytest.mark.parametrize("k", [5, VOCAB])
def test_a_student_that_is_the_teacher_has_neither_loss_nor_gradient(
    k: int, tail_bucket: bool, kind: dict[str, Any]
) -> None:
    given = problem()
    hidden, weight = leaf(given["hidden"][0]), leaf(given["weight"])
    teacher = linear_topk(hidden, weight, k, return_lse=True, **FORM)
    losses = linear_topk_kl(
        hidden, weight, teacher.ids, teacher.logprobs, tail_bucket=tail_bucket, reduction="none", **FORM, **kind
    )
    losses.sum().backward()
    assert losses.abs().max() < 2e-6
    assert grad_of(hidden).norm() < 1e-5 and grad_of(weight).norm() < 1e-5


CASES: dict[str, tuple[int, Layout, tuple[int, ...], Runs | None]] = {
    "2 ranks, the same tokens": (2, "replicated", (5,), None),
    "3 ranks, own tokens, one has none, an empty shard": (3, "sharded", (4, 0, 6), (((0, 99),), ((99, 301),), ())),
    "2 x 2 ranks": (4, "grid", (5, 3), None),
}


def _on_rank(given: dict[str, Any], layout: Layout, runs: Runs | None, settings: dict[str, Any]) -> dict[str, Tensor]:
    return computed(given, part_of(dist.get_rank(), layout), shard_of(VOCAB, layout, runs), **settings)


@pytest.mark.parametrize("tail_bucket", [False, True])
@pytest.mark.parametrize(("world", "layout", "parts", "runs"), CASES.values(), ids=CASES)
def test_on_ranks_it_is_that_of_all_tokens(
    ranks: RankPool, world: int, layout: Layout, parts: tuple[int, ...], runs: Runs | None, tail_bucket: bool
) -> None:
    given, kind = problem(parts), KINDS["jsd, 0.1 of the teacher"]
    truth, blocks = plain(given, tail_bucket, **kind), runs_of(VOCAB, world, runs)
    settings = {"tail_bucket": tail_bucket, **kind}
    times = {"replicated": 1, "sharded": world, "grid": 2}[layout]
    for rank, got in enumerate(ranks.run(world, _on_rank, given, layout, runs, settings)):
        assert_close(got, truth, part_of(rank, layout), blocks[rank], times)


def test_sums_and_own_counts_are_those_of_the_losses() -> None:
    given = problem()
    arguments = (given["hidden"][0], given["weight"], given["ids"][0], given["logprobs"][0])
    losses = linear_topk_kl(*arguments, reduction="none")
    assert losses[-1] == 0 and losses.shape == (6,)
    torch.testing.assert_close(linear_topk_kl(*arguments, reduction="sum"), losses.sum())
    torch.testing.assert_close(linear_topk_kl(*arguments, num_valid_tokens=3), losses.sum() / 3)
    torch.testing.assert_close(linear_topk_kl(*arguments, num_valid_tokens=torch.tensor(4)), losses.sum() / 4)
    nothing = torch.full_like(given["ids"][0], -1)
    hidden = leaf(given["hidden"][0])
    loss = linear_topk_kl(hidden, given["weight"], nothing, given["logprobs"][0])
    loss.backward()
    assert loss.isnan() and not grad_of(hidden).any()


def test_an_id_that_the_teacher_rules_out_adds_nothing_forward() -> None:
    given = problem()
    hidden, weight = given["hidden"][0][:1], given["weight"]
    ids, logprobs = torch.tensor([[3, 4, 5]]), torch.tensor([[0.6, 0.4, 0.0]]).log()
    got = linear_topk_kl(hidden, weight, ids, logprobs)
    log_s = (hidden @ weight.T).log_softmax(-1)[0, 3:5]
    p = torch.tensor([0.6, 0.4])
    torch.testing.assert_close(got, (p * (p.log() - log_s)).sum(), rtol=1e-5, atol=1e-5)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"kind": "x"}, 'kind must be "forward", "reverse" or "jsd"; got \'x\''),
    "a beta without its kind": ({"beta": 0.3}, "beta goes with kind=\"jsd\"; got 'forward'"),
    "a beta of 1": ({"kind": "jsd", "beta": 1.0}, "beta must be a float between 0 and 1, or None; got 1.0"),
    "another reduction": ({"reduction": "max"}, 'reduction must be "mean", "sum" or "none"'),
    "a count of a sum": ({"reduction": "sum", "num_valid_tokens": 3}, 'num_valid_tokens goes with reduction="mean"'),
    "a count of many": ({"num_valid_tokens": torch.ones(2)}, "num_valid_tokens must be 0-d as a tensor"),
    "no bucket's name": ({"tail_bucket": 3}, "tail_bucket must be True or False; got 3"),
    "an id out of range": ({"teacher_ids": torch.full((6, 7), 301)}, "teacher_ids must be in"),
    "other log-probabilities": ({"teacher_logprobs": torch.zeros(6, 2)}, r"teacher_logprobs must be \[6, 7\] on cpu"),
}


@pytest.mark.parametrize(("arguments", "says"), FAULTS.values(), ids=FAULTS)
def test_what_is_not_allowed_is_named(arguments: dict[str, Any], says: str) -> None:
    given = problem()
    arguments = {"teacher_ids": given["ids"][0], "teacher_logprobs": given["logprobs"][0], **arguments}
    with pytest.raises(ValueError, match=says):
        linear_topk_kl(given["hidden"][0], given["weight"], **arguments)


def _differing(settings: dict[str, Any]) -> str:
    given, shard = problem(), VocabShard.even(VOCAB, dist.group.WORLD)
    rows, settings = given["weight"][shard.start : shard.stop], settings if dist.get_rank() else {}
    try:
        linear_topk_kl(given["hidden"][0], rows, given["ids"][0], given["logprobs"][0], shard=shard, **settings)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "reverse"}, "kind must be equal on all ranks, got rank 0: forward, rank 1: reverse"),
        ({"num_valid_tokens": 3}, "whether there is num_valid_tokens must be equal on all ranks"),
        ({"beta": 0.3}, "rank 1: beta goes with kind"),
    ],
    ids=str,
)
def test_what_one_rank_gets_wrong_is_an_error_on_all(ranks: RankPool, settings: dict[str, Any], says: str) -> None:
    for text in ranks.run(2, _differing, settings):
        assert says in text
