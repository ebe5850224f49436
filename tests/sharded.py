"""A `Problem` on several ranks: who holds which rows and brings which tokens, and the bound on every rank's results.

Layouts of W ranks, all with one vocabulary group:
- "replicated": every rank brings part 0 (tensor parallelism).
- "sharded": rank r brings part r (data, sequence or context parallelism).
- "grid": 4 ranks as 2 (tokens) x 2 (same tokens), as FSDP x TP; rank r brings part r // 2.

Ranks compute on the CPU, but where there is a GPU and the backend is "triton" all on that GPU; gloo moves both.
Problems and outcomes are on the CPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from ranks import RankPool
from reference import (
    DEVICE,
    Outcome,
    Problem,
    assert_within,
    fixed_draws,
    grad_of,
    leaf,
    make_problem,
    objective,
    plain_outcome,
)
from torch import Tensor

from cce_dist import VocabShard, linear_cross_entropy

Layout = Literal["replicated", "sharded", "grid"]
Runs = Sequence[tuple[tuple[int, int], ...]]

make_rank_problem = partial(make_problem, device="cpu")


def device_of(settings: Mapping[str, Any]) -> str:
    return DEVICE if settings.get("backend") == "triton" else "cpu"


def part_of(rank: int, layout: Layout) -> int:
    return {"replicated": 0, "sharded": rank, "grid": rank // 2}[layout]


def make_shard(problem: Problem, layout: Layout, runs: Runs | None = None) -> VocabShard:
    """This rank's shard: ``runs[rank]``, or an even split."""
    return shard_of(problem.vocab_size, layout, runs, problem.weight.shape[0])


def shard_of(vocab_size: int, layout: Layout, runs: Runs | None = None, rows: int | None = None) -> VocabShard:
    """The same of so many rows, ``rows`` with padding."""
    world = dist.group.WORLD
    assert world is not None
    token_group = world if layout == "sharded" else None
    if layout == "grid":
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        token_group = groups[dist.get_rank() % 2]
    if runs is None:
        return VocabShard.even(vocab_size, world, token_group, padded_vocab_size=rows)
    return VocabShard(tuple(runs[dist.get_rank()]), vocab_size, world, token_group)


def local_rows(x: Tensor, shard: VocabShard) -> Tensor:
    return torch.cat([x[:0], *(x[start:stop] for start, stop in shard.runs)])


def rank_outcome(problem: Problem, layout: Layout, runs: Runs | None, settings: dict[str, Any]) -> Outcome:
    """On a rank: its own loss, lse, dhidden, and the gradient of its own rows."""
    problem = problem.to(device_of(settings))
    part = part_of(dist.get_rank(), layout)
    shard = make_shard(problem, layout, runs)
    hidden, weight = leaf(problem.hidden[part]), leaf(local_rows(problem.weight, shard))
    bias = None if problem.bias is None else leaf(local_rows(problem.bias, shard))
    loss, lse = linear_cross_entropy(
        hidden,
        weight,
        problem.labels[part],
        bias=bias,
        shard=shard,
        return_lse=True,
        **fixed_draws({**problem.options, **settings}, hidden),
    )
    objective([loss], [lse], only(problem, part)).backward()
    dbias = () if bias is None else (grad_of(bias),)
    return Outcome((loss.detach(),), (lse.detach(),), (grad_of(hidden),), (grad_of(weight),), dbias).to("cpu")


def only(problem: Problem, part: int) -> Problem:
    """The problem of one part's upstream gradients."""
    return replace(problem, upstream=(problem.upstream[part],), lse_upstream=problem.lse_upstream[part : part + 1])


def sharded_outcome(
    ranks: RankPool, world: int, problem: Problem, layout: Layout, runs: Runs | None = None, **settings: Any
) -> Outcome:
    """What every rank got: entry r of each field is rank r's."""
    by_rank = ranks.run(world, rank_outcome, problem, layout, runs, settings)
    return Outcome(*(tuple(x for outcome in by_rank for x in outcome[i]) for i in range(len(Outcome._fields))))


def on_ranks(outcome: Outcome, world: int, problem: Problem, layout: Layout, runs: Runs | None = None) -> Outcome:
    """A plain outcome as the ranks should see it."""
    rows = problem.weight.shape[0]
    if runs is None:
        size = -(-rows // world)
        runs = [((min(size * rank, rows), min(size * (rank + 1), rows)),) for rank in range(world)]
    parts = [part_of(rank, layout) for rank in range(world)]
    blocks = [
        tuple(torch.cat([x[:0], *(x[start:stop] for start, stop in own)]) for own in runs for x in field)
        for field in (outcome.dweight, outcome.dbias)
    ]
    tokens = [tuple(field[part] for part in parts) for field in (outcome.loss, outcome.lse, outcome.dhidden)]
    return Outcome(tokens[0], tokens[1], tokens[2], blocks[0], blocks[1])


def assert_ranks_no_worse(
    ranks: RankPool, world: int, problem: Problem, layout: Layout, runs: Runs | None = None, **settings: Any
) -> Outcome:
    """Runs the problem and holds every rank to the bound of `reference.assert_no_worse`."""
    got = sharded_outcome(ranks, world, problem, layout, runs, **settings)
    truth = on_ranks(plain_outcome(problem, torch.float64), world, problem, layout, runs)
    plain = on_ranks(plain_outcome(problem), world, problem, layout, runs)
    assert_within(got, truth, plain)
    return got
