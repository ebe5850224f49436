"""The loss on 1 to 4 ranks, in every token layout, against full logits in fp64 on every rank.

Errors of use end on every rank with a text that says what to change, and never in a hang: the pool has timeouts.
"""

import copy
import io
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launched import Command
from ranks import RankPool
from reference import (
    DEVICE,
    TRITON_DTYPES,
    Outcome,
    Problem,
    assert_bitwise,
    assert_within,
    cce_outcome,
    grad_of,
    leaf,
    objective,
    plain_outcome,
    relative_error,
)
from runs import RENDEZVOUS
from sharded import (
    Layout,
    Runs,
    assert_ranks_no_worse,
    device_of,
    local_rows,
    make_rank_problem,
    make_shard,
    on_ranks,
    part_of,
    sharded_outcome,
)
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from cce_dist import ShardedCCEHead, VocabShard, linear_cross_entropy
from cce_dist.kernels.problem import TILE
from cce_dist.loss.statistics import token_statistics

UNEVEN = ((13,), (4,), (21,), (9,))
VOCAB = 601  # no multiple of 2, 3, 4 or of a tile
every_layout = pytest.mark.parametrize("layout", ["replicated", "sharded"])
every_layout_and_grid = pytest.mark.parametrize("layout", ["replicated", "sharded", "grid"])


def parts(world: int, layout: Layout, shapes: tuple[tuple[int, ...], ...] = UNEVEN) -> tuple[tuple[int, ...], ...]:
    return shapes[: part_of(world - 1, layout) + 1]


# Correct on every rank


@every_layout
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_agree_with_full_logits(ranks: RankPool, world: int, layout: Layout) -> None:
    problem = make_rank_problem(parts(world, layout), VOCAB, bias=True, lse_gradient=True)
    assert_ranks_no_worse(ranks, world, problem, layout, gradient="exact")


@every_layout
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.full), pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_ranks_agree_with_full_logits_in_triton(
    ranks: RankPool, world: int, layout: Layout, dtype: torch.dtype
) -> None:
    problem = make_rank_problem(parts(world, layout), 300, 16, dtype=dtype, bias=True, lse_gradient=True)
    assert_ranks_no_worse(ranks, world, problem, layout, gradient="exact", backend="triton")


OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "per token": {"reduction": "none"},
    "num_valid_tokens": {"num_valid_tokens": 40},
    "num_valid_tokens as a tensor": {"num_valid_tokens": torch.tensor(40)},
    "softcap and scale": {"softcap": 3.0, "logit_scale": 0.6},
    "ignore_index inside the vocabulary": {"ignore_index": 3},
    "through lse": {"lse_gradient": True},
}


@every_layout_and_grid
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_on_ranks(ranks: RankPool, options: dict[str, Any], layout: Layout) -> None:
    world = 4 if layout == "grid" else 3
    problem = make_rank_problem(parts(world, layout), VOCAB, **options)
    assert_ranks_no_worse(ranks, world, problem, layout, gradient="exact")


@every_layout
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shift_stays_inside_a_rank(ranks: RankPool, reduction: str, layout: Layout) -> None:
    problem = make_rank_problem(
        parts(2, layout, ((2, 9), (1, 5))), VOCAB, shift=2, reduction=reduction, lse_gradient=True
    )
    assert_ranks_no_worse(ranks, 2, problem, layout, gradient="exact")


@every_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype_on_ranks(ranks: RankPool, dtype: torch.dtype, layout: Layout) -> None:
    problem = make_rank_problem(parts(3, layout), VOCAB, dtype=dtype, bias=True, lse_gradient=True)
    assert_ranks_no_worse(ranks, 3, problem, layout, gradient="exact")


@every_layout
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("gradient", ["unbiased", "filtered"])
def test_modes_with_eps_0_are_exact_on_ranks(ranks: RankPool, gradient: str, world: int, layout: Layout) -> None:
    problem = make_rank_problem(parts(world, layout), VOCAB, lse_gradient=True)
    assert_ranks_no_worse(ranks, world, problem, layout, gradient=gradient, filter_eps=0)


@pytest.mark.parametrize(
    ("world", "layout", "backend"),
    [
        (2, "replicated", "torch"),
        (4, "replicated", "torch"),
        (2, "sharded", "torch"),
        (4, "sharded", "torch"),
        (4, "grid", "torch"),
        (2, "sharded", "triton"),
    ],
)
@pytest.mark.parametrize("mode", [{"gradient": "unbiased", "seed": 7}, {"gradient": "filtered"}, {"tail": False}])
def test_sharding_does_not_change_what_is_kept_or_drawn(
    ranks: RankPool, world: int, layout: Layout, backend: str, mode: dict[str, Any]
) -> None:
    """Draws are keyed by the global token and the global tile: with shards of whole tiles one process does the same."""
    settings = {"gradient": "filtered", "filter_eps": 2.0**-4, "backend": backend, **mode}
    shapes = parts(world, layout, ((8,),) * 4)
    problem = make_rank_problem(shapes, 4 * TILE, 16, spread=6.0, reduction="sum", seed=3)
    single = replace(
        problem,
        hidden=(torch.cat(problem.hidden),),
        labels=(torch.cat(problem.labels),),
        upstream=(torch.cat([u.expand(8) for u in problem.upstream]),),
        options={"reduction": "none"},
    )
    alone = cce_outcome(single.to(device_of(settings)), **settings).to("cpu")
    exact = plain_outcome(single)
    assert relative_error(alone.dhidden[0], exact.dhidden[0]) > 1e-3, "something must be filtered"
    split = alone._replace(loss=alone.loss[0].split(8), lse=alone.lse[0].split(8), dhidden=alone.dhidden[0].split(8))
    expected = on_ranks(split, world, problem, layout)
    got = sharded_outcome(ranks, world, problem, layout, **settings)
    for field in ("lse", "dhidden", "dweight"):
        for rank, (mine, whole) in enumerate(zip(getattr(got, field), getattr(expected, field), strict=True)):
            assert relative_error(mine, whole) < 2e-6, f"{field} of rank {rank}"


@every_layout
def test_ranks_with_different_generators_get_one_gradient(ranks: RankPool, layout: Layout) -> None:
    problem = make_rank_problem(parts(2, layout), 4 * TILE, 16, spread=6.0)
    equal, finite = zip(*ranks.run(2, _unseeded, problem, layout), strict=True)
    assert all(finite)
    assert layout == "sharded" or all(equal)


def _unseeded(problem: Problem, layout: Layout) -> tuple[bool, bool]:
    torch.manual_seed(dist.get_rank())
    part = part_of(dist.get_rank(), layout)
    shard = make_shard(problem, layout)
    hidden = leaf(problem.hidden[part])
    weight = leaf(problem.weight[shard.start : shard.stop])
    linear_cross_entropy(hidden, weight, problem.labels[part], shard=shard, filter_eps=0.05).backward()
    assert hidden.grad is not None
    seen = torch.stack([hidden.grad[:1], hidden.grad[:1]])
    dist.all_reduce(seen[1], dist.ReduceOp.MAX)
    return torch.equal(seen[0], seen[1]), bool(hidden.grad.isfinite().all())


# Rows

RUNS: dict[str, Runs] = {
    "interleaved": [((0, 100), (400, 500)), ((100, 400), (500, VOCAB))],
    "an empty shard in the middle": [((0, 300),), (), ((300, VOCAB),)],
    "an empty first shard": [(), ((0, VOCAB),)],
    "descending with the rank": [((450, VOCAB),), ((200, 450),), ((0, 200),)],
    "many runs": [
        tuple((start, start + 50) for start in range(0, 600, 100)),
        (*((start, start + 50) for start in range(50, 650, 100)), (600, VOCAB)),
    ],
}


@every_layout
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_any_runs_that_tile_the_vocabulary(ranks: RankPool, runs: Runs, layout: Layout) -> None:
    world = len(runs)
    problem = make_rank_problem(parts(world, layout), VOCAB, bias=True, lse_gradient=True)
    assert_ranks_no_worse(ranks, world, problem, layout, runs, gradient="exact")


@every_layout
@pytest.mark.parametrize("vocab", [1, 3, 5])
def test_fewer_rows_than_an_even_split_needs(ranks: RankPool, vocab: int, layout: Layout) -> None:
    """As torch.chunk: five rows on four ranks are 2, 2, 1, 0."""
    problem = make_rank_problem(parts(4, layout), vocab, lse_gradient=vocab > 1)
    got = assert_ranks_no_worse(ranks, 4, problem, layout, gradient="exact")
    assert got.dweight[3].shape[0] == 0


@every_layout
def test_padding_rows_between_the_runs_of_ranks(ranks: RankPool, layout: Layout) -> None:
    """Rank 0 holds the last real rows and some padding, rank 1 only padding besides its own rows."""
    runs: Runs = [((200, 320),), ((0, 200), (320, 333))]
    problem = make_rank_problem(parts(2, layout), 310, padding_rows=23, bias=True)
    got = assert_ranks_no_worse(ranks, 2, problem, layout, runs, gradient="exact")
    assert not got.dweight[0][110:].any()
    assert not got.dweight[1][200:].any()


# Tokens


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("counts", [(0, 7, 3), (7, 0, 0), (1, 40, 2)])
def test_ranks_bring_any_number_of_tokens(ranks: RankPool, counts: tuple[int, ...], reduction: str) -> None:
    problem = make_rank_problem(tuple((n,) for n in counts), VOCAB, reduction=reduction, ignored=0.1, lse_gradient=True)
    assert_ranks_no_worse(ranks, 3, problem, "sharded", gradient="exact")


@pytest.mark.parametrize("max_tokens", [21, 64])
def test_max_tokens_may_exceed_what_ranks_bring(ranks: RankPool, max_tokens: int) -> None:
    problem = make_rank_problem(UNEVEN, VOCAB, lse_gradient=True)
    assert_ranks_no_worse(ranks, 4, problem, "sharded", gradient="exact", max_tokens=max_tokens)


def test_tokens_of_more_than_one_axis(ranks: RankPool) -> None:
    problem = make_rank_problem(((2, 3, 4), (5, 1, 2)), VOCAB, reduction="none", lse_gradient=True)
    assert_ranks_no_worse(ranks, 2, problem, "sharded", gradient="exact")


def test_uneven_valid_tokens_on_a_grid(ranks: RankPool) -> None:
    problem = make_rank_problem(((13,), (6,)), VOCAB, bias=True, lse_gradient=True, ignored=0.0)
    labels = (torch.where(torch.arange(13) % 3 == 0, problem.labels[0], -100), problem.labels[1])
    assert_ranks_no_worse(ranks, 4, replace(problem, labels=labels), "grid", gradient="exact")


def test_a_grid_in_triton(ranks: RankPool) -> None:
    problem = make_rank_problem(((13,), (6,)), 300, 16, bias=True, lse_gradient=True)
    assert_ranks_no_worse(ranks, 4, problem, "grid", gradient="exact", backend="triton")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_upstream_gradient_of_each_rank_counts(ranks: RankPool, reduction: str) -> None:
    """Only rank 1's loss is differentiated: of a sum its own tokens alone, of a mean everyone's."""
    problem = make_rank_problem(UNEVEN[:3], VOCAB, reduction=reduction, ignored=0.0)
    zero = torch.zeros(())
    problem = replace(problem, upstream=(zero, problem.upstream[1], zero))
    got = assert_ranks_no_worse(ranks, 3, problem, "sharded", gradient="exact")
    assert bool(got.dhidden[0].any()) == (reduction == "mean")
    assert got.dhidden[1].any()


def test_the_gradient_of_a_mean_is_world_times_that_of_one_process(ranks: RankPool) -> None:
    """Which the averaging of a data-parallel framework divides back."""
    problem = make_rank_problem(UNEVEN[:3], VOCAB)
    problem = replace(problem, upstream=(torch.ones(()),) * 3)
    whole = replace(
        problem,
        hidden=(torch.cat(problem.hidden),),
        labels=(torch.cat(problem.labels),),
        upstream=(torch.full((), 3.0),),
    )
    got = sharded_outcome(ranks, 3, problem, "sharded", gradient="exact")
    truth, plain = plain_outcome(whole, torch.float64), plain_outcome(whole)
    merged = Outcome((got.loss[0],), (torch.cat(got.lse),), (torch.cat(got.dhidden),), (torch.cat(got.dweight),), ())
    assert_within(merged, truth, plain)
    assert_bitwise(got.loss[0], got.loss[1])
    assert_bitwise(got.loss[0], got.loss[2])


def _two_replicas_of_the_classifier(problem: Problem) -> Outcome:
    """Vocabulary and tokens over pairs of ranks; the mean over all four."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    shard = VocabShard.even(problem.vocab_size, pairs[rank // 2], pairs[rank // 2], count_group=dist.group.WORLD)
    hidden, weight = leaf(problem.hidden[rank]), leaf(problem.weight[shard.start : shard.stop])
    loss = linear_cross_entropy(hidden, weight, problem.labels[rank], shard=shard, gradient="exact")
    (loss * problem.upstream[rank]).backward()
    return Outcome((loss.detach(),), (), (grad_of(hidden),), (grad_of(weight),), ())


def test_a_count_group_larger_than_the_token_group(ranks: RankPool) -> None:
    """Gradients of the two replicas add up to that of Σ_r u_r·L_r over all four ranks."""
    problem = make_rank_problem(UNEVEN, VOCAB)
    by_rank = ranks.run(4, _two_replicas_of_the_classifier, problem)
    truth, plain = plain_outcome(problem, torch.float64), plain_outcome(problem)
    replicas = [torch.cat([by_rank[first].dweight[0], by_rank[first + 1].dweight[0]]) for first in (0, 2)]
    got = Outcome(
        tuple(x.loss[0] for x in by_rank),
        truth.lse,
        tuple(x.dhidden[0] for x in by_rank),
        (replicas[0] + replicas[1],),
        (),
    )
    assert_within(got, truth, plain)


def _reduced_in(problem: Problem, layout: Layout, dtype: torch.dtype | None) -> Tensor:
    group = dist.group.WORLD
    token_group = group if layout == "sharded" else None
    shard = VocabShard.even(problem.vocab_size, group, token_group, reduce_dtype=dtype, grad_divisor=8.0)
    part = part_of(dist.get_rank(), layout)
    hidden, weight = leaf(problem.hidden[part]), leaf(problem.weight[shard.start : shard.stop])
    loss, lse = linear_cross_entropy(
        hidden, weight, problem.labels[part], shard=shard, gradient="exact", return_lse=True, **problem.options
    )
    objective([loss], [lse], replace(problem, upstream=problem.upstream[part : part + 1], lse_upstream=())).backward()
    return torch.cat([grad_of(hidden).flatten(), grad_of(weight).flatten()])


@every_layout
def test_reduce_dtype_rounds_only_the_reduction_and_the_loss_never_divides(ranks: RankPool, layout: Layout) -> None:
    problem = make_rank_problem(parts(2, layout), VOCAB)
    expected = sharded_outcome(ranks, 2, problem, layout, gradient="exact")
    full = [torch.cat([e.flatten(), c.flatten()]) for e, c in zip(expected.dhidden, expected.dweight, strict=True)]
    for rank, got in enumerate(ranks.run(2, _reduced_in, problem, layout, None)):
        assert_bitwise(got, full[rank])  # grad_divisor is the owner\'s
    for rank, got in enumerate(ranks.run(2, _reduced_in, problem, layout, torch.bfloat16)):
        hidden_size = expected.dhidden[rank].numel()
        assert_bitwise(got[hidden_size:], full[rank][hidden_size:])
        assert 1e-4 < relative_error(got[:hidden_size], full[rank][:hidden_size]) < 2.0**-7


# DTensor and DeviceMesh


def _dtensor(problem: Problem, explicit: bool) -> tuple[Any, ...]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(problem.weight, mesh, [Shard(0)]).requires_grad_()
    assert problem.bias is not None
    bias = distribute_tensor(problem.bias, mesh, [Shard(0)]).requires_grad_()
    hidden = leaf(problem.hidden[0])
    shard = VocabShard.from_dtensor(weight) if explicit else None
    for _ in range(2):  # the second call finds the first one's agreement
        hidden.grad = weight.grad = bias.grad = None
        loss, lse = linear_cross_entropy(
            hidden,
            weight,
            problem.labels[0],
            bias=bias,
            shard=shard,
            gradient="exact",
            return_lse=True,
            **problem.options,
        )
        objective([loss], [lse], problem).backward()
    kinds = [isinstance(x.grad, DTensor) and x.grad.placements == (Shard(0),) for x in (weight, bias)]
    return loss.detach(), lse.detach(), hidden.grad, weight.grad.full_tensor(), bias.grad.full_tensor(), kinds  # type: ignore[union-attr]


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(("world", "vocab"), [(1, VOCAB), (2, VOCAB), (3, VOCAB), (4, 5)])
def test_a_dtensor_classifier_brings_its_rows_and_group(
    ranks: RankPool, world: int, vocab: int, explicit: bool
) -> None:
    problem = make_rank_problem(((13,),), vocab, bias=True, reduction="none", lse_gradient=True)
    truth, plain = plain_outcome(problem, torch.float64), plain_outcome(problem)
    for loss, lse, dhidden, dweight, dbias, kinds in ranks.run(world, _dtensor, problem, explicit):
        assert kinds == [True, True]
        assert_within(Outcome((loss,), (lse,), (dhidden,), (dweight,), (dbias,)), truth, plain)


HELD: dict[str, tuple[str, Any, Any]] = {
    "replicated": ("replicated", [Replicate()], None),
    "a sequence in parts": ("replicated", [Shard(0)], [Shard(0)]),
    "a sequence in parts, whole labels": ("replicated", [Shard(0)], None),
    "parts of each rank's own": ("sharded", [Shard(0)], None),
    "parts of each rank's own, labels too": ("sharded", [Shard(0)], [Shard(0)]),
}


def _hidden_as_dtensor(problem: Problem, held: str) -> tuple[Tensor, Tensor, Tensor]:
    layout, placements, label_placements = HELD[held]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard = VocabShard.even(problem.vocab_size, mesh, mesh if layout == "sharded" else None)
    hidden = distribute_tensor(problem.hidden[0], mesh, placements).requires_grad_()
    labels: Tensor = problem.labels[0]
    if label_placements is not None:
        labels = distribute_tensor(labels, mesh, label_placements)
    elif layout == "sharded":
        labels = labels.chunk(mesh.size())[mesh.get_local_rank()]
    weight = leaf(local_rows(problem.weight, shard))
    loss = linear_cross_entropy(hidden, weight, labels, shard=shard, reduction="sum")
    (loss * problem.upstream[0]).backward()
    assert isinstance(hidden.grad, DTensor)
    total = loss.detach()
    if layout == "sharded":
        dist.all_reduce(total)
    return total, hidden.grad.full_tensor(), grad_of(weight)


@pytest.mark.parametrize("held", HELD)
def test_hidden_states_that_are_dtensors(ranks: RankPool, held: str) -> None:
    problem = make_rank_problem(((13,),), VOCAB, reduction="sum", ignored=0.2)
    truth, plain = plain_outcome(problem, torch.float64), plain_outcome(problem)
    by_rank = ranks.run(2, _hidden_as_dtensor, problem, held)
    for loss, dhidden, _ in by_rank:
        dweight = torch.cat([rows for _, _, rows in by_rank])
        assert_within(Outcome((loss,), (), (dhidden,), (dweight,), ()), truth._replace(lse=()), plain._replace(lse=()))


def _refused_hidden(case: str) -> str:
    if case == "2-D":
        mesh = init_device_mesh("cpu", (1, 2))
        shard = VocabShard.even(40, dist.group.WORLD)
        hidden = distribute_tensor(torch.zeros(4, 8), mesh, [Replicate(), Replicate()])
    else:
        mesh = init_device_mesh("cpu", (2,))
        shard = VocabShard.even(40, mesh, mesh)
        hidden = distribute_tensor(torch.zeros(4, 8), mesh, [Replicate() if case == "the same tokens" else Shard(1)])
    labels = torch.zeros(4 if case != "parts" else 2).long()
    return _error_of(lambda: linear_cross_entropy(hidden, torch.zeros(shard.num_rows, 8), labels, shard=shard))


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("2-D", "hidden must be a plain tensor or a DTensor on a 1-D mesh"),
        ("the same tokens", "of which token_group says that each brings tokens of its own"),
        ("columns", "of which token_group says that each brings tokens of its own"),
    ],
)
def test_hidden_states_that_say_something_else_than_the_shard_are_refused(
    ranks: RankPool, case: str, text: str
) -> None:
    for said in ranks.run(2, _refused_hidden, case, timeout=20):
        assert text in said, said


def _saved_after_a_loss() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    head = torch.nn.Linear(8, 40, bias=False)
    head.weight = torch.nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
    linear_cross_entropy(torch.randn(3, 8), head.weight, torch.arange(3)).backward()
    linear_cross_entropy(torch.randn(3, 8), head.weight * 2, torch.arange(3)).backward()
    torch.save(head, io.BytesIO())
    copied = copy.deepcopy(head)
    assert torch.equal(copied.weight.full_tensor(), head.weight.full_tensor())  # type: ignore[operator]
    said = []
    for value in (VocabShard.even(40, mesh), ShardedCCEHead.from_linear(torch.nn.Linear(8, 40), mesh)):
        try:
            torch.save(value, io.BytesIO())
        except TypeError as error:
            said.append(str(error))
    return said


def test_nothing_of_ours_hangs_on_what_users_save_and_shards_say_that_they_do_not_pickle(ranks: RankPool) -> None:
    for said in ranks.run(2, _saved_after_a_loss):
        assert len(said) == 2
        assert all("VocabShard with process groups cannot be pickled" in text and "state_dict" in text for text in said)
    whole = pickle.loads(pickle.dumps(VocabShard.whole(12)))
    assert (whole.runs, whole.vocab_size) == (((0, 12),), 12)


def _refused_dtensor(placement: str) -> str:
    mesh = init_device_mesh("cpu", (2,))
    full = torch.zeros(40, 8)
    if placement == "partial":
        weight = DTensor.from_local(full, mesh, [Partial()])
    elif placement == "2-D":
        mesh = init_device_mesh("cpu", (1, 2))
        weight = distribute_tensor(full, mesh, [Replicate(), Shard(0)])
    else:
        weight = distribute_tensor(full, mesh, [Shard(1) if placement == "columns" else Replicate()])
    return _error_of(lambda: linear_cross_entropy(torch.zeros(3, 8), weight, torch.zeros(3).long()))


@pytest.mark.parametrize("placement", ["replicated", "columns", "partial", "2-D"])
def test_other_placements_are_refused(ranks: RankPool, placement: str) -> None:
    for text in ranks.run(2, _refused_dtensor, placement):
        assert "Shard(0)" in text
        assert "1-D mesh" in text


def _mesh_as_group(problem: Problem) -> tuple[Any, ...]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    refused = _error_of(lambda: VocabShard.even(problem.vocab_size, mesh))
    shard = VocabShard.even(problem.vocab_size, mesh["tp"], count_group=mesh["dp"])
    part = mesh["dp"].get_local_rank()
    hidden, weight = leaf(problem.hidden[part]), leaf(problem.weight[shard.start : shard.stop])
    loss = linear_cross_entropy(hidden, weight, problem.labels[part], shard=shard, gradient="exact")
    (loss * problem.upstream[part]).backward()
    return loss.detach(), grad_of(hidden), grad_of(weight), refused


def test_a_mesh_dimension_is_taken_for_a_group(ranks: RankPool) -> None:
    """Data parallel x tensor parallel: the vocabulary over "tp", tokens different over "dp", the mean over "dp"."""
    problem = make_rank_problem(((13,), (6,)), VOCAB)
    truth, plain = plain_outcome(problem, torch.float64), plain_outcome(problem)
    by_rank = ranks.run(4, _mesh_as_group, problem)
    assert all("1-D DeviceMesh" in refused for *_, refused in by_rank)
    dweight = [by_rank[tp][2] + by_rank[2 + tp][2] for tp in range(2)]
    for first in (0, 1):
        got = Outcome(
            tuple(by_rank[rank][0] for rank in (first, 2 + first)),
            truth.lse,
            tuple(by_rank[rank][1] for rank in (first, 2 + first)),
            (torch.cat(dweight),),
            (),
        )
        assert_within(got, truth, plain)


# Use that cannot work: an error on every rank, never a hang


def _error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return "no error"


def _call(vocab: int = 40, dim: int = 8, layout: Layout = "sharded", **change: Any) -> Callable[[], Tensor]:
    """A call whose arguments, this rank's, may be ``change``d."""
    shard = change.pop("shard", None) or VocabShard.even(
        vocab, dist.group.WORLD, dist.group.WORLD if layout == "sharded" else None
    )
    dtype = change.pop("dtype", torch.float32)
    rows = shard.num_rows + change.pop("extra_rows", 0)
    arguments = {
        "hidden": torch.zeros(change.pop("tokens", 3), dim, dtype=dtype, requires_grad=change.pop("grad", True)),
        "weight": torch.zeros(rows, dim, dtype=dtype),
        "shard": shard,
        "gradient": "exact",
        "bias": torch.zeros(rows) if change.pop("bias", False) else None,
    }
    arguments["labels"] = torch.zeros(arguments["hidden"].shape[0], dtype=torch.int64)
    arguments.update(change)
    return lambda: linear_cross_entropy(**arguments)  # type: ignore[call-overload, no-any-return]


def _one_rank_differs(change: dict[str, Any], layout: Layout) -> str:
    return _error_of(_call(layout=layout, **(change if dist.get_rank() == 1 else {})))


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "V": ({"vocab": 44}, "vocab_size must be equal"),
    "D": ({"dim": 6}, "dimension must be equal"),
    "dtype": ({"dtype": torch.float64}, "dtype must be equal"),
    "gradient": ({"gradient": "unbiased"}, "gradient must be equal"),
    "filter_eps": ({"gradient": "filtered", "filter_eps": 0.3}, "must be equal"),
    "tail": ({"tail": False}, "tail must be equal"),
    "softcap": ({"softcap": 30.0}, "softcap must be equal"),
    "logit_scale": ({"logit_scale": 2.0}, "logit_scale must be equal"),
    "ignore_index": ({"ignore_index": -1}, "ignore_index must be equal"),
    "reduction": ({"reduction": "sum"}, "reduction must be equal"),
    "bias": ({"bias": True}, "bias must be equal"),
    # With a GPU the kernels are compiled, and refuse the rank's CPU tensors.
    "backend": ({"backend": "triton"}, "backend must be equal" if DEVICE == "cpu" else "needs CUDA tensors"),
    "num_valid_tokens": ({"num_valid_tokens": 3}, "reduction must be equal"),
    "hidden without gradient": ({"grad": False}, "gradient must be equal"),
    "rows": ({"extra_rows": 1}, r"rank 1: weight must hold"),
    "labels": ({"labels": torch.zeros(4).long()}, "rank 1: labels must"),
    "setting": ({"softcap": -1.0}, "rank 1: softcap must be"),
    "type of a setting": ({"softcap": "30"}, "rank 1: softcap must be"),
    "type of max_tokens": ({"max_tokens": 7.5}, "max_tokens must be"),
}


@every_layout
@pytest.mark.parametrize(("change", "text"), DIFFERENT.values(), ids=DIFFERENT)
def test_ranks_that_differ_all_raise(ranks: RankPool, change: dict[str, Any], text: str, layout: Layout) -> None:
    for said in ranks.run(2, _one_rank_differs, change, layout, timeout=20):
        assert text in said, said
        assert "rank 1" in said


@every_layout
@pytest.mark.parametrize("name", ["V", "labels"])
def test_four_ranks_of_which_one_differs_all_raise(ranks: RankPool, name: str, layout: Layout) -> None:
    change, text = DIFFERENT[name]
    for said in ranks.run(4, _one_rank_differs, change, layout, timeout=20):
        assert text in said, said


def test_replicated_ranks_with_different_token_counts_all_raise(ranks: RankPool) -> None:
    for said in ranks.run(2, _one_rank_differs, {"tokens": 4}, "replicated", timeout=20):
        assert "number of tokens must be equal" in said, said


def test_ranks_that_differ_in_max_tokens_all_raise(ranks: RankPool) -> None:
    for said in ranks.run(2, _one_rank_differs, {"max_tokens": 8}, "sharded", timeout=20):
        assert "max_tokens must be equal" in said, said


def _layouts_differ() -> str:
    return _error_of(_call(layout="sharded" if dist.get_rank() == 1 else "replicated"))


def test_ranks_that_differ_in_the_layout_all_raise(ranks: RankPool) -> None:
    for said in ranks.run(2, _layouts_differ, timeout=20):
        assert "token_group must be equal" in said, said


def _bad_tiling(runs: Runs, layout: Layout) -> str:
    token_group = dist.group.WORLD if layout == "sharded" else None
    shard = VocabShard(tuple(runs[dist.get_rank()]), 40, dist.group.WORLD, token_group)
    return _error_of(_call(shard=shard))


@every_layout
@pytest.mark.parametrize(
    ("runs", "text"),
    [
        ([((0, 20),), ((21, 40),)], "gap"),
        ([((0, 20),), ((19, 40),)], "overlap"),
        ([((0, 40),), ((0, 40),)], "overlap"),
        ([((0, 20),), ((20, 39),)], "end at row 39"),
        ([((1, 20),), ((20, 40),)], "gap"),
        ([(), ()], "end at row 0"),
        ([((0, 10), (30, 40)), ((10, 20),)], "gap"),
    ],
)
def test_shards_that_do_not_tile_the_vocabulary_raise_on_all(
    ranks: RankPool, runs: Runs, text: str, layout: Layout
) -> None:
    for said in ranks.run(2, _bad_tiling, runs, layout, timeout=20):
        assert "must tile rows 0 to 40" in said
        assert text in said


def _later_call_differs(change: dict[str, Any], layout: Layout) -> tuple[str, float, float]:
    shard = VocabShard.even(40, dist.group.WORLD, dist.group.WORLD if layout == "sharded" else None)
    before = float(_call(shard=shard)())
    said = _error_of(_call(shard=shard, **(change if dist.get_rank() == 0 else {})))
    return said, before, float(_call(shard=shard)())


LATER: dict[str, tuple[dict[str, Any], str]] = {
    "softcap": ({"softcap": 2.0}, "softcap must be equal"),
    "gradient": ({"gradient": "unbiased"}, "gradient must be equal"),
    "bias": ({"bias": True}, "bias must be equal"),
    "dtype": ({"dtype": torch.bfloat16}, "dtype must be equal"),
    "D": ({"dim": 4}, "dimension must be equal"),
    "shift": ({"shift": 1}, "shift must be equal"),
    "no gradient": ({"grad": False}, "need of a gradient must be equal"),
    "a wrong shape": ({"labels": torch.zeros(4).long()}, "rank 0: labels must have hidden's shape"),
    "a wrong dtype": ({"labels": torch.zeros(3)}, "rank 0: labels must be integers"),
    "no tensor": ({"labels": None}, "rank 0: labels must be a tensor, got NoneType"),
    "a label out of range": ({"labels": torch.tensor([0, 40, 0])}, "rank 0: labels must be in [0, 40)"),
    "an unknown argument": ({"smoothing": 0.1}, "rank 0: linear_cross_entropy takes no argument smoothing"),
    "num_valid_tokens": ({"num_valid_tokens": -1}, "rank 0: num_valid_tokens must be an int, 0 or more"),
    "a small workspace": ({"workspace_mb": 0}, "rank 0: workspace_mb must be an int, 1 or more"),
}


@every_layout
@pytest.mark.parametrize(("change", "text"), LATER.values(), ids=LATER)
def test_a_later_call_that_differs_raises_on_every_rank(
    ranks: RankPool, change: dict[str, Any], text: str, layout: Layout
) -> None:
    """And the ranks go on together after it."""
    for said, before, after in ranks.run(2, _later_call_differs, change, layout, timeout=20):
        assert text in said, said
        assert before == after


def test_a_later_call_with_another_number_of_replicated_tokens_raises_on_every_rank(ranks: RankPool) -> None:
    for said, before, after in ranks.run(2, _later_call_differs, {"tokens": 5}, "replicated", timeout=20):
        assert "number of tokens must be equal on all ranks, got rank 0: 5, rank 1: 3" in said
        assert before == after


def test_more_tokens_than_max_tokens_raise_on_every_rank(ranks: RankPool) -> None:
    change = {"tokens": 9, "max_tokens": 8}
    for said, _, _ in ranks.run(2, _later_call_differs, change, "sharded", timeout=20):
        assert "rank 0: max_tokens must be an int, at least this rank's 9 tokens" in said


def _without_grad_mode_on_one_rank(layout: Layout) -> tuple[str, str]:
    shard = VocabShard.even(40, dist.group.WORLD, dist.group.WORLD if layout == "sharded" else None)
    _call(shard=shard)()
    with torch.set_grad_enabled(dist.get_rank() == 0):
        return _error_of(_call(shard=shard)), _error_of(_call(shard=shard))


@every_layout
def test_no_grad_on_one_rank_raises_on_every_rank(ranks: RankPool, layout: Layout) -> None:
    for twice in ranks.run(2, _without_grad_mode_on_one_rank, layout, timeout=20):
        assert all("grad mode must be equal on all ranks, got rank 0: True, rank 1: False" in said for said in twice)


def _first_call_only(layout: Layout) -> tuple[str, bool]:
    shard = VocabShard.even(40, dist.group.WORLD, dist.group.WORLD if layout == "sharded" else None)
    settings: dict[str, Any] = {"shard": shard, "agreement": "first_call", "max_tokens": 3}
    first = _call(**settings)()
    said = _error_of(_call(**settings, softcap=-1.0)) if dist.get_rank() == 0 else ""
    return said, torch.equal(_call(**settings)(), first)


@every_layout
def test_after_the_first_call_ranks_may_go_on_without_asking_each_other(ranks: RankPool, layout: Layout) -> None:
    """Rank 0 alone raises and tries again; rank 1 never notices."""
    (said, same), (_, same_there) = ranks.run(2, _first_call_only, layout, timeout=20)
    assert "softcap must be" in said
    assert same
    assert same_there


def _first_call_differs(layout: Layout) -> str:
    change = {"softcap": 3.0} if dist.get_rank() == 1 else {}
    return _error_of(_call(layout=layout, agreement="first_call", max_tokens=3, **change))


@every_layout
def test_the_first_call_is_agreed_on_even_so(ranks: RankPool, layout: Layout) -> None:
    for said in ranks.run(2, _first_call_differs, layout, timeout=20):
        assert "softcap must be equal" in said


def _first_call_without_max_tokens() -> str:
    return _error_of(_call(agreement="first_call"))


def test_without_an_exchange_sharded_tokens_need_a_maximum(ranks: RankPool) -> None:
    for said in ranks.run(2, _first_call_without_max_tokens, timeout=20):
        assert 'agreement="first_call" needs max_tokens' in said


def _settings_change_from_call_to_call() -> list[float]:
    shard = VocabShard.even(40, dist.group.WORLD, dist.group.WORLD)
    groups = len(dist.distributed_c10d._world.pg_names)
    changes: list[dict[str, Any]] = [{}, {"reduction": "sum"}, {}, {"logit_scale": 2.0}, {"shift": 1}, {"grad": False}]
    losses = [float(_call(shard=shard, **change)().detach()) for change in changes]
    replaced = [float(_call(shard=replace(shard, vocab_size=size))().detach()) for size in (39, 38)]
    return [*losses, *replaced, len(dist.distributed_c10d._world.pg_names) - groups]


def test_settings_may_change_from_call_to_call_and_groups_are_shared(ranks: RankPool) -> None:
    log = torch.tensor([40.0, 39.0, 38.0]).log().tolist()
    expected = [log[0], 3 * log[0], log[0], log[0], log[0], log[0], log[1], log[2]]
    for *losses, groups in ranks.run(2, _settings_change_from_call_to_call, timeout=20):
        assert losses == pytest.approx(expected)
        assert groups == 0


def _different_labels(layout: Layout, change: str) -> str:
    """Zeros as hidden states: nothing but the labels differs."""
    rank, world = dist.get_rank(), dist.get_world_size()
    labels = torch.arange(6) if change != "the same" else torch.arange(3, 9)
    if change == "another label" and rank == world - 1:
        labels[2] = 30
    if change == "another order" and rank == world - 1:
        labels = labels.flip(0)
    if change == "other tokens":
        labels = labels + rank
    if change == "ignored" and rank == world - 1:
        labels[4] = -100
    token_group = None
    if layout == "grid":
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        token_group = groups[rank % 2]
    shard = VocabShard.even(40, dist.group.WORLD, token_group)
    return _error_of(_call(shard=shard, tokens=6, labels=labels))


@pytest.mark.parametrize(("world", "layout"), [(2, "replicated"), (3, "replicated"), (4, "grid")])
@pytest.mark.parametrize("change", ["the same", "another label", "another order", "other tokens", "ignored"])
def test_replicated_ranks_with_different_labels_all_raise(
    ranks: RankPool, world: int, layout: Layout, change: str
) -> None:
    for said in ranks.run(world, _different_labels, layout, change, timeout=20):
        if change == "the same":
            assert said == "no error"
        else:
            assert "labels differ between ranks that bring the same tokens" in said


def _wrong_in_one_vocabulary_group(first: bool, wrong: set[int]) -> str:
    """Vocabulary and tokens over pairs of ranks, the mean over all four."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = pairs[dist.get_rank() // 2]
    shard = VocabShard.even(40, pair, pair, count_group=dist.group.WORLD)
    if not first:
        _call(shard=shard, reduction="sum")()  # the pairs agree; nothing is counted yet
    return _error_of(_call(shard=shard, **({"softcap": -1.0} if dist.get_rank() in wrong else {})))


@pytest.mark.parametrize("wrong", [{3}, {2, 3}], ids=["on one rank", "on both"])
@pytest.mark.parametrize("first", [True, False])
def test_a_fault_in_one_vocabulary_group_raises_in_the_others_of_its_count_group(
    ranks: RankPool, first: bool, wrong: set[int]
) -> None:
    for said in ranks.run(4, _wrong_in_one_vocabulary_group, first, wrong, timeout=20):
        assert "rank 3: softcap must be" in said


def _sparse_on_one_rank() -> str:
    if dist.get_rank() == 1:
        return _error_of(_call(hidden=torch.zeros(3, 8).to_sparse()))
    return _error_of(_call())


def test_sparse_hidden_states_on_one_rank_raise_on_every_rank(ranks: RankPool) -> None:
    for said in ranks.run(2, _sparse_on_one_rank, timeout=20):
        assert "rank 1: hidden must be a dense tensor; got torch.sparse_coo" in said


def _wrong_labels_beside_a_dtensor() -> str:
    mesh = init_device_mesh("cpu", (2,))
    hidden = distribute_tensor(torch.zeros(4, 8), mesh, [Replicate()])
    labels = torch.tensor([0, 1, 2, 77 if dist.get_rank() == 1 else 3])
    shard = VocabShard.even(40, dist.group.WORLD)
    return _error_of(lambda: linear_cross_entropy(hidden, torch.zeros(shard.num_rows, 8), labels, shard=shard))


def test_a_wrong_label_beside_a_dtensor_raises_on_every_rank(ranks: RankPool) -> None:
    for said in ranks.run(2, _wrong_labels_beside_a_dtensor, timeout=20):
        assert "rank 1: labels must be in [0, 40)" in said


def _process_groups_made_anew(store: str) -> list[float]:
    """Losses of a DTensor classifier before and after the default group was destroyed and made again."""
    losses, rank = [], dist.get_rank()
    for again in (False, True):
        if again:
            dist.destroy_process_group()
            dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=10), world_size=2, rank=rank)
        weight = distribute_tensor(torch.zeros(40, 8), init_device_mesh("cpu", (2,)), [Shard(0)])
        weight = weight * 1.0  # torch's cache of operations hands an equal mesh out again, with the new groups
        losses.append(float(linear_cross_entropy(torch.zeros(3, 8), weight, torch.arange(3))))
    return losses


def test_a_classifier_can_be_used_after_the_process_groups_were_made_anew(ranks: RankPool, tmp_path: Path) -> None:
    for losses in ranks.run(2, _process_groups_made_anew, str(tmp_path / "store"), timeout=30):
        assert losses == pytest.approx([torch.tensor(40.0).log().item()] * 2)


LATER_FAULT_IN_ONE_GROUP = """
import os, torch, torch.distributed as dist
from cce_dist import VocabShard, linear_cross_entropy

dist.init_process_group("gloo")
pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
pair = pairs[dist.get_rank() // 2]
shard = VocabShard.even(40, pair, pair, count_group=dist.group.WORLD)
for step in range(2):
    labels = torch.tensor([1, 2, 77 if (step, dist.get_rank()) == (1, 3) else 3])
    linear_cross_entropy(torch.zeros(3, 8), torch.zeros(shard.num_rows, 8), labels, shard=shard)
    os.write(1, f"done with step {step}\\n".encode())  # whole, where ranks write at once
"""


@pytest.mark.full
def test_a_later_fault_in_one_vocabulary_group_ends_the_others_by_the_launcher(tmp_path: Path) -> None:
    """Ranks 2 and 3 raise; ranks 0 and 1 wait for them in the mean's sum, and torchrun ends those."""
    script = tmp_path / "script.py"
    script.write_text(LATER_FAULT_IN_ONE_GROUP)
    arguments = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", *RENDEZVOUS, script]
    with Command(arguments, tmp_path / "log") as command:
        assert command.wait(120) != 0
        assert "rank 3: labels must be in [0, 40) or ignore_index = -100, got [77]" in command.said
        assert command.said.count("done with step 0") == 4
        assert "done with step 1" not in command.said
        assert command.alive() == []


def _vocabulary_groups_with_different_settings() -> str:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = pairs[dist.get_rank() // 2]
    shard = VocabShard.even(40, pair, pair, count_group=dist.group.WORLD)
    return _error_of(_call(shard=shard, logit_scale=1.0 + dist.get_rank() // 2))


def test_vocabulary_groups_of_a_count_group_must_compute_the_same(ranks: RankPool) -> None:
    for said in ranks.run(4, _vocabulary_groups_with_different_settings, timeout=20):
        assert "logit_scale must be equal on all ranks, got rank 0: 1.0, rank 1: 1.0, rank 2: 2.0" in said


def _different_things_at_once() -> str:
    shard = VocabShard.even(40, dist.group.WORLD, dist.group.WORLD)
    _call(shard=shard)()
    if dist.get_rank() == 0:
        return _error_of(_call(shard=shard))
    terms: dict[str, Any] = {"bias": None, "shard": shard, "logit_scale": 1.0, "softcap": None}
    return _error_of(lambda: token_statistics(torch.zeros(3, 8), torch.zeros(shard.num_rows, 8), **terms))


def test_ranks_that_call_different_things_all_raise(ranks: RankPool) -> None:
    for said in ranks.run(2, _different_things_at_once, timeout=20):
        assert "must be equal on all ranks, got rank 0" in said


def _bad_label(layout: Layout, label: int, at_rank: int) -> str:
    labels = torch.zeros(3, dtype=torch.int64)
    if layout == "replicated" or dist.get_rank() == at_rank:
        labels[1] = label
    return _error_of(_call(layout=layout, labels=labels))


@every_layout
@pytest.mark.parametrize("label", [40, -1])
@pytest.mark.parametrize("at_rank", [0, 2])
def test_a_label_out_of_range_raises_on_every_rank(ranks: RankPool, layout: Layout, label: int, at_rank: int) -> None:
    for said in ranks.run(3, _bad_label, layout, label, at_rank, timeout=20):
        assert "labels must be in [0, 40)" in said
        assert str(label) in said


def _later_fault(layout: Layout) -> list[str]:
    """After the agreement one rank comes with a label out of range, then all go on."""
    shard = VocabShard.even(40, dist.group.WORLD, dist.group.WORLD if layout == "sharded" else None)
    _call(shard=shard)()
    labels = torch.zeros(3, dtype=torch.int64)
    if layout == "replicated" or dist.get_rank() == 1:
        labels[0] = 77
    said = _error_of(_call(shard=shard, labels=labels))
    return [said, _error_of(_call(shard=shard))]


@every_layout
def test_a_label_out_of_range_in_a_later_call_raises_on_every_rank(ranks: RankPool, layout: Layout) -> None:
    for said, then in ranks.run(2, _later_fault, layout, timeout=20):
        assert "77" in said
        assert then == "no error"


def _evaluation_between() -> list[float]:
    shard = VocabShard.even(40, dist.group.WORLD, dist.group.WORLD)
    losses = [float(_call(shard=shard)())]
    with torch.no_grad():
        losses.append(float(_call(shard=shard, reduction="sum", grad=False)()))
        losses.append(float(_call(shard=shard, reduction="sum", grad=False)()))
    losses.append(float(_call(shard=shard)()))
    return losses


def test_evaluation_may_use_other_settings_than_training(ranks: RankPool) -> None:
    for first, sum_, again, last in ranks.run(2, _evaluation_between, timeout=20):
        assert first == last == pytest.approx(torch.tensor(40.0).log().item())
        assert sum_ == again == pytest.approx(3 * first)


def _wrong_groups() -> list[str]:
    world = dist.group.WORLD
    pair = dist.new_group([0, 1])
    other = dist.new_group([1, 2])
    rank = dist.get_rank()
    said = []
    if rank < 2:
        said.append(_error_of(lambda: VocabShard(((0, 40),), 40, pair, world)))
    if rank == 1:
        said.append(_error_of(lambda: VocabShard(((0, 40),), 40, pair, other)))
    return said


def test_a_token_group_outside_the_vocabulary_group_is_refused(ranks: RankPool) -> None:
    for said in ranks.run(3, _wrong_groups):
        assert all("token_group must be a subset of vocab_group" in text for text in said)


def _token_groups_of_unequal_size() -> str:
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    return _error_of(_call(shard=VocabShard.even(40, dist.group.WORLD, groups[dist.get_rank() // 2])))


def test_token_groups_of_unequal_size_raise_on_every_rank(ranks: RankPool) -> None:
    for said in ranks.run(3, _token_groups_of_unequal_size, timeout=20):
        assert "token_group must be equal on all ranks" in said
