"""The loss as one operator of a graph that torch.compile makes: nothing of it is traced, nothing breaks the graph.

In: what `linear_cross_entropy` got, while torch.compile traces. Out: what it returns. The operator takes tensors and
numbers; what else a call is (shard, settings) has a number in ``_calls``. When it runs, it is the function that runs
without torch.compile, checks and agreement of the ranks included, on leaves of its own; the tensors that backward needs
stay with autograd's graph of these leaves, which ``_runs`` keeps for as long as the operator's last output lives, and
the second operator walks that graph.

Shapes: L labels along the last axis, D hidden, V local rows of the classifier.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cce_dist.loss.cross_entropy import cross_entropy
from cce_dist.shard import VocabShard

_OF_AUTOGRAD = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")
# An operator's own code runs where torch records nothing for autograd; torch's higher-order operators lift that so.
try:
    _included, _excluded = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
    _KeyGuard = torch._C._ForceDispatchKeyGuard
    _KEYS = [getattr(torch._C.DispatchKey, name) for name in _OF_AUTOGRAD]
except AttributeError as error:
    raise ImportError(
        f"torch {torch.__version__} has no guard of dispatch keys that cce_dist knows: {error}. Use torch 2.13, which "
        "it is tested on."
    ) from error


class _Call(NamedTuple):
    """What a call is apart from its tensors; ``settings`` by name."""

    shard: VocabShard | None
    settings: tuple[tuple[str, Any], ...]


class _Run(NamedTuple):
    """A forward that backward may come to: its leaves (hidden, weight, bias) and (loss, lse)."""

    leaves: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, Tensor]


_calls: dict[int, _Call] = {}
_numbers: dict[tuple[int, tuple[tuple[str, Any], ...]], int] = {}
_runs: dict[int, _Run] = {}
_HIDDEN, _WEIGHT, _BIAS = 1, 2, 4
"""Bits of ``needs``: of what a gradient is needed; ``_GRAD``: the caller's gradients are enabled."""
_GRAD = 8


def linear_cross_entropy_in_graph(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    shard: VocabShard | None,
    return_lse: bool,
    settings: dict[str, Any],
) -> Any:
    """Traced by torch.compile. See `linear_cross_entropy`; a setting that is no tensor is part of the graph."""
    of_dtensors = isinstance(hidden, DTensor) or isinstance(weight, DTensor) or isinstance(bias, DTensor)
    if of_dtensors or settings.get("statistics") or settings.get("grad_accumulator") is not None:
        return cross_entropy(hidden, weight, labels, bias, shard, return_lse, settings)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    tensors = {name: x for name, x in settings.items() if isinstance(x, Tensor)}
    others = {name: x for name, x in settings.items() if not isinstance(x, Tensor)}
    count = others.pop("num_valid_tokens", None)  # often another one at each step: a number of the operator's
    needs = _HIDDEN * hidden.requires_grad + _WEIGHT * weight.requires_grad
    needs += _BIAS * (bias is not None and bias.requires_grad) + _GRAD * torch.is_grad_enabled()
    loss, lse, _ = _forward(
        hidden,
        weight,
        labels,
        bias,
        tensors.get("class_weights"),
        tensors.get("token_weights"),
        tensors.get("num_valid_tokens"),
        tensors.get("seed"),
        -1 if count is None else count,
        needs,
        settings.get("shift", 0),
        settings.get("reduction", "mean") == "none",
        _number_of(shard, tuple(others.items())),
    )
    return (loss, lse) if return_lse else loss


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _number_of(shard: VocabShard | None, settings: tuple[tuple[str, Any], ...]) -> int:
    """Of what a call is; equal calls have one number. The graph holds it, so that it is never given away."""
    key = id(shard), settings
    number = _numbers.setdefault(key, len(_numbers))
    _calls[number] = _Call(shard, settings)  # which keeps the shard, and so its id
    return number


@torch.library.custom_op("cce_dist::linear_cross_entropy", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    token_weights: Tensor | None,
    num_valid_tokens: Tensor | None,
    seed: Tensor | None,
    count: int,
    needs: int,
    shift: int,
    of_tokens: bool,
    call: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse, 0): the last one's memory is the name of the run.

    Args:
        count: num_valid_tokens as an int; -1: none.
        needs: see `_HIDDEN`.
        shift, of_tokens: of the settings, what outputs' shapes depend on.
        call: see `_number_of`.
    """
    shard, settings = _calls[call]
    given = {"class_weights": class_weights, "token_weights": token_weights, "seed": seed}
    given["num_valid_tokens"] = num_valid_tokens if count < 0 else count  # type: ignore[assignment]
    given = {name: x for name, x in given.items() if x is not None}
    own_hidden, own_weight = _leaf(hidden, needs & _HIDDEN), _leaf(weight, needs & _WEIGHT)
    own_bias = None if bias is None else _leaf(bias, needs & _BIAS)
    with _recording(bool(needs & _GRAD)):
        loss, lse = cross_entropy(own_hidden, own_weight, labels, own_bias, shard, True, {**dict(settings), **given})
    name = torch.zeros((), dtype=torch.int64)
    if loss.requires_grad:
        _runs[name.data_ptr()] = _Run((own_hidden, own_weight, own_bias), (loss, lse))
        weakref.finalize(name, _runs.pop, name.data_ptr())
    return loss.detach().contiguous(), lse.detach().contiguous(), name


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    shift, of_tokens, _ = rest[-3:]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    lse = hidden.new_empty((*labels.shape[:-1], labels.shape[-1] - shift) if labels.ndim else (), dtype=dtype)
    loss = torch.empty_like(lse) if of_tokens else lse.new_empty(())
    return loss, lse, torch.empty((), dtype=torch.int64)


@torch.library.custom_op("cce_dist::linear_cross_entropy_backward", mutates_args=())
def _backward(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    name: Tensor,
    needs: int,
) -> list[Tensor]:
    """The gradients that ``needs`` names, in the order of hidden, weight, bias; whose shapes these have."""
    run = _runs.get(name.data_ptr())
    if run is None:
        raise RuntimeError(
            "the loss of this graph has no forward to go back to: its last output was copied, or the graph was run in "
            "another process. Call linear_cross_entropy outside of what does that."
        )
    pairs = [(x, grad) for x, grad in zip(run.outputs, (grad_loss, grad_lse), strict=True) if grad is not None]
    wanted = [x for x in run.leaves if x is not None and x.requires_grad]
    with _recording(False):
        outputs, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, wanted, grads, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(wanted, found, strict=True)]


@_backward.register_fake
def _(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    name: Tensor,
    needs: int,
) -> list[Tensor]:
    asked = ((hidden, _HIDDEN), (weight, _WEIGHT), (bias, _BIAS))
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x, bit in asked if x is not None and needs & bit
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, _, bias, *_, needs, _, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(hidden, weight, bias, output[2])
    ctx.needs = needs


def _go_back(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, name = ctx.saved_tensors
    found = iter(_backward(grad_loss, grad_lse, hidden, weight, bias, name, ctx.needs))
    of_hidden, of_weight, of_bias = (next(found) if ctx.needs & bit else None for bit in (_HIDDEN, _WEIGHT, _BIAS))
    return of_hidden, of_weight, None, of_bias, *(None,) * 9


_forward.register_autograd(_go_back, setup_context=_keep)


def _leaf(x: Tensor, needs_grad: int) -> Tensor:
    """Which needs a gradient or not, as the caller's does. A parameter as it is: labels are counted by it."""
    return x if x.requires_grad == bool(needs_grad) and x.is_leaf else x.detach().requires_grad_(bool(needs_grad))


@contextmanager
def _recording(grad: bool) -> Iterator[None]:
    """As outside of an operator: with autograd, which records if ``grad``."""
    excluded = _excluded()
    for key in _KEYS:
        excluded = excluded.remove(key)
    with _KeyGuard(_included(), excluded), torch.set_grad_enabled(grad):
        yield
