"""Block shapes of the Triton kernels per (GPU, element size). One row serves all shapes of that class."""

from typing import NamedTuple

import torch


class Tuning(NamedTuple):
    """Launch parameters. ``block_n`` rows by TILE columns is one program's tile of logits.

    Attributes:
        block_n, block_d, warps, stages: of summarise, and of the dense probabilities of exact mode.
        row_group: row blocks that run side by side, so that their hidden states stay in L2 while the classifier passes.
        splits: vocabulary splits of summarise.
        flat_below: the largest D for which summarise walks over tiles and D in one loop.
        tma: load tiles through tensor descriptors.
        pair_rows: rows of a block of kept pairs in the sparse backward.
        pair_block_d, pair_stages: its steps along D.
        pair_warps, pair_programs: of the sparse backward; programs a multiprocessor.
        weight_block_d, weight_block_k: columns of dC that are accumulated at a time, and rows per step.
        weight_blocks: such blocks of columns in an item.
    """

    block_n: int = 64
    block_d: int = 32
    warps: int = 8
    stages: int = 2
    row_group: int = 16
    splits: int = 8
    flat_below: int = 0
    tma: bool = False
    pair_rows: int = 64
    pair_block_d: int = 32
    pair_stages: int = 2
    pair_warps: int = 8
    pair_programs: int = 1
    weight_block_d: int = 64
    weight_block_k: int = 32
    weight_blocks: int = 1


_HOPPER_16_BIT = Tuning(
    block_n=128,
    block_d=64,
    stages=4,
    row_group=16,
    splits=16,
    flat_below=1024,
    tma=True,
    pair_rows=128,
    pair_block_d=64,
    pair_stages=4,
    weight_block_d=128,
    weight_block_k=64,
)
_INTERPRETER = Tuning(block_n=32, block_d=32, splits=3, flat_below=64, pair_rows=32)


def tuning_for(hidden: torch.Tensor) -> Tuning:
    if not hidden.is_cuda:
        return _INTERPRETER
    if hidden.element_size() == 2 and torch.cuda.get_device_capability(hidden.device)[0] == 9:
        return _HOPPER_16_BIT
    return Tuning()


def num_programs(hidden: torch.Tensor) -> int:
    """Programs of a persistent grid: one a multiprocessor."""
    if not hidden.is_cuda:
        return 2
    return torch.cuda.get_device_properties(hidden.device).multi_processor_count
