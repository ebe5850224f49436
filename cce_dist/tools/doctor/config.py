"""A config file, judged before anything is built from it: the trainer's YAML or a DeepSpeed JSON.

In: the file, the number of ranks, the device. Out: `Checked`: a line about it, a checksum, and what is wrong.
"""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from cce_dist.config import CCEConfig, misspelt_section


class Checked(NamedTuple):
    """A config file, judged. ``notes``: what no change of the file would mend. ``vocab_parallel_size``: ranks that
    share the classifier's rows, None for all."""

    summary: str
    digest: str
    faults: list[str]
    notes: list[str]
    vocab_parallel_size: int | None = None


def check_config(file: Path, world: int, device: torch.device) -> Checked:
    """A DeepSpeed JSON (by its suffix), or else the trainer's YAML, for ``world`` ranks."""
    try:
        content = file.read_bytes()
    except OSError as error:
        return Checked("", "", [f"cannot read {file}: {error.strerror or error}."], [])
    digest = hashlib.sha256(content).hexdigest()[:12]
    checked = _check_deepspeed(file, world) if file.suffix == ".json" else _check_trainer(file, world, device)
    return checked._replace(digest=digest)


def _check_deepspeed(file: Path, world: int) -> Checked:
    try:
        config = json.loads(file.read_text())
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not a JSON object")
    except ValueError as error:
        return Checked("", "", [f"{file} is no DeepSpeed config: {error}."], [])
    faults: list[str] = []
    notes: list[str] = []
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if find_spec("deepspeed") is None:
        faults.append("deepspeed is not installed: pip install 'cce_dist[deepspeed]'.")
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    sizes = [config[key] for key in keys if isinstance(config.get(key), int)]
    total, micro, accumulation = sizes if len(sizes) == len(keys) else (0, 0, 0)
    if total != micro * accumulation * world:
        faults.append(
            f"train_batch_size {total} is not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
            f"{accumulation} x {world} ranks = {micro * accumulation * world}. Correct one of them, or leave "
            "train_batch_size out."
        )
    if "cce_dist" not in config:
        if (key := misspelt_section(config)) is not None:
            faults.append(f'{file} has no section "cce_dist", but "{key}", which nothing reads: rename it.')
        return Checked(f"{file}: ZeRO stage {stage}, the stock head", "", faults, notes)
    try:
        settings = CCEConfig.from_mapping(config["cce_dist"], f'the section "cce_dist" of {file}')
    except ValueError as error:
        return Checked(f"{file}: ZeRO stage {stage}", "", [*faults, str(error)], notes)
    size = settings.vocab_parallel_size
    if size is not None and world % size:
        faults.append(f"vocab_parallel_size {size} does not divide the {world} ranks; choose a divisor.")
    if settings.enabled and not faults:
        from torch import nn

        from cce_dist.deepspeed.guard import check_version, refuse_untested

        try:
            check_version()
            known = {key: value for key, value in config.items() if key != "sequence_parallel_size"}
            refuse_untested(known, {"model": nn.Module()}, nn.Linear(1, 1), settings)
        except (NotImplementedError, RuntimeError) as error:
            faults.append(str(error))
    if settings.enabled and "sequence_parallel_size" in config:
        notes.append(f"sequence_parallel_size in {file} needs an mpu: pass it to cce_dist.deepspeed.initialize.")
    if settings.enabled:
        notes.append(
            f'DeepSpeed\'s own initialize ignores the section "cce_dist" of {file} and trains the plain head, without '
            "a word where cce_dist.deepspeed was never imported. Call cce_dist.deepspeed.initialize in its place, or "
            "cce_dist.deepspeed.install() before it, for accelerate and the Hugging Face Trainer too (installed() "
            "tells whether that was done). cce_dist.train needs nothing."
        )
    return Checked(f"{file}: ZeRO stage {stage}, {_summary(settings)}", "", faults, notes, size)


def _check_trainer(file: Path, world: int, device: torch.device) -> Checked:
    from cce_dist.train.engines import head_settings
    from cce_dist.train.loop import check
    from cce_dist.train.settings import load

    try:
        settings = load(file)
        check(settings)
        head = head_settings(settings)
    except ValueError as error:
        return Checked("", "", [str(error)], [])
    faults: list[str] = []
    size = head.vocab_parallel_size
    if settings.deepspeed is not None:
        stock = _check_deepspeed(settings.deepspeed, world)
        faults += stock.faults
    if settings.engine == "none" and world > 1:
        faults.append(f"engine: none is for a single process, got {world} ranks; use fsdp2 or deepspeed.")
    if size is not None and world % size:
        faults.append(f"cce.vocab_parallel_size {size} does not divide the {world} ranks; choose a divisor.")
    if settings.dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        faults.append(f"dtype: bf16 is not supported by {torch.cuda.get_device_name(device)}; use fp32.")
    plain = settings.head == "plain"
    summary = f"{file}: engine {settings.engine}, {'the plain head' if plain else _summary(head)}"
    return Checked(summary, "", list(dict.fromkeys(faults)), [], size)


def _summary(settings: CCEConfig) -> str:
    if not settings.enabled:
        return "cce_dist switched off"
    size = settings.vocab_parallel_size
    return f"gradient {settings.gradient or 'by backend'}" + (f", {size} rank(s) share the vocabulary" if size else "")


def group_size(config: Path | None, world: int) -> int:
    """How many ranks share the vocabulary in the run that the config describes; a sound one, by now."""
    size = None if config is None else check_config(config, world, torch.device("cpu")).vocab_parallel_size
    return size or world
