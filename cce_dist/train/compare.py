"""Compares finished runs by what they left in their output folders: run.json and metrics.jsonl."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from cce_dist.train.metrics import read


class _Run(NamedTuple):
    folder: Path
    engine: str
    head: str
    """plain, or the gradient mode of the sharded head."""
    losses: list[float]
    eval_loss: float
    head_memory: int | None
    tokens_per_second: float


def compare_runs(folders: Sequence[Path], tolerance: float) -> bool:
    """Prints a table of runs, each beside the plain run of its engine. Runs of one engine and head are told apart by
    their folders.

    Args:
        folders: outputs of the trainer, among them one run with a plain head for each engine.
        tolerance: of the final loss, relative, for runs whose gradient is exact; other runs are only shown.

    Returns:
        Whether all exact runs agree with their plain ones.

    Raises:
        ValueError: a folder is no finished run, an engine has no plain run, or two runs differ in length.
    """
    runs = [_load(folder) for folder in folders]
    table = Table(box=box.SIMPLE, pad_edge=False, caption=_CAPTION, caption_justify="left")
    table.add_column("run", no_wrap=True)
    for column in ("final\nloss", "held-out\nloss", "largest\ndiff.", "head\nMB", "tokens/s", ""):
        table.add_column(column, justify="right", no_wrap=True)
    names = [f"{run.engine} {run.head if run.head == 'plain' else f'cce {run.head}'}" for run in runs]
    above = os.path.commonpath([run.folder.resolve() for run in runs])
    agreed = True
    for run, name in zip(runs, names, strict=True):
        plain = _plain(run, runs)
        difference = max(abs(a - b) for a, b in zip(run.losses, plain.losses, strict=True))
        close = abs(run.losses[-1] - plain.losses[-1]) <= tolerance * abs(plain.losses[-1])
        checked = run.head == "exact"
        agreed &= close or not checked
        table.add_row(
            name if names.count(name) == 1 else f"{name}\n  {os.path.relpath(run.folder.resolve(), above)}",
            f"{run.losses[-1]:.4f}",
            f"{run.eval_loss:.4f}",
            "" if run is plain else f"{difference:.1e}",
            "" if run.head_memory is None else f"{run.head_memory / 1e6:.1f}",
            f"{run.tokens_per_second:.0f}",
            ("ok" if close else "DIFFERS") if checked else "",
        )
    Console().print(table)
    return agreed


_CAPTION = (
    "Largest diff.: from the plain run's loss, at any step. Head MB: the most bytes alive at once, on one rank, in "
    "storages allocated between the last hidden states and their gradient. Tokens/s: of the median step, all ranks."
)


def _load(folder: Path) -> _Run:
    try:
        about, rows = json.loads((folder / "run.json").read_text()), read(folder / "metrics.jsonl")
        settings = about["settings"]
        if not rows:
            raise ValueError("metrics.jsonl has no row yet")
        if rows[-1]["step"] != settings["steps"]:
            raise ValueError(f"it ended at step {rows[-1]['step']} of {settings['steps']}")
        return _Run(
            folder,
            settings["engine"],
            "plain" if settings["head"] == "plain" else about["gradient"],
            [row["loss"] for row in rows],
            rows[-1]["eval_loss"],
            next((row["head_memory_bytes"] for row in rows if "head_memory_bytes" in row), None),
            statistics.median(row["tokens_per_second"] for row in rows),
        )
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is not the output of a finished run: {error}.") from None


def _plain(run: _Run, runs: Sequence[_Run]) -> _Run:
    found = [other for other in runs if other.head == "plain" and other.engine == run.engine]
    if len(found) != 1:
        raise ValueError(f"{run.folder} needs one run with head: plain and engine: {run.engine} beside it.")
    if len(found[0].losses) != len(run.losses):
        raise ValueError(f"{run.folder} and {found[0].folder} logged different numbers of steps.")
    return found[0]
