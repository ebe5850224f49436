"""The order of work of the sparse backward, made on the device: a queue of items over waves of pair blocks.

The kept rows of a tile, cut into blocks of PAIR_ROWS, are its "pair blocks". Consecutive tiles whose blocks fit a third
of the workspace's ring are a wave. An item is
  - PAIR: recompute the probabilities P of one pair block and store them in the ring,
  - HIDDEN: add P C to dE for one pair block and one chunk of columns of D (none where PAIR does that too),
  - WEIGHT: compute dC = Pᵀ E of a tile for one block of columns of D.
The queue is P(0) P(1) D(0) P(2) D(1) P(3) D(2) ..., with P(w) the PAIR items of wave w and D(w) the others, chunk of D
by chunk of D: what they touch of dE and E, rows from everywhere but the columns of one chunk, then stays in L2. Without
that each of dE's additions is a read and a write of memory. (P(w + 1) strewn into D(w) is slower: it sweeps L2.)
An item of D(w) waits until P(w) is done, one of P(w) until D of the wave that held its slots is: both stand a whole
phase earlier in the queue, so that waits are short; and the earliest unfinished item never waits, so that no number of
programs can deadlock. A ring of less than three tiles holds two waves at a time, or one: then it is P(0) D(0) P(1) ...

Grids: one program; one program a tile. Bytes: 8 an item.

Shapes: T tiles, W waves (at most T), Q items.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .operands import LAUNCH

PAIR, HIDDEN, WEIGHT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_SUB, _CHUNK, _KIND = tl.constexpr(24), tl.constexpr(48), tl.constexpr(56)  # first bits; the tile stands below
_MASK = tl.constexpr((1 << 24) - 1)
_HIDDEN_ITEM, _WEIGHT_ITEM = tl.constexpr(HIDDEN.value << 56), tl.constexpr(WEIGHT.value << 56)


@triton.jit
def unpack(item):
    """(kind, tile, sub, chunk) of an item; sub: the pair block of the tile, or the block of columns of the chunk."""
    tile = (item & _MASK).to(tl.int32)
    sub = ((item >> _SUB) & _MASK).to(tl.int32)
    return (item >> _KIND).to(tl.int32), tile, sub, ((item >> _CHUNK) & 255).to(tl.int32)


@triton.jit
def _blocks(t, T, count_T, PAIR_ROWS: tl.constexpr):
    return tl.cdiv(tl.load(count_T + t, mask=(t >= 0) & (t < T), other=0), PAIR_ROWS)


@triton.jit
def _offsets_kernel(count_T, end_T, total_ptr, T, PAIR_ROWS: tl.constexpr, TILES: tl.constexpr):
    """Where each tile's pair blocks end in the order of all pair blocks. Grid: one program."""
    t = tl.arange(0, TILES)
    blocks = _blocks(t, T, count_T, PAIR_ROWS)
    tl.store(end_T + t, tl.cumsum(blocks, 0), mask=t < T)
    tl.store(total_ptr, tl.sum(blocks, 0))


@triton.jit
def _step(t, T, count_T, end_T, wave_step, PAIR_ROWS: tl.constexpr):
    """In which stretch of ``wave_step`` pair blocks a tile begins; tiles of one stretch are a wave."""
    end = tl.load(end_T + t, mask=(t >= 0) & (t < T), other=0)
    return tl.where(t < 0, -1, (end - _blocks(t, T, count_T, PAIR_ROWS)) // wave_step)


@triton.jit
def _before(wave_T, wave, blocks_T):
    """(pair blocks, tiles) of all waves before ``wave``."""
    earlier = wave_T < wave
    return tl.sum(tl.where(earlier, blocks_T, 0), 0), tl.sum(earlier.to(tl.int32), 0)


@triton.jit
def _schedule_kernel(
    item_Q,
    wave_T,
    slot_T,
    blocks_W,
    tiles_W,
    count_T,
    end_T,
    T,
    wave_step,
    waves_at_once,
    capacity,
    lead,
    chunks,
    hidden_items,
    weight_items,
    PAIR_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Writes a tile's items to their places, and the sizes of the wave that it begins. Grid: one program a tile."""
    tile = tl.program_id(0)
    t = tl.arange(0, TILES)
    blocks_t = _blocks(t, T, count_T, PAIR_ROWS)
    # A tile longer than a stretch leaves the next ones empty: waves are the stretches in which a tile begins.
    step_t = _step(t, T, count_T, end_T, wave_step, PAIR_ROWS)
    begins_t = (t < T) & (step_t != _step(t - 1, T, count_T, end_T, wave_step, PAIR_ROWS))
    wave_t = tl.where(t < T, tl.cumsum(begins_t.to(tl.int32), 0) - 1, 1 << 30)
    wave = tl.sum(tl.where(t == tile, wave_t, 0), 0)
    blocks = tl.sum(tl.where(t == tile, blocks_t, 0), 0)
    start = tl.load(end_T + tile) - blocks
    blocks_before, tiles_before = _before(wave_t, wave, blocks_t)
    blocks_through, tiles_through = _before(wave_t, wave + 1, blocks_t)
    blocks_done, tiles_done = _before(wave_t, wave - lead, blocks_t)
    blocks_ahead, _ = _before(wave_t, wave + 1 + lead, blocks_t)
    wave_blocks, wave_tiles = blocks_through - blocks_before, tiles_through - tiles_before
    tl.store(wave_T + tile, wave)
    tl.store(slot_T + tile, wave % waves_at_once * capacity + start - blocks_before)
    if tile == tiles_before:
        tl.store(blocks_W + wave, wave_blocks)
        tl.store(tiles_W + wave, wave_tiles)
    sub = tl.arange(0, BLOCKS)
    packed = tile + (sub.to(tl.int64) << _SUB)
    place = start + chunks * (blocks_done * hidden_items + tiles_done * weight_items)
    tl.store(item_Q + place + sub, packed, mask=sub < blocks)
    place = blocks_ahead + chunks * (blocks_before * hidden_items + tiles_before * weight_items)
    place += (start - blocks_before) * hidden_items + (tile - tiles_before) * weight_items
    for chunk in range(chunks):
        of_chunk = packed + (tl.cast(chunk, tl.int64) << _CHUNK)
        tl.store(item_Q + place + sub, of_chunk + _HIDDEN_ITEM, mask=sub < blocks * hidden_items)
        weights = item_Q + place + blocks * hidden_items + sub
        tl.store(weights, of_chunk + _WEIGHT_ITEM, mask=sub < weight_items)
        place += wave_blocks * hidden_items + wave_tiles * weight_items


class Schedule(NamedTuple):
    """The queue on the device, and where in the ring a tile's blocks are.

    Attributes:
        total: pair blocks of all tiles.
        item_Q: see `unpack`.
        wave_T, slot_T: the wave of each tile, and the block of the ring where its pair blocks begin.
        blocks_W, tiles_W: pair blocks and tiles of each wave; of waves past the last: anything.
        counters: zeros: the next item; then for each wave the PAIR items, and the others, that are done.
        waves_at_once, capacity: waves that the ring holds, and pair blocks of each.
        hidden_items, weight_items: of a pair block, and of a tile, in each of the ``chunks``.
    """

    total: torch.Tensor
    item_Q: torch.Tensor
    wave_T: torch.Tensor
    slot_T: torch.Tensor
    blocks_W: torch.Tensor
    tiles_W: torch.Tensor
    counters: torch.Tensor
    waves_at_once: int
    capacity: int
    chunks: int
    hidden_items: int
    weight_items: int


def schedule(
    count_T: torch.Tensor,
    rows: int,
    pair_rows: int,
    ring_blocks: int,
    chunks: int,
    hidden_items: int,
    weight_items: int,
) -> Schedule:
    """The queue for tiles of count_T kept rows, of at most ``rows``, on a ring that holds at least one tile of them."""
    tiles, most_blocks = count_T.shape[0], triton.cdiv(rows, pair_rows)
    waves_at_once = min(3, ring_blocks // most_blocks)
    capacity = min(ring_blocks // waves_at_once, tiles * most_blocks)
    end_T, total = torch.empty_like(count_T), torch.empty_like(count_T[:1])
    wave_T, slot_T, blocks_W, tiles_W = torch.empty((4, tiles), dtype=torch.int32, device=count_T.device)
    counters = torch.zeros(2 * tiles + 1, dtype=torch.int32, device=count_T.device)
    items = tiles * (most_blocks * (1 + chunks * hidden_items) + chunks * weight_items)
    item_Q = torch.empty(items, dtype=torch.int64, device=count_T.device)
    power = triton.next_power_of_2(tiles)
    _offsets_kernel[(1,)](count_T, end_T, total, tiles, PAIR_ROWS=pair_rows, TILES=power, **LAUNCH)
    _schedule_kernel[(tiles,)](
        item_Q,
        wave_T,
        slot_T,
        blocks_W,
        tiles_W,
        count_T,
        end_T,
        tiles,
        capacity - most_blocks + 1,  # the longest tile may begin at a stretch's last block
        waves_at_once,
        capacity,
        min(waves_at_once - 1, 1),
        chunks,
        hidden_items,
        weight_items,
        PAIR_ROWS=pair_rows,
        BLOCKS=triton.next_power_of_2(max(most_blocks, weight_items)),
        TILES=power,
        **LAUNCH,
    )
    return Schedule(
        total, item_Q, wave_T, slot_T, blocks_W, tiles_W, counters,
        waves_at_once, capacity, chunks, hidden_items, weight_items,
    )  # fmt: skip
