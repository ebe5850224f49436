"""ZeRO-3: the vocabulary shard is the rank's own slice of the partitioned classifier, which the loss
never gathers. (Where it is tied to the embedding, DeepSpeed gathers it for the lookup, as ever.)

The rows are read from ``param.ds_tensor``; their gradient goes to ``optimizer.partition_grads``, where DeepSpeed itself
leaves the reduced gradient of a slice. Accumulation, clipping, overflow checks, offload and checkpoints follow from
there and need nothing else. All attributes of DeepSpeed that this relies on are listed in `guard.check_zero3`.

Shapes: V rows of the classifier, Vl rows of this rank, D hidden, C elements of this rank's slice.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from cce_dist.collectives import gather_tokens, reduce_scatter_tokens
from cce_dist.deepspeed.slices import RowsFromSlices
from cce_dist.heads.owner import OnTheseRanks
from cce_dist.shard import VocabShard, new_subgroup
from cce_dist.shard.rows import size_of


class ZeRO3Rows(OnTheseRanks):
    """Shard owner of a classifier that ZeRO-3 partitions and nobody trains, as that of a reference model.

    Args:
        head: the output embedding; its weight [V, D] (and bias [V]) are partitioned parameters.
        vocab_parallel_size: ranks that share one copy of the rows; None: all that the weight is partitioned over.
        tensor_parallel: the rows that the weight holds, where it is not the whole classifier but the part of a
            tensor-parallel rank. Every rank of every tensor-parallel group makes the owner then.
        grad_divisor: of the shard, see `VocabShard`.

    Raises:
        ValueError: for a ``vocab_parallel_size`` that does not divide the ranks, or fewer rows than ranks.
    """

    def __init__(
        self,
        head: nn.Module,
        vocab_parallel_size: int | None = None,
        tensor_parallel: VocabShard | None = None,
        grad_divisor: float = 1.0,
    ) -> None:
        weight: Any = head.weight
        group = weight.ds_process_group
        num_rows, width = weight.ds_shape
        world = dist.get_world_size(group)
        size = world if vocab_parallel_size is None else vocab_parallel_size
        if world % size:
            raise ValueError(
                f"vocab_parallel_size must divide the {world} ranks that ZeRO-3 partitions over, got {size}."
            )
        if num_rows < world:
            raise ValueError(f"the classifier has {num_rows} rows, fewer than the {world} ranks of ZeRO-3.")
        self._rows = RowsFromSlices(num_rows, width, group, size)
        self._weight: Any = weight
        self._bias: Any = getattr(head, "bias", None)
        first = 0 if tensor_parallel is None else tensor_parallel.start
        self.shard = VocabShard(
            runs=tuple((first + start, first + stop) for start, stop in self._rows.runs),
            vocab_size=num_rows if tensor_parallel is None else tensor_parallel.vocab_size,
            vocab_group=_all_holders(self._rows.vocab_group, tensor_parallel),
            token_group=self._rows.vocab_group,
            count_group=group,
            grad_divisor=grad_divisor,
        )

    def local_weight(self) -> Tensor:
        """The rank's rows [Vl, D]."""
        return self._rows.assemble(_own_slice(self._weight))

    def local_bias(self) -> Tensor | None:
        """The rank's bias [Vl], or None. The bias is small: it is gathered whole and its rows taken."""
        if self._bias is None:
            return None
        own = _own_slice(self._bias)
        whole = gather_tokens(own, own.numel(), self._bias.ds_process_group)
        return torch.cat([whole[:0], *(whole[start:stop] for start, stop in self._rows.runs)])


class ZeRO3Owner(ZeRO3Rows):
    """The same of one that is trained.

    Args:
        engine: its optimizer is a ``DeepSpeedZeroOptimizer_Stage3``.
        head, vocab_parallel_size, tensor_parallel: as there.
    """

    def __init__(
        self,
        engine: Any,
        head: nn.Module,
        vocab_parallel_size: int | None = None,
        tensor_parallel: VocabShard | None = None,
    ) -> None:
        optimizer, weight = engine.optimizer, cast(Any, head.weight)
        world = dist.get_world_size(weight.ds_process_group)
        super().__init__(head, vocab_parallel_size, tensor_parallel, _grad_divisor(optimizer, world))
        self._gradients = _Gradients(engine, [self._weight] if self._bias is None else [self._weight, self._bias])
        self._trained = {p.ds_id for parameters in optimizer.fp16_groups for p in parameters}
        self._anchor = torch.zeros((), device=_device(), requires_grad=True)

    def local_weight(self) -> Tensor:
        """The rank's rows [Vl, D], differentiable unless the weight is frozen."""
        return self._differentiable(self._weight, super().local_weight, self._rows.disassemble)

    def local_bias(self) -> Tensor | None:
        """The rank's bias [Vl], or None, likewise."""
        if self._bias is None:
            return None
        return self._differentiable(self._bias, super().local_bias, self._scatter_bias)

    def _differentiable(self, parameter: Any, read: Callable[[], Any], to_slice: Callable[[Tensor], Tensor]) -> Tensor:
        if not (parameter.ds_id in self._trained and parameter.requires_grad and torch.is_grad_enabled()):
            rows: Tensor = read()
            return rows

        def deliver(grad: Tensor) -> None:
            self._gradients.add(parameter, to_slice(grad / self.shard.grad_divisor))

        delivered: Tensor = _DeliverGradient.apply(self._anchor, read, deliver)
        return delivered

    def _scatter_bias(self, grad_Vl: Tensor) -> Tensor:
        size = self._bias.ds_tensor.numel()
        whole = grad_Vl.new_zeros(size * dist.get_world_size(self._bias.ds_process_group))
        parts = grad_Vl.split([size_of(run) for run in self._rows.runs])
        for (start, stop), part in zip(self._rows.runs, parts, strict=True):
            whole[start:stop] = part
        return reduce_scatter_tokens(whole, size, self._bias.ds_process_group)


def vocab_group_size(world: int, rows: int, tokens: int | None, element: int) -> int:
    """The number of ranks that share one copy of the rows so that a micro-step moves the fewest bytes.

    With a group of g of the W ranks, a rank receives the hidden states of g − 1 others and sends their gradients back
    in fp32, and gets the rows that W/g − 1 others store and gives their gradients back. In bytes, for each of the D
    columns: (g − 1)·N·(element + 4) + (W/g − 1)·(V/W)·2·element. Of the divisors of W the one with the smallest sum is
    taken, the larger one of two equal ones. Where N is not known, all ranks: that needs the least memory.

    Args:
        world: W, the ranks that the classifier is partitioned over.
        rows: V.
        tokens: N, the most tokens that a rank brings to a micro-step (the setting ``max_tokens``).
        element: bytes of one element of weight and hidden states.
    """
    if tokens is None:
        return world

    def received(size: int) -> float:
        return (size - 1) * tokens * (element + 4) + (world / size - 1) * rows / world * 2 * element

    return min((size for size in range(world, 0, -1) if world % size == 0), key=received)


def _all_holders(group: ProcessGroup, tensor_parallel: VocabShard | None) -> ProcessGroup:
    """The ranks of this group, and those at the same places of the other tensor-parallel ranks' groups."""
    if tensor_parallel is None:
        return group
    ranks: list[Any] = [None] * dist.get_world_size(tensor_parallel.vocab_group)
    dist.all_gather_object(ranks, dist.get_process_group_ranks(group), group=tensor_parallel.vocab_group)
    world = dist.group.WORLD
    assert world is not None
    return new_subgroup(sorted(rank for part in ranks for rank in part), world)


class _DeliverGradient(torch.autograd.Function):
    """Reads rows; backward delivers their gradient. The anchor is what makes autograd run it at all."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, read: Callable[[], Tensor], deliver: Callable[[Tensor], None]) -> Tensor:
        ctx.deliver = deliver
        return read()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.deliver(grad)
        return None, None, None


class _Gradients:
    """Adds to the gradients that ZeRO-3 accumulates.

    DeepSpeed copies a gradient at the first micro-step and adds in later ones. That loses one of two gradients that a
    parameter receives in one backward: two calls of the loss, or the loss and the embedding that the classifier is tied
    to. So, for the parameters seen here, whatever comes first after ``zero_grad`` is copied and the rest is added.
    """

    def __init__(self, engine: Any, parameters: list[Any]) -> None:
        self._engine = engine
        self._optimizer = optimizer = engine.optimizer
        self._stock_partition_grads = optimizer.partition_grads
        self._stock_zero_grad = optimizer.zero_grad
        self._begun = {parameter.ds_id: False for parameter in parameters}
        optimizer.partition_grads = self._partition_grads
        optimizer.zero_grad = self._zero_grad

    def add(self, parameter: Any, grad_C: Tensor) -> None:
        """Adds this rank's slice [C] of a gradient, already divided as DeepSpeed divides; called in backward."""
        if self._optimizer._coalesce_grad_reduction:
            raise NotImplementedError(
                "engine.coalesce_grad_reduction() is not supported with cce_dist; accumulate by micro-steps instead."
            )
        # The engine says so when a gradient reaches its output; that of a loss outside its forward comes here before.
        self._optimizer.set_gradient_accumulation_boundary(self._engine.is_gradient_accumulation_boundary())
        accelerator, stream = get_accelerator(), self._optimizer.reduce_and_partition_stream
        if not accelerator.resolves_data_dependency():
            stream.wait_stream(accelerator.current_stream())
        with accelerator.stream(stream):
            self._add(parameter, grad_C)
        if not accelerator.is_synchronized_device():
            grad_C.record_stream(stream)

    def _add(self, parameter: Any, grad_C: Tensor) -> Any:
        """DeepSpeed's own delivery of one gradient; micro-step 0 means copy to it, any other means add."""
        micro_step = self._optimizer.micro_step_id
        self._optimizer.micro_step_id = int(self._begun[parameter.ds_id])
        self._begun[parameter.ds_id] = True
        try:
            return self._stock_partition_grads([parameter], [grad_C])
        finally:
            self._optimizer.micro_step_id = micro_step

    def _partition_grads(self, parameters: list[Any], gradients: list[Tensor]) -> list[Tensor]:
        """In DeepSpeed's place: gradients that autograd found for our parameters join those of the loss."""
        buffers: list[Tensor] = []
        others = [(p, grad) for p, grad in zip(parameters, gradients, strict=True) if p.ds_id not in self._begun]
        if others:
            buffers += self._stock_partition_grads(*map(list, zip(*others, strict=True)))
        for parameter, grad_C in zip(parameters, gradients, strict=True):
            if parameter.ds_id in self._begun:
                buffers += self._add(parameter, grad_C)
        return buffers

    def _zero_grad(self, *args: Any, **kwargs: Any) -> None:
        self._begun = dict.fromkeys(self._begun, False)
        self._stock_zero_grad(*args, **kwargs)


def _own_slice(parameter: Any) -> Tensor:
    """This rank's elements; read anew each time, because DeepSpeed re-points the tensor after a step."""
    slice_C: Tensor = parameter.ds_tensor
    return slice_C.detach().to(_device())


def _device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def _grad_divisor(optimizer: Any, world: int) -> float:
    """What DeepSpeed's own reduction divides by: of its two paths, the all-reduce takes sequence parallelism out."""
    all_reduces = optimizer.contiguous_gradients and not optimizer.reduce_scatter
    return world / optimizer.sequence_parallel_size if all_reduces else float(world)
