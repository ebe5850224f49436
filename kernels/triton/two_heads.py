"""What a chunk of two heads' logits, a student's and a teacher's, adds to each token's divergence, and its gradient.

Grids: sums over rows: (tokens), a loop over the chunk; the gradient: (tokens) x (blocks of the chunk). Bytes: each
product is read once, 8·N·v; the gradient is written once in 16 bits.

Shapes: N tokens, v rows of a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..two_heads import LOWEST, Kind, Side
from .operands import LAUNCH

ALIVE = 2
_LOWEST = tl.constexpr(LOWEST)
_BLOCK = 1024
_KINDS: dict[Kind, int] = {"forward": 0, "reverse": 1, "jsd": 2}


@triton.jit
def _logits(side, n, v, V):
    """(z, its derivative by the scaled product) of columns v of a token; NaN stays."""
    x = tl.load(side.products_Nv + n * V + v, mask=v < V, other=0.0)
    if side.bias_v is not None:
        x += tl.load(side.bias_v + v, mask=v < V, other=0.0).to(tl.float32)
    x *= side.scale
    chain = tl.full(x.shape, 1.0, tl.float32)
    if side.softcap is not None:
        t = 1 - 2 / (tl.exp(x * (2 / side.softcap)) + 1)
        x = side.softcap * t
        chain = 1 - t * t
    return tl.where(x < _LOWEST, _LOWEST, x), chain


@triton.jit
def _log_to_mixture(difference, beta):
    """See `kernels/two_heads.py`; by series where what is left of 1 would have few digits."""
    below = difference <= 0
    a = tl.where(below, difference, -difference)
    weight = tl.where(below, beta, 1 - beta)
    x = weight * tl.where(a > -0.03, a * (1 + a * (0.5 + a * (1 / 6 + a / 24))), tl.exp(a) - 1)
    log = tl.where(x > -0.03, x * (1 - x * (0.5 - x * (1 / 3 - x / 4))), tl.log(1 + x))
    return -tl.where(below, log, difference + log)


@triton.jit
def _add_kernel(
    sums_5N,
    student,
    teacher,
    N,
    V,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    sums = sums_5N + n
    max_s, sum_s = tl.load(sums), tl.load(sums + N)
    max_t, sum_t, weighted = tl.load(sums + 2 * N), tl.load(sums + 3 * N), tl.load(sums + 4 * N)
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        inside = v < V
        z_s, _ = _logits(student, n, v, V)
        z_t, _ = _logits(teacher, n, v, V)
        new_s = tl.maximum(max_s, tl.max(tl.where(inside, z_s, _LOWEST), 0))
        new_t = tl.maximum(max_t, tl.max(tl.where(inside, z_t, _LOWEST), 0))
        decay_s, decay_t = tl.exp(max_s - new_s), tl.exp(max_t - new_t)
        e_s, e_t = tl.exp(z_s - new_s), tl.exp(z_t - new_t)
        if KIND == 0:
            weighted = weighted * decay_t + tl.sum(tl.where(inside, e_t * (z_t - z_s), 0.0), 0)
        if KIND == 1:
            weighted = weighted * decay_s + tl.sum(tl.where(inside, e_s * (z_s - z_t), 0.0), 0)
        sum_s = sum_s * decay_s + tl.sum(tl.where(inside, e_s, 0.0), 0)
        sum_t = sum_t * decay_t + tl.sum(tl.where(inside, e_t, 0.0), 0)
        max_s, max_t = new_s, new_t
    tl.store(sums, max_s)
    tl.store(sums + N, sum_s)
    tl.store(sums + 2 * N, max_t)
    tl.store(sums + 3 * N, sum_t)
    tl.store(sums + 4 * N, weighted)


@triton.jit
def _add_mixture_kernel(
    parts_2N,
    lse_2N,
    beta,
    student,
    teacher,
    N,
    V,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    lse_s, lse_t = tl.load(lse_2N + n), tl.load(lse_2N + N + n)
    of_student, of_teacher = tl.load(parts_2N + n), tl.load(parts_2N + N + n)
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        inside = v < V
        z_s, _ = _logits(student, n, v, V)
        z_t, _ = _logits(teacher, n, v, V)
        log_s, log_t = z_s - lse_s, z_t - lse_t
        difference = log_t - log_s
        ratio = _log_to_mixture(difference, beta)
        of_student += tl.sum(tl.where(inside, tl.exp(log_s) * ratio, 0.0), 0)
        of_teacher += tl.sum(tl.where(inside, tl.exp(log_t) * (difference + ratio), 0.0), 0)
    tl.store(parts_2N + n, of_student)
    tl.store(parts_2N + N + n, of_teacher)


@triton.jit
def _slope_kernel(
    out_Nv,
    lse_2N,
    mean_ratio_N,
    factor_N,
    beta,
    student,
    teacher,
    N,
    V,
    out_stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = v < V
    z_s, chain = _logits(student, n, v, V)
    z_t, _ = _logits(teacher, n, v, V)
    log_s, log_t = z_s - tl.load(lse_2N + n), z_t - tl.load(lse_2N + N + n)
    if KIND == 0:
        slope = tl.exp(log_s) - tl.exp(log_t)
    else:
        if KIND == 1:
            ratio = log_s - log_t - tl.load(mean_ratio_N + n)
        else:
            ratio = (1 - beta) * (_log_to_mixture(log_t - log_s, beta) - tl.load(mean_ratio_N + n))
        slope = tl.exp(log_s) * ratio
    slope *= chain * tl.load(factor_N + n)
    tl.store(out_Nv + n * out_stride + v, slope.to(out_Nv.dtype.element_ty), mask=inside)


def add(sums_5N: Tensor, student: Side, teacher: Side, kind: Kind) -> None:
    """See `kernels/two_heads.py`."""
    tokens = sums_5N.shape[1]
    if tokens:
        with torch.cuda.device_of(sums_5N):
            _add_kernel[(tokens,)](
                sums_5N, student, teacher, *student.products_Nv.shape, KIND=_KINDS[kind], BLOCK=_BLOCK, **LAUNCH
            )


def add_mixture(parts_2N: Tensor, student: Side, teacher: Side, lse_2N: Tensor, beta: float) -> None:
    """See `kernels/two_heads.py`."""
    tokens = parts_2N.shape[1]
    if tokens:
        with torch.cuda.device_of(parts_2N):
            _add_mixture_kernel[(tokens,)](
                parts_2N, lse_2N, beta, student, teacher, *student.products_Nv.shape, BLOCK=_BLOCK, **LAUNCH
            )


def slope(
    student: Side,
    teacher: Side,
    lse_2N: Tensor,
    mean_ratio_N: Tensor | None,
    factor_N: Tensor,
    kind: Kind,
    beta: float,
    out_Nv: Tensor,
) -> None:
    """See `kernels/two_heads.py`."""
    tokens, columns = out_Nv.shape
    if out_Nv.numel():
        with torch.cuda.device_of(out_Nv):
            _slope_kernel[(tokens, triton.cdiv(columns, _BLOCK))](
                out_Nv,
                lse_2N,
                factor_N if mean_ratio_N is None else mean_ratio_N,
                factor_N,
                beta,
                student,
                teacher,
                tokens,
                columns,
                out_Nv.stride(0),
                KIND=_KINDS[kind],
                BLOCK=_BLOCK,
                **LAUNCH,
            )
