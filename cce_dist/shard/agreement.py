"""Before a call's first collective on a device, the hosts agree on the call: the MAX over ranks of a few integers.

Each number v goes as the pair (v, −v), so that one MAX shows the largest, the smallest, and whether all are equal: the
number of tokens, a fingerprint of everything that must be equal, and whether a rank has a fault of its own. What any
host knows of a fault is thus an error on every rank, in any call: also where one rank wants a loss, another logits.
Texts are exchanged after a mismatch, and at a shard's first use, where the ranks' rows are compared too.

The MAX is by dissemination (Hensgen, Finkel, Manber 1988): in round k each rank sends what it knows to the one 2^k
places on, ⌈log2 W⌉ messages one after the other. Measured on one host with 8 ranks: 0.28 ms, gloo's all-reduce, a ring,
1.0 ms.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cce_dist.shard.groups import host_group, moves_cpu_tensors, ranks_of, timeout_of

if TYPE_CHECKING:
    from cce_dist.shard.vocab_shard import VocabShard

A_LOSS = "a loss"
_WHAT = "what is computed"
_COUNTED: "WeakSet[ProcessGroup]" = WeakSet()
"""Count groups whose ranks have been compared."""


@dataclass
class State:
    """What a shard has learnt from the other ranks; its only mutable part."""

    compared: bool = False
    runs_of_ranks: tuple[tuple[tuple[int, int], ...], ...] = ()
    agreed: set[tuple[str, int]] = field(default_factory=set)
    tile_keys: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict)


def agree(
    shard: "VocabShard",
    what: str,
    tokens: int,
    contract: Mapping[str, Any],
    fault: Exception | None = None,
    *,
    every_call: bool = True,
    counts: bool = False,
) -> int:
    """Returns the most tokens that any rank brings, once all ranks of the vocabulary group have said the same.

    Nothing may be computed between the caller's own checks and this: what a rank comes to know later it cannot tell.

    Args:
        shard: of the call.
        what: is computed, such as `A_LOSS`; the same on all ranks.
        tokens: that this rank brings.
        contract: what else must be equal on all ranks, by name; numbers, strings, booleans and None.
        fault: why this rank cannot go on, if it cannot.
        every_call: False: a contract that was agreed on before is not exchanged again, and what a rank comes to know
            after its first call is an error on that rank alone.
        counts: the call sums over ``shard.count_group``, whose ranks are compared too, at the group's first use.

    Raises:
        ValueError: on every rank, with what each said.
        RuntimeError: a rank did not come within the group's timeout; it is named.
        Exception: the fault itself, where no other rank is to be told.
    """
    contract = {_WHAT: what, **contract}
    outer = _outer(shard) if counts else None
    if shard.vocab_group is None:
        if fault is None and (shard.num_real_rows < shard.vocab_size or shard.runs[0][0] != 0):
            fault = ValueError(
                f"without vocab_group this process must hold all {shard.vocab_size} rows, got {shard.runs}; pass the "
                "group of the ranks that hold the others."
            )
        if outer is not None:
            _compare_counts(outer, contract, [] if fault is None else [f"  rank {dist.get_rank()}: {fault}"], fault)
        if fault is not None:
            raise fault
        return tokens
    fingerprint = _fingerprint(contract)
    known = shard._state.agreed
    if not every_call and ((what, fingerprint) in known or (fault is not None and what in {name for name, _ in known})):
        if fault is not None:
            raise fault
        return tokens
    group = host_group(shard.vocab_group) if every_call else shard.vocab_group
    # Whatever one rank has yet to learn, all do again: it may have built a shard of its own anew.
    flags = (fault is not None, not shard._state.compared, outer is not None)
    most, least, high, low, faulty, is_new, is_counted = _largest(
        (*_pair(tokens), *_pair(fingerprint), *map(int, flags)), group, what
    )
    same_tokens = shard.token_group is None
    faults: list[str] = []
    if faulty or high != -low or (same_tokens and most != -least) or is_new:
        said: list[Any] = [None] * dist.get_world_size(group)
        whole = {**contract, **({"number of tokens": tokens} if same_tokens else {})}
        dist.all_gather_object(said, (whole, shard.runs, None if fault is None else str(fault)), group=group)
        faults = _faults(said, ranks_of(shard.vocab_group), shard.vocab_size)
    if is_counted and (outer := outer or _outer(shard, again=True)) is not None:
        _compare_counts(outer, contract, faults, fault)
    _raise_if(faults, fault)
    if is_new:
        _ = shard.replica_group  # made now, not in backward
        shard._state.runs_of_ranks = tuple(runs for _, runs, _ in said)
    shard._state.compared = True
    shard._state.agreed.add((what, fingerprint))
    return most


def _outer(shard: "VocabShard", again: bool = False) -> ProcessGroup | None:
    """The count group where it reaches beyond the vocabulary group, and has not been compared (or is to be again)."""
    group = shard.count_group
    if group is None or (group in _COUNTED and not again):
        return None
    if shard.vocab_group is not None and set(ranks_of(group)) <= set(ranks_of(shard.vocab_group)):
        return None
    return group


def _compare_counts(
    outer: ProcessGroup, contract: Mapping[str, Any], faults: list[str], fault: Exception | None
) -> None:
    """The same over the count group, whose other vocabulary groups would wait for this one in its sum."""
    group, fingerprint = host_group(outer), _fingerprint(contract)
    high, low, faulty = _largest((*_pair(fingerprint), int(bool(faults))), group, "a mean over the count group")
    if high != -low or faulty:
        said: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(said, (contract, faults), group=group)
        lines = list(dict.fromkeys(line for _, others in said for line in others))
        _raise_if(lines or _unequal([contract for contract, _ in said], ranks_of(outer)), fault)
    _COUNTED.add(outer)


def _pair(number: int) -> tuple[int, int]:
    return number, -number


_TAG = 0x0CCE
"""Of the first round's messages; a user's own, on the same group, have others."""


def _largest(numbers: tuple[int, ...], group: ProcessGroup, what: str) -> list[int]:
    """The largest of each number over the ranks of a group.

    Raises:
        RuntimeError: a rank did not come, or is gone.
    """
    ranks, own = ranks_of(group), dist.get_rank(group)
    if not moves_cpu_tensors(group):  # NCCL's: at first use alone
        known = torch.tensor(numbers, dtype=torch.int64, device=torch.device("cuda", torch.cuda.current_device()))
        dist.all_reduce(known, dist.ReduceOp.MAX, group=group)
        return [int(number) for number in known.tolist()]
    known, step, tag = torch.tensor(numbers, dtype=torch.int64), 1, _TAG
    while step < len(ranks):
        theirs, source = torch.empty_like(known), ranks[(own - step) % len(ranks)]
        try:
            sent = dist.isend(known, ranks[(own + step) % len(ranks)], group=group, tag=tag)
            received = dist.irecv(theirs, source, group=group, tag=tag)
            for work in (received, sent):
                assert work is not None
                work.wait()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {ranks[own]} came to {what} over ranks {ranks}, but heard nothing of it from rank {source} "
                f"within {timeout_of(group)}, or that rank is gone: it, or one that it waits for, has not made the "
                f"call. What gloo says: {error}"
            ) from error
        known, step, tag = torch.maximum(known, theirs), 2 * step, tag + 1
    return [int(number) for number in known.tolist()]


def _fingerprint(contract: Mapping[str, Any]) -> int:
    """62 bits, equal on ranks whose contracts are."""
    digest = hashlib.blake2b(repr(sorted(contract.items())).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def _raise_if(faults: list[str], own: Exception | None) -> None:
    if faults:
        text = "the ranks of the vocabulary group cannot compute a loss together:\n" + "\n".join(faults)
        raise ValueError(text) from own


def _faults(said: list[Any], ranks: list[int], vocab_size: int) -> list[str]:
    """What is wrong between the ranks, one line each, the same on every rank."""
    lines = [f"  rank {rank}: {fault}" for rank, (_, _, fault) in zip(ranks, said, strict=True) if fault]
    if lines:
        return lines
    lines = _unequal([contract for contract, _, _ in said], ranks)
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


def _unequal(contracts: list[Mapping[str, Any]], ranks: list[int]) -> list[str]:
    lines = []
    if len({contract.get(_WHAT) for contract in contracts}) > 1:
        contracts = [{_WHAT: contract.get(_WHAT)} for contract in contracts]  # nothing else can be compared
    for name in dict.fromkeys(name for contract in contracts for name in contract):
        values = [contract.get(name, "nothing") for contract in contracts]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in zip(ranks, values, strict=True))
            lines.append(f"  {name} must be equal on all ranks, got {listed}.")
    return lines
