"""Which rows of the classifier a rank holds, and which process groups its loss talks to.

`VocabShard` is built once and reused. At its first use the ranks of the vocabulary group compare notes over a CPU
group (`VocabShard.agree`), so that a disagreement is an error on every rank instead of a hang in a collective.

Shapes: N tokens, T tiles of consecutive local rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Group = ProcessGroup | DeviceMesh


def as_group(group: Group | None, name: str) -> ProcessGroup | None:
    """The process group of a 1-D DeviceMesh; a group, or None, is returned as it is."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{name} must be a process group or a 1-D DeviceMesh, got a mesh of {group.ndim} dimensions "
                f"{group.mesh_dim_names}; take one dimension of it, as in mesh['tp']."
            )
        return group.get_group()
    if group is not None and not isinstance(group, ProcessGroup):
        raise TypeError(f"{name} must be a process group, a 1-D DeviceMesh or None, got {type(group).__name__}.")
    return group


@dataclass
class _Agreement:
    """What the ranks settled at first use; the only mutable part of a shard."""

    host_group: ProcessGroup | None = None
    replica_group: ProcessGroup | None = None
    groups_ready: bool = False
    contracts: dict[bool, Mapping[str, Any]] = field(default_factory=dict)
    tile_keys: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict)


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
    _agreement: _Agreement = field(default_factory=_Agreement, init=False, repr=False)

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
            outside = set(_ranks(self.token_group)) - set(_ranks(self.vocab_group))
            if outside:
                raise ValueError(
                    f"token_group must be a subset of vocab_group; ranks {sorted(outside)} are not in vocab_group "
                    f"{_ranks(self.vocab_group)}. Make vocab_group the union of both."
                )
        if self.grad_divisor == 0:
            raise ValueError("grad_divisor must not be zero.")

    def __deepcopy__(self, memo: dict[int, Any]) -> "VocabShard":
        return self  # it does not change, and process groups cannot be copied

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
            vocab_group: None is the default group, as everywhere in torch.distributed.
            padded_vocab_size: rows of the stored classifier, if it was padded beyond ``vocab_size``.
        """
        group = as_group(vocab_group, "vocab_group") or dist.group.WORLD
        rows = vocab_size if padded_vocab_size is None else padded_vocab_size
        if rows < vocab_size:
            raise ValueError(f"padded_vocab_size must be at least vocab_size = {vocab_size}, got {rows}.")
        size = -(-rows // dist.get_world_size(group))
        start = min(size * dist.get_rank(group), rows)
        return cls(
            ((start, min(start + size, rows)),),
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
        return cls(
            dtensor_runs(weight),
            weight.shape[0] if vocab_size is None else vocab_size,
            weight.device_mesh.get_group(),
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
        keys = self._agreement.tile_keys
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
    def host_group(self) -> ProcessGroup | None:
        """A group over the ranks of ``vocab_group`` that moves CPU tensors: sizes and agreements go over it."""
        self._make_groups()
        return self._agreement.host_group

    @property
    def replica_group(self) -> ProcessGroup | None:
        """The ranks of ``vocab_group`` that bring the same tokens as this one, where ``token_group`` is smaller."""
        self._make_groups()
        return self._agreement.replica_group

    def _make_groups(self) -> None:
        agreement, group = self._agreement, self.vocab_group
        if agreement.groups_ready or group is None:
            return
        agreement.host_group = _host_group(group)
        if self.token_group is not None and dist.get_world_size(self.token_group) < dist.get_world_size(group):
            places: list[Any] = [None] * dist.get_world_size(group)
            mine = (_ranks(self.token_group), dist.get_rank(self.token_group))
            dist.all_gather_object(places, mine, group=agreement.host_group)
            _check_token_groups(places)
            replicas = [rank for rank, place in zip(_ranks(group), places, strict=True) if place[1] == mine[1]]
            agreement.replica_group = new_subgroup(replicas, group, dist.get_backend(group))
        agreement.groups_ready = True

    def agree(self, contract: Mapping[str, Any], first_call: Mapping[str, Any], fault: str | None) -> None:
        """Checks once, collectively, that all ranks of the vocabulary group call the same loss; afterwards locally.

        Training and evaluation (grad mode on and off) each have a contract of their own.

        Args:
            contract: what must be equal on all ranks, in every call, by name.
            first_call: what must be equal on all ranks, but may change from call to call.
            fault: why this rank cannot go on, if it cannot; every rank then raises.

        Raises:
            ValueError: on every rank, with what each rank said.
        """
        contracts, training = self._agreement.contracts, torch.is_grad_enabled()
        if self.vocab_group is None:
            if fault is None and (self.num_real_rows < self.vocab_size or self.runs[0][0] != 0):
                fault = (
                    f"without vocab_group this process must hold all {self.vocab_size} rows, got {self.runs}; pass the "
                    "group of the ranks that hold the others."
                )
            if fault:
                raise ValueError(fault)
            return
        if training in contracts:
            changed = [
                f"{name}: {contracts[training][name]} -> {contract[name]}"
                for name in contract
                if contract[name] != contracts[training][name]
            ]
            if fault or changed:
                raise ValueError(
                    fault
                    or f"this call differs from the first one made with this VocabShard ({'; '.join(changed)}). The "
                    "ranks agreed on the first call's settings; build another VocabShard for other settings."
                )
            return
        world = dist.get_world_size(self.vocab_group)
        said: list[Any] = [None] * world
        dist.all_gather_object(said, ({**contract, **first_call}, self.runs, fault), group=self.host_group)
        faults = _faults(said, _ranks(self.vocab_group), self.vocab_size)
        if faults:
            raise ValueError("the ranks of the vocabulary group cannot compute a loss together:\n" + "\n".join(faults))
        contracts[training] = dict(contract)


def dtensor_runs(weight: DTensor) -> tuple[tuple[int, int], ...]:
    """Global rows (start, stop) of a DTensor's local part that is sharded along dimension 0."""
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return ((offset[0], offset[0] + shape[0]),)


def _ranks(group: ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def _host_group(group: ProcessGroup) -> ProcessGroup:
    """The group itself where it moves CPU tensors, else a gloo group over the same ranks."""
    if "cpu:" in str(dist.get_backend_config(group)):
        return group
    return new_subgroup(_ranks(group), group, "gloo")


def new_subgroup(
    ranks: list[int],
    within: ProcessGroup | Sequence[ProcessGroup],
    backend: str | None = None,
    timeout: timedelta | None = None,
) -> ProcessGroup:
    """A new group of some ranks of another one, made by the ranks of that one alone.

    Args:
        ranks: this rank's new group; the calls of its other ranks must name the same.
        within: a group of ranks that all make this call; or several, such as the dimensions of a mesh, all ranks of
            which make it.
        backend, timeout: None: torch's default.

    Raises:
        RuntimeError: on every rank, where torch could not make it: it names such a group after the number of groups
            that a rank is in, and ranks with different numbers would wait for each other. Or where ranks disagree on
            who is in a group.
    """
    said = [(dist.get_rank(), len(dist.distributed_c10d._world.pg_names), sorted(ranks))]
    for group in [within] if isinstance(within, ProcessGroup) else within:
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, said, group=group)
        said = [one for part in parts for one in part]
    numbers = {rank: number for rank, number, _ in said}
    if len(set(numbers.values())) > 1:
        raise RuntimeError(
            f"ranks {list(numbers)} are in {list(numbers.values())} process groups; torch {torch.__version__} can make "
            "a new group of them only where these numbers are equal. Make the loss's first call before groups that "
            'some ranks are not in, or start with init_process_group("cpu:gloo,cuda:nccl"), which needs fewer groups.'
        )
    members = {rank: members for rank, _, members in said}
    if any(members.get(other) != mine for mine in members.values() for other in mine):
        raise RuntimeError(f"the ranks do not agree on who shares a group: {members}. Give every rank equal settings.")
    made = dist.new_group(
        sorted(ranks), timeout=timeout, backend=backend, use_local_synchronization=True, group_desc="cce_dist"
    )
    assert isinstance(made, ProcessGroup)
    return made


def _check_token_groups(places: list[Any]) -> None:
    groups = {tuple(ranks) for ranks, _ in places}
    if len({len(ranks) for ranks in groups}) > 1:
        raise ValueError(
            f"the token groups of a vocabulary group must be of one size, got {sorted(groups)}; "
            "split the ranks evenly, or make token_group the whole vocab_group."
        )


def _faults(said: list[Any], ranks: list[int], vocab_size: int) -> list[str]:
    """What is wrong between the ranks, one line each, the same on every rank."""
    lines = [f"  rank {rank}: {fault}" for rank, (_, _, fault) in zip(ranks, said, strict=True) if fault]
    if lines:
        return lines
    for name in said[0][0]:
        values = [contract.get(name) for contract, _, _ in said]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in zip(ranks, values, strict=True))
            lines.append(f"  {name} must be equal on all ranks, got {listed}.")
    rows = sorted((start, stop, rank) for rank, (_, runs, _) in zip(ranks, said, strict=True) for start, stop in runs)
    end = 0
    for start, stop, rank in rows:
        if start != end:
            kind = "overlap" if start < end else "leave a gap"
            lines.append(
                f"  the shards must tile rows 0 to {vocab_size}, but {kind} before row {start} of rank {rank}."
            )
        end = max(end, stop)
    if end < vocab_size:
        lines.append(f"  the shards must tile rows 0 to {vocab_size}, but end at row {end}.")
    return lines
