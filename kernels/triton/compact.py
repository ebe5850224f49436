"""Rows moved: the valid tokens' to the front, for what computes on all; dE's back to where they were; and those of
frequent rows' gradients to their places.

Grid: (blocks of rows, blocks of D). Bytes: each element read and written once, where torch takes two or three passes.

Shapes: N tokens, D hidden.
"""

import torch
import triton
import triton.language as tl

from ..problem import Logits
from .operands import LAUNCH

_ROWS, _BLOCK_D = 4, 1024


@triton.jit
def _gather_rows_kernel(out_ND, rows_ND, token_N, n_valid_ptr, N, D, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (n < N)[:, None] & (d < D)[None, :]
    valid = (n < tl.load(n_valid_ptr))[:, None]
    token = tl.load(token_N + n, mask=n < N, other=0)
    x = tl.load(rows_ND + token[:, None].to(tl.int64) * stride + d[None, :], mask=inside & valid, other=0.0)
    tl.store(out_ND + n[:, None].to(tl.int64) * D + d[None, :], x, mask=inside)


@triton.jit
def _scatter_rows_kernel(out_ND, rows_ND, token_N, n_valid_ptr, N, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (n < N)[:, None] & (d < D)[None, :]
    valid = (n < tl.load(n_valid_ptr))[:, None]
    x = tl.load(rows_ND + n[:, None].to(tl.int64) * D + d[None, :], mask=inside & valid, other=0.0)
    token = tl.load(token_N + n, mask=n < N, other=0)
    tl.store(out_ND + token[:, None].to(tl.int64) * D + d[None, :], x.to(out_ND.dtype.element_ty), mask=inside)


@triton.jit
def _write_rows_kernel(
    out_VD, rows_KD, row_K, K, D, stride, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(row_K + k, mask=k < K, other=-1)
    inside = (row >= 0)[:, None] & (d < D)[None, :]
    x = tl.load(rows_KD + k[:, None].to(tl.int64) * D + d[None, :], mask=inside, other=0.0)
    pointers = out_VD + row[:, None].to(tl.int64) * stride + d[None, :]
    if ADD:
        x = x.to(out_VD.dtype.element_ty) + tl.load(pointers, mask=inside)
    tl.store(pointers, x.to(out_VD.dtype.element_ty), mask=inside)


def compacted(logits: Logits, rows_ND: torch.Tensor | None = None) -> torch.Tensor:
    """The hidden states (or what else has a row for each of them) in the order of the other tensors, 0 for tokens that
    are not valid."""
    rows_ND = logits.hidden_ND if rows_ND is None else rows_ND
    rows, columns = logits.num_tokens, rows_ND.shape[1]
    out_ND = rows_ND.new_empty((rows, columns))
    if out_ND.numel():
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _BLOCK_D))
        _gather_rows_kernel[grid](
            out_ND,
            rows_ND,
            logits.token_N,
            logits.n_valid,
            rows,
            columns,
            rows_ND.stride(0),
            ROWS=_ROWS,
            BLOCK_D=_BLOCK_D,
            **LAUNCH,
        )
    return out_ND


def scatter_rows(
    rows_ND: torch.Tensor, token_N: torch.Tensor, n_valid: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """out[token[n]] = rows[n] in ``dtype`` for the first n_valid rows, 0 for the others."""
    rows, columns = rows_ND.shape
    out_ND = torch.empty((rows, columns), dtype=dtype, device=rows_ND.device)
    if out_ND.numel():
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _BLOCK_D))
        _scatter_rows_kernel[grid](
            out_ND, rows_ND, token_N, n_valid, rows, columns, ROWS=_ROWS, BLOCK_D=_BLOCK_D, **LAUNCH
        )
    return out_ND


def write_rows(out_VD: torch.Tensor, rows_KD: torch.Tensor, row_K: torch.Tensor, add: bool = False) -> None:
    """out[row[k]] = rows[k], or += if ``add``, but for row −1; of one column, or of numbers. Rows differ."""
    if rows_KD.ndim == 1:
        rows_KD, out_VD = rows_KD[:, None], out_VD[:, None]
    rows, columns = rows_KD.shape
    if rows and out_VD.numel():
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _BLOCK_D))
        _write_rows_kernel[grid](
            out_VD, rows_KD, row_K, rows, columns, out_VD.stride(0), ADD=add, ROWS=_ROWS, BLOCK_D=_BLOCK_D, **LAUNCH
        )
