"""Runs of classifier rows: how they are cut, and how the rows of all ranks become whole and their gradient comes back.

They are cut by the rule of torch.chunk, which is DTensor's, FSDP2's and, for the elements of a matrix, ZeRO-3's.

Shapes: V rows of a group's ranks together, R rows of this rank, W ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from cce_dist.collectives import gather_tokens, reduce_scatter_tokens

Run = tuple[int, int]
"""Rows (start, stop)."""


def even_parts(run: Run, parts: int) -> list[Run]:
    """A run in consecutive parts of ⌈size / parts⌉ rows: the last ones may be short or empty."""
    start, stop = run
    size = -(-(stop - start) // parts)
    return [(min(start + index * size, stop), min(start + (index + 1) * size, stop)) for index in range(parts)]


def size_of(run: Run) -> int:
    return run[1] - run[0]


def local_rows(parameter: Any) -> Any:
    """The local rows of a parameter, differentiable; the gradient of a DTensor returns with its own placements."""
    return parameter.to_local(grad_placements=parameter.placements) if isinstance(parameter, DTensor) else parameter


def gather_rows(rows: Tensor, sizes: Sequence[int], group: ProcessGroup, *, same_tokens: bool = False) -> Tensor:
    """The rows [V, ...] of all ranks of a group, in its order, out of this rank's [R, ...]; differentiable.

    Args:
        sizes: R of each rank.
        same_tokens: the ranks compute the same with all rows, so that each finds the whole gradient of its own by
            itself. False: each computes with tokens of its own, and backward sums over them (`scatter_rows`).
    """
    gathered: Tensor = _GatherRows.apply(rows, tuple(sizes), group, same_tokens)
    return gathered


def scatter_rows(partial: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """This rank's rows [R, ...] of the sum over the ranks of [V, ...]: the transpose of `gather_rows`."""
    most = max(sizes)
    padded = partial.contiguous()
    if min(sizes) < most:
        padded = partial.new_zeros(len(sizes) * most, *partial.shape[1:])
        for index, part in enumerate(partial.split(list(sizes))):
            padded[index * most :][: part.shape[0]] = part
    return reduce_scatter_tokens(padded, sizes[dist.get_rank(group)], group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: tuple[int, ...], group: ProcessGroup, same_tokens: bool) -> Tensor:
        ctx.sizes, ctx.group, ctx.same_tokens = sizes, group, same_tokens
        most = max(sizes)
        gathered = gather_tokens(rows, most, group)
        if min(sizes) == most:
            return gathered
        return torch.cat([gathered[index * most :][:size] for index, size in enumerate(sizes)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        if ctx.same_tokens:
            return grad.split(list(ctx.sizes))[dist.get_rank(ctx.group)], None, None, None
        return scatter_rows(grad, ctx.sizes, ctx.group), None, None, None
