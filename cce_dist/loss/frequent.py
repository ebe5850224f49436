"""Frequent rows: those that most labels name are computed densely, shared out by tokens; the others by vocabulary.

Token ids are roughly in order of their frequency, so that the first tiles of a vocabulary carry most of the softmax's
mass, and the rank that holds them would do most of the backward. The K rows with the most labels are taken out of the
tiles. What they give a token, all K of them, is computed by one rank: with tokens of its own, by the token's; ranks
that bring the same tokens take the valid ones in turn. For that every rank gets the K rows, and no others.

The choice follows from labels alone, never from draws, so that an unbiased gradient stays unbiased. It is data of the
call: `Frequent` goes through ``save_for_backward``, and a recomputed forward brings its own. Labels are counted in
backward, once a call: what is evaluated or recomputed counts nothing. Rows are chosen anew after 1, 2, 4, 8, 16, 32,
48, ... counted calls, and last for those between: choosing takes 0.2 ms for 262144 rows, 1.3 % of a step (H100).

In: the labels of all tokens, local rows. Out: `Frequent`, the logits of its rows, and sums with and without them.

Shapes: N tokens of the token group, M those whose frequent part this rank computes, K frequent rows, D hidden, V rows
of the vocabulary, v local rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from cce_dist.collectives import start_exchange_of_rows, token_fingerprint
from cce_dist.kernels.problem import Logits, Normaliser, Order, Share, Upstream
from cce_dist.shard import VocabShard

MOST_COUNTED = 1 << 26
"""Labels, after which all counts are halved: they do not overflow, and follow a change of the data."""
_CHOOSE_EVERY = 16


class Choice(NamedTuple):
    """Frequent rows of a classifier, on this rank.

    Attributes:
        row_K: int32, the local row, −1 where it is another rank's; of ascending global ids.
        slot_V: int32 [V + 1], of each row its place among the frequent ones, −1 of others, and of no label.
        slot_v: that of each local row.
        fingerprint: of the ids, which must be equal on all ranks.
    """

    row_K: Tensor
    slot_V: Tensor
    slot_v: Tensor
    fingerprint: Tensor


@dataclass(eq=False)
class LabelCounts:
    """How often each row of a classifier was a label, int32 [V + 1], the last for tokens without one; and what was
    chosen by it, by number of rows, with the counted calls until then."""

    counts_V: Tensor
    calls: int = 0
    chosen: dict[int, tuple[Choice, int]] = field(default_factory=dict)

    def count(self, label_N: Tensor) -> None:
        """Adds one for each label."""
        _add(self.counts_V, label_N)
        self.calls += 1
        if self._is_captured(label_N.device) or self.calls % _CHOOSE_EVERY == 0:
            self.counts_V >>= (self.counts_V[:-1].sum() > MOST_COUNTED).to(self.counts_V.dtype)

    def choose(self, number: int, label_N: Tensor, shard: VocabShard) -> Choice:
        """The rows with the largest counts, this call's labels included; of equal ones those of the smaller ids."""
        if self._is_captured(label_N.device):  # each replay chooses, in memory of its own
            return _choice(self.counts_V, number, label_N, shard)
        choice, calls = self.chosen.get(number, (None, 0))
        if choice is None or self.calls >= calls + min(max(calls, 1), _CHOOSE_EVERY):
            choice = _choice(self.counts_V, number, label_N, shard)
            self.chosen[number] = choice, self.calls
        return choice

    def _is_captured(self, device: torch.device) -> bool:
        """Whether a CUDA graph is being captured; its replays write to the counts, which are kept for them."""
        if not _is_capturing(device):
            return False
        _CAPTURED.add(self)
        return True


_CAPTURED: set[LabelCounts] = set()


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _add(counts_V: Tensor, label_N: Tensor) -> Tensor:
    one = torch.ones((), dtype=counts_V.dtype, device=counts_V.device)
    return counts_V.scatter_add_(0, label_N, one.expand_as(label_N))


def most_frequent(counts_V: Tensor, number: int) -> Tensor:
    """The ids [K], ascending, of the largest counts; of equal ones the smaller ids."""
    vocab = counts_V.shape[0]
    key_V = counts_V.long() * vocab + torch.arange(vocab - 1, -1, -1, device=counts_V.device)  # all different
    return key_V.topk(number, sorted=False).indices.sort().values


def _choice(counts_V: Tensor, number: int, label_N: Tensor, shard: VocabShard) -> Choice:
    id_K = most_frequent(_add(counts_V.clone(), label_N)[:-1], number)
    slot_V = torch.full((shard.vocab_size + 1,), -1, dtype=torch.int32, device=id_K.device)
    slot_V[id_K] = torch.arange(number, dtype=torch.int32, device=id_K.device)
    parts = [slot_V[start : min(stop, shard.vocab_size)] for start, stop in shard.runs]
    slot_v = parts[0] if len(parts) == 1 else torch.cat([slot_V[:0], *parts])
    return Choice(shard.local_columns(id_K), slot_V, slot_v, token_fingerprint(id_K))


_counts: WeakIdKeyDictionary = WeakIdKeyDictionary()


def counted_with(weight: Tensor, shard: VocabShard) -> Literal["the parameter", "the shard", "nothing"]:
    """What a classifier's counts of labels go with; the same on all ranks."""
    if isinstance(weight, nn.Parameter) or (shard.vocab_group is None and weight.is_leaf):
        return "the parameter"
    return "nothing" if shard.vocab_group is None else "the shard"


def counts_of(weight: Tensor, shard: VocabShard, device: torch.device) -> LabelCounts:
    """The same in each call of a classifier.

    A classifier is known by its parameter; rows that an owner cuts or gathers anew in each call, by their shard; what
    one process computes from something, by nothing: its labels are those of one call.

    Raises:
        RuntimeError: they would be made inside of a CUDA graph, and be zero again at each replay.
    """
    owner = counted_with(weight, shard)
    if owner == "nothing":
        return LabelCounts(torch.zeros(shard.vocab_size + 1, dtype=torch.int32, device=device))
    known = _counts.setdefault(weight if owner == "the parameter" else shard, WeakIdKeyDictionary())
    if shard not in known or known[shard].counts_V.device != device:
        if _is_capturing(device):
            raise RuntimeError(
                "the labels of a classifier are counted for the first time inside of a CUDA graph capture, where the "
                "counts would be zero again at each replay: call the loss and its backward, with the same weight and "
                "shard, once before capturing, or set frequent_rows=0."
            )
        known[shard] = LabelCounts(torch.zeros(shard.vocab_size + 1, dtype=torch.int32, device=device))
    found: LabelCounts = known[shard]
    return found


class Frequent(NamedTuple):
    """The frequent rows of a call.

    Attributes:
        row_K, slot_v: see `Choice`.
        slot_M, token_M: int32, of the tokens whose frequent part this rank computes, the valid ones first: the place of
            the label among the frequent rows or −1, and the row of the hidden states.
        place_M, first, valid_M: see `problem.Share`; None where that is None, but for valid_M.
        rows_KD, bias_K: the rows of all ranks, once exchanged. None in a single process, which reads them anew.
        label_N: int64, V for tokens without one; in the order before compaction.
        adapter_KR: an adapter's rows, as rows_KD.
    """

    row_K: Tensor
    slot_v: Tensor
    slot_M: Tensor
    token_M: Tensor
    place_M: Tensor | None
    first: Tensor | None
    valid_M: Tensor
    rows_KD: Tensor | None
    bias_K: Tensor | None
    label_N: Tensor
    adapter_KR: Tensor | None = None

    def share(self, shard: VocabShard) -> Share | None:
        if self.first is None:
            return None
        return Share(self.first, self.valid_M, *_turn(shard))


def find(
    target_N: Tensor,
    labels_N: Tensor,
    ignore_index: int,
    order: Order,
    counts: LabelCounts,
    number: int,
    shard: VocabShard,
) -> tuple[Frequent, Tensor, Tensor]:
    """Chooses ``number`` rows and deals the tokens: (what the call's frequent rows are, not exchanged yet; targets [N]
    that are none of them; the choice's fingerprint)."""
    ignored_N = labels_N == ignore_index
    label_N = labels_N.masked_fill(ignored_N, shard.vocab_size)
    choice = counts.choose(number, label_N, shard)
    slot_M = slot_N = choice.slot_V.index_select(0, label_N.index_select(0, order.token_N))
    token_M, place_M, first, valid_M = order.token_N, None, None, order.n_valid
    if shard.vocab_group is not None:
        place_M, first, valid_M = _dealt(~ignored_N, order, shard)
        token_M, slot_M = token_M.index_select(0, place_M), slot_N.index_select(0, place_M)
    frequent = Frequent(choice.row_K, choice.slot_v, slot_M, token_M, place_M, first, valid_M, None, None, label_N)
    return frequent, target_N.masked_fill(slot_N >= 0, -1), choice.fingerprint


def _turn(shard: VocabShard) -> tuple[int, int]:
    """(this rank's turn, number) among the ranks that bring the same tokens."""
    group = shard.vocab_group if shard.token_group is None else shard.replica_group
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _dealt(valid_N: Tensor, order: Order, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """(place_M, first, valid_M) of a `Share`: of the tokens that this rank brings, every R-th valid one."""
    (rank, ranks), tokens = _turn(shard), valid_N.shape[0]
    if shard.token_group is None:
        first, number, most = torch.zeros_like(order.n_valid), order.n_valid, len(range(rank, tokens, ranks))
    else:
        brought = tokens // dist.get_world_size(shard.token_group)
        start = brought * dist.get_rank(shard.token_group)
        first = valid_N[:start].sum(dtype=torch.int32).reshape(1)
        number = valid_N[start : start + brought].sum(dtype=torch.int32)
        most = len(range(rank, brought, ranks))
    index_M = torch.arange(rank, rank + ranks * most, ranks, device=valid_N.device)
    valid_M = (number - rank + ranks - 1).div(ranks, rounding_mode="floor").clamp(min=0).reshape(1)
    return (index_M + first).clamp(max=max(tokens - 1, 0)), first, valid_M


def start_exchange(frequent: Frequent, logits: Logits, shard: VocabShard) -> Callable[[], Frequent]:
    """Starts bringing the rows of all ranks together; when called, ``frequent`` with them."""
    group, row_K = shard.vocab_group, frequent.row_K
    weight_vD, bias_v, adapter_vR = logits.weight_VD, logits.bias_V, logits.adapter_VR
    rows, bias = start_exchange_of_rows(weight_vD, row_K, group), None
    if bias_v is not None:  # of one dtype on all ranks, as the weight is by now
        dtype = torch.promote_types(weight_vD.dtype, torch.float32)
        bias = start_exchange_of_rows(bias_v.to(dtype), row_K, group)
    adapter = None if adapter_vR is None else start_exchange_of_rows(adapter_vR, row_K, group)

    def finish_all() -> Frequent:
        bias_K, adapter_KR = (None if finish is None else finish() for finish in (bias, adapter))
        return frequent._replace(rows_KD=rows(), bias_K=bias_K, adapter_KR=adapter_KR)

    return finish_all


def only(logits: Logits, frequent: Frequent) -> Logits:
    """The frequent rows' logits, of this rank's share of the tokens."""
    assert frequent.rows_KD is not None
    return logits._replace(
        weight_VD=frequent.rows_KD,
        bias_V=frequent.bias_K,
        adapter_VR=frequent.adapter_KR,
        target_N=frequent.slot_M,
        token_N=frequent.token_M,
        n_valid=frequent.valid_M,
        frequent_V=None,
        inverse_temperature_N=_at(logits.inverse_temperature_N, frequent.place_M),
    )


def _at(values_N: Tensor | None, place_M: Tensor | None) -> Tensor | None:
    """Values of the tokens at ``place_M``; of all, where that is None."""
    return values_N if values_N is None or place_M is None else values_N.index_select(0, place_M)


def picked(normaliser: Normaliser, upstream: Upstream, place_M: Tensor) -> tuple[Normaliser, Upstream]:
    """Both, of the tokens at ``place_M``."""
    values_4N = torch.stack((normaliser.max_N, normaliser.log_sum_N, upstream.softmax_N, upstream.target_N))
    max_M, log_sum_M, softmax_M, target_M = values_4N.index_select(1, place_M)
    return (
        normaliser._replace(max_N=max_M, log_sum_N=log_sum_M),
        Upstream(softmax_M, target_M, upstream.scale, _at(upstream.log_N, place_M)),
    )
