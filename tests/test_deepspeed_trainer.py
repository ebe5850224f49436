"""Hugging Face Trainer and accelerate over DeepSpeed ZeRO-3: after `install()` the logs are those of the stock run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPool
from torch import Tensor, nn

pytest.importorskip("deepspeed")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import deepspeed
import transformers
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DummyOptim
from deepspeed_runs import EXACT, distance, fresh_deepspeed, weights_of
from safetensors.torch import load_file

import cce_dist.deepspeed as cce_deepspeed

CONFIG = Path(__file__).parents[1] / "configs" / "deepspeed" / "hf-trainer.json"
VOCAB, STEPS, ACCUMULATION = 101, 4, 2
IGNORED = -100


def _model(tied: bool) -> Any:
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=18,
            intermediate_size=30,
            num_hidden_layers=1,
            num_attention_heads=3,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
        )
    )


def _examples() -> list[dict[str, Tensor]]:
    """Ragged; the labels of a prompt are ignored, and a quarter of the examples has no label at all."""
    draws, examples = torch.Generator().manual_seed(0), []
    for index in range(32):
        ids = torch.randint(VOCAB, (4 + 5 * index % 17,), generator=draws)
        prompt = index % len(ids) if index % 4 else len(ids)
        examples.append({"input_ids": ids, "labels": ids.where(torch.arange(len(ids)) >= prompt, IGNORED)})
    return examples


def _pad(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    def padded(name: str, value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([e[name] for e in examples], batch_first=True, padding_value=value)

    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", IGNORED),
        "attention_mask": padded("input_ids", -1) >= 0,
    }


def _deepspeed_config(section: dict[str, Any] | None, stage: int) -> dict[str, Any]:
    config = json.loads(CONFIG.read_text())
    config["zero_optimization"]["stage"] = stage
    stock = config.pop("cce_dist")
    return config if section is None else {**config, "cce_dist": {**stock, **section}}


def _fresh_accelerate() -> None:
    fresh_deepspeed()
    deepspeed.init_distributed("gloo")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _train(
    section: dict[str, Any] | None, stage: int, average: bool, model: str, output: str, resume: bool
) -> dict[str, Any]:
    """What a run logs, and the weights that it leaves; with ``resume`` it begins at the checkpoint in its middle."""
    _fresh_accelerate()
    arguments = transformers.TrainingArguments(
        output_dir=output,
        use_cpu=True,
        deepspeed=_deepspeed_config(section, stage),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        average_tokens_across_devices=average,
        max_steps=STEPS,
        max_grad_norm=0.5,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=STEPS // 2,
        save_steps=STEPS // 2,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
    )
    network = transformers.LlamaForCausalLM.from_pretrained(model)  # under zero.Init, because of the arguments
    examples = _examples()
    trainer = transformers.Trainer(network, arguments, _pad, train_dataset=examples, eval_dataset=examples[:8])
    trainer.train(resume_from_checkpoint=f"{output}/checkpoint-{STEPS // 2}" if resume else None)
    assert (type(network.lm_head) is nn.Linear) == (section is None)
    trainer.save_model()
    history = trainer.state.log_history
    return {
        "logged": {key: [row[key] for row in history if key in row] for key in ("loss", "grad_norm", "eval_loss")},
        "weights": weights_of(trainer.model_wrapped),
    }


def _train_all(stage: int, average: bool, model: str, folder: str) -> dict[str, Any]:
    section = EXACT if stage == 3 else {**EXACT, "vocab_parallel_size": 2}
    runs = {"stock": _train(None, stage, average, model, f"{folder}/stock", resume=False)}
    cce_deepspeed.install()
    try:
        runs["cce_dist"] = _train(section, stage, average, model, f"{folder}/cce_dist", resume=False)
        runs["resumed"] = _train(section, stage, average, model, f"{folder}/cce_dist", resume=True)
        if stage == 3:
            runs["resumed from stock"] = _train(section, stage, average, model, f"{folder}/stock", resume=True)
    finally:
        cce_deepspeed.uninstall()
    return runs


@pytest.mark.parametrize(
    ("stage", "average", "tied"),
    [
        pytest.param(3, True, True, id="tied, tokens averaged across devices"),
        pytest.param(3, False, False, id="tokens averaged in each device", marks=pytest.mark.full),
        pytest.param(2, True, True, id="stage 2, sharded, tied", marks=pytest.mark.full),
    ],
)
def test_the_trainer_logs_and_saves_what_it_does_without_cce_dist(
    ranks: RankPool, tmp_path: Path, stage: int, average: bool, tied: bool
) -> None:
    _model(tied).save_pretrained(tmp_path / "model")
    for runs in ranks.run(2, _train_all, stage, average, str(tmp_path / "model"), str(tmp_path), timeout=250):
        stock = runs.pop("stock")
        assert [len(values) for values in stock["logged"].values()] == [STEPS, STEPS, 2]
        for name, run in runs.items():
            for key, values in run["logged"].items():
                assert values == pytest.approx(stock["logged"][key], rel=5e-5), (name, key)
            assert distance(run["weights"], stock["weights"]) < 5e-5, name
    stock_file, file = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "cce_dist"))
    assert file.keys() == stock_file.keys()
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "cce_dist")
    for name, weight in runs["resumed"]["weights"].items():
        assert torch.equal(saved.get_parameter(name), weight), name


def _accelerate(install: bool) -> tuple[bool, float]:
    """Whether the classifier is ours, and the second step's loss."""
    _fresh_accelerate()
    if install:
        cce_deepspeed.install()
    try:
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
            "zero_optimization": {"stage": 3},
            "cce_dist": EXACT,
        }
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        model = _model(tied=False)
        optimizer = DummyOptim(model.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        for _ in range(2):
            loss = model(**_pad(_examples()[1:3])).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        cce_deepspeed.uninstall()
    return type(accelerator.unwrap_model(model).lm_head) is not nn.Linear, loss.item()


def test_accelerate_honours_the_section_once_installed(ranks: RankPool) -> None:
    (stock, stock_loss), (ours, our_loss) = (ranks.run(2, _accelerate, install)[0] for install in (False, True))
    assert (stock, ours) == (False, True)
    assert our_loss == pytest.approx(stock_loss, rel=1e-5)


@pytest.fixture(scope="module", autouse=True)
def _leave_no_deepspeed_behind(ranks: RankPool) -> Iterator[None]:
    """ZeRO-3 patches torch in its process."""
    yield
    ranks.close()
