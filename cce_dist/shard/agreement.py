"""Before a call's first collective on a device, the hosts agree on the call: the MAX over ranks of a few integers.

Each number v goes as the pair (v, −v), so that one MAX shows the largest, the smallest, and whether all are equal: the
number of tokens, a fingerprint of everything that must be equal, and whether a rank has a fault of its own. What any
host knows of a fault is thus an error on every rank, in any call. Texts are exchanged after a mismatch, and at a
shard's first use, where the ranks' rows are compared too.

The MAX is by dissemination (Hensgen, Finkel, Manber 1988): in round k each rank sends what it knows to the one 2^k
places on, ⌈log2 W⌉ messages one after the other. Measured on one host with 8 ranks: 0.28 ms, gloo's all-reduce, a ring,
1.0 ms.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cce_dist.shard.groups import host_group, moves_cpu_tensors, ranks_of

if TYPE_CHECKING:
    from cce_dist.shard.vocab_shard import VocabShard


@dataclass
class State:
    """What a shard has learnt from the other ranks; its only mutable part."""

    compared: bool = False
    counted: bool = False
    agreed: set[int] = field(default_factory=set)
    tile_keys: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict)


class Agreement:
    """An agreement on one call, begun when it is constructed and awaited in `most_tokens`.

    Args:
        shard: of the call.
        tokens: that this rank brings.
        contract: what must be equal on all ranks, by name; numbers, strings, booleans and None.
        fault: why this rank cannot go on, if it cannot.
        every_call: False: a contract that was agreed on before is not exchanged again, and what a rank comes to know
            later is an error on that rank alone. No CPU group is needed then.
        counts: the call sums over ``shard.count_group``, whose ranks are compared too, once.

    Raises:
        TypeError, ValueError: the fault, where no other rank is to be told.
    """

    def __init__(
        self,
        shard: "VocabShard",
        tokens: int,
        contract: Mapping[str, Any],
        fault: Exception | None = None,
        *,
        every_call: bool = True,
        counts: bool = False,
    ) -> None:
        self._shard, self._tokens, self._contract, self._fault = shard, tokens, contract, fault
        self._most: int | None = None
        self._counts = counts and shard.count_group is not None and not shard._state.counted
        if shard.vocab_group is None:
            if fault is None and (shard.num_real_rows < shard.vocab_size or shard.runs[0][0] != 0):
                fault = ValueError(
                    f"without vocab_group this process must hold all {shard.vocab_size} rows, got {shard.runs}; pass "
                    "the group of the ranks that hold the others."
                )
            if fault is not None:
                raise fault
            self._most = tokens
            return
        self._fingerprint = _fingerprint(contract)
        known = shard._state.agreed
        if not every_call and (self._fingerprint in known or (fault is not None and known)):
            if fault is not None:
                raise fault
            self._most = tokens
            return
        self._group = host_group(shard.vocab_group) if every_call else shard.vocab_group
        # Whatever one rank has yet to learn, all do again: it may have built a shard of its own anew.
        flags = (fault is not None, not shard._state.compared, self._counts)
        self._exchange = _Max((*_pair(tokens), *_pair(self._fingerprint), *map(int, flags)), self._group)

    def most_tokens(self) -> int:
        """The most tokens that any rank brings, once the ranks have agreed.

        Raises:
            ValueError: on every rank, with what each said.
        """
        if self._most is None:
            most, least, high, low, faulty, is_new, counts = self._exchange.finish()
            self._counts = bool(counts)
            same_tokens = self._shard.token_group is None
            unequal = high != -low or (same_tokens and most != -least)
            if faulty or unequal or is_new:
                self._compare(same_tokens)
                _ = self._shard.replica_group  # made now, not in backward
            self._shard._state.compared = True
            self._shard._state.agreed.add(self._fingerprint)
            self._most = most
        if self._counts:
            self._compare_counts([])
        return self._most

    def _compare(self, same_tokens: bool) -> None:
        assert self._shard.vocab_group is not None
        contract = {**self._contract, **({"number of tokens": self._tokens} if same_tokens else {})}
        said: list[Any] = [None] * dist.get_world_size(self._group)
        fault = None if self._fault is None else str(self._fault)
        dist.all_gather_object(said, (contract, self._shard.runs, fault), group=self._group)
        faults = _faults(said, ranks_of(self._shard.vocab_group), self._shard.vocab_size)
        if faults and self._counts:
            self._compare_counts(faults)
        _raise_if(faults)

    def _compare_counts(self, faults: list[str]) -> None:
        """The same over the count group, whose other vocabulary groups would wait for this one in its sum."""
        self._counts = False
        outer = self._shard.count_group
        assert outer is not None
        if self._shard.vocab_group is not None and set(ranks_of(outer)) <= set(ranks_of(self._shard.vocab_group)):
            return
        group, fingerprint = host_group(outer), _fingerprint(self._contract)
        high, low, faulty = _Max((*_pair(fingerprint), int(bool(faults))), group).finish()
        if high != -low or faulty:
            said: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(said, (self._contract, faults), group=group)
            lines = [line for _, others in said for line in others]
            _raise_if(list(dict.fromkeys(lines)) or _unequal([contract for contract, _ in said], ranks_of(outer)))
        self._shard._state.counted = True


def _pair(number: int) -> tuple[int, int]:
    return number, -number


_TAG = 0x0CCE
"""Of the first round's messages; a user's own, on the same group, have others."""


class _Max:
    """The largest of each number over the ranks of a group; its first message is under way when it is constructed."""

    def __init__(self, numbers: tuple[int, ...], group: ProcessGroup) -> None:
        self._group, self._ranks = group, ranks_of(group)
        self._own = dist.get_rank(group)
        self._on_host = moves_cpu_tensors(group)
        device = "cpu" if self._on_host else torch.device("cuda", torch.cuda.current_device())
        self._known = torch.tensor(numbers, dtype=torch.int64, device=device)
        self._round = self._begin(0) if self._on_host and len(self._ranks) > 1 else None

    def finish(self) -> list[int]:
        if not self._on_host:  # NCCL: at first use alone
            dist.all_reduce(self._known, dist.ReduceOp.MAX, group=self._group)
        number = 0
        while self._round is not None:
            sent, received, theirs = self._round
            received.wait()
            sent.wait()
            self._known = torch.maximum(self._known, theirs)
            number += 1
            self._round = self._begin(number) if 1 << number < len(self._ranks) else None
        numbers: list[int] = self._known.tolist()
        return numbers

    def _begin(self, number: int) -> tuple[Any, Any, Tensor]:
        step, world, tag = 1 << number, len(self._ranks), _TAG + number
        theirs = torch.empty_like(self._known)
        to, source = self._ranks[(self._own + step) % world], self._ranks[(self._own - step) % world]
        sent = dist.isend(self._known, to, group=self._group, tag=tag)
        return sent, dist.irecv(theirs, source, group=self._group, tag=tag), theirs


def _fingerprint(contract: Mapping[str, Any]) -> int:
    """62 bits, equal on ranks whose contracts are."""
    digest = hashlib.blake2b(repr(sorted(contract.items())).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def _raise_if(faults: list[str]) -> None:
    if faults:
        raise ValueError("the ranks of the vocabulary group cannot compute a loss together:\n" + "\n".join(faults))


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
    for name in dict.fromkeys(name for contract in contracts for name in contract):
        values = [contract.get(name, "nothing") for contract in contracts]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in zip(ranks, values, strict=True))
            lines.append(f"  {name} must be equal on all ranks, got {listed}.")
    return lines
