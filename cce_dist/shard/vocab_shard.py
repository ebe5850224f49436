"""Which rows of the classifier a rank holds, and which process groups its loss talks to.

`VocabShard` is built once and reused; `agreement` has what its ranks say to each other in each call.

Shapes: N tokens, T tiles of consecutive local rows.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from cce_dist.shard.agreement import State
from cce_dist.shard.groups import Group, as_group, host_group, ranks_of, replica_group
from cce_dist.shard.rows import even_parts

_by_name: "WeakValueDictionary[str, VocabShard]" = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class VocabShard:
    """One rank's share of the classifier's rows.

    Attributes:
        runs: global rows (start, stop) held locally, ascending, in the order of the local rows. A run of zero rows,
            or no run, is an empty shard.
        vocab_size: number of real rows. Rows whose global id is ``vocab_size`` or more are padding: they take no part
            in the loss and their gradient is zero.
        vocab_group: log-sum-exps and target logits are reduced over it; None: a single process.
        token_group: each of its ranks brings its own tokens (data, sequence or context parallelism); a subset of
            ``vocab_group``. None: every rank of ``vocab_group`` brings the same tokens (tensor parallelism).
        count_group: ``reduction="mean"`` divides by the valid tokens of this group; None: ``token_group``.
        grad_divisor: what the owner of the rows divides dC by. The loss itself never does.
        reduce_dtype: dtype of dE's reduction over ranks; None: fp32 (fp64 for fp64 inputs).
        name: of this object alone, in this process alone: what a compiled graph can hold of it.

    Raises:
        ValueError: at construction, for runs that are not ascending or groups that contradict each other.
    """

    runs: tuple[tuple[int, int], ...]
    vocab_size: int
    vocab_group: ProcessGroup | None
    token_group: ProcessGroup | None = None
    count_group: ProcessGroup | None = None
    grad_divisor: float = 1.0
    reduce_dtype: torch.dtype | None = None
    name: str = field(default_factory=lambda: uuid4().hex, init=False, repr=False)
    _state: State = field(default_factory=State, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("vocab_group", "token_group", "count_group"):
            object.__setattr__(self, name, as_group(getattr(self, name), name))
        object.__setattr__(self, "runs", tuple((int(start), int(stop)) for start, stop in self.runs if start != stop))
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}.")
        end = 0
        for start, stop in self.runs:
            if not end <= start < stop:
                raise ValueError(f"runs must be ascending and disjoint (start, stop) pairs, got {self.runs}.")
            end = stop
        if self.vocab_group is None and self.token_group is not None:
            raise ValueError("token_group is given without vocab_group; pass the group that shares the vocabulary too.")
        if self.token_group is not None and self.vocab_group is not None:
            outside = set(ranks_of(self.token_group)) - set(ranks_of(self.vocab_group))
            if outside:
                raise ValueError(
                    f"token_group must be a subset of vocab_group; ranks {sorted(outside)} are not in vocab_group "
                    f"{ranks_of(self.vocab_group)}. Make vocab_group the union of both."
                )
        if self.grad_divisor == 0:
            raise ValueError("grad_divisor must not be zero.")
        _by_name[self.name] = self

    @staticmethod
    def named(name: str) -> "VocabShard | None":
        """The shard of that name, if it still is."""
        return _by_name.get(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "VocabShard":
        return self  # it does not change, and process groups cannot be copied

    def __reduce__(self) -> Any:
        """A shard of a single process pickles; one with process groups says that it cannot be."""
        if self.vocab_group is None and self.count_group is None:
            return VocabShard, (self.runs, self.vocab_size, None, None, None, self.grad_divisor, self.reduce_dtype)
        raise TypeError(
            f"a VocabShard with process groups cannot be pickled (rows {self.runs} of {self.vocab_size}): groups live "
            "in one process. Save the state_dict of the module that holds it, and build the shard anew in each "
            "process; for DataLoader workers, keep it out of the dataset."
        )

    @staticmethod
    @cache
    def whole(vocab_size: int) -> "VocabShard":
        """All rows, in a single process."""
        return VocabShard(((0, vocab_size),), vocab_size, None)

    @classmethod
    def even(
        cls,
        vocab_size: int,
        vocab_group: Group | None,
        token_group: Group | None = None,
        *,
        count_group: Group | None = None,
        padded_vocab_size: int | None = None,
        grad_divisor: float = 1.0,
        reduce_dtype: torch.dtype | None = None,
    ) -> "VocabShard":
        """Splits the rows as ``torch.chunk`` does (DTensor's and FSDP2's rule): the last shards may be short or empty.

        Args:
            vocab_group: the ranks to split over; ``dist.group.WORLD`` for all of them.
            padded_vocab_size: rows of the stored classifier, if it was padded beyond ``vocab_size``.

        Raises:
            ValueError: ``vocab_group`` is None, or fewer padded rows than rows.
        """
        group = as_group(vocab_group, "vocab_group")
        if group is None:  # as dist.group.WORLD also is until there are process groups
            raise ValueError(
                "vocab_group must be the group of the ranks to split over, got None, which means a single process: "
                f"that is VocabShard.whole({vocab_size}). For all ranks pass dist.group.WORLD, after "
                "init_process_group."
            )
        rows = vocab_size if padded_vocab_size is None else padded_vocab_size
        if rows < vocab_size:
            raise ValueError(f"padded_vocab_size must be at least vocab_size = {vocab_size}, got {rows}.")
        return cls(
            (even_parts((0, rows), dist.get_world_size(group))[dist.get_rank(group)],),
            vocab_size,
            group,
            as_group(token_group, "token_group"),
            as_group(count_group, "count_group"),
            grad_divisor,
            reduce_dtype,
        )

    @classmethod
    def from_dtensor(
        cls,
        weight: DTensor,
        token_group: Group | None = None,
        *,
        vocab_size: int | None = None,
        count_group: Group | None = None,
        grad_divisor: float = 1.0,
        reduce_dtype: torch.dtype | None = None,
    ) -> "VocabShard":
        """The rows of a DTensor that is Shard(0) on a 1-D mesh; the mesh's group is the vocabulary group.

        Raises:
            ValueError: for any other placement or mesh.
        """
        if weight.device_mesh.ndim != 1 or tuple(weight.placements) != (Shard(0),):
            raise ValueError(
                f"weight must be a DTensor with placements (Shard(0),) on a 1-D mesh, got {tuple(weight.placements)} "
                f"on a mesh of shape {tuple(weight.device_mesh.shape)}. Redistribute it."
            )
        group = weight.device_mesh.get_group()
        return cls(
            (even_parts((0, weight.shape[0]), dist.get_world_size(group))[dist.get_rank(group)],),
            weight.shape[0] if vocab_size is None else vocab_size,
            group,
            as_group(token_group, "token_group"),
            as_group(count_group, "count_group"),
            grad_divisor,
            reduce_dtype,
        )

    @property
    def num_rows(self) -> int:
        """Local rows, padding included."""
        return sum(stop - start for start, stop in self.runs)

    @property
    def num_real_rows(self) -> int:
        """Local rows that belong to the vocabulary: the first ones, since runs ascend."""
        return sum(max(min(stop, self.vocab_size) - start, 0) for start, stop in self.runs)

    @property
    def start(self) -> int:
        """First global row of a shard that is one run (0 for an empty one)."""
        return self._single_run()[0]

    @property
    def stop(self) -> int:
        """One past the last global row of a shard that is one run (0 for an empty one)."""
        return self._single_run()[1]

    def _single_run(self) -> tuple[int, int]:
        if len(self.runs) > 1:
            raise ValueError(
                f"this shard is {len(self.runs)} runs of rows, not one: read .runs instead of .start/.stop."
            )
        return self.runs[0] if self.runs else (0, 0)

    @property
    def is_whole(self) -> bool:
        """Whether local columns are labels: all rows are here, padding after them."""
        return len(self.runs) == 1 and self.runs[0][0] == 0 and self.runs[0][1] >= self.vocab_size

    def local_columns(self, labels_N: Tensor) -> Tensor:
        """Maps global labels [N] to local columns, int32; −1 where this shard does not hold the row."""
        columns_N = torch.full_like(labels_N, -1)
        offset = 0
        for start, stop in self.runs:
            owned_N = (labels_N >= start) & (labels_N < min(stop, self.vocab_size))
            columns_N = torch.where(owned_N, labels_N - (start - offset), columns_N)
            offset += stop - start
        return columns_N.to(torch.int32)

    def tile_keys(self, tile: int, device: torch.device) -> Tensor:
        """Global row of the first row of each local tile, int32 [T]: a name unique over all ranks."""
        keys = self._state.tile_keys
        if (device, tile) not in keys:
            firsts: list[int] = []
            offset = 0
            for start, stop in self.runs:
                first_tile_row = -(-offset // tile) * tile
                firsts += range(start + first_tile_row - offset, min(stop, self.vocab_size), tile)
                offset += stop - start
            keys[device, tile] = torch.tensor(firsts, dtype=torch.int32, device=device)
        return keys[device, tile]

    @property
    def runs_of_ranks(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """``runs`` of each rank of ``vocab_group``, once they have agreed on a call."""
        return (self.runs,) if self.vocab_group is None else self._state.runs_of_ranks

    @property
    def host_group(self) -> ProcessGroup | None:
        """A group over the ranks of ``vocab_group`` that moves CPU tensors."""
        return None if self.vocab_group is None else host_group(self.vocab_group)

    @property
    def replica_group(self) -> ProcessGroup | None:
        """The ranks of ``vocab_group`` that bring the same tokens as this one, where ``token_group`` is smaller."""
        if self.vocab_group is None or self.token_group is None or not self.same_tokens:
            return None
        return replica_group(self.vocab_group, self.token_group)

    @property
    def same_tokens(self) -> bool:
        """Whether some ranks of the vocabulary group bring the same tokens as others."""
        if self.vocab_group is None or self.token_group is None:
            return self.vocab_group is not None
        return dist.get_world_size(self.token_group) < dist.get_world_size(self.vocab_group)
