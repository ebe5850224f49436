"""Log-probabilities whose bits do not depend on the batch, on a token's place in it or on the number of ranks.

The vocabulary is cut into tiles of 128 GLOBAL rows, so that every rank sums the same rows together. A tile that lies on
several ranks (a seam) is summed by that of its first row, to which an all-reduce of all seams brings the others' rows:
[128·S, D], S below the number of runs of rows, begun before the tiles that lie on one rank and awaited after them.
Tiles are added as whole numbers (`collectives.merge_exactly`).

In: `Logits` of a call. Out: normaliser, −log p and log-sum-exp of each token.

Shapes: N tokens, D hidden, V local rows, G tiles of the vocabulary, S seams, K = 128·S their rows.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from cce_dist.collectives import ExactlyMerged, merge_exactly, start_exchange_of_rows
from cce_dist.kernels.problem import TILE, GlobalTiles, Logits, Order
from cce_dist.shard import VocabShard

Runs = tuple[tuple[int, int], ...]
"""Global rows (start, stop), ascending."""


class Layout(NamedTuple):
    """Which rank sums which tile, as one rank sees it.

    Attributes:
        own: tiles that this rank holds from the first row to the last.
        seams: those of all seams that it sums, as rows [K, D] of all seams hold them.
        local_K: the local row of each row of the seams, −1 for those of other ranks and past the vocabulary.
        seam_G: which seam each tile is, −1 for none.
    """

    own: list[tuple[int, int]]
    seams: list[tuple[int, int]]
    local_K: list[int]
    seam_G: list[int]


class _Piece(NamedTuple):
    """Consecutive global rows of one rank, and where they begin among its local ones."""

    start: int
    stop: int
    rank: int
    local: int


def lay_out(runs_of_ranks: Sequence[Runs], rank: int, vocab_size: int) -> Layout:
    """The tiles of a vocabulary that the ranks' runs cover, as ``rank`` sees them."""
    pieces = sorted(piece for other, runs in enumerate(runs_of_ranks) for piece in _pieces(runs, other, vocab_size))
    starts = [piece.start for piece in pieces]
    layout = Layout([], [], [], [])
    for start in range(0, vocab_size, TILE):
        stop = min(start + TILE, vocab_size)
        first = bisect_right(starts, start) - 1
        parts = pieces[first : bisect_right(starts, stop - 1)]
        is_seam = len(parts) > 1
        seam = len(layout.local_K) // TILE
        layout.seam_G.append(seam if is_seam else -1)
        if is_seam:
            local_k = [-1] * TILE
            for piece in parts:
                if piece.rank == rank:
                    for row in range(max(start, piece.start), min(stop, piece.stop)):
                        local_k[row - start] = piece.local + row - piece.start
            layout.local_K.extend(local_k)
        if parts[0].rank == rank:
            at = seam * TILE if is_seam else parts[0].local + start - parts[0].start
            (layout.seams if is_seam else layout.own).append((at, stop - start))
    return layout


def _pieces(runs: Runs, rank: int, vocab_size: int) -> list[_Piece]:
    """Of a rank, as long as they can be; padding rows left out."""
    pieces: list[_Piece] = []
    local = 0
    for start, stop in runs:
        end = min(stop, vocab_size)
        if pieces and pieces[-1].stop == start:
            pieces[-1] = pieces[-1]._replace(stop=end)
        elif start < end:
            pieces.append(_Piece(start, end, rank, local))
        local += stop - start
    return pieces


class _Tables(NamedTuple):
    """A `Layout` on a device; of seams None, where there are none."""

    own: GlobalTiles
    seams: GlobalTiles
    local_K: Tensor | None
    seam_G: Tensor | None


_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By shard, and by the runs of all ranks and the device, of which they are made once."""


def _tables_of(shard: VocabShard, device: torch.device) -> _Tables:
    known = _tables.setdefault(shard, {})
    runs_of_ranks = shard.runs_of_ranks
    if (runs_of_ranks, device) not in known:
        rank = 0 if shard.vocab_group is None else dist.get_rank(shard.vocab_group)
        layout = lay_out(runs_of_ranks, rank, shard.vocab_size)

        def ints(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=device)

        def tiles(spans: Sequence[tuple[int, int]]) -> GlobalTiles:
            return GlobalTiles(tuple(spans), ints([row for row, _ in spans]), ints([rows for _, rows in spans]))

        has_seams = bool(layout.local_K)
        known[runs_of_ranks, device] = _Tables(
            tiles(layout.own),
            tiles(layout.seams),
            ints(layout.local_K) if has_seams else None,
            ints(layout.seam_G) if has_seams else None,
        )
    tables: _Tables = known[runs_of_ranks, device]
    return tables


def exactly(
    logits: Logits,
    labels_N: Tensor,
    order: Order,
    shard: VocabShard,
    backend: ModuleType,
    workspace: int,
    equal: Mapping[str, Tensor],
) -> ExactlyMerged:
    """The same bits for a token whatever the others, the order and the ranks.

    Args:
        logits: of this rank's rows.
        labels_N: global, in the order before compaction; what those of tokens that are not valid are does not matter.
        backend: that computes, `kernels.torch_backend` or `kernels.triton.backend`.
        workspace: bytes that it may use.
        equal: see `merge_exactly`.
    """
    tables = _tables_of(shard, labels_N.device)
    exchange = None if tables.local_K is None else _start_exchange(logits, tables.local_K, shard)
    parts = [backend.sum_tiles(logits, tables.own, workspace)]
    if exchange is not None:
        seams = exchange()
        if tables.seams.spans:
            target_N = _seam_columns(labels_N, order, tables, shard)
            parts.append(backend.sum_tiles(seams._replace(target_N=target_N), tables.seams, workspace))

    def units_of(max_N: Tensor) -> Tensor:
        first, *others = (backend.exact_units(part, max_N, order.n_valid) for part in parts)
        for units_3N in others:
            first += units_3N
        return first

    max_N = parts[0].max_N if len(parts) == 1 else torch.maximum(parts[0].max_N, parts[1].max_N)
    return merge_exactly(max_N, units_of, parts[0].unit, shard.vocab_group, equal)


def _start_exchange(logits: Logits, local_K: Tensor, shard: VocabShard) -> Callable[[], Logits]:
    """Starts bringing the rows of all seams together; when called, their logits, yet without targets."""
    group, bias_V = shard.vocab_group, logits.bias_V
    rows = start_exchange_of_rows(logits.weight_VD, local_K, group)
    bias = None if bias_V is None else start_exchange_of_rows(bias_V.to(logits.accumulator), local_K, group)
    return lambda: logits._replace(weight_VD=rows(), bias_V=None if bias is None else bias())


def _seam_columns(labels_N: Tensor, order: Order, tables: _Tables, shard: VocabShard) -> Tensor:
    """Which row of the seams the label of each token is, compacted, −1 where it is none."""
    assert tables.seam_G is not None
    label_N = labels_N.clamp(0, shard.vocab_size - 1).index_select(0, order.token_N)
    seam_N = tables.seam_G.index_select(0, label_N // TILE)
    is_valid_N = torch.arange(label_N.shape[0], device=label_N.device) < order.n_valid
    return torch.where(is_valid_N & (seam_N >= 0), seam_N * TILE + label_N % TILE, -1).to(torch.int32)
