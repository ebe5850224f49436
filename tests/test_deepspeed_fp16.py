"""fp16 with dynamic loss scaling: steps that overflow are skipped as stock DeepSpeed skips them.

On a GPU if there is one. DeepSpeed refuses fp16 on CPUs, though torch can compute in it there, so it is told otherwise.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import nn

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed_runs import fresh_deepspeed, weights_of

import cce_dist.deepspeed as cce_deepspeed

CONFIG = Path(__file__).parents[1] / "configs" / "deepspeed" / "zero3-fp16.json"
VOCAB = 1024
full = pytest.mark.full
FACTORS = {3: 1e30, 8: float("inf")}  # of the loss in these steps; the gradients of both overflow

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else []


def _prepare() -> None:
    fresh_deepspeed()
    if torch.cuda.is_available():
        dist.destroy_process_group()
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    else:
        get_accelerator().is_fp16_supported = lambda: True


def _train(
    stage: int, gradient: str | None, power: int, window: int, steps: int, factors: dict[int, float]
) -> dict[str, list[Any]]:
    """By step: loss, loss scale, skipped steps so far, gradient norm, whether the weights changed.

    Args:
        gradient: of cce_dist; None: stock DeepSpeed.
        power, window: the loss scale begins at 2^power and doubles after so many steps without an overflow.
        factors: of the loss in some steps.
    """
    _prepare()
    config = json.loads(CONFIG.read_text())
    config["zero_optimization"]["stage"] = stage
    config["fp16"] |= {"initial_scale_power": power, "loss_scale_window": window}
    config["cce_dist"] = {"enabled": gradient is not None, "gradient": gradient or "exact"}
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
        )
    )
    engine = cce_deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    assert (type(model.lm_head) is nn.Linear) == (gradient is None)
    seen: dict[str, list[Any]] = {"loss": [], "scale": [], "skipped": [], "norm": [], "changed": []}
    ids = torch.randint(VOCAB, (4, 32), generator=torch.Generator().manual_seed(0)).to(engine.device)
    before = weights_of(engine)
    for step in range(steps):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss * factors.get(step, 1.0))
        engine.step()
        after = weights_of(engine)
        seen["loss"].append(loss.item())
        seen["scale"].append(engine.optimizer.cur_scale)
        seen["skipped"].append(engine.skipped_steps)
        seen["norm"].append(float(engine.get_global_grad_norm()))
        seen["changed"].append(any(not torch.equal(before[name], weight) for name, weight in after.items()))
        before = after
    return seen


@pytest.mark.parametrize(
    ("stage", "gradient"), [(3, "exact"), pytest.param(3, "unbiased", marks=full), pytest.param(2, "exact", marks=full)]
)
def test_a_step_that_overflows_is_skipped_as_by_stock_deepspeed(ranks: RankPool, stage: int, gradient: str) -> None:
    ours, stock = (ranks.run(1, _train, stage, mode, 8, 4, 12, FACTORS)[0] for mode in (gradient, None))
    assert stock["skipped"] == [0] * 3 + [1] * 5 + [2] * 4, "the case skips the steps that it means to"
    assert ours["skipped"] == stock["skipped"]
    assert ours["scale"] == stock["scale"]
    assert ours["changed"] == stock["changed"] == [step not in FACTORS for step in range(12)]
    assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-2)
    taken = [step for step in range(12) if step not in FACTORS]
    tolerance = 2e-2 if gradient == "exact" else 1e-1
    assert [ours["norm"][s] for s in taken] == pytest.approx([stock["norm"][s] for s in taken], rel=tolerance)


@full
def test_a_loss_scale_that_is_too_large_comes_down_until_steps_are_taken(ranks: RankPool) -> None:
    seen = ranks.run(1, _train, 3, "unbiased", 40, 1000, 32, {})[0]
    skipped = seen["skipped"][-1]
    assert 0 < skipped < 28
    assert seen["changed"] == [step >= skipped for step in range(32)]
    assert seen["scale"][-1] == 2 ** (40 - skipped)
    assert seen["loss"][-1] < seen["loss"][0] - 0.01


@pytest.fixture(scope="module", autouse=True)
def _leave_no_deepspeed_behind(ranks: RankPool) -> Iterator[None]:
    """ZeRO-3 patches torch in its process."""
    yield
    ranks.close()
