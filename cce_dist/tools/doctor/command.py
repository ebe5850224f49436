"""The command: on the ranks of a launcher, or on ranks that it starts itself; and the three stages on one rank.

    cce-dist doctor                                      one process per GPU, or two on the CPU
    torchrun ... -m cce_dist.doctor --config run.yaml    on the ranks of the run itself

Each rank looks at its machine and at the config; the ranks form their process groups and time them; a small sharded
loss is compared with fp64 logits. After each stage every rank reports to rank 0, over a connection apart from what is
being tested, and rank 0's verdict goes back, so all ranks end alike. A rank that does not answer in time is named.
"""

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cce_dist.tools.doctor import groups, loss, machine
from cce_dist.tools.doctor.config import group_size
from cce_dist.tools.doctor.council import GRACE, Council
from cce_dist.tools.doctor.reports import Stage, first_line
from cce_dist.train.place import local_device

SECONDS = 180
"""What a stage may take, unless --seconds says otherwise: on a GPU the kernels of the small loss are compiled first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 when nothing is wrong on any rank, 1 for any fault, 2 for wrong arguments."""
    parser = argparse.ArgumentParser("cce-dist doctor", description="Check every rank before a run.")
    parser.add_argument("--config", type=Path, help="the trainer's YAML, or a DeepSpeed JSON")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"limit of each of 3 stages (default {SECONDS})")
    parsed = parser.parse_args(arguments)
    if not parsed.seconds > 0:
        parser.error(f"--seconds must be above 0, got {parsed.seconds:g}")
    if "RANK" not in os.environ:
        return alone(parsed.config, parsed.seconds)
    try:
        rank, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        address = os.environ["MASTER_ADDR"]
    except (KeyError, ValueError) as error:
        print(
            f"cce-dist doctor: RANK is set, but not all of WORLD_SIZE, MASTER_ADDR and MASTER_PORT ({error!r}); start "
            "it with torchrun or another launcher that sets them, or unset RANK.",
            file=sys.stderr,
        )
        return 2
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun is the server
    return on_rank(rank, world, address, port, hosts, parsed.config, parsed.seconds)


def alone(config: Path | None, seconds: float) -> int:
    """Starts the ranks of this machine, and is where they meet."""
    world = torch.cuda.device_count() or 2
    limit = timedelta(seconds=seconds + GRACE)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
    context = mp.get_context("spawn")
    ranks = [
        context.Process(target=_started, args=(rank, world, server.port, config, seconds), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 4 * (seconds + 2 * GRACE)
    waiting = {process.sentinel: rank for rank, process in enumerate(ranks)}
    died = False
    while waiting and time.monotonic() < deadline:
        for sentinel in connection.wait(list(waiting), timeout=max(deadline - time.monotonic(), 0)):
            assert isinstance(sentinel, int)
            rank = waiting.pop(sentinel)
            ranks[rank].join()
            code = ranks[rank].exitcode
            if code not in (0, 1):
                died = True
                how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
                print(f"cce-dist doctor: the process of rank {rank} died ({how}).", file=sys.stderr)
    for rank in waiting.values():
        print(f"cce-dist doctor: rank {rank} did not end in time and was killed.", file=sys.stderr)
        ranks[rank].kill()
        ranks[rank].join()
    return int(died or bool(waiting) or any(process.exitcode != 0 for process in ranks))


def _started(rank: int, world: int, port: int, config: Path | None, seconds: float) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    sys.exit(on_rank(rank, world, "127.0.0.1", port, False, config, seconds))


def on_rank(rank: int, world: int, address: str, port: int, hosts: bool, config: Path | None, seconds: float) -> int:
    """All stages on one rank; rank 0 prints. Returns the exit code, the same on every rank that still answers.

    Args:
        address, port: of the TCPStore where the ranks meet; ``hosts``: this rank serves it.
        config: to be checked, or None.
        seconds: limit of each stage.
    """
    limit = timedelta(seconds=seconds + GRACE)
    try:
        # Two connections: a client that waits lets no other thread through, and a hanging group must be reported.
        for_reports, for_groups = (
            dist.TCPStore(address, port, world, hosts and first, timeout=limit, wait_for_workers=False)
            for first in (True, False)
        )
    except (dist.DistError, RuntimeError) as error:
        print(
            f"cce-dist doctor: rank {rank} on {socket.gethostname()} cannot reach rank 0's store at {address}:{port}: "
            f"{first_line(error)}. Check MASTER_ADDR, the port and the firewall between the nodes.",
            file=sys.stderr,
        )
        return 1
    attempt = f"cce_dist.doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    council = Council(dist.PrefixStore(attempt, for_reports), rank, world, seconds)
    store = dist.PrefixStore(f"{attempt}/groups", for_groups)
    device, backend = local_device()
    stages = [
        Stage("machine", lambda: machine.examine(config, world, device), machine.compare, machine.describe),
        Stage(
            "groups",
            lambda: groups.examine(store, rank, world, device, backend, seconds),
            groups.compare,
            groups.describe,
        ),
        Stage("loss", lambda: loss.examine(group_size(config, world), device), loss.compare, loss.describe),
    ]
    try:
        with council:
            sound = all(council.hold(stage) for stage in stages)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0 if sound else 1
