"""Frequent rows: those that most labels name are computed densely, shared out by tokens; the others by vocabulary.

Token ids are roughly in order of their frequency, so that the first tiles of a vocabulary carry most of the softmax's
mass, and the rank that holds them would do most of the backward. The K rows with the most labels are taken out of the
tiles. What they give a token, all K of them, is computed by one rank: with tokens of its own, by the token's; ranks
that bring the same tokens take the valid ones in turn. For that every rank gets the K rows, and no others.

The choice follows from labels alone, never from draws, so that an unbiased gradient stays unbiased. It is data of the
call: `Frequent` goes through ``save_for_backward``, and a recomputed forward brings its own. Labels are counted in
backward, once a call: what is evaluated or recomputed counts nothing.

In: the labels of all tokens, local rows. Out: `Frequent`, the logits of its rows, and sums with and without them.

Shapes: N tokens of the token group, M those whose frequent part this rank computes, K frequent rows, D hidden, V rows
of the vocabulary, v local rows.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from cce_dist.collectives import start_sum_of_one
from cce_dist.kernels.problem import Logits, Normaliser, Summary, Upstream
from cce_dist.loss.tokens import Order
from cce_dist.shard import VocabShard

MOST_COUNTED = 1 << 26
"""Labels, after which all counts are halved: they do not overflow, and follow a change of the data."""

_counts: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Frequent(NamedTuple):
    """The frequent rows of a call.

    Attributes:
        id_K: int64, ascending.
        row_K: int32, the local row, −1 where it is another rank's.
        slot_v: int32, of each local row its place among the frequent ones, −1 of others.
        slot_M, token_M: int32, of the tokens whose frequent part this rank computes, the valid ones first: the place of
            the label among the frequent rows or −1, and the row of the hidden states.
        place_M: int64, where they stand among all compacted tokens; N of those that are not valid. None: all, in order.
        valid_M: int32 [1], how many are valid.
        rows_KD, bias_K: the rows of all ranks, once exchanged. None in a single process, which reads them anew.
        label_N: int64, of the valid tokens, −1 of others; in the order before compaction.
    """

    id_K: Tensor
    row_K: Tensor
    slot_v: Tensor
    slot_M: Tensor
    token_M: Tensor
    place_M: Tensor | None
    valid_M: Tensor
    rows_KD: Tensor | None
    bias_K: Tensor | None
    label_N: Tensor


def counts_of(weight: Tensor, shard: VocabShard, device: torch.device) -> Tensor:
    """How often each row [V] was a label in the calls before, int32: the same tensor in each call of a classifier.

    A classifier is known by its parameter; rows that an owner cuts or gathers anew in each call, by their shard.

    Raises:
        RuntimeError: they would be made inside of a CUDA graph, and be zero again at each replay.
    """
    if isinstance(weight, nn.Parameter) or (shard.vocab_group is None and weight.is_leaf):
        key: Any = weight
    elif shard.vocab_group is not None:
        key = shard
    else:  # computed from something: gone after this call
        return torch.zeros(shard.vocab_size, dtype=torch.int32, device=device)
    known = _counts.setdefault(key, {})
    if (shard.vocab_size, device) not in known:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the labels of a classifier are counted for the first time inside of a CUDA graph capture, where the "
                "counts would be zero again at each replay: call the loss and its backward once before capturing, or "
                "set frequent_rows=0."
            )
        known[shard.vocab_size, device] = torch.zeros(shard.vocab_size, dtype=torch.int32, device=device)
    counts_V: Tensor = known[shard.vocab_size, device]
    return counts_V


def count_labels(counts_V: Tensor, label_N: Tensor) -> None:
    """Adds one for each label that is not −1; halves all once there are `MOST_COUNTED`."""
    _add_labels(counts_V, label_N)
    counts_V >>= (counts_V.sum() > MOST_COUNTED).to(counts_V.dtype)


def _add_labels(counts_V: Tensor, label_N: Tensor) -> Tensor:
    return counts_V.scatter_add_(0, label_N.clamp(min=0), (label_N >= 0).to(counts_V.dtype))


def most_frequent(counts_V: Tensor, label_N: Tensor, number: int) -> Tensor:
    """The ids [K], ascending, of the largest counts, this call's labels included; of equal ones the smaller ids."""
    vocab = counts_V.shape[0]
    id_V = torch.arange(vocab, device=counts_V.device)
    key_V = _add_labels(counts_V.clone(), label_N) * vocab + (vocab - 1 - id_V)  # all different
    return key_V.topk(number, sorted=False).indices.sort().values


def find(
    logits: Logits, labels_N: Tensor, valid_N: Tensor, order: Order, counts_V: Tensor, number: int, shard: VocabShard
) -> Frequent:
    """Chooses ``number`` rows and deals the tokens; the rows are not exchanged yet."""
    label_N = torch.where(valid_N, labels_N, -1)
    id_K = most_frequent(counts_V, label_N, number)
    slot_V = torch.full((shard.vocab_size,), -1, dtype=torch.int32, device=id_K.device)
    slot_V[id_K] = torch.arange(number, dtype=torch.int32, device=id_K.device)
    slot_N = torch.where(valid_N, slot_V[labels_N.clamp(0, shard.vocab_size - 1)], -1)
    parts = [slot_V[start : min(stop, shard.vocab_size)] for start, stop in shard.runs]
    slot_v = parts[0] if len(parts) == 1 else torch.cat([slot_V[:0], *parts])
    place_M, valid_M = _dealt(valid_N, order, shard)
    token_M = order.token_N
    if place_M is not None and place_M.shape[0]:
        token_M = token_M[place_M.clamp(max=token_M.shape[0] - 1)]
    elif place_M is not None:
        token_M = token_M[:0]
    return Frequent(
        id_K, shard.local_columns(id_K), slot_v, slot_N[token_M], token_M, place_M, valid_M, None, None, label_N
    )


def _dealt(valid_N: Tensor, order: Order, shard: VocabShard) -> tuple[Tensor | None, Tensor]:
    """(place_M, valid_M): of the tokens that this rank brings, every R-th valid one, R ranks bringing the same."""
    if shard.vocab_group is None:
        return None, order.n_valid
    device, tokens = valid_N.device, valid_N.shape[0]
    group = shard.vocab_group if shard.token_group is None else shard.replica_group
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    if shard.token_group is None:
        first, number = valid_N.new_zeros((), dtype=torch.int64), order.n_valid.long()
        most = len(range(rank, tokens, ranks))
    else:
        brought = tokens // dist.get_world_size(shard.token_group)
        start = brought * dist.get_rank(shard.token_group)
        first, number = valid_N[:start].sum(), valid_N[start : start + brought].sum().reshape(1)
        most = -(-brought // ranks)
    valid_M = (number - rank + ranks - 1).div(ranks, rounding_mode="floor").clamp(min=0)
    index_M = torch.arange(most, device=device)
    place_M = torch.where(index_M < valid_M, first + rank + ranks * index_M, tokens)
    return place_M, valid_M.to(torch.int32)


def start_exchange(frequent: Frequent, weight_vD: Tensor, bias_v: Tensor | None, shard: VocabShard) -> Any:
    """Starts bringing the rows of all ranks together; when called, ``frequent`` with them."""
    rows_KD, bias_K = own_rows(weight_vD, frequent.row_K), None if bias_v is None else own_rows(bias_v, frequent.row_K)
    if shard.vocab_group is None:
        return lambda: frequent._replace(rows_KD=rows_KD, bias_K=bias_K)
    finish_rows = start_sum_of_one(rows_KD, shard.vocab_group)
    finish_bias = None if bias_K is None else start_sum_of_one(bias_K, shard.vocab_group)
    return lambda: frequent._replace(rows_KD=finish_rows(), bias_K=None if finish_bias is None else finish_bias())


def own_rows(rows_v: Tensor, row_K: Tensor) -> Tensor:
    """The rows [K, ...] of this rank, 0 in the places of others'."""
    own_K = (row_K >= 0).view(-1, *(1,) * (rows_v.ndim - 1))
    if rows_v.shape[0] == 0:
        return rows_v.new_zeros((row_K.shape[0], *rows_v.shape[1:]))
    return torch.where(own_K, rows_v[row_K.clamp(min=0)], 0)


def without(logits: Logits, frequent: Frequent) -> Logits:
    """The other rows' logits: ``frequent`` ones are −inf, and targets among them are none of these."""
    target_N = logits.target_N
    if frequent.slot_v.shape[0]:
        own_N = target_N >= 0
        target_N = torch.where(own_N & (frequent.slot_v[target_N.clamp(min=0)] >= 0), -1, target_N)
    return logits._replace(target_N=target_N, frequent_V=frequent.slot_v)


def only(logits: Logits, frequent: Frequent) -> Logits:
    """The frequent rows' logits, of this rank's share of the tokens."""
    assert frequent.rows_KD is not None
    return logits._replace(
        weight_VD=frequent.rows_KD,
        bias_V=frequent.bias_K,
        target_N=frequent.slot_M,
        token_N=frequent.token_M,
        n_valid=frequent.valid_M,
        frequent_V=None,
    )


def join(others: Summary, part: Summary, place_M: Tensor | None) -> Summary:
    """A summary of all rows, of one without the frequent ones and theirs, of the tokens at ``place_M``."""
    part_3N = torch.stack(part[:3])
    if place_M is not None:
        tokens = others.max_N.shape[0]
        whole_3N = part_3N.new_zeros((3, tokens + 1))
        whole_3N[0] = -torch.inf
        whole_3N[:, place_M] = part_3N
        part_3N = whole_3N[:, :tokens]
    max_N = torch.maximum(others.max_N, part_3N[0])
    shift_N = torch.where(max_N == -torch.inf, 0.0, max_N)
    sumexp_N = others.sumexp_N * torch.exp((others.max_N - shift_N) * others.unit)
    sumexp_N += part_3N[1] * torch.exp((part_3N[0] - shift_N) * others.unit)
    return others._replace(max_N=max_N, sumexp_N=sumexp_N, target_N=others.target_N + part_3N[2])


def share(normaliser: Normaliser, upstream: Upstream, place_M: Tensor | None) -> tuple[Normaliser, Upstream]:
    """Both, of the tokens at ``place_M``."""
    if place_M is None:
        return normaliser, upstream
    values_4N = torch.stack((normaliser.max_N, normaliser.log_sum_N, upstream.softmax_N, upstream.target_N))
    max_M, log_sum_M, softmax_M, target_M = torch.nn.functional.pad(values_4N, (0, 1))[:, place_M]
    return normaliser._replace(max_N=max_M, log_sum_N=log_sum_M), upstream._replace(
        softmax_N=softmax_M, target_N=target_M
    )
