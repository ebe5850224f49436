"""Process groups: the ranks of one, a group beside it that moves CPU tensors, and new ones of some of its ranks.

What torch keeps about groups and has no public name for (their timeouts, how many there are) is read here alone.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

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


def ranks_of(group: ProcessGroup) -> list[int]:
    """Global ranks, in the group's order."""
    return dist.get_process_group_ranks(group)


def moves_cpu_tensors(group: ProcessGroup) -> bool:
    return "cpu:" in str(dist.get_backend_config(group))


def timeout_of(group: ProcessGroup) -> timedelta | None:
    """How long a collective of the group waits for a rank; None where its backend does not say.

    Raises:
        RuntimeError: gloo and NCCL of this torch keep it elsewhere.
    """
    kinds: list[Any] = []
    try:
        for device in group._device_types:
            backend: Any = group._get_backend(device)
            backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it
            timeout = getattr(getattr(backend, "options", None), "_timeout", None)
            if isinstance(timeout, timedelta):
                return timeout
            kinds.append(backend.name())
    except AttributeError as error:
        raise _unknown_torch("the timeout of a process group") from error
    if {"gloo", "nccl"} & set(kinds):
        raise _unknown_torch(f"the timeout of a {' or '.join(kinds)} group")
    return None


def _number_of_groups() -> int:
    """Of this process: torch names a group that some ranks alone make after it."""
    try:
        return len(dist.distributed_c10d._world.pg_names)
    except AttributeError as error:
        raise _unknown_torch("how many process groups there are") from error


def _unknown_torch(what: str) -> RuntimeError:
    return RuntimeError(
        f"torch {torch.__version__} does not say {what} where cce_dist looks for it. torch 2.11 and 2.13 are tested; "
        "use one of them."
    )


# Made once for a group, whatever shards use it, and forgotten with it.
_HOST_GROUPS: "WeakKeyDictionary[ProcessGroup, ProcessGroup]" = WeakKeyDictionary()
_REPLICA_GROUPS: "WeakKeyDictionary[ProcessGroup, WeakKeyDictionary[ProcessGroup, ProcessGroup]]" = WeakKeyDictionary()


def host_group(group: ProcessGroup) -> ProcessGroup:
    """A group over the same ranks that moves CPU tensors: the group itself, else one of gloo's, made once.

    All ranks of the group make the first call together.
    """
    if moves_cpu_tensors(group):
        return group
    if group not in _HOST_GROUPS:
        _HOST_GROUPS[group] = new_subgroup(ranks_of(group), group, "gloo")
    return _HOST_GROUPS[group]


def replica_group(vocab_group: ProcessGroup, token_group: ProcessGroup) -> ProcessGroup:
    """The ranks of ``vocab_group`` at this rank's place in their token groups: those that bring the same tokens.

    All ranks of the vocabulary group make the first call together.

    Raises:
        ValueError: on every rank, for token groups of unequal size.
    """
    known = _REPLICA_GROUPS.setdefault(vocab_group, WeakKeyDictionary())
    if token_group not in known:
        places: list[Any] = [None] * dist.get_world_size(vocab_group)
        place = dist.get_rank(token_group)
        dist.all_gather_object(places, (ranks_of(token_group), place), group=vocab_group)
        groups = {tuple(ranks) for ranks, _ in places}
        if len({len(ranks) for ranks in groups}) > 1:
            raise ValueError(
                f"the token groups of a vocabulary group must be of one size, got {sorted(groups)}; "
                "split the ranks evenly, or make token_group the whole vocab_group."
            )
        alike = [rank for rank, other in zip(ranks_of(vocab_group), places, strict=True) if other[1] == place]
        known[token_group] = new_subgroup(alike, vocab_group, dist.get_backend(vocab_group))
    return known[token_group]


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
        backend: None: torch's default.
        timeout: None: that of the group it comes from, the first of ``within``.

    Raises:
        RuntimeError: on every rank, where torch could not make it: it names such a group after the number of groups
            that a rank is in, and ranks with different numbers would wait for each other. Or where ranks disagree on
            who is in a group, or gloo does not connect.
    """
    outer = [within] if isinstance(within, ProcessGroup) else list(within)
    said = [(dist.get_rank(), _number_of_groups(), sorted(ranks))]
    for group in outer:
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
    try:
        made = dist.new_group(
            sorted(ranks),
            timeout=timeout or timeout_of(outer[0]),
            backend=backend,
            use_local_synchronization=True,
            group_desc="cce_dist",
        )
    except RuntimeError as error:
        if backend != "gloo":
            raise
        raise RuntimeError(
            f"gloo could not connect ranks {sorted(ranks)}, over which hosts exchange token counts and settings: "
            f"{error}. Name the network interface of this node in GLOO_SOCKET_IFNAME (as `ip addr` lists it), or do "
            'without: agreement="first_call" and max_tokens= need no such group.'
        ) from error
    assert isinstance(made, ProcessGroup)
    return made
