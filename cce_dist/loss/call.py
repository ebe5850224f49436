"""The start of a call: its arguments are checked, the ranks' hosts agree on it, its tokens are made flat.

In: what a public function got. Out: the arguments of `autograd.LinearCrossEntropy`. Nothing is computed on a device,
and no rank waits for one that raised.

Shapes: n tokens of this rank, D hidden, V local rows of the classifier.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from cce_dist.loss.autograd import Call
from cce_dist.loss.frequent import counted_with, counts_of
from cce_dist.loss.settings import (
    FunctionSettings,
    LogprobSettings,
    Method,
    TokenSettings,
    alike_of,
    at_temperature,
    check_adapter,
    check_head,
    check_label_tensor,
    check_labels,
    check_plain,
    check_settings,
    check_temperatures,
    contract,
    contract_of_head,
    resolve,
    workspace_bytes,
)
from cce_dist.loss.tokens import held, redistributed, shifted
from cce_dist.shard import VocabShard
from cce_dist.shard.agreement import agree
from cce_dist.shard.rows import local_rows


class Inputs(NamedTuple):
    """The arguments of `LinearCrossEntropy`."""

    hidden_nD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    call: Call
    adapter_nR: Tensor | None = None
    adapter_VR: Tensor | None = None


def begin(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    shard: VocabShard | None,
    given: Mapping[str, Any],
    kind: type[TokenSettings],
    what: str,
    counted: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
) -> tuple[Inputs, Tensor]:
    """What can be computed now, and the labels, all of them. See `linear_cross_entropy`, whose arguments and errors
    these are.

    Args:
        kind: of the settings that are given.
        what: is computed, as the ranks agree on it.
        counted: what the classifier is known by, where labels are counted; None: ``weight``.
    """
    counted = weight if counted is None else counted
    shard = _shard_of(shard, weight)
    weight_VD, bias_V = local_rows(weight), local_rows(bias)
    checked: tuple[TokenSettings, Method, Tensor | None] | None = None
    fault: Exception | None = None
    labels_n: Tensor | None = None
    tokens, equal, in_parts = 0, {}, False
    try:
        settings = check_settings(given, kind)
        hidden, labels, in_parts = held(hidden, labels, shard)
        check_head(hidden, weight_VD, bias_V, shard)
        check_label_tensor(labels, hidden, hidden.device)
        if adapter is not None:
            check_adapter(adapter, hidden, weight_VD, settings)
        tokens = labels.numel()
        hidden = hidden if settings.fp32_head else autocast(hidden)
        needs_grad = any(x is not None and x.requires_grad for x in (hidden, weight_VD, bias_V, *(adapter or ())))
        method = resolve(settings, hidden, labels, shard, needs_grad and torch.is_grad_enabled())
        is_frozen = needs_grad and torch.is_grad_enabled() and not weight.requires_grad
        if getattr(settings, "grad_accumulator", None) is not None and is_frozen:
            raise ValueError("grad_accumulator goes with a weight that requires a gradient; got one that does not.")
        equal = {
            **contract(hidden, weight_VD, bias_V, shard, settings, method, adapter),
            "tokens are in a DTensor's parts": in_parts,
        }
        if method.frequent_rows:
            equal["what labels are counted with"] = counted_with(counted, shard)
        if shard.token_group is None:
            workspace_bytes(settings.workspace_mb, method, tokens, hidden.element_size())
        if not isinstance(labels, DTensor):
            labels_n = _flat_labels(labels, settings, shard)
        settings, temperature_n = _with_temperature(settings, hidden, labels)
        checked = settings, method, temperature_n
    except Exception as error:
        fault = error  # told to every rank, and raised there
    most = agree(
        shard,
        what,
        tokens,
        equal,
        fault,
        every_call=given.get("agreement") != "first_call",
        counts=_counts(kind, given),
    )
    assert checked is not None
    settings, method, temperature_n = checked
    if in_parts:
        hidden, labels = redistributed(hidden), redistributed(labels)
    if labels_n is None:
        labels_n = _flat_labels(labels, settings, shard)
    counts = counts_of(counted, shard, hidden.device) if method.frequent_rows else None
    call = Call(labels_n, shard, settings, method, most, torch.is_grad_enabled(), counts, temperature_n=temperature_n)
    if isinstance(settings, LogprobSettings):
        call = call._replace(entropy=settings.entropy, exact_sums=settings.exact_sums)
    inputs = Inputs(hidden.reshape(-1, hidden.shape[-1]), weight_VD, bias_V, call)
    if adapter is not None:
        adapter_nR = adapter[0].to(hidden.dtype).reshape(-1, adapter[0].shape[-1])
        inputs = inputs._replace(adapter_nR=adapter_nR, adapter_VR=adapter[1])
    return inputs, labels


Kind = TypeVar("Kind", bound=FunctionSettings)


@dataclass(frozen=True)
class Head(Generic[Kind]):
    """Hidden states and rows of a call that the ranks have agreed on. ``most``: tokens that any rank brings."""

    hidden_nD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    shard: VocabShard
    settings: Kind
    most: int


def begin_without_labels(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shard: VocabShard | None,
    given: Mapping[str, Any],
    kind: type[Kind],
    what: str,
    also: Callable[[Kind, VocabShard], tuple[int, Mapping[str, Any]]] | None = None,
    of: str = "",
) -> Head[Kind]:
    """The start of a call whose hidden states have no labels; under autocast they are cast.

    Args:
        kind: of the settings that are given.
        what: is computed, as the ranks agree on it.
        also: checks what else the call was given; the number of tokens, and what else must be equal on all ranks. None:
            all hidden states are tokens.
        of: how the arguments' names begin.
    """
    shard = _shard_of(shard, weight)
    weight_VD, bias_V = local_rows(weight), local_rows(bias)
    number, equal, settings = 0, {}, None
    fault: Exception | None = None
    try:
        settings = check_settings(given, kind)
        check_plain(f"{of}hidden", hidden)
        check_head(hidden, weight_VD, bias_V, shard, of)
        hidden = autocast(hidden)
        number, more = also(settings, shard) if also is not None else (hidden.shape[:-1].numel(), {})
        equal = {**contract_of_head(hidden, weight_VD, bias_V, shard), **alike_of(settings), **more}
    except Exception as error:
        fault = error  # told to every rank, and raised there
    most = agree(shard, what, number, equal, fault, counts=_counts(kind, given))
    assert settings is not None
    return Head(hidden.reshape(-1, hidden.shape[-1]), weight_VD, bias_V, shard, settings, most)


def autocast(hidden: Tensor) -> Tensor:
    """In the autocast dtype, where that is on."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return hidden


def _counts(kind: type[TokenSettings | FunctionSettings], given: Mapping[str, Any]) -> bool:
    """Whether the count group's valid tokens are to be counted."""
    is_mean = "reduction" in kind.model_fields and given.get("reduction", "mean") == "mean"
    return is_mean and given.get("num_valid_tokens") is None


def _shard_of(shard: Any, weight: Any) -> VocabShard:
    """Raises TypeError for one that is none."""
    if shard is not None and not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a VocabShard or None, got {type(shard).__name__}.")
    return shard if shard is not None else own_shard(weight)


def _flat_labels(labels: Tensor, settings: TokenSettings, shard: VocabShard) -> Tensor:
    """Shifted labels [n], int64, on a CPU checked."""
    labels_n = shifted(labels.long(), settings.shift, settings.ignore_index).reshape(-1)
    if not labels_n.is_cuda:  # else the gathered ones, on every rank
        check_labels(labels_n, settings.ignore_index, shard.vocab_size)
    return labels_n


def _with_temperature(settings: TokenSettings, hidden: Tensor, labels: Tensor) -> tuple[TokenSettings, Tensor | None]:
    """A temperature that all tokens share goes into scale and softcap; else one for each token [n].

    Raises:
        ValueError: a tensor that does not fit the labels; on a CPU, one that is not positive.
    """
    if not isinstance(settings, LogprobSettings):
        return settings, None
    temperature = settings.temperature
    if not isinstance(temperature, Tensor):
        if temperature == 1.0:
            return settings, None
        scale, cap = at_temperature(settings.scale, settings.softcap, temperature)
        return settings.model_copy(update={"logit_scale": scale, "softcap": cap}), None
    if isinstance(labels, DTensor):
        raise ValueError("temperature must be a float where labels are a DTensor's parts.")
    if isinstance(temperature, DTensor):
        raise ValueError("temperature must be a float or a plain tensor, got a DTensor: pass its to_local().")
    shape = list(labels.shape)
    if temperature.device != hidden.device:
        raise ValueError(f"temperature must be on {hidden.device}, as hidden is; got {temperature.device}.")
    try:
        each = temperature.expand(labels.shape)
    except RuntimeError as error:
        raise ValueError(
            f"temperature must have the labels' shape {shape}, or one that broadcasts to it, got "
            f"{list(temperature.shape)}."
        ) from error
    temperature_n = each.reshape(-1).to(torch.promote_types(hidden.dtype, torch.float32))
    if not temperature_n.is_cuda:  # else the gathered ones, on every rank
        check_temperatures(temperature_n)
    return settings, temperature_n


_dtensor_shards: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The shards of DTensors, by mesh and shape: ranks compare rows at the first use of a shard. Nothing hangs on the
parameters and meshes, which users save."""


def own_shard(weight: Any) -> VocabShard:
    """The shard of a classifier that comes without one."""
    if not isinstance(weight, DTensor):
        rows = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim else 1
        return VocabShard.whole(max(rows, 1))
    shards = _dtensor_shards.setdefault(weight.device_mesh, {})
    key = weight.shape, tuple(weight.placements)
    # torch hands an equal mesh of an earlier run of init_process_group out again, with new groups.
    if key not in shards or shards[key].vocab_group is not weight.device_mesh.get_group():
        shards[key] = VocabShard.from_dtensor(weight)
    return shards[key]
