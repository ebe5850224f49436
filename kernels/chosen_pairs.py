"""Sums over chosen pairs (token, row of the classifier): their products, and what these add to a gradient.

The readable reference of `triton/chosen_pairs.py`, on any device. In: hidden states, local rows, and the pairs by
index, row −1 where it is not here. Of the D numbers of a pair there is never more than a chunk of pairs at a time; sums
are in fp32 (fp64 for fp64).

Shapes: N tokens, D hidden, V local rows; M pairs, tokens ascending, of which P may be here; p of a chunk,
d a part of D.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .products import product

_NUMBERS = 1 << 22
"""Of a chunk: 16 MiB in fp32, of which about three are alive at a time."""


def products(hidden_ND: Tensor, weight_VD: Tensor, token_M: Tensor, row_M: Tensor) -> Tensor:
    """hidden[token] · weight[row], [M], 0 where the row is not here; rows are cast to hidden's dtype."""
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    out_M = torch.zeros(token_M.shape, dtype=dtype, device=hidden_ND.device)
    for place_p in _chunks(weight_VD, row_M, hidden_ND.shape[1]):
        hidden_pD = _picked(hidden_ND, token_M, row_M, place_p)
        rows_pD = _picked(weight_VD, row_M, row_M, place_p).to(hidden_ND.dtype)
        out_M[place_p] = product(hidden_pD[:, None, :], rows_pD[:, :, None])[:, 0, 0]
    return out_M


def sum_of_tokens(
    grad_M: Tensor, weight_VD: Tensor, token_M: Tensor, row_M: Tensor, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    """Σ grad · weight[row] over each token's pairs, [N, D] in grad's dtype; rows are cast to ``dtype`` before."""
    sum_ND = torch.zeros((num_tokens, weight_VD.shape[1]), dtype=grad_M.dtype, device=grad_M.device)
    for place_p in _chunks(weight_VD, row_M, weight_VD.shape[1]):
        rows_pD = _picked(weight_VD, row_M, row_M, place_p).to(dtype).to(grad_M.dtype)
        sum_ND.index_add_(0, token_M[place_p], rows_pD * grad_M[place_p, None])
    return sum_ND


def add_to_rows(out_VD: Tensor, grad_M: Tensor, hidden_ND: Tensor, token_M: Tensor, row_M: Tensor) -> None:
    """Adds Σ grad · hidden[token] over each row's pairs to out, rounded once to its dtype: where that is not the sum's,
    some columns at a time."""
    wide, columns = grad_M.dtype, hidden_ND.shape[1]
    if out_VD.dtype != wide:
        columns = max(min(4 * _NUMBERS // max(out_VD.shape[0], 1), columns), 1)
    for hidden_Nd, out_Vd in zip(hidden_ND.split(columns, 1), out_VD.split(columns, 1), strict=True):
        sum_Vd = out_Vd if out_VD.dtype == wide else torch.zeros(out_Vd.shape, dtype=wide, device=out_VD.device)
        for place_p in _chunks(out_VD, row_M, hidden_Nd.shape[1]):
            hidden_pd = _picked(hidden_Nd, token_M, row_M, place_p).to(wide)
            sum_Vd.index_add_(0, row_M[place_p].clamp(min=0), hidden_pd * grad_M[place_p, None])
        if sum_Vd is not out_Vd:
            out_Vd += sum_Vd


def _chunks(rows_VD: Tensor, row_M: Tensor, columns: int) -> Iterator[Tensor]:
    """Places of pairs that are here; on CUDA, where their number is not known without waiting, of all."""
    if rows_VD.shape[0] == 0:
        return
    place_P = torch.arange(row_M.shape[0], device=row_M.device) if row_M.is_cuda else (row_M >= 0).nonzero()[:, 0]
    if place_P.shape[0]:
        yield from place_P.split(max(_NUMBERS // max(columns, 1), 1))


def _picked(x: Tensor, index_M: Tensor, row_M: Tensor, place_p: Tensor) -> Tensor:
    """x[index] of some pairs, 0 where the row is not here."""
    picked_p = x.index_select(0, index_M[place_p].clamp(min=0))
    return picked_p.masked_fill_(row_M[place_p, None] < 0, 0) if row_M.is_cuda else picked_p
