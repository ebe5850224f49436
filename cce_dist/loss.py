"""The loss: cross-entropy of hidden · weightᵀ whose logits are never formed, on a whole or a sharded vocabulary.

The path of a token: `linear_cross_entropy` checks and flattens; `_LinearCrossEntropy` gathers the ranks' tokens where
they differ, moves the valid ones to the front, has the backend summarise this rank's rows (`kernels`), and merges the
shards' log-sum-exps and target logits (`collectives`). Backward hands the backend the global log-sum-exp, keeps dC on
its rank and sums dE over the ranks.

Shapes: n tokens of this rank, N tokens of the token group, D hidden, V local rows of the classifier.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from cce_dist.collectives import gather_tokens, group_mean, merge_softmax, most_tokens, reduce_scatter_tokens
from cce_dist.config import Backend, Gradient
from cce_dist.kernels import reference
from cce_dist.kernels.problem import TILE, Filter, Gradients, Logits, Summary, Tiles, Upstream, Wanted
from cce_dist.shard import VocabShard

Reduction = Literal["mean", "sum", "none"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_EXACT_WORKSPACE_MB = 256
_SPARSE_WORKSPACE_MB = 32
_LEAST_WORKSPACE_PER_TOKEN = 2 * TILE  # bytes: one tile of probabilities


class _Settings(NamedTuple):
    ignore_index: int
    softcap: float | None
    logit_scale: float
    gradient: Gradient
    tail: bool
    filter_eps: float
    seed: int | None
    backend: Literal["triton", "torch"]
    workspace_bytes: int
    max_tokens: int | None


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, return_lse: Literal[False] = False, **settings: Any
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, return_lse: Literal[True], **settings: Any
) -> tuple[Tensor, Tensor]: ...
def linear_cross_entropy(  # type: ignore[misc]
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    shard: VocabShard | None = None,
    ignore_index: int = -100,
    shift: int = 0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    reduction: Reduction = "mean",
    num_valid_tokens: int | Tensor | None = None,
    gradient: Gradient = "unbiased",
    tail: bool = True,
    filter_eps: float | Literal["auto"] = "auto",
    seed: int | None = None,
    backend: Backend = "auto",
    workspace_mb: int | None = None,
    max_tokens: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of z = softcap·tanh(logit_scale·(hidden · weightᵀ + bias) / softcap) against labels.

    Source of the method: "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009. Every rank of
    ``shard.vocab_group`` must make the call in every step, also with no token or no valid label.

    Args:
        hidden: [..., D], fp32, fp16, bf16 (or fp64 with the torch backend); cast to the autocast dtype under autocast.
        weight: [V, D], this rank's rows; cast to hidden's dtype, its gradient returns in its own. A DTensor must be
            Shard(0) on a 1-D mesh: rows and group come from it, and its gradient is a DTensor.
        labels: [...], integers in [0, vocab_size) over the GLOBAL vocabulary, or ``ignore_index``.
        bias: [V], this rank's.
        shard: which global rows these are, and the process groups. None: all rows, in this process alone.
        shift: position l of hidden is compared with label l + shift, along labels' last axis.
        softcap, logit_scale: None leaves them out.
        reduction: "none": [..., L - shift], 0 where ignored. "sum": over this rank's tokens. "mean": over the valid
            tokens of ``shard.count_group``, the same value on every rank of it; NaN where there is no valid token.
        num_valid_tokens: with "mean", divide this rank's sum by this instead (an int, or a 0-d tensor).
        gradient: "exact"; "unbiased": negligible parts of the softmax are sampled, exact in expectation; "filtered":
            they are replaced by their mean (``tail``), or dropped (``tail=False``).
        filter_eps: softmax mass below which 256 consecutive rows are negligible to a token; 0 makes any mode exact.
        seed: of the sampling; None: drawn from the default generator of the device.
        backend: "triton" (CUDA), "torch" (any device), "auto": triton on CUDA.
        workspace_mb: memory that backward may use for recomputed probabilities; at least 512 bytes per token.
        max_tokens: the most tokens that any rank of the token group brings; None: the ranks exchange it per call.
        return_lse: also return the log-sum-exp [..., L - shift] (fp32, differentiable, 0 where ignored).

    Returns:
        The loss in fp32 (fp64 for fp64), or (loss, lse).

    Raises:
        ValueError, TypeError: for arguments that do not fit; at the first call with a shard on every rank of its
            group. A label out of range raises on every rank: on CUDA as a device-side assertion.
    """
    weight_VD, shard = _resolve(weight, shard)
    bias_V = bias.to_local(grad_placements=bias.placements) if isinstance(bias, DTensor) else bias
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    fault = (
        _tensor_fault(hidden, weight_VD, labels, bias_V, shard, shift)
        or _setting_fault(softcap, logit_scale, reduction, num_valid_tokens, gradient, filter_eps, backend)
        or _workspace_fault(hidden, shard, workspace_mb, max_tokens)
    )
    settings = _Settings(
        ignore_index,
        softcap,
        1.0 if logit_scale is None else logit_scale,
        "exact" if filter_eps == 0 else gradient,
        tail,
        0.0 if fault else _resolve_eps(filter_eps, gradient, shard.vocab_size),
        seed,
        "triton" if backend == "triton" or (backend == "auto" and _triton_can(hidden)) else "torch",
        _workspace_bytes(
            workspace_mb, "exact" if filter_eps == 0 else gradient, _least_workspace_mb(labels.numel(), shard)
        ),
        max_tokens,
    )
    contract = _contract(hidden, weight_VD, bias_V, shard, settings, reduction, num_valid_tokens)
    shard.agree(contract, {"number of tokens": labels.numel()} if shard.token_group is None else {}, fault)

    labels_n = _shifted(labels, shift, ignore_index).reshape(-1).long()
    nll_n, lse_n = _LinearCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight_VD, bias_V, labels_n, shard, settings
    )
    loss = _reduce(nll_n, labels_n, labels, shift, shard, ignore_index, reduction, num_valid_tokens)
    return (loss, _unflatten(lse_n, labels, shift)) if return_lse else loss


def _reduce(
    nll_n: Tensor,
    labels_n: Tensor,
    labels: Tensor,
    shift: int,
    shard: VocabShard,
    ignore_index: int,
    reduction: Reduction,
    num_valid_tokens: int | Tensor | None,
) -> Tensor:
    if reduction == "none":
        return _unflatten(nll_n, labels, shift)
    own_sum = nll_n.sum()
    if reduction == "sum":
        return own_sum
    if num_valid_tokens is not None:
        return own_sum / num_valid_tokens
    own_count = (labels_n != ignore_index).sum()
    group = shard.count_group if shard.count_group is not None else shard.token_group
    return own_sum / own_count if group is None else group_mean(own_sum, own_count, group)


class _LinearCrossEntropy(torch.autograd.Function):
    """(nll_n, lse_n) of this rank's tokens, 0 where ignored."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_n: Tensor,
        shard: VocabShard,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor]:
        hidden_ND, labels_N, most = _gather(hidden_nD, labels_n, shard, settings)
        valid_N = labels_N != settings.ignore_index
        _check_labels(labels_N, valid_N, shard.vocab_size)
        order_N, n_valid = _valid_first(valid_N)
        valid_N, labels_N = valid_N[order_N], labels_N[order_N]
        hidden_ND = hidden_ND[order_N].masked_fill_(~valid_N[:, None], 0)
        target_N = torch.where(valid_N, shard.local_columns(labels_N), -1).to(torch.int32)
        token_N = order_N.to(torch.int32)

        needs_grad = any(ctx.needs_input_grad[:3])
        logits = _logits(hidden_ND, weight_VD, bias_V, target_N, token_N, n_valid, shard, settings)
        with torch.autocast(hidden_nD.device.type, enabled=False):
            summary = _backend(settings).summarise(
                logits, needs_grad and settings.gradient != "exact", settings.workspace_bytes
            )
            lse_N, target_logit_N = _merge(summary, shard)
        seed = _draw_seed(settings, hidden_nD.device) if needs_grad and settings.gradient == "unbiased" else None

        if needs_grad:
            ctx.shard, ctx.settings, ctx.most, ctx.num_tokens = shard, settings, most, labels_n.shape[0]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(
                hidden_ND, weight_VD, bias_V, target_N, token_N, order_N, valid_N, n_valid, lse_N, seed,
                *(summary.tiles or (None, None)),
            )  # fmt: skip
        nll_N = _restore(lse_N - target_logit_N, order_N, valid_N)
        return _own(nll_N, labels_n.shape[0], most, shard), _own(
            _restore(lse_N, order_N, valid_N), labels_n.shape[0], most, shard
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll_n: Tensor | None, grad_lse_n: Tensor | None) -> tuple[Tensor | None, ...]:
        shard: VocabShard = ctx.shard
        settings: _Settings = ctx.settings
        (
            hidden_ND, weight_VD, bias_V, target_N, token_N, order_N, valid_N, n_valid, lse_N, seed,
            tile_lse_TN, reference_SN,
        ) = ctx.saved_tensors  # fmt: skip
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            upstream = _upstream(grad_nll_n, grad_lse_n, lse_N, order_N, valid_N, ctx.num_tokens, ctx.most, shard)
            logits = _logits(hidden_ND, weight_VD, bias_V, target_N, token_N, n_valid, shard, settings)
            gradients: Gradients = _backend(settings).differentiate(
                logits,
                None if tile_lse_TN is None else Tiles(tile_lse_TN, reference_SN),
                lse_N,
                upstream,
                Filter(settings.gradient, settings.filter_eps, settings.tail, seed),
                Wanted(wants_hidden, wants_weight, wants_bias, weight_VD.dtype, settings.workspace_bytes),
            )
            grad_hidden_nD = None
            if gradients.hidden_ND is not None:
                grad_hidden_nD = _reduce_hidden(
                    gradients.hidden_ND, order_N, valid_N, ctx.num_tokens, shard, hidden_ND.dtype
                )
        grad_bias_V = None if bias_V is None or gradients.bias_V is None else gradients.bias_V.to(bias_V.dtype)
        return (
            grad_hidden_nD,
            _with_padding(gradients.weight_VD, weight_VD),
            _with_padding(grad_bias_V, bias_V),
            None,
            None,
            None,
        )


def _logits(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    token_N: Tensor,
    n_valid: Tensor,
    shard: VocabShard,
    settings: _Settings,
) -> Logits:
    """The real rows of the shard, in hidden's dtype, and the tokens that meet them."""
    rows = shard.num_real_rows
    return Logits(
        hidden_ND,
        weight_VD[:rows].to(hidden_ND.dtype).contiguous(),
        None if bias_V is None else bias_V[:rows].contiguous(),
        target_N,
        token_N,
        shard.tile_keys(TILE, hidden_ND.device),
        n_valid,
        settings.logit_scale,
        settings.softcap,
    )


def _backend(settings: _Settings) -> ModuleType:
    if settings.backend == "torch":
        return reference
    from cce_dist.kernels import pipeline  # imports triton

    return pipeline


def _gather(hidden_nD: Tensor, labels_n: Tensor, shard: VocabShard, settings: _Settings) -> tuple[Tensor, Tensor, int]:
    """All tokens of the token group, each rank's part padded to the most that any rank brings."""
    if shard.token_group is None:
        return hidden_nD, labels_n, labels_n.shape[0]
    host_group = shard.host_group
    assert host_group is not None
    most = settings.max_tokens if settings.max_tokens is not None else most_tokens(labels_n.shape[0], host_group)
    labels_N = gather_tokens(labels_n, most, shard.token_group, fill=settings.ignore_index)
    return gather_tokens(hidden_nD, most, shard.token_group), labels_N, most


def _check_labels(labels_N: Tensor, valid_N: Tensor, vocab_size: int) -> None:
    legal = ((labels_N >= 0) & (labels_N < vocab_size)) | ~valid_N
    message = f"labels must be in [0, {vocab_size}) or ignore_index"
    if labels_N.is_cuda:
        torch._assert_async(legal.all(), f"{message}.")
    elif not legal.all():
        raise ValueError(
            f"{message}, got {labels_N[~legal].unique()[:8].tolist()}; check the tokenizer's vocabulary size."
        )


def _valid_first(valid_N: Tensor) -> tuple[Tensor, Tensor]:
    """A permutation that brings the valid tokens to the front in their order, and their number as int32 [1]."""
    before_N = valid_N.cumsum(0)
    n_valid = before_N[-1:] if valid_N.shape[0] else before_N.new_zeros(1)
    index_N = torch.arange(valid_N.shape[0], device=valid_N.device)
    place_N = torch.where(valid_N, before_N - 1, n_valid + index_N - before_N)
    return torch.empty_like(index_N).scatter_(0, place_N, index_N), n_valid.to(torch.int32)


def _merge(summary: Summary, shard: VocabShard) -> tuple[Tensor, Tensor]:
    if shard.vocab_group is None:
        return summary.max_N + summary.sumexp_N.log(), summary.target_N
    return merge_softmax(summary.max_N, summary.sumexp_N, summary.target_N, shard.vocab_group)


def _draw_seed(settings: _Settings, device: torch.device) -> Tensor:
    if settings.seed is not None:
        return torch.full((1,), settings.seed, dtype=torch.int64, device=device)
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def _restore(values_N: Tensor, order_N: Tensor, valid_N: Tensor) -> Tensor:
    """[N] back to the order before compaction, 0 where not valid."""
    return torch.empty_like(values_N).index_copy_(0, order_N, torch.where(valid_N, values_N, 0))


def _own(values_N: Tensor, num_tokens: int, most: int, shard: VocabShard) -> Tensor:
    if shard.token_group is None:
        return values_N
    first = most * dist.get_rank(shard.token_group)
    return values_N[first : first + num_tokens].clone()


def _upstream(
    grad_nll_n: Tensor | None,
    grad_lse_n: Tensor | None,
    lse_N: Tensor,
    order_N: Tensor,
    valid_N: Tensor,
    num_tokens: int,
    most: int,
    shard: VocabShard,
) -> Upstream:
    """The two upstream gradients of every token of the group, compacted and scaled to at most 1."""
    zero_n = lse_N.new_zeros(num_tokens)
    grads_n2 = torch.stack(
        [zero_n if grad is None else grad.to(lse_N.dtype) for grad in (grad_nll_n, grad_lse_n)], dim=1
    )
    grads_N2 = grads_n2 if shard.token_group is None else gather_tokens(grads_n2, most, shard.token_group)
    grads_N2 = torch.where(valid_N[:, None], grads_N2[order_N], 0)
    softmax_N, target_N = grads_N2.sum(1), grads_N2[:, 0]
    if lse_N.shape[0] == 0:
        return Upstream(softmax_N, target_N, lse_N.new_ones(()))
    largest = torch.maximum(softmax_N.abs().amax(), target_N.abs().amax())
    scale = torch.where(largest == 0, 1.0, torch.exp2(torch.ceil(torch.log2(largest))))
    return Upstream(softmax_N / scale, target_N / scale, scale)


def _reduce_hidden(
    partial_ND: Tensor, order_N: Tensor, valid_N: Tensor, num_tokens: int, shard: VocabShard, dtype: torch.dtype
) -> Tensor:
    """Sums the shards' dE (used up) over the ranks and returns the rows of this rank's tokens, in ``dtype``."""
    partial_ND = partial_ND.masked_fill_(~valid_N[:, None], 0)
    if shard.reduce_dtype is not None:
        partial_ND = partial_ND.to(shard.reduce_dtype)
    if shard.token_group is None:
        if shard.vocab_group is not None:
            dist.all_reduce(partial_ND, group=shard.vocab_group)
        grad_ND = partial_ND.to(dtype)
        return torch.empty_like(grad_ND).index_copy_(0, order_N, grad_ND)
    ordered_ND = torch.empty_like(partial_ND).index_copy_(0, order_N, partial_ND)
    own_nD = reduce_scatter_tokens(ordered_ND, num_tokens, shard.token_group)
    if shard.replica_group is not None:
        own_nD = own_nD.contiguous()
        dist.all_reduce(own_nD, group=shard.replica_group)
    return own_nD.to(dtype)


def _with_padding(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """Zero gradient for the padding rows."""
    if grad is None or parameter is None or grad.shape == parameter.shape:
        return grad
    whole = grad.new_zeros(parameter.shape)
    whole[: grad.shape[0]] = grad
    return whole


def _shifted(labels: Tensor, shift: int, ignore_index: int) -> Tensor:
    """Labels moved ``shift`` positions ahead; positions without a label are ignored."""
    if shift == 0:
        return labels
    moved = torch.full_like(labels, ignore_index)
    kept = max(labels.shape[-1] - shift, 0)
    moved[..., :kept] = labels[..., shift:]
    return moved


def _unflatten(values_n: Tensor, labels: Tensor, shift: int) -> Tensor:
    values = values_n.view(labels.shape)
    return values if shift == 0 else values[..., : max(labels.shape[-1] - shift, 0)]


def _resolve(weight: Tensor, shard: VocabShard | None) -> tuple[Tensor, VocabShard]:
    if isinstance(weight, DTensor):
        shard = shard if shard is not None else _dtensor_shard(weight)
        return weight.to_local(grad_placements=weight.placements), shard
    return weight, shard if shard is not None else VocabShard.whole(max(weight.shape[0], 1))


def _dtensor_shard(weight: DTensor) -> VocabShard:
    """One shard per parameter: its first use is an agreement of the ranks, which later calls rely on."""
    shard = getattr(weight, "_cce_dist_shard", None)
    if shard is None:
        shard = VocabShard.from_dtensor(weight)
        weight._cce_dist_shard = shard  # type: ignore[attr-defined]
    return shard


def _triton_can(hidden: Tensor) -> bool:
    return hidden.is_cuda and hidden.dtype != torch.float64


def _resolve_eps(filter_eps: float | str, gradient: Gradient, vocab_size: int) -> float:
    if not isinstance(filter_eps, str):
        return filter_eps
    if gradient == "filtered":
        return 2.0**-10
    return 2.0**-8 if vocab_size >= 98304 else 2.0**-6


def _tensor_fault(
    hidden: Tensor, weight_VD: Tensor, labels: Tensor, bias_V: Tensor | None, shard: VocabShard, shift: int
) -> str | None:
    if hidden.dtype not in _DTYPES:
        return f"hidden must be fp32, fp16, bf16 or fp64, got {hidden.dtype}."
    if not weight_VD.is_floating_point():
        return f"weight must be a floating-point tensor, got {weight_VD.dtype}."
    if hidden.ndim < 1 or weight_VD.ndim != 2 or weight_VD.shape[1] != hidden.shape[-1]:
        return (
            f"hidden must be [..., D] and weight [V, D] with the same D, got hidden {list(hidden.shape)} and weight "
            f"{list(weight_VD.shape)}."
        )
    if labels.shape != hidden.shape[:-1]:
        return (
            f"labels must have hidden's shape less its last axis, {list(hidden.shape[:-1])}; got {list(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        return f"labels must be integers, got {labels.dtype}."
    if shift < 0 or (shift > 0 and labels.ndim == 0):
        return f"shift must be 0, or positive where labels have an axis, got {shift} with labels of {labels.ndim} axes."
    if weight_VD.shape[0] != shard.num_rows:
        return (
            f"weight must hold the shard's {shard.num_rows} rows {shard.runs}, got {weight_VD.shape[0]} rows. Pass "
            "this rank's rows, or build the VocabShard from the split that was used."
        )
    if bias_V is not None and (bias_V.ndim != 1 or bias_V.shape[0] != weight_VD.shape[0]):
        return f"bias must be [{weight_VD.shape[0]}], one entry per local row, got {list(bias_V.shape)}."
    devices = {x.device for x in (hidden, weight_VD, labels, bias_V) if x is not None}
    if len(devices) > 1:
        return f"hidden, weight, labels and bias must be on one device, got {sorted(map(str, devices))}."
    return None


def _setting_fault(
    softcap: float | None,
    logit_scale: float | None,
    reduction: str,
    num_valid_tokens: int | Tensor | None,
    gradient: str,
    filter_eps: float | str,
    backend: str,
) -> str | None:
    if softcap is not None and not softcap > 0:
        return f"softcap must be positive or None, got {softcap}."
    if logit_scale is not None and not -float("inf") < logit_scale < float("inf"):
        return f"logit_scale must be finite, got {logit_scale}."
    for name, value, allowed in (
        ("reduction", reduction, ("mean", "sum", "none")),
        ("gradient", gradient, ("unbiased", "exact", "filtered")),
        ("backend", backend, ("auto", "triton", "torch")),
    ):
        if value not in allowed:
            return f"{name} must be one of {allowed}, got {value!r}."
    if filter_eps != "auto" and (isinstance(filter_eps, str) or not 0 <= filter_eps < 1):
        return f'filter_eps must be "auto" or in [0, 1), got {filter_eps!r}.'
    if num_valid_tokens is not None and reduction != "mean":
        return f'num_valid_tokens goes with reduction="mean" only, got reduction={reduction!r}.'
    if isinstance(num_valid_tokens, Tensor) and num_valid_tokens.ndim != 0:
        return f"num_valid_tokens must be an int or a 0-d tensor, got shape {list(num_valid_tokens.shape)}."
    return None


def _least_workspace_mb(num_tokens: int, shard: VocabShard) -> int:
    ranks = 1 if shard.token_group is None else dist.get_world_size(shard.token_group)
    return max(-(-num_tokens * ranks * _LEAST_WORKSPACE_PER_TOKEN // (1 << 20)), 1)


def _workspace_bytes(workspace_mb: int | None, gradient: Gradient, least_mb: int) -> int:
    """The default is eight times the least where that is more: a smaller one makes the sparse backward wait."""
    if workspace_mb is None:
        workspace_mb = _EXACT_WORKSPACE_MB if gradient == "exact" else max(_SPARSE_WORKSPACE_MB, 8 * least_mb)
    return max(workspace_mb, least_mb) << 20


def _workspace_fault(hidden: Tensor, shard: VocabShard, workspace_mb: int | None, max_tokens: int | None) -> str | None:
    num_tokens = hidden.shape[:-1].numel()
    if max_tokens is not None and max_tokens < num_tokens:
        return f"max_tokens must be at least this rank's {num_tokens} tokens, got {max_tokens}."
    least = _least_workspace_mb(num_tokens, shard)
    if workspace_mb is not None and workspace_mb < least:
        return (
            f"workspace_mb must be at least {least}, {_LEAST_WORKSPACE_PER_TOKEN} bytes for each of the token group's "
            f"tokens, {num_tokens} of them on this rank; got {workspace_mb}."
        )
    return None


def _contract(
    hidden: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    shard: VocabShard,
    settings: _Settings,
    reduction: str,
    num_valid_tokens: int | Tensor | None,
) -> Mapping[str, Any]:
    """What every rank of the vocabulary group must say alike."""
    return {
        "vocab_size": shard.vocab_size,
        "hidden's last dimension": hidden.shape[-1] if hidden.ndim else None,
        "hidden's dtype": str(hidden.dtype),
        "hidden's need of a gradient": hidden.requires_grad,
        "bias": bias_V is not None,
        "token_group": shard.token_group is not None,
        "count_group": shard.count_group is not None,
        "reduce_dtype": str(shard.reduce_dtype),
        "reduction": reduction if num_valid_tokens is None else f"{reduction} with num_valid_tokens",
        "max_tokens": settings.max_tokens,
        **{
            name: getattr(settings, name)
            for name in ("ignore_index", "softcap", "logit_scale", "gradient", "tail", "filter_eps", "backend")
        },
    }
