"""Entry: reads the section "cce_dist" of the DeepSpeed config and gives the engine's model its classifier."""

import functools
import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import deepspeed
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils.logging import print_dist
from torch import nn

from cce_dist.config import CCEConfig
from cce_dist.deepspeed.guard import check_zero3, refuse_untested
from cce_dist.deepspeed.zero3 import ZeRO3Owner
from cce_dist.lazy_logits import make_eager, make_lazy
from cce_dist.owner import ModuleOwner, ShardOwner

SECTION = "cce_dist"

_stock_initialize = deepspeed.initialize


@functools.wraps(_stock_initialize, assigned=())
def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize``, with a vocabulary-parallel classifier if the config has a section "cce_dist".

    The section's keys are the fields of `cce_dist.CCEConfig`; it is read from ``config``, ``config_params`` or
    ``args.deepspeed_config``. Without it, or with ``"enabled": false``, this is exactly ``deepspeed.initialize``.

    ZeRO-3: each rank's own slice of the classifier is its vocabulary shard, and the classifier is never gathered in
    training. Stages 0 to 2: the replicated classifier with the fused loss, whose logits never exist.

    Args:
        *args, **kwargs: those of ``deepspeed.initialize``. The model's classifier is ``get_output_embeddings()`` or
            ``lm_head``.

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
        return _stock_initialize(*args, **kwargs)
    settings = CCEConfig.from_mapping(config[SECTION], where=f'the section "{SECTION}" of {source}')
    if not settings.enabled:
        return _stock_initialize(*args, **kwargs)
    model = arguments["model"]
    refuse_untested(config, model, arguments.get("mpu"), settings)
    head = _classifier(model)
    engine, optimizer, loader, scheduler = _stock_initialize(*args, **kwargs)
    _attach(engine, head, settings)
    return engine, optimizer, loader, scheduler


def install() -> None:
    """Makes ``deepspeed.initialize`` itself honour the section: for accelerate, HF Trainer, existing scripts."""
    global _stock_initialize
    if deepspeed.initialize is not initialize:
        _stock_initialize = deepspeed.initialize
        deepspeed.initialize = initialize


def uninstall() -> None:
    """Gives ``deepspeed.initialize`` back."""
    if deepspeed.initialize is initialize:
        deepspeed.initialize = _stock_initialize


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


def _classifier(model: nn.Module) -> nn.Linear:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} must have its classifier, an nn.Linear, as get_output_embeddings() or as lm_head; "
            f'got {type(head).__name__}. Add one of the two, or remove the section "{SECTION}" of the DeepSpeed config.'
        )
    return head


def _attach(engine: Any, head: nn.Linear, settings: CCEConfig) -> None:
    if not hasattr(engine.optimizer, "step"):
        print_dist("cce_dist is not active: this engine has no optimizer, so nothing is trained.", ranks=[0])
        return
    owner: ShardOwner
    if engine.zero_optimization_stage() == 3:
        if type(engine.optimizer) is not DeepSpeedZeroOptimizer_Stage3:
            raise NotImplementedError(
                f"cce_dist was tested with ZeRO-3's own optimizer only, not with {type(engine.optimizer).__name__}."
            )
        check_zero3(engine.optimizer, head.weight)
        owner = ZeRO3Owner(engine.optimizer, head, settings.vocab_parallel_size)
    else:
        owner = ModuleOwner(head)
    with suppress(ValueError):  # lazy already: the same model had an engine before
        make_eager(head)
    make_lazy(head, owner, settings)
    engine.compile = _refuse_compile
    print_dist(_describe(engine, owner, settings), ranks=[0])


def _refuse_compile(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(
        f'engine.compile() has not been tested with cce_dist: drop the call, or the section "{SECTION}" of the config.'
    )


def _describe(engine: Any, owner: ShardOwner, settings: CCEConfig) -> str:
    shard = owner.shard
    group = 1 if shard.vocab_group is None else shard.vocab_group.size()
    return (
        f"cce_dist is active: ZeRO stage {engine.zero_optimization_stage()}, gradient={settings.gradient}, "
        f"{shard.vocab_size} vocabulary rows over {group} rank(s), {shard.num_rows} of them on rank 0"
    )
