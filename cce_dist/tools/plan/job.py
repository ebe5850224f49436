"""What is planned: a head, the tokens of a rank, and GPUs with their datasheets.

In: numbers of the command line, a model's config.json, a DeepSpeed JSON. Out: a `Job` that can be planned, and the
values of vocab_parallel_size that it allows.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cce_dist.config import CCEConfig
from cce_dist.loss.settings import least_workspace_mb


class Gpu(NamedTuple):
    """Datasheet figures: dense 16-bit FLOP/s, bytes/s of its memory, bytes of it; bytes/s in one direction to the GPUs
    of its node, and of its share of the node's network."""

    flops: float
    bandwidth: float
    memory: float
    link: float
    network: float


GPUS = {
    "a100": Gpu(312e12, 2.039e12, 80e9, 300e9, 25e9),
    "h100": Gpu(989e12, 3.35e12, 80e9, 450e9, 50e9),
    "h200": Gpu(989e12, 4.8e12, 141e9, 450e9, 50e9),
    "b200": Gpu(2250e12, 8e12, 180e9, 900e9, 50e9),
}
ELEMENT = 2
"""Bytes of a weight, a gradient and a hidden state in 16-bit training."""


class Job(NamedTuple):
    """What is planned: ``tokens`` of one rank in one micro-step; ``network`` None: the GPU's usual share."""

    vocab: int
    hidden: int
    tokens: int
    gpus: int
    gpu: str
    gpus_per_node: int = 8
    gradient: str = "unbiased"
    workspace_mb: int | Literal["logits"] | None = None
    network: float | None = None


def check(job: Job) -> None:
    """Raises ValueError where a field of the job is not one that can be planned."""
    if job.gpu not in GPUS:
        raise ValueError(f"--gpu must be one of {', '.join(sorted(GPUS))}, got {job.gpu!r}.")
    if job.gpus > job.gpus_per_node and job.gpus % job.gpus_per_node:
        raise ValueError(
            f"--gpus must be a multiple of --gpus-per-node {job.gpus_per_node} (whole nodes), got {job.gpus}."
        )
    if job.vocab < job.gpus:
        raise ValueError(f"the classifier's {job.vocab} rows are fewer than the {job.gpus} GPUs; plan for fewer.")
    if not group_sizes(job):
        least = least_workspace_mb(job.tokens, ELEMENT)
        raise ValueError(f"workspace_mb must be at least {least} for {job.tokens} tokens, got {job.workspace_mb}.")


def group_sizes(job: Job) -> list[int]:
    """Values of vocab_parallel_size: the divisors of the ranks that are powers of two, a whole node, and all ranks;
    without those whose loss would refuse the job's ``workspace_mb``."""
    powers = [1 << bit for bit in range(job.gpus.bit_length())]
    divisors = sorted({size for size in (*powers, job.gpus_per_node, job.gpus) if job.gpus % size == 0})
    given = job.workspace_mb if isinstance(job.workspace_mb, int) else math.inf
    return [size for size in divisors if given >= least_workspace_mb(size * job.tokens, ELEMENT)]


def read_model(folder: Path) -> tuple[int, int]:
    """(vocabulary, hidden) of a folder with a Hugging Face config.json.

    Raises:
        ValueError: no such file, or it does not say.
    """
    file = folder / "config.json" if folder.is_dir() else folder
    config = _read_json(file)
    text = config.get("text_config")  # of a multimodal model
    config = text if isinstance(text, dict) else config
    found = []
    for key in ("vocab_size", "hidden_size"):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{file} has no {key} (got {value!r}); pass --vocab and --hidden instead of --model.")
        found.append(value)
    return found[0], found[1]


def read_deepspeed(file: Path) -> tuple[CCEConfig, int | None]:
    """(the section "cce_dist", or its defaults; sequences of a micro-batch) of a DeepSpeed JSON.

    Raises:
        ValueError: not such a file, or a section that is not valid.
    """
    config = _read_json(file)
    section = CCEConfig.from_mapping(config.get("cce_dist", {}), f'the section "cce_dist" of {file}')
    micro = config.get("train_micro_batch_size_per_gpu")
    return section, micro if isinstance(micro, int) and micro > 0 else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    return content
