"""Hugging Face models: `patch(model)`, and a model of any architecture trains without ever computing its logits.

Only the class of the output layer changes. See `lazy_logits` for what that layer returns, and why every model's own
loss code runs on it as it is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cce_dist import lazy_logits
from cce_dist.announce import announce_active
from cce_dist.config import CCEConfig
from cce_dist.fsdp import adopt
from cce_dist.lazy_logits import is_lazy, make_eager, make_lazy
from cce_dist.liger import refuse_liger_forward
from cce_dist.owner import ModuleOwner

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model, config: CCEConfig | None = None, **settings: Any) -> Model:
    """Makes the model's output layer lazy, in place: in training, `model(..., labels=...)` computes the fused loss.

    For a model whose output layer each process holds as a whole, before or after DDP and PEFT wrap it; and for one that
    a framework (accelerate, the Trainer) has sharded by FSDP2, where it is `cce_dist.fsdp.adopt`. Patch after resizing
    the vocabulary, which makes a new output layer.

    Args:
        model: has ``get_output_embeddings()``, as every Hugging Face model, or wraps one that has.
        config: settings of the loss; None: the defaults. With ``enabled=False`` nothing is done.
        settings: the same by keyword, as in ``patch(model, gradient="exact")``.

    Returns:
        The model itself.

    Raises:
        ValueError: a bad setting, both config and settings, no output layer, one that is patched already, or one that
            is sharded in a way that is not supported.
        TypeError: an output layer that is not a plain nn.Linear (one with a LoRA adapter, for instance).
    """
    config = choose_config(config, settings, where="patch")
    if config.enabled:
        refuse_liger_forward(model)
        head = output_layer(model)
        weight = getattr(head, "weight", None)
        if isinstance(weight, DTensor):
            adopt(_unwrap(model), head=head, config=config)
        elif getattr(weight, "ndim", 2) != 2:
            raise ValueError(
                f"the output layer of {type(model).__name__} is sharded already, by ZeRO-3 or FSDP1. With DeepSpeed "
                "call cce_dist.deepspeed.initialize in place of patch; in place of FSDP1 take FSDP2."
            )
        elif (config.vocab_parallel_size or 1) > 1:
            raise ValueError(
                f"vocab_parallel_size = {config.vocab_parallel_size}, but the output layer of {type(model).__name__} "
                "is whole on every rank. Leave it out, or shard the model with FSDP2 or DeepSpeed."
            )
        else:
            owner = ModuleOwner(head)
            make_lazy(head, owner, config)
            announce_active(f"gradient={config.gradient}, all {owner.shard.vocab_size} vocabulary rows on every rank")
    return model


def unpatch(model: Model) -> Model:
    """Undoes `patch`.

    Raises:
        ValueError: the model is not patched, or its output layer is a shard on FSDP2's mesh.
    """
    head = output_layer(model)
    if is_lazy(head) and "forward" in vars(head):
        raise ValueError("an output layer that FSDP2 has sharded cannot be unpatched: build the model anew.")
    make_eager(head)
    return model


@contextmanager
def fused_evaluation(model: nn.Module) -> Iterator[None]:
    """Inside, a patched model in eval mode computes its loss without logits as well; outside, it gives real logits.

    Raises:
        ValueError: the model is not patched.
    """
    with lazy_logits.fused_evaluation(output_layer(model)):
        yield


def choose_config(config: CCEConfig | None, settings: Mapping[str, Any], where: str) -> CCEConfig:
    """Settings given as a config or by keyword.

    Raises:
        ValueError: both, or a bad setting.
    """
    if config is not None and settings:
        raise ValueError(
            f"{where} takes config or settings by keyword, not both; got config and {', '.join(settings)}."
        )
    return config or CCEConfig.from_mapping(settings, where=f"{where}(...)")


def output_layer(model: nn.Module) -> nn.Module:
    """The output layer of a model, also inside of DDP, PEFT and PEFT's ``modules_to_save``.

    Raises:
        ValueError: the model has none.
    """
    model = _unwrap(model)
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"model must have an output layer that get_output_embeddings() returns, as ...ForCausalLM models do; "
            f"{type(model).__name__} has none."
        )
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):  # PEFT trains a copy of the layer for each adapter
        active = getattr(head, "active_adapters", None) or []
        if len(active) != 1 or active[0] not in copies:
            raise ValueError(
                f"PEFT keeps copies of the output layer for the adapters {list(copies)}, and {active} are active: make "
                "one of the former active with set_adapter, then patch."
            )
        return copies[active[0]]
    return head


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model
