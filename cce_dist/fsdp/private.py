"""FSDP2's private state, touched here and nowhere else. Known on torch 2.8 to 2.15; `check_torch` refuses others.

This project's tests have run on torch 2.13; of the other versions, what is used here was looked up or tried apart from
them, but for ``mesh_info``, which is not known of 2.14 and later: there `check_torch` has to speak.

FSDP2 keeps the parameters of a `fully_shard` call as FSDPParams in FSDPParamGroups, which it all-gathers before a
module's forward and whose gradients it reduces after its backward.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def check_torch(mesh: DeviceMesh) -> None:
    """Looks for everything that this file uses on a one-weight module; makes no collective.

    Raises:
        RuntimeError: this torch keeps FSDP2's state in another way.
    """
    probe: nn.Module = nn.utils.skip_init(
        nn.Linear, 1, 1, bias=False
    )  # an initialisation would take from the random state
    fully_shard(probe, mesh=mesh)
    assert isinstance(probe, FSDPModule)
    try:
        probe.set_gradient_divide_factor(3.0)
        (group,) = param_groups(probe)
        (fsdp_param,) = group.fsdp_params
        known = group.gradient_divide_factor == 3.0 and _holders(fsdp_param) == [probe] and callable(group.lazy_init)
        state = _state(probe)
        known = (
            known and state._is_root is None and hasattr(group.mp_policy, "param_dtype") and fsdp_mesh(group) == mesh
        )
        known = known and state._state_ctx.iter_forward_root is None and probe in state._modules and not in_backward()
        _drop(state, group)
        known = known and not param_groups(probe)
        known = known and callable(no_torch_function) and hasattr(torch.Tensor, "_make_wrapper_subclass")
    except (AttributeError, TypeError, ValueError):
        known = False
    if not known:
        raise RuntimeError(
            f"cce_dist.fsdp does not know how FSDP2 of torch {torch.__version__} keeps its parameters. Use torch 2.13, "
            "which it is tested on, or a cce_dist.ShardedCCEHead, its parameters in fully_shard(ignored_params=)."
        )


def param_groups(module: nn.Module) -> list[Any]:
    """The FSDPParamGroups of the `fully_shard` call that took this very module; empty where there was none."""
    if not isinstance(module, FSDPModule):
        return []
    state = _state(module)
    if hasattr(state, "_fsdp_param_groups"):  # torch 2.12 and later
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def governing_group(modules: Iterable[nn.Module]) -> Any | None:
    """The first FSDPParamGroup of these modules: it has the user's ``gradient_divide_factor`` and ``mp_policy``."""
    return next((group for module in modules for group in param_groups(module)), None)


def holding_group(model: nn.Module, head: nn.Module) -> Any | None:
    """The FSDPParamGroup that has parameters of the head; None where FSDP manages none."""
    groups = (group for module in model.modules() for group in param_groups(module))
    return next((group for group in groups if any(head in _holders(p) for p in group.fsdp_params)), None)


def fsdp_mesh(group: Any) -> DeviceMesh:
    """The mesh that `fully_shard` was given: without the dimension of tensor parallelism.

    Raises:
        ValueError: `fully_shard` was given that one too, and told which dimensions are data-parallel.
    """
    if getattr(group.mesh_info, "is_spmd_mesh", False):
        raise ValueError(
            "the head is sharded by fully_shard(..., dp_mesh_dims=...), which has every tensor of the model as a "
            "DTensor over all dimensions of the mesh; that is not supported. Give fully_shard the mesh of the "
            "data-parallel dimensions alone; in torchtitan: parallelism.spmd_backend = 'partial_dtensor'."
        )
    mesh: DeviceMesh = group.mesh_info.mesh
    return mesh


def forward_root(modules: Iterable[nn.Module]) -> nn.Module | None:
    """The outermost FSDP module whose forward is in progress, in the tree of the first FSDP module of these."""
    state = next((_state(module) for module in modules if isinstance(module, FSDPModule)), None)
    root = None if state is None else state._state_ctx.iter_forward_root
    return None if root is None else root._modules[0]


def in_backward() -> bool:
    """Whether this thread runs a backward: what computes anything there is a recomputation of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def reshard(model: nn.Module) -> None:
    """Brings back the sharded parameters where a forward left them unsharded, as the root's does."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def release(model: nn.Module, head: nn.Module) -> None:
    """Takes the head's parameters out of FSDP's unshard and reduce cycle; they stay the sharded DTensors that they are.

    Raises:
        ValueError: no FSDP group of the model manages all parameters of the head.
    """
    released = 0
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in param_groups(module):
            mine = [fsdp_param for fsdp_param in group.fsdp_params if head in _holders(fsdp_param)]
            if not mine:
                continue
            for fsdp_param in mine:
                group.fsdp_params.remove(fsdp_param)
            released += len(mine)
            if not group.fsdp_params:
                _drop(_state(module), group)
            elif _state(module)._is_root is not None:
                group.lazy_init()  # idempotent; what it derived from the parameters is derived anew
    expected = len(list(head.parameters(recurse=False)))
    if released != expected:
        raise ValueError(
            f"FSDP2 manages {released} of the {expected} parameters of the head. Call fully_shard on the model first, "
            "with the head's parameters trainable or frozen alike but not in ignored_params."
        )


def is_of_tensor_parallelism(function: Callable[..., Any]) -> bool:
    """Whether torch's `parallelize_module` has put this forward hook on a module, or torchtitan's this forward."""
    return getattr(function, "__qualname__", "").startswith(("distribute_module.", "Module.parallelize."))


no_torch_function: Any = getattr(torch._C, "_disabled_torch_function_impl", None)
"""``__torch_function__`` of a tensor subclass that leaves all to its ``__torch_dispatch__``."""


def without_elements(cls: type, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of the subclass that has no memory: only what it is of, and where."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]


def _state(module: FSDPModule) -> Any:
    return module._get_fsdp_state()  # type: ignore[attr-defined]


def _holders(fsdp_param: Any) -> list[nn.Module]:
    info = fsdp_param._module_info
    return [info.module, *info.shared_modules]


def _drop(state: Any, group: Any) -> None:
    if hasattr(state, "_fsdp_param_groups"):
        state._fsdp_param_groups.remove(group)
    else:
        state._fsdp_param_group = None
