"""The cases that others test their kernels with, through `cce_dist.compat`: shapes, dtypes, options and how inputs are
drawn are theirs (verl: tests/utils/test_linear_cross_entropy.py and its tensor-parallel twin; Apple's ml-cross-entropy:
tests/test_cce_loss_forward.py, test_cce_loss_backward.py, test_vocab_parallel.py), the bounds are relative norms here.

Shapes: N tokens, D hidden, V rows of the vocabulary.
"""

import itertools
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import (
    DEVICE,
    ROUNDING,
    Outcome,
    Problem,
    assert_within,
    grad_of,
    leaf,
    objective,
    plain_outcome,
    relative_error,
    with_upstream,
)
from torch import Tensor

from cce_dist.compat import apple, verl

# verl's: N, D and V of five models' heads in bf16; here a 16th of the tokens, a 32nd of the width and a 64th of the
# rows, but for those on a GPU

VERL = [(1937, 3584, 152064), (2169, 896, 151936), (1530, 2048, 32256), (1388, 4096, 102400), (8192, 4096, 102400)]
TEMPERATURE = 1.5


def _drawn(n: int, d: int, v: int, device: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def uniform(*shape: int, width: float = 0.5) -> Tensor:
        return torch.empty(shape).uniform_(-width, width, generator=draw).to(device, torch.bfloat16)

    return {
        "hidden": uniform(1, n, d),
        "weight": uniform(v, d),
        "labels": torch.randint(v, (1, n), generator=draw).to(device),
        "entropy's upstream": uniform(n),
        "logprobs' upstream": uniform(n, width=1.0),
    }


def _of_verl(given: dict[str, Tensor], rows: slice, group: Any = None) -> list[Tensor]:
    """Log-probabilities, entropies, and the gradients of hidden states and rows."""
    hidden, weight = leaf(given["hidden"]), leaf(given["weight"][rows])
    logprobs, entropy = verl.linear_cross_entropy(hidden, weight, given["labels"], TEMPERATURE, "none", group)
    upstream = (given["logprobs' upstream"].float(), given["entropy's upstream"].float())
    gradients = torch.autograd.grad((logprobs, entropy), (hidden, weight), upstream)
    return [logprobs.detach(), entropy.detach(), *gradients]


def _wanted_of_verl(given: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    hidden, weight = leaf(given["hidden"].to(dtype)), leaf(given["weight"].to(dtype))
    log_p = (hidden[0] @ weight.T / TEMPERATURE).log_softmax(-1)
    logprobs, entropy = log_p.gather(-1, given["labels"].T)[:, 0], -(log_p.exp() * log_p).sum(-1)
    upstream = (given["logprobs' upstream"].to(dtype), given["entropy's upstream"].to(dtype))
    return [
        logprobs.detach(),
        entropy.detach(),
        *torch.autograd.grad((logprobs, entropy), (hidden, weight), upstream),
    ]


def _assert_near(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Values as of logits in fp32; gradients to one rounding of P and one of the result."""
    assert [x.shape for x in got] == [x.shape for x in wanted]
    bounds = (1e-5, 1e-5, *[2 * ROUNDING[torch.bfloat16]] * 2)
    errors = [relative_error(x, y) for x, y in zip(got, wanted, strict=True)]
    assert all(error < bound for error, bound in zip(errors, bounds[: len(got)], strict=True)), errors


@pytest.mark.parametrize(("n", "d", "v"), VERL)
def test_verls_cases(n: int, d: int, v: int) -> None:
    given = _drawn(n // 16, d // 32, v // 64, "cpu")
    _assert_near(_of_verl(given, slice(None)), _wanted_of_verl(given, torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "d", "v"), VERL[1:3])
def test_verls_cases_in_their_size(n: int, d: int, v: int) -> None:
    given = _drawn(n, d, v, DEVICE)
    got, wanted = _of_verl(given, slice(None)), _wanted_of_verl(given, torch.float32)
    _assert_near(got[:2], wanted[:2])
    assert all(relative_error(x, y) < 2e-2 for x, y in zip(got[2:], wanted[2:], strict=True))


def _verl_on_rank(sizes: list[tuple[int, int, int]]) -> None:
    """Each rank holds as many rows as the case has."""
    world, rank = dist.get_world_size(), dist.get_rank()
    for n, d, v in sizes:
        given, rows = _drawn(n, d, v * world, "cpu"), slice(v * rank, v * (rank + 1))
        logprobs, entropy, dhidden, dweight = _of_verl(given, rows, dist.group.WORLD)
        summed = dhidden.float()  # by the caller, as there
        dist.all_reduce(summed)
        wanted = _wanted_of_verl(given, torch.float64)
        _assert_near([logprobs, entropy, summed, dweight], [*wanted[:3], wanted[3][rows]])


def test_verls_cases_on_ranks(ranks: RankPool) -> None:
    ranks.run(4, _verl_on_rank, [(n // 32, d // 64, v // 512) for n, d, v in VERL])


def test_a_megatron_sequence_meets_labels_of_a_batch() -> None:
    """Hidden states come as [L, 1, D], labels as [1, L]."""
    given = _drawn(40, 16, 96, "cpu")
    flat = _of_verl(given, slice(None))
    turned = _of_verl({**given, "hidden": given["hidden"].transpose(0, 1)}, slice(None))
    assert turned[2].shape == (40, 1, 16)
    assert all(
        torch.equal(x, y) for x, y in zip(flat, (*turned[:2], turned[2].transpose(0, 1), turned[3]), strict=True)
    )


# Apple's: N, V and D

APPLE = [(256, 512, 128), (252, 507, 128), (252, 507, 123)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMPLS = ["cce", "torch_compile", "cce_exact"]


def _problem(n: int, v: int, d: int, dtype: torch.dtype, has_bias: bool, invalids: bool, **options: Any) -> Problem:
    """Half of the tokens are like a row of the classifier."""
    draw = torch.Generator().manual_seed(0)
    hidden = (torch.randn(n, d, generator=draw) / d**0.5).to(dtype)
    weight = torch.randn(v, d, generator=draw).to(dtype)
    weight[: min(n, v) // 2] = hidden[: min(n, v) // 2]
    labels = torch.randint(v, (n,), generator=draw)
    if invalids:
        labels[torch.randperm(n, generator=draw)[: n // 5]] = -100
    bias = (torch.randn(v, generator=draw) * 0.02).to(dtype) if has_bias else None
    problem = Problem((hidden.view(4, -1, d),), (labels.view(4, -1),), weight, bias, v, options)
    return with_upstream(problem, draw, lse_gradient=False)


def _of_apple(problem: Problem, impl: str, **given: Any) -> Outcome:
    hidden, weight = leaf(problem.hidden[0]), leaf(problem.weight)
    bias = None if problem.bias is None else leaf(problem.bias)
    loss, lse = apple.linear_cross_entropy(
        hidden, weight, problem.labels[0], bias, return_lse=True, impl=impl, **problem.options, **given
    )
    objective([loss], [], problem).backward()
    dbias = () if bias is None else (grad_of(bias),)
    return Outcome((loss.detach(),), (lse.detach(),), (grad_of(hidden),), (grad_of(weight),), dbias)


OPTIONS = list(itertools.product([None, 20.0], [False, True], [False, True], [0, 1, 2], ["none", "mean", "sum"]))
random.Random(0).shuffle(OPTIONS)  # each shape and dtype takes a sixth of them, all together take each


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", APPLE, ids=str)
def test_apples_cases(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    first = (APPLE.index(shape) + 3 * DTYPES.index(dtype)) % 6
    for i, (softcap, has_bias, invalids, shift, reduction) in enumerate(OPTIONS[first::6]):
        problem = _problem(*shape, dtype, has_bias, invalids, softcap=softcap, shift=shift, reduction=reduction)
        truth, plain = plain_outcome(problem, torch.float64), plain_outcome(problem)
        assert_within(_of_apple(problem, IMPLS[i % 3]), truth, plain)


@pytest.mark.parametrize("wanted", [(True, False, True), (False, True, False), (False, False, True)], ids=str)
def test_apples_partial_gradients(wanted: tuple[bool, bool, bool]) -> None:
    problem = _problem(256, 512, 128, torch.bfloat16, True, False, reduction="mean")
    inputs = [
        x.clone().requires_grad_(w)
        for x, w in zip((problem.hidden[0], problem.weight, problem.bias), wanted, strict=True)
    ]  # type: ignore[union-attr]
    hidden, weight, bias = inputs
    apple.linear_cross_entropy(hidden, weight, problem.labels[0], bias, reduction="mean").backward()
    assert tuple(x.grad is not None for x in inputs) == wanted


def _apple_on_rank(impls: list[str]) -> None:
    for dtype, invalids, impl in itertools.product(DTYPES[1:], [False, True], impls):
        problem = _problem(252, 507, 123, dtype, False, invalids, reduction="mean")
        options = apple.VocabParallelOptions.for_vocab(507)
        rows = slice(options.start, options.stop)
        hidden, weight = leaf(problem.hidden[0]), leaf(problem.weight[rows])
        loss = apple.linear_cross_entropy(hidden, weight, problem.labels[0], vocab_parallel_options=options, impl=impl)
        objective([loss], [], problem).backward()
        truth, plain = plain_outcome(problem, torch.float64), plain_outcome(problem)
        for got, one, other in (
            (grad_of(hidden), truth.dhidden[0], plain.dhidden[0]),
            (grad_of(weight), truth.dweight[0][rows], plain.dweight[0][rows]),
        ):
            assert relative_error(got, one) <= 1.5 * relative_error(other, one) + ROUNDING[dtype]


def _parts(sizes: list[int]) -> list[tuple[int, int]]:
    every = (apple.VocabParallelOptions.from_vocab(n) for n in sizes)
    return [(options.start, options.stop) for options in every]


def test_apples_cases_of_a_parallel_vocabulary(ranks: RankPool) -> None:
    ranks.run(4, _apple_on_rank, ["torch_compile", "cce"])


@pytest.mark.parametrize("world", [3, 4])
def test_apples_parts_of_a_vocabulary(ranks: RankPool, world: int) -> None:
    by_rank, start = ranks.run(world, _parts, [1023, 2048]), [0, 0]
    for rank, parts in enumerate(by_rank):
        for i, n in enumerate([1023, 2048]):
            stop = start[i] + n // world + (rank < n % world)
            assert parts[i] == (start[i], stop)
            start[i] = stop
    assert start == [1023, 2048]
