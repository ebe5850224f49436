"""The order of work of the sparse backward, made on the device: a queue of items over waves of pair blocks.

The kept rows of a tile, cut into blocks of PAIR_ROWS, are its "pair blocks". Consecutive tiles whose blocks fit a third
of the workspace's ring are a wave. An item is
  - PAIR: recompute the probabilities P of one pair block and store them in the ring,
  - HIDDEN: add P C to dE for one pair block and one chunk of columns of D,
  - WEIGHT: compute dC = Pᵀ E of a tile for one block of columns of D.
The queue is P(0), then for each wave D(w) with P(w + 1) strewn into its first three quarters. P(w) are the PAIR items
of wave w, bound by the tensor cores; D(w) the others, HIDDEN bound by atomic additions in L2: side by side they use
both. D(w) goes chunk of D by chunk of D: what it touches of dE and E, rows from everywhere but the columns of one
chunk, then stays in L2. Without that each of dE's additions is a read and a write of memory.
An item of D(w) waits until P(w) is done, one of P(w) until D of the wave that held its slots is, w - 3: both stand well
before it in the queue, so that waits are short; and the earliest unfinished item never waits, so that no number of
programs can deadlock. A ring of less than three tiles holds two waves (w - 2), or one; then P(w + 1) follows D(w).

Grids: one program; one program a tile. Bytes: 8 an item.

Shapes: T tiles, W waves, Q items.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

PAIR, HIDDEN, WEIGHT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_SUB, _CHUNK, _KIND = tl.constexpr(24), tl.constexpr(48), tl.constexpr(56)  # first bits; the tile stands below
_MASK = tl.constexpr((1 << 24) - 1)
_HIDDEN_ITEM, _WEIGHT_ITEM = tl.constexpr(1 << 56), tl.constexpr(2 << 56)


@triton.jit
def unpack(item):
    """(kind, tile, sub, chunk) of an item; sub: the pair block of the tile, or the block of columns of the chunk."""
    tile = (item & _MASK).to(tl.int32)
    sub = ((item >> _SUB) & _MASK).to(tl.int32)
    return (item >> _KIND).to(tl.int32), tile, sub, ((item >> _CHUNK) & 255).to(tl.int32)


@triton.jit
def _offsets_kernel(count_T, end_T, total_ptr, T, PAIR_ROWS: tl.constexpr, TILES: tl.constexpr):
    """Where each tile's pair blocks end in the order of all pair blocks. Grid: one program."""
    t = tl.arange(0, TILES)
    blocks = tl.cdiv(tl.load(count_T + t, mask=t < T, other=0), PAIR_ROWS)
    tl.store(end_T + t, tl.cumsum(blocks, 0), mask=t < T)
    tl.store(total_ptr, tl.sum(blocks, 0))


@triton.jit
def _before(wave_T, wave, blocks_T):
    """(pair blocks, tiles) of all waves before ``wave``."""
    earlier = wave_T < wave
    return tl.sum(tl.where(earlier, blocks_T, 0), 0), tl.sum(earlier.to(tl.int32), 0)


@triton.jit
def _early_part(items):
    """Of so many items of D(w), those among which P(w + 1) is strewn: it is then done when D(w + 1) begins."""
    return items * 3 // 4


@triton.jit
def _mates_before(item, mates, early):
    """How many of ``mates`` items that are strewn among the first ``early`` ones stand before one of them."""
    return tl.minimum(tl.cdiv((item + 1).to(tl.int64) * mates, early), mates)


@triton.jit
def _schedule_kernel(
    item_Q,
    first_W,
    blocks_W,
    tiles_W,
    count_T,
    end_T,
    T,
    wave_step,
    chunks,
    hidden_items,
    weight_items,
    MIXED: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Writes a tile's items to their places, and the sizes of the wave that it begins. Grid: one program a tile."""
    tile = tl.program_id(0)
    t = tl.arange(0, TILES)
    blocks_T = tl.cdiv(tl.load(count_T + t, mask=t < T, other=0), PAIR_ROWS)
    wave_T = (tl.load(end_T + t, mask=t < T, other=1 << 30) - blocks_T) // wave_step
    blocks = tl.cdiv(tl.load(count_T + tile), PAIR_ROWS)
    start = tl.load(end_T + tile) - blocks
    wave = start // wave_step
    blocks_earlier, tiles_earlier = _before(wave_T, wave - 1, blocks_T)
    blocks_before, tiles_before = _before(wave_T, wave, blocks_T)
    blocks_through, tiles_through = _before(wave_T, wave + 1, blocks_T)
    blocks_after, _ = _before(wave_T, wave + 2, blocks_T)
    wave_blocks, wave_tiles = blocks_through - blocks_before, tiles_through - tiles_before
    if tile == tiles_before:
        tl.store(first_W + wave, blocks_before)
        tl.store(blocks_W + wave, wave_blocks)
        tl.store(tiles_W + wave, wave_tiles)
    sub = tl.arange(0, BLOCKS)
    packed = tile + (sub.to(tl.int64) << _SUB)

    others_earlier = chunks * (blocks_earlier * hidden_items + tiles_earlier * weight_items)
    others_before = chunks * (blocks_before * hidden_items + tiles_before * weight_items)
    pair = start - blocks_before + sub
    queue = item_Q + blocks_before + pair
    if MIXED:
        early = _early_part(others_before - others_earlier)
        queue += others_earlier + pair.to(tl.int64) * early // max(wave_blocks, 1)
    else:
        queue += others_before
    tl.store(queue, packed, mask=sub < blocks)

    own = (start - blocks_before) * hidden_items + (tile - tiles_before) * weight_items
    mates = blocks_after - blocks_through if MIXED else 0
    early = max(_early_part(chunks * (wave_blocks * hidden_items + wave_tiles * weight_items)), 1)
    others = item_Q + blocks_through + others_before
    for chunk in range(chunks):
        of_chunk = packed + (tl.cast(chunk, tl.int64) << _CHUNK)
        hidden = own + sub
        queue = others + hidden + _mates_before(hidden, mates, early)
        tl.store(queue, of_chunk + _HIDDEN_ITEM, mask=sub < blocks * hidden_items)
        weight = own + blocks * hidden_items + sub
        queue = others + weight + _mates_before(weight, mates, early)
        tl.store(queue, of_chunk + _WEIGHT_ITEM, mask=sub < weight_items)
        own += wave_blocks * hidden_items + wave_tiles * weight_items


class Schedule(NamedTuple):
    """The queue on the device, and the sizes that say where in the ring a wave's blocks are.

    Attributes:
        end_T, total: pair blocks up to and with each tile, and of all.
        item_Q: see `unpack`.
        first_W, blocks_W, tiles_W: first pair block, pair blocks and tiles of each wave.
        counters: zeros: the next item; then for each wave the PAIR items, and the others, that are done.
        waves_at_once, capacity: waves that the ring holds, and pair blocks of each.
        step: a tile's wave is its first pair block / step.
        hidden_items, weight_items: of a pair block, and of a tile, in each of the ``chunks``.
    """

    end_T: torch.Tensor
    total: torch.Tensor
    item_Q: torch.Tensor
    first_W: torch.Tensor
    blocks_W: torch.Tensor
    tiles_W: torch.Tensor
    counters: torch.Tensor
    waves_at_once: int
    capacity: int
    step: int
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
    # Some tile of a wave may be the longest and begin at its last step.
    step = capacity - most_blocks + 1
    waves = tiles * most_blocks // step + 2
    ints = torch.zeros(5 * waves + 1, dtype=torch.int32, device=count_T.device)
    first_W, blocks_W, tiles_W = ints[: 3 * waves].view(3, waves)
    end_T, total = torch.empty_like(count_T), torch.empty_like(count_T[:1])
    items = tiles * (most_blocks * (1 + chunks * hidden_items) + chunks * weight_items)
    item_Q = torch.empty(items, dtype=torch.int64, device=count_T.device)
    power = triton.next_power_of_2(tiles)
    _offsets_kernel[(1,)](count_T, end_T, total, tiles, PAIR_ROWS=pair_rows, TILES=power)
    _schedule_kernel[(tiles,)](
        item_Q,
        first_W,
        blocks_W,
        tiles_W,
        count_T,
        end_T,
        tiles,
        step,
        chunks,
        hidden_items,
        weight_items,
        MIXED=waves_at_once > 1,
        PAIR_ROWS=pair_rows,
        BLOCKS=triton.next_power_of_2(max(most_blocks, weight_items)),
        TILES=power,
    )
    return Schedule(
        end_T, total, item_Q, first_W, blocks_W, tiles_W, ints[3 * waves :],
        waves_at_once, capacity, step, chunks, hidden_items, weight_items,
    )  # fmt: skip
