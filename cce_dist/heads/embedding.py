"""An embedding whose table is a vocabulary shard: what tied input embeddings become.

The ranks' ids are gathered, each rank looks up the rows that it holds, and a reduce-scatter brings every row home.
Among ranks that bring the same ids (tensor parallelism) there is nothing to gather and an all-reduce does. No rank ever
holds the table or its gradient as a whole.

Shapes: n ids of this rank, N ids of the token group, D hidden, V local rows.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cce_dist.collectives import check_same_tokens, gather_tokens, reduce_scatter_tokens
from cce_dist.device_check import check_token_ids
from cce_dist.heads.owner import ShardOwner
from cce_dist.shard import VocabShard
from cce_dist.shard.agreement import agree

OutputDtype = Callable[[], torch.dtype | None]
_NO_ID = -(2**62)


class VocabParallelEmbedding(nn.Embedding):
    """The class of an embedding after `make_vocab_parallel`; every rank of the shard's group must call it."""

    _cce_owner: ShardOwner
    _cce_output_dtype: OutputDtype

    def forward(self, input: Tensor) -> Tensor:
        owner = self._cce_owner
        return _Lookup.apply(owner.local_weight(), input, owner.shard, self.padding_idx, self._cce_output_dtype())


def check_embedding(embedding: nn.Module) -> None:
    """Raises where a shard cannot do what the embedding does.

    Raises:
        TypeError: not an nn.Embedding.
        ValueError: an option that needs the whole table.
    """
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(
            f"only an nn.Embedding may share the classifier's weight, got {type(embedding).__name__}: untie it."
        )
    for name in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(embedding, name):
            raise ValueError(f"an embedding with {name} cannot be vocabulary-parallel; untie it from the classifier.")


def make_vocab_parallel(embedding: nn.Embedding, owner: ShardOwner, output_dtype: OutputDtype) -> None:
    """Turns an embedding into a vocabulary-parallel one, in place; a subclass keeps its own forward around the lookup.

    Args:
        embedding: its state-dict keys, hooks and ``isinstance`` relations stay.
        owner: of the rows; its shard must have a vocabulary group.
        output_dtype: called in each forward for the dtype of the embedded tokens; None: the table's.

    Raises:
        TypeError, ValueError: as `check_embedding`; a shard of a single process.
    """
    check_embedding(embedding)
    if owner.shard.vocab_group is None:
        raise ValueError("the owner's shard has no vocab_group: a single process holds the table as a whole.")
    stock = type(embedding)
    # The stock class comes first, so that a forward of its own (Gemma scales the result) wraps the sharded lookup.
    bases = (VocabParallelEmbedding,) if stock is nn.Embedding else (stock, VocabParallelEmbedding)
    embedding.__class__ = type(f"VocabParallel{stock.__name__}", bases, {})
    embedding._cce_owner = owner  # type: ignore[assignment]
    embedding._cce_output_dtype = output_dtype  # type: ignore[assignment]


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight_VD: Tensor,
        ids: Tensor,
        shard: VocabShard,
        padding_idx: int | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        fault: Exception | None = None
        legal = f"ids must be in [0, {shard.vocab_size})"
        # On a CPU before the ranks agree, on CUDA on the gathered ids: every rank of the group fails alike.
        try:
            if ids.is_floating_point() or ids.dtype == torch.bool:
                raise TypeError(f"ids must be integers; got {ids.dtype}.")
            if not ids.is_cuda:
                check_token_ids(ids.long(), shard.vocab_size, _NO_ID, legal)
        except (TypeError, ValueError) as error:
            fault = error  # raised on every rank
        alike = {"embedding's dimension": weight_VD.shape[1], "embedding's dtype": str(dtype or weight_VD.dtype)}
        most = agree(shard, "an embedding lookup", ids.numel(), alike, fault)
        ids_n = ids_N = ids.reshape(-1).long()
        if shard.token_group is not None:
            ids_N = gather_tokens(ids_n, most, shard.token_group, fill=_NO_ID)
        if ids_N.is_cuda:
            check_token_ids(ids_N, shard.vocab_size, _NO_ID, legal)
        if shard.same_tokens:
            check_same_tokens(ids_N, "ids", shard.vocab_group)
        columns_N = shard.local_columns(ids_N).long()
        mine_N = columns_N >= 0
        if weight_VD.shape[0]:
            rows_ND = weight_VD[columns_N.clamp(min=0)].to(dtype or weight_VD.dtype).masked_fill_(~mine_N[:, None], 0)
        else:
            rows_ND = weight_VD.new_zeros(columns_N.shape[0], weight_VD.shape[1], dtype=dtype)
        if padding_idx is not None:
            mine_N = mine_N & (ids_N != padding_idx)
        ctx.save_for_backward(columns_N.masked_fill(~mine_N, weight_VD.shape[0]))
        ctx.shard, ctx.most, ctx.num_rows, ctx.dtype = shard, most, weight_VD.shape[0], weight_VD.dtype
        if shard.token_group is None:
            dist.all_reduce(rows_ND, group=shard.vocab_group)
            return rows_ND.view(*ids.shape, rows_ND.shape[1])
        own_nD = reduce_scatter_tokens(rows_ND, ids_n.shape[0], shard.token_group)
        # Not a view of the padded tensor: FSDP hooks on the output.
        embedded = own_nD.reshape(*ids.shape, own_nD.shape[1]).clone()
        if shard.replica_group is not None:
            dist.all_reduce(embedded, group=shard.replica_group)
        return embedded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (columns_N,) = ctx.saved_tensors
        grad_ND = grad.reshape(-1, grad.shape[-1])
        if ctx.shard.token_group is not None:
            grad_ND = gather_tokens(grad_ND, ctx.most, ctx.shard.token_group)
        # One row more than the shard has takes what belongs to other ranks: no data-dependent shapes.
        sum_dtype = torch.promote_types(ctx.dtype, torch.float32)
        grad_VD = torch.zeros(ctx.num_rows + 1, grad_ND.shape[1], dtype=sum_dtype, device=grad_ND.device)
        grad_VD.index_add_(0, columns_N, grad_ND.to(sum_dtype))
        return grad_VD[: ctx.num_rows].to(ctx.dtype), None, None, None, None
