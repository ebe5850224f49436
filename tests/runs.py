"""Small training runs that several files of tests make, in the pool or under a launcher."""

from pathlib import Path
from typing import Any

import torch

from cce_dist.train import settings
from cce_dist.train.metrics import read

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs/train/tiny-cpu.yaml"
SMALL = {
    "model.config": "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
    "num_attention_heads: 2, attention_dropout: 0.1}",
    "data.vocab_size": "301",
    "data.sequence_length": "16",
    "data.max_bytes": "60000",
    "batch.micro": "2",
    "cce.gradient": "exact",
    "eval_batches": "2",
    "steps": "4",
}
RENDEZVOUS = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
ENGINES = {
    "fsdp2": {"engine": "fsdp2", "deepspeed": "null"},
    "deepspeed": {"engine": "deepspeed", "deepspeed": str(ROOT / "configs/deepspeed/zero3.json")},
}


def overrides(output: Path, **changes: str) -> list[str]:
    values = {"output": str(output), "data.cache": str(output.parent / "data"), **SMALL, **changes}
    return [f"{key}={value}" for key, value in values.items()]


def train(words: list[str], config: Path = TINY) -> bool:
    """A case of the rank pool."""
    from cce_dist.train.loop import run

    loaded = settings.load(config, words)
    try:
        return run(loaded)
    finally:
        if loaded.engine == "deepspeed":
            import deepspeed.comm

            deepspeed.comm.destroy_process_group()  # its own: it keeps groups of a case for the next one otherwise


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read(output / "metrics.jsonl")]


def rows(output: Path) -> int:
    """Steps that a run has logged so far."""
    metrics = output / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def weights(output: Path, step: int) -> dict[str, Any]:
    """The parameters in a checkpoint of a run, whole, by the tools that the engines come with for it."""
    engine = output / f"checkpoints/step-{step:08d}/engine"
    if (engine / "deepspeed").exists():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return dict(get_fp32_state_dict_from_zero_checkpoint(str(engine), tag="deepspeed"))
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    whole = output / "whole.pt"
    dcp_to_torch_save(engine, whole)
    return dict(torch.load(whole, weights_only=True)["model"])


def assert_same_weights(output: Path, other: Path, step: int) -> None:
    ours, theirs = weights(output, step), weights(other, step)
    assert len(ours) > 5
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
