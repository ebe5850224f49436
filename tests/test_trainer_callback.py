"""One line makes the Hugging Face Trainer train with cce_dist: it logs what it logs for the stock model."""

import copy
import subprocess
import sys
from pathlib import Path
from types import MethodType
from typing import Any

import accelerate_state
import architectures
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from peft import LoraConfig, get_peft_model
from ranks import RankPool
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from cce_dist import CCEConfig
from cce_dist.fsdp.private import reshard
from cce_dist.heads.find import output_layer
from cce_dist.heads.lazy import is_lazy, lazy_calls
from cce_dist.trainer_callback import CCECallback
from cce_dist.transformers import patch

EXACT = CCEConfig(gradient="exact", materialize="raise")
Log = list[tuple[float, float]]


def _data() -> list[dict[str, torch.Tensor]]:
    """Ragged labels: with -100 at their start, and a different number of them on each rank and micro-step."""
    rows = [{key: x[i % 2].clone() for key, x in architectures.batch().items()} for i in range(16)]
    for i, row in enumerate(rows):
        row["labels"][: i % 7] = -100
    return rows


def _arguments(folder: str, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=2, logging_steps=1,
        learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True,
        **{"use_cpu": True, "per_device_eval_batch_size": 8, **settings},
    )  # fmt: skip


def _logged(trainer: Trainer, evaluates: bool = True) -> Log:
    """(loss, gradient norm) of each optimizer step, and (loss, 0) of an evaluation."""
    trainer.train()
    log = [(row["loss"], float(row["grad_norm"])) for row in trainer.state.log_history if "loss" in row]
    head = output_layer(trainer.model)
    before = lazy_calls(head)
    if not evaluates:
        return log
    log.append((trainer.evaluate(_data()[:6])["eval_loss"], 0.0))
    assert (lazy_calls(head) > before) == is_lazy(head)  # nobody wants its logits
    return log


def _ddp(folder: str, ours: bool, **settings: Any) -> Log:
    callbacks = [CCECallback(EXACT)] if ours else []
    model = architectures.build("qwen3")
    trainer = Trainer(model, _arguments(folder, **settings), train_dataset=_data(), callbacks=callbacks)
    assert trainer.args.world_size == 2
    log = _logged(trainer)
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    assert is_lazy(output_layer(model)) == ours
    return log


def _mean_of_logits(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss of the user's own, outside of the model's forward."""
    logits, labels = outputs.logits[..., :-1, :].flatten(0, 1), labels[..., 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def _ddp_outside_of_forward(folder: str, ours: bool, smoothed: bool) -> Log:
    """DDP looks for unused parameters in what forward returns, and the loss is computed later."""
    model = architectures.build("qwen3")  # untied
    settings = {"label_smoothing_factor": 0.1} if smoothed else {}
    callbacks = [CCECallback(gradient="exact", materialize="raise")] if ours else []
    trainer = Trainer(
        model, _arguments(folder, ddp_find_unused_parameters=True, **settings), train_dataset=_data(),
        callbacks=callbacks, compute_loss_func=None if smoothed else _mean_of_logits,
    )  # fmt: skip
    return _logged(trainer)


def _ragged() -> list[dict[str, torch.Tensor]]:
    """Rows of different lengths, and so on each rank."""
    return [{key: x[: 8 + i] for key, x in row.items()} for i, row in enumerate(_data()[:6])]


def _most_likely(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(prediction: Any) -> dict[str, float]:
    ids, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((ids == labels)[labels != -100].mean())}


def _native_fsdp2(folder: str, ours: bool) -> Log:
    """The model shards itself while it is loaded."""
    from transformers.distributed import DistributedConfig

    callbacks = [CCECallback(EXACT)] if ours else []
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", distributed_config=DistributedConfig(fsdp_size=2))
    trainer = Trainer(
        model.train(), _arguments(folder, per_device_eval_batch_size=1), train_dataset=_data(), callbacks=callbacks,
        eval_dataset=_ragged(),
        compute_metrics=_accuracy, preprocess_logits_for_metrics=_most_likely,
    )  # fmt: skip
    log = _sharded_log(trainer, ours)
    return [*log, (trainer.evaluate()["eval_accuracy"], 0.0)]


def _accelerates_fsdp2(folder: str, ours: bool, name: str) -> Log:
    """The optimizer is there before the model is sharded, as the Trainer has it."""
    callbacks = [CCECallback(EXACT)] if ours else []
    model, arguments = architectures.build(name), _arguments(folder)
    assert arguments.device.type == "cpu"  # asking for it resets accelerate
    accelerate_state.fsdp2_accelerator(model)
    trainer = Trainer(model, arguments, train_dataset=_data(), callbacks=callbacks)
    assert trainer.accelerator.is_fsdp2
    return _sharded_log(trainer, ours, evaluates=False)  # accelerate does not gather losses on a CPU that has FSDP


def _sharded_log(trainer: Trainer, ours: bool, evaluates: bool = True) -> Log:
    log = _logged(trainer, evaluates)
    head = output_layer(trainer.model)
    reshard(trainer.model)  # an evaluation leaves the root's parameters gathered
    assert isinstance(head.weight, DTensor)
    assert is_lazy(head) == ours
    return log


def _without_a_trainer(folder: str, ours: bool, fsdp2: bool) -> Log:
    """A loop of one's own around accelerate."""
    model = architectures.build("qwen3")
    accelerator = accelerate_state.fsdp2_accelerator(model) if fsdp2 else Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    if ours:
        patch(model, EXACT)
    log = []
    for row in _data()[dist.get_rank() : 6 : 2]:
        loss = model(**{key: x[None] for key, x in row.items()}).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append((loss.item(), float(norm)))
    return log


def _zero3(folder: str, ours: bool, section: dict[str, Any] | None) -> Log:
    """DeepSpeed's config has the settings, or the callback has."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for a minute
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    if ours and section is not None:
        config["cce_dist"] = section
    callbacks = [CCECallback() if section is not None else CCECallback(EXACT)] if ours else []
    model = architectures.build("qwen3")
    arguments = _arguments(folder, deepspeed=config, use_cpu=False)
    trainer = Trainer(model, arguments, train_dataset=_data(), callbacks=callbacks)
    log = _logged(trainer, evaluates=False)  # accelerate gathers no losses on a CPU with DeepSpeed
    assert is_lazy(output_layer(model)) == ours
    return log


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDP": (_ddp, {"average_tokens_across_devices": True}),
    "DDP, tokens counted on each rank": (_ddp, {"average_tokens_across_devices": False}),
    "DDP, compute_loss_func": (_ddp_outside_of_forward, {"smoothed": False}),
    "DDP, label smoothing": (_ddp_outside_of_forward, {"smoothed": True}),
    "FSDP2 of transformers": (_native_fsdp2, {}),
    "FSDP2 of accelerate": (_accelerates_fsdp2, {"name": "qwen3"}),
    "FSDP2 of accelerate, tied": (_accelerates_fsdp2, {"name": "llama_tied"}),
    "a loop of one's own, DDP": (_without_a_trainer, {"fsdp2": False}),
    "a loop of one's own, FSDP2": (_without_a_trainer, {"fsdp2": True}),
    "ZeRO-3, settings in the section": (_zero3, {"section": {"gradient": "exact", "materialize": "raise"}}),
    "ZeRO-3, settings in the callback": (_zero3, {"section": None}),
}


def _logs(folder: str) -> dict[str, tuple[Log, Log]]:
    """(stock, ours) of every case."""
    logs = {}
    for name, (case, settings) in CASES.items():
        pair = []
        for ours in (False, True):
            accelerate_state.forget()
            pair.append(case(folder, ours, **settings))
        logs[name] = (pair[0], pair[1])
    return logs


@pytest.mark.full
def test_two_ranks_log_what_they_log_for_stock(ranks: RankPool, tmp_path: Path) -> None:
    architectures.build("qwen3").save_pretrained(tmp_path / "model")
    try:
        by_rank = ranks.run(2, _logs, str(tmp_path), timeout=240)
    finally:
        ranks.close()  # accelerate keeps state in the process
    for logs in by_rank:
        for name, (stock, ours) in logs.items():
            assert len(stock) == len(ours) >= 3
            for x, y in zip(ours, stock, strict=True):
                assert x == pytest.approx(y, rel=1e-5), name
    stock_logs = {name: stock for name, (stock, _) in by_rank[0].items()}
    assert stock_logs["DDP"] != stock_logs["DDP, tokens counted on each rank"]


def test_one_process_trains_patched_and_a_second_run_goes_on(tmp_path: Path) -> None:
    model = architectures.build("llama")
    callback = CCECallback(gradient="exact", materialize="raise")
    trainer = Trainer(model, _arguments(str(tmp_path)), train_dataset=_data(), callbacks=[callback])
    assert not is_lazy(model.lm_head)
    log = _logged(trainer)
    assert is_lazy(model.lm_head)
    stock = Trainer(architectures.build("llama"), _arguments(str(tmp_path)), train_dataset=_data())
    for x, y in zip(log, _logged(stock), strict=True):
        assert x == pytest.approx(y, rel=1e-5)
    assert _logged(trainer)[0][0] < log[0][0]


class _Metrics:
    """What ``compute_metrics`` and generation in a callback see of the model."""

    def __init__(self) -> None:
        self.logits: list[Any] = []

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.logits.append(prediction.predictions)
        return {}


@pytest.mark.parametrize("loss_only", [False, True])
def test_evaluation_computes_logits_only_where_they_are_wanted(tmp_path: Path, loss_only: bool) -> None:
    losses, metrics = [], _Metrics()
    for callbacks in ([CCECallback(gradient="exact", materialize="raise", max_tokens=40)], []):
        model = architectures.build("llama")
        arguments = _arguments(str(tmp_path), prediction_loss_only=loss_only, per_device_eval_batch_size=6)
        trainer = Trainer(
            model, arguments, train_dataset=_data(), eval_dataset=_data()[:6], callbacks=callbacks,
            compute_metrics=metrics,
        )  # fmt: skip
        trainer.train()
        before = lazy_calls(model.lm_head)
        losses.append(trainer.evaluate()["eval_loss"])
        assert (lazy_calls(model.lm_head) > before) == (loss_only and bool(callbacks))
        assert type(model.eval()(**architectures.batch()).logits) is torch.Tensor
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(metrics.logits) == (0 if loss_only else 2)


def test_token_accuracy_of_an_evaluation_needs_no_logits(tmp_path: Path) -> None:
    accuracies = []
    for callbacks in ([CCECallback(gradient="exact", materialize="raise")], []):
        model = architectures.build("llama")
        trainer = Trainer(
            model, _arguments(str(tmp_path), per_device_eval_batch_size=1), train_dataset=_data(),
            eval_dataset=_ragged(), callbacks=callbacks, compute_metrics=_accuracy,
            preprocess_logits_for_metrics=_most_likely,
        )  # fmt: skip
        trainer.train()
        trainer.train()  # the second time finds what the first one did
        accuracies.append(trainer.evaluate()["eval_accuracy"])
        assert lazy_calls(model.lm_head) == (2 * 6 + 6 if callbacks else 0)
    assert accuracies[0] == accuracies[1] > 0


def _evaluated_before(folder: str) -> str:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 3}}
    accelerate_state.forget()
    trainer = Trainer(
        architectures.build("qwen3"),
        _arguments(folder, deepspeed={**config, "zero_allow_untested_optimizer": True}, use_cpu=False),
        train_dataset=_data(),
        eval_dataset=_data()[:2],
        callbacks=[CCECallback(EXACT)],
    )
    trainer.evaluate()
    with pytest.raises(ValueError, match="before train") as caught:
        trainer.train()
    return str(caught.value)


@pytest.mark.full
def test_an_evaluation_before_training_under_zero3_is_named_as_what_stops_it(ranks: RankPool, tmp_path: Path) -> None:
    try:
        (text,) = ranks.run(1, _evaluated_before, str(tmp_path), timeout=120)
    finally:
        ranks.close()  # accelerate keeps state in the process
    assert "eval_on_start=True" in text


def test_one_line_says_that_it_is_active_whatever_logging_is_configured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(
        architectures.build("llama"), _arguments(str(tmp_path)), train_dataset=_data(), callbacks=[CCECallback(EXACT)]
    )
    trainer.train()
    active = [record for record in caplog.records if "cce_dist is active" in record.getMessage()]
    assert [record.name for record in active] == ["cce_dist"]
    script = (
        "from cce_dist.heads.announce import announce_active as a; a('x');import logging; logging.basicConfig(); a('y')"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    ).stderr
    assert said.splitlines() == ["cce_dist is active: x", "INFO:cce_dist:cce_dist is active: y"]


def test_bad_settings_are_refused_where_they_are_given() -> None:
    with pytest.raises(ValueError, match="gradiant: unknown key"):
        CCECallback(gradiant="exact")
    with pytest.raises(ValueError, match="not both"):
        CCECallback(EXACT, gradient="exact")


def test_settings_in_two_places_are_refused(tmp_path: Path) -> None:
    arguments = _arguments(str(tmp_path))
    config = {"zero_optimization": {"stage": 2}, "cce_dist": {"gradient": "exact"}}
    arguments.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=config)
    with pytest.raises(ValueError, match="leave one of them out"):
        CCECallback(tail=False).on_init_end(arguments, None, None)


def test_arguments_that_make_liger_compute_the_loss_are_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    model = architectures.build("llama")
    for settings in ({}, {"liger_kernel_config": {"cross_entropy": True, "fused_linear_cross_entropy": False}}):
        arguments = _arguments(str(tmp_path), use_liger_kernel=True, **settings)
        with pytest.raises(ValueError, match="use_liger_kernel=True.*leave Liger out"):
            Trainer(model, arguments, train_dataset=_data(), callbacks=[CCECallback()])
        late = Trainer(model, arguments, train_dataset=_data())
        late.add_callback(CCECallback())
        with pytest.raises(ValueError, match="use_liger_kernel=True"):
            late.callback_handler.on_train_begin(arguments, late.state, late.control)
    arguments = _arguments(str(tmp_path))
    arguments.use_liger_loss = True  # of TRL before 1.0
    with pytest.raises(ValueError, match="use_liger_loss=True"):
        Trainer(model, arguments, train_dataset=_data(), callbacks=[CCECallback()])
    assert not is_lazy(model.lm_head)


def test_ligers_other_kernels_and_a_callback_that_is_switched_off_are_not_refused(tmp_path: Path) -> None:
    others = _arguments(str(tmp_path), use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": False})
    CCECallback().on_init_end(others, None, None)
    CCECallback(enabled=False).on_init_end(_arguments(str(tmp_path), use_liger_kernel=True), None, None)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("liger_kernel.transformers.model.llama", "leave Liger out"),
        ("unsloth.models.llama", "not imported unsloth"),
        ("unsloth_zoo.cpu.ops", "not imported unsloth"),
    ],
)
def test_a_model_whose_forward_another_loss_has_replaced_is_refused(
    tmp_path: Path, wrapped: bool, place: str, remedy: str
) -> None:
    def lce_forward(self: Any, *args: Any, **kwargs: Any) -> Any: ...

    lce_forward.__module__ = place  # as apply_liger_kernel_to_llama(model=model) does
    model = architectures.build("llama")
    model.forward = MethodType(lce_forward, model)
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for attempt in (
        lambda: CCECallback().on_train_begin(_arguments(str(tmp_path)), None, None, model=model),
        lambda: patch(model),
    ):
        with pytest.raises(ValueError, match=f"{place}.*{remedy}"):
            attempt()


def test_trainers_that_go_past_the_output_layer_are_refused(tmp_path: Path) -> None:
    model, arguments = architectures.build("llama"), _arguments(str(tmp_path))
    several_gpus, chunked = copy.copy(arguments), copy.copy(arguments)
    several_gpus._n_gpu = 2
    chunked.loss_type = "chunked_nll"
    for given, text in ((several_gpus, "DataParallel"), (chunked, 'loss_type="nll"')):
        with pytest.raises(ValueError, match=text):
            CCECallback().on_train_begin(given, None, None, model=model)
