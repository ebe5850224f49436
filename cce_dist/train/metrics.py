"""What a run says: a line per logged step on stdout and in metrics.jsonl, and a progress bar. Rank 0 alone."""

import json
import resource
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cce_dist.train.place import Place


class Metrics:
    """Writes metrics.jsonl, one JSON object per logged step, and shows the progress.

    Args:
        path: the file; on a resumed run its rows after step ``done`` are dropped first.
        done, total: steps.
        place: other ranks than 0 write nothing.
    """

    def __init__(self, path: Path, done: int, total: int, place: Place) -> None:
        self._silent = place.rank != 0
        self._path = path
        if self._silent:
            return
        kept = [row for row in read(path) if row["step"] <= done] if done and path.exists() else []
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total, completed=done)

    def __enter__(self) -> "Metrics":
        if not self._silent:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._silent:
            self._bar.stop()

    def log(self, row: dict[str, Any]) -> None:
        """Writes a row: ``step`` and whatever was measured; None is left out."""
        if self._silent:
            return
        row = {name: value for name, value in row.items() if value is not None}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._bar.update(self._task, completed=row["step"], description=f"loss {row['loss']:.4f}")
        self.say("  ".join(f"{name} {_short(value)}" for name, value in row.items()))

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._silent:
            self._bar.console.print(text, markup=False)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def peak_memory(place: Place) -> int:
    """The most bytes that this rank has held: of the GPU's memory, or of the process's where there is none."""
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated(place.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _short(value: float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value}"
