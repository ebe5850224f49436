"""The loss as one operator of a graph that torch.compile makes: nothing of it is traced, nothing breaks the graph.

In: what `linear_cross_entropy` got, while torch.compile traces. Out: what it returns. The operator takes tensors and
numbers; what else a call is has a number in ``_calls``. When it runs, it is the function that runs without
torch.compile, checks and agreement of the ranks included, on leaves of its own. What backward needs stays with the
graph of these leaves, which ``_runs`` keeps for as long as the operator's last output lives, and the second operator
walks that graph.

A compiler may write over what goes into an operator and comes out of it as soon as its graph needs it no more. So a run
holds no memory of either: of hidden, weight and bias, which autograd's own graph keeps or recomputes, it knows where it
would read, and gets them again in backward; the rest, a few numbers a token, is copied.

Shapes: L labels along the last axis, D hidden, V local rows of the classifier.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.distributed.tensor import DTensor

from cce_dist.loss.cross_entropy import cross_entropy
from cce_dist.shard import VocabShard

_OF_AUTOGRAD = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")
_OF_TENSORS = ("class_weights", "token_weights", "num_valid_tokens", "seed")
"""Settings that may be tensors."""
_HIDDEN, _WEIGHT, _BIAS, _GRAD = 1, 2, 4, 8
"""Bits of ``needs``: of what a gradient is needed, and whether the caller's gradients are enabled."""


class _Call(NamedTuple):
    """What a call is apart from its tensors and numbers.

    Attributes:
        shard: its name.
        names: of the settings that are tensors, floats and ints, in this order.
        settings: the others.
    """

    shard: str | None
    names: tuple[tuple[str, ...], ...]
    settings: tuple[tuple[str, Any], ...]


class _Known(NamedTuple):
    """Where a tensor lies: its memory, its first element and the one after its last."""

    where: int
    dtype: torch.dtype
    first: int
    end: int
    stride: tuple[int, ...]


def _known(x: Tensor) -> _Known:
    first, steps = int(x.storage_offset()), zip(x.shape, x.stride(), strict=True)
    where = x.untyped_storage().data_ptr() if x.numel() else 0
    return _Known(where, x.dtype, first, first + sum((size - 1) * step for size, step in steps) + 1, x.stride())


class _Given:
    """Tensors of a call, and where a graph would read them: it holds none of their memory.

    ``tensors``: backward puts them here while it runs.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors: Sequence[Tensor | None] = ()
        self._known = [None if x is None else _known(x) for x in tensors]

    def pack(self, saved: Tensor) -> "Tensor | _Place":
        """One that lies within a tensor that was given, its place there; of several the one with which it begins."""
        own, found = _known(saved), None
        for number, known in enumerate(self._known):
            is_there = own.where and known is not None and (known.where, known.dtype) == (own.where, own.dtype)
            if is_there and known is not None and known.first <= own.first and own.end <= known.end:
                place = _Place(number, saved.shape, saved.stride(), own.first - known.first)
                found = place if found is None or not place.offset else found
        return saved if found is None else found

    def unpack(self, packed: "Tensor | _Place") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        x, known = self.tensors[packed.number], self._known[packed.number]
        assert x is not None and known is not None
        if x.stride() != known.stride:
            x = torch.empty_strided(x.shape, known.stride, dtype=x.dtype, device=x.device).copy_(x)
        return x.as_strided(packed.size, packed.stride, x.storage_offset() + packed.offset)


class _Run(NamedTuple):
    """A forward that backward may come to.

    Attributes:
        given: hidden, weight and bias.
        edges: where their gradients come out, of those that need one.
        outputs: (loss, lse).
    """

    given: _Given
    edges: list[GradientEdge]
    outputs: tuple[Tensor, Tensor]


class _Place(NamedTuple):
    """Where a saved tensor lies in one that was given, from its first element on."""

    number: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Enter(torch.autograd.Function):
    """A tensor as it is, in a graph that does not hold it, as a leaf would; ``anchor`` needs a gradient, and gets
    none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:  # type: ignore[override]
        return None, None


_calls: dict[int, _Call] = {}
_runs: dict[int, _Run] = {}


def linear_cross_entropy_in_graph(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    shard: VocabShard | None,
    return_lse: bool,
    settings: dict[str, Any],
    adapter: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """Traced by torch.compile. See `linear_cross_entropy`; numbers among the settings may change from call to call.

    Raises:
        NotImplementedError: while torch.export traces, whose program would need this process.
    """
    if _exports():
        raise NotImplementedError("linear_cross_entropy cannot be exported: it is for training, by torch.compile.")
    tensors = {name: x for name, x in settings.items() if isinstance(x, Tensor)}
    of_dtensors = isinstance(hidden, DTensor) or isinstance(weight, DTensor) or isinstance(bias, DTensor)
    others_train = any(x.requires_grad for x in tensors.values())
    if adapter is not None or of_dtensors or others_train or settings.get("statistics"):
        return cross_entropy(hidden, weight, labels, bias, shard, return_lse, settings, adapter=adapter)
    if not set(tensors) <= set(_OF_TENSORS):
        return cross_entropy(hidden, weight, labels, bias, shard, return_lse, settings)
    casts = torch.is_autocast_enabled(hidden.device.type) and not settings.get("fp32_head", False)
    if casts and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    floats = {name: x for name, x in settings.items() if isinstance(x, float)}
    ints = {name: x for name, x in settings.items() if isinstance(x, int) and not isinstance(x, bool)}
    numbered = {**tensors, **floats, **ints, "statistics": ()}
    others = tuple((name, x) for name, x in settings.items() if name not in numbered)
    needs = _HIDDEN * hidden.requires_grad + _WEIGHT * weight.requires_grad
    needs += _BIAS * (bias is not None and bias.requires_grad) + _GRAD * torch.is_grad_enabled()
    loss, lse, _ = _forward(
        hidden,
        weight,
        labels,
        bias,
        list(tensors.values()),
        list(floats.values()),
        list(ints.values()),
        needs,
        ints.get("shift", 0),
        settings.get("reduction", "mean") == "none",
        _number_of(None if shard is None else shard.name, (tuple(tensors), tuple(floats), tuple(ints)), others),
    )
    return (loss, lse) if return_lse else loss


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _exports() -> bool:
    """Asked while tracing and not by what is traced, for which torch 2.11 takes every compilation for an export."""
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _number_of(shard: str | None, names: tuple[tuple[str, ...], ...], settings: tuple[tuple[str, Any], ...]) -> int:
    """Of what a call is; equal calls have one number. The graph holds it, so that it is never given away."""
    call = _Call(shard, names, settings)
    number = hash(call) % 2**62  # another one in another process, which then does not take one call for another
    _calls[number] = call
    return number


_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("nondeterministic_seeded", "cudagraph_unsafe") if hasattr(torch.Tag, name)
)


@torch.library.custom_op("cce_dist::linear_cross_entropy", mutates_args=(), tags=_TAGS)
def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    floats: Sequence[float],
    ints: Sequence[int],
    needs: int,
    shift: int,
    of_tokens: bool,
    call: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse, 0): the last one's memory is the name of the run.

    Args:
        tensors, floats, ints: of the settings, see `_Call`.
        needs: see `_HIDDEN`.
        shift, of_tokens: of the settings, what outputs' shapes depend on.
        call: see `_number_of`.
    """
    if call not in _calls or ((known := _calls[call].shard) is not None and VocabShard.named(known) is None):
        raise RuntimeError(
            "this graph was made by another process, or with a VocabShard that is no more: compile the model anew, and "
            "keep the shard for as long as the model."
        )
    shard, names, others = _calls[call]
    keeps = bool(needs & _GRAD and needs & (_HIDDEN | _WEIGHT | _BIAS))
    given = [[x.clone() for x in tensors] if keeps else tensors, floats, ints]
    settings = dict(others)
    for some, values in zip(names, given, strict=True):
        settings |= zip(some, values, strict=True)
    given_3 = _Given((hidden, weight, bias))
    wanted = [bool(needs & bit) for bit in (_HIDDEN, _WEIGHT, _BIAS)]
    anchor = torch.zeros((), device="cpu", requires_grad=True)
    with _recording(bool(needs & _GRAD)), saved_tensors_hooks(given_3.pack, given_3.unpack):
        entered = [
            None if x is None else _Enter.apply(x.detach(), anchor) if is_wanted else x.detach()
            for x, is_wanted in zip((hidden, weight, bias), wanted, strict=True)
        ]
        own_labels, of_shard = labels.clone() if keeps else labels, None if shard is None else VocabShard.named(shard)
        loss, lse = cross_entropy(
            entered[0], entered[1], own_labels, entered[2], of_shard, True, settings, counted=weight
        )
    name = torch.zeros((), dtype=torch.int64, device="cpu")
    if not keeps:
        return loss.contiguous(), lse.contiguous(), name
    edges = [get_gradient_edge(x) for x, is_wanted in zip(entered, wanted, strict=True) if x is not None and is_wanted]
    _runs[name.data_ptr()] = _Run(given_3, edges, (loss, lse))
    weakref.finalize(name, _runs.pop, name.data_ptr())
    return loss.detach().clone(), lse.detach().clone(), name


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    shift, of_tokens, _ = rest[-3:]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    shape = (*labels.shape[:-1], torch.sym_max(labels.shape[-1] - shift, 0)) if labels.ndim else ()
    lse = hidden.new_empty(shape, dtype=dtype)
    loss = torch.empty_like(lse) if of_tokens else lse.new_empty(())
    return loss, lse, torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("cce_dist::linear_cross_entropy_backward", mutates_args=(), tags=_TAGS)
def _backward(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    name: Tensor,
    needs: int,
) -> list[Tensor]:
    """The gradients that ``needs`` names, in the order of hidden, weight, bias, as forward got them."""
    run = _runs.get(name.data_ptr())
    if run is None:
        raise RuntimeError(
            "the loss of this graph has no forward to go back to: its last output was copied, or the graph was run in "
            "another process. Call linear_cross_entropy outside of what does that."
        )
    pairs = [(x, grad) for x, grad in zip(run.outputs, (grad_loss, grad_lse), strict=True) if grad is not None]
    outputs, grads = zip(*pairs, strict=True)
    run.given.tensors = (hidden, weight, bias)
    try:
        with _recording(False):
            return list(torch.autograd.grad(outputs, run.edges, grads, retain_graph=True))
    finally:
        run.given.tensors = ()


@_backward.register_fake
def _(
    grad_loss: Any, grad_lse: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, name: Any, needs: int
) -> list[Tensor]:
    asked = ((hidden, _HIDDEN), (weight, _WEIGHT), (bias, _BIAS))
    return [x.new_empty(x.shape) for x, bit in asked if x is not None and needs & bit]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, _, bias, tensors, floats, ints, ctx.needs, _, _, _ = inputs
    # For a list torch wants a list of gradients, but for one of numbers, unless that is empty.
    ctx.of_lists = [None] * len(tensors), *(None if x else [] for x in (floats, ints))
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(hidden, weight, bias, output[2])


def _go_back(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Any, ...]:
    hidden, weight, bias, name = ctx.saved_tensors
    found = iter(_backward(grad_loss, grad_lse, hidden, weight, bias, name, ctx.needs))
    of_hidden, of_weight, of_bias = (next(found) if ctx.needs & bit else None for bit in (_HIDDEN, _WEIGHT, _BIAS))
    return of_hidden, of_weight, None, of_bias, *ctx.of_lists, *(None,) * 4


_forward.register_autograd(_go_back, setup_context=_keep)


@contextmanager
def _recording(grad: bool) -> Iterator[None]:
    """As outside of an operator: with autograd, which records if ``grad``.

    An operator's own code runs where torch records nothing; torch's higher-order operators lift that so.

    Raises:
        RuntimeError: a torch that has no such guard.
    """
    try:
        keys = [getattr(torch._C.DispatchKey, name) for name in _OF_AUTOGRAD]
        excluded = torch._C._dispatch_tls_local_exclude_set()
        for key in keys:
            excluded = excluded.remove(key)
        guard = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
    except AttributeError as error:
        raise RuntimeError(
            f"torch {torch.__version__} has no guard of dispatch keys that cce_dist knows: {error}. Call the loss "
            "outside of what torch.compile compiles, or use torch 2.13, which it is tested on."
        ) from error
    with guard, torch.set_grad_enabled(grad):
        yield
