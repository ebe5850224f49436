"""Logits that are not computed: a model's own code runs unchanged, and F.cross_entropy on them is the fused loss.

`make_lazy` swaps the class of one output layer. In training its call returns `LazyLogits`: the hidden states, and what
the model has done to the logits since (scale, softcap, bias, views, slices, casts). Where `F.cross_entropy` meets
them, `linear_cross_entropy` runs on the hidden states. Two things that trainers log are answered by a chunked pass over
the hidden states: argmax, and, under no_grad, the entropy −(exp(log_softmax)·log_softmax).sum. Any other use computes
the real logits with the stock forward and warns, or raises, naming the call site: there is no silent fallback.

Shapes: X any leading dimensions, D hidden, V rows of the classifier, R local rows, N tokens.
"""

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import register_pytree_node, tree_map

from cce_dist.config import CCEConfig
from cce_dist.logit_form import LOGITS, MULTIPLY, WITHOUT_GRADIENT, Call, LogitForm, is_last_dim, p_log_p, record
from cce_dist.loss import linear_cross_entropy
from cce_dist.owner import ModuleOwner, ShardOwner
from cce_dist.shard import VocabShard
from cce_dist.token_statistics import TokenStatistics, token_statistics


class MaterializedLogitsWarning(UserWarning):
    """Logits that should have stayed uncomputed were computed."""


def make_lazy(head: nn.Module, owner: ShardOwner, config: CCEConfig, linear: type[nn.Module] = nn.Linear) -> None:
    """Swaps the head's class: called in training with grad enabled, it returns `LazyLogits` and runs no hook.

    In evaluation and without grad the stock call runs, hooks included. Parameters, names, state_dict and isinstance
    stay as they are. A pickle of the head holds the stock class; a deepcopy is as lazy as the head.

    Args:
        head: an nn.Linear, or of the class ``linear``.
        owner: where its rows live, and where their gradient goes.
        config: settings of the loss, and what happens where real logits are needed (``materialize``).
        linear: whose forward the head has: nn.Linear's, or that of a framework's own linear layer.

    Raises:
        TypeError: the head does more than F.linear(hidden, weight, bias), as one with an adapter does.
        ValueError: the head is lazy already.
    """
    stock = type(head)
    if is_lazy(head):
        raise ValueError(
            f"{stock.__name__} is lazy already; undo that first, with make_eager or by unpatching its model."
        )
    if not isinstance(head, linear) or stock.forward is not linear.forward or "forward" in vars(head):
        raise TypeError(
            f"head must be an nn.Linear with the forward of nn.Linear, got {stock.__module__}.{stock.__qualname__}. "
            "Adapters on the output layer (LoRA, modules_to_save), quantisation and device_map replace that forward: "
            "leave the output layer out of them, or merge the adapter into it first."
        )
    head.__class__ = type(f"CCE{stock.__name__}", (_LazyHead, stock), {"_cce": _Binding(stock, owner, config)})


def is_lazy(head: nn.Module) -> bool:
    """Whether `make_lazy` has been here."""
    return isinstance(head, _LazyHead)


def make_eager(head: nn.Module) -> None:
    """Undoes `make_lazy`.

    Raises:
        ValueError: the head is not lazy, or something else (fully_shard, say) has swapped its class since.
    """
    binding = vars(type(head)).get("_cce")
    if binding is None:
        raise ValueError(
            f"{type(head).__name__} is not a class that make_lazy made. If fully_shard or the like came after "
            "make_lazy, the head cannot be made eager any more: build the model anew."
        )
    head.__class__ = binding.stock


@contextmanager
def fused_evaluation(head: nn.Module) -> Iterator[None]:
    """Inside, a lazy head returns `LazyLogits` in evaluation too, for a loss that needs no memory for logits.

    Raises:
        ValueError: the head is not lazy.
    """
    if not isinstance(head, _LazyHead):
        raise ValueError(f"{type(head).__name__} is not lazy; call make_lazy on it, or patch its model, first.")
    before, head._cce.in_evaluation = head._cce.in_evaluation, True
    try:
        yield
    finally:
        head._cce.in_evaluation = before


@dataclass
class _Binding:
    """What `make_lazy` was given. It hangs on a class made for one head, so that the head's __dict__ stays as it is."""

    stock: type[nn.Module]
    owner: ShardOwner
    config: CCEConfig
    in_evaluation: bool = False
    truncated: dict[int, VocabShard] = field(default_factory=dict)

    def shard(self, rows: int) -> VocabShard:
        """The owner's shard, cut to the first rows of the vocabulary: one object per cut, as ranks agree only once."""
        shard = self.owner.shard
        if rows >= shard.vocab_size:
            return shard
        if rows not in self.truncated:
            self.truncated[rows] = replace(shard, vocab_size=rows)
        return self.truncated[rows]

    def terms(self, form: LogitForm) -> dict[str, Any]:
        """What stands between the form's hidden states and its logits."""
        shard, bias_R = self.shard(form.rows), self.owner.local_bias()
        for bias_V in form.biases:
            rows_R = _local_rows(bias_V, shard)
            bias_R = rows_R if bias_R is None else bias_R + rows_R
        return {
            "bias": bias_R,
            "shard": shard,
            "softcap": None if form.cap is None else abs(form.cap),
            "logit_scale": form.scale if form.cap is None else form.scale * form.cap,
        }

    @torch.no_grad()
    def statistics(self, form: LogitForm) -> TokenStatistics:
        """Of the form's tokens [X]; on every rank of the shard's group."""
        tokens = form.hidden_XD.shape[:-1]
        flat = token_statistics(form.hidden_XD.flatten(0, -2), self.owner.local_weight(), **self.terms(form))
        return TokenStatistics(*(x_n.view(tokens) for x_n in flat))


class _LazyHead(nn.Module):
    """Goes before the class of a head. It has __call__, not forward, since FSDP's and ZeRO's hooks hang on __call__."""

    _cce: ClassVar[_Binding]

    def __call__(self, input: Tensor) -> Any:
        if (self.training and torch.is_grad_enabled()) or self._cce.in_evaluation:
            return LazyLogits(_Source(self, input))
        return super().__call__(input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Protocol 1's form, legal in all: the one of protocol 2 insists on the class of the object.
        construct, args, *state = cast(tuple[Any, ...], super().__reduce_ex__(min(protocol, 1)))
        return (construct, (self._cce.stock, *args[1:]), *state)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        binding = self._cce
        if not isinstance(binding.owner, ModuleOwner):
            raise TypeError(
                f"the rows of this head belong to a {type(binding.owner).__name__}, which cannot be copied; copy the "
                "model before its head is sharded."
            )
        twin = memo[id(self)] = binding.stock.__new__(binding.stock)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        make_lazy(twin, ModuleOwner(twin, binding.owner.shard), binding.config)
        return twin


class _Source:
    """One call of a head: its hidden states, and the logits once something has needed them."""

    def __init__(self, head: _LazyHead, hidden_XD: Tensor) -> None:
        device = hidden_XD.device.type
        self.head = head
        self.binding = head._cce
        self.hidden_XD = hidden_XD
        self.autocast = torch.is_autocast_enabled(device) and hidden_XD.dtype != torch.float64
        self.dtype = torch.get_autocast_dtype(device) if self.autocast else hidden_XD.dtype
        self._real: tuple[Tensor, bool] | None = None
        self._statistics: list[tuple[LogitForm, TokenStatistics]] = []

    def with_hidden(self, hidden_XD: Tensor) -> "_Source":
        """The same call on what a hook made of the hidden states; it computes in the dtype it would have had."""
        source = copy.copy(self)
        source.hidden_XD, source._real, source._statistics = hidden_XD, None, []
        return source

    def statistics(self, form: LogitForm) -> TokenStatistics:
        """Of all tokens of the call [X], under the form's scale, softcap, biases and rows; computed once for those.

        All tokens at once, since ranks whose tokens differ in number may read them in different numbers of pieces.
        """
        for known, statistics in self._statistics:
            same_biases = [id(x) for x in known.biases] == [id(x) for x in form.biases]
            if same_biases and (known.rows, known.scale, known.cap) == (form.rows, form.scale, form.cap):
                return statistics
        computed = self.binding.statistics(form._replace(hidden_XD=self.hidden_XD.to(self.dtype)))
        self._statistics.append((form._replace(hidden_XD=self.hidden_XD), computed))
        return computed

    def forget_logits(self) -> None:
        self._real = None

    def logits(self, why: str) -> Tensor:
        """The real logits, computed once (once more if first wanted without a graph, then with one)."""
        if self._real is None:
            self._announce(why)
        if self._real is None or (torch.is_grad_enabled() and not self._real[1]):
            with torch.autocast(self.hidden_XD.device.type, dtype=self.dtype, enabled=self.autocast):
                real = self.binding.stock.__call__(self.head, self.hidden_XD.to(self.dtype))
            self._real = (real, torch.is_grad_enabled())
        return self._real[0]

    def _announce(self, why: str) -> None:
        frame = _call_site()
        shape = [*self.hidden_XD.shape[:-1], self.binding.owner.shard.vocab_size]
        text = (
            f"logits {shape} are computed after all: {frame.f_code.co_filename}:{frame.f_lineno}, in "
            f"{frame.f_code.co_name}, uses them in {why}. What needs no logits is F.cross_entropy with class indices, "
            "without class weights and label smoothing."
        )
        if self.binding.config.materialize == "raise":
            raise RuntimeError(f"materialize='raise' forbids that {text} With materialize='warn' they would be.")
        registry = frame.f_globals.setdefault("__warningregistry__", {})
        warnings.warn_explicit(
            text, MaterializedLogitsWarning, frame.f_code.co_filename, frame.f_lineno, registry=registry
        )


def _call_site() -> FrameType:
    """The innermost frame that is neither in this file nor in torch."""
    torch_folder = str(Path(torch.__file__).parent)
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith((__file__, torch_folder)):
        frame = frame.f_back
    return frame


@dataclass(init=False, eq=False, repr=False)
class LazyLogits:
    """Stands for a head's logits [X, V], which it does not compute. Not a Tensor, but torch's functions take it.

    A pytree node whose one leaf is the hidden states: hooks that look for tensors in a module's output find them.
    """

    hidden_XD: Tensor  # a dataclass field: FSDP2 looks for tensors in dataclasses, not in pytree nodes

    def __init__(self, source: _Source, calls: tuple[Call, ...] = (), form: LogitForm | None = None) -> None:
        self._source = source
        self.hidden_XD = source.hidden_XD
        self._calls = calls
        self._known_form = form
        self._changed: Tensor | None = None  # real logits that an in-place operation has written to

    @property
    def _form(self) -> LogitForm:
        if self._known_form is None:
            source = self._source
            with torch.enable_grad():
                form = LogitForm(source.hidden_XD.to(source.dtype), source.binding.owner.shard.vocab_size, source.dtype)
                for call in self._calls:
                    form = record(form, call) or form  # what was recorded once can be again
            self._known_form = form
        return self._known_form

    @property
    def shape(self) -> torch.Size:
        return self._form.shape

    @property
    def ndim(self) -> int:
        return len(self._form.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._form.dtype

    @property
    def device(self) -> torch.device:
        return self._form.hidden_XD.device

    @property
    def requires_grad(self) -> bool:
        return self._form.hidden_XD.requires_grad or any(p.requires_grad for p in self._source.head.parameters())

    @property
    def _tokens(self) -> Tensor:
        """Which of the call's tokens these are [X], counted through."""
        source = self._source
        number_X1 = torch.arange(source.hidden_XD[..., 0].numel(), device=source.hidden_XD.device)
        rows = source.binding.owner.shard.vocab_size
        form = LogitForm(number_X1.view(*source.hidden_XD.shape[:-1], 1), rows, source.dtype)
        for call in self._calls:
            form = record(form, call) or form
        return form.hidden_XD[..., 0]

    def statistics(self) -> TokenStatistics:
        """Entropy, most likely token and the like of these tokens [X] alone, by a chunked pass without a gradient.

        Where the vocabulary is sharded, every rank of the group must make the call.

        Raises:
            ValueError: these are no logits any more: something was written to them, or log_softmax taken.
        """
        if self._changed is not None or self._form.of != "logits":
            raise ValueError("statistics() is of the logits that a model returns; these have been changed since.")
        return self._source.binding.statistics(self._form)

    def __repr__(self) -> str:
        return f"LazyLogits(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"LazyLogits has no attribute {name!r}")
        attribute = getattr(Tensor, name)
        if callable(attribute):
            return lambda *args, **kwargs: _dispatch(attribute, (self, *args), kwargs)
        return getattr(self._materialize(f"the attribute {name}"), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(function, args, kwargs or {})

    def _materialize(self, why: str) -> Tensor:
        if self._changed is not None:
            return self._changed
        logits = self._source.logits(why)
        for call in self._calls:
            logits = call.on(logits)
        return logits


def _dispatch(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a torch function gives for lazy logits: metadata, lazy logits, the fused loss, or else the stock result."""
    lazy = [arg for arg in args if isinstance(arg, LazyLogits)]
    why = getattr(function, "__name__", repr(function))
    if len(lazy) == 1 and lazy[0]._changed is None:
        logits = lazy[0]
        call = Call(function, tuple(LOGITS if arg is logits else arg for arg in args), kwargs)
        if function in _METADATA:
            return call.on(logits._form.meta())
        if function is Tensor.stride:  # no memory, no strides; a kernel that would read the memory asks for them
            return call.on(torch.empty((), device="meta").expand(logits.shape))
        form = None if function in WITHOUT_GRADIENT and torch.is_grad_enabled() else record(logits._form, call)
        if form is not None:
            return LazyLogits(logits._source, (*logits._calls, call), form)
        if function in _SPLIT and (parts := _split(logits, call)):
            return parts
        statistic = _statistic(logits, call)
        if statistic is not None:
            return statistic
        if function is F.cross_entropy and args[0] is logits:
            obstacle = _obstacle(logits, *args[1:], **kwargs)
            if obstacle is None:
                return _cross_entropy(logits, *args[1:], **kwargs)
            why = f"cross_entropy with {obstacle}"
    elif len(lazy) == 2 and function in MULTIPLY and not kwargs and (log_p := _factor_of_p_log_p(lazy)) is not None:
        return _dispatch(p_log_p, (log_p,), {})

    def real(x: Any) -> Any:
        return x._materialize(why) if isinstance(x, LazyLogits) else x

    args_real, kwargs_real = tree_map(real, (args, kwargs), is_leaf=lambda x: isinstance(x, LazyLogits))
    result = function(*args_real, **kwargs_real)
    if _writes(why) and isinstance(args[0], LazyLogits):
        args[0]._changed = args_real[0]
        args[0]._source.forget_logits()
    return result


def _split(logits: LazyLogits, call: Call) -> tuple[LazyLogits, ...] | None:
    """The parts of a split of the tokens; None for one of the vocabulary."""
    dim = call.kwargs.get("dim", call.args[2] if len(call.args) > 2 else 0) % logits.ndim
    if dim == logits.ndim - 1:
        return None
    ends = list(accumulate(part.shape[dim] for part in call.on(logits._form.meta())))
    index = [(slice(None),) * dim + (slice(start, end),) for start, end in zip([0, *ends], ends, strict=False)]
    return tuple(_dispatch(Tensor.__getitem__, (logits, i), {}) for i in index)


def _statistic(logits: LazyLogits, call: Call) -> Tensor | None:
    """What a chunked pass answers: argmax, and the sum of p·log p, over the vocabulary."""
    form = logits._form
    if not is_last_dim(form, call.dim()) or set(call.kwargs) - {"dim"} or len(call.args) > 2:
        return None
    if call.function in (torch.argmax, Tensor.argmax) and form.of != "p log p":
        return logits._source.statistics(form).argmax.flatten()[logits._tokens]
    if call.function in (torch.sum, Tensor.sum) and form.of == "p log p":
        return -logits._source.statistics(form).entropy.flatten()[logits._tokens].to(form.dtype)
    return None


def _factor_of_p_log_p(factors: list[LazyLogits]) -> LazyLogits | None:
    """log p, if the factors are log p and the p that was made of it."""
    log_p, p = sorted(factors, key=lambda factor: len(factor._calls))
    made_of_it = p._calls[:-1] == log_p._calls and p._source is log_p._source
    same = made_of_it and p._changed is None and log_p._changed is None
    return log_p if same and (log_p._form.of, p._form.of) == ("log p", "p") else None


def _writes(name: str) -> bool:
    """Whether a function writes to its first argument, by the naming rule of torch."""
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _obstacle(
    logits: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> str | None:
    """What keeps this F.cross_entropy from being fused, if anything does."""
    if logits._form.of != "logits":
        return "log-probabilities"
    if weight is not None:
        return "class weights"
    if label_smoothing != 0.0:
        return f"label_smoothing={label_smoothing}"
    if target.is_floating_point():
        return "class probabilities as target"
    if logits.ndim > 2 or target.shape != logits.shape[:-1]:
        return f"target of shape {list(target.shape)} (wanted: [] or [N] for logits [V] or [N, V])"
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum", "none"):
        return f"size_average={size_average}, reduce={reduce}, reduction={reduction!r}"
    shard = logits._source.binding.owner.shard
    if shard.vocab_group is not None and any(bias.requires_grad for bias in logits._form.biases):
        return "a trained bias that is not sharded as the head is"
    return None


@torch.compiler.disable  # one graph break, in place of one wherever the loss asks the device or the ranks
def _cross_entropy(
    logits: LazyLogits, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean", **_: Any
) -> Tensor:
    """F.cross_entropy; "mean" is over this rank's valid tokens, as the stock loss has it."""
    form, binding = logits._form, logits._source.binding
    with torch.autocast(target.device.type, enabled=False):
        # Always "none": the ranks of a shard agree on one reduction, and a caller may change between mean and sum.
        loss_N = linear_cross_entropy(
            form.hidden_XD,
            binding.owner.local_weight(),
            target,
            ignore_index=ignore_index,
            reduction="none",
            **binding.terms(form),
            **binding.config.loss_kwargs(),
        )
    if reduction == "none":
        return loss_N
    return loss_N.sum() if reduction == "sum" else loss_N.sum() / (target != ignore_index).sum()


def _local_rows(values_V: Tensor, shard: VocabShard) -> Tensor:
    """This shard's entries of a vector over the vocabulary; zero on its padding rows."""
    values_R = torch.cat([values_V[:0], *(values_V[start:stop] for start, stop in shard.runs)])
    return F.pad(values_R, (0, shard.num_rows - values_R.shape[0]))


_METADATA = {
    Tensor.size, Tensor.dim, Tensor.numel, torch.numel, Tensor.__len__,
    Tensor.is_floating_point, torch.is_floating_point,
}  # fmt: skip
_SPLIT = {Tensor.split, torch.split, Tensor.chunk, torch.chunk}
_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}
_OPERATORS = (
    *_IN_PLACE, "__getitem__", "__len__", "__iter__", "__bool__", "__neg__", "__abs__", "__add__", "__radd__",
    "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__pow__", "__matmul__",
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__",
)  # fmt: skip


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: _dispatch(function, args, {})


for _name in _OPERATORS:  # Python looks operators up on the class, past __getattr__
    setattr(LazyLogits, _name, _operator(getattr(Tensor, _name)))


def _flatten(logits: LazyLogits) -> tuple[list[Tensor], LazyLogits]:
    return [logits._source.hidden_XD], logits


def _unflatten(leaves: Any, logits: LazyLogits) -> LazyLogits:
    (hidden_XD,) = leaves
    rebuilt = LazyLogits(logits._source.with_hidden(hidden_XD), logits._calls)
    rebuilt._changed = logits._changed
    return rebuilt


register_pytree_node(LazyLogits, _flatten, _unflatten)
