"""How every benchmark here takes its times: runs that take turns, behind a queue of work that hides their launches."""

import functools
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

QUEUE_MS = 30.0
WARM_UP = 2


@functools.cache
def _sleep_cycles() -> int:
    """The argument of torch.cuda._sleep that keeps this GPU busy for QUEUE_MS."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 20_000_000
    for _ in range(2):  # the first one wakes the GPU up
        start.record()
        torch.cuda._sleep(cycles)
        stop.record()
        stop.synchronize()
    return int(cycles * QUEUE_MS / start.elapsed_time(stop))


def interleaved_ms(runs: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cuda") -> dict[str, float]:
    """Median milliseconds of each run; one of each per round, after two rounds of warm-up.

    Every run is launched while the GPU is busy for another 30 ms, so that what is timed is its work on the GPU and not
    its launches (a run that waits for the device, or takes the host longer than that, still shows it). On a CPU it is
    wall-clock time.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + WARM_UP):
        for name, run in runs.items():
            elapsed_ms = once_ms(run, device)
            if turn >= WARM_UP:
                times[name].append(elapsed_ms)
    return {name: median(values) for name, values in times.items()}


def interleaved_launch_ms(runs: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cuda") -> dict[str, float]:
    """Median milliseconds until each run returns on the host, on an idle device and without waiting for its work.

    They take turns; each follows a first run of its own, whose imports and caches are not what is timed.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(_once_host(run))
    if device == "cuda":
        torch.cuda.synchronize()
    return {name: median(values) for name, values in times.items()}


def once_ms(run: Callable[[], Any], device: str) -> float:
    """Milliseconds of one run: of its work on the GPU, or by the clock on a CPU."""
    return _once_cuda(run) if device == "cuda" else _once_host(run)


def _once_cuda(run: Callable[[], Any]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = _sleep_cycles()
    torch.cuda.synchronize()
    torch.cuda._sleep(cycles)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def _once_host(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


class Phases:
    """Prints how long each phase of a benchmark took, since device time is dear."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()

    def done(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        print(f"[{now - self.start:6.1f} s] {name}: {now - self.last:.1f} s", flush=True)
        self.last = now
