"""The model: any Hugging Face causal language model, new from a config or from a folder."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cce_dist.train.data import IGNORED, Batch
from cce_dist.train.settings import ModelSettings


def check(settings: ModelSettings) -> None:
    """What can be told of the model's config before there is a tokenizer.

    Raises:
        ValueError: transformers has no causal language model of this type, or ``model.config`` has keys that mean
            nothing to it.
    """
    if settings.path is not None:
        found = AutoConfig.from_pretrained(settings.path, local_files_only=True, trust_remote_code=False)
        _check_type(found.model_type, f"the model_type of {settings.path / 'config.json'}")
        return
    assert settings.config is not None
    given = settings.config
    _check_type(given["model_type"], "model.config.model_type")
    config, default = AutoConfig.for_model(**given), AutoConfig.for_model(given["model_type"])
    if unknown := _unknown(given, config, default, "model.config"):
        raise ValueError(
            f"{', '.join(unknown)}: unknown to model_type {given['model_type']} of transformers "
            f"{transformers.__version__}, which would drop it without a word; correct the name, or remove it."
        )


def _unknown(given: Mapping[str, Any], config: PretrainedConfig, default: PretrainedConfig, where: str) -> list[str]:
    """The keys that transformers only kept, as an attribute that no config of this type has; what it has taken in, such
    as an older name of another key, is not there under that name. Each with those close to it."""
    unknown = []
    known = {name for name in (*vars(default), *default.to_dict(), *default.attribute_map) if not name.startswith("_")}
    for key, value in given.items():
        part, stock = vars(config).get(key), vars(default).get(key)
        if key in vars(config) and key not in known and not hasattr(default, key):
            close = get_close_matches(key, sorted(known), n=3)
            unknown.append(f"{where}.{key}" + (f" (close to it: {', '.join(close)})" if close else ""))
        elif isinstance(value, Mapping) and isinstance(part, PretrainedConfig) and isinstance(stock, PretrainedConfig):
            unknown += _unknown(value, part, stock, f"{where}.{key}")
    return unknown


def build(settings: ModelSettings, vocab_size: int, seed: int) -> PreTrainedModel:
    """The model in fp32 on the CPU, the same on every rank; of settings that `check` has passed.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    torch.manual_seed(seed)
    if settings.path is not None:
        model = AutoModelForCausalLM.from_pretrained(
            settings.path, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    else:
        assert settings.config is not None
        config = AutoConfig.for_model(**{"vocab_size": vocab_size, **settings.config})
        model = AutoModelForCausalLM.from_config(config)
    if model.config.vocab_size < vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} tokens, the model only {model.config.vocab_size}; use the model's own "
            "tokenizer, or a model with a larger vocab_size."
        )
    return model


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """All of the model's config that decides what it computes, as JSON gives it back."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    return {key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL}


# Where it came from and what wrote it. The parameters are fp32, and Settings.dtype says what is computed in.
_NOT_OF_THE_MODEL = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


def _check_type(model_type: Any, name: str) -> None:
    known = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if model_type not in known:
        close = get_close_matches(str(model_type), known, n=5, cutoff=0.5)
        others = f"close to it are {', '.join(close)}" if close else f"it has {len(known)}, such as llama and qwen2"
        raise ValueError(
            f"{name} = {model_type!r}: transformers {transformers.__version__} has no causal language model of this "
            f"type; {others}."
        )


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy summed over the batch's valid tokens. The same code whether the logits exist or not."""
    logits_BLV = model(input_ids=batch.inputs_BL, use_cache=False).logits
    return F.cross_entropy(
        logits_BLV.float().flatten(0, 1), batch.labels_BL.flatten(), ignore_index=IGNORED, reduction="sum"
    )
