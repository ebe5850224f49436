"""Where this process runs: its rank, its device, and the process group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d


class Place(NamedTuple):
    """One rank of the run."""

    rank: int
    world: int
    device: torch.device


def local_device() -> tuple[torch.device, str]:
    """This process's device, made the current one, and the backend of its groups, from the launcher's environment.

    NCCL where each local rank has a GPU of its own, with gloo beside it for CPU tensors; gloo on shared GPUs; gloo on
    the CPU.
    """
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed wants it in the environment
    # LOCAL_SIZE is the name that the DeepSpeed launcher gives it.
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    gpus = torch.cuda.device_count()
    if not gpus:
        return torch.device("cpu"), "gloo"
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)
    os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the number of the GPU
    return device, "cpu:gloo,cuda:nccl" if gpus >= local_world else "gloo"


@contextmanager
def process_group(timeout: timedelta) -> Iterator[Place]:
    """The default process group, from the launcher's environment, or of this process alone.

    Its backend is that of `local_device`. A group that exists already is used and left alone.

    Args:
        timeout: how long a rank waits for the others, in this group and in those that are made within; also by
            DeepSpeed and DeviceMesh, which name none.
    """
    device, backend = local_device()
    ours = not dist.is_initialized()
    with _default_timeout(timeout):
        if ours:
            if "WORLD_SIZE" in os.environ:
                dist.init_process_group(backend, timeout=timeout)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield Place(dist.get_rank(), dist.get_world_size(), device)
            if ours:
                dist.barrier()  # gloo aborts where a rank leaves while another is still sending
        finally:
            if ours:
                dist.destroy_process_group()


@contextmanager
def _default_timeout(timeout: timedelta) -> Iterator[None]:
    """torch's default for groups made within, which it keeps in two module variables.

    Raises:
        RuntimeError: this version of torch does not read them.
    """
    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(c10d, name, None) for name in names}
    try:
        for name in names:
            setattr(c10d, name, timeout)
        if {c10d._get_default_timeout(c10d.Backend(backend)) for backend in ("gloo", "nccl")} != {timeout}:
            raise RuntimeError(f"torch {torch.__version__} keeps the default timeout of process groups elsewhere.")
        yield
    finally:
        for name, value in before.items():
            setattr(c10d, name, value)
