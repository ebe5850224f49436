"""What a run says: a line per logged step on stdout and in metrics.jsonl, a progress bar on a terminal, and TensorBoard
events if asked for. Rank 0 alone."""

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
        tensorboard: folder for TensorBoard events; None: none are written.
    """

    def __init__(self, path: Path, done: int, total: int, place: Place, tensorboard: Path | None = None) -> None:
        self._silent = place.rank != 0
        self._path = path
        self._events: Any = None
        if self._silent:
            return
        kept = [row for row in read(path) if row["step"] <= done] if done and path.exists() else []
        aside = path.with_suffix(".new")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        aside.replace(path)  # a kill leaves the old rows or the kept ones
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            # What an earlier process wrote after the checkpoint is not shown.
            self._events = SummaryWriter(str(tensorboard), purge_step=done + 1)
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total, completed=done, speed="")

    def __enter__(self) -> "Metrics":
        if not self._silent:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._silent:
            self._bar.stop()
            if self._events is not None:
                self._events.close()

    def advance(self, row: dict[str, Any]) -> None:
        """Moves the bar to the row's step, with its loss, tokens/s and peak memory; writes nothing."""
        if not self._silent:
            speed = f"{row['tokens_per_second']:,.0f} tokens/s  peak {row['peak_memory_bytes'] / 1e9:.2f} GB"
            self._bar.update(self._task, completed=row["step"], description=f"loss {row['loss']:.4f}", speed=speed)

    def log(self, row: dict[str, Any]) -> None:
        """Writes a row: ``step`` and whatever was measured; None is left out."""
        if self._silent:
            return
        row = {name: value for name, value in row.items() if value is not None}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._events is not None:
            for name in row.keys() - {"step"}:
                self._events.add_scalar(name, row[name], row["step"])
        self.say("  ".join(f"{name} {_short(value)}" for name, value in row.items()))

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._silent:
            self._bar.console.print(text, markup=False)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last one that a kill cut short is left out.

    Raises:
        ValueError: any other line that is no JSON object, by its number.
    """
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows.append(row)
    return rows


def peak_memory(place: Place) -> int:
    """The most bytes that this rank has held: of the GPU's memory, or of the process's where there is none."""
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated(place.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _short(value: float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value}"
