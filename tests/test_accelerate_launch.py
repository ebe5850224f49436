"""Scripts under ``accelerate launch``, on two ranks: with one callback they log what they log without.

The launcher, not `TrainingArguments`, says what shards the model, and names DeepSpeed's JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import architectures
import pytest
from launched import ENVIRONMENT, Command, free_port
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Trains the stock model, then with the callback; rank 0 writes what both log.
SCRIPT = """
import json, sys
from pathlib import Path

import accelerate_state
from datasets import Dataset

from cce_dist.heads.find import output_layer
from cce_dist.heads.lazy import is_lazy
from cce_dist.trainer_callback import CCECallback

kind, model, output, settings = sys.argv[1:]
if kind == "sft":
    from trl import SFTConfig as Arguments, SFTTrainer as Trainer

    accelerate_state.fsdp2_on_the_cpu()
else:
    import deepspeed
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments as Arguments

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for a minute
data = Dataset.from_list(json.loads(Path(model, "data.json").read_text()))
logs = []
for ours in (False, True):
    arguments = Arguments(
        output, max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=1e-2,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
        activation_checkpointing=False, max_grad_norm=1.0,
    )
    network = model if kind == "sft" else AutoModelForCausalLM.from_pretrained(model)
    callbacks = [CCECallback(**json.loads(settings))] if ours else []
    trainer = Trainer(network, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    assert is_lazy(output_layer(trainer.model)) == ours
    logs.append([[r["loss"], float(r["grad_norm"])] for r in trainer.state.log_history if "loss" in r])
if trainer.args.process_index == 0:
    Path(output, "logs.json").write_text(json.dumps(logs))
trainer.accelerator.end_training()  # a process group left to the interpreter's end now and then aborts there
"""
EXACT = {"gradient": "exact", "materialize": "raise"}
FSDP2 = [
    *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_reshard_after_forward", "true", "--fsdp_cpu_ram_efficient_loading", "false"),
]
# (trainer, what the launcher shards with, the callback's settings, what is said to be active)
CASES: dict[str, tuple[str, list[str] | dict[str, Any], dict[str, Any], str]] = {
    "FSDP2": ("sft", FSDP2, EXACT, "FSDP2, gradient=exact, 331 vocabulary rows over 2 rank(s)"),
    "ZeRO-2, the section in its JSON": (
        "trainer", {"zero_optimization": {"stage": 2}, "cce_dist": {**EXACT, "vocab_parallel_size": 2}}, {},
        "ZeRO stage 2, gradient=exact, 331 vocabulary rows over 2",
    ),
}  # fmt: skip
AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a tokenizer, and token ids with labels of which other numbers count in each row."""
    folder = tmp_path_factory.mktemp("model")
    architectures.build("llama").save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(architectures.VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2").save_pretrained(folder)
    rows = [[3 + (17 * i + j * j) % 300 for j in range(12)] for i in range(16)]
    data = [{"input_ids": ids, "labels": [-100] * (i % 7) + ids[i % 7 :]} for i, ids in enumerate(rows)]
    (folder / "data.json").write_text(json.dumps(data))
    return folder


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_a_script_logs_what_it_logs_for_stock(model: Path, tmp_path: Path, name: str) -> None:
    kind, sharding, settings, active = CASES[name]
    pytest.importorskip("trl" if kind == "sft" else "deepspeed")
    if isinstance(sharding, dict):
        config = {**dict.fromkeys(AUTO, "auto"), "zero_allow_untested_optimizer": True, **sharding}
        (tmp_path / "deepspeed.json").write_text(json.dumps(config))
        sharding = ["--use_deepspeed", "--zero3_init_flag", "false"]
        sharding += ["--deepspeed_config_file", str(tmp_path / "deepspeed.json")]
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()), *sharding,
    ]  # fmt: skip
    words = [tmp_path / "script.py", kind, model, tmp_path, json.dumps(settings)]
    found = f"{Path(__file__).parent}:{ENVIRONMENT['PYTHONPATH']}"
    with Command([*launch, *words], tmp_path / "said", PYTHONPATH=found) as command:
        assert command.wait(150) == 0, command.said
        assert command.said.count("cce_dist is active") == command.said.count(f"cce_dist is active: {active}") == 1
    stock, ours = json.loads((tmp_path / "logs.json").read_text())
    assert len(stock) == 3
    for x, y in zip(ours, stock, strict=True):
        assert x == pytest.approx(y, rel=2e-5)
