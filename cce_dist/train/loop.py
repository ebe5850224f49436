"""The run: optimizer steps from the newest checkpoint to the last, with evaluation, checkpoints and Ctrl-C.

An error on one rank is raised on all of them, before they wait for each other: what one rank does alone, and what may
fail on one, goes through `together`.
"""

import json
import logging
import math
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from transformers import PreTrainedModel

from cce_dist.train import checkpoint, data, engines, model
from cce_dist.train.checkpoint import Progress
from cce_dist.train.data import IGNORED, Batch, Corpus
from cce_dist.train.engines import Engine
from cce_dist.train.head_memory import HeadMemory
from cce_dist.train.lock import locked
from cce_dist.train.metrics import Metrics, peak_memory
from cce_dist.train.place import Place, process_group
from cce_dist.train.settings import OptimizerSettings, Settings
from cce_dist.train.signals import deferral, insistence
from cce_dist.train.together import on_rank_0, together
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


def check(settings: Settings) -> None:
    """What can be told without other ranks, and before text and model are there.

    Raises:
        ValueError: a model.config or a DeepSpeed JSON that is not valid.
    """
    model.check(settings.model)
    engines.check(settings)


def run(settings: Settings) -> bool:
    """Trains as the settings say; every rank makes the call. True when all steps are done, False after Ctrl-C.

    The output folder is this run's alone meanwhile. Until the first step a signal ends the process, as there is nothing
    to save; from there on the first one lets the step end with a checkpoint, and a second one ends the process.

    Raises:
        ValueError: on every rank; settings, text, model or checkpoint that do not fit each other, or another run that
            has the output folder.
        RuntimeError: loss or gradient norm were not finite for ``settings.nonfinite_steps`` steps, or a checkpoint
            cannot be written; or of torch, where another rank is gone or was silent for ``settings.timeout`` seconds:
            what it means is said on stderr.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls what torch has renamed, at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    waiting = process_group(timedelta(seconds=settings.timeout))
    with insistence(), waiting as place, _lost_ranks_explained(settings, place), _output(settings, place):
        together(partial(check, settings))
        corpus = _corpus(settings, place)
        network = together(lambda: model.build(settings.model, corpus.vocab_size, settings.seed))
        this = _Run(settings, place, corpus, network, engines.build(network, settings, place))
        torch.manual_seed(settings.seed + this.reader)
        progress = _start(this)
        events = settings.output / "tensorboard" if settings.tensorboard else None
        _mention_restarts(settings, progress, place)
        file = settings.output / "metrics.jsonl"
        with together(lambda: Metrics(file, progress.step, settings.steps, place, events)) as metrics:
            _announce(this, metrics)
            with deferral() as interrupted:
                return _train(this, progress, metrics, interrupted)


def _train(this: _Run, progress: Progress, metrics: Metrics, interrupted: Callable[[], bool]) -> bool:
    settings = this.settings
    seconds, tokens = 0.0, 0
    not_finite = 0  # steps in a row, up to the last one
    proven = False  # whether the newest checkpoint's weights have given a finite loss, so that older ones may go
    unsaid: OSError | None = None  # an error in writing the metrics, which rank 0 does alone
    while progress.step < settings.steps:
        batches = _next_batches(this, progress)
        valid, stop, failed = _agree(batches, interrupted(), unsaid is not None)
        if failed:
            together(partial(_raise, unsaid))
        if stop:
            metrics.say(f"interrupted: {_last_words(this, progress, not_finite)}")
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
        due = last or _due(progress.step, settings.checkpoint.every)
        healthy = all(math.isfinite(row[name]) for name in ("loss", "grad_norm", "eval_loss") if row[name] is not None)
        not_finite = 0 if healthy and (not due or engines.weights_are_finite(this.engine)) else not_finite + 1
        logged = (
            last or row["eval_loss"] is not None or row["head_memory_bytes"] or _due(progress.step, settings.log_every)
        )
        try:
            metrics.advance(row)
            if logged:
                metrics.log(row)
        except OSError as error:  # raised when all ranks are there
            unsaid = error
        if logged:
            seconds, tokens = 0.0, 0
        if not_finite and (last or not_finite == settings.nonfinite_steps):
            raise RuntimeError(_not_finite(this, progress, not_finite, row, proven))
        if healthy and not proven:
            checkpoint.remove_old(_checkpoints(this), settings.checkpoint.keep)
            proven = True
        if due and not_finite:
            metrics.say(f"no checkpoint of step {progress.step}: loss, gradient norm or weights are not finite")
        elif due:
            _save(this, progress)
            proven = row["eval_loss"] is not None
            if proven:
                checkpoint.remove_old(_checkpoints(this), settings.checkpoint.keep)
    together(partial(_raise, unsaid))
    return True


def _not_finite(this: _Run, progress: Progress, steps: int, row: dict[str, Any], proven: bool) -> str:
    names = [folder.name for folder in checkpoint.newest_first(_checkpoints(this))]
    kept = f"The checkpoints from before are kept, the newest is {names[0]}. " if names else ""
    if len(names) > 1 and not proven:
        kept += f"No finite loss came after that one: if it goes wrong again, remove it and go on from {names[1]}. "
    return (
        f"loss, gradient norm or weights have not been finite for {steps} step(s), up to step {progress.step} (loss "
        f"{row['loss']}, grad_norm {row['grad_norm']}): the run ends, as it learns nothing any more. {kept}"
        "Lower optimizer.learning_rate or optimizer.clip, or look at the text and the model; nonfinite_steps="
        f"{this.settings.nonfinite_steps} is how many such steps a run may take."
    )


def _last_words(this: _Run, progress: Progress, not_finite: int) -> str:
    """What becomes of an interrupted run; writes its checkpoint."""
    if not_finite or not engines.weights_are_finite(this.engine):
        return f"step {progress.step} has no checkpoint, since loss, gradient norm or weights are not finite"
    return f"the checkpoint of step {progress.step} is {_save(this, progress)}"


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _step(this: _Run, batches: list[Batch], valid: int, learning_rate: float) -> tuple[float, float]:
    """One optimizer step; returns the mean loss over the step's valid tokens of all ranks, and the gradient norm, which
    is NaN on every rank where it is not finite on any."""
    this.engine.model.train()
    total = torch.zeros((), dtype=torch.float64, device=this.place.device)
    for batch in batches:
        loss = model.loss_sum(this.engine.model, _to(batch, this.place))
        # The engines average gradients over the ranks; with this they add up to those of the mean over all tokens.
        this.engine.backward(loss * (this.place.world / valid))
        total += loss.detach()
    norm = this.engine.step(learning_rate)
    mean, faults = _sum_over_ranks(float(total) / valid, float(not math.isfinite(norm)))
    return mean, math.nan if faults else norm


@torch.no_grad()
def _evaluate(this: _Run) -> float:
    """The mean loss over held-out text."""
    this.engine.model.eval()
    rounds = min(this.settings.eval_batches, -(-this.corpus.eval_windows // this.windows_per_round))
    total, valid = 0.0, 0.0
    lazy = this.settings.head == "cce"
    with fused_evaluation(this.network) if lazy else nullcontext():
        for index in range(rounds):
            batch = this.corpus.eval_batch(_first_window(this, index), this.settings.batch.micro)
            total += float(model.loss_sum(this.engine.model, _to(batch, this.place)))
            valid += _count_valid(batch)
    total, valid = _sum_over_ranks(total, valid)
    return total / valid


def _next_batches(this: _Run, progress: Progress) -> list[Batch]:
    size, rounds = this.settings.batch.micro, this.settings.batch.accumulation
    return [this.corpus.train_batch(progress.windows + _first_window(this, index), size) for index in range(rounds)]


def _first_window(this: _Run, index: int) -> int:
    """Where this rank's micro-batch number ``index`` begins."""
    return index * this.windows_per_round + this.reader * this.settings.batch.micro


def _agree(batches: list[Batch], interrupted: bool, failed: bool) -> tuple[int, bool, bool]:
    """Over all ranks: the valid tokens of the optimizer step, whether any was asked to stop, and whether any failed."""
    facts = torch.tensor([sum(map(_count_valid, batches)), int(interrupted), int(failed)])
    dist.all_reduce(facts)
    return max(int(facts[0]), 1), bool(facts[1]), bool(facts[2])


@contextmanager
def _output(settings: Settings, place: Place) -> Iterator[None]:
    """Makes the output folder and keeps other runs out of it, by a lock that rank 0 holds."""
    folder = settings.output
    with ExitStack() as held:

        def claim() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / "lock", f"output={folder}"))

        on_rank_0(claim)
        yield


def _corpus(settings: Settings, place: Place) -> Corpus:
    folder = settings.data.cache or settings.output / "data"
    text = settings.data.model_copy(update={"tokenizer": settings.tokenizer})
    on_rank_0(lambda: data.prepare(folder, text))
    blind: list[str | None] = [None] * place.world
    dist.all_gather_object(blind, None if (folder / "manifest.json").exists() else socket.gethostname())
    hosts = sorted({host for host in blind if host is not None})
    if hosts:
        raise ValueError(
            f"{folder.resolve()} was written by rank 0 and is not there on {', '.join(hosts)}: output and data.cache "
            "must be on a file system that all nodes see."
        )
    corpus = together(lambda: Corpus(folder, text, settings.seed))
    read: list[str] = [""] * place.world
    dist.all_gather_object(read, corpus.fingerprint)
    if len(set(read)) > 1:
        raise ValueError(
            f"the ranks read different tokens from {folder}: another run has replaced them meanwhile. Give runs with "
            "different texts a data.cache of their own."
        )
    return corpus


def _start(this: _Run) -> Progress:
    """The beginning, or where the newest checkpoint is."""
    settings = this.settings
    beginning = Progress(
        0,
        0,
        settings.engine,
        settings.seed,
        this.corpus.fingerprint,
        model.describe(this.network),
        this.engine.layout,
        transformers.__version__,
    )
    folder = checkpoint.newest(_checkpoints(this))
    if folder is None:
        return beginning
    if not settings.checkpoint.resume:
        raise ValueError(
            f"{_checkpoints(this)} has checkpoints of an earlier run: set checkpoint.resume=true to go on from "
            f"{folder.name}, or choose another output folder."
        )
    return checkpoint.load(folder, this.engine, beginning, settings.steps, this.place)


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
    if place.device.type == "cuda":
        metrics.say(
            "In the first step kernels are compiled: up to half a minute, and seconds once Triton has cached them."
        )
    about = {"settings": settings.model_dump(mode="json"), "ranks": place.world, "gradient": gradient}
    on_rank_0(lambda: (settings.output / "run.json").write_text(json.dumps(about, indent=2)))


def _save(this: _Run, progress: Progress) -> str:
    return str(checkpoint.save(_checkpoints(this), this.engine, progress, this.place))


def _checkpoints(this: _Run) -> Path:
    return this.settings.output / "checkpoints"


def _mention_restarts(settings: Settings, progress: Progress, place: Place) -> None:
    """What a log should say where a launcher may start the ranks again."""
    if place.rank:
        return
    if progress.step:
        print(f"going on from the checkpoint of step {progress.step}", flush=True)
    if progress.step == settings.steps:
        print(f"all steps={settings.steps} are taken already: nothing is left to do", flush=True)
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


def _sum_over_ranks(*numbers: float) -> list[float]:
    totals = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(totals)
    return totals.tolist()
