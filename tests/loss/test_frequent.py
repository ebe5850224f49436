"""Frequent rows: taken out of the tiles, computed densely, shared out by tokens; the results are those without them.

What is filtered is nothing (an eps of 1e-30) where results are compared with full logits.
"""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import (
    DEVICE,
    TRITON_DTYPES,
    Problem,
    assert_bitwise,
    assert_no_worse,
    assert_repeats,
    cce_outcome,
    leaf,
    make_problem,
    plain_outcome,
    relative_error,
)
from sharded import Layout, Runs, assert_ranks_no_worse, device_of, make_rank_problem, make_shard, part_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cce_dist import collectives, linear_cross_entropy
from cce_dist.kernels import torch_backend
from cce_dist.kernels.problem import TILE, Filter, Logits
from cce_dist.kernels.triton import backend as triton_backend
from cce_dist.kernels.triton import select
from cce_dist.loss import autograd, frequent
from cce_dist.loss.frequent import MOST_COUNTED, LabelCounts, counts_of, most_frequent
from cce_dist.shard import VocabShard

KEEP_ALL: dict[str, Any] = {"gradient": "filtered", "filter_eps": 1e-30}
SHAPES = ((13,), (4,), (0,), (9,))
every_backend = pytest.mark.parametrize("backend", ["torch", "triton"])
every_layout_and_grid = pytest.mark.parametrize("layout", ["replicated", "sharded", "grid"])


def parts(world: int, layout: Layout) -> tuple[tuple[int, ...], ...]:
    return SHAPES[: part_of(world - 1, layout) + 1]


# The results are those of full logits


@every_backend
@pytest.mark.parametrize("number", [1, 100, 256, 5000])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True, "softcap": 5.0, "logit_scale": 0.7, "lse_gradient": True}, {"logit_scale": 0.0}],
    ids=["plain", "every option", "no scale"],
)
def test_any_number_of_rows_gives_the_gradient_of_full_logits(
    options: dict[str, Any], number: int, backend: str
) -> None:
    problem = make_problem(((2, 11),), 500, reduction="none", **options)
    got = cce_outcome(problem, backend=backend, frequent_rows=number, **KEEP_ALL)
    assert_no_worse(got, problem)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_every_dtype_in_triton(bias: bool, dtype: torch.dtype) -> None:
    problem = make_problem(((19,),), 300, dtype=dtype, bias=bias)
    assert_no_worse(cce_outcome(problem, backend="triton", frequent_rows=90, **KEEP_ALL), problem)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_the_first_pass_in_8_bits(softcap: float | None) -> None:
    problem = make_problem(((40,),), 700, 64, dtype=torch.float16, softcap=softcap, spread=4.0)
    settings = {"backend": "triton", "gradient": "filtered", "filter_eps": 2.0**-14, "first_pass": "fp8"}
    got = cce_outcome(problem, frequent_rows=200, **settings)
    truth = plain_outcome(problem, torch.float64)
    assert relative_error(got.lse[0], truth.lse[0]) < 2e-3
    for name in ("dhidden", "dweight"):
        assert relative_error(getattr(got, name)[0], getattr(truth, name)[0]) < 2e-2


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@every_layout_and_grid
@pytest.mark.parametrize("number", [7, 250, 601])
def test_ranks_agree_with_full_logits(ranks: RankPool, number: int, layout: Layout, world: int) -> None:
    """Also with more rows than a shard holds, and a rank without a token."""
    if layout == "grid" and world != 4:
        pytest.skip("a grid has four ranks")
    problem = make_rank_problem(parts(world, layout), 601, bias=True, lse_gradient=True, softcap=9.0)
    assert_ranks_no_worse(ranks, world, problem, layout, frequent_rows=number, **KEEP_ALL)


EMPTY: Runs = [((0, 300),), (), ((300, 601),)]
MANY: Runs = [((0, 50), (300, 500)), ((50, 300),), ((500, 601),)]


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
@pytest.mark.parametrize("runs", [EMPTY, MANY], ids=["an empty shard", "many runs"])
def test_any_runs_that_tile_the_vocabulary(ranks: RankPool, runs: Runs, layout: Layout) -> None:
    problem = make_rank_problem(parts(3, layout), 601, bias=True)
    assert_ranks_no_worse(ranks, 3, problem, layout, runs, frequent_rows=120, **KEEP_ALL)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_ranks_agree_with_full_logits_in_triton(ranks: RankPool, dtype: torch.dtype, layout: Layout) -> None:
    # Where one token has most of the gradient, the error is that of one logit, computed twice: a matter of luck, which
    # differs from one CPU to the next.
    tokens = ((40,),) if layout == "replicated" else ((40,), (17,))
    problem = make_rank_problem(tokens, 300, 16, dtype=dtype, bias=True, lse_gradient=True, spread=1.0)
    assert_ranks_no_worse(ranks, 2, problem, layout, frequent_rows=130, backend="triton", **KEEP_ALL)


def test_ranks_agree_in_8_bits(ranks: RankPool) -> None:
    problem = make_rank_problem(((9,), (5,)), 2 * TILE, 32, dtype=torch.float16)
    got = ranks.run(2, _lse_in_8_bits, problem)
    for mine, truth in zip(got, plain_outcome(problem, torch.float64).lse, strict=True):
        assert relative_error(mine, truth) < 3e-3


def _lse_in_8_bits(problem: Problem) -> Tensor:
    problem = problem.to(device_of({"backend": "triton"}))
    part = part_of(dist.get_rank(), "sharded")
    shard = make_shard(problem, "sharded")
    _, lse = linear_cross_entropy(
        leaf(problem.hidden[part]),
        leaf(problem.weight[shard.start : shard.stop]),
        problem.labels[part],
        shard=shard,
        return_lse=True,
        frequent_rows=100,
        backend="triton",
        first_pass="fp8",
        gradient="filtered",
        filter_eps=2.0**-14,
    )
    return lse.detach().cpu()


@every_backend
def test_lse_has_the_same_bits_with_and_without_a_gradient_and_frequent_rows(backend: str) -> None:
    problem = make_problem(((30,),), 500, spread=6.0)
    settings = {"backend": backend, "gradient": "unbiased", "filter_eps": 0.01, "first_pass": "full", "seed": 0}
    with_rows = cce_outcome(problem, frequent_rows=100, **settings)
    without = cce_outcome(problem, frequent_rows=0, **settings)
    with torch.no_grad():
        _, evaluated = linear_cross_entropy(
            problem.hidden[0], problem.weight, problem.labels[0], return_lse=True, frequent_rows=100, backend=backend
        )
    assert_bitwise(with_rows.lse[0], without.lse[0])
    assert_bitwise(with_rows.lse[0], evaluated)


# What is sampled


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.full)])
def test_the_mean_over_draws_is_the_exact_gradient(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With u = (k + ½)/K for all draws, the mean over k tends to it as 1/K."""
    problem = make_problem(((12,),), 6 * TILE, spread=3.0, ignored=0.0)
    stock, uniform = autograd.filter_of, 0.0
    monkeypatch.setattr(autograd, "filter_of", lambda *call: stock(*call)._replace(uniform=uniform))
    truth = plain_outcome(problem, torch.float64).dweight[0]
    errors = []
    for count in (1, 8, 32):
        mean = torch.zeros_like(truth)
        for k in range(count):
            uniform = (k + 0.5) / count
            got = cce_outcome(problem, backend=backend, gradient="unbiased", filter_eps=0.25, frequent_rows=60)
            mean += got.dweight[0].double() / count
        errors.append(relative_error(mean, truth))
    assert errors[0] > 0.02, "something must be drawn"
    assert errors[1] < 4 * errors[0] / 8
    assert errors[2] < 4 * errors[0] / 32


def test_both_backends_choose_and_draw_alike() -> None:
    problem = make_problem(((24,),), 6 * TILE, spread=4.0)
    settings = {"gradient": "unbiased", "filter_eps": 0.05, "frequent_rows": 70, "seed": 3}
    one, two = (cce_outcome(problem, backend=backend, **settings) for backend in ("torch", "triton"))
    assert relative_error(one.dweight[0], plain_outcome(problem).dweight[0]) > 1e-3
    assert relative_error(one.dweight[0], two.dweight[0]) < 1e-5
    assert relative_error(one.dhidden[0], two.dhidden[0]) < 1e-5


def test_tiles_of_frequent_rows_alone_keep_no_pair() -> None:
    """The first tiles of a split are its reference; where they are −inf, nothing is kept for that."""
    tokens, vocab = 40, 8 * TILE
    hidden_ND = torch.randn(tokens, 32, device=DEVICE)
    weight_VD = torch.randn(vocab, 32, device=DEVICE)
    slot_V = torch.full((vocab,), -1, dtype=torch.int32, device=DEVICE)
    slot_V[: 3 * TILE] = torch.arange(3 * TILE, dtype=torch.int32, device=DEVICE)
    index_N = torch.arange(tokens, dtype=torch.int32, device=DEVICE)
    target_N = torch.full_like(index_N, -1)
    number = torch.full((1,), tokens, dtype=torch.int32, device=DEVICE)
    key_T = torch.arange(8, dtype=torch.int32, device=DEVICE)
    logits = Logits(hidden_ND, weight_VD, None, target_N, index_N, index_N, key_T, number, 1.0, None, frequent_V=slot_V)
    for backend in (torch_backend, triton_backend):
        summary = backend.summarise(logits, True, 1 << 20)
        tiles = summary.tiles
        assert tiles is not None
        assert (tiles.lse_TN[:3] == -torch.inf).all()
        assert tiles.lse_TN[3:].isfinite().all()
        lse_N = torch.logsumexp(hidden_ND @ weight_VD.T, 1)
        if backend is triton_backend:
            pairs = select.select(logits, tiles, lse_N / summary.unit, Filter("filtered", 1e-4))
            count_T = select.kept_tokens(logits, pairs).count_T
        else:
            everything = slice(0, tokens)
            weight_TN, _ = torch_backend.keep(
                logits, tiles, lse_N, lse_N, Filter("filtered", 1e-4), slice(0, 8), everything
            )
            count_T = (weight_TN != 0).sum(1)
        assert count_T[:3].tolist() == [0, 0, 0]
        assert (count_T[3:] > 0).all()


# The choice, and what it is made from


def test_the_most_frequent_rows_are_chosen_and_of_equal_counts_the_smaller_ids() -> None:
    counts_V = torch.tensor([0, 5, 2, 0, 3, 2, 7, 2], dtype=torch.int32)
    assert most_frequent(counts_V, 3).tolist() == [1, 4, 6]
    assert most_frequent(counts_V, 4).tolist() == [1, 2, 4, 6]
    assert most_frequent(counts_V, 6).tolist() == [1, 2, 4, 5, 6, 7]
    assert most_frequent(counts_V, 7).tolist() == [0, 1, 2, 4, 5, 6, 7]
    large_V = torch.zeros(1 << 18, dtype=torch.int32)
    large_V[1 << 17 :] = MOST_COUNTED
    assert most_frequent(large_V, 2).tolist() == [1 << 17, (1 << 17) + 1]


def test_counts_are_halved_before_they_overflow_and_follow_the_data() -> None:
    counts, none = LabelCounts(torch.zeros(5, dtype=torch.int32)), torch.tensor([4])
    counts.counts_V[0] = MOST_COUNTED
    for _ in range(16):
        counts.count(torch.tensor([1, 4]))
    assert counts.counts_V.tolist() == [MOST_COUNTED // 2, 8, 0, 0, 8]
    for _ in range(30):  # of another text
        counts.counts_V[2] += MOST_COUNTED // 2
        for _ in range(16):
            counts.count(none)
    assert most_frequent(counts.counts_V[:-1], 1).tolist() == [2]
    assert counts.counts_V[0] < MOST_COUNTED // 2**20
    assert int(counts.counts_V[:-1].sum()) <= MOST_COUNTED


class Model:
    """A classifier, and the counts of its labels."""

    def __init__(self, vocab: int = 300) -> None:
        self.weight = nn.Parameter(torch.randn(vocab, 16))
        self.labels = torch.randint(vocab, (20,))
        self.hidden = torch.randn(20, 16, requires_grad=True)

    def loss(self, labels: Tensor | None = None, **settings: Any) -> Tensor:
        settings = {"gradient": "unbiased", "filter_eps": 0.01, "seed": torch.tensor(1), "frequent_rows": 9, **settings}
        return linear_cross_entropy(self.hidden, self.weight, self.labels if labels is None else labels, **settings)

    @property
    def counts(self) -> Tensor:
        shard = VocabShard.whole(self.weight.shape[0])
        return counts_of(self.weight, shard, self.weight.device).counts_V[:-1]

    def expected(self, calls: int) -> list[int]:
        return (calls * torch.bincount(self.labels, minlength=self.weight.shape[0])).tolist()


def test_labels_count_in_backward_once_a_call() -> None:
    model, other = Model(), Model()
    loss = model.loss()
    assert not model.counts.any()
    loss.backward(retain_graph=True)
    assert model.counts.tolist() == model.expected(1)
    loss.backward()
    assert model.counts.tolist() == model.expected(1)
    with torch.no_grad():
        model.loss()
    assert model.counts.tolist() == model.expected(1)
    model.loss().backward()
    assert model.counts.tolist() == model.expected(2)
    assert not other.counts.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_call_counts_once(reentrant: bool) -> None:
    model, plain = Model(), Model()
    plain.weight, plain.labels, plain.hidden = nn.Parameter(model.weight.detach().clone()), model.labels, model.hidden
    for _ in range(3):
        checkpoint(lambda hidden: model.loss(), model.hidden, use_reentrant=reentrant).backward()
        recomputed, model.hidden.grad = model.hidden.grad, None
        plain.loss().backward()
        assert_repeats(recomputed, plain.hidden.grad)
        model.hidden.grad = None
    assert model.counts.tolist() == model.expected(3)


def test_counts_go_with_their_classifier() -> None:
    model = Model()
    model.loss().backward()
    gc.collect()
    before = len(frequent._counts)
    del model
    gc.collect()
    assert len(frequent._counts) == before - 1


def test_a_classifier_that_is_computed_counts_nothing_and_may_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    model.loss().backward()
    monkeypatch.setattr(frequent, "_is_capturing", lambda device: True)
    computed = model.weight * 1.0
    loss = linear_cross_entropy(model.hidden, computed, model.labels, gradient="unbiased", frequent_rows=9)
    loss.backward()
    assert model.counts.tolist() == model.expected(1)
    with pytest.raises(RuntimeError, match="with the same weight and shard, once before capturing"):
        Model().loss()


def test_counts_that_a_cuda_graph_writes_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    model.loss().backward()
    counts = weakref.ref(counts_of(model.weight, VocabShard.whole(300), model.weight.device))
    monkeypatch.setattr(frequent, "_is_capturing", lambda device: True)
    monkeypatch.setattr(frequent, "_CAPTURED", set())
    model.loss().backward()
    del model
    gc.collect()
    assert counts() is not None
    frequent._CAPTURED.clear()
    gc.collect()
    assert counts() is None


@pytest.mark.parametrize("first", [0, 1])
def test_two_forwards_and_then_two_backwards_in_either_order(first: int) -> None:
    """Each backward is of the rows that its own forward chose, whatever was counted or chosen since."""
    model, batches = Model(), [torch.randint(300, (20,)) for _ in range(2)]

    def gradients(order: tuple[int, ...]) -> dict[int, tuple[Tensor, ...]]:
        own, losses = Model(), []
        own.weight, own.hidden = nn.Parameter(model.weight.detach().clone()), model.hidden
        for labels in batches:
            losses.append(own.loss(labels))
            counts_of(own.weight, VocabShard.whole(300), own.weight.device).chosen.clear()
        return {index: torch.autograd.grad(losses[index], (own.hidden, own.weight)) for index in order}

    both = gradients((first, 1 - first))
    for index in (0, 1):
        for got, expected in zip(both[index], gradients((index,))[index], strict=True):
            assert_repeats(got, expected)


def test_rows_are_chosen_anew_after_more_and_more_calls_and_follow_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chosen = Model(), list[Tensor]()
    stock = frequent.most_frequent
    monkeypatch.setattr(frequent, "most_frequent", lambda *call: chosen.append(stock(*call)) or chosen[-1])
    one, two = torch.arange(20) % 9, 100 + torch.arange(20) % 9
    calls: list[int] = []
    for call in range(50):
        model.loss(one if call < 8 else two).backward()
        calls += [call] * (len(chosen) - len(calls))
    assert calls == [0, 1, 2, 4, 8, 16, 32, 48]
    assert chosen[0].tolist() == chosen[3].tolist() == list(range(9))
    assert chosen[-1].tolist() == list(range(100, 109))


# What ranks say to each other


def test_ranks_with_other_counts_are_told_on_every_rank(ranks: RankPool) -> None:
    for text in ranks.run(2, _altered_counts):
        assert "the ranks chose different frequent rows" in text
        assert "frequent_rows=0" in text


def _altered_counts() -> str:
    world = dist.group.WORLD
    shard = VocabShard.even(300, world, world)
    weight = nn.Parameter(torch.randn(shard.num_rows, 8))
    hidden = torch.randn(6, 8, requires_grad=True)
    settings: dict[str, Any] = {"gradient": "unbiased", "frequent_rows": 5, "shard": shard}
    linear_cross_entropy(hidden, weight, torch.arange(6), **settings).backward()
    if dist.get_rank() == 1:
        counts_of(weight, shard, weight.device).counts_V[200] += 30
    try:
        linear_cross_entropy(hidden, weight, torch.arange(6), **settings)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_a_bias_of_other_dtypes_on_other_ranks_is_the_same_bias(ranks: RankPool) -> None:
    assert all(ranks.run(2, _bias_of_two_dtypes))


def _bias_of_two_dtypes() -> bool:
    world = dist.group.WORLD
    shard = VocabShard.even(300, world)
    torch.manual_seed(0)
    weight, bias, hidden = torch.randn(300, 8), torch.randn(300).bfloat16().float(), torch.randn(6, 8)
    own = slice(shard.start, shard.stop)
    dtype = torch.float32 if dist.get_rank() else torch.bfloat16
    parts = leaf(weight[own]), leaf(bias[own].to(dtype))
    loss = linear_cross_entropy(
        hidden, parts[0], torch.arange(6), bias=parts[1], shard=shard, frequent_rows=5, **KEEP_ALL
    )
    loss.backward()
    whole = leaf(weight), leaf(bias)
    torch.nn.functional.cross_entropy(hidden @ whole[0].T + whole[1], torch.arange(6)).backward()
    assert whole[0].grad is not None
    assert parts[0].grad is not None
    return relative_error(parts[0].grad, whole[0].grad[own]) < 1e-5


def test_ranks_that_count_with_other_things_are_told_so(ranks: RankPool) -> None:
    for text in ranks.run(2, _parameter_on_one_rank):
        assert "what labels are counted with must be equal on all ranks" in text
        assert "rank 0: the parameter, rank 1: the shard" in text


def _parameter_on_one_rank() -> str:
    shard = VocabShard.even(300, dist.group.WORLD)
    weight: Tensor = torch.randn(shard.num_rows, 8)
    weight = leaf(weight) if dist.get_rank() else nn.Parameter(weight)
    try:
        linear_cross_entropy(torch.randn(6, 8), weight, torch.arange(6), shard=shard, frequent_rows=5, **KEEP_ALL)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_a_micro_step_without_backward_keeps_the_ranks_together(ranks: RankPool) -> None:
    assert all(ranks.run(2, _skipped_micro_step))


def _skipped_micro_step() -> bool:
    torch.manual_seed(dist.get_rank())
    world = dist.group.WORLD
    shard = VocabShard.even(300, world, world)
    weight = nn.Parameter(torch.randn(shard.num_rows, 8))
    for step in range(4):
        hidden = torch.randn(6, 8, requires_grad=True)
        labels = torch.randint(300, (6,))
        loss = linear_cross_entropy(hidden, weight, labels, gradient="unbiased", frequent_rows=5, shard=shard)
        if step != 2:
            loss.backward()
    return int(counts_of(weight, shard, weight.device).counts_V.sum()) == 3 * 12


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_no_more_of_the_classifier_moves_than_the_frequent_rows(ranks: RankPool, layout: Layout) -> None:
    """Every collective's elements: those of N tokens, and of K rows, forth in their dtype and back in fp32."""
    number, width, tokens = 23, 24, 10
    problem = make_rank_problem(((tokens,),) if layout == "replicated" else ((tokens // 2,), (tokens // 2,)), 601)
    for sizes in ranks.run(2, _collective_bytes, problem, layout, number):
        assert sizes.count(4 * number * width) == 2, "the rows, and their gradient"
        of_tokens = 4 * tokens * width
        assert all(size <= max(of_tokens, 4 * number * width) for size in sizes), sizes
        assert 4 * number * width < 4 * 300 * width


def _collective_bytes(problem: Problem, layout: Layout, number: int) -> list[int]:
    sizes: list[int] = []

    def recorded(stock: Callable[..., Any], which: int) -> Callable[..., Any]:
        def call(*tensors: Any, **options: Any) -> Any:
            sizes.append(tensors[which].nbytes)
            return stock(*tensors, **options)

        return call

    part, shard = part_of(dist.get_rank(), layout), make_shard(problem, layout)
    weight = leaf(problem.weight[shard.start : shard.stop])
    hidden = leaf(problem.hidden[part])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", recorded(dist.all_reduce, 0))
        patch.setattr(collectives, "_all_gather", recorded(collectives._all_gather, 0))
        patch.setattr(collectives, "_reduce_scatter", recorded(collectives._reduce_scatter, 1))
        loss = linear_cross_entropy(
            hidden, weight, problem.labels[part], shard=shard, gradient="unbiased", frequent_rows=number
        )
        loss.backward()
    return sizes


def test_frequent_rows_must_be_a_number() -> None:
    for wrong in (-1, 2.5, "many"):
        with pytest.raises(ValueError, match="frequent_rows must be an int, 0 or more"):
            Model().loss(frequent_rows=wrong)


@every_backend
def test_a_nan_in_a_valid_token_reaches_loss_and_gradients_and_in_an_ignored_one_nothing(backend: str) -> None:
    problem = make_problem(((20,),), 300, reduction="none")
    labels = problem.labels[0].clone()
    labels[3], labels[5] = -100, 7
    for place, reaches in ((3, False), (5, True)):
        hidden = problem.hidden[0].clone()
        hidden[place] = torch.nan
        with_nan = replace(problem, hidden=(hidden,), labels=(labels,))
        got = cce_outcome(with_nan, backend=backend, gradient="unbiased", filter_eps=0.01, seed=1, frequent_rows=40)
        assert bool(got.loss[0][place].isnan()) == reaches
        assert bool(got.dhidden[0][place].isnan().all()) == reaches
        assert bool(got.dweight[0].isnan().any()) == reaches
        others = torch.arange(20) != place
        assert got.dhidden[0][others].isfinite().all()
