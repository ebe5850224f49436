"""The queue of the sparse backward: everything once, and nothing before what it waits for."""

import pytest
import torch
from reference import DEVICE

from cce_dist.kernels.triton.schedule import schedule

PAIR_ROWS = 32
CASES = {
    "one wave": ([40, 0, 33, 7], 96, 100),
    "many waves": ([96, 1, 0, 70, 32, 33, 96, 96, 0, 0, 5, 64, 31, 96], 96, 18),
    "nothing kept": ([0, 0, 0], 96, 9),
    "rings of two tiles": ([96, 64, 96, 3, 0, 96, 32], 96, 7),
    "a ring of one tile": ([96, 64, 96, 3, 0, 96, 32], 96, 3),
    "one tile": ([96], 96, 3),
    "tiles without rows last": ([5, 96, 0, 0, 0], 96, 9),
}
SIZES = {
    "dE and dC": (3, 1, 2),
    "dE alone": (2, 1, 0),
    "dC alone": (2, 0, 3),
    "dE with P": (1, 0, 1),
    "P alone": (1, 0, 0),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_item_stands_once_behind_what_it_waits_for(
    case: tuple[list[int], int, int], size: tuple[int, int, int]
) -> None:
    (counts, rows, ring_blocks), (chunks, hidden_items, weight_items) = case, size
    count_T = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    got = schedule(count_T, rows, PAIR_ROWS, ring_blocks, chunks, hidden_items, weight_items)
    blocks_T = [-(-count // PAIR_ROWS) for count in counts]
    total = sum(blocks_T)
    assert int(got.total) == total
    length = total * (1 + chunks * hidden_items) + len(counts) * chunks * weight_items
    items = [
        (item >> 56, item & 0xFFFFFF, item >> 24 & 0xFFFFFF, item >> 48 & 255) for item in got.item_Q[:length].tolist()
    ]
    expected = [(0, tile, sub, 0) for tile, blocks in enumerate(blocks_T) for sub in range(blocks)]
    for chunk in range(chunks):
        for tile, blocks in enumerate(blocks_T):
            expected += [(1, tile, sub, chunk) for sub in range(blocks * hidden_items)]
            expected += [(2, tile, sub, chunk) for sub in range(weight_items)]
    assert sorted(items) == sorted(expected)

    wave_T = got.wave_T.tolist()
    waves = max(wave_T) + 1
    # An item waits for one wave alone: without gaps, that wave waited for the one before it in the same slots.
    assert wave_T == sorted(wave_T) and set(wave_T) == set(range(waves))
    for wave in range(waves):
        of_wave = [blocks for own, blocks in zip(wave_T, blocks_T, strict=True) if own == wave]
        assert got.blocks_W[wave] == sum(of_wave) <= got.capacity
        assert got.tiles_W[wave] == len(of_wave)
    for tile, wave in enumerate(wave_T):
        before = sum(blocks_T[wave_T.index(wave) : tile])
        assert got.slot_T[tile] == wave % got.waves_at_once * got.capacity + before
    assert 1 <= got.waves_at_once <= 3
    assert got.waves_at_once * got.capacity <= ring_blocks
    places: dict[tuple[bool, int], list[int]] = {}
    for place, (kind, tile, _, _) in enumerate(items):
        places.setdefault((kind == 0, wave_T[tile]), []).append(place)
    for (is_pair, wave), own in places.items():
        waited_for = (False, wave - got.waves_at_once) if is_pair else (True, wave)
        assert max(places.get(waited_for, [-1])) < min(own)
