"""The model: any Hugging Face causal language model, new from a config or from a folder."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cce_dist.train.data import IGNORED, Batch
from cce_dist.train.settings import ModelSettings


def build(settings: ModelSettings, vocab_size: int, seed: int) -> PreTrainedModel:
    """The model in fp32 on the CPU, the same on every rank.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    torch.manual_seed(seed)
    if settings.path is not None:
        model = AutoModelForCausalLM.from_pretrained(settings.path, dtype=torch.float32, local_files_only=True)
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


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy summed over the batch's valid tokens. The same code whether the logits exist or not."""
    logits_BLV = model(input_ids=batch.inputs_BL, use_cache=False).logits
    return F.cross_entropy(
        logits_BLV.float().flatten(0, 1), batch.labels_BL.flatten(), ignore_index=IGNORED, reduction="sum"
    )
