"""Every way in leaves others' code, logging and random numbers as stock training leaves them, and unpatch undoes it."""

import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from cce_dist.heads.find import output_layer
from cce_dist.heads.lazy import is_lazy
from cce_dist.trainer_callback import CCECallback
from cce_dist.transformers import patch, unpatch

EXACT = {"gradient": "exact", "materialize": "raise"}
SETTINGS = [EXACT, {"gradient": "unbiased"}]


def _vars(places: list[Any]) -> list[dict[str, Any]]:
    return [dict(vars(place)) for place in places]


def _random_state() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


def _by_patch(folder: str, callback: CCECallback | None, settings: dict[str, Any]) -> nn.Module:
    model = architectures.build("llama")
    if callback is not None:
        patch(model, **settings)
    model(**architectures.batch()).loss.backward()
    return model


def _arguments(folder: str, kind: type) -> Any:
    return kind(
        folder, max_steps=2, per_device_train_batch_size=1, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, bf16=False,
    )  # fmt: skip


def _by_trainer(folder: str, callback: CCECallback | None, settings: dict[str, Any]) -> nn.Module:
    model = architectures.build("llama")
    rows = [{key: x[i].clone() for key, x in architectures.batch().items()} for i in range(2)]
    arguments = _arguments(folder, transformers.TrainingArguments)
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback] if callback else []).train()
    return model


def _by_trl(folder: str, callback: CCECallback | None, settings: dict[str, Any]) -> nn.Module:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(architectures.VOCAB)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2")
    model, data = architectures.build("llama"), Dataset.from_list([{"input_ids": list(range(3, 15))}] * 4)
    trl.SFTTrainer(
        model, _arguments(folder, trl.SFTConfig), train_dataset=data, processing_class=tokenizer,
        callbacks=[callback] if callback else [],
    ).train()  # fmt: skip
    return model


WAYS: dict[str, Callable[..., nn.Module]] = {"patch": _by_patch, "Trainer": _by_trainer, "SFTTrainer": _by_trl}


def _places() -> list[Any]:
    """Where a function of another project might be replaced."""
    model = type(architectures.build("llama"))
    names = (
        "torch.nn.functional", "transformers.trainer", "transformers.loss.loss_utils", "accelerate.accelerator",
        "trl.trainer.utils", "trl.trainer.sft_trainer",
    )  # fmt: skip
    loaded = [sys.modules[name] for name in names if name in sys.modules]
    classes = [x for place in loaded for x in vars(place).values() if getattr(x, "__module__", "") == place.__name__]
    classes = [x for x in classes if isinstance(x, type)]
    return [nn.Linear, nn.Module, Tensor, model, logging.Logger, logging.getLogger("cce_dist"), *loaded, *classes]


@pytest.mark.parametrize("settings", SETTINGS, ids=["exact", "unbiased"])
@pytest.mark.parametrize("name", WAYS)
def test_training_leaves_what_stock_training_leaves(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    if name == "SFTTrainer":
        pytest.importorskip("trl.trainer.sft_trainer")
    states, models, places = [], [], _places()
    before = _vars(places)
    for callback in (None, CCECallback(**settings)):
        transformers.set_seed(1)
        models.append(WAYS[name](str(tmp_path), callback, settings))
        states.append(_random_state())
    assert is_lazy(output_layer(models[1]))
    assert states[0] == states[1]
    for place, was, now in zip(places, before, _vars(places), strict=True):
        changed = [key for key in was.keys() | now.keys() if was.get(key) is not now.get(key)]
        assert changed == [], place
    unpatch(models[1])
    stock, ours = ([(type(x), sorted(vars(x))) for x in model.modules()] for model in models)
    assert ours == stock
    if name == "SFTTrainer":
        with torch.no_grad():
            losses = [model(**architectures.batch(), fused_lm_head=True).loss for model in models]
        assert vars(models[1])["forward"].__func__.__globals__ is vars(models[0])["forward"].__func__.__globals__
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
