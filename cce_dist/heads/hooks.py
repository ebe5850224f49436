"""The hooks of a module's call: private state of torch's, touched here and nowhere else. Read on torch 2.13.

`call` runs them as `nn.Module.__call__` does, but only those that are wanted, around any function. FSDP2 and ZeRO-3
gather a module's parameters by hooks on its call: `is_of_sharding` tells theirs from those of users.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

Hook = Callable[..., Any]

_OF_A_MODULE = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_OF_ALL_MODULES = (
    "_global_forward_pre_hooks", "_global_forward_hooks", "_global_forward_hooks_with_kwargs",
    "_global_forward_hooks_always_called", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip
_SHARDING = ("torch.distributed.fsdp", "deepspeed.runtime.zero", "deepspeed.utils.nvtx")  # nvtx: of ZeRO-3, wrapped


def check_torch() -> None:
    """Looks for everything that this file uses.

    Raises:
        RuntimeError: this torch keeps hooks in another way.
    """
    probe = nn.Identity()
    missing = [name for name in _OF_A_MODULE if not hasattr(probe, name)]
    missing += [name for name in _OF_ALL_MODULES if not hasattr(torch_modules, name)]
    if missing:
        raise RuntimeError(
            f"cce_dist does not know how torch {torch.__version__} keeps the hooks of modules: {', '.join(missing)} "
            "are not there. Use torch 2.13, which it is tested on."
        )


def is_of_sharding(hook: Hook) -> bool:
    """Whether FSDP2 or ZeRO-3 put it there, to gather the module's parameters and to let them go."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or "").startswith(_SHARDING)


def is_of_users(hook: Hook) -> bool:
    return not is_of_sharding(hook)


def wants_gradients(module: nn.Module) -> bool:
    """Whether hooks wait for the gradients of the module's output or input."""
    return bool(
        module._backward_hooks
        or module._backward_pre_hooks
        or torch_modules._global_backward_hooks
        or torch_modules._global_backward_pre_hooks
    )


def call(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    wanted: Callable[[Hook], bool],
) -> Any:
    """``module(*args, **kwargs)`` with another forward, and of the forward hooks with those that are wanted."""
    if not (
        module._forward_pre_hooks
        or module._forward_hooks
        or torch_modules._global_forward_pre_hooks
        or torch_modules._global_forward_hooks
    ):
        return forward(*args, **kwargs)
    for key, hook in (*torch_modules._global_forward_pre_hooks.items(), *module._forward_pre_hooks.items()):
        if not wanted(hook):
            continue
        if key in module._forward_pre_hooks_with_kwargs:
            replaced = hook(module, args, kwargs)  # type: ignore[call-arg, arg-type]
            if replaced is not None:
                args, kwargs = replaced
        else:
            replaced = hook(module, args)  # type: ignore[arg-type]
            if replaced is not None:
                args = replaced if isinstance(replaced, tuple) else (replaced,)
    after = {
        key: hook
        for key, hook in (*torch_modules._global_forward_hooks.items(), *module._forward_hooks.items())
        if wanted(hook)
    }

    def run(key: int, result: Any) -> Any:
        with_kwargs = key in module._forward_hooks_with_kwargs or key in torch_modules._global_forward_hooks_with_kwargs
        hook: Hook = after.pop(key)
        return hook(module, args, kwargs, result) if with_kwargs else hook(module, args, result)

    result = None
    try:
        result = forward(*args, **kwargs)
        for key in list(after):
            replaced = run(key, result)
            result = result if replaced is None else replaced
        return result
    except Exception:
        always = {*module._forward_hooks_always_called, *torch_modules._global_forward_hooks_always_called}
        for key in [key for key in after if key in always]:
            try:
                run(key, result)
            except Exception as error:
                warnings.warn(f"a forward hook raised {error!r} after another error of the forward.", stacklevel=2)
        raise


def pre_hooks(module: nn.Module) -> list[Hook]:
    """The forward pre-hooks of the module itself."""
    return list(module._forward_pre_hooks.values())


def after_hooks(module: nn.Module) -> list[Hook]:
    """What runs after the module's forward."""
    return list(module._forward_hooks.values())


def remove(module: nn.Module, which: Callable[[Hook], bool]) -> None:
    """Takes forward hooks and forward pre-hooks off a module."""
    for handles in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in handles.items() if which(hook)]:
            del handles[key]
            for marks in (
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                marks.pop(key, None)
