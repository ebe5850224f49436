"""Checkpoints: a folder per checkpoint, complete or not there at all, and refused where a byte of it has changed.

    step-00000100/engine/         what the engine writes (DCP, or DeepSpeed's own format)
    step-00000100/rng-0.pt        each rank's random generators
    step-00000100/trainer.json    how far the run was: steps, and the place in the order of the data
    step-00000100/manifest.json   size and SHA-256 of all other files; written last

It is written under another name, brought to the disk (fsync) and renamed once every rank is done, so that a run killed
meanwhile, or a full disk, leaves the previous checkpoint as the newest. The ranks share the work of hashing, in writing
and in reading. The folder must be on a file system that all ranks see.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from cce_dist.train.engines import Engine
from cce_dist.train.place import Place

_MANIFEST = "manifest.json"
_UNFINISHED = ".unfinished"


class Progress(NamedTuple):
    """How far a run is, and what must be the same for it to go on."""

    step: int
    """Optimizer steps taken."""
    windows: int
    """Windows of text consumed by all ranks."""
    engine: str
    seed: int
    text: str
    """`Corpus.fingerprint`: of the tokens and how they are cut into windows."""


class _Written(NamedTuple):
    """A file as the manifest has it."""

    bytes: int
    sha256: str


def save(root: Path, engine: Engine, progress: Progress, place: Place, keep: int) -> Path:
    """Collective: writes a checkpoint, removes all but the newest ``keep``, returns its folder.

    Raises:
        RuntimeError: it cannot be written, as on a full disk; checkpoints written before are as they were.
    """
    final = root / f"step-{progress.step:08d}"
    if newest(root) == final:  # interrupted right after a checkpoint
        return final
    unfinished = final.with_suffix(_UNFINISHED)
    try:
        _raise_together(_attempt(lambda: _make_room(root, unfinished)) if place.rank == 0 else None)
        engine.save(unfinished / "engine")
        torch.save(_generators(place), unfinished / f"rng-{place.rank}.pt")
        if place.rank == 0:
            (unfinished / "trainer.json").write_text(json.dumps(progress._asdict(), indent=2))
        dist.barrier()
        # Not sooner: from here on every file is there and as long as it will be.
        _seal(unfinished, final, place)
    except Exception as error:
        free = shutil.disk_usage(root).free / 1e9 if root.exists() else 0
        if place.rank == 0:  # a full disk is in want of the space
            shutil.rmtree(unfinished, ignore_errors=True)
        raise RuntimeError(
            f"cannot write the checkpoint {final} ({free:.3f} GB are free there; those written before are as they "
            f"were): {error}"
        ) from error
    if place.rank == 0:
        for old in _all(root)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def newest(root: Path) -> Path | None:
    """Collective: the newest complete checkpoint that rank 0 sees, if there is one."""
    found = _all(root) if dist.get_rank() == 0 else []
    name = [found[-1].name if found else None]
    dist.broadcast_object_list(name)
    return None if name[0] is None else root / name[0]


def load(folder: Path, engine: Engine, expected: Progress, place: Place) -> Progress:
    """Collective: restores the engine and the random generators; returns how far the run was.

    With another number of ranks than wrote it (FSDP2 only), the generators of the new ranks stay as seeded.

    Raises:
        ValueError: on every rank; a file of the checkpoint is missing or not as it was written, or the checkpoint is of
            another engine, seed or text than ``expected``.
    """
    _verify(folder, place)
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


def _make_room(root: Path, unfinished: Path) -> None:
    for left in root.glob(f"step-*{_UNFINISHED}"):  # by a run that was killed
        shutil.rmtree(left)
    (unfinished / "engine").mkdir(parents=True)


def _seal(unfinished: Path, final: Path, place: Place) -> None:
    """Hashes all files and brings them to the disk, then writes the manifest and gives the folder its name."""
    written: dict[str, _Written] = {}

    def hash_mine() -> None:
        for name in _names(unfinished)[place.rank :: place.world]:
            written[name] = _hash(unfinished / name, sync=True)

    def publish(parts: list[dict[str, _Written]]) -> None:
        manifest = {name: file._asdict() for part in parts for name, file in part.items()}
        (unfinished / _MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        _hash(unfinished / _MANIFEST, sync=True)
        for folder in (unfinished, *(path for path in unfinished.rglob("*") if path.is_dir())):
            _sync_folder(folder)
        unfinished.replace(final)
        _sync_folder(final.parent)

    fault = _attempt(hash_mine)
    parts: list[dict[str, _Written]] = [{} for _ in range(place.world)]
    dist.all_gather_object(parts, written)
    _raise_together(fault)
    _raise_together(_attempt(lambda: publish(parts)) if place.rank == 0 else None)


def _verify(folder: Path, place: Place) -> None:
    """Compares every file with the manifest, each rank its part of them; raises on every rank alike."""

    def verify_mine() -> None:
        manifest = json.loads((folder / _MANIFEST).read_text())
        for name in sorted(manifest)[place.rank :: place.world]:
            expected, path = _Written(**manifest[name]), folder / name
            size = path.stat().st_size
            if size != expected.bytes:
                raise ValueError(f"{path} has {size} bytes and was written with {expected.bytes}")
            if _hash(path).sha256 != expected.sha256:
                raise ValueError(f"the contents of {path} are not those that were written (SHA-256)")

    others = [path.name for path in _all(folder.parent) if path != folder]
    remedy = f"to go on from {others[-1]}" if others else "to begin anew"
    _raise_together(_attempt(verify_mine), f"the checkpoint {folder} is damaged; remove this folder {remedy}. ")


def _attempt(action: Callable[[], None]) -> str | None:
    """What went wrong, in words."""
    try:
        action()
    except (OSError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _raise_together(fault: str | None, what: str = "") -> None:
    """Collective: a ValueError on every rank if any rank has a fault, so that none waits for one that raised."""
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    found = [f"rank {rank}: {text}" for rank, text in enumerate(faults) if text is not None]
    if found:
        raise ValueError(what + "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else ""))


def _hash(path: Path, sync: bool = False) -> _Written:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return _Written(size, digest.hexdigest())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


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
