"""Products of two matrices, the library's, whose sums are not rounded to 16 bits.

From fp16, bf16 or fp32 the result is in fp32, from fp64 in fp64.
"""

import torch
from torch import Tensor


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
