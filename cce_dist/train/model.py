"""The model: any Hugging Face causal language model, new from a config or from a folder."""

import difflib
import json
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cce_dist.train.data import IGNORED, Batch
from cce_dist.train.settings import ModelSettings


def build(settings: ModelSettings, vocab_size: int, seed: int) -> PreTrainedModel:
    """The model in fp32 on the CPU, the same on every rank.

    Raises:
        ValueError: transformers has no causal language model of this type; the tokenizer has more tokens than the
            model.
    """
    torch.manual_seed(seed)
    if settings.path is not None:
        config = AutoConfig.from_pretrained(settings.path, local_files_only=True, trust_remote_code=False)
        _check_type(config.model_type, f"the model_type of {settings.path / 'config.json'}")
        model = AutoModelForCausalLM.from_pretrained(
            settings.path, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    else:
        assert settings.config is not None
        _check_type(settings.config["model_type"], "model.config.model_type")
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
        close = difflib.get_close_matches(str(model_type), known, n=5, cutoff=0.5)
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
