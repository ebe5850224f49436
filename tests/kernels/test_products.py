"""In how many columns a vocabulary is taken: as many as take the least time, in whole blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cce_dist.kernels.products import columns_at_once, rounds


def on_132(rows: int, columns: int) -> int:
    """Rounds of blocks of 128 x 256 on an H100's 132 multiprocessors."""
    return -(-(-(-rows // 128) * -(-columns // 256)) // 132)


def test_chunks_fill_the_multiprocessors_in_whole_rounds() -> None:
    """2,688 columns fit the memory, whose 704 blocks take 6 rounds; 640 blocks of 2,560 columns take 5."""
    assert columns_at_once(128_256, 2_700, 128, lambda v: on_132(8192, v)) == 2_560
    assert columns_at_once(128_256, 128_256, 128, lambda v: on_132(8192, v)) == 128_256


def test_the_largest_of_chunks_that_take_the_same_time_is_taken() -> None:
    assert columns_at_once(4_096, 1_024, 128, lambda v: v) == 1_024
    assert columns_at_once(600, 50, 128, lambda v: v) == 128  # one step at the least


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 20_000), st.integers(0, 9_000), st.sampled_from([128, 256, 384]), st.integers(1, 300))
def test_no_other_number_of_columns_takes_less_time(total: int, most: int, step: int, blocks: int) -> None:
    def time(columns: int) -> int:
        return -(-blocks * -(-columns // 256) // 132) * 7 + 1

    def of_all(columns: int) -> int:
        full, rest = divmod(total, columns)
        return full * time(columns) + (time(rest) if rest else 0)

    columns = columns_at_once(total, most, step, time)
    if total <= max(most, step):
        assert columns == max(total, 1)
        return
    assert columns % step == 0 and columns <= max(most, step)
    assert of_all(columns) == min(of_all(v) for v in range(step, max(most, step) + 1, step))


def test_without_a_gpu_a_round_is_a_block() -> None:
    assert rounds(300, 600, torch.device("cpu")) == 9


@pytest.mark.gpu
def test_a_round_on_a_gpu_is_a_block_of_each_multiprocessor() -> None:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert rounds(128 * processors, 256, torch.device("cuda", 0)) == 1
    assert rounds(128 * processors + 1, 256, torch.device("cuda", 0)) == 2
