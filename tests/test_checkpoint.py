"""Checkpoints against what happens to them: a full disk, a kill in mid-write, damage; and what they hold."""

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import RankPool
from runs import ENGINES, assert_same_weights, losses, overrides, train

from cce_dist.train import data
from cce_dist.train.data import Corpus
from cce_dist.train.engines import DeepSpeedEngine, TorchEngine
from cce_dist.train.settings import DataSettings

BOTH = pytest.mark.parametrize("engine", ["fsdp2", pytest.param("deepspeed", marks=pytest.mark.full)])
CHANGES = {"cce.gradient": "unbiased", "checkpoint.every": "2", "timeout": "30"}
LIMIT = 3000


def _train_with_a_full_disk(words: list[str]) -> str:
    """As `train`, on a disk that takes no file above ``LIMIT`` bytes once the second checkpoint is begun; the error."""
    kind: Any = DeepSpeedEngine if "engine=deepspeed" in words else TorchEngine
    saved: list[Path] = []
    save, before = kind.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_as_disk_fills(engine: Any, folder: Path) -> None:
        saved.append(folder)
        if len(saved) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
        save(engine, folder)

    kind.save = save_as_disk_fills
    try:
        train(words)
        return "no error"
    except RuntimeError as error:
        return str(error)
    finally:
        kind.save = save
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _train_and_die_in_a_checkpoint(words: list[str]) -> bool:
    """As `train`; all ranks are killed when a checkpoint is written, but not sealed yet."""
    kind: Any = DeepSpeedEngine if "engine=deepspeed" in words else TorchEngine
    save = kind.save

    def save_and_die(engine: Any, folder: Path) -> None:
        save(engine, folder)
        dist.barrier()
        time.sleep(dist.get_rank())  # the last of them is killed when it has left the barrier, too
        os.kill(os.getpid(), signal.SIGKILL)

    kind.save = save_and_die
    return train(words)


def _complete(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir() if not path.suffix)


def _error_of_each_rank(words: list[str]) -> str:
    try:
        train(words)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def undisturbed(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The output of a run of an engine that nothing happened to; beside it is the text, tokenized."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @cache
    def run(engine: str) -> Path:
        ranks.run(2, train, overrides(folder / engine, **CHANGES, **ENGINES[engine]), timeout=120)
        return folder / engine

    return run


class TestWriting:
    @BOTH
    def test_a_full_disk_and_a_kill_leave_the_checkpoint_before(
        self, ranks: RankPool, tmp_path: Path, engine: str, undisturbed: Callable[[str], Path]
    ) -> None:
        whole, parts = undisturbed(engine), tmp_path / "parts"
        words = [*overrides(parts, **CHANGES, **ENGINES[engine]), f"data.cache={whole.parent / 'data'}"]
        again = [*words, "checkpoint.resume=true"]
        errors = ranks.run(2, _train_with_a_full_disk, words, timeout=120)
        for error in errors:
            assert f"cannot write the checkpoint {parts}/checkpoints/step-00000004 (" in error
        assert _complete(parts) == ["step-00000002"]
        with pytest.raises(RuntimeError):
            ranks.run(2, _train_and_die_in_a_checkpoint, again, timeout=120)
        assert _complete(parts) == ["step-00000002"]
        assert (parts / "checkpoints/step-00000004.unfinished").exists()
        assert ranks.run(2, train, again, timeout=120) == [True, True]
        assert losses(parts) == losses(whole)
        assert_same_weights(parts, whole, step=4)
        assert not (parts / "checkpoints/step-00000004.unfinished").exists()

    def test_the_manifest_has_every_file_with_its_size(self, ranks: RankPool, tmp_path: Path) -> None:
        ranks.run(2, train, overrides(tmp_path / "run", **ENGINES["fsdp2"], steps="1"), timeout=120)
        folder = tmp_path / "run/checkpoints/step-00000001"
        manifest = json.loads((folder / "manifest.json").read_text())
        found = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        del found["manifest.json"]
        assert {name: file["bytes"] for name, file in manifest.items()} == found
        assert {"rng-0.pt", "rng-1.pt", "trainer.json"} < set(manifest)


def _flip_a_byte(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


class TestDamage:
    @BOTH
    def test_it_is_refused_by_name_on_every_rank(self, ranks: RankPool, tmp_path: Path, engine: str) -> None:
        words = overrides(tmp_path / "run", **ENGINES[engine], steps="2", **{"checkpoint.every": "1"})
        ranks.run(2, train, words, timeout=120)
        folder, intact = tmp_path / "run/checkpoints/step-00000002", tmp_path / "intact"
        shutil.copytree(folder, intact)
        largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        cases: list[tuple[Callable[[Path], None], Path, str]] = [
            (_flip_a_byte, largest, "the contents of {} are not those that were written"),
            (_truncate, largest, "{} has"),
            (Path.unlink, largest, "No such file or directory: '{}'"),
            (_flip_a_byte, folder / "rng-1.pt", "the contents of {}"),
            (_flip_a_byte, folder / "trainer.json", "the contents of {}"),
            (_truncate, folder / "manifest.json", "JSONDecodeError"),
            (Path.unlink, folder / "manifest.json", "No such file or directory: '{}'"),
        ]
        for damage, file, text in cases if engine == "fsdp2" else cases[:1]:
            damage(file)
            errors = ranks.run(2, _error_of_each_rank, [*words, "steps=3", "checkpoint.resume=true"], timeout=120)
            for error in errors:
                assert f"the checkpoint {folder} is damaged; remove this folder to go on from step-00000001" in error
                assert text.format(file) in error
            shutil.rmtree(folder)
            shutil.copytree(intact, folder)
        shutil.rmtree(folder)
        assert ranks.run(2, train, [*words, "checkpoint.resume=true"], timeout=120) == [True, True]


class TestDataOrder:
    def test_other_tokens_or_windows_are_not_gone_on_with(self, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text("a text to train on, of some length\n" * 200)
        text = DataSettings(text=tmp_path / "text.txt", vocab_size=300, sequence_length=8)
        data.prepare(tmp_path / "one", text)
        (tmp_path / "same.txt").write_bytes((tmp_path / "text.txt").read_bytes())
        data.prepare(tmp_path / "two", text.model_copy(update={"text": tmp_path / "same.txt"}))
        one = Corpus(tmp_path / "one", text, seed=0).fingerprint
        assert Corpus(tmp_path / "two", text, seed=0).fingerprint == one  # the same tokens from another place
        longer = text.model_copy(update={"sequence_length": 16})
        assert Corpus(tmp_path / "one", longer, seed=0).fingerprint != one
        (tmp_path / "same.txt").write_text("another text to train on, of some length\n" * 200)
        data.prepare(tmp_path / "two", text.model_copy(update={"text": tmp_path / "same.txt"}))
        assert Corpus(tmp_path / "two", text, seed=0).fingerprint != one

    @pytest.mark.full
    def test_a_run_goes_on_in_the_same_order_with_another_number_of_ranks(
        self, ranks: RankPool, tmp_path: Path
    ) -> None:
        changes = {**ENGINES["fsdp2"], "model.config.attention_dropout": "0"}
        ranks.run(2, train, overrides(tmp_path / "two", **changes), timeout=120)
        words = overrides(tmp_path / "both", **changes)
        ranks.run(2, train, [*words, "steps=2"], timeout=120)
        ranks.run(4, train, [*words, "checkpoint.resume=true", "batch.micro=1"], timeout=120)
        assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
