"""One call of a lazy head: what it was called with, and everything that can be made of it later.

In go the head, what `make_lazy` was given, and the hidden states; out come the terms of the loss (this rank's rows as
they were in the call, bias, scale, softcap), statistics of the tokens, the next ones, or, once something needs them,
the real logits.

Shapes: X any leading dimensions, D hidden, V rows of the classifier, R local rows.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cce_dist.config import CCEConfig
from cce_dist.distillation import linear_kl_div
from cce_dist.heads import hooks
from cce_dist.heads.find import registered
from cce_dist.heads.lazy.form import LogitForm, LowRank
from cce_dist.heads.lazy.materialize import report
from cce_dist.heads.owner import ModuleOwner, ShardOwner
from cce_dist.loss import TokenLogprobs, linear_cross_entropy, linear_logprobs, linear_next_token
from cce_dist.loss.statistics import TokenStatistics, token_statistics
from cce_dist.shard import VocabShard


class Choice(NamedTuple):
    """How the last token of a generation was chosen, which a rank that has finished does on with the others.

    Attributes:
        form: of no tokens.
    """

    form: LogitForm
    temperature: float


@dataclass
class Binding:
    """What `make_lazy` was given. It hangs on a class made for one head, so that the head's __dict__ stays as it is."""

    stock: type[nn.Module]
    owner: ShardOwner
    config: CCEConfig
    in_evaluation: bool = False
    fused_where: Callable[[], bool] | None = None
    calls: int = 0
    truncated: dict[tuple[int, int], VocabShard] = field(default_factory=dict)
    choice: Choice | None = None

    def cut(self, shard: VocabShard, rows: int) -> VocabShard:
        """A shard cut to the first rows of the vocabulary: one object per cut, as ranks agree only once."""
        if rows >= shard.vocab_size:
            return shard
        key = (shard.vocab_size, rows)
        if key not in self.truncated:
            self.truncated[key] = replace(shard, vocab_size=rows)
        return self.truncated[key]


class Source:
    """One call of a head: its hidden states and parameters, and the logits once something has needed them.

    Args:
        in_generation: of whose logits the next token is wanted. Where they turn out to be needed nothing is told, as
            of logits in any evaluation.
    """

    def __init__(self, head: nn.Module, binding: Binding, hidden_XD: Tensor, in_generation: bool = False) -> None:
        device = hidden_XD.device.type
        self.head = head
        self.binding = binding
        self.in_generation = in_generation
        in_fp32 = binding.config.fp32_head
        self.autocast = torch.is_autocast_enabled(device) and hidden_XD.dtype != torch.float64 and not in_fp32
        self.hidden_dtype = torch.get_autocast_dtype(device) if self.autocast else hidden_XD.dtype
        self.dtype = torch.promote_types(self.hidden_dtype, torch.float32) if in_fp32 else self.hidden_dtype
        self.has_graph = torch.is_grad_enabled()
        self.passes_gradient = self.has_graph and hidden_XD.requires_grad
        self.rows = _RowsOfCall(head, binding.owner, self.has_graph)
        self.hidden_XD = self.rows.in_graph_of(hidden_XD if self.has_graph else hidden_XD.detach())
        self._real: tuple[Tensor, bool] | None = None
        self._statistics: list[tuple[LogitForm, TokenStatistics]] = []
        self._measured: list[tuple[LogitForm, bool, TokenLogprobs]] = []
        self._version = version_of(self.hidden_XD)

    @property
    def shard(self) -> VocabShard:
        return self.rows.shard

    def with_hidden(self, hidden_XD: Tensor) -> "Source":
        """The same call on what a hook made of the hidden states; it computes in the dtype it would have had."""
        if hidden_XD is self.hidden_XD:
            return self
        source = copy.copy(self)
        source.hidden_XD, source._real, source._statistics, source._measured = hidden_XD, None, [], []
        source.passes_gradient = hidden_XD.requires_grad
        source._version = version_of(hidden_XD)
        return source

    def with_adapter(self, term: LowRank) -> "tuple[Source, LowRank]":
        """The same call and an adapter of it, in one graph, as logits would have them: what waits for the gradient of
        the hidden states, as FSDP2 does to gather the parameters again, waits for those of the adapter too."""
        if not (self.has_graph and (term.a_XR.requires_grad or term.rows_VR.requires_grad)):
            return self, term
        hidden_XD, a_XR, rows_VR = _Joined.apply(self.hidden_XD, term.a_XR, term.rows_VR)
        source = self.with_hidden(hidden_XD)
        source.passes_gradient = self.passes_gradient
        return source, term._replace(a_XR=a_XR, rows_VR=rows_VR)

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
        return LogitForm(hidden_XD.to(self.hidden_dtype), self.shard.vocab_size, self.dtype)

    def terms(self, form: LogitForm) -> dict[str, Any]:
        """What stands between the form's hidden states and its logits: the rank's rows, and what was done since."""
        weight_RD, bias_R = self.rows.local()
        shard = self.binding.cut(self.shard, form.rows)
        for bias_V in form.biases:
            rows_R = self.own_entries(bias_V, form)
            bias_R = rows_R if bias_R is None else bias_R + rows_R
        return {
            "weight": weight_RD,
            "bias": bias_R,
            "shard": shard,
            "softcap": None if form.cap is None else abs(form.cap),
            "logit_scale": form.scale if form.cap is None else form.scale * form.cap,
            **({"adapter": _operands(form)} if form.adapters else {}),
        }

    def own_entries(self, values_V: Tensor, form: LogitForm) -> Tensor:
        """The rank's rows' entries of a vector over the form's vocabulary; zero on padding rows."""
        shard = self.binding.cut(self.shard, form.rows)
        values_R = torch.cat([values_V[:0], *(values_V[start:stop] for start, stop in shard.runs)])
        return F.pad(values_R, (0, shard.num_rows - values_R.shape[0]))

    @torch.no_grad()
    def statistics_of(self, form: LogitForm) -> TokenStatistics:
        """Of the form's tokens [X]; on every rank of the shard's group."""
        tokens = form.hidden_XD.shape[:-1]
        terms = self.terms(form)
        if form.adapters:
            a_XR, rows_VR = terms["adapter"]
            terms["adapter"] = a_XR.flatten(0, -2), rows_VR
        flat = token_statistics(self._wide(form).flatten(0, -2), terms.pop("weight"), **terms)
        return TokenStatistics(*(x_n.view(tokens) for x_n in flat))

    def _of_all_tokens(self, form: LogitForm) -> LogitForm:
        """The form of all tokens of the call."""
        adapters = tuple(adapter._replace(a_XR=adapter.term.a_XR) for adapter in form.adapters)
        return form._replace(hidden_XD=self.form().hidden_XD, adapters=adapters)

    def statistics(self, form: LogitForm) -> TokenStatistics:
        """Of all tokens of the call [X], under the form's scale, softcap, biases and rows; computed once for those.

        All tokens at once, since ranks whose tokens differ in number may read them in different numbers of pieces.
        """
        for known, statistics in self._statistics:
            if _same_terms(known, form):
                return statistics
        computed = self.statistics_of(self._of_all_tokens(form))
        self._statistics.append((form._replace(hidden_XD=self.hidden_XD), computed))
        return computed

    def with_graph(self) -> bool:
        return self.has_graph and torch.is_grad_enabled()

    def misses_a_gradient(self, form: LogitForm) -> bool:
        """Whether a bias was added that is trained and not sharded as the head is: on a rank's rows alone it would get
        a part of its gradient."""
        return self.shard.vocab_group is not None and any(bias.requires_grad for bias in form.biases)

    def check_biases(self, form: LogitForm) -> None:
        """Raises ValueError where one misses a gradient."""
        if self.misses_a_gradient(form):
            raise ValueError(
                "a bias was added to the logits that requires a gradient and is not sharded as the head is: make it "
                "the head's own bias, or freeze it."
            )

    def compute(self, function: Callable[..., Any], form: LogitForm, labels_X: Tensor, settings: dict[str, Any]) -> Any:
        """`linear_cross_entropy`, or another of its arguments, of the form's tokens; in the graph of the call.

        In evaluation without the limits of a micro-step in training: batches may be larger, and their number is
        exchanged.
        """
        if not self.head.training:
            settings = {**settings, "max_tokens": None, "agreement": "every_call"}
        return self.call(function, form, (labels_X,), settings)

    def call(
        self, function: Callable[..., Any], form: LogitForm, arguments: tuple[Tensor, ...], settings: dict[str, Any]
    ) -> Any:
        """A function of hidden states, rows and ``arguments``, of the form's tokens; in the graph of the call.

        Raises:
            ValueError: one that knows of no adapter, where there is one.
        """
        _check_takes_adapter(function, form)
        with torch.autocast(form.hidden_XD.device.type, enabled=False), torch.set_grad_enabled(self.with_graph()):
            terms = self.terms(form)
            hidden_XD = form.hidden_XD if "fp32_head" in settings else self._wide(form)
            return function(hidden_XD, terms.pop("weight"), *arguments, **{**terms, **settings})

    def divergence(
        self,
        form: LogitForm,
        teacher: "Source",
        teacher_form: LogitForm,
        labels_X: Tensor | None,
        settings: dict[str, Any],
    ) -> Tensor:
        """`linear_kl_div` of the form's tokens from another call's, the teacher's; on every rank of the group."""
        for given in (form, teacher_form):
            _check_takes_adapter(linear_kl_div, given)
        with torch.no_grad():
            of_teacher = teacher.terms(teacher_form)
        with torch.autocast(form.hidden_XD.device.type, enabled=False), torch.set_grad_enabled(self.with_graph()):
            own = self.terms(form)
            return linear_kl_div(
                self._wide(form),
                own.pop("weight"),
                teacher._wide(teacher_form),
                of_teacher.pop("weight"),
                labels=labels_X,
                shard=own.pop("shard"),
                teacher_shard=of_teacher.pop("shard"),
                **{f"student_{name}": x for name, x in own.items()},
                **{f"teacher_{name}": x for name, x in of_teacher.items()},
                **settings,
            )

    def logprobs(self, form: LogitForm, labels_X: Tensor, **given: Any) -> TokenLogprobs:
        """Of the form's tokens [X], differentiable; on every rank of the shard's group.

        Raises:
            ValueError: a bias that a gradient is wanted of, which is not sharded as the head is.
        """
        self.check_biases(form)
        settings = {**self.binding.config.logprobs_kwargs(), **given}
        found: TokenLogprobs = self.compute(linear_logprobs, form, labels_X, settings)
        return found

    def measured(self, form: LogitForm, entropy: bool) -> TokenLogprobs:
        """lse and, if asked for, entropy of all tokens of the call [X], differentiable; computed once, as `statistics`
        are. Its log-probabilities mean nothing."""
        for known, graph, found in self._measured:
            if _same_terms(known, form) and graph == self.with_graph() and (found.entropy is not None or not entropy):
                return found
        whole = self._of_all_tokens(form)
        labels_X = torch.zeros(whole.shape[:-1], dtype=torch.int64, device=whole.hidden_XD.device)
        # Labels that are not to be counted; and more tokens than those of a loss, on which ranks agreed before.
        settings = {"frequent_rows": 0, "max_tokens": None, "agreement": "every_call"}
        found = self.logprobs(whole, labels_X, entropy=entropy, **settings)
        self._measured.append((form._replace(hidden_XD=self.hidden_XD), self.with_graph(), found))
        return found

    @torch.no_grad()
    def next_token(self, form: LogitForm, temperature: float) -> Tensor:
        """For each of the form's tokens [X], int64; on every rank of the shard's group. 0: the most likely one."""
        _check_takes_adapter(linear_next_token, form)
        terms = self.terms(form)
        if self.in_generation:
            none_XD = form.hidden_XD.new_empty((0, form.hidden_XD.shape[-1]))
            self.binding.choice = Choice(form._replace(hidden_XD=none_XD), temperature)
        return linear_next_token(self._wide(form), terms.pop("weight"), temperature=temperature, **terms)

    def _wide(self, form: LogitForm) -> Tensor:
        """The form's hidden states for what computes in their dtype, whatever that of the rows: with ``fp32_head`` in
        fp32."""
        return wide(form.hidden_XD) if self.binding.config.fp32_head else form.hidden_XD

    def forget_logits(self) -> None:
        self._real = None

    def logits(self, why: str) -> Tensor:
        """The real logits, computed once (once more if first wanted without a graph, then with one)."""
        if self.in_generation:
            self.binding.choice = None  # of a loop before this one
        if self._real is None and not self.in_generation:
            shape = [*self.hidden_XD.shape[:-1], self.shard.vocab_size]
            report(
                self.binding.config.materialize,
                f"logits {shape} are computed after all: {{place}} uses them in {why}.",
                _NO_LOGITS,
            )
        with_graph = torch.is_grad_enabled() and self.has_graph
        if self._real is None or (with_graph and not self._real[1]):
            with (
                torch.set_grad_enabled(with_graph),
                torch.autocast(self.hidden_XD.device.type, dtype=self.dtype, enabled=self.autocast),
            ):
                real = self.rows.linear(self._wide(self.form())).to(self.dtype)
            self._real = (real, with_graph)
        return self._real[0]


def wide(hidden_XD: Tensor) -> Tensor:
    """Hidden states as ``fp32_head`` multiplies them in a library's product, whose sums have their dtype."""
    return hidden_XD.to(torch.promote_types(hidden_XD.dtype, torch.float32))


def in_dtype_of_hidden(head: nn.Module, hidden_XD: Tensor) -> Tensor:
    """The head's forward; of parameters of another dtype, which autocast is not there to cast, that of a copy."""
    kept = registered(head, "weight")  # as an attribute it may be what FSDP's mixed precision makes of it
    is_cast = torch.is_autocast_enabled(hidden_XD.device.type)
    if kept is None or kept.dtype == hidden_XD.dtype or is_cast:
        return cast(Tensor, head.forward(hidden_XD))
    weight, bias = cast(Tensor, head.weight), cast("Tensor | None", head.bias)
    return F.linear(hidden_XD, weight.to(hidden_XD.dtype), None if bias is None else bias.to(hidden_XD.dtype))


class _RowsOfCall:
    """The parameters of a head as they were in one call, and this rank's rows of them.

    What the head's parameters are then is all that the call may depend on: they may be computed anew for every call
    (parametrizations, pruning), or swapped for one alone (functional_call). Where an owner gathers or reads rows out of
    a framework, it does so when the loss runs, lest a copy live as long as the logits do; the parameters must be the
    same ones then.

    Raises:
        RuntimeError: parameters that are not the ones that the head's owner shards.
    """

    def __init__(self, head: nn.Module, owner: ShardOwner, has_graph: bool) -> None:
        self._head, self._owner, self._has_graph = head, owner, has_graph
        self._parameters = self._registered()
        self.shard = self._owner.shard
        self._whole: tuple[Tensor, Tensor | None] | None = None
        if isinstance(self._owner, ModuleOwner):
            weight_RD, bias_R = self._read()
            self._whole = (weight_RD, bias_R)
            self.shard = self._owner.shard_of(weight_RD)
            self._versions = [version_of(x) for x in self._whole]
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
            forward = partial(in_dtype_of_hidden, self._head)
            return cast(Tensor, hooks.call(self._head, forward, (hidden_XD,), {}, hooks.is_of_sharding))
        weight_RD, bias_R = self._whole
        if not torch.is_autocast_enabled(hidden_XD.device.type):
            weight_RD = weight_RD.to(hidden_XD.dtype)
            bias_R = None if bias_R is None else bias_R.to(hidden_XD.dtype)
        return F.linear(hidden_XD, weight_RD, bias_R)

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


class _Joined(torch.autograd.Function):
    """Identity, with one backward for all."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads


def _operands(form: LogitForm) -> tuple[Tensor, Tensor]:
    """(a [X, R], B [Vl, R]) of all adapters together, side by side.

    Raises:
        RuntimeError: B has been changed in place since the call.
    """
    if any(_is_changed(adapter.term.rows_VR, adapter.term.version) for adapter in form.adapters):
        raise RuntimeError(
            "lora_B of the output layer has been changed in place between its call and the use of its logits (by an "
            "optimizer's step, for instance): use the logits before."
        )
    a = [adapter.a_XR if adapter.ratio == 1.0 else adapter.a_XR * adapter.ratio for adapter in form.adapters]
    rows = [adapter.term.rows_VR for adapter in form.adapters]
    return (a[0], rows[0]) if len(a) == 1 else (torch.cat(a, -1), torch.cat(rows, -1))


def _check_takes_adapter(function: Callable[..., Any], form: LogitForm) -> None:
    if form.adapters and function not in (linear_cross_entropy, linear_logprobs):
        raise ValueError(
            f"{function.__name__} of an output layer with a LoRA adapter is not supported: merge the adapter, or leave "
            "the output layer out of its target_modules."
        )


def _same_terms(one: LogitForm, other: LogitForm) -> bool:
    """Whether two forms make the same logits of the same hidden states."""
    same_biases = [id(x) for x in one.biases] == [id(x) for x in other.biases]
    adapters = [[(id(x.term.a_XR), id(x.term.rows_VR), x.ratio) for x in form.adapters] for form in (one, other)]
    return (
        same_biases
        and adapters[0] == adapters[1]
        and (one.rows, one.scale, one.cap) == (other.rows, other.scale, other.cap)
    )


def version_of(x: Tensor | None) -> int | None:
    """Counts the changes of a tensor in place; None where that is not known."""
    return None if x is None or torch.compiler.is_compiling() or x.is_inference() else x._version


def _is_changed(x: Tensor | None, before: int | None) -> bool:
    return before is not None and version_of(x) not in (before, None)


_NO_LOGITS = (
    "What needs no logits is F.cross_entropy with class indices (label smoothing and class weights too); "
    "log_softmax, gathered at one id a token or summed; logsumexp; argmax; the entropy; and logits.logprobs(labels)."
)
