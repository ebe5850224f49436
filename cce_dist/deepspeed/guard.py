"""What the integration refuses by name, and the check of the DeepSpeed internals that it touches."""

import warnings
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.module_inject.layers import VocabParallelLinear
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_pipeline_parallel_world_size
from packaging.version import Version
from torch import nn

from cce_dist.config import CCEConfig
from cce_dist.deepspeed.tensor_parallel import tensor_parallel_size

OLDEST_TESTED, NEWEST_TESTED = "0.19.8", "0.19.8"
"""The DeepSpeed versions that the tests ran on."""

_REMEDY = (
    f"Versions {OLDEST_TESTED} to {NEWEST_TESTED} are tested: pip install deepspeed=={NEWEST_TESTED}, or switch "
    'cce_dist off with "cce_dist": {"enabled": false}.'
)


def check_version() -> None:
    """Refuses a DeepSpeed that is too old, and warns of one that is newer than the tests.

    Raises:
        RuntimeError: names the version and the remedy.
    """
    installed = Version(deepspeed.__version__)
    if Version(installed.base_version) < Version(OLDEST_TESTED):
        raise RuntimeError(f"DeepSpeed {installed} is older than {OLDEST_TESTED}, the oldest version tested. {_REMEDY}")
    if Version(installed.base_version) > Version(NEWEST_TESTED):
        warnings.warn(
            f"DeepSpeed {installed} is newer than {NEWEST_TESTED}, the newest version that cce_dist was tested with. "
            f"The internals that it uses are checked. If training misbehaves: {_REMEDY}",
            stacklevel=4,
        )


def refuse_untested(
    config: Mapping[str, Any], arguments: Mapping[str, Any], head: nn.Linear, settings: CCEConfig
) -> None:
    """Raises NotImplementedError that lists every feature in use which cce_dist has not been tested with.

    Args:
        config: the DeepSpeed config.
        arguments: those of ``deepspeed.initialize``.
        head: the model's classifier.
    """
    model, mpu = arguments["model"], arguments.get("mpu")
    zero, tensor = _section(config, "zero_optimization"), _section(config, "tensor_parallel")
    offload_param, offload_optimizer = _section(zero, "offload_param"), _section(zero, "offload_optimizer")
    autocast = _section(config, "torch_autocast")
    stage, autotp = zero.get("stage", 0), autotp_size(config) > 1
    sequence_parallel = hasattr(mpu, "initialize_sequence_parallel") or "sequence_parallel_size" in config
    faults = {
        "a PipelineModule (the classifier lives on the last stage: call linear_cross_entropy in its loss function)": (
            isinstance(model, PipelineModule)
        ),
        "a model wrapped by torch.compile (pass the model itself)": _is_compiled(model),
        "a model that AutoTP has cut before, by deepspeed.tp_model_init or for another engine (build it anew)": (
            getattr(model, "ds_autotp_parsed", False)
        ),
        "mesh_param, or data_parallel_size in the config (pass an mpu)": (
            arguments.get("mesh_param") or "data_parallel_size" in config
        ),
        "sequence_parallel_size in the config without an mpu": "sequence_parallel_size" in config and mpu is None,
        "an mpu with pipeline parallelism": bwc_pipeline_parallel_world_size(mpu) > 1,
        "an mpu together with AutoTP": autotp and mpu is not None,
        "compile.deepcompile": _section(config, "compile").get("deepcompile"),
        "hybrid_engine.enabled": _section(config, "hybrid_engine").get("enabled"),
        "amp.enabled": _section(config, "amp").get("enabled"),
        "sparse_gradients": config.get("sparse_gradients"),
        "expert_parallel.autoep_size > 1": _section(config, "expert_parallel").get("autoep_size", 0) > 1,
        "tensor_parallel.vocab_parallel_lm_head = false (leave it out)": (
            autotp and tensor.get("vocab_parallel_lm_head") is False
        ),
        "tensor_parallel.vocab_parallel_ce_backend (the loss is cce_dist's)": (
            autotp and tensor.get("vocab_parallel_ce_backend", "torch") != "torch"
        ),
        "tensor_parallel.tp_overlap_comm": autotp and tensor.get("tp_overlap_comm"),
        "zero_optimization.zero_hpz_partition_size > 1 with tensor parallelism": (
            zero.get("zero_hpz_partition_size", 1) > 1 and (autotp or tensor_parallel_size(mpu) > 1)
        ),
        "zero_optimization.zenflow": zero.get("zenflow") is not None,
        "zero_optimization.offload_optimizer.super_offload": offload_optimizer.get("super_offload"),
        "zero_optimization.offload_optimizer.device = nvme": offload_optimizer.get("device") == "nvme",
        "zero_optimization.offload_param.device = nvme": offload_param.get("device") == "nvme",
        "zero_optimization.zero_quantized_weights": zero.get("zero_quantized_weights"),
        "zero_optimization.zero_quantized_nontrainable_weights": zero.get("zero_quantized_nontrainable_weights"),
        "zero_optimization.zero_quantized_gradients": zero.get("zero_quantized_gradients"),
        "zero_optimization.mics_shard_size": zero.get("mics_shard_size", -1) > 0,
        "torch_autocast.dtype = float16": (
            autocast.get("enabled") and str(autocast.get("dtype")) in ("fp16", "float16", "half", "torch.float16")
        ),
        "deepspeed.zero.Init with an mpu, unless each rank's part of the classifier is marked tensor_model_parallel": (
            tensor_parallel_size(mpu) > 1
            and hasattr(head.weight, "ds_id")
            and not is_model_parallel_parameter(head.weight)
        ),
    }
    if (autotp or tensor_parallel_size(mpu) > 1) and stage < 3:
        faults["cce_dist.vocab_parallel_size with tensor parallelism below stage 3 (leave it out)"] = (
            settings.vocab_parallel_size is not None
        )
    elif (settings.vocab_parallel_size or 1) > 1 and stage < 3:
        own = set(head.parameters(recurse=False))  # a shard, if an engine before has cut it
        faults |= {
            f"cce_dist.vocab_parallel_size > 1 at stage {stage} with {name}": used
            for name, used in {
                "a mixture of experts": any(not getattr(p, "allreduce", True) for p in set(model.parameters()) - own),
                "sequence parallelism": sequence_parallel,
                "a callable that makes the optimizer (pass the optimizer)": (
                    stage > 0 and not isinstance(arguments.get("optimizer"), torch.optim.Optimizer | None)
                ),
                "the optimizer Muon": str(_section(config, "optimizer").get("type")).lower() == "muon",
                "bf16 or fp16 (its clipping cannot be exact; use stage 1 or 2)": (
                    stage == 0 and any(_section(config, name).get("enabled") for name in ("bf16", "fp16"))
                ),
                "zero_optimization.elastic_checkpoint": zero.get("elastic_checkpoint"),
                "zero_optimization.round_robin_gradients": zero.get("round_robin_gradients"),
                "zero_optimization.reduce_scatter = false": zero.get("reduce_scatter") is False,
                "zero_optimization.contiguous_gradients = false": zero.get("contiguous_gradients") is False,
                "an lr_scheduler made for the optimizer (pass a callable that makes it)": (
                    stage > 0 and isinstance(arguments.get("lr_scheduler"), torch.optim.lr_scheduler.LRScheduler)
                ),
            }.items()
        }
    found = [name for name, used in faults.items() if used]
    if found:
        raise NotImplementedError(
            f"cce_dist has not been tested with, and therefore refuses: {'; '.join(found)}. Do without it, or switch "
            'cce_dist off with "cce_dist": {"enabled": false}.'
        )


def _is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` wraps the model: of what class its wrappers are is told by one that compiles nothing."""
    return isinstance(model, type(torch.compile(nn.Identity(), backend="eager")))


def autotp_size(config: Mapping[str, Any]) -> int:
    """The tensor-parallel size that AutoTP is asked for; 0 where it is not."""
    return int(_section(config, "tensor_parallel").get("autotp_size") or 0)


def check_slices(weight: Any) -> None:
    """Checks that DeepSpeed still partitions a parameter in the form that `zero3.ZeRO3Rows` relies upon.

    Raises:
        RuntimeError: names what is missing, the version and the remedy.
    """
    missing = _absent({"parameter": (weight, "ds_id ds_shape ds_numel ds_tensor ds_process_group")})
    if not missing:
        world = torch.distributed.get_world_size(weight.ds_process_group)
        if weight.ds_tensor.shape != (-(-weight.ds_numel // world),):
            missing.append("parameter.ds_tensor with ceil(numel / ranks) elements")
    _raise_if(missing)


def check_zero3(optimizer: Any) -> None:
    """The same for what `zero3.ZeRO3Owner` touches of the optimizer.

    Raises:
        RuntimeError: names what is missing, the version and the remedy.
    """
    ours = (
        "partition_grads zero_grad fp16_groups micro_step_id sequence_parallel_size reduce_scatter "
        "contiguous_gradients reduce_and_partition_stream set_gradient_accumulation_boundary _coalesce_grad_reduction"
    )
    missing = _absent({"optimizer": (optimizer, ours)})
    if not missing:
        try:
            optimizer.partition_grads([], [])
        except TypeError:
            missing.append("optimizer.partition_grads(parameters, gradients)")
    _raise_if(missing)


def check_engine_hook() -> None:
    """The same for where `experts.before_broadcast` comes in."""
    _raise_if(_absent({"DeepSpeedEngine": (DeepSpeedEngine, "_configure_distributed_model")}))


def check_experts(engine: Any) -> None:
    """The same for what `experts` touches, before a classifier is cut.

    Raises:
        RuntimeError: names what is missing, the version and the remedy.
    """
    holders: dict[str, tuple[Any, str]] = {
        "engine": (
            engine,
            "has_moe_layers client_optimizer zero_optimization buffered_allreduce_fallback clip_fp32_gradients "
            "gradient_clipping _global_grad_norm",
        ),
        "groups": (groups, "_create_expert_and_data_parallel _get_expert_parallel_group _clone_world_group"),
        "DeepSpeedZeroOptimizer": (DeepSpeedZeroOptimizer, "load_state_dict is_moe_group"),
    }
    _raise_if(_absent(holders))


def check_expert_groups(optimizer: Any, weight: Any, replicas: int) -> None:
    """Checks that the ZeRO optimizer of stage 1 or 2 reduces a shard over its replicas alone.

    Raises:
        RuntimeError: names what is missing, the version and the remedy.
    """
    names = "bit16_groups real_dp_process_group partition_count single_partition_of_fp32_groups groups_padding"
    missing = _absent({"optimizer": (optimizer, names + " dp_process_group")})
    if not missing:
        at = [i for i, group in enumerate(optimizer.bit16_groups) if any(p is weight for p in group)]
        sizes = [(optimizer.partition_count[i], optimizer.real_dp_process_group[i].size()) for i in at]
        if weight.requires_grad and sizes != [(replicas, replicas)]:
            missing.append(f"a parameter group of the shard over its {replicas} replicas")
    _raise_if(missing)


def check_autotp(model: nn.Module, head: Any) -> None:
    """The same for what `tensor_parallel` touches after AutoTP has replaced the head.

    Raises:
        RuntimeError: names what is missing, the version and the remedy.
    """
    missing = _absent({"model": (model, "loss_function _deepspeed_original_loss_function"), "head": (head, "weight")})
    if not isinstance(head, VocabParallelLinear) or not is_model_parallel_parameter(head.weight):
        missing.append("AutoTP's VocabParallelLinear as the classifier, its weight marked tensor_model_parallel")
    _raise_if(missing)


def _absent(holders: Mapping[str, tuple[Any, str]]) -> list[str]:
    return [
        f"{owner}.{name}"
        for owner, (holder, names) in holders.items()
        for name in names.split()
        if not hasattr(holder, name)
    ]


def _raise_if(missing: list[str]) -> None:
    if missing:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} lacks what cce_dist needs: {', '.join(missing)}. {_REMEDY}"
        )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}
