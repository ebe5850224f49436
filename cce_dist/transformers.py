"""Hugging Face models: `patch(model)`, and a model of any architecture trains without ever computing its logits.

Only the class of the output layer changes. See `heads.lazy` for what that layer returns, and why every model's own
loss code runs on it as it is. A model may be given another output layer afterwards (the vocabulary is resized, PEFT
wraps the layer, another adapter's copy becomes active): the next forward in training notices.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cce_dist.config import CCEConfig, choose_config
from cce_dist.fsdp import adopt
from cce_dist.heads import find, hooks, lazy
from cce_dist.heads.announce import announce_active
from cce_dist.heads.find import output_layer, take_off_fp32_forward
from cce_dist.heads.lazy import (
    check_adapter,
    is_lazy,
    lazy_calls,
    make_adapted,
    make_eager,
    make_lazy,
    make_plain,
    report,
)
from cce_dist.heads.liger import refuse_liger_forward
from cce_dist.heads.owner import ModuleOwner

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model, config: CCEConfig | None = None, **settings: Any) -> Model:
    """Makes the model's output layer lazy, in place: in training, `model(..., labels=...)` computes the fused loss.

    For a model whose output layer each process holds as a whole, before or after DDP and PEFT wrap it; and for one that
    a framework (accelerate, the Trainer) has sharded by FSDP2, where it is `cce_dist.fsdp.adopt`. If the model is given
    another output layer later, a plain nn.Linear becomes lazy too when it is next trained; with any other, or one that
    is sharded, real logits are computed, which warns or raises as ``config.materialize`` says.

    Args:
        model: has ``get_output_embeddings()``, as every Hugging Face model, or wraps one that has.
        config: settings of the loss; None: the defaults. With ``enabled=False`` nothing is done.
        settings: the same by keyword, as in ``patch(model, gradient="exact")``.

    Returns:
        The model itself.

    Raises:
        ValueError: a bad setting, both config and settings, no output layer, one that is patched already, or one that
            is sharded in a way that is not supported.
        TypeError: an output layer that is not a plain nn.Linear, or has an adapter that is not plain LoRA.
    """
    config = choose_config(config, settings, where="patch")
    if config.enabled:
        refuse_liger_forward(model)
        head, declared = output_layer(model), find.declared_layer(model)
        check_adapter(declared, config)
        if config.fp32_head:
            take_off_fp32_forward(head)
        weight = getattr(head, "weight", None)
        if isinstance(weight, DTensor):
            adopt(find.unwrapped(model), head=head, config=config)
        elif getattr(weight, "ndim", 2) != 2:
            raise ValueError(
                f"the output layer of {type(model).__name__} is sharded already, by ZeRO-3 or FSDP1. With DeepSpeed "
                "call cce_dist.deepspeed.initialize in place of patch; in place of FSDP1 take FSDP2."
            )
        elif (config.vocab_parallel_size or 1) > 1:
            raise ValueError(
                f"vocab_parallel_size = {config.vocab_parallel_size}, but the output layer of {type(model).__name__} "
                "is whole on every rank. Leave it out, or shard the model with FSDP2 or DeepSpeed."
            )
        else:
            owner = ModuleOwner(head)
            make_lazy(head, owner, config)
            gradient = config.gradient_on(owner.local_weight().device)
            announce_active(f"gradient={gradient}, all {owner.shard.vocab_size} vocabulary rows on every rank")
        make_adapted(declared)
        _Watch.over(model, config, isinstance(weight, DTensor))
    return model


def unpatch(model: Model) -> Model:
    """Undoes `patch`; where a trainer of TRL's has trained the model, its forward is TRL's again.

    Raises:
        ValueError: the model is not patched, or its output layer is a shard on FSDP2's mesh.
    """
    head = output_layer(model)
    heads = [module for module in model.modules() if is_lazy(module)]  # copies of PEFT's among them
    if any("forward" in vars(module) for module in heads):
        raise ValueError("an output layer that FSDP2 has sharded cannot be unpatched: build the model anew.")
    for module in model.modules():
        make_plain(module)
    for module in heads or [head]:
        make_eager(module)
    _Watch.end(model)
    base = _base(model)
    before = getattr(vars(base).get("forward"), "_cce_before", None)  # of cce_dist.trl
    if before is not None:
        base.forward = before
    return model


@contextmanager
def fused_evaluation(model: nn.Module) -> Iterator[None]:
    """Inside, a patched model in eval mode computes its loss without logits as well; outside, it gives real logits.

    Raises:
        ValueError: the model is not patched.
    """
    for watch in _watches(model):
        watch.follow()
    head = find.running_layer(model)
    with lazy.fused_evaluation(output_layer(model) if head is None or not is_lazy(head) else head):
        yield


class _Hook:
    """A hook that hangs on a module of the user's: in a pickle, and in a copy of that module alone, it does nothing."""

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")  # takes any arguments, and needs no cce_dist where it is loaded

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return nullcontext().__exit__


class _Watch(_Hook):
    """Looks, before a model's forward in training, whether its output layer is still the one that was patched.

    It hangs on the model and on the parts that the model calls, since PEFT runs a model's forward without calling it.
    """

    def __init__(self, model: nn.Module, config: CCEConfig, is_sharded: bool) -> None:
        self._model = ref(model)
        self._config = config
        self._is_sharded = is_sharded

    @classmethod
    def over(cls, model: nn.Module, config: CCEConfig, is_sharded: bool) -> None:
        cls.end(model)
        base = _base(model)
        watch = cls(base, config, is_sharded)
        for module in _places(base):
            module.register_forward_pre_hook(watch)

    @staticmethod
    def end(model: nn.Module) -> None:
        for module in _base(model).modules():
            hooks.remove(module, lambda hook: isinstance(hook, _Watch | _PastTheLayer))

    def __call__(self, module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.follow()

    def follow(self) -> None:
        """Makes a new output layer lazy where it can be; warns or raises where it cannot."""
        model = self._model()
        head = None if model is None else find.running_layer(model)
        make_adapted(head)
        if head is None or is_lazy(head):
            return
        inner = next((module for module in head.modules() if is_lazy(module)), None)
        if inner is not None:
            if find.is_lora(head):
                return  # what it does not compute by the layer within, such as DoRA, uses that one's lazy logits
            if not any(isinstance(hook, _PastTheLayer) for hook in hooks.after_hooks(head)):
                head.register_forward_hook(_PastTheLayer(inner, self._config))
            return
        weight = getattr(head, "weight", None)
        is_whole = isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(weight, DTensor)
        if is_whole and not self._is_sharded and isinstance(head, nn.Linear):
            try:
                make_lazy(head, ModuleOwner(head), self._config)
                return
            except TypeError:
                pass  # it computes something else than F.linear
        report(
            self._config.materialize,
            f"logits are computed after all: the output layer of {type(model).__name__} is not the one that was "
            f"patched but {_named(head)}, in the forward that {{place}} calls.",
            "Change the output layer before patch, or call unpatch and patch again.",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo.get(id(self._model()))
        return super().__deepcopy__(memo) if twin is None else _Watch(twin, self._config, self._is_sharded)


class _PastTheLayer(_Hook):
    """After a wrapper around a lazy output layer has run in training: did it call the layer, or compute by itself?"""

    def __init__(self, inner: nn.Module, config: CCEConfig) -> None:
        self._inner = ref(inner)
        self._config = config
        self._calls = lazy_calls(inner)

    def __call__(self, wrapper: nn.Module, args: Any, output: Any) -> None:
        inner = self._inner()
        before, self._calls = self._calls, 0 if inner is None else lazy_calls(inner)
        trains = wrapper.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if trains and isinstance(output, Tensor) and self._calls == before:
            report(
                self._config.materialize,
                f"logits are computed after all: the output layer is wrapped in {_named(wrapper)}, which computes them "
                "past the layer that was patched, in the forward that {place} calls.",
                "Leave the output layer out of it.",
            )


def _base(model: nn.Module) -> nn.Module:
    """The model that has the output layer, inside of PEFT's."""
    model = find.unwrapped(model)
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _places(base: nn.Module) -> list[nn.Module]:
    """The model, and what its forward calls beside the output layer."""
    head = find.declared_layer(base)
    return [base, *(child for child in base.children() if child is not head)]


def _watches(model: nn.Module) -> list[_Watch]:
    return [hook for hook in hooks.pre_hooks(_base(model)) if isinstance(hook, _Watch)]


def _named(module: nn.Module) -> str:
    return f"a {type(module).__module__}.{type(module).__qualname__}"
