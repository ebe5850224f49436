"""TRL's trainers with cce_dist: what they log is what they log for the stock model, and no logits are computed."""

import copy
import math
import re
import warnings
from pathlib import Path
from typing import Any

import accelerate_state
import architectures
import pytest
import torch
from ranks import RankPool
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from cce_dist.heads.find import output_layer
from cce_dist.heads.lazy import MaterializedLogitsWarning, is_in_fp32, is_lazy
from cce_dist.trainer_callback import CCECallback
from cce_dist.transformers import patch

trl = pytest.importorskip("trl")  # needs Python 3.11
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
from trl.trainer import utils  # noqa: E402

from cce_dist.trl import fuse_forward, trl_forward_of  # noqa: E402

ALL_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
DRAWN_AS_STOCK = {"top_k": architectures.VOCAB}  # which leaves no id out, but needs logits in generation
OF_A_STEP = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "aux_loss")


def _data() -> Dataset:
    generator, rows = torch.Generator().manual_seed(0), []
    for i in range(12):
        ids = torch.randint(3, 300, (10 + i % 3,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (i % 5) + ids[i % 5 :]})
    return Dataset.from_list(rows)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(architectures.VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2", unk_token="t0")


def _settings(folder: str, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": folder, "max_steps": 3, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "learning_rate": 1e-2, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "bf16": False, "gradient_checkpointing": False, **settings,
    }  # fmt: skip


def _callbacks(ours: bool) -> list[CCECallback]:
    return [CCECallback(gradient="exact", materialize="raise")] if ours else []


def _trainer(
    folder: str, name: str, ours: bool, peft: LoraConfig | None = None, fsdp2: bool = False, **settings: Any
) -> Any:
    arguments = trl.SFTConfig(**_settings(folder, per_device_train_batch_size=1 if fsdp2 else 2, **settings))
    model = architectures.build(name)
    if fsdp2:
        _shard_by_fsdp2(model, arguments)
    return trl.SFTTrainer(
        model,
        arguments,
        train_dataset=_data(),
        eval_dataset=_data(),
        processing_class=_tokenizer(),
        peft_config=peft,
        callbacks=_callbacks(ours),
    )


def _sft(folder: str, ours: bool, **settings: Any) -> Any:
    return _trainer(folder, "llama", ours, **settings)


def _shard_by_fsdp2(model: PreTrainedModel, arguments: Any) -> None:
    assert arguments.device.type == "cpu"  # asking for it resets accelerate
    accelerate_state.fsdp2_accelerator(model, "bf16" if arguments.bf16 else "no")


def _words(seed: int, length: int) -> str:
    ids = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"t{i}" for i in ids)


def _preferences() -> Dataset:
    rows = [
        {
            "prompt": _words(i, 4),
            "chosen": " " + _words(50 + i, 15 + i % 3),
            "rejected": " " + _words(90 + i, 14 + i % 4),
        }
        for i in range(12)
    ]
    return Dataset.from_list(rows)


def _dpo(
    folder: str, ours: bool, peft: LoraConfig | None = None, fsdp2: bool = False, data: str = "", **settings: Any
) -> Any:
    model, reference = architectures.build("llama"), architectures.build("llama")
    with torch.no_grad():
        for each in (model, reference):  # logits so large that rounding them shows
            each.lm_head.weight *= 20
    arguments = trl.DPOConfig(**_settings(folder, per_device_train_batch_size=1, **settings))
    if fsdp2:
        _shard_by_fsdp2(model, arguments)
    return trl.DPOTrainer(
        model,
        ref_model=None if peft else reference,
        args=arguments,
        train_dataset=Dataset.load_from_disk(data) if data else _preferences(),
        processing_class=_tokenizer(),
        peft_config=peft,
        callbacks=_callbacks(ours),
    )


def _grpo(
    folder: str,
    ours: bool,
    peft: LoraConfig | None = None,
    saved: str = "",
    fsdp2: bool = False,
    name: str = "llama",
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Any:
    """``saved``: where a reference is loaded from, which without an adapter there has to be."""
    extra = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "per_device_train_batch_size": 2}
    arguments = trl.GRPOConfig(**_settings(folder, **extra, **settings))
    model = architectures.build(name).to(dtype)
    model.config._name_or_path = saved
    if fsdp2:
        _shard_by_fsdp2(model, arguments)
    return trl.GRPOTrainer(
        model,
        reward_funcs=_reward,
        args=arguments,
        train_dataset=_preferences().remove_columns(["chosen", "rejected"]),
        processing_class=_tokenizer(),
        peft_config=peft,
        callbacks=_callbacks(ours),
    )


def _rloo(folder: str, ours: bool, peft: LoraConfig | None = None, saved: str = "", **settings: Any) -> Any:
    extra = {"num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 2}
    model = architectures.build("llama")
    model.config._name_or_path = saved
    return trl.RLOOTrainer(
        model,
        reward_funcs=_reward,
        args=trl.RLOOConfig(**_settings(folder, **extra, **settings)),
        train_dataset=_preferences().remove_columns(["chosen", "rejected"]),
        processing_class=_tokenizer(),
        peft_config=peft,
        callbacks=_callbacks(ours),
    )


def _kto(folder: str, ours: bool, peft: LoraConfig | None = None, saved: str = "", **settings: Any) -> Any:
    model = architectures.build("llama")
    model.config._name_or_path = saved
    rows = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in _preferences()
        for name in ("chosen", "rejected")
    ]
    return trl.KTOTrainer(
        model,
        args=trl.KTOConfig(**_settings(folder, per_device_train_batch_size=4, **settings)),
        train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(),
        peft_config=peft,
        callbacks=_callbacks(ours),
    )


@pytest.mark.parametrize("trainer", [_rloo, _kto], ids=["rloo", "kto"])
def test_other_policy_trainers_have_the_losses_and_gradients_of_stock(tmp_path: Path, trainer: Any) -> None:
    logs = []
    for ours in (False, True):
        torch.manual_seed(0)
        made = trainer(str(tmp_path), ours, peft=LORA, max_steps=2)
        made.train()
        assert is_lazy(output_layer(made.model)) == ours
        logs.append([[float(row[k]) for k in ("loss", "grad_norm")] for row in made.state.log_history if "loss" in row])
    stock, of_ours = logs
    assert len(stock) == 2
    for x, y in zip(of_ours, stock, strict=True):
        assert x == pytest.approx(y, rel=1e-4, abs=1e-6)


def _reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def _log(trainer: Any) -> list[dict[str, float]]:
    """What SFTTrainer logs of three steps and of an evaluation."""
    trainer.train()
    evaluation = trainer.evaluate()
    return [
        *(
            {key: float(row[key]) for key in OF_A_STEP if key in row}
            for row in trainer.state.log_history
            if "loss" in row
        ),
        {key: evaluation[key] for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")},
    ]


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nll": ("gemma2", {}),
    "dft": ("cohere", {"loss_type": "dft"}),
    "router loss": ("mixtral", {"router_aux_loss_coef": 0.1}),
    "bf16": ("llama", {"bf16": True}),
    "lora": ("llama", {"peft": LORA}),
}


@pytest.mark.full
@pytest.mark.parametrize(("name", "settings"), CASES.values(), ids=CASES)
def test_sft_logs_what_it_logs_for_stock(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    stock, ours = (_log(_trainer(str(tmp_path), name, ours, **settings)) for ours in (False, True))
    assert len(stock) == 4
    for x, y in zip(ours, stock, strict=True):
        assert x == pytest.approx(y, rel=2e-2 if settings.get("bf16") else 2e-5)


def _sharded_logs(folder: str) -> dict[str, list[Any]]:
    """[stock, ours] by model, with the vocabulary sharded over the ranks and different numbers of tokens on each."""
    logs = {}
    for name, peft in (("qwen3", None), ("llama_tied", None), ("llama", LORA)):
        pair = logs[name] = []
        for ours in (False, True):
            accelerate_state.forget()
            trainer = _trainer(folder, name, ours, peft, fsdp2=True)
            pair.append(_log(trainer))
            assert trainer.accelerator.is_fsdp2
            assert is_lazy(output_layer(trainer.model)) == ours
            assert isinstance(output_layer(trainer.model).weight, DTensor) or not ours
    return logs


@pytest.mark.full
def test_sft_on_two_ranks_under_fsdp2_logs_what_it_logs_for_stock(ranks: RankPool, tmp_path: Path) -> None:
    try:
        by_rank = ranks.run(2, _sharded_logs, str(tmp_path), timeout=240)
    finally:
        ranks.close()  # accelerate keeps state in the process
    for logs in by_rank:
        for name, (stock, ours) in logs.items():
            assert len(stock) == 4
            for x, y in zip(ours, stock, strict=True):
                assert x == pytest.approx(y, rel=2e-5), name


def _ddp_logs(folder: str, name: str) -> list[list[dict[str, float]]]:
    """[stock, ours]: loss, gradient norm and entropy of each step where DDP looks for unused parameters."""
    make = {
        "sft": lambda *args, **settings: _trainer(*args[:1], "llama", *args[1:], **settings),
        "dpo": _dpo,
        "grpo": _grpo,
    }
    logs = []
    for ours in (False, True):
        accelerate_state.forget()
        torch.manual_seed(0)  # of the adapters, and of what GRPO generates
        trainer = make[name](folder, ours, peft=LORA, ddp_find_unused_parameters=True)
        trainer.train()
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        assert trainer.model_wrapped.find_unused_parameters
        keys = ("loss", "grad_norm", "entropy")
        logs.append(
            [{k: float(row[k]) for k in keys if k in row} for row in trainer.state.log_history if "loss" in row]
        )
    return logs


@pytest.mark.full
@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_ddp_that_looks_for_unused_parameters_trains_as_stock(ranks: RankPool, tmp_path: Path, name: str) -> None:
    try:
        by_rank = ranks.run(2, _ddp_logs, str(tmp_path), name, timeout=240)
    finally:
        ranks.close()  # accelerate keeps state in the process
    for stock, ours in by_rank:
        assert len(stock) == 3 and all("entropy" in row for row in stock)
        for x, y in zip(ours, stock, strict=True):
            assert x == pytest.approx(y, rel=2e-5)


def _distillation(
    folder: str, ours: bool, fsdp2: bool = False, changes: dict[str, Any] | None = None, **settings: Any
) -> Any:
    model, teacher = architectures.build("llama"), architectures.build("llama")
    with torch.no_grad():
        teacher.lm_head.weight *= 20
    settings = {"max_completion_length": 4, "max_steps": 2, **DRAWN_AS_STOCK, **settings}
    arguments = trl.DistillationConfig(**_settings(folder, per_device_train_batch_size=2, **settings))
    if fsdp2:
        _shard_by_fsdp2(model, arguments)
    return trl.DistillationTrainer(
        model,
        teacher_model=teacher,
        args=arguments,
        train_dataset=_preferences().remove_columns(["chosen", "rejected"]),
        processing_class=_tokenizer(),
        callbacks=[CCECallback(**{"gradient": "exact", **(changes or {})})] if ours else [],
    )


def _distilled(folder: str) -> list[list[tuple[float, float]]]:
    """[stock, ours]: loss and gradient norm of a trainer that multiplies by lm_head.weight, past the head's call."""
    logs = []
    for ours in (False, True):
        accelerate_state.forget()
        torch.manual_seed(0)
        trainer = _distillation(folder, ours, fsdp2=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MaterializedLogitsWarning)
            trainer.train()
        told = [str(x.message) for x in caught if issubclass(x.category, MaterializedLogitsWarning)]
        assert bool(told) == ours and all("gathered on every rank" in text for text in told)
        assert is_lazy(output_layer(trainer.model)) == ours
        logs.append([(float(r["loss"]), float(r["grad_norm"])) for r in trainer.state.log_history if "loss" in r])
    return logs


@pytest.mark.full
def test_distillation_on_two_ranks_under_fsdp2_has_the_gradient_of_stock(ranks: RankPool, tmp_path: Path) -> None:
    try:
        by_rank = ranks.run(2, _distilled, str(tmp_path), timeout=240)
    finally:
        ranks.close()  # accelerate keeps state in the process
    for stock, ours in by_rank:
        assert len(stock) == 2
        for x, y in zip(ours, stock, strict=True):
            assert x == pytest.approx(y, rel=2e-5)


def test_a_trainer_that_computes_past_the_output_layer_is_told_of_by_name(tmp_path: Path) -> None:
    past = "TRL's DistillationTrainer multiplies by lm_head.weight itself"
    with pytest.warns(MaterializedLogitsWarning, match=f"{past}.* cce_dist does nothing for it"):
        _distillation(str(tmp_path), True, max_steps=1).train()
    with pytest.raises(RuntimeError, match=f"materialize='raise' forbids that {past}"):
        _distillation(str(tmp_path), True, changes={"materialize": "raise"}).train()


def _distilled_from_a_part(folder: str) -> None:
    from deepspeed_runs import fresh_deepspeed

    accelerate_state.forget()
    fresh_deepspeed()
    deepspeed = {**ZERO3, "zero_optimization": {"stage": 1}}
    trainer = _distillation(folder, True, changes={"vocab_parallel_size": 2}, deepspeed=deepspeed)
    with pytest.raises(ValueError, match=r"TRL's DistillationTrainer multiplies.* holds 16[56] of 331 rows"):
        trainer.train()


@pytest.mark.full
def test_a_trainer_that_would_compute_with_a_part_of_the_rows_is_refused_by_name(
    ranks: RankPool, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    try:
        ranks.run(2, _distilled_from_a_part, str(tmp_path), timeout=120)
    finally:
        ranks.close()  # accelerate and DeepSpeed keep state in the process


REWARDS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")


def _rewards(folder: str, ours: bool, **settings: Any) -> list[list[float]]:
    """Of a policy that stays what its reference is, in bf16."""
    settings = {"bf16": True, "learning_rate": 0.0, "max_steps": 6, "gradient_accumulation_steps": 1, **settings}
    trainer = _dpo(folder, ours, **settings)
    trainer.train()
    if ours:
        assert output_layer(trainer.model)._cce.config.first_pass == "full"  # type: ignore[union-attr]
    return [[float(row[key]) for key in REWARDS] for row in trainer.state.log_history if "loss" in row]


NO_CHANGE = {
    "a model": {},
    "before training": {"precompute_ref_log_probs": True},
    "the policy without its adapter": {"peft": LoraConfig(r=4, target_modules=["q_proj"])},
    "that, before training": {
        "peft": LoraConfig(r=4, target_modules=["q_proj"]),
        "precompute_ref_log_probs": True,
    },
}


@pytest.mark.full
@pytest.mark.parametrize("settings", NO_CHANGE.values(), ids=NO_CHANGE)
def test_dpo_in_bf16_rewards_a_policy_that_is_its_reference_with_nothing(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    for loss, *rewards in _rewards(str(tmp_path), True, **settings):
        assert max(map(abs, rewards)) < 1e-6 and loss == pytest.approx(math.log(2), abs=1e-6)


def _sharded_rewards(folder: str, data: str) -> list[list[list[list[float]]]]:
    every = []
    for settings in (NO_CHANGE["a model"], NO_CHANGE["before training"], NO_CHANGE["the policy without its adapter"]):
        pair = []
        for ours in (False, True):
            accelerate_state.forget()
            pair.append(_rewards(folder, ours, fsdp2=True, data=f"{data}/{ours}", **settings))
        every.append(pair)
    return every


@pytest.mark.full
def test_dpo_in_bf16_under_fsdp2_starts_with_the_loss_and_rewards_of_stock(ranks: RankPool, tmp_path: Path) -> None:
    for ours in (False, True):  # TRL caches beside the data what the reference says of it
        _preferences().save_to_disk(tmp_path / "data" / str(ours))
    try:
        by_rank = ranks.run(2, _sharded_rewards, str(tmp_path / "out"), str(tmp_path / "data"), timeout=240)
    finally:
        ranks.close()  # accelerate keeps state in the process
    for stock, ours in by_rank[0]:  # FSDP2 rounds what a model returns to bf16: so do all sums of it
        assert ours == stock and all(max(map(abs, rewards)) == 0 for _, *rewards in ours)


def _sharded_grpo(folder: str, saved: str) -> list[list[tuple[float, ...]]]:
    """[stock, ours, ours with draws of its own]: loss, gradient norm and KL of each step."""
    logs = []
    for ours, draws in ((False, DRAWN_AS_STOCK), (True, DRAWN_AS_STOCK), (True, {})):
        accelerate_state.forget()
        torch.manual_seed(0)
        trainer = _grpo(folder, ours, saved=saved, fsdp2=True, **draws)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        logs.append([tuple(float(row[key]) for key in ("loss", "grad_norm", "kl")) for row in rows])
    return logs


@pytest.mark.full
def test_grpo_on_two_ranks_under_fsdp2_logs_what_it_logs_for_stock(ranks: RankPool, tmp_path: Path) -> None:
    architectures.build("llama").save_pretrained(tmp_path / "model")
    try:
        by_rank = ranks.run(2, _sharded_grpo, str(tmp_path), str(tmp_path / "model"), timeout=240)
    finally:
        ranks.close()  # accelerate keeps state in the process
    for stock, ours, own_draws in by_rank:
        assert len(stock) == len(own_draws) == 3 and own_draws[0][2] == 0
        for x, y in zip(ours, stock, strict=True):
            assert x == pytest.approx(y, rel=1e-3, abs=1e-6)


def _cast_head_logs(folder: str, saved: str, make: Any, **settings: Any) -> list[list[dict[str, float]]]:
    """[stock, ours]: what GRPO logs of a model in bf16 whose output layer TRL casts to fp32."""
    logs = []
    for ours in (False, True):
        torch.manual_seed(0)
        given = {"dtype": torch.bfloat16, "cast_lm_head_to_fp32": True, "saved": saved, **DRAWN_AS_STOCK, **settings}
        trainer = make(folder, ours, **given)
        trainer.train()
        head = output_layer(trainer.model)
        assert head.weight.dtype == torch.float32 and is_lazy(head) == ours and (not ours or is_in_fp32(head))
        logs.append(
            [{k: float(row[k]) for k in LOGGED if k in row} for row in trainer.state.log_history if "loss" in row]
        )
    return logs


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_a_head_that_is_cast_to_fp32_trains_as_stock(tmp_path: Path, name: str) -> None:
    architectures.build(name).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    stock, ours = _cast_head_logs(str(tmp_path), str(tmp_path / "model"), _grpo, name=name)
    assert len(stock) == 3
    for x, y in zip(ours, stock, strict=True):
        assert x == pytest.approx(y, rel=2e-5, abs=1e-6)


def _sharded_cast_head(folder: str, saved: str) -> list[list[dict[str, float]]]:
    def make(*args: Any, **settings: Any) -> Any:
        accelerate_state.forget()
        return _grpo(*args, fsdp2=True, **settings)

    # Of a model in bf16 FSDP2 does not take the reference, whose parameters are of two dtypes then. One step: TRL's
    # head is rounded to bf16 by the policy of mixed precision, and training makes more of that.
    return _cast_head_logs(folder, saved, make, bf16=True, dtype=torch.float32, max_steps=1)


@pytest.mark.full
def test_a_head_that_is_cast_to_fp32_trains_as_stock_on_two_ranks_under_fsdp2(ranks: RankPool, tmp_path: Path) -> None:
    architectures.build("llama").save_pretrained(tmp_path / "model")
    try:
        by_rank = ranks.run(2, _sharded_cast_head, str(tmp_path), str(tmp_path / "model"), timeout=240)
    finally:
        ranks.close()  # accelerate keeps state in the process
    stock, ours = by_rank[0]
    assert len(stock) == 1
    for x, y in zip(ours, stock, strict=True):
        assert x == pytest.approx(y, rel=5e-3, abs=1e-5)


class _Gathered(TorchDispatchMode):
    """Whether a weight that ZeRO-3 partitions is ever whole on this rank."""

    def __init__(self, *weights: Any) -> None:
        super().__init__()
        self.weights, self.ever = weights, False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ever = self.ever or any(weight.ds_status.name != "NOT_AVAILABLE" for weight in self.weights)
        return function(*args, **(kwargs or {}))


ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "kl", *(key for key in REWARDS if key != "loss"))


def _zero3_run(make: Any, folder: str, ours: bool, **settings: Any) -> tuple[list[dict[str, float]], bool, Any]:
    """What is logged of each step, whether a head was ever whole on a rank in training, and the trainer."""
    from deepspeed_runs import fresh_deepspeed

    accelerate_state.forget()
    fresh_deepspeed()
    unset_hf_deepspeed_config()  # or models are partitioned when they are built
    torch.manual_seed(0)
    trainer = make(folder, ours, deepspeed=copy.deepcopy(ZERO3), **settings)
    models = [trainer.model, getattr(trainer, "ref_model", None)]
    weights: list[Any] = []
    trainer.add_callback(_WhenTrainingBegins(lambda: weights.extend(output_layer(m).weight for m in models if m)))
    with _Gathered() as gathered:
        gathered.weights = weights  # type: ignore[assignment]
        trainer.train()
    assert is_lazy(output_layer(trainer.model)) == ours
    history = [row for row in trainer.state.log_history if "loss" in row]
    return [{key: float(row[key]) for key in LOGGED if key in row} for row in history], gathered.ever, trainer


class _WhenTrainingBegins(TrainerCallback):
    def __init__(self, act: Any) -> None:
        self._act = act

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        act, self._act = self._act, lambda: None
        act()


def _zero3_logs(folder: str, saved: str) -> None:
    """Asserts on each rank."""
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "sft": (_sft, {}),
        "dpo": (_dpo, {}),
        "grpo": (_grpo, {"saved": saved, **DRAWN_AS_STOCK}),
        "grpo, head cast": (_grpo, {"saved": saved, "cast_lm_head_to_fp32": True, **DRAWN_AS_STOCK}),
        "rloo": (_rloo, {"saved": saved, **DRAWN_AS_STOCK}),
        "kto": (_kto, {"saved": saved}),
        "distillation": (_distillation, {}),
    }
    for name, (make, settings) in cases.items():
        (stock, whole, _), (got, gathered, _) = (_zero3_run(make, folder, ours, **settings) for ours in (False, True))
        assert len(stock) > 1 and whole and gathered == (make not in (_sft, _dpo, _kto)), name
        for x, y in zip(got, stock, strict=True):
            assert x == pytest.approx(y, rel=1e-4, abs=1e-5), name
    got, gathered, _ = _zero3_run(_grpo, folder, True, saved=saved, ds3_gather_for_generation=False)
    assert not gathered and all(0 < row["entropy"] < math.log(architectures.VOCAB) for row in got)


@pytest.mark.full
def test_two_ranks_under_zero3_log_what_they_log_for_stock_and_gather_no_head(ranks: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    architectures.build("llama").save_pretrained(tmp_path / "model")
    try:
        ranks.run(2, _zero3_logs, str(tmp_path), str(tmp_path / "model"), timeout=360)
    finally:
        ranks.close()  # accelerate and DeepSpeed keep state in the process


def _without_the_callback(folder: str) -> dict[int, str]:
    """What is said, by ZeRO stage, where DeepSpeed's section alone asks for cce_dist."""
    from deepspeed_runs import fresh_deepspeed

    import cce_dist.deepspeed

    said = {}
    cce_dist.deepspeed.install()
    for stage in (2, 3):
        accelerate_state.forget()
        fresh_deepspeed()
        unset_hf_deepspeed_config()
        config = {**copy.deepcopy(ZERO3), "zero_optimization": {"stage": stage}}
        config["cce_dist"] = {"materialize": "raise", "vocab_parallel_size": 2}
        trainer = _sft(folder, ours=False, deepspeed=config)
        with pytest.raises((ValueError, RuntimeError)) as caught:
            trainer.train()
        said[stage] = str(caught.value)
    return said


@pytest.mark.full
def test_a_trainer_whose_engine_has_the_section_is_told_to_take_the_callback(ranks: RankPool, tmp_path: Path) -> None:
    """TRL's own forward would compute the loss from a part of the rows, or past the output layer."""
    pytest.importorskip("deepspeed")
    try:
        by_rank = ranks.run(2, _without_the_callback, str(tmp_path), timeout=120)
    finally:
        ranks.close()  # accelerate and DeepSpeed keep state in the process
    for rank, said in enumerate(by_rank):
        assert f"holds {166 - rank} of 331 rows. Give it callbacks=[CCECallback()]" in said[2]
        assert "cce_dist does nothing for it. Give it callbacks=[CCECallback()]" in said[3]


def _zero3_rewards(folder: str, data: str) -> dict[str, list[list[dict[str, float]]]]:
    """[stock, ours] of a policy that stays what its reference is, in bf16."""
    every = {}
    for name in ("a model", "before training", "the policy without its adapter"):
        pair = every[name] = []
        for ours in (False, True):
            settings = {"bf16": True, "learning_rate": 0.0, "max_steps": 2, "gradient_accumulation_steps": 1}
            logs, gathered, _ = _zero3_run(_dpo, folder, ours, data=f"{data}/{ours}", **settings, **NO_CHANGE[name])
            assert gathered == (not ours), name
            pair.append(logs)
    return every


@pytest.mark.full
def test_dpo_in_bf16_under_zero3_rewards_a_policy_that_is_its_reference_with_nothing(
    ranks: RankPool, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    for ours in (False, True):
        _preferences().save_to_disk(tmp_path / "data" / str(ours))
    try:
        by_rank = ranks.run(2, _zero3_rewards, str(tmp_path / "out"), str(tmp_path / "data"), timeout=240)
    finally:
        ranks.close()  # accelerate and DeepSpeed keep state in the process
    for name, (stock, ours) in by_rank[0].items():
        assert len(ours) == 2
        for x, y in zip(ours, stock, strict=True):
            if name == "before training":  # TRL does that alone under autocast, so that hidden states are others
                assert [x[key] for key in REWARDS] == pytest.approx([y[key] for key in REWARDS], abs=1e-2)
            else:
                assert [x[key] for key in REWARDS if key != "loss"] == [0, 0, 0]


def _fused(model: PreTrainedModel, **extra: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    result = model(**architectures.batch(), fused_lm_head=True, **extra)
    result.loss.backward()
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_every_output_of_the_fused_head_and_every_gradient_is_that_of_trl(name: str) -> None:
    model = architectures.build(name)
    utils.add_fused_lm_head(model, temperature=0.7, outputs=ALL_OUTPUTS)
    wanted, wanted_gradients = _fused(model, num_items_in_batch=torch.tensor(40))
    patch(model, gradient="exact", materialize="raise")
    fuse_forward(model, trl_forward_of(model), output_layer(model))
    assert trl_forward_of(model) is None
    got, gradients = _fused(model, num_items_in_batch=torch.tensor(40))
    for key in ("loss", "label_mask", *ALL_OUTPUTS):
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for key, gradient in wanted_gradients.items():
        assert (gradients[key] - gradient).norm() <= 5e-5 * gradient.norm() + 1e-8, key
    with torch.no_grad():  # as for a reference model
        shifted = _shifted(architectures.batch())
        torch.testing.assert_close(
            model(**shifted, fused_lm_head=True).log_probs[:, :-1], got.log_probs, rtol=1e-5, atol=1e-5
        )
    plain = model(**architectures.batch())
    assert plain.loss is not None


def _shifted(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return {"input_ids": batch["input_ids"], "shift_labels": shifted}


def _bonus_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    result = model(**architectures.batch(), fused_lm_head=True)
    (result.loss - 0.3 * result.entropy[result.label_mask].mean()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_an_entropy_bonus_has_the_gradient_of_trl(name: str) -> None:
    model = architectures.build(name)
    utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    wanted = _bonus_gradients(model)
    patch(model, gradient="exact", materialize="raise")
    fuse_forward(model, trl_forward_of(model), output_layer(model), entropy_bonus=True)
    got = _bonus_gradients(model)
    assert got.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert (got[key] - gradient).norm() <= 5e-5 * gradient.norm() + 1e-8, key


def test_an_entropy_bonus_that_was_not_asked_for_is_refused_instead_of_going_without_a_gradient() -> None:
    model = patch(architectures.build("llama"), gradient="exact")
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    fuse_forward(model, trl_forward_of(model), output_layer(model))
    result = model(**architectures.batch(), fused_lm_head=True)
    (result.loss + 0 * result.entropy.mean()).backward(retain_graph=True)
    with pytest.raises(NotImplementedError, match="entropy_bonus=True"):
        (result.loss - 0.1 * result.entropy.mean()).backward()


@pytest.mark.parametrize("bonus", [{"entropy_coef": 0.01}, {"use_adaptive_entropy": True}])
def test_grpo_with_an_entropy_bonus_has_the_losses_and_gradients_of_stock(tmp_path: Path, bonus: Any) -> None:
    logs = []
    for ours in (False, True):
        torch.manual_seed(0)
        trainer = _grpo(str(tmp_path), ours, peft=LORA, max_steps=2, **bonus)
        trainer.train()
        keys = ("loss", "grad_norm", "entropy")
        logs.append([[float(row[key]) for key in keys] for row in trainer.state.log_history if "loss" in row])
    stock, ours_ = logs
    assert len(stock) == 2
    for x, y in zip(ours_, stock, strict=True):
        assert x == pytest.approx(y, rel=1e-4, abs=1e-6)


@pytest.mark.gpu
def test_a_gradient_of_zeros_passes_the_logged_entropy_on_a_gpu() -> None:
    from cce_dist.trl import _ForTheLog

    anchor = torch.zeros(3, device="cuda", requires_grad=True)
    _ForTheLog.apply(torch.ones(3, device="cuda"), anchor).backward(torch.zeros(3, device="cuda"))
    assert anchor.grad is not None and anchor.grad.tolist() == [0, 0, 0]


def test_the_example_of_grpo_trains_with_the_patched_model(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs/reinforcement-learning.md").read_text()
    (example,) = re.findall(r"<!-- test: grpo -->\n```python\n(.*?)```", text, re.S)
    extra = {"num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 2, "max_steps": 1}
    names = {
        "GRPOTrainer": trl.GRPOTrainer,
        "model": architectures.build("llama"),
        "reward": _reward,
        "arguments": trl.GRPOConfig(**_settings(str(tmp_path), **extra)),
        "data": _preferences().remove_columns(["chosen", "rejected"]),
        "tokenizer": _tokenizer(),
    }
    exec(compile(example, "example of GRPO", "exec"), names)
    trainer: Any = names["trainer"]
    assert trainer.state.global_step == 1
    assert is_lazy(output_layer(trainer.model)) and trl_forward_of(trainer.model) is None


@pytest.mark.full
def test_the_example_of_gkd_trains_as_stock_without_logits(tmp_path: Path) -> None:
    experimental = pytest.importorskip("trl.experimental.gkd")
    text = (Path(__file__).parents[1] / "docs/distillation.md").read_text()
    (example,) = re.findall(r"<!-- test: gkd -->\n```python\n(.*?)```", text, re.S)
    tokenizer = _tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    turns = [[("user", _words(i, 4)), ("assistant", _words(50 + i, 9))] for i in range(8)]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turn]} for turn in turns]
    logs = []
    for ours in (False, True):
        torch.manual_seed(0)
        model, teacher = architectures.build("llama"), architectures.build("llama")
        with torch.no_grad():
            teacher.lm_head.weight *= 20
        data, arguments = Dataset.from_list(rows), experimental.GKDConfig(**_settings(str(tmp_path), lmbda=0.0))
        if ours:
            names = {
                "GKDTrainer": experimental.GKDTrainer,
                "model": model,
                "teacher": teacher,
                "arguments": arguments,
                "data": data,
                "tokenizer": tokenizer,
            }
            with warnings.catch_warnings():
                warnings.simplefilter("error", MaterializedLogitsWarning)
                exec(compile(example, "example of GKD", "exec"), names)
            trainer: Any = names["trainer"]
        else:
            given = {"args": arguments, "train_dataset": data, "processing_class": tokenizer}
            trainer = experimental.GKDTrainer(model, teacher_model=teacher, **given)
            trainer.train()
        logs.append([(float(r["loss"]), float(r["grad_norm"])) for r in trainer.state.log_history if "loss" in r])
    assert len(logs[0]) == 3
    for stock, got in zip(*logs, strict=True):
        assert got == pytest.approx(stock, rel=1e-4)


def test_a_projection_in_fp32_without_fp32_head_and_an_unknown_forward_are_refused() -> None:
    model = patch(architectures.build("llama"))
    utils.add_fused_lm_head(model, cast_lm_head_to_fp32=True)
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32=True needs an output layer .* fp32_head=True"):
        fuse_forward(model, trl_forward_of(model), output_layer(model))
    with pytest.raises(RuntimeError, match=f"TRL {trl.__version__}"):
        fuse_forward(model, lambda: None, output_layer(model))


def test_entropy_and_accuracy_as_earlier_versions_of_trl_compute_them() -> None:
    model, stock = patch(architectures.build("gemma2"), materialize="raise"), architectures.build("gemma2")
    got, wanted = (m(**architectures.batch()).logits[..., :-1, :] for m in (model, stock))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", MaterializedLogitsWarning)
        torch.testing.assert_close(utils.entropy_from_logits(got), utils.entropy_from_logits(wanted))
        assert torch.equal(got.argmax(dim=-1), wanted.argmax(dim=-1))
