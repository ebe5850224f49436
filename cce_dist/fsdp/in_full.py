"""What ``head.weight`` is inside a forward of FSDP2: the whole classifier, gathered when something computes with it.

Stock FSDP2 puts the unsharded parameter there for the time of the forward, and code that multiplies by it past the
head's own call (TRL's distillation, a fused loss of one's own) relies on that. The DTensor that the parameter is
outside of the forward would do for the value alone: ``full_tensor()`` hands each rank its part of its OWN gradient,
which nobody sums. So an attribute of the head, or of an embedding tied to it, gives an `InFull` there, whose gradient
is summed over the ranks and divided as FSDP divides. Asked for its shape, dtype or device alone, it gathers nothing.

Shapes: D hidden, V rows of the whole classifier, R local rows.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from cce_dist.fsdp.private import no_torch_function, without_elements
from cce_dist.heads.lazy import report
from cce_dist.heads.owner import OnTheseRanks


class Unsharded(Protocol):
    """How a parameter's rows become whole, and the gradient of the whole goes back to them."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def gather(self, rows: Tensor) -> Tensor:
        """The parameter, [V, ...], of the rows that each rank has."""

    def scatter(self, grad: Tensor) -> Tensor:
        """The gradient of this rank's rows, of each rank's own gradient [V, ...]."""


class InFull(torch.Tensor):
    """[V, D] or [V]; gathered at the first operation on it, which every rank must come to."""

    _gather: Callable[[], Tensor]
    _gathered: Tensor | None
    __torch_function__ = no_torch_function

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device, gather: Callable[[], Tensor]) -> Any:
        new = without_elements(cls, shape, dtype, device)
        new._gather, new._gathered = gather, None
        return new

    def value(self) -> Tensor:
        """A plain tensor without a graph."""
        if self._gathered is None:
            self._gathered = self._gather()
        return self._gathered

    def data_ptr(self) -> int:
        """Kernels that take tensors by their address ask for it."""
        return self.value().data_ptr()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"InFull(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return function(*_values(args), **{name: _values(x) for name, x in (kwargs or {}).items()})


def _values(x: Any) -> Any:
    """Plain tensors in place of those that stand for gathered ones, also in lists."""
    if isinstance(x, InFull):
        return x.value()
    return type(x)(map(_values, x)) if isinstance(x, list | tuple) else x


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, unsharded: Unsharded, announce: Callable[[], None] | None) -> Tensor:
        ctx.unsharded, ctx.dtype = unsharded, rows.dtype
        rows = rows.detach()

        def gather() -> Tensor:
            if announce is not None:
                announce()
            with torch.no_grad():
                return unsharded.gather(rows.to(unsharded.dtype))

        whole: Tensor = InFull(unsharded.shape, unsharded.dtype, rows.device, gather)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.unsharded.scatter(grad.to(ctx.dtype)), None, None


def unshard(rows: Tensor, unsharded: Unsharded, materialize: str, name: str) -> Tensor:
    """The whole parameter, differentiable with respect to ``rows``; with a graph, its gathering warns or raises.

    Args:
        rows: this rank's.
        materialize: "warn" or "raise", of the settings.
        name: of the parameter, for the text.
    """
    in_training = torch.is_grad_enabled() and rows.requires_grad
    announce = (lambda: _announce(unsharded.shape, name, materialize)) if in_training else None
    whole: Tensor = _Unshard.apply(rows, unsharded, announce)
    return whole


def _announce(shape: torch.Size, name: str, materialize: str) -> None:
    report(
        materialize,
        f"the classifier {list(shape)} is gathered on every rank: {{place}} computes with the output layer's {name} "
        "past the layer's own call,",
        "which is the one that cce_dist makes the fused loss of.",
    )


class _InFullInForward(OnTheseRanks, nn.Module):
    """Goes before the class of a module that holds parameters of the classifier."""

    _cce_in_full: ClassVar[Callable[[Tensor], Tensor | None]]

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if any(found is parameter for parameter in self.parameters(recurse=False)):
            whole = type(self)._cce_in_full(found)  # type: ignore[arg-type]
            return found if whole is None else whole
        return found


def in_full_in_forward(module: nn.Module, in_full: Callable[[Tensor], Tensor | None]) -> None:
    """Makes an attribute that is a parameter what ``in_full(parameter)`` gives, or the parameter where that is None."""
    stock = type(module)
    members = {"_cce_in_full": staticmethod(in_full)}
    module.__class__ = type(stock.__name__, (_InFullInForward, stock), members)
