"""An adapter beside a frozen classifier: the loss, its gradient by a and B, and what is refused.

The logits of hidden states h with an adapter's a, and of rows W with its B, are those of [h, a] and [W, B]: full logits
of these are the reference.

Shapes: D hidden, R rank of the adapter, V rows.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ranks import RankPool
from reference import (
    DEVICE,
    TRITON_DTYPES,
    Outcome,
    Problem,
    assert_within,
    fixed_draws,
    grad_of,
    leaf,
    make_problem,
    objective,
    plain_outcome,
    relative_error,
)
from sharded import Layout, Runs, device_of, local_rows, make_rank_problem, make_shard, on_ranks, only, part_of
from torch import Tensor
from watched import LargestNewTensor

from cce_dist import VocabShard, linear_cross_entropy, linear_logprobs

D, R = 24, 5
UNEVEN = ((13,), (5,), (2, 4), (9,))
every_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def _outcome(problem: Problem, part: int, shard: VocabShard | None, given: dict[str, Any]) -> Outcome:
    """Of one part, with the last columns of hidden states and rows as the adapter; dB alone of the rows."""
    rows = problem.weight if shard is None else local_rows(problem.weight, shard)
    hidden, a = (leaf(x.contiguous()) for x in problem.hidden[part].tensor_split([D], -1))
    weight, b = (x.contiguous() for x in rows.tensor_split([D], 1))
    b = leaf(b)
    bias = None if problem.bias is None else leaf(problem.bias if shard is None else local_rows(problem.bias, shard))
    loss, lse = linear_cross_entropy(
        hidden,
        weight,
        problem.labels[part],
        bias=bias,
        shard=shard,
        adapter=(a, b),
        return_lse=True,
        **fixed_draws({**problem.options, **given}, hidden),
    )
    objective([loss], [lse], only(problem, part)).backward()
    dhidden = torch.cat((grad_of(hidden), grad_of(a)), -1)
    dbias = () if bias is None else (grad_of(bias),)
    return Outcome((loss.detach(),), (lse.detach(),), (dhidden,), (grad_of(b),), dbias)


def _of_adapter(outcome: Outcome) -> Outcome:
    return outcome._replace(dweight=tuple(x[:, D:] for x in outcome.dweight))


def _assert_no_worse(problem: Problem, **given: Any) -> None:
    got = _outcome(problem, 0, None, given)
    assert_within(got, _of_adapter(plain_outcome(problem, torch.float64)), _of_adapter(plain_outcome(problem)))


MODES: dict[str, dict[str, Any]] = {
    "exact": {"gradient": "exact"},
    "unbiased": {"gradient": "unbiased", "filter_eps": 1e-9},
    "filtered": {"gradient": "filtered", "filter_eps": 1e-9},
    "frequent rows": {"gradient": "unbiased", "filter_eps": 1e-9, "frequent_rows": 40},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap, scale, bias, lse": {"softcap": 5.0, "logit_scale": 0.7, "bias": True, "lse_gradient": True},
    "smoothing, shift, sum": {"label_smoothing": 0.2, "shift": 1, "reduction": "sum", "logit_scale": 1.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_an_adapter_matches_full_logits(options: dict[str, Any], mode: dict[str, Any]) -> None:
    _assert_no_worse(make_problem(((3, 17),), 300, D + R, **options), backend="torch", **mode)


def test_an_adapter_in_triton_matches_full_logits() -> None:
    options = OPTIONS["softcap, scale, bias, lse"]
    _assert_no_worse(make_problem(((3, 7),), 200, D + R, **options), backend="triton", **MODES["frequent rows"])


@pytest.mark.full
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_adapter_keeps_no_exponentials_whatever_the_budget(options: dict[str, Any]) -> None:
    """Of a budget that holds those of all logits."""
    problem = make_problem(((3, 7),), 200, D + R, **options)
    _assert_no_worse(problem, backend="triton", workspace_mb=64, **MODES["exact"])


@pytest.mark.full
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", TRITON_DTYPES[1:], ids=str)
def test_an_adapter_in_16_bits_matches_full_logits(
    options: dict[str, Any], mode: dict[str, Any], dtype: torch.dtype
) -> None:
    _assert_no_worse(make_problem(((3, 7),), 200, D + R, dtype=dtype, **options), backend="triton", **mode)


@pytest.mark.full
@pytest.mark.parametrize(("softcap", "frequent_rows"), [(None, 0), (30.0, 40)])
def test_an_adapter_goes_with_the_8_bit_pass(softcap: float | None, frequent_rows: int) -> None:
    """Its products stay in 16 bits: of logits that are the adapter's alone nothing has an error of 8 bits."""
    problem = make_problem(((40,),), 500, D + R, dtype=torch.float16, softcap=softcap, lse_gradient=True)
    mode = {"gradient": "unbiased", "filter_eps": 2.0**-10, "frequent_rows": frequent_rows, "backend": "triton"}
    full = _outcome(problem, 0, None, {**mode, "first_pass": "full"})
    fast = _outcome(problem, 0, None, {**mode, "first_pass": "fp8"})
    assert relative_error(fast.lse[0], full.lse[0]) < 1e-3
    assert relative_error(fast.loss[0], full.loss[0]) < 1e-3
    truth = plain_outcome(problem, torch.float64)
    assert relative_error(fast.dhidden[0], truth.dhidden[0]) < 2e-2
    assert relative_error(fast.dweight[0], truth.dweight[0][:, D:]) < 2e-2
    alone = replace(problem, hidden=(torch.cat((0 * problem.hidden[0][..., :D], problem.hidden[0][..., D:]), -1),))
    got, wanted = (_outcome(alone, 0, None, {**mode, "first_pass": x}).lse[0] for x in ("fp8", "full"))
    assert relative_error(got, wanted) < 2e-4


def _on_rank(problem: Problem, layout: Layout, runs: Runs | None, given: dict[str, Any]) -> Outcome:
    problem = problem.to(device_of(given))
    shard = make_shard(problem, layout, runs)
    return _outcome(problem, part_of(dist.get_rank(), layout), shard, given).to("cpu")


def _assert_ranks_no_worse(
    ranks: RankPool, world: int, problem: Problem, layout: Layout, runs: Runs | None = None, **given: Any
) -> None:
    by_rank = ranks.run(world, _on_rank, problem, layout, runs, given)
    got = Outcome(*(tuple(x for outcome in by_rank for x in outcome[i]) for i in range(len(Outcome._fields))))
    truth, plain = (
        _of_adapter(on_ranks(plain_outcome(problem, *dtype), world, problem, layout, runs))
        for dtype in ((torch.float64,), ())
    )
    assert_within(got, truth, plain)


LAYOUTS = [
    (2, "sharded"),
    *(pytest.param(world, "replicated", marks=pytest.mark.full) for world in (1, 2, 3)),
    pytest.param(3, "sharded", marks=pytest.mark.full),
    pytest.param(4, "grid", marks=pytest.mark.full),
]


@pytest.mark.parametrize("mode", [MODES["exact"], MODES["frequent rows"]], ids=["exact", "frequent rows"])
@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_an_adapter_over_uneven_shards_matches_full_logits(
    ranks: RankPool, world: int, layout: Layout, mode: dict[str, Any]
) -> None:
    shapes = UNEVEN[: part_of(world - 1, layout) + 1]
    options = {"bias": True, "padding_rows": 7, "lse_gradient": True, "logit_scale": 0.9, "label_smoothing": 0.1}
    _assert_ranks_no_worse(ranks, world, make_rank_problem(shapes, 301, D + R, **options), layout, **mode)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
@every_backend
def test_a_rank_without_rows_takes_part(ranks: RankPool, layout: Layout, backend: str) -> None:
    problem = make_rank_problem(UNEVEN[: part_of(1, layout) + 1], 60, D + R, bias=True)
    runs = [((0, 60),), ((60, 60),)]
    mode = MODES["unbiased"] if backend == "triton" else MODES["exact"]
    _assert_ranks_no_worse(ranks, 2, problem, layout, runs, backend=backend, **mode)


@pytest.mark.full
@settings(
    derandomize=True,
    deadline=None,
    max_examples=12,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    world=st.integers(1, 4),
    layout=st.sampled_from(["replicated", "sharded"]),
    vocab=st.integers(4, 400),
    mode=st.sampled_from(sorted(MODES)),
    backend=st.sampled_from(["torch", "triton"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    cap=st.sampled_from([None, 4.0]),
    smoothing=st.sampled_from([0.0, 0.3]),
    bias=st.booleans(),
)
def test_any_adapter_on_ranks_matches_full_logits(
    ranks: RankPool,
    world: int,
    layout: Layout,
    vocab: int,
    mode: str,
    backend: str,
    dtype: torch.dtype,
    cap: float | None,
    smoothing: float,
    bias: bool,
) -> None:
    options = {"bias": bias, **({"softcap": cap} if cap else {"label_smoothing": smoothing})}
    problem = make_rank_problem(UNEVEN[: part_of(world - 1, layout) + 1], vocab, D + R, dtype=dtype, **options)
    _assert_ranks_no_worse(ranks, world, problem, layout, backend=backend, **MODES[mode])


def _operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = make_problem(((31,),), 300, D + R, dtype=dtype)
    hidden, a = problem.hidden[0].tensor_split([D], -1)
    weight, b = problem.weight.tensor_split([D], 1)
    return leaf(hidden.contiguous()), weight.contiguous(), problem.labels[0], leaf(a.contiguous()), leaf(b.contiguous())


@pytest.mark.full
@every_backend
def test_logprobs_entropy_and_statistics_are_those_of_the_sum(backend: str) -> None:
    hidden, weight, labels, a, b = _operands()
    asked: dict[str, Any] = {"entropy": True, "statistics": ("top1", "rank", "mean_logit"), "gradient": "exact"}
    with_adapter = linear_logprobs(hidden, weight, labels, adapter=(a, b), backend=backend, temperature=0.8, **asked)
    whole = leaf(torch.cat((hidden, a), -1).detach()), leaf(torch.cat((weight, b), 1).detach())
    merged = linear_logprobs(*whole, labels, backend=backend, temperature=0.8, **asked)
    for got, wanted in zip(with_adapter, merged, strict=True):
        if wanted is not None:
            assert relative_error(got.double(), wanted.double()) < 1e-5
    total = [x.logprob.sum() + 0.3 * x.entropy.sum() for x in (with_adapter, merged)]
    of_parts = torch.autograd.grad(total[0], (hidden, a, b))
    of_hidden, of_weight = torch.autograd.grad(total[1], whole)
    wanted = *of_hidden.tensor_split([D], -1), of_weight[:, D:]
    assert all(relative_error(x, y) < 1e-4 for x, y in zip(of_parts, wanted, strict=True))


@pytest.mark.full
@every_backend
def test_only_what_trains_gets_a_gradient(backend: str) -> None:
    hidden, weight, labels, a, b = _operands()
    loss = linear_cross_entropy(hidden, weight, labels, adapter=(a, b), backend=backend, gradient="exact")
    everything = torch.autograd.grad(loss, (hidden, a, b))
    for kept in range(3):
        parts = [x.detach().requires_grad_(i == kept) for i, x in enumerate((hidden, a, b))]
        given: dict[str, Any] = {"adapter": (parts[1], parts[2]), "backend": backend, "gradient": "exact"}
        linear_cross_entropy(parts[0], weight, labels, **given).backward()
        assert [x.grad is not None for x in parts] == [i == kept for i in range(3)]
        assert relative_error(parts[kept].grad, everything[kept]) < 1e-5


def test_an_adapter_in_fp32_beside_16_bits_keeps_its_dtype() -> None:
    hidden, weight, labels, a, b = _operands(torch.bfloat16)
    a, b = leaf(a.detach().float()), leaf(b.detach().float())
    linear_cross_entropy(hidden, weight, labels, adapter=(a, b), gradient="exact").backward()
    assert (grad_of(hidden).dtype, grad_of(a).dtype, grad_of(b).dtype) == (torch.bfloat16, torch.float32, torch.float32)


def _step(tokens: int, vocab: int, hidden_size: int, rank: int, dtype: torch.dtype, **given: Any) -> Callable[[], None]:
    """One step of a frozen classifier, with an adapter of that rank or, 0, without."""
    draw = torch.Generator(device=DEVICE).manual_seed(0)
    hidden, weight, a, b = (
        torch.randn(*shape, generator=draw, device=DEVICE, dtype=dtype) / shape[1] ** 0.5
        for shape in ((tokens, hidden_size), (vocab, hidden_size), (tokens, max(rank, 1)), (vocab, max(rank, 1)))
    )
    labels = torch.randint(vocab, (tokens,), generator=draw, device=DEVICE)
    hidden, adapter = leaf(hidden), (leaf(a), leaf(b)) if rank else None

    def run() -> None:
        linear_cross_entropy(hidden, weight, labels, adapter=adapter, **given).backward()
        for x in (hidden, *(adapter or ())):
            x.grad = None

    return run


@pytest.mark.full
@every_backend
def test_no_copy_of_the_classifier_nor_a_gradient_of_its_size_is_made(backend: str) -> None:
    made = []
    for rank in (0, 4):
        step = _step(32, 1000, 256, rank, torch.float32, backend=backend, gradient="filtered", filter_eps=1e-2)
        with LargestNewTensor() as watch:
            step()
        made.append(watch.largest)
    assert made[1] <= 1.02 * made[0] < 4 * 1000 * 256, made


@pytest.mark.gpu
@pytest.mark.parametrize("frequent_rows", [0, None])
@pytest.mark.parametrize("first_pass", ["full", "auto"])
@pytest.mark.parametrize("gradient", ["exact", "unbiased"])
def test_the_peak_is_at_most_2_percent_above_that_without_an_adapter(
    gradient: str, first_pass: str, frequent_rows: int | None
) -> None:
    """Of all that is allocated in a step, the classifier included; the adapter and its gradient, 2·V·R, are counted."""
    peaks = []
    for rank in (0, 16):
        given = {"gradient": gradient, "first_pass": first_pass, "frequent_rows": frequent_rows}
        step = _step(8192, 131072, 2304, rank, torch.bfloat16, **given)
        step()  # what is allocated once
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks.append(torch.cuda.max_memory_allocated())
        del step
    assert peaks[1] <= 1.02 * peaks[0], peaks


def _refused(**changes: Any) -> Any:
    hidden, weight, labels, a, b = _operands()
    given: dict[str, Any] = {"hidden": hidden, "weight": weight, "adapter": (a, b), **changes}
    return linear_cross_entropy(given.pop("hidden"), given.pop("weight"), labels, **given)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no pair": ({"adapter": torch.zeros(3)}, r"adapter must be None or \(a, B\)"),
    "integers": ({"adapter": (torch.zeros(31, R).long(), torch.zeros(300, R))}, "adapter must be None or"),
    "other tokens": ({"adapter": (torch.zeros(30, R), torch.zeros(300, R))}, r"\(a \[31, 5\], B \[300, R\]\)"),
    "other rows": ({"adapter": (torch.zeros(31, R), torch.zeros(299, R))}, "one row of a for each token"),
    "more columns than hidden": ({"adapter": (torch.zeros(31, 25), torch.zeros(300, 25))}, "at most hidden's number"),
    "a weight that trains": ({"weight": torch.zeros(300, D, requires_grad=True)}, "adapter goes with a frozen weight"),
    "rows in fp32": ({"fp32_head": True}, "adapter goes without fp32_head"),
    "kept logits": ({"workspace_mb": "logits", "gradient": "exact"}, 'adapter goes without workspace_mb="logits"'),
    "an accumulator": ({"grad_accumulator": torch.zeros(300, D)}, "grad_accumulator goes with a weight that requires"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.skipif(DEVICE != "cpu", reason="of the arguments alone")
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        _refused(**changes)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the arguments alone")
def test_exact_sums_are_refused() -> None:
    hidden, weight, labels, a, b = _operands()
    with pytest.raises(ValueError, match="adapter goes without exact_sums"):
        linear_logprobs(hidden, weight, labels, adapter=(a, b), exact_sums=True)


def _unequal(with_adapter: int) -> str:
    hidden, weight, labels, a, b = (x.detach().cpu() for x in _operands())
    world = dist.group.WORLD
    assert world is not None
    shard = VocabShard.even(300, world)
    given = (a, local_rows(b, shard)) if dist.get_rank() < with_adapter else None
    with pytest.raises(ValueError, match="rank") as caught:
        linear_cross_entropy(hidden, local_rows(weight, shard), labels, shard=shard, adapter=given)
    return str(caught.value)


def test_ranks_must_all_bring_the_adapter(ranks: RankPool) -> None:
    for message in ranks.run(2, _unequal, 1):
        assert "adapter" in message


@pytest.mark.full
def test_a_compiled_caller_gets_the_same_gradients() -> None:
    hidden, weight, labels, a, b = _operands()

    def loss(hidden: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(2 * hidden, weight, labels, adapter=(a, b), gradient="exact")

    wanted = torch.autograd.grad(loss(hidden, a, b), (hidden, a, b))
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(hidden, a, b), (hidden, a, b))
    assert all(relative_error(x, y) < 1e-6 for x, y in zip(got, wanted, strict=True))
