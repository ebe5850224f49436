"""What the integration refuses by name, and the check of the DeepSpeed internals that it touches."""

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from torch import nn

from cce_dist.config import CCEConfig

OLDEST_TESTED, NEWEST_TESTED = "0.19.8", "0.19.8"
"""The DeepSpeed versions that the tests ran on."""


def refuse_untested(config: Mapping[str, Any], model: nn.Module, mpu: Any, settings: CCEConfig) -> None:
    """Raises NotImplementedError that lists every feature in use which cce_dist has not been tested with."""
    zero = _section(config, "zero_optimization")
    offload_param, offload_optimizer = _section(zero, "offload_param"), _section(zero, "offload_optimizer")
    faults = {
        "a PipelineModule (the classifier lives on the last stage: call linear_cross_entropy in its loss function)": (
            isinstance(model, PipelineModule)
        ),
        "a model wrapped by torch.compile (pass the model itself)": hasattr(model, "_orig_mod"),
        "compile.deepcompile": _section(config, "compile").get("deepcompile"),
        "hybrid_engine.enabled": _section(config, "hybrid_engine").get("enabled"),
        "tensor_parallel.autotp_size > 1": _section(config, "tensor_parallel").get("autotp_size", 0) > 1,
        "an mpu with model parallelism": _model_parallel_size(mpu) > 1,
        "zero_optimization.zenflow": zero.get("zenflow") is not None,
        "zero_optimization.offload_optimizer.super_offload": offload_optimizer.get("super_offload"),
        "zero_optimization.offload_optimizer.device = nvme": offload_optimizer.get("device") == "nvme",
        "zero_optimization.offload_param.device = nvme": offload_param.get("device") == "nvme",
        "zero_optimization.zero_quantized_weights": zero.get("zero_quantized_weights"),
        "zero_optimization.zero_quantized_nontrainable_weights": zero.get("zero_quantized_nontrainable_weights"),
        "zero_optimization.zero_quantized_gradients": zero.get("zero_quantized_gradients"),
        "cce_dist.vocab_parallel_size > 1 without zero_optimization.stage = 3": (
            (settings.vocab_parallel_size or 1) > 1 and zero.get("stage", 0) != 3
        ),
    }
    found = [name for name, used in faults.items() if used]
    if found:
        raise NotImplementedError(
            f"cce_dist has not been tested with, and therefore refuses: {'; '.join(found)}. Do without it, or switch "
            'cce_dist off with "cce_dist": {"enabled": false}.'
        )


def check_zero3(optimizer: Any, weight: Any) -> None:
    """Checks that DeepSpeed still has, in the form relied upon, everything that `zero3.ZeRO3Owner` touches.

    Raises:
        RuntimeError: names what is missing, the version and the remedy.
    """
    missing = [
        f"optimizer.{name}"
        for name in (
            "partition_grads", "zero_grad", "fp16_groups", "micro_step_id", "sequence_parallel_size", "reduce_scatter",
            "contiguous_gradients", "reduce_and_partition_stream",
        )
        if not hasattr(optimizer, name)
    ] + [
        f"parameter.{name}"
        for name in ("ds_id", "ds_shape", "ds_numel", "ds_tensor", "ds_process_group")
        if not hasattr(weight, name)
    ]  # fmt: skip
    if not missing:
        try:
            optimizer.partition_grads([], [])
        except TypeError:
            missing.append("optimizer.partition_grads(parameters, gradients)")
        world = torch.distributed.get_world_size(weight.ds_process_group)
        if weight.ds_tensor.shape != (-(-weight.ds_numel // world),):
            missing.append("parameter.ds_tensor with ceil(numel / ranks) elements")
    if missing:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} lacks what cce_dist needs: {', '.join(missing)}. Versions "
            f"{OLDEST_TESTED} to {NEWEST_TESTED} are tested: pip install deepspeed=={NEWEST_TESTED}, or switch "
            'cce_dist off with "cce_dist": {"enabled": false}.'
        )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _model_parallel_size(mpu: Any) -> int:
    if hasattr(mpu, "initialize_sequence_parallel"):  # how DeepSpeed tells sequence parallelism from the rest
        return 1
    for name in ("get_tensor_model_parallel_world_size", "get_model_parallel_world_size"):
        if hasattr(mpu, name):
            return int(getattr(mpu, name)())
    return 1
