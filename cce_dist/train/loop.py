"""The run: optimizer steps from the newest checkpoint to the last, with evaluation, checkpoints and Ctrl-C."""

import json
import logging
import math
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from cce_dist.train import checkpoint, data, engines, model
from cce_dist.train.checkpoint import Progress
from cce_dist.train.data import IGNORED, Batch, Corpus
from cce_dist.train.engines import Engine
from cce_dist.train.head_memory import HeadMemory
from cce_dist.train.metrics import Metrics, peak_memory
from cce_dist.train.place import Place, process_group
from cce_dist.train.settings import OptimizerSettings, Settings
from cce_dist.transformers import fused_evaluation


class _Run(NamedTuple):
    settings: Settings
    place: Place
    corpus: Corpus
    network: PreTrainedModel
    engine: Engine

    @property
    def windows_per_round(self) -> int:
        """Windows that one micro-batch of every reader takes."""
        return self.readers * self.settings.batch.micro

    @property
    def readers(self) -> int:
        """Ranks with text of their own; those of a tensor-parallel group read the same."""
        return self.place.world // self.settings.mesh.tensor_parallel

    @property
    def reader(self) -> int:
        return self.place.rank // self.settings.mesh.tensor_parallel


def run(settings: Settings) -> bool:
    """Trains as the settings say; every rank makes the call. True when all steps are done, False after Ctrl-C.

    Raises:
        ValueError: settings, text, model or checkpoint that do not fit each other.
        RuntimeError: of torch, where another rank is gone or was silent for ``settings.timeout`` seconds; what it means
            is said on stderr.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls what torch has renamed, at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    waiting = process_group(timedelta(seconds=settings.timeout))
    with _interruption() as interrupted, waiting as place, _lost_ranks_explained(settings, place):
        corpus = _corpus(settings, place)
        network = model.build(settings.model, corpus.vocab_size, settings.seed)
        this = _Run(settings, place, corpus, network, engines.build(network, settings, place))
        torch.manual_seed(settings.seed + this.reader)
        progress = _start(this)
        events = settings.output / "tensorboard" if settings.tensorboard else None
        _mention_restarts(settings, progress, place)
        with Metrics(settings.output / "metrics.jsonl", progress.step, settings.steps, place, events) as metrics:
            _announce(this, metrics)
            return _train(this, progress, metrics, interrupted)


def _train(this: _Run, progress: Progress, metrics: Metrics, interrupted: Callable[[], bool]) -> bool:
    settings = this.settings
    seconds, tokens = 0.0, 0
    while progress.step < settings.steps:
        batches = _next_batches(this, progress)
        valid, stop = _agree(batches, interrupted())
        if stop:
            metrics.say(f"interrupted: the checkpoint of step {progress.step} is {_save(this, progress)}")
            return False
        # The first step of a process is no typical one: memory is taken and kernels are compiled in it.
        measured = settings.measure_head_memory and progress.step == 1
        memory = HeadMemory(this.network) if measured else nullcontext()
        learning_rate = _learning_rate(settings.optimizer, progress.step, settings.steps)
        started = time.perf_counter()
        with memory:
            loss, norm = _step(this, batches, valid, learning_rate)
        seconds += time.perf_counter() - started
        tokens += sum(batch.inputs_BL.numel() for batch in batches) * this.readers
        progress = progress._replace(
            step=progress.step + 1, windows=progress.windows + len(batches) * this.windows_per_round
        )
        last = progress.step == settings.steps
        row: dict[str, Any] = {
            "step": progress.step,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "eval_loss": _evaluate(this) if last or _due(progress.step, settings.eval_every) else None,
            "tokens_per_second": tokens / seconds,
            "peak_memory_bytes": peak_memory(this.place),
            "head_memory_bytes": memory.peak if isinstance(memory, HeadMemory) else None,
        }
        metrics.advance(row)
        if last or row["eval_loss"] is not None or row["head_memory_bytes"] or _due(progress.step, settings.log_every):
            metrics.log(row)
            seconds, tokens = 0.0, 0
        if last or _due(progress.step, settings.checkpoint.every):
            _save(this, progress)
    return True


def _step(this: _Run, batches: list[Batch], valid: int, learning_rate: float) -> tuple[float, float]:
    """One optimizer step; returns the mean loss over the step's valid tokens of all ranks, and the gradient norm."""
    this.engine.model.train()
    total = torch.zeros((), dtype=torch.float64, device=this.place.device)
    for batch in batches:
        loss = model.loss_sum(this.engine.model, _to(batch, this.place))
        # The engines average gradients over the ranks; with this they add up to those of the mean over all tokens.
        this.engine.backward(loss * (this.place.world / valid))
        total += loss.detach()
    norm = this.engine.step(learning_rate)
    return _sum_over_ranks(float(total)) / valid, norm


@torch.no_grad()
def _evaluate(this: _Run) -> float:
    """The mean loss over held-out text."""
    this.engine.model.eval()
    rounds = min(this.settings.eval_batches, -(-this.corpus.eval_windows // this.windows_per_round))
    total, valid = 0.0, 0
    lazy = this.settings.head == "cce"
    with fused_evaluation(this.network) if lazy else nullcontext():
        for index in range(rounds):
            batch = this.corpus.eval_batch(_first_window(this, index), this.settings.batch.micro)
            total += float(model.loss_sum(this.engine.model, _to(batch, this.place)))
            valid += _count_valid(batch)
    return _sum_over_ranks(total) / _sum_over_ranks(valid)


def _next_batches(this: _Run, progress: Progress) -> list[Batch]:
    size, rounds = this.settings.batch.micro, this.settings.batch.accumulation
    return [this.corpus.train_batch(progress.windows + _first_window(this, index), size) for index in range(rounds)]


def _first_window(this: _Run, index: int) -> int:
    """Where this rank's micro-batch number ``index`` begins."""
    return index * this.windows_per_round + this.reader * this.settings.batch.micro


def _agree(batches: list[Batch], interrupted: bool) -> tuple[int, bool]:
    """Over all ranks: the valid tokens of the optimizer step, and whether any rank was asked to stop."""
    facts = torch.tensor([sum(map(_count_valid, batches)), int(interrupted)])
    dist.all_reduce(facts)
    return max(int(facts[0]), 1), bool(facts[1])


def _corpus(settings: Settings, place: Place) -> Corpus:
    folder = settings.data.cache or settings.output / "data"
    text = settings.data.model_copy(update={"tokenizer": settings.tokenizer})
    fault: list[str | None] = [None]
    if place.rank == 0:
        try:
            settings.output.mkdir(parents=True, exist_ok=True)
            data.prepare(folder, text)
        except (OSError, ValueError) as error:
            fault = [str(error)]
    dist.broadcast_object_list(fault)
    if fault[0] is not None:
        raise ValueError(fault[0])
    blind: list[str | None] = [None] * place.world
    dist.all_gather_object(blind, None if (folder / "manifest.json").exists() else socket.gethostname())
    hosts = sorted({host for host in blind if host is not None})
    if hosts:
        raise ValueError(
            f"{folder.resolve()} was written by rank 0 and is not there on {', '.join(hosts)}: output and data.cache "
            "must be on a file system that all nodes see."
        )
    return Corpus(folder, text, settings.seed)


def _start(this: _Run) -> Progress:
    """The beginning, or where the newest checkpoint is."""
    beginning = Progress(0, 0, this.settings.engine, this.settings.seed, this.corpus.fingerprint)
    folder = checkpoint.newest(_checkpoints(this))
    if folder is None:
        return beginning
    if not this.settings.checkpoint.resume:
        raise ValueError(
            f"{_checkpoints(this)} has checkpoints of an earlier run: set checkpoint.resume=true to go on from "
            f"{folder.name}, or choose another output folder."
        )
    return checkpoint.load(folder, this.engine, beginning, this.place)


def _announce(this: _Run, metrics: Metrics) -> None:
    """Says what runs, and writes it to run.json for `compare`."""
    settings, place = this.settings, this.place
    gradient = engines.head_settings(settings).gradient_on(place.device) if settings.head == "cce" else None
    head = "a plain head" if gradient is None else f"a vocabulary-parallel CCE head ({gradient})"
    parameters = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in this.network.parameters())
    metrics.say(
        f"{parameters / 1e6:.1f} M parameters, {this.corpus.vocab_size} tokens of vocabulary; {settings.engine} on "
        f"{place.world} {place.device.type} rank(s) with {head}"
    )
    if place.rank == 0:
        about = {"settings": settings.model_dump(mode="json"), "ranks": place.world, "gradient": gradient}
        (settings.output / "run.json").write_text(json.dumps(about, indent=2))


def _save(this: _Run, progress: Progress) -> str:
    return str(checkpoint.save(_checkpoints(this), this.engine, progress, this.place, this.settings.checkpoint.keep))


def _checkpoints(this: _Run) -> Path:
    return this.settings.output / "checkpoints"


def _mention_restarts(settings: Settings, progress: Progress, place: Place) -> None:
    """What a log should say where a launcher may start the ranks again."""
    if place.rank:
        return
    if progress.step:
        print(f"going on from the checkpoint of step {progress.step}", flush=True)
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and settings.checkpoint.every is None:
        print(
            "checkpoint.every is not set: a restart by torchrun would begin where this process began", file=sys.stderr
        )


@contextmanager
def _lost_ranks_explained(settings: Settings, place: Place) -> Iterator[None]:
    """Says on stderr what gloo's and NCCL's errors mean: which rank has lost the others, and where to look."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        who = f"cce-dist train: rank {place.rank} of {place.world} on {socket.gethostname()}"
        if "timed out" in text or "timeout" in text:
            print(
                f"{who} heard nothing from another rank for {settings.timeout:g} s (timeout={settings.timeout:g}): the "
                "network is cut, or a rank hangs. The ranks that do not say this, or say it last, are where to look.",
                file=sys.stderr,
                flush=True,
            )
        elif "connection closed by peer" in text or "connection reset by peer" in text:
            print(f"{who} lost another rank, which has ended: its own error says why.", file=sys.stderr, flush=True)
        elif "no route to host" in text or "network is unreachable" in text:
            print(f"{who} does not reach another rank any more: the network is cut.", file=sys.stderr, flush=True)
        raise


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Notes SIGINT and SIGTERM instead of dying of them; the ranks then agree on a step to stop at."""
    noted: list[int] = []
    before = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in _SIGNALS}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(steps - settings.warmup_steps, 1)
    return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _count_valid(batch: Batch) -> int:
    return int((batch.labels_BL != IGNORED).sum())


def _to(batch: Batch, place: Place) -> Batch:
    return Batch(*(x.to(place.device) for x in batch))


def _sum_over_ranks(number: float) -> float:
    total = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)
