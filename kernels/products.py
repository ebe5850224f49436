"""Products of two matrices, the library's, whose sums are not rounded to 16 bits.

From fp16, bf16 or fp32 the result is in fp32, from fp64 in fp64.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

_ADDITION = 1024
"""How deep a product is that takes as long as it takes to add it to a sum in fp32 (8 bytes and 2 FLOPs a number and a
step along its depth, on an H100)."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b; of matrices, or of as many pairs of them."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    if a.is_cuda and a.dtype != dtype:
        return (torch.bmm if a.ndim == 3 else torch.mm)(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b; ``out`` is in the dtype of the result."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(sum_: Tensor, a: Tensor, b: Tensor) -> None:
    """sum_ += a b; ``sum_`` is in the dtype of the result."""
    if a.is_cuda and a.dtype != sum_.dtype:
        torch.addmm(sum_, a, b, out_dtype=sum_.dtype, out=sum_)
    else:
        sum_.addmm_(a.to(sum_.dtype), b.to(sum_.dtype))


def rounds(rows: int, columns: int, device: torch.device) -> int:
    """How often the multiprocessors compute a block each of a product [rows, columns].

    A last round that is nearly empty takes as long as a full one. The library's blocks are 128 x 256 on Hopper.
    """
    return -(-(-(-rows // 128) * -(-columns // 256)) // _processors(device))


def time_of_gradients(tokens: int, columns: int, hidden_size: int, device: torch.device) -> int:
    """Of dC of so many rows and of the addition to dE in fp32, in steps along the depth of blocks; not of dE's product,
    which takes all columns alike."""
    of_rows = rounds(columns, hidden_size, device) * tokens
    return of_rows + rounds(tokens, hidden_size, device) * _ADDITION


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def columns_at_once(total: int, most: int, step: int, time: Callable[[int], int]) -> int:
    """Of a vocabulary of ``total`` columns so many, a multiple of ``step``, at most ``most`` (or one step), that all of
    them take the least time; ``time`` is what a chunk of so many takes."""
    if total <= max(most, step):
        return max(total, 1)

    def of_all(columns: int) -> int:
        rest = total % columns
        return total // columns * time(columns) + (time(rest) if rest else 0)

    return min(range(max(most // step, 1) * step, 0, -step), key=of_all)  # the largest of equal ones
