"""What a model may do to its logits so that the loss can do the same without them: scale, softcap, bias, views, casts.

`record` turns a chain of torch calls into a `LogitForm`, the terms that `linear_cross_entropy` takes. Of what is made
of the logits beside the loss it knows the way to log-probabilities, entropy and draws: log_softmax, exp, softmax, and
the product of p and log p.

Shapes: X any leading dimensions, D hidden, V rows of the classifier.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class _Placeholder:
    """Stands in a recorded call where the logits were among the arguments."""


LOGITS = _Placeholder()


class LowRank(NamedTuple):  # type: ignore[misc]  # a tuple's product is another one
    """factor·a·Bᵀ, not computed: what PEFT adds to the logits of a layer with a LoRA adapter. A tuple, since ZeRO-3
    looks for the tensors in a module's output.

    Attributes:
        rows_VR: this rank's rows of B.
        up: the module that has the whole of B, for real logits.
        version: of rows_VR, see `source.version_of`.
    """

    a_XR: Tensor
    rows_VR: Tensor
    factor: float
    up: Callable[[Tensor], Tensor]
    version: int | None = None

    def __mul__(self, factor: Any) -> Any:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return self._replace(factor=self.factor * factor)

    def __rmul__(self, factor: Any) -> Any:
        return self * factor

    def __radd__(self, logits: Tensor) -> Tensor:
        """Real ones."""
        dtype = self.rows_VR.dtype
        return logits + self.up(self.a_XR.to(dtype)) * self.factor


class Call(NamedTuple):
    """A torch function called on the logits."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def on(self, logits: Tensor) -> Any:
        other = self.operand()
        if isinstance(other, LowRank):
            return logits + other
        return self.function(*(logits if arg is LOGITS else arg for arg in self.args), **self.kwargs)

    def operand(self) -> Any:
        """The other operand of a binary function; None where the call has options."""
        if self.kwargs or len(self.args) != 2:
            return None
        return self.args[1] if self.args[0] is LOGITS else self.args[0]

    def dim(self) -> Any:
        """The dimension that a call names, by keyword or after the logits; None where it names none."""
        return self.kwargs.get("dim", self.args[1] if len(self.args) > 1 else None)


class Adapter(NamedTuple):
    """a·Bᵀ·ratio of a `LowRank`, beside hidden · weightᵀ; a_XR: of the form's tokens."""

    a_XR: Tensor
    term: LowRank
    ratio: float


class LogitForm(NamedTuple):
    """Recorded logits in the terms of the loss: x = scale·(hidden · weightᵀ + adapters + biases), or cap·tanh(x) if cap
    is set.

    ``of`` says what was made of them since: nothing, their log-probabilities, also negated, probabilities, or the
    product of both.
    """

    hidden_XD: Tensor
    rows: int
    dtype: torch.dtype
    scale: float = 1.0
    cap: float | None = None
    biases: tuple[Tensor, ...] = ()
    of: Literal["logits", "log p", "-log p", "p", "p log p"] = "logits"
    adapters: tuple[Adapter, ...] = ()

    def at(self, move: Callable[[Tensor], Tensor]) -> "LogitForm":
        """The form of other tokens; ``move``: of what has a row for each of them."""
        adapters = tuple(adapter._replace(a_XR=move(adapter.a_XR)) for adapter in self.adapters)
        return self._replace(hidden_XD=move(self.hidden_XD), adapters=adapters)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden_XD.shape[:-1], self.rows))

    def meta(self) -> Tensor:
        """A tensor of the logits' shape and dtype without memory: torch itself says what a call makes of them."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def record(form: LogitForm, call: Call) -> LogitForm | None:
    """The form after a call; None where the loss has no term for it."""
    recorder = _RECORDERS.get(call.function)
    if recorder is None or (form.of != "logits" and recorder in (_multiply, _divide, _tanh, _add)):
        return None
    return recorder(form, call)


def is_last_dim(form: LogitForm, dim: Any) -> bool:
    """Whether a dimension, as an int or in a sequence of one, is that of the vocabulary."""
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        (dim,) = dim
    return isinstance(dim, int) and dim in (-1, len(form.shape) - 1)


def p_log_p(log_p: Tensor) -> Tensor:
    return log_p.exp() * log_p


def _number(x: Any) -> float | None:
    """The value of a Python number, or of a constant that lies on the CPU (elsewhere it would cost a wait)."""
    if isinstance(x, (int, float)):
        return float(x)
    is_constant = isinstance(x, Tensor) and x.ndim == 0 and x.device.type == "cpu" and not x.requires_grad
    return float(x) if is_constant else None


def _scale(form: LogitForm, factor: float) -> LogitForm | None:
    if factor == 0.0:
        return None
    if form.cap is None:
        return form._replace(scale=form.scale * factor)
    return form._replace(cap=form.cap * factor)


def _multiply(form: LogitForm, call: Call) -> LogitForm | None:
    factor = _number(call.operand())
    return None if factor is None else _scale(form, factor)


def _divide(form: LogitForm, call: Call) -> LogitForm | None:
    divisor = _number(call.operand())
    return None if not divisor or call.args[0] is not LOGITS else _scale(form, 1.0 / divisor)


def _tanh(form: LogitForm, call: Call) -> LogitForm | None:
    return form._replace(cap=1.0) if form.cap is None else None


def _add(form: LogitForm, call: Call) -> LogitForm | None:
    bias = call.operand()
    if isinstance(bias, LowRank):
        return _add_adapter(form, bias)
    is_bias = isinstance(bias, Tensor) and bias.ndim <= len(form.shape) and bias.shape[-1:] == form.shape[-1:]
    if not is_bias or bias.numel() != form.rows or form.cap is not None:
        return None
    biases = (*form.biases, bias.reshape(-1) / form.scale)
    return form._replace(biases=biases, dtype=torch.promote_types(form.dtype, bias.dtype))


def _add_adapter(form: LogitForm, term: LowRank) -> LogitForm | None:
    if form.cap is not None or term.a_XR.shape[:-1] != form.shape[:-1]:
        return None
    adapters = (*form.adapters, Adapter(term.a_XR, term, term.factor / form.scale))
    return form._replace(adapters=adapters, dtype=torch.promote_types(form.dtype, term.a_XR.dtype))


def _cast(form: LogitForm, call: Call) -> LogitForm | None:
    probe = torch.empty(0, dtype=form.dtype, device=form.hidden_XD.device)
    result = call.on(probe)
    is_cast = result.device == probe.device and result.is_floating_point()
    return form._replace(dtype=result.dtype) if is_cast else None


def _reshape(form: LogitForm, call: Call) -> LogitForm | None:
    result = call.on(form.meta())
    if result.shape[-1:] != form.shape[-1:] or result.dtype != form.dtype:
        return None
    return form.at(lambda x: x.reshape(*result.shape[:-1], x.shape[-1]))


def _log_softmax(form: LogitForm, call: Call) -> LogitForm | None:
    return _normalised(form, call, "log p")


def _softmax(form: LogitForm, call: Call) -> LogitForm | None:
    return _normalised(form, call, "p")


def _normalised(form: LogitForm, call: Call, of: Literal["log p", "p"]) -> LogitForm | None:
    if form.of != "logits" or not is_last_dim(form, call.dim()):
        return None
    return form._replace(of=of, dtype=call.on(form.meta()).dtype)


def _negate(form: LogitForm, call: Call) -> LogitForm | None:
    return form._replace(of="-log p") if form.of == "log p" else None


def _exp(form: LogitForm, call: Call) -> LogitForm | None:
    return form._replace(of="p") if form.of == "log p" and len(call.args) == 1 and not call.kwargs else None


def _p_log_p(form: LogitForm, call: Call) -> LogitForm | None:
    return form._replace(of="p log p") if form.of == "log p" else None


def _index(form: LogitForm, call: Call) -> LogitForm | None:
    """Any index into the leading dimensions; of the last one, all rows or the first few."""
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if call.args[0] is not LOGITS or not all(type(i) in _INDICES or isinstance(i, Tensor) for i in index):
        return None
    used = sum(_dimensions_used(i) for i in index)
    if index and index[-1] is ...:
        index = index[:-1]
    if used < len(form.shape) and not any(i is ... for i in index):
        return form.at(lambda x: x[index])
    rows = index[-1]
    if not isinstance(rows, slice) or form.of != "logits":
        return None
    start, stop, step = rows.indices(form.rows)
    if start != 0 or step != 1 or stop == 0:
        return None
    moved = form.at(lambda x: x[index[:-1] + (slice(None),)])
    return moved._replace(rows=stop, biases=tuple(bias[:stop] for bias in form.biases))


_INDICES = (int, slice, type(None), type(...))


def _dimensions_used(index: Any) -> int:
    if index is None or index is ...:
        return 0
    is_mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
    return index.ndim if is_mask else 1


_RECORDERS: dict[Callable[..., Any], Callable[[LogitForm, Call], LogitForm | None]] = {
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _multiply),
    **dict.fromkeys((torch.div, torch.true_divide, Tensor.div, Tensor.true_divide, Tensor.__truediv__), _divide),
    **dict.fromkeys((torch.tanh, Tensor.tanh, F.tanh), _tanh),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.to, Tensor.contiguous), _cast),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten), _reshape),
    Tensor.__getitem__: _index,
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax), _log_softmax),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _softmax),
    **dict.fromkeys((torch.neg, torch.negative, Tensor.neg, Tensor.negative, Tensor.__neg__), _negate),
    **dict.fromkeys((torch.exp, Tensor.exp), _exp),
    p_log_p: _p_log_p,
}
SOFTMAX = {function for function, recorder in _RECORDERS.items() if recorder is _softmax}
MULTIPLY = {function for function, recorder in _RECORDERS.items() if recorder is _multiply}
