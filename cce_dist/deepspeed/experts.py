"""ZeRO-0, 1 and 2: DeepSpeed keeps the classifier's shard as it keeps experts.

To DeepSpeed a shard is what an expert is: a parameter that differs between the ranks of a group and is replicated over
the ranks at the same place of other groups. It reduces such a gradient over the replicas alone and divides it by all
data-parallel ranks, which is right for the shard of a loss that sums over its group's tokens. What DeepSpeed's expert
path gets wrong for a shard is done here: checkpoints (rank 0's rows only) and, at stage 0, the norm for clipping
(averaged over ranks). The attributes of DeepSpeed that this touches are checked in `guard.check_experts`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor, nn

from cce_dist.deepspeed.guard import check_engine_hook, check_expert_groups, check_experts
from cce_dist.deepspeed.sharded import CutClassifierOwner, cut_before, shard_classifier


@contextmanager
def before_broadcast(act: Callable[[Any], None]) -> Iterator[None]:
    """Inside, a new engine calls ``act(engine)`` when it knows its groups but has not broadcast its model yet."""
    check_engine_hook()
    stock = DeepSpeedEngine._configure_distributed_model

    def with_act(engine: Any, model: nn.Module) -> None:
        act(engine)
        stock(engine, model)

    DeepSpeedEngine._configure_distributed_model = with_act
    try:
        yield
    finally:
        DeepSpeedEngine._configure_distributed_model = stock


def shard_as_expert(engine: Any, model: nn.Module, head: nn.Linear, size: int) -> CutClassifierOwner:
    """Cuts the classifier over each run of ``size`` consecutive ranks; called by an engine before it broadcasts.

    A classifier that an engine before has cut in the same way stays as it is.

    Raises:
        ValueError: ``size`` does not divide the ranks, and what `shard_classifier` raises.
    """
    check_experts(engine)
    world = dist.get_world_size()
    if world % size:
        raise ValueError(f"cce_dist.vocab_parallel_size must divide the {world} data-parallel ranks, got {size}.")
    groups._create_expert_and_data_parallel(size)
    name = f"ep_size_{size}"
    group = groups._get_expert_parallel_group(name)
    before = cut_before(head)
    if before is not None and before.shard.vocab_group is not group:
        raise ValueError(
            "an engine before has cut this model's classifier over ranks of a process group that is no more: build the "
            "model anew for another engine."
        )
    owner = before or shard_classifier(model, head, group, group, groups._clone_world_group())
    for parameter in head.parameters(recurse=False):
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = name  # type: ignore[attr-defined]
    if engine.zero_optimization() and any(p.requires_grad for p in head.parameters(recurse=False)):
        engine.has_moe_layers = True  # for the optimizer that the engine makes next
        if isinstance(engine.client_optimizer, torch.optim.Optimizer):
            _split_groups(engine.client_optimizer.param_groups, set(head.parameters(recurse=False)), name)
    return owner


def named_groups(parameters: Iterable[Any]) -> list[Any]:
    """Parameter groups as DeepSpeed needs them to take experts out: lists, each with a name of its own."""
    found = list(parameters)
    if not found or not isinstance(found[0], dict):
        return found
    return [
        {**group, "params": list(group["params"]), "name": f"{group.get('name', 'group')}-{index}"}
        for index, group in enumerate(found)
    ]


def _split_groups(param_groups: list[dict[str, Any]], shards: set[nn.Parameter], name: str) -> None:
    """Moves the shards of a client's optimizer into groups of their own, with the settings that they had."""
    for group in list(param_groups):
        mine = [parameter for parameter in group["params"] if parameter in shards]
        if mine:
            group["params"] = [parameter for parameter in group["params"] if parameter not in shards]
            param_groups.append({**group, "params": mine, "name": name, "moe": True})


def finish(engine: Any, owner: CutClassifierOwner) -> None:
    """What remains once the engine is made: reduction, norm and checkpoints.

    Raises:
        RuntimeError: DeepSpeed's optimizer has not taken the shard for what it is.
        NotImplementedError: the engine wraps the optimizer in one that treats shards in another way.
    """
    if engine.zero_optimization():
        if type(engine.optimizer) is not DeepSpeedZeroOptimizer:
            raise NotImplementedError(
                f"cce_dist.vocab_parallel_size > 1 was tested with DeepSpeedZeroOptimizer only, not with "
                f"{type(engine.optimizer).__name__}. For bf16 take stage 2, or "
                '"data_types": {"grad_accum_dtype": "bf16"}.'
            )
        replicas = dist.get_world_size() // dist.get_world_size(owner.shard.vocab_group)
        check_expert_groups(engine.optimizer, owner.head.weight, replicas)
        engine.has_moe_layers = False  # save and load are those of a plain model, whose state dict has all rows
        _check_checkpoints(engine.optimizer)
        return
    stock_reduce = engine.buffered_allreduce_fallback

    def reduce(*args: Any, **kwargs: Any) -> None:
        engine.has_moe_layers = True
        try:
            stock_reduce(*args, **kwargs)
        finally:
            engine.has_moe_layers = False

    engine.buffered_allreduce_fallback = reduce
    engine.clip_fp32_gradients = lambda: _clip(engine, owner)
    _keep_all_rows(engine.basic_optimizer, owner)


def _clip(engine: Any, owner: CutClassifierOwner) -> None:
    """Clips at stage 0 by the true norm: of the shards, the sum over the group."""
    shards = {id(p) for p in owner.head.parameters(recurse=False)}
    grads = {id(p): p.grad for p in engine.module.parameters() if p.grad is not None}
    own = [grad for key, grad in grads.items() if key in shards]
    rest = [grad for key, grad in grads.items() if key not in shards]
    squared = nn.utils.get_total_norm(own).square() if own else torch.zeros((), device=engine.device)
    dist.all_reduce(squared, group=owner.shard.vocab_group)
    norm = (squared + nn.utils.get_total_norm(rest).square()).sqrt()
    for parameter_grads in grads.values():
        parameter_grads.mul_(torch.clamp(engine.gradient_clipping() / (norm + 1e-6), max=1.0))
    engine._global_grad_norm = norm


def _keep_all_rows(optimizer: torch.optim.Optimizer, owner: CutClassifierOwner) -> None:
    """The state dict of a plain optimizer holds all rows of its moments, so that a checkpoint is a stock one."""
    shapes = {id(p): p.shape for p in owner.head.parameters(recurse=False)}

    def positions() -> dict[int, torch.Size]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return {index: shapes[id(p)] for index, p in enumerate(parameters) if id(p) in shapes}

    def change(state_dict: dict[str, Any], rows: Callable[[Tensor], Tensor], whole: bool) -> dict[str, Any]:
        states = dict(state_dict["state"])
        for index, own_shape in positions().items():
            shape = torch.Size((owner.shard.vocab_size, *own_shape[1:])) if whole else own_shape
            moments = states.get(index, {}).items()
            states[index] = {k: rows(v) if isinstance(v, Tensor) and v.shape == shape else v for k, v in moments}
        return {**state_dict, "state": states}

    optimizer.register_state_dict_post_hook(lambda _, state: change(state, owner.all_rows, whole=False))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: change(state, owner.own_rows, whole=True))


def _check_checkpoints(optimizer: Any) -> None:
    """Refuses ZeRO state that was written for other shards: DeepSpeed would pad or cut what does not fit."""
    stock_load = optimizer.load_state_dict

    def load(state_dict_list: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("checkpoint_folder"):
            raise NotImplementedError(
                "universal checkpoints cannot be loaded with cce_dist.vocab_parallel_size > 1 at ZeRO stages 1 and 2. "
                "Load the weights alone, load_module_only=True, or use stage 3."
            )
        state = state_dict_list[dist.get_rank(optimizer.dp_process_group)]
        written = state["partition_count"], [part.numel() for part in state["single_partition_of_fp32_groups"]]
        parts = zip(optimizer.single_partition_of_fp32_groups, optimizer.groups_padding, strict=True)
        expected = optimizer.partition_count, [part.numel() - padding for part, padding in parts]
        if written != expected:
            raise ValueError(
                "the optimizer state of this checkpoint was written with another vocab_parallel_size or number of "
                f"ranks, or without cce_dist: (partitions, elements) by parameter group are {written}, expected "
                f"{expected}. Load it with the settings that it was written with, or its weights alone: "
                "load_checkpoint(..., load_module_only=True)."
            )
        stock_load(state_dict_list, *args, **kwargs)

    optimizer.load_state_dict = load
