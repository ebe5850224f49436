"""What a rank's GPU does in one run, from torch's profiler, and what its collectives put on the wire.

Busy: the union of the times of kernels that compute. Exposed: what collectives take while none does, waiting for other
ranks included. Bytes on the wire: what a rank sends in ring algorithms, from the sizes of its collectives.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Spans = list[tuple[float, float]]


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """The same times without overlaps, in their order."""
    merged: Spans = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((start, stop))
    return merged


def length(spans: Spans) -> float:
    return sum(stop - start for start, stop in spans)


def overlap_ms(kernels: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Of (name, start, stop) in microseconds."""
    kernels = list(kernels)
    moves = union((start, stop) for name, start, stop in kernels if "nccl" in name.lower())
    busy = union((start, stop) for name, start, stop in kernels if "nccl" not in name.lower())
    both = union([*moves, *busy])
    span = both[-1][1] - both[0][0] if both else 0.0
    found = {"busy": length(busy), "collectives": length(moves), "exposed": length(both) - length(busy), "span": span}
    return {f"{name}_ms": us / 1e3 for name, us in found.items()}


def profiled_ms(run: Callable[[], Any], launches_hidden: bool = True) -> dict[str, float]:
    """`overlap_ms` of one run on this rank's GPU; all ranks make the call. Without hidden launches the span is the
    run's own, and what of it is neither busy nor exposed is waiting for the host."""
    run()
    torch.cuda.synchronize()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        if launches_hidden:
            torch.cuda._sleep(60_000_000)
        run()
        torch.cuda.synchronize()
    kernels = [
        (event.name, float(event.time_range.start), float(event.time_range.end))
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "spin_kernel" not in event.name
    ]
    return overlap_ms(kernels)


class OnTheWire(TorchDispatchMode):
    """Bytes that this rank sends to others in the collectives of a run, by rings."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(op)
        if name.startswith("c10d."):
            passes = 2 if "allreduce" in name else 1
            whole = args[1] if "reduce_scatter" in name else args[0]
            world = dist.get_world_size()
            self.bytes += passes * (world - 1) / world * _bytes(whole)
        return op(*args, **(kwargs or {}))


def _bytes(x: Any) -> int:
    if isinstance(x, Tensor):
        return x.nbytes if x.device.type != "cpu" or not torch.cuda.is_available() else 0
    return sum(map(_bytes, x)) if isinstance(x, (list, tuple)) else 0
