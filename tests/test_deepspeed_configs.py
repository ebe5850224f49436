"""configs/deepspeed: each file trains as it is, with the losses of a plain head."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from ranks import RankPool
from torch import Tensor, nn

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

import deepspeed
import transformers
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed_runs import fresh_deepspeed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import cce_dist.deepspeed as cce_deepspeed
from cce_dist.cli import main
from cce_dist.train import engines, settings
from cce_dist.train.engines import DeepSpeedEngine
from cce_dist.train.metrics import read

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "deepspeed"
ELSEWHERE = {
    "autotp.json": "test_deepspeed_parallel.py",
    "hf-trainer.json": "test_deepspeed_trainer.py",
    "zero3-fp16.json": "test_deepspeed_fp16.py",
}
BF16 = {"zero3-bf16.json", "zero3-autocast.json"}
ON_4_RANKS = {
    "zero2-vocab-groups.json",
    "zero3-hpz.json",
    "zero3-vocab-groups.json",
}  # so that their groups are smaller than the world
SETTINGS = {
    "model.config": "{model_type: llama, hidden_size: 18, intermediate_size: 32, num_hidden_layers: 1, "
    "num_attention_heads: 3}",
    "data.vocab_size": "301",
    "data.sequence_length": "16",
    "data.max_bytes": "60000",
    "optimizer.warmup_steps": "0",
    "eval_batches": "1",
    "steps": "3",
}


def _train(words: list[str]) -> str:
    """`python -m cce_dist.train`; returns what it prints."""
    fresh_deepspeed()
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        assert main(["train", "--config", str(ROOT / "configs/train/tiny-cpu.yaml"), *words]) == 0
    return printed.getvalue()


def _run(ranks: RankPool, output: Path, config: Path, **changes: str) -> tuple[list[float], list[float], str]:
    """Losses, gradient norms and output of a run on two ranks or on four, which see the same sequences."""
    world = 4 if config.name in ON_4_RANKS else 2
    words = {
        **SETTINGS,
        "output": str(output),
        "data.cache": str(output.parent / "data"),
        "deepspeed": str(config),
        "batch.micro": str(4 // world),
        "dtype": "bf16" if config.name in BF16 else "fp32",
        **changes,
    }
    printed = ranks.run(world, _train, [f"{key}={value}" for key, value in words.items()], timeout=200)[0]
    rows = read(output / "metrics.jsonl")
    return [row["loss"] for row in rows], [row["grad_norm"] for row in rows], printed


@pytest.fixture(scope="module")
def plain(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], list[float]]:
    """Losses and gradient norms with a plain head."""
    folder = tmp_path_factory.mktemp("configs")
    losses, norms, printed = _run(ranks, folder / "plain", FOLDER / "zero3.json", head="plain")
    assert "cce_dist is active" not in printed
    return losses, norms


NOT_DATA_PARALLEL = {"zero1-autotp.json", "zero3-ulysses.json"}
THROUGH_THE_TRAINER = sorted({path.name for path in FOLDER.iterdir()} - ELSEWHERE.keys() - NOT_DATA_PARALLEL)


FAST = {"zero3.json", "zero3-offload.json"}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.full) for name in THROUGH_THE_TRAINER]
)
def test_the_trainer_runs_the_config_to_the_losses_of_a_plain_head(
    ranks: RankPool, tmp_path: Path, plain: tuple[list[float], list[float]], name: str
) -> None:
    losses, norms, printed = _run(ranks, tmp_path / "run", FOLDER / name, **{"cce.gradient": "exact"})
    assert printed.count("cce_dist is active: ZeRO stage " + name[4]) == 1
    assert losses == pytest.approx(plain[0], rel=5e-3 if name in BF16 else 1e-5)
    assert norms == pytest.approx(plain[1], rel=2e-2 if name in BF16 else 1e-5)


def _llama() -> Any:
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=101, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )


def _sequences() -> dict[str, Tensor]:
    ids = torch.randint(101, (4, 12), generator=torch.Generator().manual_seed(0))
    shifted = torch.where(ids % 3 == 0, -100, ids).roll(-1, 1)
    shifted[:, -1] = -100
    return {"input_ids": ids, "position_ids": torch.arange(12).expand(4, -1), "shift_labels": shifted}


def _train_split(path: str, section: bool) -> list[float]:
    """Two steps on sequences that the ranks split, as the tutorial of DeepSpeed has it: losses and gradient norms."""
    fresh_deepspeed()
    deepspeed.init_distributed("gloo")
    config = json.loads(Path(path).read_text())
    config["cce_dist"] |= {"enabled": section, "gradient": "exact"}
    model, figures = _llama(), []
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    try:
        mpu = UlyssesSPAttentionHF.register_with_transformers(
            model, core_attn_implementation="sdpa", sequence_parallel_size=2, micro_batch_size=4
        )
        engine = cce_deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config, mpu=mpu)[0]
        assert (type(model.lm_head) is nn.Linear) != section
        part = {key: value.chunk(2, dim=1)[dist.get_rank()].contiguous() for key, value in _sequences().items()}
        for _ in range(2):
            loss = engine(**part, labels=part["shift_labels"]).loss
            valid = (part["shift_labels"] != -100).sum()
            group = mpu.get_sequence_parallel_group()
            losses, counts = (torch.stack(differentiable.all_gather(x, group=group)) for x in (loss, valid))
            loss = (losses * counts).sum() / counts.sum()
            engine.backward(loss)
            engine.step()
            figures += [loss.item(), float(engine.get_global_grad_norm())]
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    return figures


@pytest.mark.full
def test_ulysses_runs_its_config_to_the_losses_of_stock_deepspeed(ranks: RankPool) -> None:
    ours, stock = (ranks.run(2, _train_split, str(FOLDER / "zero3-ulysses.json"), on)[0] for on in (True, False))
    sequences = _sequences()
    whole = _llama()(**sequences, labels=sequences["shift_labels"]).loss.item()
    assert ours[0] == pytest.approx(whole, rel=1e-5)
    assert ours == pytest.approx(stock, rel=1e-5)


def _train_tensor_parallel(path: str, section: bool) -> list[float]:
    """Two steps on sequences that both ranks see: losses and gradient norms."""
    fresh_deepspeed()
    config = json.loads(Path(path).read_text())
    config["cce_dist"] |= {"enabled": section, "gradient": "exact"}
    model, figures = _llama(), []
    engine = cce_deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    assert type(model.lm_head).__name__.startswith("CCE") == section
    for _ in range(2):
        sequences = _sequences()
        loss = engine(**sequences, labels=sequences["shift_labels"]).loss
        engine.backward(loss)
        engine.step()
        figures += [loss.item(), float(engine.get_global_grad_norm())]
    return figures


@pytest.mark.full
def test_autotp_runs_its_config_to_the_losses_of_stock_deepspeed(ranks: RankPool) -> None:
    path = str(FOLDER / "zero1-autotp.json")
    ours, stock = (ranks.run(2, _train_tensor_parallel, path, on)[0] for on in (True, False))
    assert ours == pytest.approx(stock, rel=1e-5)


def test_the_trainer_refuses_ranks_that_share_a_batch(tmp_path: Path) -> None:
    for name in NOT_DATA_PARALLEL:
        words = ["engine=deepspeed", f"deepspeed={FOLDER / name}", f"output={tmp_path}"]
        with pytest.raises(ValueError, match="each rank a batch of its own"):
            DeepSpeedEngine(nn.Linear(1, 1), settings.load(ROOT / "configs/train/tiny-cpu.yaml", words))


def test_a_precision_that_the_trainer_would_not_keep_is_refused(tmp_path: Path) -> None:
    for name, precision in (("zero3-bf16", "bf16"), ("zero3-autocast", "bf16"), ("zero3-fp16", "fp16")):
        words = ["engine=deepspeed", f"deepspeed={FOLDER / name}.json", f"output={tmp_path}"]
        with pytest.raises(ValueError, match=f"{name}.json has the model compute in {precision}, .* dtype is fp32"):
            DeepSpeedEngine(nn.Linear(1, 1), settings.load(ROOT / "configs/train/tiny-cpu.yaml", words))
    for dtype in ("fp32", "bf16"):  # neither of them is the remedy
        with pytest.raises(ValueError, match=r"fp16\. Name another file, or take fp16 out of the file\.$") as caught:
            engines.check(settings.load(ROOT / "configs/train/tiny-cpu.yaml", [*words, f"dtype={dtype}"]))
        assert "set dtype" not in str(caught.value)


def test_configs_tested_elsewhere_are_in_the_tests_named() -> None:
    for name, test in ELSEWHERE.items():
        assert name in (ROOT / "tests" / test).read_text()


@pytest.fixture(scope="module", autouse=True)
def _leave_no_deepspeed_behind(ranks: RankPool) -> Iterator[None]:
    """ZeRO-3 patches torch in its process, and torch_autocast stays on."""
    yield
    ranks.close()
