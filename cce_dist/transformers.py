"""Hugging Face models: `patch(model)`, and a model of any architecture trains without ever computing its logits.

Only the class of the output layer changes. See `lazy_logits` for what that layer returns, and why every model's own
loss code runs on it as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.distributed.tensor import DTensor

from cce_dist import lazy_logits
from cce_dist.config import CCEConfig
from cce_dist.lazy_logits import make_eager, make_lazy
from cce_dist.owner import ModuleOwner

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model, config: CCEConfig | None = None, **settings: Any) -> Model:
    """Makes the model's output layer lazy, in place: in training, `model(..., labels=...)` computes the fused loss.

    For a model whose output layer each process holds as a whole. For a sharded one, `cce_dist.fsdp.shard_head` and
    `cce_dist.deepspeed.initialize` do the same. Patch after resizing the vocabulary, which makes a new output layer.

    Args:
        model: has ``get_output_embeddings()``, as every Hugging Face model.
        config: settings of the loss; None: the defaults. With ``enabled=False`` nothing is done.
        settings: the same by keyword, as in ``patch(model, gradient="exact")``.

    Returns:
        The model itself.

    Raises:
        ValueError: a bad setting, both config and settings, no output layer, or one that is patched or sharded already.
        TypeError: an output layer that is not a plain nn.Linear (one with a LoRA adapter, for instance).
    """
    if config is not None and settings:
        raise ValueError(f"patch takes config or settings by keyword, not both; got config and {', '.join(settings)}.")
    config = config or CCEConfig.from_mapping(settings, where="patch(...)")
    if config.enabled:
        head = _output_layer(model)
        weight = getattr(head, "weight", None)
        if isinstance(weight, DTensor) or getattr(weight, "ndim", 2) != 2:
            raise ValueError(
                f"the output layer of {type(model).__name__} is sharded already. In place of patch, call "
                "cce_dist.fsdp.adopt or shard_head under FSDP2, cce_dist.deepspeed.initialize with DeepSpeed."
            )
        make_lazy(head, ModuleOwner(head), config)
    return model


def unpatch(model: Model) -> Model:
    """Undoes `patch`.

    Raises:
        ValueError: the model is not patched.
    """
    make_eager(_output_layer(model))
    return model


@contextmanager
def fused_evaluation(model: nn.Module) -> Iterator[None]:
    """Inside, a patched model in eval mode computes its loss without logits as well; outside, it gives real logits.

    Raises:
        ValueError: the model is not patched.
    """
    with lazy_logits.fused_evaluation(_output_layer(model)):
        yield


def _output_layer(model: nn.Module) -> nn.Module:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"model must have an output layer that get_output_embeddings() returns, as ...ForCausalLM models do; "
            f"{type(model).__name__} has none."
        )
    return head
