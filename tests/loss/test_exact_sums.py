"""``exact_sums``: the bits of a token's log-probability do not depend on the other tokens, on its place among them, or
on the ranks that share the vocabulary; how far they are from fp64; what is refused.

Shapes: N tokens, n some of them, D hidden, V rows of the vocabulary.
"""

import importlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankPool
from reference import (
    DEVICE,
    ROUNDING,
    TRITON_DTYPES,
    Problem,
    assert_bitwise,
    grad_of,
    leaf,
    make_problem,
    relative_error,
)
from sharded import Layout, Runs, device_of, local_rows, make_shard, part_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from cce_dist import CCEConfig, ShardedCCEHead, VocabShard, linear_logprobs
from cce_dist.collectives import merge_exactly
from cce_dist.heads.lazy import make_lazy
from cce_dist.heads.owner import ModuleOwner
from cce_dist.kernels import torch_backend
from cce_dist.kernels.problem import MOST_SUMMED, SUM_BITS, TILE, TileSums
from cce_dist.loss.exact_sums import lay_out
from cce_dist.loss.settings import LogprobSettings, check_settings, resolve

VOCAB = 5 * TILE + 37
ALL_OPTIONS = {"bias": True, "softcap": 9.0, "logit_scale": -0.7}
BACKENDS = [
    *(pytest.param("torch", dtype, id=f"torch-{dtype}") for dtype in (torch.float32, torch.bfloat16, torch.float64)),
    *(pytest.param("triton", dtype, id=f"triton-{dtype}") for dtype in (torch.float32, torch.float16)),
    pytest.param("triton", torch.bfloat16, id="triton-torch.bfloat16", marks=pytest.mark.gpu),
]
every_backend = pytest.mark.parametrize("backend", ["torch", "triton"])
every_dtype = pytest.mark.parametrize(("backend", "dtype"), BACKENDS)


class Values(NamedTuple):
    logprob: Tensor
    lse: Tensor


def make_tokens(tokens: int, vocab: int = VOCAB, dim: int = 24, **options: Any) -> tuple[Problem, Tensor]:
    """Tokens of one part, some of them ignored, and a temperature for each; every 97th row is ruled out by its bias."""
    problem = make_problem([(tokens,)], vocab, dim, **options)
    if problem.bias is not None:
        ruled_out_V = torch.arange(problem.bias.shape[0], device=problem.bias.device) % 97 == 5
        problem = replace(problem, bias=problem.bias.masked_fill(ruled_out_V, -torch.inf))
    heat_N = 0.5 + torch.rand(tokens, generator=torch.Generator().manual_seed(1))
    return problem, heat_N.to(problem.weight.device)


def values(
    problem: Problem,
    heat_N: Tensor,
    shard: VocabShard | None = None,
    token_n: Tensor | Sequence[int] | slice = slice(None),
    **given: Any,
) -> Values:
    """Of some tokens of the problem."""
    (hidden_ND,), (labels_N,), rows = problem.hidden, problem.labels, problem.weight.shape[0]
    shard = shard or VocabShard(((0, rows),), problem.vocab_size, None)
    found = linear_logprobs(
        hidden_ND[token_n],
        local_rows(problem.weight, shard),
        labels_N[token_n],
        bias=None if problem.bias is None else local_rows(problem.bias, shard),
        shard=shard,
        temperature=heat_N[token_n],
        exact_sums=True,
        **{**problem.options, **given},
    )
    return Values(found.logprob, found.lse)


def assert_same(got: Values, wanted: Values) -> None:
    for g, w in zip(got, wanted, strict=True):
        assert_bitwise(g, w.to(g.device))


# Other tokens, and the place among them


def assert_batch_invariant(problem: Problem, heat_N: Tensor, **given: Any) -> None:
    tokens = heat_N.shape[0]
    whole = values(problem, heat_N, **given)
    assert whole.lse.isfinite().all() and whole.lse.count_nonzero() > tokens // 2
    assert (whole.logprob <= 0).all()
    draw = torch.Generator().manual_seed(2)
    parts = [torch.arange(tokens - 1, -1, -1), torch.arange(3, 20), torch.randperm(tokens, generator=draw)]
    parts += torch.arange(tokens).split(tokens // 2)
    parts += [torch.arange(tokens)[problem.labels[0].cpu() != -100][token : token + 2] for token in (0, 5, 9, -1)]
    for token_n in parts:
        token_n = token_n.to(heat_N.device)
        assert_same(values(problem, heat_N, None, token_n, **given), Values(*(x[token_n] for x in whole)))


@every_dtype
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all"])
def test_a_token_has_the_same_bits_in_every_batch(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    problem, heat_N = make_tokens(37, dtype=dtype, **options)
    assert_batch_invariant(problem, heat_N, backend=backend)


@every_backend
def test_neither_do_ignored_tokens_padding_rows_and_where_rows_begin_in_memory_change_a_bit(backend: str) -> None:
    problem, heat_N = make_tokens(21, padding_rows=50, dtype=torch.float16, bias=True)
    wanted = values(problem, heat_N, backend=backend)
    fewer_N = torch.where(torch.arange(21, device=DEVICE) % 3 == 0, -100, problem.labels[0])
    fewer = values(replace(problem, labels=(fewer_N,)), heat_N, backend=backend)
    assert_same(fewer, Values(*(x.masked_fill(fewer_N == -100, 0) for x in wanted)))
    flat = torch.empty(problem.weight.numel() + 1, dtype=torch.float16, device=DEVICE)
    moved = flat[1:].view(problem.weight.shape).copy_(problem.weight)
    moved[VOCAB:] = torch.nan
    assert_same(values(replace(problem, weight=moved), heat_N, backend=backend), wanted)


@every_backend
@pytest.mark.parametrize("gradient", ["exact", "unbiased", "filtered"])
def test_bits_do_not_depend_on_the_gradient_that_is_wanted(backend: str, gradient: str) -> None:
    problem, heat_N = make_tokens(9)
    wanted = values(problem, heat_N, backend=backend)
    trained = replace(problem, hidden=(leaf(problem.hidden[0]),), weight=leaf(problem.weight))
    got = values(trained, heat_N, backend=backend, gradient=gradient, frequent_rows=30)
    assert got.logprob.requires_grad and got.lse.requires_grad
    assert_same(Values(*(x.detach() for x in got)), wanted)


# Ranks


Way = tuple[Layout, Runs | None, Sequence[int]]
"""Layout, runs of rows, and where the tokens of each part begin and end (but where all ranks bring the same)."""
EVEN: dict[int, list[Way]] = {
    1: [("replicated", None, ()), ("sharded", None, (0, 26))],
    2: [("replicated", None, ()), ("sharded", None, (0, 9, 26))],
    4: [("replicated", None, ()), ("sharded", None, (0, 11, 11, 12, 26)), ("grid", None, (0, 17, 26))],
}
UNEVEN: dict[int, list[Way]] = {
    2: [
        ("replicated", [((0, 37), (200, VOCAB)), ((37, 200),)], ()),
        ("sharded", [(), ((0, VOCAB),)], (0, 1, 26)),
    ],
    4: [
        # Tile 1 is of three ranks, tile 2 of two runs of one rank, apart there, around a row of another.
        (
            "sharded",
            [((0, 130), (256, 300), (301, 350)), (), ((130, 140), (300, 301)), ((140, 256), (350, VOCAB))],
            (0, 7, 9, 20, 26),
        ),
    ],
}


def on_rank(problem: Problem, heat_N: Tensor, ways: Sequence[Way], given: dict[str, Any]) -> list[Values]:
    device = device_of(given)
    problem, heat_N = problem.to(device), heat_N.to(device)
    found = []
    for layout, runs, cuts in ways:
        own = slice(*cuts[part_of(dist.get_rank(), layout) :][:2]) if cuts else slice(None)
        shard = make_shard(problem, layout, runs)
        found.append(Values(*(x.cpu() for x in values(problem, heat_N, shard, own, **given))))
    return found


def assert_same_on_ranks(
    ranks: RankPool, ways: dict[int, list[Way]], problem: Problem, heat_N: Tensor, **given: Any
) -> None:
    device = device_of(given)
    wanted = values(problem.to(device), heat_N.to(device), **given)
    for world in ways:
        by_rank = ranks.run(world, on_rank, problem, heat_N, ways[world], given)
        for index, (layout, _, cuts) in enumerate(ways[world]):
            for rank, found in enumerate(by_rank):
                part = part_of(rank, layout)
                own = slice(cuts[part], cuts[part + 1]) if cuts else slice(None)
                assert_same(found[index], Values(*(x[own].cpu() for x in wanted)))


def for_ranks(tokens: int = 26, **options: Any) -> tuple[Problem, Tensor]:
    return make_tokens(tokens, device="cpu", **options)


RANK_DTYPES = [("torch", torch.float32), ("triton", torch.float16)]


@pytest.mark.parametrize(("backend", "dtype"), RANK_DTYPES, ids=["torch", "triton"])
def test_any_number_of_ranks_gives_the_same_bits(ranks: RankPool, backend: str, dtype: torch.dtype) -> None:
    problem, heat_N = for_ranks(dtype=dtype, padding_rows=26, **ALL_OPTIONS)
    assert_same_on_ranks(ranks, EVEN, problem, heat_N, backend=backend)


@pytest.mark.parametrize(("backend", "dtype"), RANK_DTYPES, ids=["torch", "triton"])
def test_uneven_and_empty_shards_give_the_same_bits(ranks: RankPool, backend: str, dtype: torch.dtype) -> None:
    problem, heat_N = for_ranks(dtype=dtype, bias=True)
    assert_same_on_ranks(ranks, UNEVEN, problem, heat_N, backend=backend)


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float64), ("torch", torch.bfloat16), ("triton", torch.float32)],
    ids=["torch-64", "torch-16", "triton-32"],
)
def test_so_do_ranks_in_other_dtypes(
    ranks: RankPool, backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    problem, heat_N = for_ranks(dtype=dtype, **options)
    assert_same_on_ranks(ranks, EVEN, problem, heat_N, backend=backend)
    assert_same_on_ranks(ranks, UNEVEN, problem, heat_N, backend=backend)


def _on_other_shards(problem: Problem, heat_N: Tensor) -> list[bool]:
    """Shards that one rank builds anew, its rows unchanged: the others' are not what they were."""
    (first, second), wanted = _two_splits(), values(problem, heat_N)
    shards = [make_shard(problem, "replicated", first)]
    shards.append(shards[0] if dist.get_rank() == 0 else make_shard(problem, "replicated", second))
    return [torch.equal(values(problem, heat_N, shard).lse, wanted.lse) for shard in shards]


def _two_splits() -> tuple[Runs, Runs]:
    return tuple([((0, 100),), ((100, middle),), ((middle, VOCAB),)] for middle in (200, 300))  # type: ignore[return-value]


def test_shards_that_other_ranks_build_anew_are_heard_of(ranks: RankPool) -> None:
    assert all(same for found in ranks.run(3, _on_other_shards, *for_ranks(5)) for same in found)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [100, 256, 2048], ids=["by pointers", "256", "2048"])
def test_bits_are_the_same_on_a_gpu(ranks: RankPool, dim: int) -> None:
    vocab = 40 * TILE + 37
    problem, heat_N = make_tokens(1000, vocab, dim, dtype=torch.bfloat16, **ALL_OPTIONS)
    assert_batch_invariant(problem, heat_N, backend="triton")
    problem, heat_N = problem.to("cpu"), heat_N.cpu()
    cut = [((0, 37), (200, 2000)), (), ((37, 200), (2000, 2001)), ((2001, vocab),)]
    ways: dict[int, list[Way]] = {
        2: [("replicated", None, ()), ("sharded", None, (0, 333, 1000))],
        4: [("replicated", cut, ()), ("sharded", cut, (0, 1, 700, 700, 1000))],
    }
    assert_same_on_ranks(ranks, ways, problem, heat_N, backend="triton")


# Who sums which tile


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.data())
def test_every_tile_is_summed_once_of_its_own_rows(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(1, 6 * TILE))
    padded = vocab + data.draw(st.integers(0, TILE))
    number = data.draw(st.integers(1, 4))
    cuts = sorted({0, padded, *data.draw(st.lists(st.integers(1, padded), max_size=8))})
    runs: list[list[tuple[int, int]]] = [[] for _ in range(number)]
    for start, stop in itertools.pairwise(cuts):
        runs[data.draw(st.integers(0, number - 1))].append((start, stop))
    runs_of_ranks = [tuple(of_rank) for of_rank in runs]
    layouts = [lay_out(runs_of_ranks, rank, vocab) for rank in range(number)]
    assert len({tuple(layout.seam_G) for layout in layouts}) == 1
    global_rows = [[row for start, stop in of_rank for row in range(start, stop)] for of_rank in runs_of_ranks]
    seam_rows = [-1] * len(layouts[0].local_K)
    for layout, rows in zip(layouts, global_rows, strict=True):
        for k, local in enumerate(layout.local_K):
            if local >= 0:
                assert seam_rows[k] == -1, "a row is of one rank"
                seam_rows[k] = rows[local]
    summed = []
    for layout, rows in zip(layouts, global_rows, strict=True):
        summed += [rows[row : row + count] for row, count in layout.own]
        summed += [seam_rows[row : row + count] for row, count in layout.seams]
        for row, count in layout.seams:
            assert seam_rows[row] in rows, "by the rank of its first row"
            assert layout.seam_G[seam_rows[row] // TILE] == row // TILE
            assert seam_rows[row + count : row + TILE] == [-1] * (TILE - count)
    tiles = [list(range(start, min(start + TILE, vocab))) for start in range(0, vocab, TILE)]
    assert sorted(summed) == tiles


def test_shards_of_whole_tiles_exchange_no_rows() -> None:
    runs_of_ranks = [((0, 2 * TILE),), ((2 * TILE, 4 * TILE + 9),)]
    for rank in range(2):
        assert lay_out(runs_of_ranks, rank, 4 * TILE + 5).local_K == []


# How far they are off


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float32), ("torch", torch.bfloat16), *(("triton", dtype) for dtype in TRITON_DTYPES[:2])],
)
def test_the_largest_error_is_that_of_logits_in_fp32(backend: str, dtype: torch.dtype) -> None:
    assert_near_fp64(make_tokens(48, dim=512, dtype=dtype, ignored=0.0)[0], backend)


@pytest.mark.gpu
def test_the_largest_error_on_a_gpu_is_that_of_logits_in_fp32() -> None:
    assert_near_fp64(make_tokens(512, 32000, 2048, dtype=torch.bfloat16, ignored=0.0)[0], "triton")


def assert_near_fp64(problem: Problem, backend: str) -> None:
    """1.5 times the largest error of fp32 logits with an fp64 log-softmax, and one rounding of the result.

    The logits of fp32 tensors on a GPU are a sum in the order of D, as the kernels' are: cuBLAS splits it.
    """
    (hidden_ND,), (labels_N,), weight_VD = problem.hidden, problem.labels, problem.weight
    ones_N = torch.ones(labels_N.shape[0], device=labels_N.device)
    got = values(problem, ones_N, backend=backend)
    truth_NV = hidden_ND.double() @ weight_VD.double().T
    if hidden_ND.is_cuda and hidden_ND.dtype != torch.float32:
        plain_NV = torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32).double()
    elif hidden_ND.is_cuda:
        plain_NV = hidden_ND.new_zeros(hidden_ND.shape[0], weight_VD.shape[0])
        for e_N, c_V in zip(hidden_ND.T, weight_VD.T, strict=True):
            plain_NV.addr_(e_N, c_V)
        plain_NV = plain_NV.double()
    else:
        plain_NV = (hidden_ND.float() @ weight_VD.float().T).double()
    truth, plain = (
        Values(z_NV.log_softmax(-1).gather(-1, labels_N[:, None])[:, 0], z_NV.logsumexp(-1))
        for z_NV in (truth_NV, plain_NV)
    )
    for name in Values._fields:
        g, t, p = (getattr(of, name).double() for of in (got, truth, plain))
        rounding = ROUNDING[torch.float32] * float(t.abs().max())
        assert float((g - t).abs().max()) <= 1.5 * float((p - t).abs().max()) + rounding, name


@every_backend
@pytest.mark.parametrize("kind", ["one-hot", "flat", "huge", "all near -200", "a tie"])
def test_log_p_is_never_above_0(kind: str, backend: str) -> None:
    problem, heat_N = make_tokens(12, bias=True, ignored=0.0)
    assert problem.bias is not None
    hidden_ND, bias_V = problem.hidden[0], problem.bias.nan_to_num(neginf=0.0)
    labels_N = torch.full_like(problem.labels[0], 300)
    if kind in ("flat", "a tie"):
        hidden_ND, bias_V = torch.zeros_like(hidden_ND), torch.zeros_like(bias_V)
    bias_V[300] += {"one-hot": 1e4, "a tie": 60.0}.get(kind, 0.0)
    bias_V[5] += 60.0 if kind == "a tie" else 0.0
    if kind == "huge":  # and the label's is the largest
        hidden_ND = hidden_ND * 1e4
        labels_N = (hidden_ND.double() @ problem.weight.double().T).argmax(1)
    bias_V -= 200.0 if kind == "all near -200" else 0.0
    problem = replace(problem, hidden=(hidden_ND,), bias=bias_V, labels=(labels_N,))
    got = values(problem, torch.ones_like(heat_N) if kind == "a tie" else heat_N, backend=backend)
    assert (got.logprob <= 0).all()
    expected = {"one-hot": 0.0, "huge": 0.0, "flat": -math.log(VOCAB), "a tie": -math.log(2)}.get(kind)
    if expected is not None:
        assert got.logprob.tolist() == pytest.approx([expected] * 12, rel=1e-6, abs=0)


@every_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_stays_with_its_token(backend: str, value: float) -> None:
    problem, heat_N = make_tokens(8, ignored=0.0)
    wanted = values(problem, heat_N, backend=backend)
    hidden_ND, labels_N = problem.hidden[0].clone(), problem.labels[0].clone()
    hidden_ND[3, 0], hidden_ND[5, 0], labels_N[5] = value, value, -100
    hidden_ND = leaf(hidden_ND)
    problem = replace(problem, hidden=(hidden_ND,), labels=(labels_N,))
    got = values(problem, heat_N, backend=backend, gradient="exact")
    (got.logprob + got.lse).sum().backward()
    others = [0, 1, 2, 4, 6, 7]
    for g, w in zip(got, wanted, strict=True):
        assert g.isnan().tolist() == [token == 3 for token in range(8)]
        assert_bitwise(g.detach()[others], w[others])
        assert g[5] == 0
    assert grad_of(hidden_ND).isnan().any(1).tolist() == [token == 3 for token in range(8)]


@every_backend
def test_a_token_whose_rows_are_all_ruled_out_is_as_without_exact_sums(backend: str) -> None:
    problem, heat_N = make_tokens(4, bias=True, ignored=0.0)
    problem = replace(problem, bias=torch.full_like(problem.weight[:, 0], -torch.inf))
    got = values(problem, heat_N, backend=backend)
    assert (got.lse == -torch.inf).all() and got.logprob.isnan().all()


@every_backend
def test_a_tile_that_is_no_number_is_counted_beside_the_others(backend: str) -> None:
    """Also where no max shows it: Triton's and gloo's drop a NaN."""
    stage: Any = torch_backend if backend == "torch" else importlib.import_module("cce_dist.kernels.triton.backend")
    max_TN = torch.tensor([[0.0, -1.0], [-2.0, -math.inf], [-math.inf, -1.0]], device=DEVICE)
    sumexp_TN = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [0.0, 1.5]], device=DEVICE)
    max_N = torch.tensor([0.0, -1.0], device=DEVICE)
    target_N = torch.tensor([-0.3, 0.0], device=DEVICE)
    n_valid = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    units_3N = stage.exact_units(TileSums(max_TN, sumexp_TN, max_N, target_N, 1.0), max_N, n_valid)
    one = 1 << SUM_BITS
    assert units_3N.tolist() == [[one, 2 * one + one * 3 // 2], target_N.view(torch.int32).tolist(), [1, 0]]
    merged = merge_exactly(max_N, lambda _: units_3N, 1.0, None)
    assert merged.lse_N.tolist() == pytest.approx([math.nan, math.log(3.5) - 1], nan_ok=True)
    assert merged.nll_N.isnan().tolist() == merged.normaliser.log_sum_N.isnan().tolist() == [True, False]


# Gradients


UPSTREAM = torch.linspace(-1, 2, 2 * 26).view(2, 26)


def gradients(found: Values, upstream: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    (torch.stack((found.logprob, found.lse)) * upstream.to(found.lse)).sum().backward()
    return [grad_of(x) for x in leaves]


def dense_gradients(problem: Problem, heat_N: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """With logits; of hidden, weight and bias."""
    assert problem.bias is not None
    leaves = [leaf(x.to(dtype)) for x in (problem.hidden[0], problem.weight, problem.bias)]
    z_NV = (leaves[0] @ leaves[1].T + leaves[2]).to(torch.promote_types(dtype, torch.float32)) * -0.7
    z_NV = 9 * torch.tanh(z_NV / 9) / heat_N.to(z_NV.dtype)[:, None]
    valid_N = problem.labels[0] != -100
    label_N = torch.where(valid_N, problem.labels[0], 0)
    found = (z_NV.log_softmax(-1).gather(-1, label_N[:, None])[:, 0], z_NV.logsumexp(-1))
    return gradients(Values(*(torch.where(valid_N, x, 0) for x in found)), UPSTREAM.to(z_NV.device), leaves)


def assert_gradients(got: Sequence[Tensor], problem: Problem, heat_N: Tensor) -> None:
    truth, plain = (dense_gradients(problem, heat_N, dtype) for dtype in (torch.float64, problem.dtype))
    for name, g, t, p in zip(("hidden", "weight", "bias"), got, truth, plain, strict=True):
        assert relative_error(g, t) <= 1.5 * relative_error(p, t) + 2 * ROUNDING[problem.dtype], name


def trained(problem: Problem, heat_N: Tensor, shard: VocabShard | None = None, **given: Any) -> list[Tensor]:
    """Of hidden and of this rank's rows, where the problem is that of this rank's tokens and rows."""
    assert problem.bias is not None
    leaves = [leaf(x) for x in (problem.hidden[0], problem.weight, problem.bias)]
    shard = shard or VocabShard.whole(problem.vocab_size)
    found = linear_logprobs(
        leaves[0],
        leaves[1],
        problem.labels[0],
        bias=leaves[2],
        shard=shard,
        temperature=heat_N,
        exact_sums=True,
        **{**problem.options, **given},
    )
    return gradients(Values(found.logprob, found.lse), UPSTREAM.to(heat_N.device), leaves)


@every_backend
@pytest.mark.parametrize("gradient", ["exact", "unbiased"])
def test_gradients_match_full_logits(backend: str, gradient: str) -> None:
    problem, heat_N = make_tokens(26, **ALL_OPTIONS)
    problem = replace(problem, bias=problem.bias.nan_to_num(neginf=0.0))  # type: ignore[union-attr]
    eps = None if gradient == "exact" else 1e-30
    got = trained(problem, heat_N, backend=backend, gradient=gradient, filter_eps=eps)
    assert_gradients(got, problem, heat_N)


def _trained_on_rank(problem: Problem, heat_N: Tensor, gradient: str) -> list[Tensor]:
    shard = make_shard(problem, "replicated", [((0, 37), (200, VOCAB)), ((37, 200),)])
    assert problem.bias is not None
    own = replace(problem, weight=local_rows(problem.weight, shard), bias=local_rows(problem.bias, shard))
    return trained(own, heat_N, shard, gradient=gradient, filter_eps=1e-30)


@pytest.mark.parametrize("gradient", ["exact", "unbiased"])
def test_gradients_on_ranks_match_full_logits(ranks: RankPool, gradient: str) -> None:
    problem, heat_N = for_ranks(**ALL_OPTIONS)
    problem = replace(problem, bias=problem.bias.nan_to_num(neginf=0.0))  # type: ignore[union-attr]
    (hidden, first, first_bias), (_, second, second_bias) = ranks.run(2, _trained_on_rank, problem, heat_N, gradient)
    whole = [torch.cat((x[:37], y, x[37:])) for x, y in ((first, second), (first_bias, second_bias))]
    assert_gradients([hidden, *whole], problem, heat_N)


# Heads, and what is refused


def _head_on_rank(weight: Tensor, hidden: Tensor, labels: Tensor) -> bool:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    head = ShardedCCEHead.from_linear(linear, init_device_mesh("cpu", (2,)))
    found = head.logprobs(hidden, labels, exact_sums=True)
    alone = linear_logprobs(hidden, weight, labels, exact_sums=True)
    lazy = make_lazy_head(linear).logprobs(hidden, labels, exact_sums=True)
    return all(torch.equal(x.logprob, alone.logprob) and torch.equal(x.lse, alone.lse) for x in (found, lazy))


def make_lazy_head(linear: nn.Linear) -> Any:
    make_lazy(linear, ModuleOwner(linear), CCEConfig(gradient="exact", materialize="raise"))
    return linear


def test_heads_take_it_too(ranks: RankPool) -> None:
    problem, _ = for_ranks(7)
    assert all(ranks.run(2, _head_on_rank, problem.weight, problem.hidden[0], problem.labels[0]))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (
            {"entropy": True},
            "goes without entropy: call linear_logprobs once more, without exact_sums, for that; got 'entropy=True'",
        ),
        ({"entropy": "value"}, "goes without entropy"),
        ({"statistics": ("top1",)}, "goes without statistics"),
        ({"exact_sums": 1}, "exact_sums must be True or False; got 1"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        linear_logprobs(torch.randn(4, 8), torch.randn(40, 8), torch.arange(4), **{"exact_sums": True, **asked})


def test_a_vocabulary_whose_sum_64_bits_do_not_hold_is_refused() -> None:
    chosen = check_settings({"exact_sums": True}, LogprobSettings)
    hidden, labels = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)
    resolve(chosen, hidden, labels, VocabShard.whole(MOST_SUMMED - 1), False)
    with pytest.raises(ValueError, match=f"adds at most {MOST_SUMMED - 1} rows in 64 bits.*got '{MOST_SUMMED} rows'"):
        resolve(chosen, hidden, labels, VocabShard.whole(MOST_SUMMED), False)


def _one_rank_wants_it() -> str:
    shard = VocabShard.even(40, dist.group.WORLD)
    try:
        linear_logprobs(
            torch.randn(4, 8),
            torch.randn(shard.num_rows, 8),
            torch.arange(4),
            shard=shard,
            exact_sums=dist.get_rank() == 1,
        )
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_ranks_that_differ_all_say_so(ranks: RankPool) -> None:
    for said in ranks.run(2, _one_rank_wants_it):
        assert "exact_sums must be equal on all ranks, got rank 0: False, rank 1: True" in said
