"""Logits that are not computed: a model's own code runs unchanged, and F.cross_entropy on them is the fused loss.

`make_lazy` swaps the class of one output layer. In training its call returns `LazyLogits`: the hidden states, and what
the model has done to the logits since (scale, softcap, bias, views, slices, casts). Where `F.cross_entropy` meets
them, `linear_cross_entropy` runs on the hidden states. Two things that trainers log are answered by a chunked pass over
the hidden states: argmax, and, under no_grad, the entropy −(exp(log_softmax)·log_softmax).sum. Any other use computes
the real logits with the stock forward and warns, or raises, naming the call site: there is no silent fallback.

The loss is of the logits that the head's call would have given. Forward hooks and pre-hooks run in that call, on lazy
logits, whose hidden states and parameters are those of that moment (pruning, parametrizations and PEFT change the
weight for a call). A call that does anything else, or whose gradients hooks wait for, gives real logits and says so.
FSDP2's and ZeRO-3's own hooks on the head, which gather it, run where real logits are computed.

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
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional as F
from torch.utils._pytree import register_pytree_node, tree_map

from cce_dist.config import CCEConfig
from cce_dist.heads import checkpoints, hooks
from cce_dist.heads.find import registered
from cce_dist.heads.owner import ModuleOwner, ShardOwner
from cce_dist.heads.statistics import TokenStatistics, token_statistics
from cce_dist.logit_form import LOGITS, MULTIPLY, WITHOUT_GRADIENT, Call, LogitForm, is_last_dim, p_log_p, record
from cce_dist.loss import linear_cross_entropy
from cce_dist.shard import VocabShard


class MaterializedLogitsWarning(UserWarning):
    """Logits that should have stayed uncomputed were computed."""


def make_lazy(head: nn.Module, owner: ShardOwner, config: CCEConfig, linear: type[nn.Module] = nn.Linear) -> None:
    """Swaps the head's class: called in training with grad enabled, it returns `LazyLogits`.

    In evaluation and without grad the stock call runs. Hooks of users run in both. Parameters, names, state_dict and
    isinstance stay as they are. A pickle of the head holds the stock class; a deepcopy is as lazy as the head.

    Args:
        head: an nn.Linear, or of the class ``linear``.
        owner: where its rows live, and where their gradient goes.
        config: settings of the loss, and what happens where real logits are needed (``materialize``).
        linear: whose forward the head has: nn.Linear's, or that of a framework's own linear layer.

    Raises:
        TypeError: the head does more than F.linear(hidden, weight, bias), as one with an adapter does.
        ValueError: the head is lazy already.
        RuntimeError: a torch whose hooks this version does not know.
    """
    hooks.check_torch()
    checkpoints.check_torch()
    stock = type(head)
    if is_lazy(head):
        raise ValueError(
            f"{stock.__name__} is lazy already; undo that first, with make_eager or by unpatching its model."
        )
    if not isinstance(head, linear) or stock.forward is not linear.forward or "forward" in vars(head):
        raise TypeError(
            f"head must be an nn.Linear with the forward of nn.Linear, got {stock.__module__}.{stock.__qualname__}. "
            "Adapters on the output layer (LoRA), quantisation and device_map replace that forward: leave the output "
            "layer out of them, merge the adapter into it first, or train a copy of the layer (modules_to_save)."
        )
    head.__class__ = type(f"CCE{stock.__name__}", (_LazyHead, stock), {"_cce": _Binding(stock, owner, config)})


def is_lazy(head: nn.Module) -> bool:
    """Whether `make_lazy` has been here."""
    return isinstance(head, _LazyHead)


def lazy_calls(head: nn.Module) -> int:
    """How often a lazy head has been called and has returned `LazyLogits`; not counted inside a compiled graph."""
    return head._cce.calls if isinstance(head, _LazyHead) else 0


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
    binding = _binding(head)
    before, binding.in_evaluation = binding.in_evaluation, True
    try:
        yield
    finally:
        binding.in_evaluation = before


def fuse_evaluation_where(head: nn.Module, condition: Callable[[], bool]) -> None:
    """A lazy head returns `LazyLogits` in evaluation too, in every call for which the condition holds.

    Raises:
        ValueError: the head is not lazy.
    """
    _binding(head).fused_where = condition


def _binding(head: nn.Module) -> "_Binding":
    if not isinstance(head, _LazyHead):
        raise ValueError(f"{type(head).__name__} is not lazy; call make_lazy on it, or patch its model, first.")
    return head._cce


def report(config: CCEConfig, what: str, instead: str) -> None:
    """Warns that real logits are computed, or raises, by ``config.materialize``; names the place in the user's code.

    Args:
        what: "logits [...] are computed after all: they ...".
        instead: a sentence on what needs no logits.
    """
    frame = _call_site()
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name},"
    text = f"{what.replace('{place}', place)} {instead}"
    if config.materialize == "raise":
        raise RuntimeError(f"materialize='raise' forbids that {text} With materialize='warn' they would be.")
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, MaterializedLogitsWarning, frame.f_code.co_filename, frame.f_lineno, registry=registry)


@dataclass
class _Binding:
    """What `make_lazy` was given. It hangs on a class made for one head, so that the head's __dict__ stays as it is."""

    stock: type[nn.Module]
    owner: ShardOwner
    config: CCEConfig
    in_evaluation: bool = False
    fused_where: Callable[[], bool] | None = None
    calls: int = 0
    truncated: dict[tuple[int, int], VocabShard] = field(default_factory=dict)

    def cut(self, shard: VocabShard, rows: int) -> VocabShard:
        """A shard cut to the first rows of the vocabulary: one object per cut, as ranks agree only once."""
        if rows >= shard.vocab_size:
            return shard
        key = (shard.vocab_size, rows)
        if key not in self.truncated:
            self.truncated[key] = replace(shard, vocab_size=rows)
        return self.truncated[key]


class _LazyHead(nn.Module):
    """Goes before the class of a head. It has __call__, not forward, since FSDP's and ZeRO's hooks hang on __call__."""

    _cce: ClassVar[_Binding]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        binding = self._cce
        if args and isinstance(args[0], DTensor):
            args = (_all_tokens(args[0], binding.owner), *args[1:])
        trains = self.training and torch.is_grad_enabled()
        if not (trains or binding.in_evaluation or self._is_fused_here()):
            if self.training and checkpoints.in_forward():
                self._report("is called inside of a reentrant checkpoint", _NO_REENTRANT)
            return super().__call__(*args, **kwargs)
        if trains and checkpoints.in_recomputation():
            return super().__call__(*args, **kwargs)  # as in the forward that is recomputed
        obstacle = self._obstacle()
        if obstacle is not None:
            self._report(*obstacle)
            return super().__call__(*args, **kwargs)
        return hooks.call(self, self._lazy, args, kwargs, hooks.is_of_users)

    def _lazy(self, input: Tensor) -> "LazyLogits":
        if not torch.compiler.is_compiling():
            self._cce.calls += 1
        return LazyLogits(_Source(self, input))

    def _is_fused_here(self) -> bool:
        condition = self._cce.fused_where
        return condition is not None and not torch.compiler.is_compiling() and condition()

    def _obstacle(self) -> tuple[str, str] | None:
        """What makes this call something else than F.linear(hidden, weight, bias), and what to do about it."""
        if torch.is_grad_enabled() and hooks.wants_gradients(self):
            return "has backward hooks, its own or those of all modules", "Take those hooks off."
        forward = vars(self).get("forward", type(self).forward)
        if forward is not self._cce.stock.forward and not (forward.__module__ or "").startswith(f"{__package__}."):
            name = f"{forward.__module__}.{getattr(forward, '__qualname__', type(forward).__name__)}"
            return f"has the forward {name} in place of its own", "Leave the output layer out of what does that."
        weight = registered(self, "weight")
        if weight is not None and type(weight) not in (nn.Parameter, Tensor, DTensor):
            return f"has a weight of the class {type(weight).__name__}", "Leave the output layer out of quantisation."
        return None

    def _report(self, what: str, instead: str) -> None:
        report(
            self._cce.config,
            f"logits are computed after all: the output layer, called by {{place}} {what}.",
            instead,
        )

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
        _binding(twin).fused_where = binding.fused_where
        return twin


def _all_tokens(hidden: DTensor, owner: ShardOwner) -> Tensor:
    """Plain hidden states out of what a tensor-parallel body gives, for a head that every rank has as a whole.

    Raises:
        TypeError: a DTensor that is neither replicated nor split along the sequence, or a head that is sharded.
    """
    if owner.shard.vocab_group is not None:
        raise TypeError(
            f"the hidden states at this output layer are a DTensor, {hidden.placements}, while its rows are sharded by "
            f"a {type(owner).__name__} that knows of no tensor parallelism: pass the mesh of the body's tensor "
            "parallelism to cce_dist.fsdp.shard_head(..., tp=mesh['tp']), or give the layer plain tensors."
        )
    sequence = range(1, hidden.ndim - 1)
    if not all(isinstance(p, Replicate) or (isinstance(p, Shard) and p.dim in sequence) for p in hidden.placements):
        raise TypeError(
            f"the hidden states at this output layer are a DTensor with the placements {hidden.placements}; taken are "
            "those that a tensor-parallel body gives, replicated or split along the sequence of [batch, sequence, "
            "hidden]. Call redistribute(placements=[Replicate()]) on them first, or to_local() if each rank's are its "
            "own."
        )
    return hidden.full_tensor()


class _Source:
    """One call of a head: its hidden states and parameters, and the logits once something has needed them."""

    def __init__(self, head: _LazyHead, hidden_XD: Tensor) -> None:
        device = hidden_XD.device.type
        self.head = head
        self.binding = head._cce
        self.autocast = torch.is_autocast_enabled(device) and hidden_XD.dtype != torch.float64
        self.dtype = torch.get_autocast_dtype(device) if self.autocast else hidden_XD.dtype
        self.has_graph = torch.is_grad_enabled()
        self.passes_gradient = self.has_graph and hidden_XD.requires_grad
        self.rows = _RowsOfCall(head, self.has_graph)
        self.hidden_XD = self.rows.in_graph_of(hidden_XD if self.has_graph else hidden_XD.detach())
        self._real: tuple[Tensor, bool] | None = None
        self._statistics: list[tuple[LogitForm, TokenStatistics]] = []
        self._version = _version(self.hidden_XD)

    @property
    def shard(self) -> VocabShard:
        return self.rows.shard

    def with_hidden(self, hidden_XD: Tensor) -> "_Source":
        """The same call on what a hook made of the hidden states; it computes in the dtype it would have had."""
        if hidden_XD is self.hidden_XD:
            return self
        source = copy.copy(self)
        source.hidden_XD, source._real, source._statistics = hidden_XD, None, []
        source.passes_gradient = hidden_XD.requires_grad
        source._version = _version(hidden_XD)
        return source

    def form(self) -> LogitForm:
        """The call's logits, before anything was done to them.

        Raises:
            RuntimeError: the hidden states were changed in place since.
        """
        if _is_changed(self.hidden_XD, self._version):
            raise RuntimeError(
                "the hidden states that the output layer was called with have been changed in place since, and its "
                "logits are computed only where they are used: write to a clone, or use the logits before."
            )
        # What leads to the parameters alone needs no gradient of the hidden states.
        hidden_XD = self.hidden_XD if self.passes_gradient else self.hidden_XD.detach()
        return LogitForm(hidden_XD.to(self.dtype), self.shard.vocab_size, self.dtype)

    def terms(self, form: LogitForm) -> dict[str, Any]:
        """What stands between the form's hidden states and its logits: the rank's rows, and what was done since."""
        weight_RD, bias_R = self.rows.local()
        shard = self.binding.cut(self.shard, form.rows)
        for bias_V in form.biases:
            rows_R = _local_rows(bias_V, shard)
            bias_R = rows_R if bias_R is None else bias_R + rows_R
        return {
            "weight": weight_RD,
            "bias": bias_R,
            "shard": shard,
            "softcap": None if form.cap is None else abs(form.cap),
            "logit_scale": form.scale if form.cap is None else form.scale * form.cap,
        }

    @torch.no_grad()
    def statistics_of(self, form: LogitForm) -> TokenStatistics:
        """Of the form's tokens [X]; on every rank of the shard's group."""
        tokens = form.hidden_XD.shape[:-1]
        terms = self.terms(form)
        flat = token_statistics(form.hidden_XD.flatten(0, -2), terms.pop("weight"), **terms)
        return TokenStatistics(*(x_n.view(tokens) for x_n in flat))

    def statistics(self, form: LogitForm) -> TokenStatistics:
        """Of all tokens of the call [X], under the form's scale, softcap, biases and rows; computed once for those.

        All tokens at once, since ranks whose tokens differ in number may read them in different numbers of pieces.
        """
        for known, statistics in self._statistics:
            same_biases = [id(x) for x in known.biases] == [id(x) for x in form.biases]
            if same_biases and (known.rows, known.scale, known.cap) == (form.rows, form.scale, form.cap):
                return statistics
        computed = self.statistics_of(form._replace(hidden_XD=self.form().hidden_XD))
        self._statistics.append((form._replace(hidden_XD=self.hidden_XD), computed))
        return computed

    def forget_logits(self) -> None:
        self._real = None

    def logits(self, why: str) -> Tensor:
        """The real logits, computed once (once more if first wanted without a graph, then with one)."""
        if self._real is None:
            shape = [*self.hidden_XD.shape[:-1], self.shard.vocab_size]
            report(
                self.binding.config, f"logits {shape} are computed after all: {{place}} uses them in {why}.", _NO_LOGITS
            )
        with_graph = torch.is_grad_enabled() and self.has_graph
        if self._real is None or (with_graph and not self._real[1]):
            with (
                torch.set_grad_enabled(with_graph),
                torch.autocast(self.hidden_XD.device.type, dtype=self.dtype, enabled=self.autocast),
            ):
                real = self.rows.linear(self.form().hidden_XD)
            self._real = (real, with_graph)
        return self._real[0]


class _RowsOfCall:
    """The parameters of a head as they were in one call, and this rank's rows of them.

    What the head's parameters are then is all that the call may depend on: they may be computed anew for every call
    (parametrizations, pruning), or swapped for one alone (functional_call). Where an owner gathers or reads rows out of
    a framework, it does so when the loss runs, lest a copy live as long as the logits do; the parameters must be the
    same ones then.

    Raises:
        RuntimeError: parameters that are not the ones that the head's owner shards.
    """

    def __init__(self, head: _LazyHead, has_graph: bool) -> None:
        self._head, self._owner, self._has_graph = head, head._cce.owner, has_graph
        self._parameters = self._registered()
        self.shard = self._owner.shard
        self._whole: tuple[Tensor, Tensor | None] | None = None
        if isinstance(self._owner, ModuleOwner):
            weight_RD, bias_R = self._read()
            self._whole = (weight_RD, bias_R)
            self.shard = self._owner.shard_of(weight_RD)
            self._versions = [_version(x) for x in self._whole]
        elif self._parameters[0] is None or (self._parameters[1] is None and getattr(head, "bias", None) is not None):
            raise RuntimeError(
                "the weight or bias of this output layer is computed for each call (by a parametrization, pruning or "
                f"weight normalisation), while a {type(self._owner).__name__} shards its rows. Make it a parameter "
                "again (torch.nn.utils.parametrize.remove_parametrizations, prune.remove) before the head is sharded."
            )

    def local(self) -> tuple[Tensor, Tensor | None]:
        """This rank's rows [R, D] and bias [R], differentiable if the call was.

        Raises:
            RuntimeError: the parameters have been replaced, or changed in place, since the call.
        """
        self._check()
        return self._read() if self._whole is None else self._whole

    def _check(self) -> None:
        if self._whole is None and not self._are_in_place():
            raise RuntimeError(
                "the parameters of the output layer have been replaced between its call and the use of its logits: use "
                "them while the parameters are in place."
            )
        if self._whole is not None and any(map(_is_changed, self._whole, self._versions)):
            raise RuntimeError(
                "the parameters of the output layer have been changed in place between its call and the use of its "
                "logits (by an optimizer's step, for instance): use the logits before."
            )

    def _are_in_place(self) -> bool:
        return all(x is y for x, y in zip(self._registered(), self._parameters, strict=True))

    def in_graph_of(self, hidden_XD: Tensor) -> Tensor:
        """The hidden states with the parameters in their graph as well, as logits have them.

        DDP looks in the graph of a model's outputs for the parameters that will get a gradient.
        """
        parameters = [x for x in self._whole or () if x is not None and x.requires_grad]
        if not (self._has_graph and parameters):
            return hidden_XD
        return cast(Tensor, _WithParameters.apply(hidden_XD, *parameters))

    def linear(self, hidden_XD: Tensor) -> Tensor:
        """The real logits; users' hooks have run in the call already."""
        self._check()
        if self._whole is None:
            return cast(Tensor, hooks.call(self._head, self._head.forward, (hidden_XD,), {}, hooks.is_of_sharding))
        return F.linear(hidden_XD, *self._whole)

    def _read(self) -> tuple[Tensor, Tensor | None]:
        with torch.set_grad_enabled(self._has_graph and torch.is_grad_enabled()):
            weight_RD, bias_R = self._owner.local_weight(), self._owner.local_bias()
        if not self._has_graph:
            return weight_RD.detach(), None if bias_R is None else bias_R.detach()
        return weight_RD, bias_R

    def _registered(self) -> tuple[Any, Any]:
        return registered(self._head, "weight"), registered(self._head, "bias")


class _WithParameters(torch.autograd.Function):
    """Identity on the hidden states; backward gives the parameters nothing, since the loss on the logits does."""

    @staticmethod
    def forward(ctx: Any, hidden_XD: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = len(parameters)
        return hidden_XD.detach()  # no view: FSDP2 warns of those

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (grad, *[None] * ctx.parameters)


def _version(x: Tensor | None) -> int | None:
    """Counts the changes of a tensor in place; None where that is not known."""
    return None if x is None or torch.compiler.is_compiling() or x.is_inference() else x._version


def _is_changed(x: Tensor | None, before: int | None) -> bool:
    return before is not None and _version(x) not in (before, None)


_NO_LOGITS = "What needs no logits is F.cross_entropy with class indices, without class weights and label smoothing."
_NO_REENTRANT = (
    "Its backward computes them again with a graph of its own, which lazy logits cannot cross: take "
    "checkpoint(..., use_reentrant=False), or leave the output layer and the loss out of the checkpoint."
)


def _call_site() -> FrameType:
    """The innermost frame that is neither in the files of lazy logits nor in torch."""
    theirs = (*_OUR_FILES, str(Path(torch.__file__).parent))
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(theirs):
        frame = frame.f_back
    return frame


_OUR_FILES = (__file__, hooks.__file__, str(Path(__file__).with_name("transformers.py")))


@dataclass(init=False, eq=False, repr=False)
class LazyLogits:
    """Stands for a head's logits [X, V], which it does not compute. Not a Tensor, but torch's functions take it.

    A pytree node whose one leaf is the hidden states: hooks that look for tensors in a module's output find them.
    """

    hidden_XD: Tensor  # a dataclass field: FSDP2 looks for tensors in dataclasses, not in pytree nodes

    def __init__(self, source: _Source, calls: tuple[Call, ...] = (), form: LogitForm | None = None) -> None:
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
        if self._changed is not None or self._form.of != "logits":
            raise ValueError("statistics() is of the logits that a model returns; these have been changed since.")
        return self._source.statistics_of(self._form)

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
        form = None if function in WITHOUT_GRADIENT and torch.is_grad_enabled() else record(logits._form, call)
        if form is not None:
            return LazyLogits(logits._source, (*logits._calls, call), form)
        if function in _SPLIT and (parts := _split(logits, call)):
            return parts
        statistic = _statistic(logits, call)
        if statistic is not None:
            return statistic
        if function is F.cross_entropy and args[0] is logits:
            args, kwargs = _with_own_labels(logits, args, kwargs)
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
    if logits._source.shard.vocab_group is not None and any(bias.requires_grad for bias in logits._form.biases):
        return "a trained bias that is not sharded as the head is"
    return None


@torch.compiler.disable  # one graph break, in place of one wherever the loss asks the device or the ranks
def _cross_entropy(
    logits: LazyLogits, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean", **_: Any
) -> Tensor:
    """F.cross_entropy; "mean" is over this rank's valid tokens, as the stock loss has it."""
    form, source = logits._form, logits._source
    settings = source.binding.config.loss_kwargs()
    if not source.head.training:
        # Those are of a micro-step in training; batches of evaluation may be larger, and their number is exchanged.
        settings |= {"max_tokens": None, "agreement": "every_call"}
    with torch.autocast(target.device.type, enabled=False), torch.set_grad_enabled(_with_graph(source)):
        terms = source.terms(form)
        # Always "none": the ranks of a shard agree on one reduction, and a caller may change between mean and sum.
        loss_N = linear_cross_entropy(
            form.hidden_XD,
            terms.pop("weight"),
            target,
            ignore_index=ignore_index,
            reduction="none",
            **terms,
            **settings,
        )
    if reduction == "none":
        return loss_N
    return loss_N.sum() if reduction == "sum" else loss_N.sum() / (target != ignore_index).sum()


def _with_graph(source: _Source) -> bool:
    return source.has_graph and torch.is_grad_enabled()


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


def _local_rows(values_V: Tensor, shard: VocabShard) -> Tensor:
    """This shard's entries of a vector over the vocabulary; zero on its padding rows."""
    values_R = torch.cat([values_V[:0], *(values_V[start:stop] for start, stop in shard.runs)])
    return F.pad(values_R, (0, shard.num_rows - values_R.shape[0]))


_METADATA = {
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, torch.numel, Tensor.__len__,
    Tensor.element_size, Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex,
    Tensor.is_signed, torch.is_signed, Tensor.is_contiguous, Tensor.is_same_size, torch.is_same_size,
    Tensor.is_conj, torch.is_conj, Tensor.is_neg, torch.is_neg, torch.result_type,
}  # fmt: skip
_OF_THE_DEVICE = {Tensor.get_device, torch.get_device, Tensor.is_inference, torch.is_inference}
_OF_THE_FORM = {"layout", "itemsize", "nbytes", "name", "grad", "retains_grad", "output_nr"}
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
    rebuilt = copy.copy(logits)
    rebuilt.hidden_XD = hidden_XD
    return rebuilt


register_pytree_node(LazyLogits, _flatten, _unflatten)
