"""Stage 3: is a small sharded loss, with its gradients, that of all logits in fp64?

In: the size of the vocabulary groups, the device. Out: a `Report` of the largest error; the row of the table.
Shapes: n tokens of this rank, N of the token group, D hidden, V vocabulary.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cce_dist.loss import linear_cross_entropy
from cce_dist.shard import VocabShard
from cce_dist.shard.groups import new_subgroup
from cce_dist.tools.doctor.reports import Faults, Report


class Case(NamedTuple):
    """A loss to be compared. ``sharded``: each rank brings its own tokens, else all bring the same."""

    sharded: bool
    dtype: torch.dtype
    gradient: str

    def __str__(self) -> str:
        tokens = "own tokens" if self.sharded else "same tokens"
        return f"{tokens}, {str(self.dtype).removeprefix('torch.')}, {self.gradient}"


_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Relative norms of errors: far above rounding, far below any fault."""


def examine(size: int, device: torch.device) -> Report:
    world = dist.get_world_size()
    group = dist.group.WORLD if size == world else dist.new_subgroups(size)[0]
    assert isinstance(group, ProcessGroup)
    dtypes = [torch.float32]
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        dtypes.append(torch.bfloat16)
    cases = [Case(s, dtype, g) for s in (False, True) for dtype in dtypes for g in ("exact", "unbiased")]
    if device.type == "cuda":
        _compile(cases, group, device)
    faults: Faults = []
    worst = 0.0
    for case in cases:
        errors = loss_errors(_problem(case, group), case, device)
        worst = max(worst, *(error / _ALLOWED[case.dtype] for error in errors.values()))
        wrong = {name: error for name, error in errors.items() if not error <= _ALLOWED[case.dtype]}
        if wrong:
            listed = ", ".join(f"{name} by {error:.2g}" for name, error in wrong.items())
            faults.append(
                (
                    "loss",
                    f"({case}) differs from fp64 logits: {listed}, allowed {_ALLOWED[case.dtype]:g}. Run it on this "
                    "machine alone (cce-dist doctor): a fault there too is of its GPU, driver or versions; else of the "
                    "links to the other ranks.",
                )
            )
    return Report({"cases": len(cases), "worst": worst, "size": size, "world": world}, faults, [], [])


def _compile(cases: Sequence[Case], group: ProcessGroup, device: torch.device) -> None:
    """The kernels, into Triton's cache of each node: every rank of it compiles those of some cases, in calls of its own
    with as many rows and tokens. All ranks compiling everything, one case after the other, takes over a minute."""
    # Not LOCAL_RANK, which is the GPU's number where ranks share one.
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # One of each thread's own.
    alone = {gradient: new_subgroup([dist.get_rank()], group) for gradient in ("exact", "unbiased")}
    if dist.get_rank() == 0:
        print("cce-dist doctor: compiling kernels, which takes half a minute on a fresh machine.", file=sys.stderr)
    # The longest ones, those of "unbiased", to different ranks.
    own = sorted(cases, key=lambda case: case.gradient)[dist.get_rank() % on_node :: on_node]

    def compile_those_of(gradient: str) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread begins with the first one
        for case in (case for case in own if case.gradient == gradient):
            rows = _problem(case, group).shard.num_rows
            shard = VocabShard.even(rows, alone[gradient], alone[gradient] if case.sharded else None)
            counts = _counts(case, dist.get_world_size(group))
            with suppress(Exception):  # of this rank alone: the others would wait; the cases will show it
                loss_errors(_drawn(rows, max(counts) * len(counts), case, shard), case, device)

    with ThreadPoolExecutor() as threads:  # different kernels, whose compilation waits for nothing of the other's
        list(threads.map(compile_those_of, {case.gradient for case in own}))


class _Problem(NamedTuple):
    """Drawn alike on all ranks, in fp64; ``own``: the tokens that this rank brings."""

    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor
    shard: VocabShard
    own: slice


def _problem(case: Case, group: ProcessGroup) -> _Problem:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    counts, vocab = _counts(case, world), max(600, 2 * world + 3)
    shard = VocabShard.even(vocab, group, group if case.sharded else None)
    problem = _drawn(vocab, sum(counts), case, shard)
    return problem._replace(own=slice(sum(counts[:rank]), sum(counts[: rank + 1])) if case.sharded else slice(None))


def _counts(case: Case, world: int) -> list[int]:
    """Tokens of each rank that brings its own, else of all."""
    per_rank = max(64 // world, 1)
    return [per_rank + r % 2 for r in range(world)] if case.sharded else [per_rank * world]


def _drawn(vocab: int, tokens: int, case: Case, shard: VocabShard) -> _Problem:
    draw, hidden_size = torch.Generator().manual_seed(7), 32
    # So flat a softmax that nothing is sampled: "unbiased" is exact here, by its own path.
    hidden_ND, weight_VD = (
        (scale * torch.randn(rows, hidden_size, generator=draw)).to(case.dtype).double()
        for rows, scale in ((tokens, 1.0), (vocab, hidden_size**-0.5))
    )
    labels_N = torch.randint(vocab, (tokens,), generator=draw)
    labels_N[::7] = -100
    return _Problem(hidden_ND, weight_VD, labels_N, shard, slice(None))


def loss_errors(problem: _Problem, case: Case, device: torch.device) -> dict[str, float]:
    """Relative errors of this rank's loss, dE and dC against all logits in fp64."""
    shard, own, labels_N = problem.shard, problem.own, problem.labels_N
    truth_ND, truth_VD = (x.clone().requires_grad_() for x in problem[:2])
    truth_N = torch.nn.functional.cross_entropy(truth_ND @ truth_VD.T, labels_N, reduction="none")
    truth_N.sum().backward()

    rows = slice(shard.start, shard.stop)
    hidden_nD, rows_VD = (
        x.detach().to(device, case.dtype).requires_grad_() for x in (problem.hidden_ND[own], problem.weight_VD[rows])
    )
    loss_n = linear_cross_entropy(
        hidden_nD, rows_VD, labels_N[own].to(device), shard=shard, reduction="none", gradient=case.gradient
    )  # type: ignore[call-overload]
    loss_n.sum().backward()
    return {
        "loss": _error(loss_n, truth_N[own]),
        "d hidden": _error(hidden_nD.grad, _grad(truth_ND)[own]),
        "d weight": _error(rows_VD.grad, _grad(truth_VD)[rows]),
    }


def _error(x: Tensor | None, truth: Tensor) -> float:
    if x is None:
        return float("inf")
    difference = (x.detach().double().cpu() - truth.detach()).norm()
    return float(difference / truth.detach().norm().clamp_min(1e-30))


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def compare(reports: Mapping[int, Report]) -> tuple[Faults, Faults]:
    return [], []  # each rank has compared with the same reference


def describe(reports: Mapping[int, Report]) -> list[tuple[str, str]]:
    first = next(iter(reports.values())).facts
    worst = max(report.facts["worst"] for report in reports.values())
    groups = f"{first['world'] // first['size']} group(s) of {first['size']}"
    return [("loss", f"{first['cases']} cases over {groups}; largest error {worst:.2g} of what is allowed")]
