"""Where a model has its output layer: one answer for plain models, DDP, PEFT's wrappers and every way into cce_dist."""

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def output_layer(model: nn.Module) -> nn.Module | None:
    """The module that computes a model's logits: ``get_output_embeddings()``, or else ``lm_head``.

    Of a layer that PEFT keeps copies of (``modules_to_save``) the copy of the active adapter, which is what runs.

    Returns:
        None: the model has neither.

    Raises:
        ValueError: none of PEFT's copies is active, or several adapters are.
    """
    head = declared_layer(model)
    copies = getattr(head, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return head
    active = getattr(head, "active_adapters", None) or []
    if len(active) != 1 or active[0] not in copies:
        raise ValueError(
            f"PEFT keeps copies of the output layer for the adapters {list(copies)}, and {active} are active: make "
            "one of the former active with set_adapter first."
        )
    return copies[active[0]]


def running_layer(model: nn.Module) -> nn.Module | None:
    """`output_layer` as the next forward will run it: without an active copy, PEFT runs the layer that it copied."""
    head = declared_layer(model)
    copies = getattr(head, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return head
    assert head is not None
    active = getattr(head, "active_adapters", None) or []
    if getattr(head, "disable_adapters", False) or not active or active[0] not in copies:
        original: Any = head.original_module
        return original if isinstance(original, nn.Module) else head
    return copies[active[0]]


def declared_layer(model: nn.Module) -> nn.Module | None:
    """What the model itself gives for its output layer: it may be a wrapper of PEFT's."""
    model = unwrapped(model)
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    head = getattr(model, "lm_head", None) if head is None else head
    return head if isinstance(head, nn.Module) else None


def unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model
