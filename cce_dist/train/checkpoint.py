"""Checkpoints: a folder per checkpoint, complete or not there at all, and refused where a byte of it has changed.

    step-00000100/engine/         what the engine writes (DCP, or DeepSpeed's own format)
    step-00000100/rng-0.pt        each rank's random generators
    step-00000100/trainer.json    how far the run was: steps, and the place in the order of the data; and of which model
    step-00000100/manifest.json   size and SHA-256 of all other files; written last

It is written under another name, brought to the disk (fsync) and renamed once every rank is done, so that a run killed
meanwhile, or a full disk, leaves the previous checkpoint as the newest. The ranks share the work of hashing, in writing
and in reading. The folder must be on a file system that all ranks see. An error on one rank is an error on all.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cce_dist.train.engines import Engine
from cce_dist.train.place import Place
from cce_dist.train.together import on_rank_0, together

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
    model: Mapping[str, Any]
    """Its config, as `model.describe` has it."""
    layout: Mapping[str, Any]
    """`Engine.layout`."""
    transformers: str
    """The version that the config is of."""

    def faults(self, expected: "Progress") -> Iterator[str]:
        """What keeps a run that ``expected`` describes from going on from here, each with both values."""
        for name in ("engine", "seed", "text"):
            written, wanted = getattr(self, name), getattr(expected, name)
            if written != wanted:
                yield f"its {name} is {written!r}, this run's is {wanted!r}"
        same_keys = self.transformers == expected.transformers  # another version has other defaults to write down
        for section in ("layout", "model"):
            written, wanted = _flat(getattr(self, section), section), _flat(getattr(expected, section), section)
            for key in sorted(written.keys() | wanted.keys()):
                if written.get(key) != wanted.get(key) and (same_keys or (key in written and key in wanted)):
                    values = (repr(values[key]) if key in values else "not set" for values in (written, wanted))
                    yield "its {} is {}, this run's is {}".format(key, *values)


class _Written(NamedTuple):
    """A file as the manifest has it."""

    bytes: int
    sha256: str


def save(root: Path, engine: Engine, progress: Progress, place: Place) -> Path:
    """Collective: writes a checkpoint, returns its folder.

    Raises:
        RuntimeError: on every rank; it cannot be written, as on a full disk. Checkpoints written before are as they
            were.
    """
    final = root / f"step-{progress.step:08d}"
    if newest(root) == final:  # interrupted right after a checkpoint
        return final
    unfinished = final.with_suffix(_UNFINISHED)
    try:
        on_rank_0(lambda: _make_room(root, unfinished))
        engine.save(unfinished / "engine")
        together(lambda: _write_own(unfinished, progress, place))
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
    return final


def remove_old(root: Path, keep: int) -> None:
    """Collective: removes all checkpoints but the newest ``keep``.

    Raises:
        RuntimeError: on every rank; one cannot be removed.
    """

    def remove() -> None:
        for old in _all(root)[:-keep]:
            going = old.with_suffix(_UNFINISHED)  # half removed, it is no checkpoint
            old.rename(going)
            shutil.rmtree(going)

    try:
        on_rank_0(remove)
    except ValueError as error:
        raise RuntimeError(
            f"the newest checkpoints in {root} are complete, but an old one cannot be removed: {error}"
        ) from error


def newest(root: Path) -> Path | None:
    """Collective: the newest complete checkpoint that rank 0 sees, if there is one."""
    return next(iter(newest_first(root)), None)


def newest_first(root: Path) -> list[Path]:
    """Collective: the complete checkpoints that rank 0 sees."""
    return on_rank_0(lambda: _all(root)[::-1])


def load(folder: Path, engine: Engine, expected: Progress, steps: int, place: Place) -> Progress:
    """Collective: restores the engine and the random generators; returns how far the run was.

    With another number of ranks than wrote it (FSDP2 only), the generators of the new ranks stay as seeded. Nothing in
    the folder is executed: what is no data is refused.

    Raises:
        ValueError: on every rank; a file of the checkpoint is missing or not as it was written, or the checkpoint is of
            another engine, seed, text or model than ``expected``, or has more steps than ``steps``.
    """
    _verify(folder, place)
    progress = together(lambda: _progress(folder))
    faults = list(progress.faults(expected))
    if faults:
        more = f"; and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise ValueError(
            f"cannot resume from {folder}: {'; '.join(faults[:6])}{more}. Use the settings that it was written with, "
            "or another output folder."
        )
    if progress.step > steps:
        raise ValueError(
            f"cannot resume from {folder}: it has taken {progress.step} steps, and steps={steps}. Set steps to what "
            "the run is to have in the end, or use another output folder."
        )
    engine.load(folder / "engine")
    together(lambda: _restore(folder / f"rng-{place.rank}.pt", place))
    return expected._replace(step=progress.step, windows=progress.windows)


def _progress(folder: Path) -> Progress:
    file = folder / "trainer.json"
    try:
        return Progress(**json.loads(file.read_text()))
    except TypeError as error:
        raise ValueError(f"{file} is not of this version of cce_dist: {error}. Use another output folder.") from None


def _make_room(root: Path, unfinished: Path) -> None:
    for left in root.glob(f"step-*{_UNFINISHED}"):  # by a run that was killed
        shutil.rmtree(left)
    (unfinished / "engine").mkdir(parents=True)


def _write_own(unfinished: Path, progress: Progress, place: Place) -> None:
    file = unfinished / f"rng-{place.rank}.pt"
    try:
        torch.save(_generators(place), file)
    except RuntimeError as error:  # torch does not say which file
        raise OSError(f"{file}: {error}") from error
    if place.rank == 0:
        (unfinished / "trainer.json").write_text(json.dumps(progress._asdict(), indent=2))


def _seal(unfinished: Path, final: Path, place: Place) -> None:
    """Hashes all files and brings them to the disk, then writes the manifest and gives the folder its name."""
    mine = together(
        lambda: {name: _hash(unfinished / name, sync=True) for name in _names(unfinished)[place.rank :: place.world]}
    )
    parts: list[dict[str, _Written]] = [{} for _ in range(place.world)]
    dist.all_gather_object(parts, mine)

    def publish() -> None:
        manifest = {name: file._asdict() for part in parts for name, file in part.items()}
        (unfinished / _MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        _hash(unfinished / _MANIFEST, sync=True)
        for folder in (unfinished, *(path for path in unfinished.rglob("*") if path.is_dir())):
            _sync_folder(folder)
        unfinished.replace(final)
        _sync_folder(final.parent)

    on_rank_0(publish)


def _verify(folder: Path, place: Place) -> None:
    """Compares every file with the manifest, each rank its part of them; raises on every rank alike."""

    def verify_mine() -> None:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if not isinstance(manifest, dict):
            raise ValueError(f"{folder / _MANIFEST} is no manifest of a checkpoint")
        unknown = set(_names(folder)) - manifest.keys() - {_MANIFEST}
        if unknown:
            raise ValueError(f"{folder / min(unknown)} is not in its manifest: it was not there when it was written")
        for name in sorted(manifest)[place.rank :: place.world]:
            expected, path = _Written(**manifest[name]), folder / name
            size = path.stat().st_size
            if size != expected.bytes:
                raise ValueError(f"{path} has {size} bytes and was written with {expected.bytes}")
            if _hash(path).sha256 != expected.sha256:
                raise ValueError(f"the contents of {path} are not those that were written (SHA-256)")

    others = [path.name for path in _all(folder.parent) if path != folder]
    remedy = f"to go on from {others[-1]}" if others else "to begin anew"
    together(verify_mine, f"the checkpoint {folder} is damaged; remove this folder {remedy}. ")


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
    return sorted(path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir())


def _flat(values: Any, name: str) -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(values, Mapping) or not values:
        return {name: values}
    return {key: value for part in values for key, value in _flat(values[part], f"{name}.{part}").items()}


def _generators(place: Place) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if place.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(place.device)
    return states


def _restore(file: Path, place: Place) -> None:
    if not file.exists():
        return
    states = torch.load(file, weights_only=True)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and place.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], place.device)
