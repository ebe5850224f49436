"""Rows in fp32 beside hidden states in bf16: copies in three parts in bf16, whose sum holds all 24 bits.

Each part's product with a hidden state is exact, so that their sum is that of fp32 products, at three bf16 products. A
copy is [v, 3·P], the smallest part first, each of P columns (D up to whole steps along it, 0 past D): one product of
three times the depth, in which the columns of the hidden states come three times. Copies are of a chunk of the
classifier at a time. A kernel that makes the parts of the blocks that it loads makes them once for each block of
tokens, in registers, and takes the time of five bf16 products; those that load few pairs do so (`blocks.dot_rows`).

Grid: (rows, blocks of D). Bytes: 4·v·D read, 6·v·P written.

Shapes: N tokens, D hidden, V local rows, v rows of a chunk, C = 3·P.
"""

import torch
import triton
import triton.language as tl

from ..problem import Logits
from .operands import LAUNCH

PARTS = 3
_BLOCK_D = 1024


@triton.jit
def parts_of(c, dtype: tl.constexpr):
    """(low, middle, high) of fp32 numbers."""
    high = c.to(dtype)
    rest = c - high.to(tl.float32)
    middle = rest.to(dtype)
    return (rest - middle.to(tl.float32)).to(dtype), middle, high


@triton.jit
def _copy_kernel(copy_vC, weight_vD, D, part_columns, weight_stride, copy_stride, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.load(weight_vD + row * weight_stride + d, mask=d < D, other=0.0)
    low, middle, high = parts_of(c, copy_vC.dtype.element_ty)
    pointers = copy_vC + row * copy_stride + d
    tl.store(pointers, low, mask=d < part_columns)
    tl.store(pointers + part_columns, middle, mask=d < part_columns)
    tl.store(pointers + 2 * part_columns, high, mask=d < part_columns)


@triton.jit
def width_of(D, BLOCK_D: tl.constexpr, PARTS: tl.constexpr):
    """Columns of the classifier's rows or of their copy."""
    if PARTS > 1:
        return PARTS * (tl.cdiv(D, BLOCK_D) * BLOCK_D)
    else:
        return D


@triton.jit
def hidden_column(d, D, BLOCK_D: tl.constexpr, PARTS: tl.constexpr):
    """Of the hidden states, which meets column d of the rows."""
    if PARTS > 1:
        return d % (tl.cdiv(D, BLOCK_D) * BLOCK_D)
    else:
        return d


def are_in_parts(logits: Logits) -> bool:
    """Whether kernels for whole blocks take copies of the rows."""
    return logits.weight_VD.dtype != logits.hidden_ND.dtype


def columns_of_a_copy(hidden_size: int, block_d: int) -> int:
    return PARTS * triton.cdiv(hidden_size, block_d) * block_d


def in_parts(weight_vD: torch.Tensor, copy_vC: torch.Tensor) -> torch.Tensor:
    """``copy_vC``, filled."""
    rows, hidden_size = weight_vD.shape
    part_columns = copy_vC.shape[1] // PARTS
    _copy_kernel[(rows, triton.cdiv(part_columns, _BLOCK_D))](
        copy_vC,
        weight_vD,
        hidden_size,
        part_columns,
        weight_vD.stride(0),
        copy_vC.stride(0),
        BLOCK_D=_BLOCK_D,
        **LAUNCH,
    )
    return copy_vC


def high_part(copy_vC: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """[v, D]: the rows rounded to bf16."""
    first = copy_vC.shape[1] // PARTS * (PARTS - 1)
    return copy_vC[:, first : first + hidden_size]
