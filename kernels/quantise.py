"""Rows in 8 bits for the first pass: e4m3 numbers, the largest at e4m3's 448, and one fp32 scale a row.

The classifier's rows are taken relative to a common row m, near their mean: hidden · weight = hidden · m +
hidden · (weight − m), and only the second part is rounded. What all logits of a token have in common (it can be
large, and changes no softmax) is thus kept exactly. A row with NaN or inf becomes NaN.

Grid: one program a block of rows, which reads its rows twice, the second time from cache. Bytes: 3 an element.

Shapes: R rows, D hidden.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .blocks import LAUNCH

LARGEST = tl.constexpr(448.0)
_ROWS = 4
NOISE = 0.037
"""Relative error of a rounded product e_d·c_d; a sum's is at most NOISE·‖e‖₄·‖c‖₄ (Cauchy-Schwarz on Σ e²c²)."""
# Rounding to e4m3 shrinks a vector along itself by the variance of its relative error: measured 7e-4 on random and on
# trained rows. Sums of 8-bit products are cut, not rounded: measured on an H200, 2 to 9e-6 for 32 columns.
_SHRINKAGE = 7e-4
_CUT_PER_COLUMN = 4e-6 / 32
# The mean of so many rows is near enough to that of all.
_MEAN_ROWS = 4096


@triton.jit
def _quantise_kernel(
    quantised_RD,
    scale_R,
    norm_R,
    offset_R,
    x_RD,
    common_D,
    token_R,
    n_valid_ptr,
    R,
    D,
    stride_x,
    correction,
    SUBTRACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows less the common one (``SUBTRACT``); or the rows token_R, of which n_valid count and the others are zero,
    and in offset_R their products with the common row."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    use = r < R
    source = r
    if not SUBTRACT:
        use = use & (r < tl.load(n_valid_ptr))
        source = tl.load(token_R + r, mask=use, other=0)
    # Reduced over columns once, at the end.
    largest = tl.zeros([ROWS, BLOCK_D], tl.float32)
    fourths = tl.zeros([ROWS, BLOCK_D], tl.float32)  # NaN where a row holds NaN or inf; the max alone would drop NaN
    offset = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        x, common = _load(x_RD, common_D, source, use, d, D, stride_x, SUBTRACT, BLOCK_D)
        largest = tl.maximum(largest, tl.abs(x))
        fourths += (x * x) * (x * x)
        if not SUBTRACT:
            offset += x * common[None, :]
    largest, fourths = tl.max(largest, 1), tl.sum(fourths, 1)
    is_finite = (fourths == fourths) & (largest < float("inf"))
    largest = tl.where(is_finite, tl.where(largest == 0, 1.0, largest), float("nan"))
    factor = LARGEST / largest
    for d in range(0, D, BLOCK_D):
        x, common = _load(x_RD, common_D, source, use, d, D, stride_x, SUBTRACT, BLOCK_D)
        columns = d + tl.arange(0, BLOCK_D)
        pointers = quantised_RD + r[:, None].to(tl.int64) * D + columns[None, :]
        inside = (r < R)[:, None] & (columns < D)[None, :]
        tl.store(pointers, (x * factor[:, None]).to(quantised_RD.dtype.element_ty), mask=inside)
    tl.store(scale_R + r, largest * correction, mask=r < R)
    tl.store(norm_R + r, tl.sqrt(tl.sqrt(fourths)), mask=r < R)
    if not SUBTRACT:
        tl.store(offset_R + r, tl.sum(offset, 1), mask=r < R)


@triton.jit
def _load(x_RD, common_D, source, use, d, D, stride_x, SUBTRACT: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_D columns of the rows, less the common row if ``SUBTRACT``, and of the common row."""
    columns = d + tl.arange(0, BLOCK_D)
    inside = use[:, None] & (columns < D)[None, :]
    x = tl.load(x_RD + source[:, None].to(tl.int64) * stride_x + columns[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    common = tl.load(common_D + columns, mask=columns < D, other=0.0)
    if SUBTRACT:
        x = tl.where(inside, x - common[None, :], 0.0)
    return x, common


class Quantised(NamedTuple):
    """Rows in e4m3 [R, D], their scales [R], and the 4-norms [R] of what was rounded."""

    rows_RD: torch.Tensor
    scale_R: torch.Tensor
    norm_R: torch.Tensor


def common_row(weight_VD: torch.Tensor) -> torch.Tensor:
    """A row near the mean of all, [D] in fp32; zero where it would not be finite."""
    mean_D = weight_VD[:: max(weight_VD.shape[0] // _MEAN_ROWS, 1)].mean(0, dtype=torch.float32)
    return torch.where(mean_D.isfinite(), mean_D, 0.0)


def quantise_weight(weight_VD: torch.Tensor, common_D: torch.Tensor, memory_VD: torch.Tensor) -> Quantised:
    """weight − common row, in ``memory_VD``."""
    return _quantise(weight_VD, common_D, memory_VD, None, None, None, 1 + _SHRINKAGE)


def quantise_hidden(
    hidden_ND: torch.Tensor, common_D: torch.Tensor, token_N: torch.Tensor, n_valid: torch.Tensor
) -> tuple[Quantised, torch.Tensor]:
    """hidden, compacted, and hidden · common row [N]."""
    rows, columns = hidden_ND.shape
    offset_N = torch.empty(rows, dtype=torch.float32, device=hidden_ND.device)
    memory_ND = torch.empty(hidden_ND.shape, dtype=storage_dtype(hidden_ND), device=hidden_ND.device)
    correction = 1 + _SHRINKAGE + _CUT_PER_COLUMN * columns
    return _quantise(hidden_ND, common_D, memory_ND, offset_N, token_N, n_valid, correction), offset_N


def storage_dtype(x: torch.Tensor) -> torch.dtype:
    """Triton's interpreter knows no 8-bit floats: there fp16 holds the same numbers."""
    return torch.float8_e4m3fn if x.is_cuda else torch.float16


def _quantise(
    x_RD: torch.Tensor,
    common_D: torch.Tensor,
    out_RD: torch.Tensor,
    offset_R: torch.Tensor | None,
    token_R: torch.Tensor | None,
    n_valid: torch.Tensor | None,
    correction: float,
) -> Quantised:
    rows, columns = x_RD.shape
    scale_R, norm_R = torch.empty((2, rows), dtype=torch.float32, device=x_RD.device)
    _quantise_kernel[(triton.cdiv(rows, _ROWS),)](
        out_RD,
        scale_R,
        norm_R,
        offset_R,
        x_RD,
        common_D,
        token_R,
        n_valid,
        rows,
        columns,
        x_RD.stride(0),
        correction / LARGEST.value,
        SUBTRACT=offset_R is None,
        ROWS=_ROWS,
        BLOCK_D=1024 if columns > 3072 else 512,  # measured on an H100
        **LAUNCH,
    )
    if not out_RD.is_cuda:
        out_RD.copy_(out_RD.to(torch.float8_e4m3fn))
    return Quantised(out_RD, scale_R, norm_R)
