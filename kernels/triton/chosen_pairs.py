"""Sums over chosen pairs (token, row of the classifier): their products, and what these add to a gradient.

Grids: products: (pairs / PAIRS), a loop over D. Sums: (tokens or rows) x (blocks of D), a loop over the token's or the
row's pairs, so that each number is summed by one program, in the order of the pairs, and rounded once. FLOPs: 2·M·D
each. Bytes: M·D elements each, which come from L2 where ids repeat; pairs whose row is not here are not read.

Shapes: N tokens, D hidden, V local rows; M pairs, tokens ascending; S sums of consecutive pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import LAUNCH

_PAIRS, _BLOCK_D = 8, 512
_PAIRS_OF_SUM, _BLOCK_D_OF_SUM, _WARPS_OF_SUM = 16, 1024, 8


@triton.jit
def _products_kernel(
    out_M,
    hidden_ND,
    weight_VD,
    token_M,
    row_M,
    M,
    D,
    hidden_stride,
    weight_stride,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    m = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    token = tl.load(token_M + m, mask=m < M, other=0)[:, None]
    row = tl.load(row_M + m, mask=m < M, other=-1)[:, None]
    sums = tl.zeros((PAIRS,), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = (first + tl.arange(0, BLOCK_D))[None, :]
        inside = (row >= 0) & (d < D)
        x = tl.load(hidden_ND + token * hidden_stride + d, mask=inside, other=0.0)
        c = tl.load(weight_VD + row * weight_stride + d, mask=inside, other=0.0).to(x.dtype)
        sums += tl.sum(x.to(tl.float32) * c.to(tl.float32), 1)
    tl.store(out_M + m, sums, mask=m < M)


@triton.jit
def _sums_kernel(
    out_SD,
    rows_XD,
    index_M,
    grad_M,
    place_M,
    start_S,
    D,
    out_stride,
    rows_stride,
    like,
    ADD: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(start_S + s), tl.load(start_S + s + 1)
    if (not ADD) | (begin < end):
        sums = tl.zeros((BLOCK_D,), tl.float32)
        for first in range(begin, end, PAIRS):
            m = first + tl.arange(0, PAIRS)
            place = tl.load(place_M + m, mask=m < end, other=0)
            index = tl.load(index_M + place, mask=m < end, other=-1)
            here = index >= 0
            grad = tl.load(grad_M + place, mask=here, other=0.0)
            inside = here[:, None] & (d < D)[None, :]
            x = tl.load(rows_XD + index[:, None] * rows_stride + d[None, :], mask=inside, other=0.0)
            x = x.to(like.dtype.element_ty).to(tl.float32)
            sums += tl.sum(tl.where(inside, grad[:, None] * x, 0.0), 0)
        out = out_SD + s * out_stride + d
        if ADD:
            sums += tl.load(out, mask=d < D, other=0.0).to(tl.float32)
        tl.store(out, sums.to(out_SD.dtype.element_ty), mask=d < D)


def products(hidden_ND: Tensor, weight_VD: Tensor, token_M: Tensor, row_M: Tensor) -> Tensor:
    """See `kernels/chosen_pairs.py`."""
    out_M = torch.zeros(token_M.shape, dtype=torch.float32, device=hidden_ND.device)
    pairs, columns = token_M.shape[0], hidden_ND.shape[1]
    if pairs and weight_VD.shape[0]:
        hidden_ND, weight_VD = _with_unit_stride(hidden_ND), _with_unit_stride(weight_VD)
        with torch.cuda.device_of(hidden_ND):
            _products_kernel[(triton.cdiv(pairs, _PAIRS),)](
                out_M,
                hidden_ND,
                weight_VD,
                token_M,
                row_M,
                pairs,
                columns,
                hidden_ND.stride(0),
                weight_VD.stride(0),
                PAIRS=_PAIRS,
                BLOCK_D=min(_BLOCK_D, triton.next_power_of_2(columns)),
                **LAUNCH,
            )
    return out_M


def sum_of_tokens(
    grad_M: Tensor, weight_VD: Tensor, token_M: Tensor, row_M: Tensor, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    """See `kernels/chosen_pairs.py`."""
    sum_ND = torch.empty((num_tokens, weight_VD.shape[1]), dtype=torch.float32, device=grad_M.device)
    if weight_VD.shape[0] == 0:
        return sum_ND.zero_()
    place_M = torch.arange(token_M.shape[0], device=token_M.device)
    like = torch.empty(0, dtype=dtype, device=grad_M.device)
    _add(sum_ND, _with_unit_stride(weight_VD), row_M, grad_M, place_M, token_M, like, add=False)
    return sum_ND


def add_to_rows(out_VD: Tensor, grad_M: Tensor, hidden_ND: Tensor, token_M: Tensor, row_M: Tensor) -> None:
    """See `kernels/chosen_pairs.py`."""
    ascending_M, place_M = row_M.sort(stable=True)
    _add(out_VD, _with_unit_stride(hidden_ND), token_M, grad_M, place_M, ascending_M, hidden_ND, add=True)


def _add(
    out_SD: Tensor,
    rows_XD: Tensor,
    index_M: Tensor,
    grad_M: Tensor,
    place_M: Tensor,
    ascending_M: Tensor,
    like: Tensor,
    add: bool,
) -> None:
    """out[s] = (or +=) Σ grad · rows[index] over the pairs ``place`` whose ``ascending`` is s; an index of −1 is none.

    ``like``: in whose dtype the rows are taken.
    """
    sums, columns = out_SD.shape
    if not out_SD.numel():
        return
    start_S = torch.searchsorted(ascending_M, torch.arange(sums + 1, device=ascending_M.device))
    block = min(_BLOCK_D_OF_SUM, triton.next_power_of_2(columns))
    with torch.cuda.device_of(out_SD):
        _sums_kernel[(sums, triton.cdiv(columns, block))](
            out_SD,
            rows_XD,
            index_M,
            grad_M,
            place_M,
            start_S,
            columns,
            out_SD.stride(0),
            rows_XD.stride(0),
            like,
            ADD=add,
            PAIRS=_PAIRS_OF_SUM,
            BLOCK_D=block,
            num_warps=_WARPS_OF_SUM,
            **LAUNCH,
        )


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
