"""`LazyLogits`, and what torch's functions make of them.

In goes one call of a head (`Source`); a function of torch's then gives metadata, lazy logits once more, the fused loss,
a statistic, or else what it gives for the real logits.

Shapes: X any leading dimensions, D hidden, V rows of the classifier, N tokens.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from cce_dist.distillation import linear_selected_logits, linear_topk_kl
from cce_dist.heads.lazy.form import LOGITS, MULTIPLY, SOFTMAX, Call, LogitForm, LowRank, is_last_dim, p_log_p, record
from cce_dist.heads.lazy.pytree import register_pytree_node, tree_map
from cce_dist.heads.lazy.source import Source
from cce_dist.loss import TokenLogprobs, linear_cross_entropy
from cce_dist.loss.statistics import TokenStatistics


@dataclass(init=False, eq=False, repr=False)
class LazyLogits:
    """Stands for a head's logits [X, V], which it does not compute. Not a Tensor, but torch's functions take it.

    A pytree node whose one leaf is the hidden states: hooks that look for tensors in a module's output find them.
    """

    hidden_XD: Tensor  # a dataclass field: FSDP2 looks for tensors in dataclasses, not in pytree nodes

    def __init__(self, source: Source, calls: tuple[Call, ...] = (), form: LogitForm | None = None) -> None:
        self._source = source
        self._calls = calls
        self._known_form = form
        self._changed: Tensor | None = None  # real logits that an in-place operation has written to

    @property
    def _form(self) -> LogitForm:
        if self._known_form is None:
            with torch.set_grad_enabled(self._source.has_graph):
                form = self._source.form()
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
        source = self._source
        if not source.has_graph:
            return False
        return source.hidden_XD.requires_grad or any(p.requires_grad for p in source.head.parameters())

    @property
    def _tokens(self) -> Tensor:
        """Which of the call's tokens these are [X], counted through."""
        source = self._source
        number_X1 = torch.arange(source.hidden_XD[..., 0].numel(), device=source.hidden_XD.device)
        rows = source.shard.vocab_size
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
        return self._source.statistics_of(self._unchanged("statistics"))

    def logprobs(self, labels: Tensor, **settings: Any) -> TokenLogprobs:
        """Log-probabilities of labels [X], differentiable; see `linear_logprobs`, whose keywords ``settings`` are.

        Where the vocabulary is sharded, every rank of the group must make the call.

        Raises:
            ValueError: these are no logits any more: something was written to them, or log_softmax taken.
        """
        return self._source.logprobs(self._unchanged("logprobs"), labels, **settings)

    def selected(self, ids: Tensor, **settings: Any) -> Any:
        """Logits of ids [X, K] alone, differentiable; see `linear_selected_logits`, whose keywords ``settings`` are.

        Where the vocabulary is sharded, every rank of the group must make the call, here and below.

        Raises:
            ValueError: these are no logits any more: something was written to them, or log_softmax taken.
        """
        form = self._unchanged("selected")
        self._source.check_biases(form)
        return self._source.call(linear_selected_logits, form, (ids,), settings)

    def topk_kl(self, teacher_ids: Tensor, teacher_logprobs: Tensor, **settings: Any) -> Tensor:
        """The divergence from a teacher's stored ids [X, K]; see `linear_topk_kl`, whose keywords ``settings`` are.

        Raises:
            ValueError: as for `selected`.
        """
        form = self._unchanged("topk_kl")
        self._source.check_biases(form)
        loss: Tensor = self._source.call(linear_topk_kl, form, (teacher_ids, teacher_logprobs), settings)
        return loss

    def kl_div(self, teacher: "LazyLogits", labels: Tensor | None = None, **settings: Any) -> Tensor:
        """The divergence from a teacher's logits of the same tokens, not computed either; see `linear_kl_div`, whose
        keywords ``settings`` are.

        Args:
            teacher: what the teacher's model returned, its output layer lazy too (in evaluation: `fused_evaluation`).
            labels: [X], which tokens are ignored.

        Raises:
            TypeError: a teacher whose logits have been computed.
            ValueError: as for `selected`.
        """
        if not isinstance(teacher, LazyLogits):
            raise TypeError(
                f"teacher must be the logits of a model whose output layer is patched too, got a "
                f"{type(teacher).__name__}: patch the teacher, and in evaluation call it inside of fused_evaluation."
            )
        form = self._unchanged("kl_div")
        self._source.check_biases(form)
        return self._source.divergence(form, teacher._source, teacher._unchanged("kl_div"), labels, settings)

    def _unchanged(self, name: str) -> LogitForm:
        if self._changed is not None or self._form.of != "logits":
            raise ValueError(f"{name}() is of the logits that a model returns; these have been changed since.")
        return self._form

    def __repr__(self) -> str:
        return f"LazyLogits(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"LazyLogits has no attribute {name!r}")
        attribute = getattr(Tensor, name)
        if self._changed is None and (name in _OF_THE_FORM or (name.startswith("is_") and not callable(attribute))):
            return self._metadata(name)
        if callable(attribute):
            return lambda *args, **kwargs: _dispatch(attribute, (self, *args), kwargs)
        return getattr(self._materialize(f"the attribute {name}"), name)

    def _metadata(self, name: str) -> Any:
        """An attribute that a tensor of this shape, dtype and device has, whatever its values."""
        if name == "is_leaf":
            return not self.requires_grad
        like = self._form.meta() if name == "nbytes" else torch.empty(0, dtype=self.dtype, device=self.device)
        return getattr(like, name)

    def __copy__(self) -> "LazyLogits":
        """Logits of the same call and in the same graph: to change the copy's hidden states leaves these alone."""
        copied = LazyLogits(self._source, self._calls, self._known_form)
        copied._changed = self._changed
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "LazyLogits":
        """As `copy.copy`: what copies outputs of a model (Lightning does) means the container, not the graph."""
        return copy.copy(self)

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


def _hidden_of(logits: LazyLogits) -> Tensor:
    return logits._source.hidden_XD


def _with_hidden(logits: LazyLogits, hidden_XD: Tensor) -> None:
    """What sets the fields of a dataclass, as Lightning does, replaces the hidden states as a pytree's hooks do."""
    source = logits._source.with_hidden(hidden_XD)
    if source is not logits._source:
        logits._source, logits._known_form = source, None


LazyLogits.hidden_XD = property(_hidden_of, _with_hidden)  # type: ignore[assignment]  # after dataclass() has seen it


def _dispatch(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a torch function gives for lazy logits: metadata, lazy logits, the fused loss, or else the stock result."""
    lazy = [arg for arg in args if isinstance(arg, LazyLogits)]
    why = getattr(function, "__name__", repr(function))
    if len(lazy) == 1 and lazy[0]._changed is None:
        logits = lazy[0]
        call = Call(function, tuple(LOGITS if arg is logits else arg for arg in args), kwargs)
        if function in _METADATA:
            return call.on(logits._form.meta())
        if function in _OF_THE_DEVICE:
            return call.on(torch.empty(0, dtype=logits.dtype, device=logits.device))
        if function is Tensor.stride:  # no memory, no strides; a kernel that would read the memory asks for them
            return call.on(torch.empty((), device="meta").expand(logits.shape))
        # A loss is made of probabilities, computed once here; without a graph they may be there to draw from.
        form = None if function in SOFTMAX and logits._source.with_graph() else record(logits._form, call)
        if form is not None:
            if isinstance(term := call.operand(), LowRank):
                source, term = logits._source.with_adapter(term)
                return LazyLogits(source, (*logits._calls, Call(torch.add, (LOGITS, term), {})))
            return LazyLogits(logits._source, (*logits._calls, call), form)
        if function in _SPLIT and (parts := _split(logits, call)):
            return parts
        if function is Tensor.__iter__ and logits.ndim > 1:
            return iter([_dispatch(Tensor.__getitem__, (logits, i), {}) for i in range(logits.shape[0])])
        if function in _GATHER and (gathered := _gathered(logits, call)) is not None:
            return gathered
        if (total := _sum_of_log_p(logits, call)) is not None:
            return total
        if function in _DRAWS and (drawn := _drawn(logits, call)) is not None:
            return drawn
        statistic = _statistic(logits, call)
        if statistic is not None:
            return statistic
        if function in _LOSSES and args[0] is logits:
            args, kwargs = _with_own_labels(logits, args, kwargs)
            obstacle = _obstacle(logits, *args[1:], **kwargs)
            if logits._form.of != _LOSSES[function]:
                obstacle = _MADE_OF_LOGITS[logits._form.of]
            if obstacle is None:
                return _cross_entropy(logits, *args[1:], **kwargs)
            why = f"{why} with {obstacle}"
    elif len(lazy) == 2 and function in MULTIPLY and not kwargs and (log_p := _factor_of_p_log_p(lazy)) is not None:
        return _dispatch(p_log_p, (log_p,), {})

    if len(args) == 2 and isinstance(args[1], LowRank) and not kwargs and isinstance(args[0], LazyLogits):
        return args[0]._materialize(why) + args[1]

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
    """What passes over all tokens of the call answer, over the vocabulary: the loss's own logsumexp, and the sum of
    p·log p in a graph; a chunked one argmax, and that sum without."""
    form, source = logits._form, logits._source
    if not is_last_dim(form, call.dim()) or set(call.kwargs) - {"dim"} or len(call.args) > 2:
        return None
    can_be_measured = not source.misses_a_gradient(form)
    if call.function in (torch.logsumexp, Tensor.logsumexp) and form.of == "logits" and can_be_measured:
        return source.measured(form, entropy=False).lse.flatten()[logits._tokens]
    is_entropy = call.function in (torch.sum, Tensor.sum) and form.of == "p log p"
    if is_entropy and source.with_graph():
        entropy_X = source.measured(form, entropy=True).entropy if can_be_measured else None
        return None if entropy_X is None else -entropy_X.flatten()[logits._tokens]
    if call.function in (torch.argmax, Tensor.argmax) and form.of in ("logits", "log p", "p"):
        if source.in_generation:  # of these tokens, and without what else is logged of them
            return source.next_token(form, 0.0)
        return source.statistics(form).argmax.flatten()[logits._tokens]
    if is_entropy:
        return -source.statistics(form).entropy.flatten()[logits._tokens].to(form.dtype)
    return None


def _gathered(logits: LazyLogits, call: Call) -> Tensor | None:
    """Logits or log-probabilities at one id for each token, [X, 1], in fp32; None for another gather."""
    form = logits._form
    named = dict(zip(("input", "dim", "index"), call.args, strict=False)) | dict(call.kwargs)
    index, dim = named.get("index"), named.get("dim")
    fits = isinstance(index, Tensor) and index.shape == (*logits.shape[:-1], 1) and is_last_dim(form, dim)
    if not fits or set(named) != {"input", "dim", "index"} or form.of not in ("logits", "log p", "-log p"):
        return None
    if logits._source.misses_a_gradient(form):
        return None
    assert isinstance(index, Tensor)
    # No id is ignored: -100 is out of range here, as it is for a tensor.
    found = logits._source.logprobs(form, index[..., 0], ignore_index=_NO_ID)
    values_X = found.logprob + found.lse if form.of == "logits" else found.logprob
    return (-values_X if form.of == "-log p" else values_X)[..., None]


def _sum_of_log_p(logits: LazyLogits, call: Call) -> Tensor | None:
    """Σ log p over the vocabulary of each token, as label smoothing in steps takes it; None for another sum."""
    form, source = logits._form, logits._source
    if call.function not in (torch.sum, Tensor.sum) or form.of not in ("log p", "-log p"):
        return None
    if form.cap is not None and form.adapters:
        return None
    fits = is_last_dim(form, call.dim()) and not set(call.kwargs) - {"dim", "keepdim", "dtype"} and len(call.args) <= 2
    if not fits or source.misses_a_gradient(form):
        return None
    # Smoothed altogether, the loss is its mean, whatever the labels, which are not to be counted.
    given = {"label_smoothing": 1.0, "reduction": "none", "frequent_rows": 0}
    settings = {**source.binding.config.loss_kwargs(), **given}
    labels_X = torch.zeros(form.shape[:-1], dtype=torch.int64, device=form.hidden_XD.device)
    sum_X: Tensor = source.compute(linear_cross_entropy, form, labels_X, settings) * float(form.rows)
    sum_X = (sum_X if form.of == "-log p" else -sum_X).to(call.kwargs.get("dtype") or form.dtype)
    return sum_X[..., None] if call.kwargs.get("keepdim") else sum_X


def _drawn(logits: LazyLogits, call: Call) -> Tensor | None:
    """One id for each token by its probabilities, [N, 1] or [1]; None for several, or with a generator of one's own."""
    named = dict(zip(("input", "num_samples", "replacement"), call.args, strict=False)) | dict(call.kwargs)
    others = {name for name, x in named.items() if x is not None} - {"input", "num_samples", "replacement"}
    if logits._form.adapters:
        return None
    if logits._form.of != "p" or named.get("num_samples") != 1 or others or logits.ndim > 2:
        return None
    return logits._source.next_token(logits._form, 1.0)[..., None]


def _factor_of_p_log_p(factors: list[LazyLogits]) -> LazyLogits | None:
    """log p, if the factors are log p and the p that was made of it."""
    log_p, p = sorted(factors, key=lambda factor: len(factor._calls))
    made_of_it = p._calls[:-1] == log_p._calls and p._source is log_p._source
    same = made_of_it and p._changed is None and log_p._changed is None
    return log_p if same and (log_p._form.of, p._form.of) == ("log p", "p") else None


def _writes(name: str) -> bool:
    """Whether a function writes to its first argument, by the naming rule of torch."""
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


_MADE_OF_LOGITS = {
    "logits": "logits",
    "log p": "log-probabilities",
    "-log p": "negated log-probabilities",
    "p": "probabilities",
    "p log p": "probabilities times their logarithms",
}


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
    """What keeps this F.cross_entropy or F.nll_loss from being fused, if anything does."""
    if weight is not None and (weight.shape != logits.shape[-1:] or weight.requires_grad):
        return "class weights that are trained or of another shape"
    if label_smoothing != 0.0 and logits._form.cap is not None and logits._form.adapters:
        return f"label_smoothing={label_smoothing} with a softcap and an adapter"
    if target.is_floating_point():
        return "class probabilities as target"
    if logits.ndim > 2 or target.shape != logits.shape[:-1]:
        return f"target of shape {list(target.shape)} (wanted: [] or [N] for logits [V] or [N, V])"
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum", "none"):
        return f"size_average={size_average}, reduce={reduce}, reduction={reduction!r}"
    if logits._source.misses_a_gradient(logits._form):
        return "a trained bias that is not sharded as the head is"
    return None


@torch.compiler.disable  # one graph break, in place of one wherever the loss asks the device or the ranks
def _cross_entropy(
    logits: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """F.cross_entropy; "mean" is over this rank's valid tokens, as the stock loss has it."""
    source = logits._source
    # Always "none": the ranks of a shard agree on one reduction, and a caller may change between mean and sum.
    given = {"ignore_index": ignore_index, "reduction": "none", "label_smoothing": label_smoothing}
    settings = {**source.binding.config.loss_kwargs(), **given}
    if weight is not None and label_smoothing:
        settings["class_weights"] = source.own_entries(weight, logits._form)
    loss_N: Tensor = source.compute(linear_cross_entropy, logits._form, target, settings)
    count_N: Tensor = target != ignore_index
    if weight is not None:  # of all rows; read after the loss, which tells every rank of a label out of range
        weights_N = weight.index_select(0, target.masked_fill(~count_N, 0).reshape(-1)).view(target.shape)
        count_N = weights_N.masked_fill(~count_N, 0.0)
        loss_N = loss_N if label_smoothing else loss_N * count_N
    if reduction == "none":
        return loss_N
    return loss_N.sum() if reduction == "sum" else loss_N.sum() / count_N.sum()


def _with_own_labels(
    logits: LazyLogits, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments of a cross-entropy, with plain labels of this rank's tokens in place of a DTensor's.

    Raises:
        TypeError: a DTensor that holds other tokens than the logits do.
    """
    target, tokens = (args[1] if len(args) > 1 else kwargs.get("target")), logits.shape[:-1]
    if not isinstance(target, DTensor):
        return args, kwargs
    is_partial = any(placement.is_partial() for placement in target.placements)
    is_split = not any(placement.is_replicate() for placement in target.placements)
    if not is_partial and is_split and target.to_local().shape == tokens:
        plain = target.to_local()
    elif not is_partial and target.shape == tokens:
        plain = target.full_tensor()
    else:
        raise TypeError(
            f"target is a DTensor of shape {list(target.shape)} with the placements {target.placements}; the logits "
            f"are of tokens {list(tokens)} on this rank. Pass plain labels of those tokens, or a DTensor that is "
            "replicated or split as the hidden states are."
        )
    return ((args[0], plain, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "target": plain})


_METADATA = {
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, torch.numel, Tensor.__len__,
    Tensor.element_size, Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex,
    Tensor.is_signed, torch.is_signed, Tensor.is_contiguous, Tensor.is_same_size, torch.is_same_size,
    Tensor.is_conj, torch.is_conj, Tensor.is_neg, torch.is_neg, torch.result_type,
}  # fmt: skip
_OF_THE_DEVICE = {Tensor.get_device, torch.get_device, Tensor.is_inference, torch.is_inference}
_OF_THE_FORM = {"layout", "itemsize", "nbytes", "name", "grad", "retains_grad", "output_nr"}
_SPLIT = {Tensor.split, torch.split, Tensor.chunk, torch.chunk}
_LOSSES = {F.cross_entropy: "logits", F.nll_loss: "log p"}
"""And what they take."""
_GATHER = {torch.gather, Tensor.gather}
_DRAWS = {torch.multinomial, Tensor.multinomial}
_NO_ID = -(2**31)
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
    rebuilt = copy.copy(logits)
    rebuilt.hidden_XD = hidden_XD
    return rebuilt


register_pytree_node(LazyLogits, _flatten, _unflatten)
