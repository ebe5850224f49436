"""What `linear_cross_entropy` accepts, checked before any collective. A fault is one sentence naming the argument.

Shapes: D hidden, V local rows of the classifier.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cce_dist.config import Agreeing, Backend, CCEConfig, FirstPass, Gradient
from cce_dist.kernels.problem import TILE
from cce_dist.shard import VocabShard

Reduction = Literal["mean", "sum", "none"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_EXACT_WORKSPACE_MB = 256
_SPARSE_WORKSPACE_MB = 64


class Settings(NamedTuple):
    """The settings of one call, checked and resolved."""

    ignore_index: int
    shift: int
    softcap: float | None
    logit_scale: float
    reduction: Reduction
    num_valid_tokens: int | Tensor | None
    gradient: Gradient
    tail: bool
    filter_eps: float
    seed: int | Tensor | None
    backend: Literal["triton", "torch"]
    first_pass: Literal["full", "fp8"]
    workspace_mb: int | None
    max_tokens: int | None
    agreement: Agreeing


def check_tensors(hidden: Any, weight_VD: Any, labels: Any, bias_V: Any, shard: VocabShard) -> None:
    """Raises TypeError or ValueError where shapes, dtypes or devices do not fit together or to the shard."""
    for name, x in (("hidden", hidden), ("weight", weight_VD), ("labels", labels), ("bias", bias_V)):
        if not isinstance(x, Tensor) and not (name == "bias" and x is None):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}.")
    for name, x in (("hidden", hidden), ("weight", weight_VD), ("bias", bias_V)):
        _require(bool(x is None or x.is_floating_point()), f"{name} must be a floating-point tensor", _dtype(x))
    _require(hidden.dtype in _DTYPES, "hidden must be fp32, fp16, bf16 or fp64", hidden.dtype)
    is_integral = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    _require(is_integral, "labels must be integers", labels.dtype)
    _require(
        hidden.ndim >= 1 and weight_VD.ndim == 2 and weight_VD.shape[1] == hidden.shape[-1],
        "hidden must be [..., D] and weight [V, D] with the same D",
        f"hidden {list(hidden.shape)} and weight {list(weight_VD.shape)}",
    )
    expected = list(hidden.shape[:-1])
    _require(list(labels.shape) == expected, f"labels must have hidden's shape less its last axis, {expected}", labels)
    _require(
        weight_VD.shape[0] == shard.num_rows,
        f"weight must hold the shard's {shard.num_rows} rows {shard.runs} (pass this rank's rows, or build the "
        "VocabShard from the split that was used)",
        f"{weight_VD.shape[0]} rows",
    )
    if bias_V is not None:
        rows = weight_VD.shape[0]
        _require(list(bias_V.shape) == [rows], f"bias must be [{rows}], one entry per local row", bias_V)
    devices = {str(x.device) for x in (hidden, weight_VD, labels, bias_V) if x is not None}
    _require(len(devices) == 1, "hidden, weight, labels and bias must be on one device", sorted(devices))


def check_settings(
    hidden: Tensor,
    labels: Tensor,
    shard: VocabShard,
    *,
    ignore_index: Any,
    shift: Any,
    softcap: Any,
    logit_scale: Any,
    reduction: Any,
    num_valid_tokens: Any,
    gradient: Any,
    tail: Any,
    filter_eps: Any,
    seed: Any,
    backend: Any,
    first_pass: Any,
    needs_grad: bool,
    workspace_mb: Any,
    max_tokens: Any,
    agreement: Any,
) -> Settings:
    """Checks and resolves the settings of a call; raises ValueError that names the argument."""
    _require(_is_int(ignore_index), "ignore_index must be an int", ignore_index)
    may_shift = labels.ndim > 0 or shift == 0
    _require(_is_int(shift) and shift >= 0 and may_shift, "shift must be an int, 0 or more (0 for one label)", shift)
    _require(
        softcap is None or (_is_number(softcap) and softcap > 0), "softcap must be a positive float or None", softcap
    )
    _require(logit_scale is None or _is_number(logit_scale), "logit_scale must be a finite float or None", logit_scale)
    for name, value, allowed in (
        ("reduction", reduction, get_args(Reduction)),
        ("gradient", gradient, (*get_args(Gradient), None)),
        ("backend", backend, get_args(Backend)),
        ("first_pass", first_pass, get_args(FirstPass)),
        ("tail", tail, (True, False)),
        ("agreement", agreement, get_args(Agreeing)),
    ):
        _require(
            any(value is a or (isinstance(value, str) and value == a) for a in allowed),
            f"{name} must be one of {allowed}",
            value,
        )
    is_count = num_valid_tokens is None or (_is_int(num_valid_tokens) and num_valid_tokens >= 0)
    is_scalar = isinstance(num_valid_tokens, Tensor) and num_valid_tokens.ndim == 0
    _require(
        is_count or is_scalar, "num_valid_tokens must be an int, 0 or more, a 0-d tensor or None", num_valid_tokens
    )
    _require(
        num_valid_tokens is None or reduction == "mean", 'num_valid_tokens goes with reduction="mean"', repr(reduction)
    )
    is_eps = filter_eps == "auto" if isinstance(filter_eps, str) else _is_number(filter_eps) and 0 <= filter_eps < 1
    _require(is_eps, 'filter_eps must be "auto" or in [0, 1)', filter_eps)
    if isinstance(seed, Tensor):
        is_seed = seed.ndim == 0 and seed.dtype == torch.int64 and seed.device == hidden.device
        _require(
            is_seed, f"a tensor as seed must be int64, 0-d, on {hidden.device}", f"{_shown(seed)} on {seed.device}"
        )
    else:
        is_seed = seed is None or (_is_int(seed) and -(2**63) <= seed < 2**63)
        _require(is_seed, "seed must be a 64-bit int, a 0-d int64 tensor or None", seed)
    tokens = labels.numel()
    _require(
        max_tokens is None or (_is_int(max_tokens) and max_tokens >= tokens),
        f"max_tokens must be an int, at least this rank's {tokens} tokens, or None",
        max_tokens,
    )
    _require(
        workspace_mb is None or (_is_int(workspace_mb) and workspace_mb >= 1),
        "workspace_mb must be an int, 1 or more, or None",
        workspace_mb,
    )
    _require(
        agreement == "every_call" or shard.token_group is None or max_tokens is not None,
        'agreement="first_call" needs max_tokens where each rank brings its own tokens, since the ranks do not '
        "exchange their numbers then",
        max_tokens,
    )
    resolved = _backend(backend, hidden)
    if gradient is None:
        gradient = choose_gradient(resolved, None if filter_eps == "auto" else filter_eps)
    exact = gradient == "exact" or filter_eps == 0
    return Settings(
        ignore_index,
        shift,
        softcap,
        1.0 if logit_scale is None else logit_scale,
        reduction,
        num_valid_tokens,
        "exact" if exact else gradient,
        tail,
        _eps(filter_eps, gradient, shard.vocab_size),
        seed,
        resolved,
        "full" if exact or not needs_grad else _first_pass(first_pass, hidden, resolved),
        workspace_mb,
        max_tokens,
        agreement,
    )


def check_labels(labels: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Raises ValueError for a label out of range. On CUDA a device-side assertion does, which does not wait."""
    legal = ((labels >= 0) & (labels < vocab_size)) | (labels == ignore_index)
    message = f"labels must be in [0, {vocab_size}) or ignore_index"
    if labels.is_cuda:
        torch._assert_async(legal.all(), f"{message}.")
    elif not legal.all():
        raise ValueError(
            f"{message}, got {labels[~legal].unique()[:8].tolist()}; check the tokenizer's vocabulary size."
        )


def choose_gradient(backend: str, filter_eps: float | None) -> Gradient:
    """What ``gradient=None`` stands for: the torch backend is fastest with "exact", Triton with "unbiased"."""
    return "unbiased" if backend == "triton" or filter_eps is not None else "exact"


def gradient_on(config: CCEConfig, device: torch.device) -> Gradient:
    """The gradient that a config means on a device, for 16- and 32-bit training."""
    triton = config.backend == "triton" or (config.backend == "auto" and device.type == "cuda")
    return config.gradient or choose_gradient("triton" if triton else "torch", config.filter_eps)


def workspace_bytes(settings: Settings, num_tokens: int, element_size: int) -> int:
    """The memory that backward may use, for all tokens that the loss works on: equal on all ranks.

    Raises:
        ValueError: where ``workspace_mb`` is less than one tile of probabilities of all tokens.
    """
    least_mb = least_workspace_mb(num_tokens, element_size)
    chosen = settings.workspace_mb
    if chosen is None:
        chosen = default_workspace_mb(num_tokens, element_size, settings.gradient == "exact")
    _require(
        chosen >= least_mb,
        f"workspace_mb must be at least {least_mb}, {TILE * element_size} bytes for each of the {num_tokens} tokens",
        chosen,
    )
    return chosen << 20


def least_workspace_mb(num_tokens: int, element_size: int) -> int:
    """One tile of probabilities of all tokens."""
    return max(-(-num_tokens * TILE * element_size // (1 << 20)), 1)


def default_workspace_mb(num_tokens: int, element_size: int, exact: bool) -> int:
    """What ``workspace_mb=None`` stands for.

    With fewer probabilities at hand the sparse backward waits for them, and tiles of many tokens need more.
    """
    least_mb = least_workspace_mb(num_tokens, element_size)
    return max(_EXACT_WORKSPACE_MB, least_mb) if exact else _SPARSE_WORKSPACE_MB + 8 * least_mb


def contract(
    hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None, shard: VocabShard, settings: Settings
) -> Mapping[str, Any]:
    """What every rank of the vocabulary group must say alike in a call, by name."""
    counted = "" if settings.num_valid_tokens is None else " with num_valid_tokens"
    return {
        "vocab_size": shard.vocab_size,
        "grad mode": torch.is_grad_enabled(),
        "hidden's last dimension": hidden.shape[-1],
        "hidden's dtype": str(hidden.dtype),
        "hidden's need of a gradient": hidden.requires_grad,
        "weight's need of a gradient": weight_VD.requires_grad,
        "bias": bias_V is not None,
        "bias's need of a gradient": bias_V is not None and bias_V.requires_grad,
        "token_group": shard.token_group is not None,
        "count_group": shard.count_group is not None,
        "reduce_dtype": str(shard.reduce_dtype),
        "reduction": settings.reduction + counted,
        **{
            name: getattr(settings, name)
            for name in (
                "ignore_index", "shift", "softcap", "logit_scale", "gradient", "tail", "filter_eps", "backend",
                "first_pass", "workspace_mb", "max_tokens", "agreement",
            )
        },
    }  # fmt: skip


def _require(holds: bool, rule: str, got: Any) -> None:
    if not holds:
        shown = _shown(got) if isinstance(got, Tensor) else got
        raise ValueError(
            f"{rule}; got {shown!r}." if isinstance(shown, str) and shown is got else f"{rule}; got {shown}."
        )


def _shown(x: Tensor) -> str:
    return f"shape {list(x.shape)}" if x.ndim else f"a 0-d {x.dtype} tensor"


def _dtype(x: Any) -> Any:
    return getattr(x, "dtype", None)


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _eps(filter_eps: float | str, gradient: Gradient, vocab_size: int) -> float:
    """ "auto" is what benchmarks/results asks for, at V = 50k and 128k to 262k: with "unbiased", errors of dE and dC
    like those of bf16 logits (torch.compile); with "filtered", one of dE just below 1e-2."""
    if not isinstance(filter_eps, str):
        return filter_eps
    is_large = vocab_size >= 100_000
    if gradient == "filtered":
        return 2.0**-9.4 if is_large else 2.0**-10.25
    if vocab_size >= 200_000:
        return 2.0**-9.3
    return 2.0**-9.5 if is_large else 2.0**-9


def _backend(backend: Backend, hidden: Tensor) -> Literal["triton", "torch"]:
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


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
