"""Checkpoints against what happens to them: a full disk, a kill in mid-write, damage, forgery, a run that goes wrong
or is another one; and what they hold."""

import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import RankPool
from runs import ENGINES, assert_same_weights, losses, overrides, train, weights

from cce_dist.train import data, restricted
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
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def _train_with(words: list[str], trouble: str) -> str:
    """As `_error_of_each_rank`; each rank makes the trouble of this name as soon as the engine has saved."""
    kind: Any = DeepSpeedEngine if "engine=deepspeed" in words else TorchEngine
    save = kind.save

    def save_and_make_trouble(engine: Any, folder: Path) -> None:
        save(engine, folder)
        _TROUBLE[trouble](folder.parent)

    kind.save = save_and_make_trouble
    try:
        return _error_of_each_rank(words)
    finally:
        kind.save = save


def _no_file_for_generators(unfinished: Path) -> None:
    if dist.get_rank() == 1:
        (unfinished / "rng-1.pt").mkdir()


def _an_old_one_that_cannot_be_removed(unfinished: Path) -> None:
    old = unfinished.parent / "step-00000001"
    if dist.get_rank() == 0 and old.exists():
        old.rename(old.parent.parent / "elsewhere")
        old.symlink_to(old.parent.parent / "elsewhere")


_TROUBLE = {"generators": _no_file_for_generators, "old": _an_old_one_that_cannot_be_removed}


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


class TestOneRank:
    """What fails on one rank is an error on all, and none waits for its timeout."""

    def test_a_file_of_one_rank_that_cannot_be_written(self, ranks: RankPool, tmp_path: Path) -> None:
        words = overrides(tmp_path / "run", **ENGINES["fsdp2"], steps="2", timeout="100")
        for error in ranks.run(2, _train_with, words, "generators", timeout=90):
            assert "cannot write the checkpoint" in error
            assert "rank 1: " in error and "rng-1.pt" in error
        assert not (tmp_path / "run/checkpoints/step-00000002.unfinished").exists()

    def test_an_old_checkpoint_that_cannot_be_removed(self, ranks: RankPool, tmp_path: Path) -> None:
        changes = {"checkpoint.every": "1", "checkpoint.keep": "1"}
        words = overrides(tmp_path / "run", **ENGINES["fsdp2"], **changes, timeout="100")
        for error in ranks.run(2, _train_with, words, "old", timeout=90):
            assert f"in {tmp_path}/run/checkpoints are complete, but an old one cannot be removed" in error
            assert "symbolic link" in error
        assert "step-00000002" in _complete(tmp_path / "run")

    def test_manifests_that_the_trainer_has_not_written(self, ranks: RankPool, tmp_path: Path) -> None:
        words = overrides(tmp_path / "run", **ENGINES["fsdp2"], steps="1", timeout="100")
        (tmp_path / "data").mkdir()
        for text in ('{"name": "a web app"}', "[1]", "no JSON"):
            (tmp_path / "data/manifest.json").write_text(text)
            for error in ranks.run(2, _error_of_each_rank, words, timeout=90):
                assert f"{tmp_path}/data/manifest.json is none that the trainer wrote" in error
                assert "choose another data.cache" in error
            assert (tmp_path / "data/manifest.json").read_text() == text
        shutil.rmtree(tmp_path / "data")
        assert ranks.run(2, train, words, timeout=90) == [True, True]
        folder = tmp_path / "run/checkpoints/step-00000001"
        manifest = (folder / "manifest.json").read_text()
        for text in ('{"trainer.json": 3}', "[1]", "{}"):
            (folder / "manifest.json").write_text(text)
            for error in ranks.run(2, _error_of_each_rank, [*words, "checkpoint.resume=true"], timeout=90):
                assert f"the checkpoint {folder} is damaged" in error
        (folder / "manifest.json").write_text(manifest)
        (folder / "trainer.json").write_text('{"step": 1}')
        _seal_anew(folder)
        for error in ranks.run(2, _error_of_each_rank, [*words, "checkpoint.resume=true"], timeout=90):
            assert f"{folder}/trainer.json is not of this version of cce_dist" in error


class TestNotFinite:
    @BOTH
    def test_the_run_ends_with_an_error_and_the_checkpoints_before_stay(
        self, ranks: RankPool, tmp_path: Path, engine: str
    ) -> None:
        changes = {"checkpoint.every": "1", "checkpoint.keep": "1", "optimizer.warmup_steps": "0", "timeout": "100"}
        words = overrides(tmp_path / "run", **ENGINES[engine], **changes)
        assert ranks.run(2, train, [*words, "steps=2"], timeout=120) == [True, True]
        again = [*words, "checkpoint.resume=true"]
        for more, last in ((["steps=40", "nonfinite_steps=3"], 6), (["steps=5"], 5)):
            shutil.copytree(tmp_path / "run", tmp_path / more[0])
            diverging = [*again, "optimizer.learning_rate=1e30", f"output={tmp_path / more[0]}", *more]
            for error in ranks.run(2, _error_of_each_rank, diverging, timeout=120):
                assert f"not been finite for {last - 3} step(s), up to step {last} (loss " in error
                assert "nan" in error
                # Its weights were finite, and no loss came of them.
                assert "the newest is step-00000003. No finite loss came after that one" in error
                assert "go on from step-00000002" in error
            assert _complete(tmp_path / more[0]) == ["step-00000002", "step-00000003"]
            kept = weights(tmp_path / more[0], step=2)
            assert all(weight.isfinite().all() for weight in kept.values())
        assert ranks.run(2, train, [*again, "steps=4"], timeout=120) == [True, True]
        assert _complete(tmp_path / "run") == ["step-00000004"]


class TestGoingOn:
    @BOTH
    def test_another_model_is_refused_by_the_keys_that_differ(
        self, ranks: RankPool, tmp_path: Path, engine: str
    ) -> None:
        words = overrides(
            tmp_path / "run", **ENGINES[engine], steps="2", timeout="100", **{"model.config.num_hidden_layers": "2"}
        )
        assert ranks.run(2, train, words, timeout=120) == [True, True]
        cases = {
            "model.config.num_hidden_layers=1": "its model.num_hidden_layers is 2, this run's is 1",
            "model.config.num_attention_heads=1": "its model.num_attention_heads is 2, this run's is 1",
            "model.config.rope_theta=500.0": "rope_theta is 10000.0, this run's is 500.0",
            "model.config.attention_dropout=0": "its model.attention_dropout is 0.1, this run's is 0",
            "steps=1": "it has taken 2 steps, and steps=1",
        }
        if engine == "deepspeed":
            other = "configs/deepspeed/zero2.json"
            cases = {f"deepspeed={other}": "its layout.zero_stage is 3, this run's is 2", "steps=1": cases["steps=1"]}
        for change, text in cases.items():
            again = [*words, "steps=3", "checkpoint.resume=true", change]
            for error in ranks.run(2, _error_of_each_rank, again, timeout=120):
                assert f"cannot resume from {tmp_path}/run/checkpoints/step-00000002: " in error
                assert text in error
            assert _complete(tmp_path / "run") == ["step-00000002"]

    @BOTH
    def test_weight_decay_and_betas_are_those_of_the_run_that_goes_on(
        self, ranks: RankPool, tmp_path: Path, engine: str
    ) -> None:
        rate = 2e-3  # as configs/train/tiny-cpu.yaml has it
        changes = {"optimizer.warmup_steps": "0", "optimizer.weight_decay": "0.1", "steps": "2"}
        words = overrides(tmp_path / "run", **ENGINES[engine], **changes)
        assert ranks.run(2, train, words, timeout=120) == [True, True]
        before = weights(tmp_path / "run", step=2)
        after = {}
        for name, change in {
            "same": "optimizer.weight_decay=0.1",
            "decay": "optimizer.weight_decay=50",
            "betas": "optimizer.betas=[0.0, 0.0]",
        }.items():
            shutil.copytree(tmp_path / "run", tmp_path / name)
            again = [*words, "steps=3", "checkpoint.resume=true", f"output={tmp_path / name}", change]
            assert ranks.run(2, train, again, timeout=120) == [True, True]
            after[name] = weights(tmp_path / name, step=3)
        taken = _rates_per_step(tmp_path / "decay")[3]
        assert taken == pytest.approx(_rates_per_step(tmp_path / "same")[3])
        assert 0 < taken <= rate
        # AdamW: weights lose rate x decay of themselves, and move by the rate where both betas are 0.
        decayed = torch.cat([(after["decay"][name] - after["same"][name]).flatten() for name in before])
        expected = torch.cat([-taken * 49.9 * before[name].flatten() for name in before])
        assert (decayed - expected).norm() < 1e-3 * expected.norm()
        moved = torch.cat([(after["betas"][name] - (1 - taken * 0.1) * before[name]).flatten() for name in before])
        of_adam = moved[moved.abs() > 0.5 * taken]
        assert len(of_adam) > 0.3 * len(moved)
        assert (of_adam.abs() - taken).norm() < 0.1 * taken * len(of_adam) ** 0.5


def _rates_per_step(output: Path) -> dict[int, float]:
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["learning_rate"] for row in rows}


class _Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self._file,)


class _Attribute:
    """Unpickled, it is an attribute of something."""

    def __init__(self, owner: Any, name: str) -> None:
        self._of = owner, name

    def __reduce__(self) -> Any:
        return getattr, self._of


def _seal_anew(folder: Path) -> None:
    """The manifest as someone would write it who knows how."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    manifest = {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


class TestForgery:
    @BOTH
    def test_code_in_a_checkpoint_is_not_run_and_refused_on_every_rank(
        self, ranks: RankPool, tmp_path: Path, engine: str
    ) -> None:
        words = overrides(tmp_path / "run", **ENGINES[engine], steps="1", timeout="100")
        ranks.run(2, train, words, timeout=120)
        folder = tmp_path / "run/checkpoints/step-00000001"
        file = folder / "engine/.metadata"
        if engine == "deepspeed":
            file = folder / "engine/deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt"
            torch.save({"optimizer_state_dict": _Evil(tmp_path / "ran")}, file)
        else:
            file.write_bytes(pickle.dumps(_Evil(tmp_path / "ran")))
        _seal_anew(folder)
        for error in ranks.run(2, _error_of_each_rank, [*words, "steps=2", "checkpoint.resume=true"], timeout=120):
            named = "pathlib.Path" if engine == "deepspeed" else "pathlib.Path.touch"  # the first that pickle met
            assert f"{file} names {named}, which is no part of a checkpoint: to read it may run code" in error
        assert not (tmp_path / "ran").exists()

    def test_code_in_an_entry_that_is_no_tensor_is_not_run(self, tmp_path: Path) -> None:
        dcp.save({"rate": _Evil(tmp_path / "ran"), "weight": torch.ones(2)}, checkpoint_id=tmp_path / "forged")
        (tmp_path / "ran").unlink(missing_ok=True)
        with (
            pytest.raises(dcp.CheckpointException, match="weights_only|Unsupported|Weights only"),
            restricted.data_only(),
        ):
            dcp.load({"rate": 0.0, "weight": torch.zeros(2)}, storage_reader=restricted.Reader(tmp_path / "forged"))
        assert not (tmp_path / "ran").exists()

    def test_a_member_of_an_enumeration_is_read_as_old_pythons_write_it_and_no_other_attribute(
        self, tmp_path: Path
    ) -> None:
        """Python up to 3.11.3 pickles it as getattr(its class, its name)."""
        stage = restricted.deepspeed_classes()[2]
        for number, (owner, name) in enumerate([(stage, "weights"), (torch.Tensor, "backward"), (stage, "mro")]):
            file = tmp_path / f"{number}.pt"
            torch.save({"stage": _Attribute(owner, name)}, file)
            if number == 0:
                restricted.check_deepspeed([file])
                with restricted.data_only(restricted.deepspeed_classes()):
                    assert torch.load(file)["stage"] is stage.weights
            else:
                with pytest.raises(pickle.UnpicklingError):
                    restricted.check_deepspeed([file])

    def test_numbers_and_tensors_are_read(self, tmp_path: Path) -> None:
        dcp.save({"rate": 0.5, "weight": torch.ones(2, dtype=torch.bfloat16)}, checkpoint_id=tmp_path / "good")
        state = {"rate": 0.0, "weight": torch.zeros(2, dtype=torch.bfloat16)}
        with restricted.data_only():
            dcp.load(state, storage_reader=restricted.Reader(tmp_path / "good"))
        assert state["rate"] == 0.5
        assert torch.equal(state["weight"], torch.ones(2, dtype=torch.bfloat16))


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
