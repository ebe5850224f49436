"""Checkpoints: a folder per checkpoint, complete or not there at all.

    step-00000100/engine/        what the engine writes (DCP, or DeepSpeed's own format)
    step-00000100/rng-0.pt       each rank's random generators
    step-00000100/trainer.json   how far the run was

It is written under another name and renamed once every rank is done, so that a run killed meanwhile leaves the previous
checkpoint as the newest. The folder must be on a file system that all ranks see.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from cce_dist.train.engines import Engine
from cce_dist.train.place import Place


class Progress(NamedTuple):
    """How far a run is, and what must be the same for it to go on."""

    step: int
    """Optimizer steps taken."""
    windows: int
    """Windows of text consumed by all ranks."""
    engine: str
    seed: int
    text: str
    """Fingerprint of the text and its tokenizer."""


def save(root: Path, engine: Engine, progress: Progress, place: Place, keep: int) -> Path:
    """Collective: writes a checkpoint, removes all but the newest ``keep``, returns its folder."""
    final = root / f"step-{progress.step:08d}"
    if final.exists():  # interrupted right after a checkpoint
        return final
    unfinished = final.with_suffix(".unfinished")
    if place.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "engine").mkdir(parents=True)
    dist.barrier()
    engine.save(unfinished / "engine")
    torch.save(_generators(place), unfinished / f"rng-{place.rank}.pt")
    dist.barrier()
    if place.rank == 0:
        (unfinished / "trainer.json").write_text(json.dumps(progress._asdict(), indent=2))
        unfinished.replace(final)
        for old in _all(root)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    found = _all(root)
    return found[-1] if found else None


def load(folder: Path, engine: Engine, expected: Progress, place: Place) -> Progress:
    """Collective: restores the engine and the random generators; returns how far the run was.

    With another number of ranks than wrote it (FSDP2 only), the generators of the new ranks stay as seeded.

    Raises:
        ValueError: the checkpoint is of another engine, seed or text than ``expected``.
    """
    progress = Progress(**json.loads((folder / "trainer.json").read_text()))
    for name in ("engine", "seed", "text"):
        written, wanted = getattr(progress, name), getattr(expected, name)
        if written != wanted:
            raise ValueError(
                f"cannot resume from {folder}: its {name} is {written!r}, this run's is {wanted!r}. Use the settings "
                "that it was written with, or another output folder."
            )
    engine.load(folder / "engine")
    generators = folder / f"rng-{place.rank}.pt"
    if generators.exists():
        _restore(torch.load(generators, weights_only=True), place)
    return progress


def _all(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if not path.suffix)


def _generators(place: Place) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if place.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(place.device)
    return states


def _restore(states: dict[str, torch.Tensor], place: Place) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and place.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], place.device)
