"""Entry: reads the section "cce_dist" of the DeepSpeed config and gives the engine's model its classifier."""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import deepspeed
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

from cce_dist.config import CCEConfig, misspelt_section
from cce_dist.deepspeed import experts, tensor_parallel
from cce_dist.deepspeed.guard import (
    autotp_size,
    check_autotp,
    check_slices,
    check_version,
    check_zero3,
    refuse_untested,
)
from cce_dist.deepspeed.sharded import CutClassifierOwner, GatheringOwner, cut_before
from cce_dist.deepspeed.zero3 import ZeRO3Owner, ZeRO3Rows, vocab_group_size
from cce_dist.heads.announce import announce_active
from cce_dist.heads.find import declared_layer, is_lora, output_layer, take_off_fp32_forward
from cce_dist.heads.lazy import check_adapter, make_adapted, make_eager, make_lazy
from cce_dist.heads.liger import refuse_liger_forward, watch_trl_forward
from cce_dist.heads.owner import ModuleOwner, ShardOwner

SECTION = "cce_dist"

_stock_initialize = deepspeed.initialize


@functools.wraps(_stock_initialize, assigned=())
def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize``, with a vocabulary-parallel classifier if the config has a section "cce_dist".

    The section's keys are the fields of `cce_dist.CCEConfig`; it is read from ``config``, ``config_params`` or
    ``args.deepspeed_config``. Without it, or with ``"enabled": false``, this is exactly ``deepspeed.initialize``.

    ZeRO-3: each rank's own slice of the classifier is its vocabulary shard, and an untied classifier is never gathered
    in training. Stages 0 to 2: the replicated classifier with the fused loss, whose logits never exist; with
    ``"vocab_parallel_size": n`` the classifier, its gradient and its work are sharded over each n consecutive ranks,
    and `state_dict`, `save_checkpoint` and a forward in evaluation are then collective. Tensor parallelism (AutoTP, or
    an ``mpu``): the classifier is a vocabulary shard of the tensor-parallel group, at every stage.

    Args:
        *args, **kwargs: those of ``deepspeed.initialize``. The model's classifier is ``get_output_embeddings()`` or
            ``lm_head``; of a layer in PEFT's ``modules_to_save``, the active adapter's copy.

    Returns:
        engine, optimizer, dataloader, scheduler.

    Raises:
        ValueError: for an unknown key or bad value in the section, or a model without a classifier.
        NotImplementedError: for DeepSpeed features that cce_dist has not been tested with, by name.
        RuntimeError: where DeepSpeed's internals are not those of a tested version.
    """
    arguments = inspect.signature(_stock_initialize).bind_partial(*args, **kwargs).arguments
    config, source = _config(arguments)
    if SECTION not in config:
        if (key := misspelt_section(config)) is not None:  # DeepSpeed ignores what it does not know
            raise ValueError(f'{source} has the section "{key}", which nothing reads: its name is "{SECTION}".')
        return _stock_initialize(*args, **kwargs)
    settings = CCEConfig.from_mapping(config[SECTION], where=f'the section "{SECTION}" of {source}')
    if not settings.enabled:
        return _stock_initialize(*args, **kwargs)
    model, mpu = arguments["model"], arguments.get("mpu")
    if declared_layer(model) is None and not _trains(arguments, config):  # a reward model, say, with a policy's config
        return _stock_initialize(*args, **kwargs)
    check_version()
    refuse_liger_forward(model)
    head = _classifier(model)
    _check_adapter(model, config, mpu, settings)
    _check_cut_before(config, head, mpu, settings)
    refuse_untested(config, arguments, head, settings)
    if autotp_size(config) > 1:
        arguments = _with_vocab_parallel_head(arguments, config)
    cut = _how_to_cut(config, model, head, mpu, settings)
    if cut is None:
        engine, optimizer, loader, scheduler = _stock_initialize(**arguments)
        _attach(engine, None, settings)
    else:
        made: list[CutClassifierOwner] = []
        if arguments.get("model_parameters") is not None:
            arguments = {**arguments, "model_parameters": experts.named_groups(arguments["model_parameters"])}
        with experts.before_broadcast(lambda engine: made.append(cut(engine))):
            engine, optimizer, loader, scheduler = _stock_initialize(**arguments)
        _attach(engine, made[0], settings)
    return engine, optimizer, loader, scheduler


def install() -> None:
    """Makes ``deepspeed.initialize`` itself honour the section: for accelerate, HF Trainer, existing scripts."""
    deepspeed.initialize = initialize


def uninstall() -> None:
    """Undoes `install`; a config with the section then makes ``deepspeed.initialize`` warn."""
    deepspeed.initialize = _stock_initialize_that_warns


def installed() -> bool:
    """Whether ``deepspeed.initialize`` honours the section now: `install` was called, and nothing replaced it since."""
    return deepspeed.initialize is initialize


@functools.wraps(_stock_initialize)
def _stock_initialize_that_warns(*args: Any, **kwargs: Any) -> Any:
    """``deepspeed.initialize`` while `install` has not been called: stock DeepSpeed ignores unknown sections."""
    arguments = inspect.signature(_stock_initialize).bind_partial(*args, **kwargs).arguments
    config, source = _config(arguments)
    trains = arguments.get("optimizer") is not None or "optimizer" in config  # a reference model has none
    if trains and SECTION in config and CCEConfig.from_mapping(config[SECTION], SECTION).enabled:
        warnings.warn(
            f'the section "{SECTION}" of {source} has no effect: DeepSpeed\'s own initialize ignores it. '
            "Call cce_dist.deepspeed.install() before, or cce_dist.deepspeed.initialize in its place.",
            stacklevel=2,
        )
    return _stock_initialize(*args, **kwargs)


if deepspeed.initialize is _stock_initialize:
    deepspeed.initialize = _stock_initialize_that_warns


def _config(arguments: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The DeepSpeed config, found where ``deepspeed.initialize`` finds it, and how to call it in an error."""
    args = arguments.get("args")
    for config in (
        arguments.get("config"),
        arguments.get("config_params"),
        getattr(args, "deepspeed_config", None),
        getattr(args, "deepscale_config", None),
    ):
        if config is not None:
            return load_ds_config(config), config if isinstance(config, str) else "the DeepSpeed config"
    return {}, ""


def _trains(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether the engine is to have an optimizer."""
    given = (arguments.get("optimizer"), arguments.get("model_parameters"), config.get("optimizer"))
    return any(x is not None for x in given)


def _classifier(model: nn.Module) -> nn.Linear:
    remedy = f'remove the section "{SECTION}" of the DeepSpeed config.'
    head = output_layer(model, f"Give it one of the two, or {remedy}")
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} must have its classifier, an nn.Linear, as get_output_embeddings() or as lm_head; "
            f"got {type(head).__name__}. Leave adapters other than LoRA off it, or {remedy}"
        )
    return head


def _check_adapter(model: nn.Module, config: Mapping[str, Any], mpu: Any, settings: CCEConfig) -> None:
    """A LoRA adapter on the classifier: its parameters' gradients are those that DeepSpeed averages over all ranks."""
    layer = declared_layer(model)
    check_adapter(layer, settings)
    if layer is None or not is_lora(layer):
        return
    if autotp_size(config) > 1 or tensor_parallel.tensor_parallel_size(mpu) > 1:
        raise TypeError(
            "a LoRA adapter on the output layer is not supported with tensor parallelism: leave the output layer out "
            "of the adapter's target_modules."
        )


def _with_vocab_parallel_head(arguments: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Asks AutoTP for a vocabulary-parallel head; it leaves the head whole, or gathers its logits, by itself."""
    tensor = {**config["tensor_parallel"], "vocab_parallel_lm_head": True}
    changed = {**arguments, "config": {**config, "tensor_parallel": tensor}, "config_params": None}
    if hasattr(arguments.get("args"), "deepspeed_config"):
        changed["args"] = copy.copy(arguments["args"])
        changed["args"].deepspeed_config = None
    return changed


def _how_to_cut(
    config: Mapping[str, Any], model: nn.Module, head: nn.Linear, mpu: Any, settings: CCEConfig
) -> Callable[[Any], CutClassifierOwner] | None:
    """What cuts a whole classifier into rows while the engine is made; None where it stays, or is cut already."""
    if tensor_parallel.tensor_parallel_size(mpu) > 1:
        if tensor_parallel.is_cut(head):
            return None
        return lambda engine: tensor_parallel.cut_over(mpu, model, head)
    size = settings.vocab_parallel_size or 1
    if size == 1 or config.get("zero_optimization", {}).get("stage", 0) == 3:
        return None
    return lambda engine: experts.shard_as_expert(engine, model, head, size)


def _check_cut_before(config: Mapping[str, Any], head: nn.Linear, mpu: Any, settings: CCEConfig) -> None:
    """A classifier that an engine before has cut is a shard of the same kind and size for this engine too."""
    before = cut_before(head)
    if before is None or (tensor_parallel.tensor_parallel_size(mpu) > 1 and tensor_parallel.is_cut(head)):
        return
    group, size = before.shard.vocab_group, settings.vocab_parallel_size or 1
    assert group is not None
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage == 3 or size != group.size() or tensor_parallel.is_cut(head):
        raise ValueError(
            f"an engine before has cut this model's classifier over {group.size()} ranks, and this rank holds "
            f"{before.shard.num_rows} of its {before.shard.vocab_size} rows; another engine at stage {stage} with "
            f"cce_dist.vocab_parallel_size = {size} needs it otherwise. Give it the settings of the one before, or "
            "build the model anew."
        )


def _attach(engine: Any, cut: CutClassifierOwner | None, settings: CCEConfig) -> None:
    """Gives the engine's model its lazy head; also one that trains nothing, as a reference model's, which gives real
    logits until it is asked for a fused evaluation."""
    model = engine.module
    head: Any = output_layer(model)
    trains = hasattr(engine.optimizer, "step")
    rows: GatheringOwner | None = cut
    if tensor_parallel.tensor_parallel_size(engine.mpu) > 1:
        if engine.autotp_size() > 1:
            check_autotp(model, head)
            tensor_parallel.take_loss_back(model)
        rows = cut or tensor_parallel.rows_of(head, engine.mpu)
    elif cut is not None and trains:
        experts.finish(engine, cut)
    if settings.fp32_head:
        take_off_fp32_forward(head)
    if isinstance(getattr(vars(head).get("forward"), "__self__", None), GatheringOwner):
        del head.forward  # of an engine that the same model had before, as is its being lazy
    with suppress(ValueError):
        make_eager(head)
    owner: ShardOwner | None = None
    if engine.zero_optimization_stage() == 3:
        # Of too few rows for the ranks: an engine that trains nothing stays DeepSpeed's.
        if trains or head.weight.ds_shape[0] >= head.weight.ds_process_group.size():
            owner = _zero3_owner(engine, head, settings, rows)
    else:
        owner = ModuleOwner(head) if rows is None else rows
    if owner is not None:
        make_lazy(head, owner, settings, tensor_parallel.linear_class(head))
        make_adapted(declared_layer(model))
        watch_trl_forward(model, head, settings.materialize)
    if trains and owner is not None:
        engine.compile = _refuse_compile
        announce_active(_describe(engine, owner, settings))
    if rows is not None:
        head.forward = rows.logits


def _zero3_owner(engine: Any, head: Any, settings: CCEConfig, rows: GatheringOwner | None) -> ZeRO3Rows:
    optimizer, weight = engine.optimizer, head.weight
    check_slices(weight)
    size = settings.vocab_parallel_size or vocab_group_size(
        weight.ds_process_group.size(), weight.ds_shape[0], settings.max_tokens, weight.element_size()
    )
    tensor_parallel_rows = None if rows is None else rows.shard
    if not hasattr(optimizer, "step"):
        return ZeRO3Rows(head, size, tensor_parallel_rows)
    if type(optimizer) is not DeepSpeedZeroOptimizer_Stage3:
        raise NotImplementedError(
            f"cce_dist was tested with ZeRO-3's own optimizer only, not with {type(optimizer).__name__}."
        )
    check_zero3(optimizer)
    return ZeRO3Owner(engine, head, size, tensor_parallel_rows)


def _refuse_compile(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(
        f'engine.compile() has not been tested with cce_dist: drop the call, or the section "{SECTION}" of the config.'
    )


def _describe(engine: Any, owner: ShardOwner, settings: CCEConfig) -> str:
    shard = owner.shard
    group = 1 if shard.vocab_group is None else shard.vocab_group.size()
    tensor = tensor_parallel.tensor_parallel_size(engine.mpu)
    return (
        f"ZeRO stage {engine.zero_optimization_stage()}, "
        f"{f'tensor parallelism over {tensor}, ' if tensor > 1 else ''}"
        f"gradient={settings.gradient_on(engine.device)}, "
        f"{shard.vocab_size} vocabulary rows over {group} rank(s), {shard.num_rows} of them on rank 0"
    )
