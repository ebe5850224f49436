"""Where this process runs: its rank, its device, and the process group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist


class Place(NamedTuple):
    """One rank of the run."""

    rank: int
    world: int
    device: torch.device


@contextmanager
def process_group() -> Iterator[Place]:
    """The default process group, from the launcher's environment, or of this process alone.

    NCCL where each local rank has a GPU of its own, with gloo beside it for CPU tensors; gloo on shared GPUs; gloo on
    the CPU. A group that exists already is used and left alone.
    """
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed wants it in the environment
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", local_rank % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the number of the GPU
    ours = not dist.is_initialized()
    if ours:
        backend = "cpu:gloo,cuda:nccl" if gpus >= local_world else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), device)
        if ours:
            dist.barrier()  # gloo aborts where a rank leaves while another is still sending
    finally:
        if ours:
            dist.destroy_process_group()
