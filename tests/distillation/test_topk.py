"""The largest logits: those of all logits, on a whole and on a sharded vocabulary."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import DEVICE, relative_error
from sharded import Layout, Runs, local_rows, part_of, shard_of
from teachers import all_logits
from torch import Tensor
from watched import LargestTensor

from cce_dist import TopLogits, VocabShard, linear_topk

FORM = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.7}


def problem(parts: tuple[int, ...] = (5,), vocab: int = 301) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden": [torch.randn(n, 8, generator=draw) for n in parts],
        "weight": torch.randn(vocab, 8, generator=draw),
        "bias": torch.randn(vocab, generator=draw),
    }


def assert_largest(got: TopLogits, hidden: Tensor, given: dict[str, Any], k: int) -> None:
    z = all_logits(hidden.double(), given["weight"].double(), given["bias"].double(), **FORM)
    assert relative_error(got.values, z.topk(k).values) < 1e-6
    assert relative_error(z.gather(-1, got.ids), got.values) < 1e-6
    assert all(len(set(ids.tolist())) == k for ids in got.ids.reshape(-1, k))
    if got.lse is not None:
        assert relative_error(got.lse, z.logsumexp(-1)) < 1e-6
        assert relative_error(got.logprobs, z.log_softmax(-1).topk(k).values) < 1e-6


@pytest.mark.parametrize("k", [1, 64])
def test_they_are_those_of_all_logits(k: int) -> None:
    given = problem((4200,), 2500)
    given = {"hidden": given["hidden"][0].to(DEVICE), **{name: given[name].to(DEVICE) for name in ("weight", "bias")}}
    hidden = given["hidden"].view(2, 2100, 8)
    with LargestTensor() as seen:
        got = linear_topk(hidden, given["weight"], k, bias=given["bias"], return_lse=k == 1, **FORM)
    assert seen.largest <= 4096 * 2048 * 4 < 4200 * 2500 * 4
    assert_largest(got, hidden, given, k)


CASES: dict[str, tuple[int, Layout, tuple[int, ...], Runs | None, int]] = {
    "2 ranks, the same tokens": (2, "replicated", (5,), None, 20),
    "3 ranks, tokens of their own, one has none": (3, "sharded", (4, 0, 6), None, 1),
    "4 ranks, uneven shards, k beyond one": (
        4,
        "sharded",
        (2, 3, 1, 1),
        (((0, 3), (200, 301)), ((3, 4),), (), ((4, 200),)),
        150,
    ),
    "2 x 2 ranks, all ids": (4, "grid", (5, 3), None, 301),
}


def _on_rank(given: dict[str, Any], layout: Layout, runs: Runs | None, k: int) -> TopLogits:
    shard = shard_of(301, layout, runs)
    weight, bias = (local_rows(given[name], shard) for name in ("weight", "bias"))
    hidden = given["hidden"][part_of(dist.get_rank(), layout)]
    return linear_topk(hidden, weight, k, bias=bias, shard=shard, return_lse=True, **FORM)


@pytest.mark.parametrize(("world", "layout", "parts", "runs", "k"), CASES.values(), ids=CASES)
def test_on_ranks_each_gets_those_of_its_own_tokens(
    ranks: RankPool, world: int, layout: Layout, parts: tuple[int, ...], runs: Runs | None, k: int
) -> None:
    given = problem(parts)
    for rank, got in enumerate(ranks.run(world, _on_rank, given, layout, runs, k)):
        assert_largest(got, given["hidden"][part_of(rank, layout)], given, k)


@pytest.mark.parametrize("k", [0, 302, True, 2.0, "x"])
def test_a_k_that_is_none_is_named(k: Any) -> None:
    given = problem()
    with pytest.raises(ValueError, match=r"k must be an int from 1 to vocab_size = 301, got"):
        linear_topk(given["hidden"][0], given["weight"], k)


def test_log_probabilities_need_what_was_not_asked_for() -> None:
    given = problem()
    with pytest.raises(ValueError, match="return_lse=True"):
        _ = linear_topk(given["hidden"][0], given["weight"], 3).logprobs


def _differing() -> str:
    given, shard = problem(), VocabShard.even(301, dist.group.WORLD)
    rows = given["weight"][shard.start : shard.stop]
    try:
        linear_topk(given["hidden"][0], rows, 3 + dist.get_rank(), shard=shard)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_ranks_that_want_another_number_are_told(ranks: RankPool) -> None:
    for text in ranks.run(2, _differing):
        assert "k must be equal on all ranks, got rank 0: 3, rank 1: 4" in text
