"""Where a model has its head, the output layer, and what shares the classifier with it.

One answer for plain models, DDP, PEFT's wrappers and every way into cce_dist.

In goes a model; out come the module that is its head, and the modules that hold a parameter of it too.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def output_layer(
    model: nn.Module, remedy: str = "Give it one of the two.", error: type[Exception] = ValueError
) -> nn.Module:
    """The module that computes a model's logits: ``get_output_embeddings()``, or else ``lm_head``.

    Of a layer that PEFT keeps copies of (``modules_to_save``) the copy of the active adapter, which is what runs; of
    one with LoRA adapters the layer within.

    Args:
        model: a Hugging Face model or one like it, also inside of DDP and PEFT.
        remedy: what else the caller can do for a model without one.
        error: what to raise then.

    Raises:
        ValueError: none of PEFT's copies is active, or several adapters are; the model has no output layer.
    """
    head = declared_layer(model)
    if head is None:
        raise error(
            "model must have an output layer that get_output_embeddings() returns, as ...ForCausalLM models do, or "
            f"that is its lm_head; {type(unwrapped(model)).__name__} has none. {remedy}"
        )
    if is_lora(head):
        inner: nn.Module = lora_attribute(head, "base_layer")
        return inner
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


def take_off_fp32_forward(head: nn.Module) -> None:
    """TRL's ``cast_lm_head_to_fp32`` gives the output layer a forward in fp32: what the setting ``fp32_head`` means."""
    forward: Any = vars(head).get("forward")
    if getattr(forward, "__name__", "") == "cast_forward_to_fp32" and forward.__module__.startswith("trl."):
        del head.forward


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


def is_lora(layer: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA layer around an nn.Linear that is not quantised."""
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(layer).__mro__}
    return "peft.tuners.lora.layer.Linear" in names and isinstance(lora_attribute(layer, "base_layer"), nn.Linear)


def lora_attribute(layer: nn.Module, name: str) -> Any:
    """What PEFT's LoRA layer keeps under this name.

    Raises:
        RuntimeError: a PEFT whose layers keep it in another way.
    """
    try:
        return getattr(layer, name)
    except AttributeError as error:
        version = getattr(sys.modules.get("peft"), "__version__", "of an unknown version")
        raise RuntimeError(
            f"cce_dist does not know how a LoRA layer of PEFT {version} works: it has no {name}. Use PEFT 0.21, which "
            "it is tested on, or leave the output layer out of the adapter's target_modules."
        ) from error


def unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def holders(model: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    """Every module of a model that has this parameter, with the name it has there."""
    return [
        (module, name)
        for module in model.modules()
        for name, own in module.named_parameters(recurse=False, remove_duplicate=False)
        if own is parameter
    ]


def tied_to(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """The other modules of a model that hold the head's weight."""
    weight: Any = head.weight
    return list(dict.fromkeys(module for module, _ in holders(model, weight) if module is not head))


def registered(module: nn.Module, name: str) -> Tensor | None:
    """A parameter as the module keeps it: read as an attribute, one that FSDP2 or ZeRO-3 shards may be gathered.

    Raises:
        RuntimeError: a torch whose modules keep their parameters in another way.
    """
    parameters: dict[str, Tensor | None] | None = getattr(module, "_parameters", None)
    if parameters is None:
        raise RuntimeError(
            f"cce_dist does not know where modules of torch {torch.__version__} keep their parameters: _parameters is "
            "not there. Use torch 2.13, which it is tested on."
        )
    return parameters.get(name)
