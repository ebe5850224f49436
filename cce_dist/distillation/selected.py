"""Logits of chosen ids: each rank computes those of its own rows, and one sum brings them together.

O(N·K·D) in forward and in backward: no work of the vocabulary's size but for the log-sum-exp, if it is asked for (that
is a pass of the loss), and of the D numbers of a (token, id) no more than a chunk. Formula of the gradient: that of a
product, dE_i = Σ_k g_ik·f'_ik·c_id(ik), and the same to the rows.

Collectives, with N tokens of K ids in all, n of each rank; fp32 where no dtype is named:

| layout          | forward                                                    | backward                          |
|-----------------|------------------------------------------------------------|-----------------------------------|
| single process  | none                                                       | none                              |
| tensor parallel | MAX of 2 numbers, which compare ids; SUM [N·K]             | dE: all-reduce [N, D]             |
| own tokens      | all-gather hidden [n, D] in its dtype, ids [n·K] and       | all-gather [n·K];                 |
|                 | their tokens in int64; reduce-scatter [N·K]                | dE: reduce-scatter [N, D]         |
| FSDP x TP       | as own tokens, over the token group; then all-reduce [n·K] | as own tokens; all-reduce [n, D]  |

Shapes: n tokens of this rank, N of the token group, K ids of a token, D hidden, V local rows; m pairs (token, id) of
this rank, M of the token group.
"""

from types import ModuleType
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cce_dist.collectives import check_same_tokens
from cce_dist.device_check import check_token_ids
from cce_dist.distillation.settings import KeptSettings, SelectedSettings
from cce_dist.kernels import chosen_pairs as torch_sums
from cce_dist.loss.autograd import LinearCrossEntropy
from cce_dist.loss.call import Head, begin, begin_without_labels
from cce_dist.loss.settings import LogprobSettings, check_integers, choose_backend, takes_settings
from cce_dist.loss.tokens import gather_values, in_reduce_dtype, start_sum
from cce_dist.shard import VocabShard

_NO_LABEL = -100


@overload
def linear_selected_logits(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    shard: VocabShard | None = None,
    return_lse: Literal[False] = False,
    **settings: Any,
) -> Tensor: ...
@overload
def linear_selected_logits(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    shard: VocabShard | None = None,
    return_lse: Literal[True],
    **settings: Any,
) -> tuple[Tensor, Tensor]: ...
@takes_settings(SelectedSettings)
def linear_selected_logits(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    shard: VocabShard | None = None,
    return_lse: bool = False,
    **settings: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Logits z / temperature of some ids of each token, z as in `linear_cross_entropy`; differentiable.

    Every rank of ``shard.vocab_group`` must make the call in every step, also with no token.

    Args:
        hidden: [..., D], fp32, fp16, bf16 or fp64; cast to the autocast dtype under autocast.
        weight: [V, D], this rank's rows; its gradient returns in its own dtype. A DTensor must be Shard(0) on a 1-D
            mesh: rows and group come from it, and its gradient is a DTensor.
        ids: [..., K], integers in [0, vocab_size) over the GLOBAL vocabulary, or the padding one; the same K on all
            ranks. An id may stand more than once. Ranks that bring the same tokens must bring the same ids, which is
            checked (on CUDA by a device-side assertion).
        bias: [V], this rank's.
        shard: which global rows these are, and the process groups. None: all rows, in this process alone.
        softcap, logit_scale: None leaves them out.
        temperature: what the logits are divided by, after the softcap.
        padding_id: the id of places that have none.
        backend: "triton" (CUDA), "torch" (any device), "auto": triton on CUDA.
        gradient: of the log-sum-exp, see `linear_cross_entropy`.
        return_lse: also return the log-sum-exp of all logits of each token [...] (fp32, differentiable, 0 where all ids
            are padding), by a pass of the loss.

    Returns:
        [..., K] in fp32 (fp64 for fp64), 0 where an id is padding; or (logits, lse).

    Raises:
        ValueError, TypeError: for arguments that do not fit, on every rank of the vocabulary group (there a
            ValueError), before anything is computed. On CUDA an id out of range is a device-side assertion.
    """

    def check(chosen: SelectedSettings, shard: VocabShard) -> tuple[int, dict[str, Any]]:
        check_ids(ids, hidden, chosen, shard.vocab_size)
        return hidden.shape[:-1].numel(), {"ids of a token": ids.shape[-1], "return_lse": return_lse}

    head = begin_without_labels(hidden, weight, bias, shard, settings, SelectedSettings, "logits of chosen ids", check)
    z, lse = selected(head, weight, ids, return_lse)
    return z if lse is None else (z, lse)


def selected(head: Head[Any], weight: Tensor, ids: Tensor, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """Logits [..., K] and, if it is asked for, their log-sum-exp [...] of a call that the ranks have agreed on.

    Args:
        head: whose settings are `KeptSettings`, and `SelectedSettings` for a log-sum-exp.
        weight: as the caller has it, by which the loss counts labels.
    """
    ids_nK = ids.reshape(-1, ids.shape[-1])
    tokens, number = ids_nK.shape
    token_m = torch.arange(tokens, device=ids.device).repeat_interleave(number)
    z_m, weight_VD = logits_of_pairs(head, ids_nK.reshape(-1), token_m, head.most * number)
    lse = _lse(head, weight, weight_VD, ids_nK).view(ids.shape[:-1]) if return_lse else None
    return z_m.view(ids.shape), lse


def check_ids(ids: Any, hidden: Tensor, settings: KeptSettings, vocab_size: int, name: str = "ids") -> None:
    """Raises TypeError or ValueError for ids [..., K] or a backend that do not fit; one out of range on a CPU alone."""
    choose_backend(settings.backend, hidden)
    check_integers(name, ids, hidden.device)
    expected = list(hidden.shape[:-1])
    if ids.ndim != hidden.ndim or list(ids.shape[:-1]) != expected or ids.shape[-1] < 1:
        raise ValueError(
            f"{name} must be [{', '.join(map(str, [*expected, 'K']))}], hidden's shape with K ids, 1 or more, in place "
            f"of its last axis; got shape {list(ids.shape)}."
        )
    if not ids.is_cuda:  # else the gathered ones, on every rank
        check_token_ids(ids, vocab_size, settings.padding_id, legal_ids(settings.padding_id, vocab_size, name))


def legal_ids(padding_id: int, vocab_size: int, name: str = "ids") -> str:
    """What ids must be, for an error's text."""
    return f"{name} must be in [0, {vocab_size}) or padding_id = {padding_id}"


def _lse(head: Head[Any], weight: Tensor, weight_VD: Tensor, ids_nK: Tensor) -> Tensor:
    """[n], by the loss of each token's first id, whose gradient to ``weight_VD`` the pairs' is added to."""
    settings = head.settings
    is_id_nK = ids_nK != settings.padding_id
    first_n1 = is_id_nK.to(torch.int8).argmax(1, keepdim=True)
    labels_n = torch.where(is_id_nK.any(1), ids_nK.gather(1, first_n1)[:, 0], _NO_LABEL)
    given = {name: getattr(settings, name) for name in SelectedSettings.model_fields if name != "padding_id"}
    inputs, _ = begin(
        head.hidden_nD,
        weight,
        labels_n,
        head.bias_V,
        head.shard,
        {**given, "ignore_index": _NO_LABEL},
        LogprobSettings,
        "the log-sum-exp beside logits of chosen ids",
    )
    _, lse_n, _, _ = LinearCrossEntropy.apply(*inputs._replace(weight_VD=weight_VD))
    return lse_n


class _Pairs(NamedTuple):
    """The pairs (token, id) of a call, apart from the tensors that may need a gradient; ``most``: of any rank."""

    id_m: Tensor
    token_m: Tensor
    most: int
    most_tokens: int
    padding_id: int
    shard: VocabShard
    scale: float
    softcap: float | None
    backend: Literal["triton", "torch"]

    @property
    def sums(self) -> ModuleType:
        if self.backend == "torch":
            return torch_sums
        from cce_dist.kernels.triton import chosen_pairs  # imports triton

        return chosen_pairs


def logits_of_pairs(head: Head[Any], id_m: Tensor, token_m: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Logits [m] of pairs (token, id), 0 where the id is padding; and the rows [V, D] for what else is computed of
    them, so that backward adds the pairs' gradient to that in place.

    Args:
        head: whose settings are `KeptSettings`.
        token_m: places in this rank's tokens, ascending.
        most: pairs that any rank brings.
    """
    settings = head.settings
    assert isinstance(settings, KeptSettings)
    numbers = most, head.most, settings.padding_id
    backend = choose_backend(settings.backend, head.hidden_nD)
    chosen = _Pairs(id_m.long(), token_m, *numbers, head.shard, *settings.scale_and_cap, backend)
    with torch.autocast(id_m.device.type, enabled=False):
        z_m, weight_VD = _PairLogits.apply(head.hidden_nD, head.weight_VD, head.bias_V, chosen)
    return z_m, head.weight_VD if weight_VD is None else weight_VD


class _PairLogits(torch.autograd.Function):
    """(z_m, the rows again where they need a gradient)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, chosen: _Pairs
    ) -> tuple[Tensor, Tensor | None]:
        shard = chosen.shard
        hidden_ND = gather_values(hidden_nD.contiguous(), shard, chosen.most_tokens, 0)
        id_M = gather_values(chosen.id_m, shard, chosen.most, chosen.padding_id)
        token_M = _in_group(gather_values(chosen.token_m, shard, chosen.most, chosen.most_tokens - 1), chosen)
        if id_M.is_cuda:
            must_be = legal_ids(chosen.padding_id, shard.vocab_size)
            check_token_ids(id_M, shard.vocab_size, chosen.padding_id, must_be)
        if shard.same_tokens:
            check_same_tokens(torch.cat((id_M, token_M)), "ids", shard.vocab_group)
        row_M = shard.local_columns(torch.where(id_M == chosen.padding_id, -1, id_M)).long()
        z_M = chosen.sums.products(hidden_ND, weight_VD, token_M, row_M)
        if bias_V is not None and bias_V.shape[0]:
            z_M += bias_V.index_select(0, row_M.clamp(min=0)).to(z_M.dtype)
        z_M *= chosen.scale
        if chosen.softcap is not None:
            z_M = chosen.softcap * torch.tanh(z_M / chosen.softcap)
        z_m = start_sum(z_M.masked_fill_(row_M < 0, 0), chosen.id_m.shape[0], shard)()
        ctx.chosen, ctx.num_tokens = chosen, hidden_nD.shape[0]
        ctx.set_materialize_grads(False)
        capped_m = None if chosen.softcap is None else z_m
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, token_M, row_M, capped_m)
        return z_m, weight_VD if ctx.needs_input_grad[1] else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_m: Tensor | None, grad_weight_VD: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, token_M, row_M, capped_m = ctx.saved_tensors
        if grad_m is None:
            return None, grad_weight_VD, None, None
        chosen: _Pairs = ctx.chosen
        shard = chosen.shard
        grad_m = grad_m * chosen.scale
        if capped_m is not None:
            grad_m = grad_m * (1 - (capped_m / chosen.softcap).square())
        grad_M = gather_values(grad_m, shard, chosen.most, 0)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        finish, grad_bias_V = None, None
        if wants_hidden:
            sum_ND = chosen.sums.sum_of_tokens(grad_M, weight_VD, token_M, row_M, hidden_ND.shape[0], hidden_ND.dtype)
            finish = start_sum(in_reduce_dtype(sum_ND, shard), ctx.num_tokens, shard)
        if wants_weight:
            # What the loss gives for the log-sum-exp is its own new tensor, and nobody else has it.
            grad_weight_VD = torch.zeros_like(weight_VD) if grad_weight_VD is None else grad_weight_VD
            chosen.sums.add_to_rows(grad_weight_VD, grad_M, hidden_ND, token_M, row_M)
        if wants_bias:
            sum_V = torch.zeros(bias_V.shape, dtype=grad_M.dtype, device=grad_M.device)
            if bias_V.shape[0]:
                sum_V.index_add_(0, row_M.clamp(min=0), grad_M.masked_fill(row_M < 0, 0))
            grad_bias_V = sum_V.to(bias_V.dtype)
        grad_hidden_nD = None if finish is None else finish().to(hidden_ND.dtype)
        return grad_hidden_nD, grad_weight_VD, grad_bias_V, None


def _in_group(token_M: Tensor, chosen: _Pairs) -> Tensor:
    """Places in the tokens of the token group, of those in each rank's own."""
    if chosen.shard.token_group is None:
        return token_M
    part_M = torch.arange(token_M.shape[0], device=token_M.device) // max(chosen.most, 1)
    return token_M + part_M * chosen.most_tokens
