"""Stage 2: do the ranks form a process group, and how fast are it and each device?

In: a store, the rank, the device and its backend. Out: a `Report` of the times of all-reduces and of a product; which
ranks are slow; the rows of the table. The group stays, for the stage after it.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cce_dist.tools.doctor.reports import Faults, Report, ranks_text


def examine(store: dist.Store, rank: int, world: int, device: torch.device, backend: str, seconds: float) -> Report:
    # Longer than the stage: its own clock ends a hang with a report, before NCCL ends it without.
    limit = timedelta(seconds=2 * seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    faults: Faults = []
    total = torch.full((4,), float(rank + 1), device=device)
    dist.all_reduce(total)
    expected = world * (world + 1) / 2
    if total.tolist() != [expected] * 4:
        text = f"an all-reduce of rank numbers gave {total.tolist()}, not {expected}; check the links and the driver."
        faults.append(("all-reduce", text))
    size = 64 << 20 if device.type == "cuda" else 4 << 20
    small, large = (torch.zeros(count // 4, device=device) for count in (8, size))
    latency = _seconds(lambda: dist.all_reduce(small), device, 20)
    took = _seconds(lambda: dist.all_reduce(large), device, 5)
    side = 4096 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = _seconds(lambda: a @ b, device, 10)
    facts = {
        "backend": backend,
        "latency": latency,
        "bytes": size,
        "bandwidth": 2 * (world - 1) / world * size / took,
        "took": took,
        "flops": 2 * side**3 / product,
        "gemm": f"{side} x {side} {str(dtype).removeprefix('torch.')}",
    }
    return Report(facts, faults, [], [])


def _seconds(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The median of single rounds after one of warm-up."""
    times = []
    for _ in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def compare(reports: Mapping[int, Report]) -> tuple[Faults, Faults]:
    flops = {rank: report.facts["flops"] for rank, report in reports.items()}
    middle = statistics.median(flops.values())
    slow = [rank for rank, value in flops.items() if value < 0.75 * middle]
    if not slow:
        return [], []
    named = f"{ranks_text(slow)}: under 75 % of the median {middle / 1e12:.3g} TFLOP/s"
    return [], [("GEMM", f"{named}. Every step waits for the slowest: look for other jobs, heat, and clock limits.")]


def describe(reports: Mapping[int, Report]) -> list[tuple[str, str]]:
    first = next(iter(reports.values())).facts
    slowest = max(reports, key=lambda rank: reports[rank].facts["took"])
    took = reports[slowest].facts
    flops = {rank: report.facts["flops"] / 1e12 for rank, report in reports.items()}
    weakest = min(flops, key=lambda rank: flops[rank])
    timed = f"8 B in {1e3 * took['latency']:.3g} ms; {took['bytes'] >> 20} MiB in {1e3 * took['took']:.3g} ms"
    return [
        ("groups", f"{first['backend']}, {len(reports)} rank(s)"),
        ("all-reduce", f"{timed}, {took['bandwidth'] / 1e9:.3g} GB/s of bus (rank {slowest})"),
        ("GEMM", f"{first['gemm']}: {flops[weakest]:.3g} (rank {weakest}) to {max(flops.values()):.3g} TFLOP/s"),
    ]
