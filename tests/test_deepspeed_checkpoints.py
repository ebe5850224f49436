"""DeepSpeed's checkpoints: a run that resumes goes on as if undisturbed, with and without cce_dist, on as many ranks or
others; and what is exported has every row of the classifier under the model's own names.

V * D is not divisible by the ranks, so that slices end inside rows and the last one is padded. Every run sees the same
four sequences in a step, whatever its ranks.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

import transformers
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import zero_to_fp32
from deepspeed_runs import EXACT, distance, fresh_deepspeed, weights_of
from safetensors.torch import load_file

import cce_dist.deepspeed as cce_deepspeed

VOCAB, HIDDEN = 101, 18
SEQUENCES = 4
STOCK = None
OFFLOAD = {
    "offload_optimizer": {"device": "cpu"},
    "offload_param": {"device": "cpu"},
    "stage3_param_persistence_threshold": 0,
}


@dataclass(frozen=True)
class Case:
    """A run of DeepSpeed; ``section`` None: the stock one."""

    stage: int = 3
    tied: bool = False
    section: dict[str, Any] | None = field(default_factory=lambda: dict(EXACT))
    zero: dict[str, Any] = field(default_factory=dict)
    bf16: bool = False
    universal: bool = False  # loads universal checkpoints


def _model(case: Case) -> Any:
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=30,
            num_hidden_layers=1,
            num_attention_heads=3,
            max_position_embeddings=16,
            tie_word_embeddings=case.tied,
        )
    )


def _engine(case: Case) -> Any:
    fresh_deepspeed()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": SEQUENCES // dist.get_world_size(),
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-6, "torch_adam": True}},
        "bf16": {"enabled": case.bf16},
        "zero_optimization": {"stage": case.stage, **case.zero},
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": case.universal},
    }
    if case.stage == 3:
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if case.section is not None:
        config["cce_dist"] = case.section
    model = _model(case)
    return cce_deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def _train(engine: Any, steps: range) -> list[float]:
    """The mean losses of the steps."""
    losses = []
    for step in steps:
        ids = torch.randint(VOCAB, (SEQUENCES, 9), generator=torch.Generator().manual_seed(step))
        mine = ids[dist.get_rank() :: dist.get_world_size()]
        total = torch.zeros(())
        for sequence in mine.split(1):
            loss = engine(input_ids=sequence, labels=sequence).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float()
        dist.all_reduce(total)
        losses.append(float(total) / SEQUENCES)
    return losses


def _resume(case: Case, folder: str, steps: range) -> tuple[list[float], dict[str, Tensor]]:
    engine = _engine(case)
    engine.load_checkpoint(folder)
    return _train(engine, steps), weights_of(engine)


def _save_and_go_on(case: Case, folder: str) -> dict[str, Any]:
    """Two steps, a checkpoint and an export of the weights, two steps more."""
    engine = _engine(case)
    losses = _train(engine, range(2))
    engine.save_checkpoint(folder)
    engine.save_16bit_model(folder, "exported.bin")
    saved = weights_of(engine)
    return {"saved": saved, "losses": losses + _train(engine, range(2, 4)), "weights": weights_of(engine)}


def _save_and_resume(case: Case, folder: str) -> dict[str, Any]:
    run = _save_and_go_on(case, folder)
    run["resumed"] = _resume(case, folder, range(2, 4))
    run["resumed in stock"] = _resume(replace(case, section=STOCK), folder, range(2, 4))
    stock = f"{folder}-stock"
    engine = _engine(replace(case, section=STOCK))
    engine.load_checkpoint(folder)
    _train(engine, range(2, 3))
    engine.save_checkpoint(stock)
    run["resumed from stock"] = _resume(case, stock, range(3, 4))
    return run


def _assert_exports_are_whole(case: Case, folder: Path, saved: dict[str, Tensor]) -> None:
    """What DeepSpeed and its scripts make of a checkpoint loads into a plain model and has the weights of the run."""
    exports = [torch.load(folder / "exported.bin", weights_only=True)]
    if case.stage > 0:  # without ZeRO there is nothing to consolidate
        exports.append(zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(folder))
        if not case.tied:  # DeepSpeed's script hands safetensors two names of one storage, which it refuses
            zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(folder, folder / "fp32", safe_serialization=True)
            exports.append(load_file(folder / "fp32" / "model.safetensors"))
    for export in exports:
        model = _model(case)
        model.load_state_dict(export, strict=not case.tied)
        model.tie_weights()
        assert export["lm_head.weight"].shape == (VOCAB, HIDDEN) or case.tied
        for name, weight in saved.items():
            exported = model.get_parameter(name)
            assert torch.equal(exported.bfloat16().float() if case.bf16 else exported, weight), name


full = pytest.mark.full


@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(2, Case(), id="ZeRO-3", marks=full),
        pytest.param(4, Case(tied=True), id="ZeRO-3, tied, 4 ranks"),
        pytest.param(4, Case(section={**EXACT, "vocab_parallel_size": 2}), id="ZeRO-3, 2 x 2 ranks", marks=full),
        pytest.param(2, Case(zero=OFFLOAD), id="ZeRO-3, on the host", marks=full),
        pytest.param(2, Case(bf16=True), id="ZeRO-3, bf16", marks=full),
        pytest.param(2, Case(stage=0), id="stage 0", marks=full),
        pytest.param(2, Case(stage=1, tied=True), id="stage 1, tied"),
        pytest.param(4, Case(stage=2), id="stage 2, 4 ranks", marks=full),
    ],
)
def test_a_checkpoint_resumes_with_and_without_cce_dist_and_exports_all_rows(
    ranks: RankPool, tmp_path: Path, world: int, case: Case
) -> None:
    run = ranks.run(world, _save_and_resume, case, str(tmp_path / "checkpoint"), timeout=200)[0]
    losses, weights = run["resumed"]
    assert losses == run["losses"][2:]
    assert all(torch.equal(weights[name], weight) for name, weight in run["weights"].items())
    for name, steps in (("resumed in stock", slice(2, 4)), ("resumed from stock", slice(3, 4))):
        losses, weights = run[name]
        assert losses == pytest.approx(run["losses"][steps], rel=2e-3 if case.bf16 else 1e-5), name
        assert distance(weights, run["weights"]) < (1e-2 if case.bf16 else 1e-5), name  # bf16 itself: 8e-3
    _assert_exports_are_whole(case, tmp_path / "checkpoint", run["saved"])


def _resume_both(case: Case, folder: str) -> list[tuple[list[float], dict[str, Tensor]]]:
    return [_resume(replace(case, section=section), folder, range(2, 4)) for section in (case.section, STOCK)]


def _convert_to_universal(checkpoint: Path) -> None:
    """As DeepSpeed's script ds_to_universal does."""
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(checkpoint / "global_step2"),
            output_folder=str(checkpoint / "universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,  # what Megatron's models bring
        )
    )


@pytest.mark.parametrize(
    ("before", "after", "case"),
    [
        pytest.param(4, 2, Case(), id="ZeRO-3, 4 ranks to 2"),
        pytest.param(2, 4, Case(tied=True), id="ZeRO-3, tied, 2 ranks to 4", marks=full),
        pytest.param(
            4, 2, Case(section={**EXACT, "vocab_parallel_size": 2}), id="ZeRO-3, 2 x 2 ranks to 2", marks=full
        ),
        pytest.param(4, 2, Case(stage=1, tied=True), id="stage 1, tied, 4 ranks to 2", marks=full),
        pytest.param(2, 4, Case(stage=2), id="stage 2, 2 ranks to 4", marks=full),
    ],
)
def test_a_universal_checkpoint_resumes_on_another_number_of_ranks(
    ranks: RankPool, tmp_path: Path, before: int, after: int, case: Case
) -> None:
    run = ranks.run(before, _save_and_go_on, case, str(tmp_path), timeout=200)[0]
    _convert_to_universal(tmp_path)
    for losses, weights in ranks.run(after, _resume_both, replace(case, universal=True), str(tmp_path), timeout=200)[0]:
        assert losses == pytest.approx(run["losses"][2:], rel=1e-5)
        assert distance(weights, run["weights"]) < 1e-5


@pytest.fixture(scope="module", autouse=True)
def _leave_no_deepspeed_behind(ranks: RankPool) -> Iterator[None]:
    """ZeRO-3 patches torch in its process."""
    yield
    ranks.close()
