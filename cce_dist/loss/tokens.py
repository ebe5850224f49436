"""Tokens on their way to the kernels and back: flattened and shifted, gathered over ranks, the valid ones first.

In: hidden states and labels of any leading shape, plain or DTensors. Out: losses and gradients in the caller's order.

Shapes: n tokens of this rank, N tokens of the token group, D hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from cce_dist.collectives import gather_tokens, start_all_reduce, start_reduce_scatter
from cce_dist.shard import VocabShard
from cce_dist.shard.groups import ranks_of


def gather(
    hidden_nD: Tensor, labels_n: Tensor, shard: VocabShard, most: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """All tokens of the token group, each rank's part padded to ``most``; without one, the rank's own."""
    labels_N = gather_values(labels_n, shard, most, ignore_index)
    return gather_values(hidden_nD, shard, most, 0), labels_N


def gather_values(values_n: Tensor, shard: VocabShard, most: int, fill: float) -> Tensor:
    """Values [N, ...] of all tokens of the token group, padded with ``fill``."""
    if shard.token_group is None:
        return values_n
    return gather_tokens(values_n, most, shard.token_group, fill=fill)


def own(values_N: Tensor, num_tokens: int, most: int, shard: VocabShard) -> Tensor:
    """This rank's part of what `gather` has brought together."""
    if shard.token_group is None:
        return values_N
    first = most * dist.get_rank(shard.token_group)
    return values_N[first : first + num_tokens].clone()


def start_sum(partial_N: Tensor, num_tokens: int, shard: VocabShard) -> Callable[[], Tensor]:
    """Starts summing values [N, ...] of all tokens, in place, over the vocabulary group; when called, the sums of this
    rank's."""
    if shard.token_group is None:
        return (lambda: partial_N) if shard.vocab_group is None else start_all_reduce(partial_N, shard.vocab_group)
    finish_scatter = start_reduce_scatter(partial_N, num_tokens, shard.token_group)

    def finish() -> Tensor:
        own_n = finish_scatter()
        if shard.replica_group is not None:
            own_n = own_n.contiguous()
            dist.all_reduce(own_n, group=shard.replica_group)
        return own_n

    return finish


def in_reduce_dtype(partial_N: Tensor, shard: VocabShard) -> Tensor:
    """In what dtype the ranks' parts are summed."""
    return partial_N if shard.reduce_dtype is None else partial_N.to(shard.reduce_dtype)


def shifted(labels: Tensor, shift: int, ignore_index: int) -> Tensor:
    """Labels moved ``shift`` positions ahead; positions without a label are ignored."""
    if shift == 0:
        return labels
    moved = torch.full_like(labels, ignore_index)
    kept = max(labels.shape[-1] - shift, 0)
    moved[..., :kept] = labels[..., shift:]
    return moved


def unflatten(values_n: Tensor, labels: Tensor, shift: int) -> Tensor:
    values = values_n.view(labels.shape)
    return values if shift == 0 else values[..., : max(labels.shape[-1] - shift, 0)]


def held(hidden: Any, labels: Any, shard: VocabShard) -> tuple[Any, Any, bool]:
    """Hidden states and labels as plain tensors, without communication; or still DTensors, to be `redistributed`.

    Raises:
        ValueError: DTensors that say something else than the shard.
    """
    given = {"hidden": hidden, "labels": labels}
    for name, x in given.items():
        if not isinstance(x, DTensor):
            continue
        placements = tuple(x.placements)
        if x.device_mesh.ndim != 1:
            raise ValueError(
                f"{name} must be a plain tensor or a DTensor on a 1-D mesh, got {placements} on a mesh of shape "
                f"{tuple(x.device_mesh.shape)}; pass its to_local()."
            )
        ranks = ranks_of(x.device_mesh.get_group())
        own = shard.token_group is not None and len(ranks) > 1 and set(ranks) <= set(ranks_of(shard.token_group))
        last = hidden.ndim - 1
        if own and not (isinstance(placements[0], ShardPlacement) and placements[0].dim != last):
            raise ValueError(
                f"{name} is a DTensor with placements {placements} over ranks {ranks}, of which token_group says that "
                "each brings tokens of its own: shard it along a dimension of tokens, or leave token_group out."
            )
        if own or placements == (Replicate(),):
            given[name] = x.to_local(grad_placements=placements)
    return given["hidden"], given["labels"], any(isinstance(x, DTensor) for x in given.values())


def redistributed(x: Tensor) -> Tensor:
    """All tokens of a DTensor, on each rank; the gradient that each has is that of all tokens."""
    if not isinstance(x, DTensor):
        return x
    return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
