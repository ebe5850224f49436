"""Nuclear norms of logits: the singular values of real logits, on whole and on sharded vocabularies."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import relative_error
from sharded import Layout, Runs, local_rows, part_of, shard_of
from torch import Tensor

from cce_dist import VocabShard, logits_nuclear_norm

VOCAB = 301


def problem(parts: tuple[int, ...] = (4,), length: int = 12, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Hidden states with a common direction, so that singular values differ by orders of magnitude; NaN where a
    sequence has ended."""
    draw = torch.Generator().manual_seed(0)
    lengths = [torch.randint(length + 1, (n,), generator=draw) for n in parts]
    hidden = [torch.randn(n, length, 16, generator=draw) + 20 * torch.ones(16) for n in parts]
    for x, own in zip(hidden, lengths, strict=True):
        x[torch.arange(length) >= own[:, None]] = torch.nan
    return {
        "hidden": [x.to(dtype) for x in hidden],
        "lengths": lengths,
        "weight": (torch.randn(VOCAB, 16, generator=draw) + 3).to(dtype),
        "bias": torch.randn(VOCAB, generator=draw).to(dtype),
    }


def plain(given: dict[str, Any], part: int, with_bias: bool = True) -> Tensor:
    found = []
    for x, length in zip(given["hidden"][part], given["lengths"][part], strict=True):
        z = x[:length].double() @ given["weight"].double().T + (given["bias"].double() if with_bias else 0)
        found.append(torch.linalg.svdvals(-0.7 * z).sum())
    return torch.stack(found) if found else torch.zeros(0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 12, 40])
def test_they_are_those_of_real_logits(length: int, dtype: torch.dtype, with_bias: bool) -> None:
    given = problem(length=length, dtype=dtype)
    bias = given["bias"] if with_bias else None
    got = logits_nuclear_norm(given["hidden"][0], given["weight"], given["lengths"][0], bias=bias, logit_scale=-0.7)
    assert relative_error(got, plain(given, 0, with_bias)) < 1e-6


CASES: dict[str, tuple[int, Layout, tuple[int, ...], Runs | None]] = {
    "2 ranks, the same sequences": (2, "replicated", (3,), None),
    "3 ranks, own sequences, one has none": (3, "sharded", (2, 0, 3), (((0, 99),), ((99, 301),), ())),
    "2 x 2 ranks": (4, "grid", (2, 1), None),
}


def _on_rank(given: dict[str, Any], layout: Layout, runs: Runs | None) -> Tensor:
    part, shard = part_of(dist.get_rank(), layout), shard_of(VOCAB, layout, runs)
    weight, bias = (local_rows(given[name], shard) for name in ("weight", "bias"))
    return logits_nuclear_norm(
        given["hidden"][part], weight, given["lengths"][part], bias=bias, shard=shard, logit_scale=-0.7
    )


@pytest.mark.parametrize(("world", "layout", "parts", "runs"), CASES.values(), ids=CASES)
def test_on_ranks_each_gets_those_of_its_own_sequences(
    ranks: RankPool, world: int, layout: Layout, parts: tuple[int, ...], runs: Runs | None
) -> None:
    given = problem(parts)
    for rank, got in enumerate(ranks.run(world, _on_rank, given, layout, runs)):
        assert relative_error(got, plain(given, part_of(rank, layout))) < 1e-6


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a softcap": ({"softcap": 3.0}, "softcap must be None: the nuclear norm of capped logits"),
    "lengths of others": ({"lengths": torch.ones(3).long()}, r"hidden must be \[B, L, D\] and lengths \[B\]"),
    "lengths that are floats": ({"lengths": torch.ones(4)}, "lengths must be integers; got torch.float32"),
    "no sequences": ({"hidden": torch.zeros(4, 16)}, r"hidden must be \[B, L, D\]"),
    "other rows": ({"shard": VocabShard.whole(20)}, "weight must hold the shard's 20 rows"),
}


@pytest.mark.parametrize(("arguments", "says"), FAULTS.values(), ids=FAULTS)
def test_what_is_not_allowed_is_named(arguments: dict[str, Any], says: str) -> None:
    given = problem()
    arguments = {"hidden": given["hidden"][0], "lengths": given["lengths"][0], **arguments}
    with pytest.raises(ValueError, match=says):
        logits_nuclear_norm(weight=given["weight"], **arguments)
