"""A loss of Liger's, unsloth's or TRL's in place of a model's forward or of F.cross_entropy: cce_dist would do nothing.

In go a Trainer's arguments, or a model; out comes an error that says how to leave that loss out, or nothing.
"""

import inspect
from functools import partial
from typing import Any

from torch import nn

from cce_dist.heads import hooks
from cce_dist.heads.lazy import report, shard_of

_REMEDY = (
    "leave Liger out, or let it have its other kernels alone: "
    'liger_kernel_config={"fused_linear_cross_entropy": False, "cross_entropy": False}.'
)

_REMEDIES = {  # by the beginning of a module's name: unsloth also has unsloth_zoo and unsloth_compiled_module_llama
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
        module_name = str(getattr(forward, "__module__", ""))
        remedy = next((text for package, text in _REMEDIES.items() if module_name.startswith(package)), None)
        if remedy is not None:
            raise ValueError(
                f"the forward of {type(module).__name__} is {module_name}.{forward.__qualname__}, which "
                f"computes the loss past the output layer that cce_dist patches: {remedy}"
            )


def watch_trl_forward(model: nn.Module, head: nn.Module, materialize: str) -> None:
    """Has each forward of an engine's model looked at: TRL's own would compute with the rows that this rank holds."""
    hooks.remove(model, lambda hook: getattr(hook, "func", None) is _refuse_trl_forward)
    model.register_forward_pre_hook(partial(_refuse_trl_forward, head, materialize), with_kwargs=True)


def _refuse_trl_forward(head: Any, materialize: str, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raises ValueError for a part of the rows; otherwise reports it as ``materialize`` says.

    ``fused_lm_head`` is the argument by which a trainer of TRL's asks for the loss of the forward that it has replaced.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not kwargs.get("fused_lm_head") or hasattr(base.forward, "_cce_before"):  # cce_dist.trl's is around it
        return
    what = "TRL's trainer computes the loss from lm_head.weight itself, past the output layer"
    remedy = "Give it callbacks=[CCECallback()], which takes effect when train() begins."
    rows = shard_of(head)
    is_gathered = hasattr(head.weight, "ds_id")  # by ZeRO-3, for each use
    if not is_gathered and head.weight.shape[0] != rows.vocab_size:
        raise ValueError(f"{what}, of which this rank holds {head.weight.shape[0]} of {rows.vocab_size} rows. {remedy}")
    report(materialize, f"{what}, so that cce_dist does nothing for it.", remedy)
