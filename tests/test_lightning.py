"""Lightning's Fabric and Trainer with DDP, FSDP2 and DeepSpeed, by the lines of docs/clients.md.

Skipped where lightning is not installed; docs/clients.md says with which version it was run.
"""

import re
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from ranks import RankPool
from torch.distributed.fsdp import fully_shard

from cce_dist.config import CCEConfig
from cce_dist.heads.find import output_layer
from cce_dist.heads.lazy import is_lazy
from cce_dist.transformers import patch

PAGE = (Path(__file__).parent.parent / "docs/clients.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", PAGE, re.S))
EXACT = CCEConfig(gradient="exact", materialize="raise")
ZERO3 = {
    "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True,
    "cce_dist": {"gradient": "exact", "materialize": "raise"},
}  # fmt: skip


def _example(name: str, ours: bool, **given: Any) -> dict[str, Any]:
    """What a snippet of the page defines; without its line about the head for stock."""
    lines = [line for line in EXAMPLES[name].splitlines() if ours or "shard_head(" not in line]
    code = "\n".join(lines).replace("shard_head(model, dp)", "shard_head(model, dp, config=EXACT)")
    names = {"fully_shard": fully_shard, "EXACT": EXACT, **given}
    exec(compile(code, f"example {name}", "exec"), names)
    return names


def _cpu(strategy: type) -> type:
    """Lightning's DeepSpeed strategy refuses a CPU, on which DeepSpeed itself works; the rest of it is Lightning's."""

    class OnCPU(strategy):  # type: ignore[misc]
        root_device = property(lambda self: torch.device("cpu", 0))

        def setup_environment(self) -> None:
            self.accelerator.setup_device(self.root_device)
            self._set_world_ranks() if hasattr(self, "_set_world_ranks") else self.set_world_ranks()
            self._init_deepspeed_distributed()
            if hasattr(self, "_format_config"):
                self._format_config()
                self._config_initialized = True

    return OnCPU


def _strategy(way: str, ours: bool, package: Any, **settings: Any) -> Any:
    if way == "fsdp2":
        return package.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **settings)
    if way == "ddp":
        return "ddp"
    import deepspeed

    import cce_dist.deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for a minute
    cce_dist.deepspeed.install() if ours else cce_dist.deepspeed.uninstall()
    config = {name: value for name, value in ZERO3.items() if ours or name != "cce_dist"}
    return _cpu(package.DeepSpeedStrategy)(config=config)


def _fabric(way: str, ours: bool) -> list[float]:
    import lightning.fabric.strategies
    from lightning.fabric import Fabric

    settings = {"parallelize_fn": _example("fabric", ours)["parallelize"]} if way == "fsdp2" else {}
    strategy = _strategy(way, ours, lightning.fabric.strategies, **settings)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    plain = architectures.build("qwen3")
    if way == "zero3":
        model, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2))
    else:
        model = fabric.setup(plain)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))
    if way == "ddp" and ours:
        patch(model, EXACT)
    assert is_lazy(output_layer(plain)) == ours
    losses = []
    for _ in range(3):
        loss = model(**{key: x[[fabric.global_rank]] for key, x in architectures.batch().items()}).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _trainer(way: str, ours: bool) -> list[float]:
    import lightning
    import lightning.pytorch.strategies

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = architectures.build("qwen3"), []

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            loss = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
            self.losses.append(self.model(**batch).logits.mean().item())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    if way == "fsdp2":
        Module.configure_model = _example("lightning", ours)["configure_model"]
    if way == "zero3":
        Module.get_output_embeddings = _example("lightning_deepspeed", ours)["get_output_embeddings"]
    module = Module()
    if way == "ddp" and ours:
        patch(module.model, EXACT)
    rows = [{key: x[i % 2] for key, x in architectures.batch().items()} for i in range(6)]
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=_strategy(way, ours, lightning.pytorch.strategies), max_epochs=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(rows, batch_size=1)  # type: ignore[arg-type]
    trainer.fit(module, loader, None if way == "zero3" else loader)
    assert is_lazy(output_layer(module.model)) == ours
    return module.losses


def _losses(way: str) -> list[list[list[float]]]:
    """[stock, ours] of Fabric and of the Trainer; the number that comes next shows that no random ones were taken."""
    pairs: list[list[list[float]]] = []
    for run in (_fabric, _trainer):
        pairs.append([])
        for ours in (False, True):
            torch.manual_seed(1)
            pairs[-1].append([*run(way, ours), torch.rand(()).item()])
    return pairs


@pytest.mark.full
@pytest.mark.parametrize("way", ["ddp", "fsdp2", "zero3"])
def test_fabric_and_the_trainer_train_with_the_losses_of_stock(ranks: RankPool, way: str) -> None:
    pytest.importorskip("lightning", exc_type=ImportError)
    if way == "zero3":
        pytest.importorskip("deepspeed")
    ranks.close()  # Lightning keeps state in the process
    try:
        by_rank = ranks.run(2, _losses, way, timeout=200)
    finally:
        ranks.close()
    for stock, ours in (pair for of_rank in by_rank for pair in of_rank):
        assert len(stock) >= 4
        assert ours == pytest.approx(stock, rel=1e-5)
