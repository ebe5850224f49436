"""Rows out of flat slices: ZeRO-3 cuts a flattened matrix into equal runs of elements, wherever its rows may end.

A rank holds the rows that begin in its slice. Where the vocabulary does not divide evenly, the last of them continues
in the next rank's slice: one all-gather of a row per rank completes it, and one reduce-scatter takes its gradient back.
With replicas (a vocabulary group smaller than the storage group) the rank also holds the slices of the ranks at its
place in the other vocabulary groups.

Shapes: V rows of the matrix, D its width, W ranks of the storage group, C = ceil(V·D / W) elements of a slice,
R slices held by a rank, Vl rows held by a rank.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cce_dist.collectives import gather_tokens, reduce_scatter_tokens
from cce_dist.shard import new_subgroup
from cce_dist.shard.rows import even_parts


@dataclass(frozen=True)
class FlatSlice:
    """One rank's elements [start, stop) of a flattened matrix of the given width."""

    start: int
    stop: int
    width: int

    @property
    def rows(self) -> tuple[int, int]:
        """The rows (first, end) that begin in the slice."""
        return -(-self.start // self.width), -(-self.stop // self.width)

    @property
    def lead(self) -> int:
        """Elements at the front that complete the previous slice's last row."""
        return self.rows[0] * self.width - self.start

    @property
    def missing(self) -> int:
        """Elements of the last row that the next slice holds."""
        return self.rows[1] * self.width - self.stop


def cut(num_rows: int, width: int, world: int) -> list[FlatSlice]:
    """The slices of all ranks: ZeRO-3 gives each rank ceil(V·D / W) elements, the last ones fewer."""
    return [FlatSlice(start, stop, width) for start, stop in even_parts((0, num_rows * width), world)]


class RowsFromSlices:
    """The rows [Vl, D] that a rank's loss works on, assembled from flat slices; their gradient goes back into its own.

    Args:
        num_rows, width: shape of the matrix; at least one row per rank of the storage group.
        storage_group: the ranks that the matrix is cut over, in the order of their slices.
        vocab_parallel_size: g, a divisor of the storage group's size: each run of g consecutive ranks holds all rows.

    Both methods are collective over the storage group unless one rank holds exactly its own slice.
    """

    def __init__(self, num_rows: int, width: int, storage_group: ProcessGroup, vocab_parallel_size: int) -> None:
        ranks = dist.get_process_group_ranks(storage_group)
        self._slices = cut(num_rows, width, len(ranks))
        self._rank = dist.get_rank(storage_group)
        self._width = width
        self._aligned = num_rows % len(ranks) == 0
        self._storage_group = storage_group
        self._replica_group: ProcessGroup | None = None
        self.vocab_group = storage_group
        self._held = [self._rank]
        if vocab_parallel_size < len(ranks):
            place = self._rank % vocab_parallel_size
            start = self._rank - place
            self.vocab_group = new_subgroup(ranks[start : start + vocab_parallel_size], storage_group)
            self._replica_group = new_subgroup(ranks[place::vocab_parallel_size], storage_group)
            self._held = list(range(len(ranks)))[place::vocab_parallel_size]

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Global rows (start, stop) of the assembled rows, in their order."""
        return tuple(self._slices[index].rows for index in self._held)

    def assemble(self, own_C: Tensor) -> Tensor:
        """The rows [Vl, D]: a view of ``own_C`` where the rank holds exactly its own slice, else a copy."""
        held_RC = own_C[None]
        if self._replica_group is not None:
            held_RC = gather_tokens(own_C, own_C.numel(), self._replica_group).view(-1, own_C.numel())
        if self._aligned:
            return held_RC.view(-1, self._width)
        lead = own_C[: self._slices[self._rank].lead]
        leads_WD = gather_tokens(lead, self._width, self._storage_group).view(-1, self._width)
        pieces = []
        for index, slice_C in zip(self._held, held_RC, strict=True):
            at = self._slices[index]
            pieces.append(slice_C[at.lead : at.stop - at.start])
            if at.missing:
                pieces.append(leads_WD[index + 1, : at.missing])
        return torch.cat(pieces).view(-1, self._width)

    def disassemble(self, grad_VlD: Tensor) -> Tensor:
        """The transpose of `assemble`: this rank's slice [C] of the gradient, summed over the ranks that hold it."""
        if self._aligned:
            return self._sum_replicas(grad_VlD.reshape(len(self._held), -1))
        held_RC = grad_VlD.new_zeros(len(self._held), self._slices[0].stop)
        leads_WD = grad_VlD.new_zeros(len(self._slices), self._width)
        flat, offset = grad_VlD.reshape(-1), 0
        for index, slice_C in zip(self._held, held_RC, strict=True):
            at = self._slices[index]
            body = at.stop - at.start - at.lead
            slice_C[at.lead : at.lead + body] = flat[offset : offset + body]
            if at.missing:
                leads_WD[index + 1, : at.missing] = flat[offset + body : offset + body + at.missing]
            offset += body + at.missing
        own_C = self._sum_replicas(held_RC)
        lead = self._slices[self._rank].lead
        own_C[:lead] = reduce_scatter_tokens(leads_WD.view(-1), self._width, self._storage_group)[:lead]
        return own_C

    def _sum_replicas(self, held_RC: Tensor) -> Tensor:
        if self._replica_group is None:
            return held_RC[0]
        return reduce_scatter_tokens(held_RC.reshape(-1), held_RC.shape[1], self._replica_group)
