"""The owner of rows that are DTensors on FSDP's mesh: which ranks share a loss, and what a gradient is divided by.

In: the head and the mesh that its weight lies on. Out: a `VocabShard` over groups of the loss's own; local rows, whole
ones for real logits and for code that reads the weight, each with the gradient that FSDP would have made.

Shapes: D hidden, V rows of the whole classifier, R local rows, S shards, T tensor-parallel ranks.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from cce_dist.config import CCEConfig
from cce_dist.fsdp.in_full import unshard
from cce_dist.fsdp.private import forward_root, governing_group, in_backward
from cce_dist.heads.collective_logits import await_ranks
from cce_dist.heads.owner import OnTheseRanks, divide_gradient
from cce_dist.shard import VocabShard, host_group, new_subgroup
from cce_dist.shard.rows import even_parts, gather_rows, local_rows, scatter_rows, size_of


class FSDPOwner(OnTheseRanks):
    """The owner of rows that are DTensors on FSDP's mesh, outside of FSDP's groups.

    Args:
        fsdp_dimensions: of the weight's mesh, the first ones, 1 or 2 (HSDP); one of tensor parallelism may follow.
        fsdp_group: the FSDPParamGroup that held the head, for what the user has set on it; None where there was none.
        sequence_parallel: as in `shard_head`.
        config: ``vocab_parallel_size`` and ``materialize`` of it.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Linear,
        fsdp_dimensions: int,
        fsdp_group: Any | None,
        sequence_parallel: bool,
        config: CCEConfig,
    ) -> None:
        assert isinstance(head.weight, DTensor)
        self._model = model
        self._head = head
        self._fsdp_group = fsdp_group
        self._materialize = config.materialize
        self._in_full: dict[tuple[str, bool], Tensor] = {}
        self._roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        mesh = head.weight.device_mesh
        self._device_type = mesh.device_type
        place, groups = mesh.get_coordinate(), [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
        assert place is not None
        ranks_ST = mesh.mesh
        self._replica_group, self._tp_group = None, None
        if fsdp_dimensions == 2:
            ranks_ST, self._replica_group = ranks_ST[place[0]], groups[0]
        if mesh.ndim > fsdp_dimensions:
            self._tp_group = groups[-1]
        self._shard_group = groups[fsdp_dimensions - 1]
        shards = ranks_ST.shape[0]
        ranks_ST = ranks_ST.reshape(shards, -1)
        parts = ranks_ST.shape[1]
        s, t = place[fsdp_dimensions - 1], place[-1] if self._tp_group is not None else 0
        num_rows = head.weight.shape[0]
        self._parts = even_parts((0, num_rows), parts)
        self._shards = even_parts(self._parts[t], shards)
        assert head.weight.to_local().shape[0] == size_of(self._shards[s])

        # Groups of the loss's own: on FSDP's, its collectives would queue behind the all-gathers that FSDP prefetches.
        def group(ranks: Tensor) -> ProcessGroup:
            return new_subgroup(ranks.flatten().tolist(), groups)

        # Of the S shards, these have the same rows as this rank's vocabulary group, and those the same place in it.
        d = shards if config.vocab_parallel_size is None else config.vocab_parallel_size // parts
        together, alike = slice(s // d * d, s // d * d + d), slice(s % d, None, d)
        self._held = self._shards[alike]
        self._held_group = None if d == shards else group(ranks_ST[alike, t])
        vocab_group = group(ranks_ST[together])
        own_tokens = self._tp_group is None or sequence_parallel
        token_group = vocab_group if own_tokens else group(ranks_ST[together, t])
        # All ranks with tokens of their own: those of the mesh, but for other parts of tp that bring the same.
        counted = mesh.mesh if own_tokens else mesh.mesh[..., t]
        count_group = token_group if counted.numel() == dist.get_world_size(token_group) else group(counted)
        self._token_copies = 1 if own_tokens else parts
        # All ranks that gather the rows for real logits, on the hosts, where they are more than the vocabulary group.
        self._gathering = None if d == shards else host_group(group(ranks_ST))
        self.shard = VocabShard(
            tuple(self._held),
            num_rows,
            vocab_group=vocab_group,
            token_group=token_group,
            count_group=count_group,
            grad_divisor=float(mesh.size() // parts),
        )
        host_group(vocab_group)  # made now, not in the first call

    def local_weight(self) -> Tensor:
        """The rank's rows [R, D] on the compute device; the gradient is averaged as FSDP averages."""
        return self._local(self._sharded()["weight"])

    def local_bias(self) -> Tensor | None:
        """The rank's bias [R], likewise."""
        bias = self._sharded().get("bias")
        return None if bias is None else self._local(bias)

    def gathered_forward(self, hidden: Tensor) -> Tensor:
        """The head's forward where real logits [..., V] are wanted: the classifier is gathered in hidden's dtype."""
        await_ranks(self.shard, hidden, "the logits of a classifier that FSDP2 shards", self._gathering)
        hidden = self.own_tokens(hidden)
        whole = {name: self._whole(parameter, hidden.dtype) for name, parameter in self._sharded().items()}
        return F.linear(hidden, whole["weight"], whole.get("bias"))

    def in_full(self, parameter: Tensor) -> Tensor | None:
        """What a parameter of the head is inside a forward, to code that reads it as an attribute; None outside.

        A recomputation in backward counts as inside. One forward gathers a parameter at most once.
        """
        root = forward_root(self._places())
        name = next((name for name, p in self._sharded().items() if p is parameter), None)
        if name is None or (root is None and not in_backward()):
            return None
        key = (name, torch.is_grad_enabled())
        if key in self._in_full:
            return self._in_full[key]
        unsharded = _Unsharded(self, parameter.shape, self.compute_dtype() or parameter.dtype)
        whole = unshard(self._stored(parameter), unsharded, self._materialize, name)
        if root is not None:
            self._in_full[key] = whole
            self._forget_after(root)
        return whole

    def _forget_after(self, root: nn.Module) -> None:
        """Lets go of what a forward of this module has gathered when it ends, also by an exception."""
        if root not in self._roots:
            self._roots.add(root)
            root.register_forward_hook(lambda *_: self._in_full.clear(), always_call=True)

    def _sharded(self) -> dict[str, Tensor]:
        """The head's weight and bias, if any, as they are sharded: inside a forward the attributes are not that."""
        return {name: p for name, p in self._head.named_parameters(recurse=False) if name in ("weight", "bias")}

    def own_tokens(self, hidden: Tensor) -> Tensor:
        """Plain hidden states of the tokens that this rank brings, out of what a tensor-parallel body gives."""
        if not isinstance(hidden, DTensor):
            return hidden
        if self._token_copies == 1 and self._tp_group is not None:  # sequence parallel
            if not all(isinstance(placement, Shard) for placement in hidden.placements):
                raise ValueError(
                    f"sequence_parallel=True, but the head's hidden states are {hidden.placements}: every rank of tp "
                    "would count the same tokens as its own. Drop sequence_parallel, or give the head sharded tokens."
                )
            return hidden.to_local(grad_placements=hidden.placements)
        return hidden.full_tensor()

    def compute_dtype(self) -> torch.dtype | None:
        """What FSDP's mixed-precision policy computes in; None: the parameters' own dtype."""
        group = self._fsdp_group or governing_group(self._places())
        return None if group is None else group.mp_policy.param_dtype

    def _places(self) -> Iterator[nn.Module]:
        """Where FSDP's settings for the head are looked for, first the group that would hold or held it."""
        yield self._head
        yield from self._model.modules()

    def _divisor(self) -> float:
        for group in (self._fsdp_group, governing_group(self._places())):
            if group is not None and group.gradient_divide_factor is not None:
                return float(group.gradient_divide_factor)
        return self.shard.grad_divisor

    def _local(self, parameter: Tensor) -> Tensor:
        rows = self._stored(parameter)
        if self._held_group is not None:
            rows = gather_rows(rows, [size_of(run) for run in self._held], self._held_group)
        return divide_gradient(rows, self._divisor())

    def _whole(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        rows = self.gather(self._stored(parameter).to(dtype))
        return divide_gradient(rows, self._divisor() * self._token_copies)

    def gather(self, rows: Tensor) -> Tensor:
        """All rows, of what `_stored` gives on each rank."""
        for group, sizes in self._cuts():
            rows = gather_rows(rows, sizes, group)
        return rows

    def scatter(self, grad: Tensor) -> Tensor:
        """The gradient of this rank's rows, of each rank's gradient of all of them; averaged as FSDP averages."""
        for group, sizes in reversed(self._cuts()):
            grad = scatter_rows(grad, sizes, group)
        return grad / (self._divisor() * self._token_copies)

    def _cuts(self) -> list[tuple[ProcessGroup, list[int]]]:
        """The groups that the rows are cut over, from the last cut to the first, with the rows of each rank."""
        cuts = [(self._shard_group, [size_of(run) for run in self._shards])]
        if self._tp_group is not None:
            cuts.append((self._tp_group, [size_of(run) for run in self._parts]))
        return cuts

    def _stored(self, parameter: Tensor) -> Tensor:
        """The rows that FSDP stores on this rank, on the compute device: from the CPU, where FSDP offloads."""
        rows = local_rows(parameter).to(self._device_type)
        return rows if self._replica_group is None else _SumOverReplicas.apply(rows, self._replica_group)


class _SumOverReplicas(torch.autograd.Function):
    """Identity; the gradient is summed over the replicas of the shard."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


@dataclass(frozen=True)
class _Unsharded:
    """A parameter of the owner's head as it is inside a forward."""

    owner: FSDPOwner
    shape: torch.Size
    dtype: torch.dtype

    def gather(self, rows: Tensor) -> Tensor:
        return self.owner.gather(rows)

    def scatter(self, grad: Tensor) -> Tensor:
        return self.owner.scatter(grad)
