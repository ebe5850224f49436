"""Forward and backward of the loss: this rank's rows by the backend, the ranks' parts put together.

In: flat tokens of this rank, local rows, and a `Call` with all the rest. Out: nll, lse and, if asked for, entropy and
smoothed loss of the tokens, their gradients.

Shapes: n tokens of this rank, N tokens of the token group, D hidden, V local rows, T tiles, S splits.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cce_dist.collectives import (
    gather_tokens,
    merge_softmax,
    start_all_reduce,
    token_fingerprint,
)
from cce_dist.device_check import device_check
from cce_dist.kernels import torch_backend
from cce_dist.kernels.problem import (
    MOST_DRAWN,
    TILE,
    Exponentials,
    Filter,
    Gradients,
    Keep,
    Logits,
    Normaliser,
    Order,
    Ordered,
    OutputGradients,
    Tiles,
    Upstream,
    Wanted,
)
from cce_dist.loss import frequent as frequent_rows
from cce_dist.loss import smoothing
from cce_dist.loss.exact_sums import exactly
from cce_dist.loss.frequent import Frequent, LabelCounts
from cce_dist.loss.settings import (
    FREQUENT_WORKSPACE,
    Method,
    TokenSettings,
    check_temperatures,
    legal_labels,
    rows_dtype,
    split_budget,
    workspace_bytes,
)
from cce_dist.loss.tokens import gather, gather_values, own, start_sum
from cce_dist.shard import VocabShard


class Call(NamedTuple):
    """What a call is, apart from the tensors that may need a gradient.

    Attributes:
        labels_n: int64, shifted.
        most: tokens that any rank brings; the hosts have agreed on the call by then.
        grad_enabled: of the caller; inside an autograd function it is always off.
        counts: of the labels, where there are to be frequent rows.
        entropy: whether it is wanted; "value": without a gradient.
        temperature_n: one for each token, in fp32 (fp64 for fp64), or None.
        exact_sums: whether outputs must have the same bits whatever the other tokens and the ranks.
    """

    labels_n: Tensor
    shard: VocabShard
    settings: TokenSettings
    method: Method
    most: int
    grad_enabled: bool
    counts: LabelCounts | None = None
    entropy: bool | Literal["value"] = False
    temperature_n: Tensor | None = None
    exact_sums: bool = False

    @property
    def padded_to(self) -> int:
        """Tokens of each rank's part, where the token group's are gathered."""
        if self.shard.token_group is None:
            return self.labels_n.shape[0]
        return self.most if self.settings.max_tokens is None else self.settings.max_tokens

    @property
    def is_smoothed(self) -> bool:
        """By the mean row of the classifier, which a softcap does not leave."""
        return bool(getattr(self.settings, "label_smoothing", 0.0)) and self.settings.softcap is None

    @property
    def class_weights_V(self) -> Tensor | None:
        weights: Tensor | None = getattr(self.settings, "class_weights", None)
        return weights

    @property
    def grad_accumulator_VD(self) -> Tensor | None:
        """What dC of the real rows is added to, in place of being returned."""
        given = getattr(self.settings, "grad_accumulator", None)
        return None if given is None else given[: self.shard.num_real_rows]

    @property
    def backend(self) -> ModuleType:
        if self.method.backend == "torch":
            return torch_backend
        from cce_dist.kernels.triton import backend  # imports triton

        return backend


class Saved(NamedTuple):
    """The tensors that backward needs: as one tuple through ``save_for_backward``, so that recomputation brings all."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    target_N: Tensor
    token_N: Tensor
    place_N: Tensor
    n_valid: Tensor
    seed: Tensor | None
    max_N: Tensor
    log_sum_N: Tensor
    tile_lse_TN: Tensor | None
    reference_SN: Tensor | None
    exp_NK: Tensor | None
    origin_N: Tensor | None
    target_logit_N: Tensor | None
    entropy_N: Tensor | None
    inverse_temperature_N: Tensor | None
    mean_row_D: Tensor | None
    mean_class_weight: Tensor | None
    class_weights_V: Tensor | None
    adapter_NR: Tensor | None = None
    adapter_VR: Tensor | None = None
    adapter_mean_R: Tensor | None = None

    @property
    def order(self) -> Order:
        return Order(self.token_N, self.place_N, self.n_valid)


_NOT_FREQUENT = (None,) * len(Frequent._fields)


class LinearCrossEntropy(torch.autograd.Function):
    """(nll_n, lse_n, entropy_n or None, the mean over all labels of nll_n or None) of this rank's tokens, 0 where
    ignored."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        call: Call,
        adapter_nR: Tensor | None = None,
        adapter_VR: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        shard, settings, method = call.shard, call.settings, call.method
        num_tokens, most = call.labels_n.shape[0], call.padded_to
        hidden_ND, labels_N = gather(hidden_nD, call.labels_n, shard, most, settings.ignore_index)
        adapter_NR = None if adapter_nR is None else gather_values(adapter_nR.contiguous(), shard, most, 0)
        workspace = workspace_bytes(settings.workspace_mb, method, labels_N.shape[0], hidden_ND.element_size())
        equal = {"labels": token_fingerprint(labels_N)} if shard.same_tokens else {}
        column_N = labels_N if shard.is_whole else shard.local_columns(labels_N)
        ordered: Ordered = call.backend.valid_first(labels_N, column_N, settings.ignore_index, shard.vocab_size)
        order, target_N, legal = ordered
        if legal.is_cuda:
            device_check(legal, f"{legal_labels(settings.ignore_index, shard.vocab_size)}.")
        hidden_ND = hidden_ND if hidden_ND.stride(1) == 1 else hidden_ND.contiguous()

        mean: smoothing.MeanRow | None = None
        mean_logit_n: Tensor | None = None
        adapter_mean: smoothing.MeanRow | None = None
        if call.is_smoothed:
            with torch.autocast(hidden_nD.device.type, enabled=False):
                dtype = torch.promote_types(hidden_nD.dtype, torch.float32)
                mean = smoothing.mean_row(weight_VD, bias_V, call.class_weights_V, shard, settings.scale, dtype)
                valid_n = call.labels_n != settings.ignore_index
                mean_logit_n = smoothing.mean_logit(hidden_nD, valid_n, mean)
                if adapter_nR is not None and adapter_VR is not None:
                    adapter_mean = smoothing.mean_row(
                        adapter_VR, None, call.class_weights_V, shard, settings.scale, dtype
                    )
                    mean_logit_n += smoothing.mean_logit(adapter_nR, valid_n, adapter_mean)

        needs_grad = call.grad_enabled and any(ctx.needs_input_grad)
        inverse_temperature_N: Tensor | None = None
        if call.temperature_n is not None:
            temperature_N = gather_values(call.temperature_n, shard, most, 1.0)
            if temperature_N.is_cuda:
                check_temperatures(temperature_N)
            if shard.same_tokens:
                equal["temperatures"] = token_fingerprint(temperature_N.float().view(torch.int32))
            inverse_temperature_N = 1 / temperature_N[order.token_N]
        logits = logits_of(hidden_ND, weight_VD, bias_V, target_N, order, call, inverse_temperature_N)
        logits = with_adapter(logits, adapter_NR, adapter_VR, shard)
        with torch.autocast(hidden_nD.device.type, enabled=False):
            frequent: Frequent | None = None
            exponentials: Exponentials | None = None
            others = logits
            sparse = needs_grad and method.gradient != "exact"
            if call.counts is not None:
                frequent, target_N, equal["frequent rows"] = frequent_rows.find(
                    target_N, labels_N, settings.ignore_index, order, call.counts, method.frequent_rows, shard
                )
                exchange = frequent_rows.start_exchange(frequent, logits, shard)
                others = logits._replace(target_N=target_N, frequent_V=frequent.slot_v)
            if call.exact_sums:
                exact = exactly(logits, labels_N, order, shard, call.backend, workspace, equal)
                normaliser, entropy_N = exact.normaliser, None
                values = order.restore(exact.nll_N), order.restore(exact.lse_N)
                # Backward filters by tiles of local rows, which are others.
                tiles = call.backend.summarise(logits, True, workspace).tiles if sparse else None
            elif method.first_pass == "fp8":
                estimate = call.backend.estimate(others)
                estimated_summary, part = estimate.summary, None
                if frequent is not None:
                    frequent = exchange()
                    part = call.backend.summarise(frequent_rows.only(logits, frequent), False, workspace)
                    estimated_summary = call.backend.join(estimated_summary, part, frequent.share(shard))
                estimated = merge_softmax(estimated_summary, shard.vocab_group, equal).normaliser
                equal = {}
                summary = call.backend.refine(others, estimate, estimated, method.refine_eps)
                if frequent is not None and part is not None:
                    summary = call.backend.join(summary, part, frequent.share(shard))
            else:  # its sums and targets are of all rows, so that they have the same bits without a gradient
                whole = logits if frequent is None else logits._replace(frequent_V=frequent.slot_v)
                keep, workspace = _what_to_keep(call, logits, workspace) if needs_grad else (None, workspace)
                summary = call.backend.summarise(whole, sparse, workspace, bool(call.entropy), keep)
                exponentials = summary.exponentials
                if frequent is not None and shard.vocab_group is not None:
                    frequent = exchange()
            if not call.exact_sums:
                normaliser, target_logit_N, entropy_N = merge_softmax(summary, shard.vocab_group, equal)
                values, tiles = call.backend.losses(normaliser, target_logit_N, order), summary.tiles

        if needs_grad:
            seed = _seed_of(settings.seed, values[0]) if method.gradient == "unbiased" else None
            tile_lse_TN, reference_SN, tiles_per_split = tiles or (None, None, 0)
            ctx.call, ctx.workspace = call, workspace
            ctx.unit, ctx.tiles_per_split = normaliser.unit, tiles_per_split
            kept: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
            if exponentials is not None:
                kept = exponentials[:3]
            ctx.sloped = exponentials is not None and exponentials.sloped
            ctx.set_materialize_grads(False)
            max_and_sum = normaliser.max_N, normaliser.log_sum_N
            saved = Saved(
                hidden_ND,
                weight_VD,
                bias_V,
                target_N,
                *order,
                seed,
                *max_and_sum,
                tile_lse_TN,
                reference_SN,
                *kept,
                entropy_N if call.entropy is True else None,
                inverse_temperature_N,
                *((None, None, None) if mean is None else (mean.row_D, mean.weight, call.class_weights_V)),
            )
            if adapter_NR is not None:
                mean_R = None if adapter_mean is None else adapter_mean.row_D
                saved = saved._replace(adapter_NR=adapter_NR, adapter_VR=adapter_VR, adapter_mean_R=mean_R)
            if frequent is not None and shard.vocab_group is None:
                frequent = frequent._replace(rows_KD=None, bias_K=None, adapter_KR=None)  # they are here anyway
            ctx.save_for_backward(*saved, *(frequent or _NOT_FREQUENT))
            ctx.counted = False

        def in_own(values_N: Tensor) -> Tensor:
            return own(values_N, num_tokens, most, shard)

        nll_n, lse_n = (in_own(x_N) for x_N in values)
        entropy_n = None if entropy_N is None else in_own(order.restore(entropy_N))
        if entropy_n is not None and call.entropy == "value":
            ctx.mark_non_differentiable(entropy_n)
        smoothed_n = None if mean is None or mean_logit_n is None else mean.weight * lse_n - mean_logit_n
        return nll_n, lse_n, entropy_n, smoothed_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_n: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        tensors = ctx.saved_tensors  # once: under checkpointing it recomputes
        saved = Saved(*tensors[: len(Saved._fields)])
        frequent = None if call.counts is None else Frequent(*tensors[len(Saved._fields) :])
        shard, weight_VD, bias_V = call.shard, saved.weight_VD, saved.bias_V
        wants_hidden, wants_weight, wants_bias, _, wants_adapter, wants_adapter_rows = ctx.needs_input_grad
        trained_VD = weight_VD
        if saved.adapter_VR is not None:
            wants_weight, trained_VD = wants_adapter_rows, saved.adapter_VR
        with torch.autocast(saved.hidden_ND.device.type, enabled=False):
            of_mean_n = None
            # Not by the labels, which may be others by now.
            valid_N = saved.place_N < saved.n_valid if call.is_smoothed else None
            if grads_n[3] is not None and valid_N is not None and saved.mean_class_weight is not None:
                valid_n = own(valid_N, call.labels_n.shape[0], call.padded_to, shard)
                of_mean_n = -grads_n[3].masked_fill(~valid_n, 0.0)
                of_lse_n = -of_mean_n * saved.mean_class_weight
                grads_n = (grads_n[0], of_lse_n if grads_n[1] is None else grads_n[1] + of_lse_n, grads_n[2], of_mean_n)
            *of_all_N, of_mean_N = _of_all_tokens(grads_n, saved, call)
            upstream = _upstream(of_all_N, saved, call)
            order, inverse_temperature_N = saved.order, saved.inverse_temperature_N
            logits = logits_of(saved.hidden_ND, weight_VD, bias_V, saved.target_N, order, call, inverse_temperature_N)
            logits = with_adapter(logits, saved.adapter_NR, saved.adapter_VR, shard)
            normaliser = Normaliser(saved.max_N, saved.log_sum_N, ctx.unit)
            onto_VD = call.grad_accumulator_VD if wants_weight else None
            wanted = Wanted(
                wants_hidden, wants_weight, wants_bias, trained_VD.dtype, ctx.workspace, onto_VD, wants_adapter
            )
            tiles = None
            if saved.tile_lse_TN is not None:
                tiles = Tiles(saved.tile_lse_TN, saved.reference_SN, ctx.tiles_per_split)
            exponentials = None
            if saved.exp_NK is not None and saved.origin_N is not None and saved.target_logit_N is not None:
                exponentials = Exponentials(saved.exp_NK, saved.origin_N, saved.target_logit_N, ctx.sloped)
            finish: Callable[[], Tensor] | None = None

            def reduce_hidden(partial_ND: Tensor) -> None:
                nonlocal finish
                finish = _start_reduction(partial_ND, saved, call)

            part, onto_ND, onto_NR = None, None, None
            if frequent is not None and shard.vocab_group is not None:
                part, onto_ND, onto_NR = _start_frequent(logits, frequent, normaliser, upstream, wanted, call)
            others = logits if frequent is None else logits._replace(frequent_V=frequent.slot_v)
            gradients: Gradients = call.backend.differentiate(
                others,
                tiles,
                normaliser,
                upstream,
                filter_of(call, logits, saved.seed),
                wanted,
                None if shard.vocab_group is None else reduce_hidden,
                onto_ND,
                onto_NR,
                exponentials,
            )
            if frequent is not None:
                if part is None:  # after the others, whose memory it takes
                    of_all = logits._replace(target_N=frequent.slot_M)
                    workspace = min(ctx.workspace, FREQUENT_WORKSPACE)
                    onto = onto_VD is not None
                    call.backend.add_rows(of_all, frequent.row_K, normaliser, upstream, gradients, workspace, onto)
                else:
                    _, rows_KD, rows_K, _ = part()
                    if rows_KD is not None and gradients.weight_VD is not None:
                        call.backend.write_rows(gradients.weight_VD, rows_KD, frequent.row_K, onto_VD is not None)
                    if rows_K is not None and gradients.bias_V is not None:
                        call.backend.write_rows(gradients.bias_V, rows_K, frequent.row_K)
                if call.counts is not None and not ctx.counted:
                    call.counts.count(frequent.label_N)
                    ctx.counted = True
            if of_mean_N is not None and valid_N is not None and (wants_weight or wants_bias):
                smoothing.add_to_rows(
                    gradients.weight_VD,
                    gradients.bias_V,
                    of_mean_N.masked_fill(~valid_N, 0.0),
                    saved.hidden_ND if saved.adapter_NR is None else saved.adapter_NR,
                    valid_N,
                    saved.class_weights_V,
                    call.settings.scale / shard.vocab_size,
                )
            if gradients.hidden_ND is not None and finish is None:
                reduce_hidden(gradients.hidden_ND)
            finish_adapter = None
            if gradients.adapter_NR is not None:
                finish_adapter = _start_reduction(gradients.adapter_NR, saved, call)
            grad_hidden_nD = None if finish is None else finish()
            grad_adapter_nR = None if finish_adapter is None else finish_adapter()
            if grad_adapter_nR is not None and of_mean_n is not None and saved.adapter_mean_R is not None:
                smoothing.add_to_hidden(grad_adapter_nR, of_mean_n, saved.adapter_mean_R)
            if grad_hidden_nD is not None and of_mean_n is not None and saved.mean_row_D is not None:
                smoothing.add_to_hidden(grad_hidden_nD, of_mean_n, saved.mean_row_D)
        grad_bias_V = None if bias_V is None or gradients.bias_V is None else gradients.bias_V.to(bias_V.dtype)
        grad_rows = None if onto_VD is not None else _with_padding(gradients.weight_VD, trained_VD)
        of_rows = (grad_rows, None) if saved.adapter_VR is None else (None, grad_rows)
        return grad_hidden_nD, of_rows[0], _with_padding(grad_bias_V, bias_V), None, grad_adapter_nR, of_rows[1]


def _start_frequent(
    logits: Logits, frequent: Frequent, normaliser: Normaliser, upstream: Upstream, wanted: Wanted, call: Call
) -> tuple[Callable[[], Gradients], Tensor | None, Tensor | None]:
    """The frequent rows' gradient of this rank's share of the tokens: starts summing dC over the ranks, and puts dE
    into the partial [N, D] to which the others' is added, an adapter's da into one [N, R]."""
    shard, backend = call.shard, call.backend
    place_M, share = frequent.place_M, frequent.share(call.shard)
    assert place_M is not None and share is not None
    only = frequent_rows.only(logits, frequent)
    turn = slice(share.turn, None, share.turns)

    def zeros(like_ND: Tensor | None, is_wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        """A partial of all tokens, and that of this rank's where the tokens are dealt in turn."""
        if like_ND is None or not is_wanted:
            return None, None
        all_ND = like_ND.new_zeros(like_ND.shape, dtype=normaliser.max_N.dtype)
        return all_ND, all_ND[turn] if shard.token_group is None else None

    onto_ND, onto_MD = zeros(logits.hidden_ND, wanted.hidden)
    onto_NR, onto_MR = zeros(logits.adapter_NR, wanted.adapter)
    part: Gradients = backend.differentiate(
        only,
        None,
        *frequent_rows.picked(normaliser, upstream, place_M),
        Filter("exact"),
        wanted._replace(weight_dtype=normaliser.max_N.dtype, onto_VD=None),
        onto_ND=onto_MD,
        onto_NR=onto_MR,
    )
    for onto, onto_part, of_part in ((onto_ND, onto_MD, part.hidden_ND), (onto_NR, onto_MR, part.adapter_NR)):
        if onto is not None and onto_part is None and onto.shape[0]:
            assert of_part is not None
            onto.index_add_(0, place_M, of_part)  # 0 of those that are not valid
    assert shard.vocab_group is not None
    sums = [None if x is None else start_all_reduce(x, shard.vocab_group) for x in part[1:3]]
    return lambda: Gradients(None, *(None if finish is None else finish() for finish in sums)), onto_ND, onto_NR


def logits_of(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    order: Order,
    call: Call,
    inverse_temperature_N: Tensor | None = None,
) -> Logits:
    """The real rows of the shard, in the dtype that `rows_dtype` says, and the tokens that meet them."""
    rows, settings = call.shard.num_real_rows, call.settings
    dtype = rows_dtype(hidden_ND.dtype, weight_VD.dtype, settings.fp32_head)
    return Logits(
        hidden_ND,
        weight_VD[:rows].to(dtype).contiguous(),
        None if bias_V is None else bias_V[:rows].contiguous(),
        target_N,
        order.token_N,
        order.place_N,
        call.shard.tile_keys(TILE, hidden_ND.device),
        order.n_valid,
        settings.scale,
        settings.softcap,
        inverse_temperature_N=inverse_temperature_N,
    )


def with_adapter(logits: Logits, adapter_NR: Tensor | None, adapter_VR: Tensor | None, shard: VocabShard) -> Logits:
    """The same with an adapter's operands, if there is one."""
    if adapter_NR is None or adapter_VR is None:
        return logits
    rows_VR = adapter_VR[: shard.num_real_rows].to(logits.hidden_ND.dtype).contiguous()
    return logits._replace(adapter_NR=adapter_NR, adapter_VR=rows_VR)


def _what_to_keep(call: Call, logits: Logits, workspace: int) -> tuple[Keep | None, int]:
    """What forward keeps for an exact backward, and the bytes that are left."""
    if logits.weight_VD.dtype != logits.hidden_ND.dtype:  # rows in fp32: products with what is kept are the library's
        return None, workspace
    if logits.adapter_NR is not None:
        return None, workspace
    read = logits.bias_V is not None or call.entropy is True
    shape, dtype = (logits.num_tokens, logits.weight_VD.shape[0]), logits.hidden_ND.dtype
    split = split_budget(call.settings.workspace_mb, workspace, call.method, *shape, dtype, read)
    return (Keep(split.columns, not read) if split.columns else None), split.workspace


def filter_of(call: Call, logits: Logits, seed: Tensor | None) -> Filter:
    share = logits.weight_VD.shape[0] / call.shard.vocab_size
    method = call.method
    return Filter(method.gradient, method.filter_eps, call.settings.tail, MOST_DRAWN * share, seed)


_NEXT_SEED = 0x9E3779B97F4A7C15 - 2**64  # as a signed number
_seeds: dict[tuple[int, torch.device], Tensor] = {}


def _seed_of(seed: int | Tensor | None, nll_N: Tensor) -> Tensor:
    """int64 [1], of this call alone: backward, and a recomputed forward's backward, get it with the saved tensors.

    Without a given one it is the bits of the tokens' losses, summed on the device to the number of `torch.manual_seed`:
    other ones with other tokens or weights, the same for the same. So the loss takes no number of torch's generator,
    where dropout would then draw others than without it, and a resumed run draws on without a state of its own.
    """
    device = nll_N.device
    if seed is None:
        bits_N = nll_N.view(torch.int64 if nll_N.dtype == torch.float64 else torch.int32)
        return bits_N.sum(0, keepdim=True, dtype=torch.int64).add_(torch.initial_seed() - 2**63)
    if isinstance(seed, Tensor):
        return seed.detach().reshape(1).clone()
    if (seed, device) not in _seeds:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"seed={seed} is used for the first time inside of a CUDA graph capture, where its sequence would "
                "start anew at each replay: call the loss once before capturing, or pass a tensor as seed."
            )
        _seeds[seed, device] = torch.full((1,), seed, dtype=torch.int64, device=device)
    own_seed = _seeds[seed, device].clone()
    _seeds[seed, device] += _NEXT_SEED
    return own_seed


def _of_all_tokens(grads_n: tuple[Tensor | None, ...], saved: Saved, call: Call) -> list[Tensor | None]:
    """The upstream gradients of nll, lse, entropy and mean logit of every token of the group, None of what there is
    not."""
    dtype, group = saved.max_N.dtype, call.shard.token_group
    if group is None:
        return list(grads_n)
    there = [True, True, call.entropy is True, call.is_smoothed]
    zero_n = torch.zeros(call.labels_n.shape[0], dtype=dtype, device=saved.max_N.device)
    given_n = [x_n for x_n, is_there in zip(grads_n, there, strict=True) if is_there]
    given_nx = torch.stack([zero_n if x_n is None else x_n.to(dtype) for x_n in given_n], dim=1)
    gathered_N = iter(gather_tokens(given_nx, call.padded_to, group).unbind(1))
    return [next(gathered_N) if is_there else None for is_there in there]


def _upstream(grads_N: list[Tensor | None], saved: Saved, call: Call) -> Upstream:
    """Those of nll, lse and entropy, compacted, as the kernels take them: scaled to at most about 1."""
    upstream: Upstream = call.backend.upstream(
        OutputGradients(*grads_N),
        saved.order,
        saved.hidden_ND.dtype,
        saved.max_N.dtype,
        saved.entropy_N,
        saved.inverse_temperature_N,
    )
    return upstream


def _start_reduction(partial_ND: Tensor, saved: Saved, call: Call) -> Callable[[], Tensor]:
    """Starts summing the shards' dE (used up) over the ranks; when called, the rows of this rank's tokens."""
    shard, dtype, num_tokens = call.shard, saved.hidden_ND.dtype, call.labels_n.shape[0]

    def in_place(rows_ND: Tensor, dtype: torch.dtype) -> Tensor:
        rows: Tensor = call.backend.scatter_rows(rows_ND, saved.token_N, saved.n_valid, dtype)
        return rows

    reduce_dtype = partial_ND.dtype if shard.reduce_dtype is None else shard.reduce_dtype
    if shard.token_group is None:
        if shard.vocab_group is None:
            return lambda: in_place(partial_ND, dtype)
        finish_sum = start_sum(partial_ND.to(reduce_dtype), num_tokens, shard)
        return lambda: in_place(finish_sum(), dtype)
    finish_own = start_sum(in_place(partial_ND, reduce_dtype), num_tokens, shard)
    return lambda: finish_own().to(dtype)


def _with_padding(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """Zero gradient for the padding rows."""
    if grad is None or parameter is None or grad.shape == parameter.shape:
        return grad
    whole = grad.new_zeros(parameter.shape)
    whole[: grad.shape[0]] = grad
    return whole
