"""LoRA on the output layer: PEFT's wrapper around a lazy head gives lazy logits that know of the adapter.

PEFT's own forward runs, so that it alone decides which adapters are active, merged or disabled, and what dropout does:
``result + lora_B(lora_A(dropout(x))) * scaling``. Inside of it, of the product with ``lora_B`` the operands are kept in
place of logits (`LowRank`), if the layer within has just given lazy logits; their sum is lazy again.

B is the framework's parameter like any other, gathered by its hooks. What the loss takes of it are this rank's rows;
the gradient of each rank is that of its own rows, zero elsewhere, so that a sum over the ranks, which DDP, FSDP2 and
DeepSpeed make of every gradient, completes it.

Shapes: X any leading dimensions, R rank of the adapter, V rows of the classifier, Vl those of this rank.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from cce_dist.config import CCEConfig
from cce_dist.heads.find import is_lora, lora_attribute
from cce_dist.heads.lazy.form import LowRank
from cce_dist.heads.lazy.head import fused_evaluation, is_lazy, lazy_calls, shard_of
from cce_dist.heads.lazy.logits import LazyLogits
from cce_dist.heads.lazy.source import version_of
from cce_dist.loss import TokenLogprobs
from cce_dist.shard import VocabShard


def check_adapter(layer: nn.Module | None, config: CCEConfig) -> None:
    """Of an output layer with LoRA; None, or another layer, is fine.

    Raises:
        TypeError: its active adapter is more than LoRA.
        ValueError: ``config`` has what a loss with an adapter refuses.
    """
    if layer is None or not is_lora(layer):
        return
    for key, asked in (("fp32_head", config.fp32_head), ("workspace_mb", config.workspace_mb == "logits")):
        if asked:
            raise ValueError(
                f"{key}={getattr(config, key)!r} does not go with a LoRA adapter on the output layer: leave it out, "
                "merge the adapter, or leave the output layer out of the adapter's target_modules."
            )
    for name in lora_attribute(layer, "active_adapters"):
        if name not in lora_attribute(layer, "lora_B"):
            continue
        variant = lora_attribute(layer, "lora_variant").get(name)
        what = None if variant is None else f"the variant {type(variant).__name__}"
        what = "a bias of its own (lora_bias)" if lora_attribute(layer, "lora_bias").get(name) else what
        if what is not None:
            raise TypeError(
                f"the adapter {name!r} on the output layer has {what}, which cce_dist does not compute without logits: "
                "use plain LoRA there, leave the output layer out of the adapter's target_modules, merge the adapter, "
                "or train a copy of the layer (modules_to_save)."
            )


def make_adapted(layer: nn.Module | None) -> None:
    """Swaps the class of PEFT's LoRA layer around a lazy head: where the head gives `LazyLogits`, so does it. Of
    another layer, or one that is adapted already, nothing is done. Hooks and state_dict stay as they are.

    Raises:
        TypeError: its ranks share a classifier by tensor parallelism, whose gradients nobody sums.
    """
    if layer is None or isinstance(layer, _Adapted) or not is_lora(layer):
        return
    head = lora_attribute(layer, "base_layer")
    if not is_lazy(head):
        return
    shard = shard_of(head)
    if shard.vocab_group is not None and (shard.token_group is None or shard.replica_group is not None):
        raise TypeError(
            "a LoRA adapter on an output layer that tensor parallelism shards is not supported: each rank would find "
            "the gradient of its own rows of lora_B alone. Leave the output layer out of the adapter's target_modules."
        )
    stock = type(layer)
    layer.__class__ = type(f"CCE{stock.__name__}", (_Adapted, stock), {"_cce_stock": stock})


def make_plain(layer: nn.Module) -> None:
    """Undoes `make_adapted`, if it has been here."""
    if isinstance(layer, _Adapted):
        cast(Any, layer).__class__ = layer._cce_stock


class _Adapted(nn.Module):
    """Goes before the class of PEFT's LoRA layer."""

    _cce_stock: ClassVar[type[nn.Module]]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        forward: Callable[..., Any] = super().forward
        of_batch = kwargs.get("adapter_names") is not None  # one for each sequence: their logits are put together
        has_variant = any(name in self.lora_variant for name in self.active_adapters)  # type: ignore[operator, union-attr]
        if of_batch or has_variant:
            return forward(x, *args, **kwargs)
        return _forward(self, forward, x, args, kwargs)

    def logprobs(self, hidden: Tensor, labels: Tensor, **settings: Any) -> TokenLogprobs:
        """As those of a lazy head, of the logits with the adapter.

        Raises:
            RuntimeError: a call of this layer computes logits, for a reason that has been told.
        """
        with fused_evaluation(cast(nn.Module, self.base_layer)):
            logits = self(hidden)
        if not isinstance(logits, LazyLogits):
            raise RuntimeError(f"logprobs() of this {self._cce_stock.__name__} would compute logits: see the warning.")
        return logits.logprobs(labels, **settings)

    def __reduce_ex__(self, protocol: Any) -> Any:
        construct, args, *state = cast(tuple[Any, ...], super().__reduce_ex__(min(protocol, 1)))
        return (construct, (self._cce_stock, *args[1:]), *state)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        twin = memo[id(self)] = self._cce_stock.__new__(self._cce_stock)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        make_adapted(twin)
        return twin


@torch.compiler.disable(reason="an adapter's product is left out while PEFT's forward runs")
def _forward(layer: Any, forward: Callable[..., Any], x: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Any:
    ups = [up for up in layer.lora_B.values() if "forward" not in vars(up)]
    calls = lazy_calls(layer.base_layer)
    for up in ups:
        up.forward = partial(_kept, up, layer.base_layer, calls)
    try:
        return forward(x, *args, **kwargs)
    finally:
        for up in ups:
            del up.forward


def _kept(up: Any, head: nn.Module, calls: int, a_XR: Tensor) -> Any:
    """The forward of a lora_B inside of its layer's: what it would multiply, if the head has given lazy logits since
    ``calls``."""
    if lazy_calls(head) == calls or up.bias is not None or isinstance(a_XR, DTensor):
        return type(up).forward(up, a_XR)
    rows_VR = _own_rows(up.weight, shard_of(head))
    return LowRank(a_XR, rows_VR, 1.0, up, version_of(rows_VR))


def _own_rows(weight_VR: Tensor, shard: VocabShard) -> Tensor:
    """The shard's rows [Vl, R], a copy: what a framework has gathered it may let go of after the layer's forward. In
    one process they are the parameter."""
    if shard.vocab_group is None:
        return weight_VR
    rows_VR = torch.cat([weight_VR[:0], *(weight_VR[start:stop] for start, stop in shard.runs)])
    return F.pad(rows_VR, (0, 0, 0, shard.num_rows - rows_VR.shape[0]))
