"""Tensor parallelism: the classifier is a shard of the tensor-parallel group, whose ranks all bring the same tokens.

Its rows come from AutoTP's vocabulary-parallel head, from a model that is sharded already (its weight is marked
``tensor_model_parallel``), or from a classifier that every rank has as a whole and that is cut here.
"""

from typing import Any

import torch.distributed as dist
from deepspeed.module_inject.layers import VocabParallelLinear
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils.bwc import (
    bwc_tensor_model_parallel_group,
    bwc_tensor_model_parallel_world_size,
)
from torch import nn

from cce_dist.deepspeed.sharded import CutClassifierOwner, GatheringOwner, shard_classifier
from cce_dist.shard import VocabShard


def tensor_parallel_size(mpu: Any) -> int:
    """Ranks that share one model, by the ``mpu`` given to DeepSpeed; 1 for one of sequence parallelism."""
    if mpu is None or hasattr(mpu, "initialize_sequence_parallel"):  # so does DeepSpeed tell them apart
        return 1
    return int(bwc_tensor_model_parallel_world_size(mpu))


def cut_over(mpu: Any, model: nn.Module, head: nn.Linear) -> CutClassifierOwner:
    """Cuts a classifier that each rank of the tensor-parallel group has as a whole; before the engine broadcasts."""
    owner = shard_classifier(model, head, bwc_tensor_model_parallel_group(mpu), None, mpu.get_data_parallel_group())
    for parameter in head.parameters(recurse=False):
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # each rank's part counts in the norm
    return owner


def is_cut(head: nn.Module) -> bool:
    """Whether the head holds the rows of one tensor-parallel rank."""
    return bool(is_model_parallel_parameter(head.weight))


def rows_of(head: nn.Module, mpu: Any) -> GatheringOwner:
    """The rows of a head that is sharded already; collective over the tensor-parallel group.

    Args:
        head: AutoTP's VocabParallelLinear, or a module whose weight [R, D] holds the rank's run of rows.
        mpu: the engine's.
    """
    group = bwc_tensor_model_parallel_group(mpu)
    weight: Any = head.weight
    sizes: list[Any] = [None] * dist.get_world_size(group)
    rows = weight.ds_shape[0] if hasattr(weight, "ds_shape") else weight.shape[0]
    dist.all_gather_object(sizes, rows, group=group)
    start = sum(sizes[: dist.get_rank(group)])
    shard = VocabShard(((start, start + rows),), sum(sizes), group, count_group=mpu.get_data_parallel_group())
    return GatheringOwner(head, shard, sizes)


def linear_class(head: nn.Module) -> type[nn.Module]:
    """The class whose forward computes the head's logits."""
    return VocabParallelLinear if isinstance(head, VocabParallelLinear) else nn.Linear


def take_loss_back(model: nn.Module) -> None:
    """Gives a model the loss that it had before AutoTP installed one on local logits: ours runs inside that."""
    model.loss_function = model._deepspeed_original_loss_function
