"""Device functions that several kernels share: loading a block, and turning products into logits.

Logits are kept in base 2 (z·log2 e) inside the kernels, so that a softmax needs exp2 alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..problem import FAR, Logits
from .parts import parts_of

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = 0.6931471805599453
_LN_2, _FAR = tl.constexpr(LN_2), tl.constexpr(FAR)
BLOCK_R = tl.constexpr(16)
"""Columns of an adapter at a time."""


@triton.jit
def load_block(
    source, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """[ROWS, COLUMNS] of a row-major matrix at (row, column), zero outside it."""
    if TMA:
        return source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        pointers = source + r[:, None].to(tl.int64) * stride + c[None, :]
        return tl.load(pointers, mask=(r[:, None] < rows) & (c[None, :] < columns), other=0.0)


@triton.jit
def load_rows(source, rows, use, column, columns, stride, COLUMNS: tl.constexpr):
    """The given rows of a row-major matrix, COLUMNS columns from ``column`` on, zero where not ``use``."""
    c = column + tl.arange(0, COLUMNS)
    pointers = source + rows[:, None].to(tl.int64) * stride + c[None, :]
    return tl.load(pointers, mask=use[:, None] & (c[None, :] < columns), other=0.0)


@triton.jit
def dot_rows(e, c, products, PRECISION: tl.constexpr):
    """products + e·cᵀ, of hidden states and rows of the classifier.

    Rows in fp32 beside hidden states in bf16 are taken as the sum of three parts, the smallest first: see parts.py.
    """
    if c.dtype == e.dtype:
        products = tl.dot(e, c.T, products, input_precision=PRECISION)
    else:
        low, middle, high = parts_of(c, e.dtype)
        products = tl.dot(e, low.T, products)
        products = tl.dot(e, middle.T, products)
        products = tl.dot(e, high.T, products)
    return products


@triton.jit
def add_adapter(products, operands, token, use, columns, factor, PRECISION: tl.constexpr):
    """Adds a·B·factor of an adapter, if there is one, to [ROWS, COLUMNS] of the given tokens and columns.

    In steps of 16, the least that a product takes: B is small, and never copied. Before the products over D, while no
    registers are full of these.
    """
    if operands.adapter_NR is not None:
        for r in tl.range(0, operands.R, BLOCK_R, num_stages=1):
            a = load_rows(operands.adapter_NR, token, use, r, operands.R, operands.R, BLOCK_R)
            b = load_rows(operands.adapter_VR, columns, columns < operands.V, r, operands.R, operands.R, BLOCK_R)
            if factor is not None:
                a = (a.to(tl.float32) * factor).to(a.dtype)
            products = tl.dot(a, b.T, products, input_precision=PRECISION)
    return products


@triton.jit
def products_of_rows(
    operands,
    weight,
    rows,
    use,
    tile,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[ROWS, TILE] products e·c (and a·B) of the given hidden states with all rows of a classifier tile."""
    products = tl.zeros([ROWS, TILE], tl.float32)
    products = add_adapter(products, operands, rows, use, tile * TILE + tl.arange(0, TILE), None, PRECISION)
    for d in tl.range(0, operands.D, BLOCK_D, num_stages=STAGES):
        e = load_rows(operands.hidden, rows, use, d, operands.D, operands.stride_hidden, BLOCK_D)
        c = load_block(weight, tile * TILE, d, operands.V, operands.D, operands.stride_weight, TILE, BLOCK_D, TMA)
        products = dot_rows(e, c, products, PRECISION)
    return products


@triton.jit
def softcapped(x, softcap):
    """(f(x)·log2 e, f'(x))."""
    if softcap is not None:
        t = 1 - 2 / (tl.exp2(x * (2 * LOG2_E / softcap)) + 1)
        return t * (softcap * LOG2_E), 1 - t * t
    else:
        return x * LOG2_E, 1.0


@triton.jit
def finite(max_n):
    """What to subtract for a max of −inf (all logits −inf, as a bias may ask for): anything finite does."""
    return tl.where(max_n == -float("inf"), 0.0, max_n)


@triton.jit
def logits_of(operands, products, columns, n, valid):
    """Base-2 logits and f' of a block of products e·c of tokens n; −inf in columns past the last. The temperature is in
    the logits, not in f'."""
    if operands.bias is not None:
        bias = tl.load(operands.bias + columns, mask=columns < operands.V, other=0.0)
        products += bias.to(tl.float32)[None, :]
    z, slope = softcapped(products * operands.scale, operands.softcap)
    if operands.inverse_temperature_N is not None:
        z *= tl.load(operands.inverse_temperature_N + n, mask=valid, other=1.0)[:, None]
    return tl.where((columns < operands.V)[None, :], z, -float("inf")), slope


@triton.jit
def is_frequent(frequent_V, columns, V):
    """Which columns are of frequent rows, of a list that is not None."""
    return tl.load(frequent_V + columns, mask=columns < V, other=-1) >= 0


@triton.jit
def without_frequent(operands, z, columns):
    """Logits with −inf in the columns of frequent rows: after the softcap, which would make a number of it."""
    if operands.frequent_V is not None:
        z = tl.where(is_frequent(operands.frequent_V, columns, operands.V)[None, :], -float("inf"), z)
    return z


@triton.jit
def probabilities(operands, upstream, normaliser, z, slope, n, valid, columns, factor):
    """P = (p·(a + γ·log p) − b·[target])·f'·factor of tokens n and columns, zero where either is none; see `Upstream`.

    ``factor``: a number, or one a token.
    """
    a = tl.load(upstream.softmax_N + n, mask=valid, other=0.0) * factor
    b = tl.load(upstream.target_N + n, mask=valid, other=0.0) * factor
    max2 = tl.load(normaliser.max_N + n, mask=valid, other=0.0)
    log2_sum = tl.load(normaliser.log_sum_N + n, mask=valid, other=0.0)
    target = tl.load(operands.target_N + n, mask=valid, other=-1)
    log2_p = (z - max2[:, None]) - log2_sum[:, None]
    if upstream.log_N is not None:
        g = tl.load(upstream.log_N + n, mask=valid, other=0.0) * factor
        p = tl.exp2(log2_p) * (a[:, None] + (g * _LN_2)[:, None] * tl.maximum(log2_p, _FAR))
    else:
        p = tl.exp2(log2_p) * a[:, None]
    p = tl.where(target[:, None] == columns[None, :], p - b[:, None], p) * slope
    inside = columns < operands.V
    if operands.frequent_V is not None:
        inside = inside & (is_frequent(operands.frequent_V, columns, operands.V) == 0)
    return tl.where(valid[:, None] & inside[None, :], p, 0.0)


def descriptor(matrix: torch.Tensor, rows: int, columns: int, tma: bool) -> Any:
    """A TMA descriptor of a row-major matrix for blocks of that shape, or the matrix itself."""
    if not tma:
        return matrix
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def can_use_tma(*matrices: torch.Tensor) -> bool:
    """Rows must start at multiples of 16 bytes."""
    return all(x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 for x in matrices)


def precision(logits: Logits) -> str:
    """How fp32 products are formed, as torch.set_float32_matmul_precision asks; 16-bit ones do not look at it."""
    if logits.hidden_ND.dtype != torch.float32:
        return "tf32"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]
