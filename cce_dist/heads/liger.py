"""A loss of Liger's or unsloth's in place of a model's forward or of F.cross_entropy: cce_dist would do nothing.

In go a Trainer's arguments, or a model; out comes an error that says how to leave that loss out, or nothing.
"""

import inspect
from typing import Any

from torch import nn

_REMEDY = (
    "leave Liger out, or let it have its other kernels alone: "
    'liger_kernel_config={"fused_linear_cross_entropy": False, "cross_entropy": False}.'
)

_REMEDIES = {
    "liger_kernel": _REMEDY,
    "unsloth": "load the model with transformers, in a process that has not imported unsloth, or leave cce_dist out.",
}


def refuse_liger_arguments(args: Any) -> None:
    """Looks at a Trainer's arguments.

    Raises:
        ValueError: they ask for a loss of Liger's.
    """
    kernels = getattr(args, "liger_kernel_config", None) or {}
    fused = kernels.get("fused_linear_cross_entropy", True) or kernels.get("cross_entropy", False)
    if getattr(args, "use_liger_kernel", False) and fused:
        raise ValueError(
            f"use_liger_kernel=True with liger_kernel_config={kernels or None} makes Liger compute the loss, past the "
            f"output layer that cce_dist patches: {_REMEDY}"
        )
    if getattr(args, "use_liger_loss", False):
        raise ValueError(
            "use_liger_loss=True makes Liger compute the loss, and cce_dist nothing: leave one of them out."
        )


def refuse_liger_forward(model: nn.Module) -> None:
    """Looks at the forward of the model, and of those that it wraps.

    Raises:
        ValueError: it is Liger's, or unsloth's.
    """
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if not callable(getter) or getter() is None:
            continue
        forward: Any = inspect.unwrap(getattr(module.forward, "__func__", module.forward))
        package = str(getattr(forward, "__module__", "")).split(".")[0]
        if package in _REMEDIES:
            raise ValueError(
                f"the forward of {type(module).__name__} is {forward.__module__}.{forward.__qualname__}, which "
                f"computes the loss past the output layer that cce_dist patches: {_REMEDIES[package]}"
            )
