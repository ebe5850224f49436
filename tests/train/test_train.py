"""The trainer: settings, data order, runs of both engines against plain ones, resume, Ctrl-C, memory of the head."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from launched import Command
from ranks import RankPool
from runs import ENGINES, RENDEZVOUS, ROOT, SMALL, TINY, losses, overrides, rows, train

from cce_dist import linear_cross_entropy
from cce_dist.cli import main
from cce_dist.train import data, model, settings
from cce_dist.train.data import IGNORED, Corpus
from cce_dist.train.head_memory import HeadMemory
from cce_dist.train.lock import locked
from cce_dist.train.metrics import read
from cce_dist.train.settings import DataSettings, ModelSettings, Settings


def _train_and_interrupt(words: list[str], rows: int) -> bool:
    """As `train`; rank 1 alone gets a SIGINT once ``rows`` steps are logged."""
    metrics = Path(next(word.removeprefix("output=") for word in words if word.startswith("output="))) / "metrics.jsonl"

    def interrupt() -> None:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < rows:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    if dist.get_rank() == 1:
        threading.Thread(target=interrupt, daemon=True).start()
    return train(words)


def _names(file: Path, word: str) -> bool:
    return file.exists() and word in file.read_text()


def _lose_the_metrics(words: list[str]) -> str:
    """As `_refusals`; a folder takes the place of metrics.jsonl after the second step."""
    metrics = Path(next(word.removeprefix("output=") for word in words if word.startswith("output="))) / "metrics.jsonl"

    def replace() -> None:
        while rows(metrics.parent) < 2:
            time.sleep(0.01)
        while not metrics.is_dir():
            metrics.unlink()
            with contextlib.suppress(FileExistsError):  # a row was faster
                metrics.mkdir()

    if dist.get_rank() == 0:
        threading.Thread(target=replace, daemon=True).start()
    return _refusals([words])[0]


class TestSettings:
    def test_the_shipped_files_are_valid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)
        for path in [*(ROOT / "configs/train").glob("*.yaml"), *(ROOT / "configs/fsdp").glob("*.yaml")]:
            assert isinstance(settings.load(path), Settings)

    def test_an_unknown_key_is_named_with_those_allowed_beside_it(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"optimizer\.lr: unknown key; allowed here: learning_rate, warmup_steps"):
            settings.load(TINY, overrides(tmp_path, **ENGINES["fsdp2"], **{"optimizer.lr": "1"}))
        with pytest.raises(ValueError, match=r"cce\.mode: unknown key; allowed here: gradient, tail"):
            settings.load(TINY, overrides(tmp_path, **ENGINES["fsdp2"], **{"cce.mode": "1"}))

    def test_a_fault_stands_where_it_comes_from(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text(TINY.read_text() + "stepz: 3\n")
        with pytest.raises(ValueError, match=r"unknown key") as caught:
            settings.load(TINY, overrides(tmp_path, **ENGINES["fsdp2"], stps="2"))
        assert str(caught.value).startswith(f"the command line is not valid, on top of {TINY}:\n  stps: unknown key")
        with pytest.raises(ValueError, match=r"unknown key") as caught:
            settings.load(file, overrides(tmp_path, **ENGINES["fsdp2"]))
        assert str(caught.value).startswith(f"{file} is not valid:\n  stepz: unknown key")
        assert "command line" not in str(caught.value)
        with pytest.raises(ValueError, match=r"unknown key") as caught:
            settings.load(file, overrides(tmp_path, **ENGINES["fsdp2"], stps="2"))
        of_file, of_command_line = str(caught.value).split("the command line")
        assert "stepz: unknown key" in of_file
        assert "stps: unknown key" in of_command_line

    def test_an_engine_and_a_deepspeed_json_that_do_not_fit_are_named_with_the_remedy(self, tmp_path: Path) -> None:
        json = ENGINES["deepspeed"]["deepspeed"]
        with pytest.raises(ValueError, match=f"engine: fsdp2 and deepspeed: {json} exclude .* add deepspeed=null"):
            settings.load(TINY, overrides(tmp_path, engine="fsdp2", deepspeed=json))
        with pytest.raises(ValueError, match="engine: deepspeed needs a path in deepspeed, got null; add deepspeed="):
            settings.load(TINY, overrides(tmp_path, engine="deepspeed", deepspeed="null"))

    def test_a_bad_value_is_named_with_what_is_allowed(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"engine = 'megatron': Input should be 'deepspeed', 'fsdp2' or 'none'"):
            settings.load(TINY, overrides(tmp_path, engine="megatron"))
        with pytest.raises(ValueError, match="data.text"):
            settings.load(TINY, overrides(tmp_path, **{"data.text": "/nowhere"}))
        with pytest.raises(ValueError, match="an override must be key=value, got 'steps'"):
            settings.load(TINY, ["steps"])

    def test_an_override_reaches_its_section_and_leaves_the_rest(self, tmp_path: Path) -> None:
        loaded = settings.load(TINY, overrides(tmp_path, **ENGINES["fsdp2"], **{"optimizer.learning_rate": "3e-4"}))
        assert loaded.optimizer.learning_rate == 3e-4
        assert loaded.cce is not None
        assert (loaded.cce.gradient, loaded.cce.workspace_mb) == ("exact", 8)

    def test_the_section_of_the_deepspeed_json_counts_where_the_trainer_says_nothing(self, tmp_path: Path) -> None:
        from cce_dist.train.engines import head_settings

        file = tmp_path / "ds.json"
        file.write_text(json.dumps({"cce_dist": {"gradient": "filtered", "filter_eps": 0.125, "workspace_mb": 64}}))
        words = overrides(tmp_path, engine="deepspeed", deepspeed=str(file), **{"cce.gradient": "exact"})
        config = head_settings(settings.load(TINY, words))
        assert (config.gradient, config.filter_eps, config.workspace_mb) == ("exact", 0.125, 8)
        file.write_text(json.dumps({"cce_dist": {"gradiant": "exact"}}))
        with pytest.raises(ValueError, match=r"(?s)ds\.json is not valid.*gradiant: unknown key"):
            head_settings(settings.load(TINY, words))

    def test_an_output_that_cannot_be_a_folder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for key in ("output", "data.cache"):
            for path in (tmp_path / "file", tmp_path / "file/below/it"):
                words = [*overrides(tmp_path / "run", **ENGINES["fsdp2"]), f"{key}={path}"]
                with pytest.raises(
                    ValueError, match=f"{key} = {path}: must be a folder, but {tmp_path}/file is a file"
                ):
                    settings.load(TINY, words)

    def test_the_command_prints_a_readable_error(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "--config", str(TINY), *overrides(tmp_path, typo="1")]) == 2
        assert "typo: unknown key" in capsys.readouterr().err

    def test_check_tells_whether_settings_are_valid_and_starts_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = overrides(tmp_path / "run", **ENGINES["fsdp2"])
        fp16 = f"deepspeed={ROOT / 'configs/deepspeed/zero3-fp16.json'}"
        for change, said in (
            (["steps=1"], ""),
            (["stps=1"], "stps: unknown key"),
            (["model.config.hiden_size=3"], "model.config.hiden_size (close to it: hidden_size"),
            (["engine=deepspeed", fp16], "zero3-fp16.json has the model compute in fp16"),
        ):
            assert main(["train", "--check", "--config", str(TINY), *words, *change]) == (2 if said else 0)
            assert said in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


class TestModelConfig:
    """What `ModelSettings.config` may hold; transformers itself takes any keyword."""

    def test_keys_that_transformers_would_only_keep_are_refused_with_the_closest(self) -> None:
        for given, said in (
            (
                {"model_type": "llama", "hiden_size": 3},
                r"model\.config\.hiden_size \(close to it: hidden_size, .*llama",
            ),
            ({"model_type": "llama", "qqqq": 1, "n_layer": 1}, r"model\.config\.qqqq, model\.config\.n_layer"),
            ({"model_type": "gpt2", "n_layers": 1}, r"model\.config\.n_layers \(close to it: n_layer"),
            ({"model_type": "gemma3", "text_config": {"hiden_size": 8}}, r"model\.config\.text_config\.hiden_size"),
        ):
            with pytest.raises(ValueError, match=said):
                model.check(ModelSettings(config=given))

    def test_older_names_aliases_and_a_config_as_it_is_saved_are_taken(self) -> None:
        from transformers import AutoConfig

        for given in (
            {"model_type": "llama", "rope_theta": 500.0, "attn_implementation": "eager", "torch_dtype": "float32"},
            {"model_type": "gpt2", "hidden_size": 16, "n_layer": 1},
            *(AutoConfig.for_model(name).to_dict() for name in ("llama", "qwen3_moe", "gemma3")),
        ):
            model.check(ModelSettings(config=given))


class TestData:
    @pytest.fixture
    def text(self, tmp_path: Path) -> DataSettings:
        (tmp_path / "text").mkdir()
        for index in range(40):
            (tmp_path / f"text/{index:02}.txt").write_text(f"file number {index} tells what {index * index} is\n" * 5)
        return DataSettings(text=tmp_path / "text", vocab_size=300, sequence_length=8, eval_share=0.1)

    @pytest.fixture
    def corpus(self, text: DataSettings, tmp_path: Path) -> Corpus:
        data.prepare(tmp_path / "cache", text)
        return Corpus(tmp_path / "cache", text, seed=3)

    def test_a_pass_takes_each_training_window_once_in_an_order_of_its_own(self, corpus: Corpus) -> None:
        size = corpus.train_windows
        first, second = (corpus.train_batch(epoch * size, size).inputs_BL for epoch in range(2))
        assert not torch.equal(first, second)
        assert sorted(first.tolist()) == sorted(second.tolist())

    def test_the_order_does_not_depend_on_how_it_is_cut_into_batches(self, corpus: Corpus) -> None:
        whole = corpus.train_batch(5, 12)
        parts = [corpus.train_batch(5 + 3 * index, 3) for index in range(4)]
        assert torch.equal(whole.labels_BL, torch.cat([part.labels_BL for part in parts]))

    def test_labels_are_the_next_tokens_and_nothing_is_predicted_from_the_end_of_a_file(self, corpus: Corpus) -> None:
        batch = corpus.train_batch(0, corpus.train_windows)
        follows = batch.inputs_BL[:, 1:] == batch.labels_BL[:, :-1]
        after_end = batch.labels_BL == IGNORED
        assert after_end.sum() >= 30
        assert (follows | after_end[:, :-1]).all()
        assert (batch.inputs_BL[after_end] == batch.inputs_BL[after_end][0]).all()

    def test_evaluation_beyond_the_held_out_windows_counts_nothing(self, corpus: Corpus) -> None:
        batch = corpus.eval_batch(corpus.eval_windows - 1, 3)
        assert (batch.labels_BL[0] != IGNORED).any()
        assert (batch.labels_BL[1:] == IGNORED).all()

    def test_tokens_are_kept_for_the_same_text_and_made_anew_for_another(
        self, text: DataSettings, tmp_path: Path
    ) -> None:
        tokens = tmp_path / "cache/tokens.npy"
        data.prepare(tmp_path / "cache", text)
        made = tokens.stat().st_mtime_ns
        data.prepare(tmp_path / "cache", text)
        assert tokens.stat().st_mtime_ns == made
        (tmp_path / "text/00.txt").write_text("another text")
        data.prepare(tmp_path / "cache", text)
        assert tokens.stat().st_mtime_ns != made

    def test_a_tokenizer_file_is_used_as_it_is(self, text: DataSettings, tmp_path: Path) -> None:
        data.prepare(tmp_path / "cache", text)
        given = text.model_copy(update={"tokenizer": tmp_path / "cache/tokenizer.json"})
        data.prepare(tmp_path / "other", given)
        assert (tmp_path / "other/tokens.npy").read_bytes() == (tmp_path / "cache/tokens.npy").read_bytes()
        with pytest.raises(ValueError, match="no token '</s>'"):
            data.prepare(tmp_path / "third", given.model_copy(update={"end_of_text": "</s>"}))

    def test_text_that_is_too_short_or_missing_is_refused(self, text: DataSettings, tmp_path: Path) -> None:
        data.prepare(tmp_path / "cache", text)
        with pytest.raises(ValueError, match="too few for one window of 100000"):
            Corpus(tmp_path / "cache", text.model_copy(update={"sequence_length": 100_000}), seed=0)
        with pytest.raises(ValueError, match="set data.suffixes"):
            data.prepare(tmp_path / "third", text.model_copy(update={"suffixes": (".rst",)}))

    def test_only_regular_files_are_read_and_what_is_left_out_is_said(
        self, text: DataSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data.prepare(tmp_path / "cache", text)
        os.mkfifo(tmp_path / "text/05-fifo.txt")
        (tmp_path / "text/06-link.txt").symlink_to("nowhere.txt")
        (tmp_path / "other").mkdir()
        (tmp_path / "text/07.txt").rename(tmp_path / "other/07.txt")
        (tmp_path / "text/07.txt").symlink_to(tmp_path / "other/07.txt")
        data.prepare(tmp_path / "again", text)
        assert (tmp_path / "again/tokens.npy").read_bytes() == (tmp_path / "cache/tokens.npy").read_bytes()
        assert capsys.readouterr().err.splitlines() == [
            f"data.text: {tmp_path}/text/05-fifo.txt is left out: it is no regular file",
            f"data.text: {tmp_path}/text/06-link.txt is left out: No such file or directory",
        ]

    def test_no_more_than_max_bytes_is_read_of_one_file_either(self, tmp_path: Path) -> None:
        text = "Ein Satz über Bären, größer als er sein müsste.\r\n" * 30
        with (tmp_path / "large.txt").open("wb") as file:
            file.write(text.encode())
            file.truncate(1 << 40)  # a hole: to read it all would take a terabyte
        size = next(size for size in range(900, 1000) if text.encode()[size] & 0xC0 == 0x80)  # within a character
        given = DataSettings(text=tmp_path / "large.txt", vocab_size=300, sequence_length=8, max_bytes=size)
        data.prepare(tmp_path / "cache", given)
        (tmp_path / "cut.txt").write_text(text.encode()[: size - 1].decode().replace("\r\n", "\n"))
        data.prepare(tmp_path / "expected", given.model_copy(update={"text": tmp_path / "cut.txt"}))
        read = (tmp_path / "cache/tokens.npy").read_bytes()
        assert read == (tmp_path / "expected/tokens.npy").read_bytes()
        data.prepare(tmp_path / "cache", given.model_copy(update={"max_bytes": size - 100}))
        assert (tmp_path / "cache/tokens.npy").read_bytes() != read

    def test_tokens_that_a_run_reads_are_not_written_over(self, text: DataSettings, tmp_path: Path) -> None:
        data.prepare(tmp_path / "cache", text)
        corpus = Corpus(tmp_path / "cache", text, seed=0)
        before = corpus.train_batch(0, corpus.train_windows)
        short = tmp_path / "short.txt"
        short.write_text("another text, which is shorter\n")
        data.prepare(tmp_path / "cache", text.model_copy(update={"text": short}))
        assert torch.equal(corpus.train_batch(0, corpus.train_windows).labels_BL, before.labels_BL)


class TestRuns:
    @pytest.mark.parametrize("engine", ["fsdp2", pytest.param("deepspeed", marks=pytest.mark.full)])
    def test_the_sharded_head_trains_like_the_plain_one(self, ranks: RankPool, tmp_path: Path, engine: str) -> None:
        for head in ("plain", "cce"):
            words = overrides(tmp_path / head, **ENGINES[engine], head=head, **{"batch.accumulation": "2"})
            assert ranks.run(2, train, words, timeout=120) == [True, True]
        assert losses(tmp_path / "cce") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
        assert main(["compare", str(tmp_path / "plain"), str(tmp_path / "cce")]) == 0

    @pytest.mark.full
    def test_two_ranks_train_like_one_process(self, ranks: RankPool, tmp_path: Path) -> None:
        none = {"engine": "none", "deepspeed": "null", "model.config.attention_dropout": "0", "batch.accumulation": "2"}
        assert ranks.run(1, train, overrides(tmp_path / "one", **none), timeout=120) == [True]
        two = {**none, "engine": "fsdp2", "batch.accumulation": "1"}
        ranks.run(2, train, overrides(tmp_path / "two", **two), timeout=120)
        assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)

    @pytest.mark.parametrize("engine", ["fsdp2", pytest.param("deepspeed", marks=pytest.mark.full)])
    def test_an_interrupted_run_resumes_to_the_same_end(self, ranks: RankPool, tmp_path: Path, engine: str) -> None:
        """Dropout and sampled gradients make it depend on the random generators too."""
        changes = {**ENGINES[engine], "cce.gradient": "unbiased", "steps": "6"}
        ranks.run(2, train, overrides(tmp_path / "whole", **changes), timeout=120)
        words = overrides(tmp_path / "parts", **changes)
        assert ranks.run(2, _train_and_interrupt, words, 2, timeout=120) == [False, False]
        stopped = len(losses(tmp_path / "parts"))
        assert 2 <= stopped < 6
        assert ranks.run(2, train, [*words, "checkpoint.resume=true"], timeout=120) == [True, True]
        assert losses(tmp_path / "parts") == losses(tmp_path / "whole")

    def test_an_output_with_checkpoints_is_not_overwritten_unasked(self, ranks: RankPool, tmp_path: Path) -> None:
        words = overrides(tmp_path / "run", **ENGINES["fsdp2"], steps="1")
        ranks.run(2, train, words, timeout=120)
        with pytest.raises(ValueError, match="set checkpoint.resume=true to go on from step-00000001"):
            ranks.run(2, train, words, timeout=120)
        with pytest.raises(ValueError, match="its seed is 0, this run's is 1"):
            ranks.run(2, train, [*words, "checkpoint.resume=true", "seed=1"], timeout=120)

    def test_a_model_type_or_key_that_does_not_exist_is_refused_with_the_closest(
        self, ranks: RankPool, tmp_path: Path
    ) -> None:
        words = overrides(tmp_path / "run", **ENGINES["fsdp2"], timeout="100")
        attempts = {
            "model.config.model_type = 'lama': transformers ": "model.config.model_type=lama",
            "has no causal language model of this type; it has ": "model.config.model_type=vit_mae",
            "model.config.hiden_size (close to it: hidden_size": "model.config.hiden_size=3",
        }
        for texts in ranks.run(2, _refusals, [[*words, change] for change in attempts.values()], timeout=120):
            for part, text in zip(attempts, texts, strict=True):
                assert part in text
                assert len(text) < 300
            assert "close to it are llama" in texts[0]
        assert not (tmp_path / "data").exists()  # told before the text is read

    def test_metrics_that_cannot_be_written_end_every_rank(self, ranks: RankPool, tmp_path: Path) -> None:
        words = overrides(tmp_path / "run", **ENGINES["fsdp2"], timeout="100", steps="100000")
        for text in ranks.run(2, _lose_the_metrics, words, timeout=90):
            assert "rank 0: IsADirectoryError" in text
            assert "metrics.jsonl" in text

    def test_an_output_folder_belongs_to_one_run_at_a_time(self, ranks: RankPool, tmp_path: Path) -> None:
        words = overrides(tmp_path / "run", engine="none", deepspeed="null", steps="100000")
        other = overrides(tmp_path / "run", **ENGINES["fsdp2"], timeout="100")
        train_alone = [sys.executable, "-m", "cce_dist.train", "--config", TINY, *words]
        with Command(train_alone, tmp_path / "log.txt") as job:
            job.until(lambda: rows(tmp_path / "run") >= 2, 200)
            about = (tmp_path / "run/run.json").read_text()
            holder = f"is in use by process {job.process.pid} on {socket.gethostname()}"
            for texts in ranks.run(2, _refusals, [other], timeout=90):
                assert f"output={tmp_path}/run {holder}" in texts[0]
            assert (tmp_path / "run/run.json").read_text() == about
            assert job.process.poll() is None
            job.process.kill()
            job.process.wait()
        assert ranks.run(2, train, other, timeout=90) == [True, True]  # the kernel has let go of it

    @pytest.mark.full
    def test_a_signal_ends_a_run_that_has_nothing_to_save(self, tmp_path: Path) -> None:
        words = overrides(tmp_path / "run", engine="none", deepspeed="null", steps="100000")
        (tmp_path / "data").mkdir()
        run = [sys.executable, "-m", "cce_dist.train", "--config", TINY, *words]
        for number, code in ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)):
            with locked(tmp_path / "data/lock", "the text"), Command(run, tmp_path / "log.txt") as job:
                job.until(partial(_names, tmp_path / "run/lock", str(job.process.pid)), 200)
                time.sleep(0.5)  # it waits for the text now
                job.process.send_signal(number)
                assert job.wait(20) == code, job.said
        assert not (tmp_path / "run/checkpoints").exists()

    @pytest.mark.full
    def test_a_second_signal_ends_a_rank_that_waits_for_another(self, tmp_path: Path) -> None:
        words = overrides(tmp_path / "run", **ENGINES["fsdp2"], steps="100000")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *RENDEZVOUS]
        with Command([*torchrun, "-m", "cce_dist.train", "--config", TINY, *words], tmp_path / "log.txt") as job:
            job.until(lambda: rows(tmp_path / "run") >= 2, 200)
            (first,), (second,) = job.alive(RANK="0"), job.alive(RANK="1")
            os.kill(second, signal.SIGSTOP)
            time.sleep(0.5)
            os.kill(first, signal.SIGTERM)
            job.until(lambda: "ends after this step, with a checkpoint; a second signal" in job.said, 20)
            time.sleep(2.5)
            assert first in job.alive()
            os.kill(first, signal.SIGTERM)
            deadline = time.monotonic() + 20
            while first in job.alive():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert "rank 0 ends at the second signal, without a checkpoint" in job.said

    @pytest.mark.full
    def test_old_checkpoints_go_and_unfinished_ones_are_not_resumed_from(self, ranks: RankPool, tmp_path: Path) -> None:
        changes = {**ENGINES["fsdp2"], "checkpoint.every": "1", "checkpoint.keep": "2"}
        words = overrides(tmp_path / "run", **changes)
        ranks.run(2, train, words, timeout=120)
        folder = tmp_path / "run/checkpoints"
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000004"]
        (folder / "step-00000009.unfinished").mkdir()
        ranks.run(2, train, [*words, "steps=5", "checkpoint.resume=true"], timeout=120)
        assert [row["step"] for row in read(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4, 5]

    @pytest.mark.full
    def test_ctrl_c_under_torchrun_leaves_a_checkpoint_that_resumes(self, ranks: RankPool, tmp_path: Path) -> None:
        words = overrides(tmp_path / "run", **ENGINES["fsdp2"], steps="100000")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *RENDEZVOUS]
        with Command([*torchrun, "-m", "cce_dist.train", "--config", TINY, *words], tmp_path / "log.txt") as job:
            job.until(lambda: rows(tmp_path / "run") >= 2, 120)
            os.killpg(job.process.pid, signal.SIGINT)  # as a terminal does
            assert job.wait(60) != 0
            assert job.alive() == []
        taken = read(tmp_path / "run/metrics.jsonl")[-1]["step"]
        assert (tmp_path / f"run/checkpoints/step-{taken:08d}/manifest.json").exists()
        again = [*words, f"steps={taken + 1}", "checkpoint.resume=true"]
        assert ranks.run(2, train, again, timeout=120) == [True, True]
        assert [row["step"] for row in read(tmp_path / "run/metrics.jsonl")] == list(range(1, taken + 2))

    @pytest.mark.full
    def test_a_model_folder_is_trained_with_its_own_tokenizer(self, ranks: RankPool, tmp_path: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        text = DataSettings(text=Path(data.__file__), vocab_size=300)
        data.prepare(tmp_path / "model", text)
        config = yaml.safe_load(SMALL["model.config"])
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, vocab_size=310)).save_pretrained(
            tmp_path / "model"
        )
        words = overrides(tmp_path / "run", **ENGINES["fsdp2"], **{"model.path": str(tmp_path / "model")})
        words = [word for word in words if not word.startswith("model.config")] + ["model.config=null"]
        assert ranks.run(2, train, words, timeout=120) == [True, True]
        assert (tmp_path / "data/tokenizer.json").read_text() == (tmp_path / "model/tokenizer.json").read_text()


def _mesh_run(ranks: RankPool, world: int, output: Path, config: Path, **changes: str) -> list[float]:
    """Losses of a run of the examples' model, tied or not, whose optimizer steps take 8 windows on any mesh."""
    same = {"model.config.attention_dropout": "0", "batch.accumulation": "1"}
    assert all(ranks.run(world, train, overrides(output, **{**same, **changes}), config, timeout=120))
    return losses(output)


def _refusals(runs: list[list[str]]) -> list[str]:
    texts = []
    for words in runs:
        with pytest.raises(ValueError, match=".") as caught:
            train(words)
        texts.append(str(caught.value))
    return texts


class TestMeshes:
    @pytest.mark.parametrize("path", sorted((ROOT / "configs/fsdp").glob("*.yaml")), ids=lambda path: path.stem)
    def test_each_shipped_example_trains_like_one_process(self, ranks: RankPool, tmp_path: Path, path: Path) -> None:
        example = yaml.safe_load(path.read_text())
        readers = 4 // example.get("mesh", {}).get("tensor_parallel", 1)
        tied = {"model.config.tie_word_embeddings": str(example["model"]["config"]["tie_word_embeddings"])}
        one = {**tied, "engine": "none", "deepspeed": "null", "batch.micro": "8"}
        expected = _mesh_run(ranks, 1, tmp_path / "one", TINY, **one)
        changes = {**tied, "batch.micro": str(8 // readers)}
        assert _mesh_run(ranks, 4, tmp_path / "four", path, **changes) == pytest.approx(expected, rel=1e-5)

    def test_a_mesh_that_does_not_fit_is_refused_on_every_rank(self, ranks: RankPool, tmp_path: Path) -> None:
        words = overrides(tmp_path / "run", **ENGINES["fsdp2"])
        attempts = {
            "must divide the number of ranks, 2": ["mesh.replicas=3"],
            "must divide the model's num_attention_heads, 3": [
                "mesh.tensor_parallel=2", "model.config.num_attention_heads=3", "model.config.hidden_size=12",
            ],
            "gpt2 has no plan": [
                "mesh.tensor_parallel=2", "model.config={model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2}",
            ],
        }  # fmt: skip
        for texts in ranks.run(2, _refusals, [[*words, *changes] for changes in attempts.values()], timeout=120):
            for part, text in zip(attempts, texts, strict=True):
                assert part in text
        with pytest.raises(ValueError, match="mesh is for engine: fsdp2"):
            settings.load(TINY, overrides(tmp_path, **{"mesh.replicas": "2"}))


class TestComparison:
    @staticmethod
    def _write(folder: Path, head: str, final: float, gradient: str | None = None) -> str:
        folder.mkdir()
        about = {"settings": {"engine": "fsdp2", "head": head, "steps": 2}, "ranks": 2, "gradient": gradient}
        (folder / "run.json").write_text(json.dumps(about))
        row = {"eval_loss": 1.0, "tokens_per_second": 1.0}
        rows = [{"step": 1, "loss": 6.0, **row}, {"step": 2, "loss": final, **row}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder)

    def test_exact_runs_must_agree_and_others_may_differ(self, tmp_path: Path) -> None:
        plain = self._write(tmp_path / "plain", "plain", 5.0)
        near = self._write(tmp_path / "near", "cce", 5.0004, "exact")
        far = self._write(tmp_path / "far", "cce", 5.0006, "exact")
        sampled = self._write(tmp_path / "sampled", "cce", 5.1, "unbiased")
        assert main(["compare", plain, near, sampled]) == 0
        assert main(["compare", plain, near, far]) == 1
        assert main(["compare", plain, far, "--tolerance", "1e-3"]) == 0

    def test_rows_of_one_engine_and_head_are_told_apart_by_their_folders(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "again").mkdir()
        runs = [
            self._write(tmp_path / "plain", "plain", 5.0),
            *(self._write(tmp_path / name, "cce", 5.0, "exact") for name in ("exact", "again/exact")),
            self._write(tmp_path / "sampled", "cce", 5.0, "unbiased"),
        ]
        assert main(["compare", *runs]) == 0
        said = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [words for words in said if len(words) == 1 and "exact" in words[0]] == [["exact"], ["again/exact"]]
        assert not any("plain" in words[:1] or "sampled" in words[:1] for words in said)

    def test_a_loss_that_is_not_a_number_does_not_agree(self, tmp_path: Path) -> None:
        plain = self._write(tmp_path / "plain", "plain", 5.0)
        assert main(["compare", plain, self._write(tmp_path / "nan", "cce", float("nan"), "exact")]) == 1

    def test_what_cannot_be_compared_is_said(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        alone = self._write(tmp_path / "alone", "cce", 5.0, "exact")
        assert main(["compare", alone]) == 2
        assert main(["compare", str(tmp_path / "nothing")]) == 2
        said = capsys.readouterr().err
        assert "needs one run with head: plain" in said
        assert "is not the output of a finished run" in said


class _LM(torch.nn.Module):
    """The parts of a Hugging Face model that `HeadMemory` looks at."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.base_model = torch.nn.Linear(8, 8)
        self.weight = torch.nn.Parameter(torch.randn(vocab, 8))


class TestHeadMemory:
    def test_it_is_the_peak_between_the_hidden_states_and_their_gradient(self) -> None:
        model = _LM(vocab=1)
        with HeadMemory(model) as memory:
            before = torch.zeros(100_000)
            hidden_ND = model.base_model(torch.randn(4, 8))
            for _ in range(2):
                freed = torch.zeros(1000)
                freed.add_(1).view(10, 100)
                del freed
            kept = torch.zeros(500)
            torch.empty(100_000, device="meta")
            before.add_(1)
            (hidden_ND * 2).sum().backward()
            torch.zeros(100_000)
        assert kept.nbytes == 2000
        assert memory.peak == 4000  # later, kept and some gradients of 128 bytes are less

    def test_logits_are_most_of_a_plain_head_and_the_fused_one_has_none(self) -> None:
        model, labels_N = _LM(vocab=8192), torch.randint(8192, (64,))
        peaks = []
        for fused in (False, True):
            with HeadMemory(model) as memory:
                hidden_ND = model.base_model(torch.randn(64, 8))
                if fused:
                    loss = linear_cross_entropy(hidden_ND, model.weight, labels_N, workspace_mb=1)
                else:
                    loss = torch.nn.functional.cross_entropy(hidden_ND @ model.weight.T, labels_N)
                loss.backward()
            peaks.append(memory.peak)
        logits = 64 * 8192 * 4
        assert 2 * logits <= peaks[0] < 4 * logits
        assert peaks[1] < logits
