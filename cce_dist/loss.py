"""The loss: cross-entropy of hidden · weightᵀ whose logits are never formed, on a whole or a sharded vocabulary.

The path of a token: `linear_cross_entropy` checks and flattens; `_LinearCrossEntropy` gathers the ranks' tokens where
they differ, puts the valid ones first, has the backend summarise this rank's rows (`kernels`), and merges the
shards' log-sum-exps and target logits (`collectives`); after a first pass in 8 bits they are refined and merged again.
Backward hands the backend the global log-sum-exp, keeps dC on its rank and sums dE over the ranks, while the backend
computes dC.

Shapes: n tokens of this rank, N tokens of the token group, D hidden, V local rows of the classifier.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from cce_dist.arguments import Reduction, Settings, check_settings, check_tensors, contract, workspace_bytes
from cce_dist.collectives import (
    gather_tokens,
    group_mean,
    merge_softmax,
    most_tokens,
    start_all_reduce,
    start_reduce_scatter,
)
from cce_dist.config import Backend, FirstPass, Gradient
from cce_dist.kernels import reference
from cce_dist.kernels.problem import MOST_DRAWN, TILE, Filter, Gradients, Logits, Normaliser, Tiles, Upstream, Wanted
from cce_dist.shard import VocabShard


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
    first_pass: FirstPass = "auto",
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
        filter_eps: softmax mass below which 128 consecutive rows are negligible to a token; 0 makes any mode exact.
        seed: of the sampling; None: drawn from the default generator of the device.
        backend: "triton" (CUDA), "torch" (any device), "auto": triton on CUDA.
        first_pass: "fp8": forward finds the parts of the softmax that matter from 8-bit copies of hidden and weight,
            then computes those in full: half the time, and an error of the loss below that of bf16 logits. "full": all
            in hidden's precision. "auto": fp8 where it was measured to pay (16-bit training on Hopper, with a filter).
        workspace_mb: memory that backward may use for recomputed probabilities, at least 256 bytes a token (fp32: 512).
        max_tokens: the most tokens that any rank of the token group brings; None: the ranks exchange it per call.
        return_lse: also return the log-sum-exp [..., L - shift] (fp32, differentiable, 0 where ignored).

    Returns:
        The loss in fp32 (fp64 for fp64), or (loss, lse).

    Raises:
        ValueError, TypeError: for arguments that do not fit; at the first call with a shard on every rank of its
            group. A label out of range raises on every rank: on CUDA as a device-side assertion.
    """
    for name, x in (("hidden", hidden), ("weight", weight), ("labels", labels), ("bias", bias)):
        if not isinstance(x, Tensor) and not (name == "bias" and x is None):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}.")
    weight_VD, shard = _resolve(weight, shard)
    bias_V = bias.to_local(grad_placements=bias.placements) if isinstance(bias, DTensor) else bias
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    settings, fault = None, None
    try:
        check_tensors(hidden, weight_VD, labels, bias_V, shard)
        settings = check_settings(
            hidden,
            labels,
            shard,
            ignore_index=ignore_index,
            shift=shift,
            softcap=softcap,
            logit_scale=logit_scale,
            reduction=reduction,
            num_valid_tokens=num_valid_tokens,
            gradient=gradient,
            tail=tail,
            filter_eps=filter_eps,
            seed=seed,
            backend=backend,
            first_pass=first_pass,
            needs_grad=torch.is_grad_enabled()
            and any(x.requires_grad for x in (hidden, weight_VD, bias_V) if x is not None),
            workspace_mb=workspace_mb,
            max_tokens=max_tokens,
        )
    except (TypeError, ValueError) as error:
        fault = str(error)  # raised by agree, on every rank
    same_tokens = {"number of tokens": labels.numel()} if shard.token_group is None else {}
    shard.agree({} if settings is None else contract(hidden, bias_V, shard, settings), same_tokens, fault)
    assert settings is not None

    labels_n = _shifted(labels.long(), shift, ignore_index).reshape(-1)
    nll_n, lse_n = _LinearCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight_VD, bias_V, labels_n, shard, settings, torch.is_grad_enabled()
    )
    loss = _reduce(nll_n, labels_n, labels, shard, settings)
    return (loss, _unflatten(lse_n, labels, shift)) if return_lse else loss


def _reduce(nll_n: Tensor, labels_n: Tensor, labels: Tensor, shard: VocabShard, settings: Settings) -> Tensor:
    if settings.reduction == "none":
        return _unflatten(nll_n, labels, settings.shift)
    own_sum = nll_n.sum()
    if settings.reduction == "sum":
        return own_sum
    if settings.num_valid_tokens is not None:
        return own_sum / settings.num_valid_tokens
    own_count = (labels_n != settings.ignore_index).sum()
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
        settings: Settings,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        hidden_ND, labels_N, most = _gather(hidden_nD, labels_n, shard, settings)
        workspace = workspace_bytes(settings, labels_N.shape[0], hidden_ND.element_size())
        valid_N = labels_N != settings.ignore_index
        _check_labels(labels_N, valid_N, shard.vocab_size)
        order_N, place_N, n_valid = _valid_first(valid_N)
        valid_N, labels_N = valid_N[order_N], labels_N[order_N]
        hidden_ND = hidden_ND if hidden_ND.stride(1) == 1 else hidden_ND.contiguous()
        target_N = torch.where(valid_N, shard.local_columns(labels_N), -1).to(torch.int32)
        tokens = (target_N, order_N.to(torch.int32), place_N, n_valid)

        needs_grad = grad_enabled and any(ctx.needs_input_grad[:3])
        logits = _logits(hidden_ND, weight_VD, bias_V, *tokens, shard, settings)
        with torch.autocast(hidden_nD.device.type, enabled=False):
            backend = _backend(settings)
            if settings.first_pass == "fp8":
                estimate = backend.estimate(logits)
                estimated, _ = merge_softmax(estimate.summary, shard.vocab_group)
                summary = backend.refine(logits, estimate, estimated, settings.filter_eps)
            else:
                summary = backend.summarise(logits, needs_grad and settings.gradient != "exact", workspace)
            normaliser, target_logit_N = merge_softmax(summary, shard.vocab_group)
        seed = _draw_seed(settings, hidden_nD.device) if needs_grad and settings.gradient == "unbiased" else None

        if needs_grad:
            ctx.shard, ctx.settings, ctx.most, ctx.num_tokens = shard, settings, most, labels_n.shape[0]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(
                hidden_ND, weight_VD, bias_V, *tokens, order_N, valid_N, seed,
                normaliser.max_N, normaliser.log_sum_N, *(summary.tiles or (None, None))[:2],
            )  # fmt: skip
            ctx.unit, ctx.workspace = normaliser.unit, workspace
            ctx.tiles_per_split = 0 if summary.tiles is None else summary.tiles.tiles_per_split
        nll_N = _restore(normaliser.nll(target_logit_N), order_N, valid_N)
        return _own(nll_N, labels_n.shape[0], most, shard), _own(
            _restore(normaliser.lse_N, order_N, valid_N), labels_n.shape[0], most, shard
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll_n: Tensor | None, grad_lse_n: Tensor | None) -> tuple[Tensor | None, ...]:
        shard: VocabShard = ctx.shard
        settings: Settings = ctx.settings
        (
            hidden_ND, weight_VD, bias_V, target_N, token_N, place_N, n_valid, order_N, valid_N, seed,
            max_N, log_sum_N, tile_lse_TN, reference_SN,
        ) = ctx.saved_tensors  # fmt: skip
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            upstream = _upstream(grad_nll_n, grad_lse_n, max_N.dtype, order_N, valid_N, ctx.num_tokens, ctx.most, shard)
            logits = _logits(hidden_ND, weight_VD, bias_V, target_N, token_N, place_N, n_valid, shard, settings)
            finish: Callable[[], Tensor] | None = None

            def reduce_hidden(partial_ND: Tensor) -> None:
                nonlocal finish
                finish = _start_reduction(
                    partial_ND, order_N, n_valid, ctx.num_tokens, shard, settings, hidden_ND.dtype
                )

            gradients: Gradients = _backend(settings).differentiate(
                logits,
                None if tile_lse_TN is None else Tiles(tile_lse_TN, reference_SN, ctx.tiles_per_split),
                Normaliser(max_N, log_sum_N, ctx.unit),
                upstream,
                _filter(settings, logits, shard, seed),
                Wanted(wants_hidden, wants_weight, wants_bias, weight_VD.dtype, ctx.workspace),
                None if shard.vocab_group is None else reduce_hidden,
            )
            if gradients.hidden_ND is not None and finish is None:
                reduce_hidden(gradients.hidden_ND)
            grad_hidden_nD = None if finish is None else finish()
        grad_bias_V = None if bias_V is None or gradients.bias_V is None else gradients.bias_V.to(bias_V.dtype)
        return (
            grad_hidden_nD,
            _with_padding(gradients.weight_VD, weight_VD),
            _with_padding(grad_bias_V, bias_V),
            None,
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
    place_N: Tensor,
    n_valid: Tensor,
    shard: VocabShard,
    settings: Settings,
) -> Logits:
    """The real rows of the shard, in hidden's dtype, and the tokens that meet them."""
    rows = shard.num_real_rows
    return Logits(
        hidden_ND,
        weight_VD[:rows].to(hidden_ND.dtype).contiguous(),
        None if bias_V is None else bias_V[:rows].contiguous(),
        target_N,
        token_N,
        place_N,
        shard.tile_keys(TILE, hidden_ND.device),
        n_valid,
        settings.logit_scale,
        settings.softcap,
    )


def _filter(settings: Settings, logits: Logits, shard: VocabShard, seed: Tensor | None) -> Filter:
    share = logits.weight_VD.shape[0] / shard.vocab_size
    return Filter(settings.gradient, settings.filter_eps, settings.tail, MOST_DRAWN * share, seed)


def _backend(settings: Settings) -> ModuleType:
    if settings.backend == "torch":
        return reference
    from cce_dist.kernels import pipeline  # imports triton

    return pipeline


def _gather(hidden_nD: Tensor, labels_n: Tensor, shard: VocabShard, settings: Settings) -> tuple[Tensor, Tensor, int]:
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


def _valid_first(valid_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A permutation that brings the valid tokens to the front in their order, its inverse (int32), and their number as
    int32 [1]."""
    before_N = valid_N.cumsum(0)
    n_valid = before_N[-1:] if valid_N.shape[0] else before_N.new_zeros(1)
    index_N = torch.arange(valid_N.shape[0], device=valid_N.device)
    place_N = torch.where(valid_N, before_N - 1, n_valid + index_N - before_N)
    order_N = torch.empty_like(index_N).scatter_(0, place_N, index_N)
    return order_N, place_N.to(torch.int32), n_valid.to(torch.int32)


def _draw_seed(settings: Settings, device: torch.device) -> Tensor:
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
    dtype: torch.dtype,
    order_N: Tensor,
    valid_N: Tensor,
    num_tokens: int,
    most: int,
    shard: VocabShard,
) -> Upstream:
    """The two upstream gradients of every token of the group, compacted and scaled to at most 1."""
    zero_n = torch.zeros(num_tokens, dtype=dtype, device=order_N.device)
    grads_n2 = torch.stack([zero_n if grad is None else grad.to(dtype) for grad in (grad_nll_n, grad_lse_n)], dim=1)
    grads_N2 = grads_n2 if shard.token_group is None else gather_tokens(grads_n2, most, shard.token_group)
    grads_N2 = torch.where(valid_N[:, None], grads_N2[order_N], 0)
    softmax_N, target_N = grads_N2.sum(1), grads_N2[:, 0]
    if order_N.shape[0] == 0:
        return Upstream(softmax_N, target_N, softmax_N.new_ones(()))
    both_2N = torch.stack((softmax_N, target_N))
    largest = torch.where(both_2N.isfinite(), both_2N.abs(), 0).amax()
    exponent = torch.ceil(torch.log2(largest)).clamp_(max=127)  # 2^128 is infinite in fp32
    scale = torch.where(largest == 0, 1.0, torch.exp2(exponent))
    return Upstream(softmax_N / scale, target_N / scale, scale)


def _start_reduction(
    partial_ND: Tensor,
    order_N: Tensor,
    n_valid: Tensor,
    num_tokens: int,
    shard: VocabShard,
    settings: Settings,
    dtype: torch.dtype,
) -> Callable[[], Tensor]:
    """Starts summing the shards' dE (used up) over the ranks; when called, the rows of this rank's tokens."""
    scatter_rows = _backend(settings).scatter_rows
    reduce_dtype = partial_ND.dtype if shard.reduce_dtype is None else shard.reduce_dtype
    if shard.token_group is None:
        if shard.vocab_group is None:
            return lambda: scatter_rows(partial_ND, order_N, n_valid, dtype)
        finish_sum = start_all_reduce(partial_ND.to(reduce_dtype), shard.vocab_group)
        return lambda: scatter_rows(finish_sum(), order_N, n_valid, dtype)
    ordered_ND = scatter_rows(partial_ND, order_N, n_valid, reduce_dtype)
    finish_scatter = start_reduce_scatter(ordered_ND, num_tokens, shard.token_group)

    def finish() -> Tensor:
        own_nD = finish_scatter()
        if shard.replica_group is not None:
            own_nD = own_nD.contiguous()
            dist.all_reduce(own_nD, group=shard.replica_group)
        return own_nD.to(dtype)

    return finish


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
    """One shard per parameter, or per mesh and shape for what is computed from one: the ranks agree once a shard."""
    holder = weight if weight.is_leaf else weight.device_mesh
    shards = holder.__dict__.setdefault("_cce_dist_shards", {})
    if weight.shape not in shards:
        shards[weight.shape] = VocabShard.from_dtensor(weight)
    return shards[weight.shape]
