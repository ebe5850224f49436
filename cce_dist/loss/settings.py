"""The settings of the loss: each is one field here, with its default, its check, and the rule that an error states.

`LossSettings` are those that a config file can fix, and the base of `CCEConfig`; `TokenSettings` adds what logits and
labels mean, `CallSettings` what the loss of a call is, `LogprobSettings` what is wanted beside log-probabilities.
`linear_cross_entropy` and `linear_logprobs` take the fields as keywords, the ranks agree on them (`contract`), and
docs/reference.md and the docstrings are tested against them. `resolve` turns what is left open into a `Method`, once
the tensors are known.

Shapes: D hidden, V local rows of the classifier.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf, ValidationError
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from cce_dist.device_check import check_token_ids, device_check
from cce_dist.kernels.problem import KEPT_SUMS_BYTES, MOST_SUMMED, TILE
from cce_dist.shard import VocabShard

Gradient = Literal["unbiased", "exact", "filtered"]
Backend = Literal["auto", "triton", "torch"]
FirstPass = Literal["auto", "full", "fp8"]
Agreeing = Literal["every_call", "first_call"]
Reduction = Literal["mean", "sum", "none"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_EXACT_WORKSPACE_MB = 256
_SPARSE_WORKSPACE_MB = 64
MANY_FREQUENT, LARGE_VOCABULARY = 4096, 32768
"""How many frequent rows ``frequent_rows=None`` stands for, of how many rows or more."""
FREQUENT_WORKSPACE = 32 << 20
"""Bytes for their probabilities in a single process; with more, products are fewer and larger, and no faster."""
_LARGEST_ESTIMATED = 2.0**-9.3
_OF_ENTROPY = 0.5
"""eps of the entropy's gradient, of that of the loss: what is sampled of it counts log p times as much. So a policy's
gradient, 0.01 entropies to a log-probability, is as near as with bf16 logits (benchmarks/logprobs.py, on an H100)."""
MAY_DIFFER: dict[str, Any] = {"may_differ": True}
"""Marks a field that ranks may set differently."""


def _no_tensor(x: Any) -> Any:
    """A learned scale would silently get no gradient."""
    if isinstance(x, Tensor):
        raise ValueError("a tensor")
    return x


Float = Annotated[float, BeforeValidator(_no_tensor)]


def _is_scalar(x: Tensor) -> Tensor:
    if x.ndim:
        raise ValueError("a tensor must be 0-d")
    return x


def _of_floats(x: Tensor) -> Tensor:
    if not x.is_floating_point() or x.requires_grad:
        raise ValueError("a tensor must be of floats, without a gradient")
    return x


def _int_or_logits(x: Any) -> Any:
    """Of a union's errors pydantic would show that of the int."""
    if isinstance(x, str) and x != "logits" and not x.strip().isdecimal():
        raise ValueError('must be an int, 1 or more, "logits" or None')
    return x


Megabytes = Annotated[int, Field(ge=1)] | Literal["logits"]


class LossSettings(BaseModel):
    """How the loss is computed. A description completes "... must be"; None leaves the choice to the loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gradient: Gradient | None = Field(default=None, description='"unbiased", "exact", "filtered" or None')
    tail: bool = Field(default=True, description="True or False")
    filter_eps: float | None = Field(default=None, ge=0.0, lt=1.0, description='"auto", None or in [0, 1)')
    backend: Backend = Field(default="auto", description='"auto", "triton" or "torch"')
    first_pass: FirstPass = Field(default="auto", description='"auto", "full" or "fp8"')
    fp32_head: bool = Field(default=False, description="True or False")
    frequent_rows: int | None = Field(default=None, ge=0, description="an int, 0 or more (0: none), or None")
    workspace_mb: Annotated[Megabytes | None, BeforeValidator(_int_or_logits)] = Field(
        default=None, description='an int, 1 or more, "logits" or None'
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | InstanceOf[Tensor] | None = Field(
        default=None, description="a 64-bit int, a 0-d int64 tensor or None", json_schema_extra=MAY_DIFFER
    )
    max_tokens: int | None = Field(default=None, ge=1, description="an int, 1 or more, or None")
    agreement: Agreeing = Field(default="every_call", description='"every_call" or "first_call"')


Statistic = Literal["top1", "rank", "sum_sq_probs", "mean_logit"]


def _each_once(names: tuple[Statistic, ...]) -> tuple[Statistic, ...]:
    if len(set(names)) < len(names):
        raise ValueError("a name stands twice")
    return names


class TokenSettings(LossSettings):
    """The same, what the logits and labels of one call are, and what is told of them beside."""

    model_config = ConfigDict(strict=True)
    function: ClassVar[str]
    in_full: ClassVar[bool] = False
    """Whether forward must give the same bits with and without a gradient: never in 8 bits."""

    ignore_index: int = Field(default=-100, description="an int")
    shift: int = Field(default=0, ge=0, description="an int, 0 or more (0 for one label)")
    softcap: Float | None = Field(default=None, gt=0, allow_inf_nan=False, description="a positive float or None")
    logit_scale: Float | None = Field(default=None, allow_inf_nan=False, description="a finite float or None")
    statistics: Annotated[tuple[Statistic, ...], BeforeValidator(tuple), AfterValidator(_each_once)] = Field(
        default=(), description='names out of "top1", "rank", "sum_sq_probs" and "mean_logit", each once'
    )

    @property
    def scale(self) -> float:
        return 1.0 if self.logit_scale is None else self.logit_scale


class CallSettings(TokenSettings):
    """The same, and what the loss of one call is."""

    function: ClassVar[str] = "linear_cross_entropy"

    reduction: Reduction = Field(default="mean", description='"mean", "sum" or "none"')
    label_smoothing: Float = Field(default=0.0, ge=0, le=1, description="a float in [0, 1]")
    z_loss: Float = Field(default=0.0, ge=0, allow_inf_nan=False, description="a finite float, 0 or more")
    class_weights: Annotated[InstanceOf[Tensor], AfterValidator(_of_floats)] | None = Field(
        default=None, description="a tensor of floats that requires no gradient, or None", json_schema_extra=MAY_DIFFER
    )
    token_weights: Annotated[InstanceOf[Tensor], AfterValidator(_of_floats)] | None = Field(
        default=None, description="a tensor of floats that requires no gradient, or None", json_schema_extra=MAY_DIFFER
    )
    grad_accumulator: InstanceOf[Tensor] | None = Field(
        default=None, description="a tensor or None", json_schema_extra=MAY_DIFFER
    )
    num_valid_tokens: Annotated[int, Field(ge=0)] | Annotated[InstanceOf[Tensor], AfterValidator(_is_scalar)] | None = (
        Field(None, description="an int, 0 or more, a 0-d tensor or None", json_schema_extra=MAY_DIFFER)
    )


class LogprobSettings(TokenSettings):
    """The same, and what is wanted of each token beside the log-probability of its label."""

    function: ClassVar[str] = "linear_logprobs"
    in_full: ClassVar[bool] = True

    first_pass: Literal["auto", "full"] = Field(default="auto", description='"auto" or "full"')
    temperature: (
        Annotated[float, Field(gt=0, allow_inf_nan=False)] | Annotated[InstanceOf[Tensor], AfterValidator(_of_floats)]
    ) = Field(default=1.0, description="a positive float, or a tensor of them that requires no gradient")
    entropy: bool | Literal["value"] = Field(default=False, description='True, "value" or False')
    exact_sums: bool = Field(default=False, description="True or False")


class FunctionSettings(BaseModel):
    """The keywords of a function that takes no labels."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    function: ClassVar[str]


class LogitSettings(FunctionSettings):
    """The same, and what makes logits of products."""

    softcap: Float | None = Field(default=None, gt=0, allow_inf_nan=False, description="a positive float or None")
    logit_scale: Float | None = Field(default=None, allow_inf_nan=False, description="a finite float or None")


class SamplingSettings(LogitSettings):
    """What `linear_next_token` draws from, and by what."""

    function: ClassVar[str] = "linear_next_token"

    temperature: Float = Field(default=1.0, ge=0, allow_inf_nan=False, description="a finite float, 0 or more")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | InstanceOf[Tensor] | None = Field(
        default=None, description="a 64-bit int, a 0-d int64 tensor or None", json_schema_extra=MAY_DIFFER
    )


def rows_dtype(hidden: torch.dtype, weight: torch.dtype, fp32_head: bool) -> torch.dtype:
    """In which the rows meet hidden states: theirs; with ``fp32_head`` at least fp32, where they are not of one."""
    return torch.promote_types(hidden, torch.float32) if fp32_head and weight != hidden else hidden


def at_temperature(scale: float, softcap: float | None, temperature: float) -> tuple[float, float | None]:
    """Scale and softcap of f(s·x)/τ = (cap/τ)·tanh((s/τ)·x / (cap/τ))."""
    return scale / temperature, None if softcap is None else softcap / temperature


Settings = TypeVar("Settings", bound="TokenSettings | FunctionSettings")


def check_settings(given: Mapping[str, Any], kind: type[Settings]) -> Settings:
    """The settings of a call.

    Raises:
        TypeError: an unknown one. ValueError: one that is not allowed; both by name.
    """
    if given.get("filter_eps") == "auto":
        given = {**given, "filter_eps": None}
    unknown = [name for name in given if name not in kind.model_fields]
    if unknown:
        raise TypeError(
            f"{kind.function} takes no argument {', '.join(unknown)}; its settings are {', '.join(kind.model_fields)}."
        )
    return checked(kind, given)


Model = TypeVar("Model", bound=BaseModel)


def checked(kind: type[Model], given: Mapping[str, Any]) -> Model:
    """Raises ValueError by the name of a field that is not what its description says."""
    try:
        return kind(**given)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        _require(False, f"{name} must be {kind.model_fields[name].description}", given[name])
        raise


def takes_settings(kind: type[TokenSettings | FunctionSettings]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a function that takes ``**settings`` the signature with each of them by name, as help() shows it."""

    def named(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        settings = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.annotation)
            for name, field in kind.model_fields.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *settings])  # type: ignore[attr-defined]
        return function

    return named


class Method(NamedTuple):
    """What the settings leave open, chosen: how this call is computed."""

    gradient: Gradient
    filter_eps: float
    backend: Literal["triton", "torch"]
    first_pass: Literal["full", "fp8"]
    frequent_rows: int

    @property
    def refine_eps(self) -> float:
        """Softmax mass above which the 8-bit pass is refined: the loss is no less exact where the filter leaves out
        more."""
        return min(self.filter_eps, _LARGEST_ESTIMATED)


def resolve(settings: TokenSettings, hidden: Tensor, labels: Tensor, shard: VocabShard, needs_grad: bool) -> Method:
    """Chooses what is open.

    Raises:
        ValueError: a setting that does not go with the tensors, the shard or another setting.
    """
    _require(labels.ndim > 0 or settings.shift == 0, "shift must be 0 for one label, which has no axis", settings.shift)
    if isinstance(settings, CallSettings):
        _require(
            settings.num_valid_tokens is None or settings.reduction == "mean",
            'num_valid_tokens goes with reduction="mean"',
            repr(settings.reduction),
        )
        _check_weights("token_weights", settings.token_weights, labels.shape, "one for each label", hidden.device)
        rows = torch.Size([shard.num_rows])
        _check_weights("class_weights", settings.class_weights, rows, "one for each row of weight", hidden.device)
        _check_accumulator(settings.grad_accumulator, torch.Size([shard.num_rows, hidden.shape[-1]]), hidden)
    if isinstance(settings, LogprobSettings) and settings.exact_sums:
        _check_exact_sums(settings, shard.vocab_size)
    check_seed(settings.seed, hidden.device)
    tokens = labels.numel()
    _require(
        settings.max_tokens is None or settings.max_tokens >= tokens,
        f"max_tokens must be an int, at least this rank's {tokens} tokens, or None",
        settings.max_tokens,
    )
    _require(
        not settings.fp32_head or hidden.dtype != torch.float16,
        "fp32_head=True needs hidden states in bf16, fp32 or fp64: fp16 has no range for the parts of fp32 rows; cast "
        "them, or leave it out",
        str(hidden.dtype),
    )
    _require(
        settings.agreement == "every_call" or shard.token_group is None or settings.max_tokens is not None,
        'agreement="first_call" needs max_tokens where each rank brings its own tokens, since the ranks do not '
        "exchange their numbers then",
        settings.max_tokens,
    )
    backend = choose_backend(settings.backend, hidden)
    gradient = settings.gradient or choose_gradient(backend, settings.filter_eps)
    frequent = _frequent_rows(settings, backend, hidden, shard.vocab_size, needs_grad)
    if isinstance(settings, LogprobSettings) and settings.exact_sums:
        frequent = 0  # they depend on what labels there are
    eps = _eps(gradient, shard.vocab_size, frequent) if settings.filter_eps is None else settings.filter_eps
    if settings.filter_eps is None and isinstance(settings, LogprobSettings) and settings.entropy is True:
        eps *= _OF_ENTROPY
    exact = gradient == "exact" or eps == 0
    _check_kept(settings, exact, gradient, hidden.dtype)
    asked_exact = exact and settings.gradient is not None
    _require(
        not settings.fp32_head or settings.first_pass != "fp8",
        'fp32_head=True goes with first_pass="full" or "auto": estimates from 8-bit copies are no logits in fp32',
        "first_pass='fp8'",
    )
    in_full = asked_exact or settings.in_full or settings.fp32_head or not needs_grad
    first_pass = "full" if in_full else _first_pass(settings.first_pass, hidden, backend)
    if exact:
        return Method("exact", eps, backend, "full", 0)
    return Method(gradient, eps, backend, first_pass, frequent)


def _check_kept(settings: TokenSettings, exact: bool, gradient: str, dtype: torch.dtype) -> None:
    if settings.workspace_mb == "logits":
        _require(
            exact,
            'workspace_mb="logits" goes with gradient="exact": other gradients compute a part of the logits again',
            gradient,
        )
        _require(
            dtype != torch.float16,
            'workspace_mb="logits" goes with bf16 or fp32: fp16 has no range for exponentials of logits; give a number',
            dtype,
        )
        _require(
            not (isinstance(settings, LogprobSettings) and settings.exact_sums),
            'workspace_mb="logits" goes without exact_sums, whose pass keeps no logits; give a number',
            "exact_sums=True",
        )
        _require(
            not settings.fp32_head,
            'workspace_mb="logits" goes without fp32_head, which computes logits again; give a number',
            "fp32_head=True",
        )


def _check_weights(name: str, given: Tensor | None, shape: torch.Size, what: str, device: torch.device) -> None:
    if given is not None:
        check_plain(name, given)
        _require(
            given.device == device and given.shape == shape,
            f"{name} must be {list(shape)}, {what}, on {device}",
            f"{list(given.shape)} on {given.device}",
        )


def _check_accumulator(given: Tensor | None, shape: torch.Size, hidden: Tensor) -> None:
    if given is not None:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        _require(
            not isinstance(given, DTensor)
            and (given.device, given.shape, given.dtype) == (hidden.device, shape, dtype)
            and given.is_contiguous()
            and not given.requires_grad,
            f"grad_accumulator must be a contiguous {dtype} tensor of weight's shape {list(shape)} on {hidden.device} "
            "that requires no gradient",
            f"{'a DTensor, ' if isinstance(given, DTensor) else ''}{given.dtype} of shape {list(given.shape)} and "
            f"strides {list(given.stride())} on {given.device}, requires_grad={given.requires_grad}",
        )


def _check_exact_sums(settings: LogprobSettings, vocab_size: int) -> None:
    for name in ("entropy", "statistics"):
        _require(
            not getattr(settings, name),
            f"exact_sums=True gives logprob and lse, and goes without {name}: call linear_logprobs once more, without "
            "exact_sums, for that",
            f"{name}={getattr(settings, name)!r}",
        )
    _require(
        vocab_size < MOST_SUMMED,
        f"exact_sums=True adds at most {MOST_SUMMED - 1} rows in 64 bits; leave it out for a larger vocabulary",
        f"{vocab_size} rows",
    )


def contract(
    hidden: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    shard: VocabShard,
    settings: TokenSettings,
    method: Method,
    adapter: tuple[Tensor, Tensor] | None = None,
) -> Mapping[str, Any]:
    """What every rank of the vocabulary group must say alike in a call, by name."""
    alike = alike_of(settings)
    if isinstance(settings, CallSettings) and settings.num_valid_tokens is not None:
        alike["reduction"] += " with num_valid_tokens"
    if isinstance(settings, CallSettings) and settings.class_weights is not None:
        alike["reduction"] += " with class_weights"
    if isinstance(settings, CallSettings) and settings.grad_accumulator is not None:
        alike["reduction"] += " with grad_accumulator"
    if settings.fp32_head:  # else rows are cast to hidden's
        alike["weight's dtype"] = str(weight_VD.dtype)
    if isinstance(settings, LogprobSettings):
        each = isinstance(settings.temperature, Tensor)
        alike["temperature"] = "one for each token" if each else settings.temperature
    if adapter is not None:
        grad = [torch.is_grad_enabled() and x.requires_grad for x in adapter]
        alike["adapter"] = f"{adapter[1].shape[1]} columns, {adapter[1].dtype}, need of gradients {grad}"
    return {
        **contract_of_head(hidden, weight_VD, bias_V, shard),
        **alike,
        **method._asdict(),
    }


def contract_of_head(hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None, shard: VocabShard) -> dict[str, Any]:
    """What of tensors and shard must be alike, by name."""
    grad = torch.is_grad_enabled()
    return {
        "vocab_size": shard.vocab_size,
        "grad mode": grad,
        "hidden's last dimension": hidden.shape[-1],
        "hidden's dtype": str(hidden.dtype),
        "hidden's need of a gradient": grad and hidden.requires_grad,
        "weight's need of a gradient": grad and weight_VD.requires_grad,
        "bias": bias_V is not None,
        "bias's need of a gradient": grad and bias_V is not None and bias_V.requires_grad,
        "token_group": _size(shard.token_group),
        "count_group": _size(shard.count_group),
        "reduce_dtype": str(shard.reduce_dtype),
    }


def alike_of(settings: BaseModel) -> dict[str, Any]:
    """The settings that must be alike, by name."""
    return {
        name: getattr(settings, name)
        for name, field in type(settings).model_fields.items()
        if not field.json_schema_extra
    }


def check_head(hidden: Any, weight_VD: Any, bias_V: Any, shard: VocabShard, of: str = "") -> None:
    """Raises TypeError or ValueError where hidden states and rows do not fit together or to the shard.

    Args:
        of: how the arguments' names begin.
    """
    for name, x in (("hidden", hidden), ("weight", weight_VD), ("bias", bias_V)):
        if name != "bias" or x is not None:
            _check_dense(f"{of}{name}", x)
            _require(x.is_floating_point(), f"{of}{name} must be a floating-point tensor", x.dtype)
    _require(hidden.dtype in _DTYPES, f"{of}hidden must be fp32, fp16, bf16 or fp64", hidden.dtype)
    _require(
        hidden.ndim >= 1 and weight_VD.ndim == 2 and weight_VD.shape[1] == hidden.shape[-1],
        f"{of}hidden must be [..., D] and {of}weight [V, D] with the same D",
        f"hidden {list(hidden.shape)} and weight {list(weight_VD.shape)}",
    )
    rows = shard.num_rows
    _require(
        weight_VD.shape[0] == rows,
        f"{of}weight must hold the shard's {rows} rows {shard.runs} (pass this rank's rows, or build the VocabShard "
        "from the split that was used)",
        f"{weight_VD.shape[0]} rows",
    )
    fits = bool(bias_V is None or list(bias_V.shape) == [rows])
    _require(fits, f"{of}bias must be [{rows}], one entry per local row", bias_V)
    devices = {str(x.device) for x in (hidden, weight_VD, bias_V) if x is not None}
    _require(len(devices) == 1, f"{of}hidden, {of}weight and {of}bias must be on one device", sorted(devices))


def check_plain(name: str, x: Any) -> None:
    """Raises ValueError for a DTensor."""
    _require(not isinstance(x, DTensor), f"{name} must be a plain tensor; pass its to_local()", "a DTensor")


def check_integers(name: str, x: Any, *devices: torch.device) -> None:
    """Raises TypeError or ValueError where that is no tensor of integers on one of the devices."""
    _check_dense(name, x)
    is_integral = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    _require(is_integral, f"{name} must be integers", x.dtype)
    _require(x.device in devices, f"{name} must be on {' or '.join(map(str, dict.fromkeys(devices)))}", x.device)


def check_label_tensor(labels: Any, hidden: Tensor, *devices: torch.device, of: str = "") -> None:
    """Raises TypeError or ValueError where they are no integers on one of the devices, one for each of the tokens."""
    check_integers("labels", labels, *devices)
    expected = list(hidden.shape[:-1])
    _require(
        list(labels.shape) == expected, f"labels must have {of}hidden's shape less its last axis, {expected}", labels
    )


def _check_dense(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}.")
    _require(x.layout == torch.strided, f"{name} must be a dense tensor", x.layout)


def check_adapter(given: Any, hidden: Tensor, weight_VD: Tensor, settings: TokenSettings) -> None:
    """Raises TypeError or ValueError for an adapter's operands that do not fit, or go with what is given beside."""
    rule = "adapter must be None or (a, B), two plain tensors of floats"
    if not (isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(x, Tensor) for x in given)):
        raise TypeError(f"{rule}; got {type(given).__name__}.")
    _require(
        not isinstance(hidden, DTensor), "adapter goes with plain hidden states; pass their to_local()", "a DTensor"
    )
    a, b = given
    for x in (a, b):
        if isinstance(x, DTensor) or x.dtype not in _DTYPES:
            raise TypeError(f"{rule}, fp32, fp16, bf16 or fp64; got {type(x).__name__} of {x.dtype}.")
        _require(x.device == hidden.device, f"adapter must be on {hidden.device}, as hidden is", str(x.device))
    expected = [*hidden.shape[:-1], b.shape[-1] if b.ndim == 2 else "R"]
    _require(
        b.ndim == 2 and b.shape[0] == weight_VD.shape[0] and list(a.shape) == expected and b.shape[1] > 0,
        f"adapter must be (a {expected}, B [{weight_VD.shape[0]}, R]): one row of a for each token, of B for each row "
        "of weight",
        f"a {list(a.shape)} and B {list(b.shape)}",
    )
    _require(
        b.shape[1] <= hidden.shape[-1],
        "adapter must have at most hidden's number of columns, of which a whole weight is better",
        f"{b.shape[1]} columns beside {hidden.shape[-1]}",
    )
    _require(
        not (torch.is_grad_enabled() and weight_VD.requires_grad),
        "adapter goes with a frozen weight: only the adapter's gradient is computed. Call weight.requires_grad_(False) "
        "or leave the adapter out",
        "a weight that requires a gradient",
    )
    _require(
        not (isinstance(settings, LogprobSettings) and settings.exact_sums),
        "adapter goes without exact_sums=True: merge the adapter into the weight for that",
        "both",
    )
    _require(
        not settings.fp32_head,
        "adapter goes without fp32_head=True, whose products it has no part in: merge the adapter into the weight, or "
        "leave fp32_head out",
        "both",
    )
    _require(
        not (isinstance(settings, CallSettings) and settings.label_smoothing and settings.softcap is not None),
        "adapter goes without label_smoothing beside a softcap: merge the adapter into the weight for that",
        "all three",
    )
    _require(
        settings.workspace_mb != "logits",
        'adapter goes without workspace_mb="logits": backward computes logits with one again; give a number or None',
        "both",
    )


def legal_labels(ignore_index: int, vocab_size: int) -> str:
    """What labels must be, for an error's text."""
    return f"labels must be in [0, {vocab_size}) or ignore_index = {ignore_index}"


def check_labels(labels: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Raises ValueError for a label out of range. On CUDA a device-side assertion does, which does not wait."""
    check_token_ids(labels, vocab_size, ignore_index, legal_labels(ignore_index, vocab_size))


def check_seed(seed: int | Tensor | None, device: torch.device) -> None:
    """Raises ValueError for a tensor that is no seed."""
    if isinstance(seed, Tensor):
        _require(
            seed.ndim == 0 and seed.dtype == torch.int64 and seed.device == device,
            f"a tensor as seed must be int64, 0-d, on {device}",
            f"{seed.dtype} of shape {list(seed.shape)} on {seed.device}",
        )


def check_temperatures(temperature_n: Tensor) -> None:
    """Raises ValueError for one that is not positive and finite. On CUDA a device-side assertion does."""
    holds = ((temperature_n > 0) & temperature_n.isfinite()).all()
    message = "temperature must be positive and finite for every token"
    if temperature_n.is_cuda:
        device_check(holds, message)
    elif not holds:
        raise ValueError(message + ".")


def choose_gradient(backend: str, filter_eps: float | None) -> Gradient:
    """What ``gradient=None`` stands for: the torch backend is fastest with "exact", Triton with "unbiased"."""
    return "unbiased" if backend == "triton" or filter_eps is not None else "exact"


def workspace_bytes(
    workspace_mb: int | Literal["logits"] | None, method: Method, num_tokens: int, element_size: int
) -> int:
    """The memory that backward may use, for all tokens that the loss works on: equal on all ranks. With "logits" it is
    that beside them.

    Raises:
        ValueError: where ``workspace_mb`` is less than one tile of probabilities of all tokens.
    """
    least_mb = least_workspace_mb(num_tokens, element_size)
    chosen = workspace_mb
    if chosen is None or chosen == "logits":
        chosen = default_workspace_mb(num_tokens, element_size, method.gradient == "exact")
    _require(
        chosen >= least_mb,
        f"workspace_mb must be at least {least_mb}, {TILE * element_size} bytes for each of the {num_tokens} tokens",
        chosen,
    )
    return chosen << 20


class Split(NamedTuple):
    """A budget: columns of this rank whose exponentials forward keeps, and the bytes that backward may use beside."""

    columns: int
    workspace: int


def split_budget(
    workspace_mb: int | Literal["logits"] | None,
    workspace: int,
    method: Method,
    num_tokens: int,
    rows: int,
    dtype: torch.dtype,
    read: bool,
) -> Split:
    """What forward keeps of ``rows`` of the classifier, out of ``workspace`` bytes, or beside them with "logits".

    Backward works on all of it with no more memory than dC's sums take, unless it must be ``read``; else the default
    workspace is left for that and for what was not kept.
    """
    keeps = method.gradient == "exact" and method.backend == "triton" and dtype != torch.float16
    if not keeps or workspace_mb is None or not num_tokens or not rows:
        return Split(0, workspace)
    if workspace_mb == "logits":
        return Split(rows, workspace)
    tile_bytes = num_tokens * TILE * dtype.itemsize
    all_tiles = -(-rows // TILE)
    sums = 0 if dtype == torch.float32 else KEPT_SUMS_BYTES
    if not read and all_tiles * tile_bytes + sums <= workspace:
        return Split(rows, workspace - all_tiles * tile_bytes)
    beside = default_workspace_mb(num_tokens, dtype.itemsize, exact=True) << 20
    tiles = min(max(workspace - beside, 0) // tile_bytes, all_tiles)
    return Split(min(tiles * TILE, rows), workspace - tiles * tile_bytes)


def least_workspace_mb(num_tokens: int, element_size: int) -> int:
    """One tile of probabilities of all tokens."""
    return max(-(-num_tokens * TILE * element_size // (1 << 20)), 1)


def default_workspace_mb(num_tokens: int, element_size: int, exact: bool) -> int:
    """What ``workspace_mb=None`` stands for.

    With fewer probabilities at hand the sparse backward waits for them, and tiles of many tokens need more.
    """
    least_mb = least_workspace_mb(num_tokens, element_size)
    return max(_EXACT_WORKSPACE_MB, least_mb) if exact else _SPARSE_WORKSPACE_MB + 8 * least_mb


def _require(holds: bool, rule: str, got: Any) -> None:
    if not holds:
        shown = _shown(got) if isinstance(got, Tensor) else got
        raise ValueError(
            f"{rule}; got {shown!r}." if isinstance(shown, str) and shown is got else f"{rule}; got {shown}."
        )


def _size(group: ProcessGroup | None) -> str:
    return "none" if group is None else f"{group.size()} rank(s)"


def _shown(x: Tensor) -> str:
    return f"shape {list(x.shape)}" if x.ndim else f"a 0-d {x.dtype} tensor"


def _eps(gradient: Gradient, vocab_size: int, frequent_rows: int) -> float:
    """What benchmarks/results asks for, at V = 50k and 128k to 262k: with "unbiased", errors of dE and dC like those of
    bf16 logits (torch.compile); with "filtered", one of dE just below 1e-2. Without the frequent rows less mass is in
    the tiles, and as much of it may be left out as makes the same errors."""
    is_large = vocab_size >= 100_000
    if frequent_rows >= MANY_FREQUENT:
        if gradient == "filtered":
            return 2.0**-7.4 if is_large else 2.0**-9.9
        return 2.0**-8.3 if is_large else 2.0**-8.2
    if gradient == "filtered":
        return 2.0**-9.4 if is_large else 2.0**-10.25
    if vocab_size >= 200_000:
        return 2.0**-9.3
    return 2.0**-9.5 if is_large else 2.0**-9


def choose_backend(backend: Backend, hidden: Tensor) -> Literal["triton", "torch"]:
    """What computes, where "auto" leaves it open. Raises ValueError where Triton cannot."""
    can_triton = hidden.dtype != torch.float64 and (hidden.is_cuda or _interpreted())
    _require(
        backend != "triton" or can_triton,
        'backend="triton" needs CUDA tensors (or TRITON_INTERPRET=1 in the environment) of at most 32 bits; use '
        '"torch" or "auto"',
        f"{hidden.dtype} on {hidden.device.type}",
    )
    return "triton" if backend == "triton" or (backend == "auto" and hidden.is_cuda and can_triton) else "torch"


def _first_pass(first_pass: FirstPass, hidden: Tensor, backend: str) -> Literal["full", "fp8"]:
    """ "auto" is where benchmarks/results show that it pays; the interpreter computes it if asked, for tests."""
    can_fp8 = backend == "triton" and hidden.element_size() == 2
    if hidden.is_cuda:
        can_fp8 = can_fp8 and torch.cuda.get_device_capability(hidden.device) >= (8, 9)
    _require(
        first_pass != "fp8" or can_fp8,
        'first_pass="fp8" needs 16-bit hidden states, backend="triton" and an NVIDIA GPU of compute capability 8.9 or '
        'more (Ada, Hopper or later); use "full" or "auto"',
        f'{hidden.dtype} on {hidden.device.type} with backend="{backend}"',
    )
    if first_pass == "auto":
        pays = can_fp8 and hidden.is_cuda and torch.cuda.get_device_capability(hidden.device)[0] == 9
        return "fp8" if pays and not torch.are_deterministic_algorithms_enabled() else "full"
    return first_pass


def _frequent_rows(settings: LossSettings, backend: str, hidden: Tensor, vocab_size: int, needs_grad: bool) -> int:
    """Only backward profits. Kernels that must repeat bit by bit compute all rows alike."""
    deterministic = backend == "triton" and torch.are_deterministic_algorithms_enabled()
    if not needs_grad or deterministic:
        return 0
    chosen = settings.frequent_rows
    if chosen is None:
        chosen = MANY_FREQUENT if backend == "triton" and hidden.is_cuda and vocab_size >= LARGE_VOCABULARY else 0
    return min(chosen, vocab_size)


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
