"""Two heads over the same rows, a student's and a teacher's: what rows add to each divergence, and its gradient.

Grid: one program a multiprocessor. A block of BLOCK_N x BLOCK_V logits of the student is computed and written to the
program's own place in a scratch, 17 MB for all programs, which stays in L2; then the same block of the teacher is
computed, and meets the student's. So each product has the large tile of `summarise`, and neither head's logits are ever
in memory. Sums: a program walks over units of (block of rows, split of the vocabulary). The gradient: over blocks,
columns fastest within a group of row blocks.
FLOPs: 4·N·V·D each. Bytes: the classifiers as in `summarise`; the gradient is written once in 16 bits, 2·N·V.

Shapes: N tokens, D hidden, V rows, S splits.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import two_heads
from ..two_heads import LOWEST, Kind, Side
from .blocks import LN_2, LOG2_E, can_use_tma, descriptor, load_block, precision_of, softcapped
from .operands import LAUNCH
from .tuning import Tuning, num_programs, tuning_for

_LOWEST = tl.constexpr(LOWEST)
_LN_2 = tl.constexpr(LN_2)
_BLOCKS_OF_A_UNIT = 4  # of the gradient
_KINDS: dict[Kind, int] = {"forward": 0, "reverse": 1, "jsd": 2}


class _Head(NamedTuple):
    """A `Side`, but for its matrices, which may be descriptors."""

    bias_V: Tensor | None
    scale: float
    softcap: float | None
    D: int
    stride_hidden: int
    stride_weight: int


@triton.jit
def _products(
    hidden,
    weight,
    head,
    row,
    column,
    N,
    V,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    x = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for d in tl.range(0, head.D, BLOCK_D, num_stages=STAGES):
        e = load_block(hidden, row, d, N, head.D, head.stride_hidden, BLOCK_N, BLOCK_D, TMA)
        c = load_block(weight, column, d, V, head.D, head.stride_weight, BLOCK_V, BLOCK_D, TMA)
        x = tl.dot(e, c.to(e.dtype).T, x, input_precision=PRECISION)
    if head.bias_V is not None:
        v = column + tl.arange(0, BLOCK_V)
        x += tl.load(head.bias_V + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    return x * head.scale


@triton.jit
def _logits(x, softcap):
    """(z in base 2, dz/dx) of scaled products; NaN stays."""
    z, chain = softcapped(x, softcap)
    return tl.where(z < _LOWEST, _LOWEST, z), chain


@triton.jit
def _place(scratch, QUARTER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """This program's, for a quarter of a block's columns."""
    columns = QUARTER * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4)
    within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_V + columns[None, :]
    return scratch + tl.program_id(0).to(tl.int64) * (BLOCK_N * BLOCK_V) + within


@triton.jit
def _half(x, SECOND: tl.constexpr):
    """The left or the right columns, which each thread has of its rows already."""
    left, right = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))
    if SECOND:
        return right
    else:
        return left


@triton.jit
def _quarter(x, QUARTER: tl.constexpr):
    """A quarter of the columns: there are not registers for all of both heads' at a time."""
    return _half(_half(x, QUARTER // 2), QUARTER % 2)


@triton.jit
def _put(scratch, x, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    for quarter in tl.static_range(4):
        tl.store(_place(scratch, quarter, BLOCK_N, BLOCK_V), _quarter(x, quarter))
    tl.debug_barrier()


@triton.jit
def _log2_to_mixture(difference, beta):
    """log2(s/m) from log2(t/s), see `kernels/two_heads.py`; by series where what is left of 1 would have few digits."""
    below = difference <= 0
    a = tl.where(below, difference, -difference) * _LN_2
    weight = tl.where(below, beta, 1 - beta)
    x = weight * tl.where(a > -0.03, a * (1 + a * (0.5 + a * (1 / 6 + a / 24))), tl.exp2(a * LOG2_E) - 1)
    log = tl.where(x > -0.03, x * (1 - x * (0.5 - x * (1 / 3 - x / 4))), tl.log2(1 + x) * _LN_2) * LOG2_E
    return -tl.where(below, log, difference + log)


@triton.jit
def _unit(unit, row_blocks, columns, ROW_GROUP: tl.constexpr):
    """(row block, column) of a unit: columns slowest within a group of row blocks."""
    first = unit // (ROW_GROUP * columns) * ROW_GROUP
    in_group = min(row_blocks - first, ROW_GROUP)
    within = unit - first * columns
    return first + within % in_group, within // in_group


@triton.jit
def _absorbed(z, inside, max_n, sum_n):
    """(max, Σ exp2(z − max), what older sums are multiplied with) with a block more."""
    inside = inside[None, :]
    new_n = tl.maximum(max_n, tl.max(tl.where(inside, z, _LOWEST), 1))
    decay_n = tl.exp2(max_n - new_n)
    sum_n = sum_n * decay_n + tl.sum(tl.where(inside, tl.exp2(z - new_n[:, None]), 0.0), 1)
    return new_n, sum_n, decay_n


@triton.jit
def _two_sums_kernel(
    out_SFN,
    scratch,
    lse_2N,
    beta,
    student_hidden,
    student_weight,
    student,
    teacher_hidden,
    teacher_weight,
    teacher,
    N,
    V,
    splits,
    blocks_per_split,
    FIELDS: tl.constexpr,
    KIND: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`sums` (FIELDS = 5) or `mixture` (2) of each split."""
    row_blocks, num_blocks = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    for unit in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        row_block, split = _unit(unit, row_blocks, splits, ROW_GROUP)
        row = row_block * BLOCK_N
        n = row + tl.arange(0, BLOCK_N)
        first = split * blocks_per_split
        max_s = tl.full([BLOCK_N], _LOWEST, tl.float32)
        sum_s = tl.zeros([BLOCK_N], tl.float32)
        max_t, sum_t, weighted, lse_s, lse_t = max_s, sum_s, sum_s, sum_s, sum_s
        if FIELDS == 2:
            lse_s = tl.load(lse_2N + n, mask=n < N, other=0.0) * LOG2_E
            lse_t = tl.load(lse_2N + N + n, mask=n < N, other=0.0) * LOG2_E
        for block in range(first, min(first + blocks_per_split, num_blocks)):
            column = block * BLOCK_V
            v = column + tl.arange(0, BLOCK_V)
            x = _products(
                student_hidden,
                student_weight,
                student,
                row,
                column,
                N,
                V,
                BLOCK_N,
                BLOCK_V,
                BLOCK_D,
                TMA,
                PRECISION,
                STAGES,
            )
            z_s, _ = _logits(x, student.softcap)
            decay_s = sum_s
            if FIELDS == 5:
                max_s, sum_s, decay_s = _absorbed(z_s, v < V, max_s, sum_s)
            _put(scratch, z_s, BLOCK_N, BLOCK_V)
            x = _products(
                teacher_hidden,
                teacher_weight,
                teacher,
                row,
                column,
                N,
                V,
                BLOCK_N,
                BLOCK_V,
                BLOCK_D,
                TMA,
                PRECISION,
                STAGES,
            )
            z_t, _ = _logits(x, teacher.softcap)
            decay_t = sum_t
            if FIELDS == 5:
                max_t, sum_t, decay_t = _absorbed(z_t, v < V, max_t, sum_t)
            if KIND == 0:
                weighted *= decay_t
            elif KIND == 1:
                weighted *= decay_s
            whole = z_t
            for quarter in tl.static_range(4):
                z_s = tl.load(_place(scratch, quarter, BLOCK_N, BLOCK_V))
                z_t = _quarter(whole, quarter)
                inside = (column + quarter * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4) < V)[None, :]
                if FIELDS == 2:
                    log_s, log_t = z_s - lse_s[:, None], z_t - lse_t[:, None]
                    ratio = _log2_to_mixture(log_t - log_s, beta)
                    sum_s += tl.sum(tl.where(inside, tl.exp2(log_s) * ratio, 0.0), 1)
                    sum_t += tl.sum(tl.where(inside, tl.exp2(log_t) * (log_t - log_s + ratio), 0.0), 1)
                elif KIND == 0:
                    weighted += tl.sum(tl.where(inside, tl.exp2(z_t - max_t[:, None]) * (z_t - z_s), 0.0), 1)
                elif KIND == 1:
                    weighted += tl.sum(tl.where(inside, tl.exp2(z_s - max_s[:, None]) * (z_s - z_t), 0.0), 1)
            tl.debug_barrier()
        out = out_SFN + split.to(tl.int64) * FIELDS * N + n
        if FIELDS == 2:
            tl.store(out, sum_s * _LN_2, mask=n < N)
            tl.store(out + N, sum_t * _LN_2, mask=n < N)
        else:
            tl.store(out, max_s * _LN_2, mask=n < N)
            tl.store(out + N, sum_s, mask=n < N)
            tl.store(out + 2 * N, max_t * _LN_2, mask=n < N)
            tl.store(out + 3 * N, sum_t, mask=n < N)
            tl.store(out + 4 * N, weighted * _LN_2, mask=n < N)


@triton.jit
def _two_slope_kernel(
    out_NV,
    unread_N,
    scratch,
    lse_2N,
    mean_ratio_N,
    factor_N,
    beta,
    student_hidden,
    student_weight,
    student,
    teacher_hidden,
    teacher_weight,
    teacher,
    N,
    V,
    splits,
    blocks_per_split,
    KIND: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``unread_N`` is written so that a number of the products goes from block to block: without one the compiler of
    Triton 3.6 holds the zeros they begin with in memory and makes each product wait for the one before (8 times slower
    on an H100)."""
    row_blocks, num_blocks = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    for unit in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        row_block, split = _unit(unit, row_blocks, splits, ROW_GROUP)
        row = row_block * BLOCK_N
        n = row + tl.arange(0, BLOCK_N)
        first = split * blocks_per_split
        carried = tl.zeros([BLOCK_N], tl.float32)
        for block in range(first, min(first + blocks_per_split, num_blocks)):
            column = block * BLOCK_V
            x = _products(
                teacher_hidden,
                teacher_weight,
                teacher,
                row,
                column,
                N,
                V,
                BLOCK_N,
                BLOCK_V,
                BLOCK_D,
                TMA,
                PRECISION,
                STAGES,
            )
            _put(scratch, x, BLOCK_N, BLOCK_V)
            x = _products(
                student_hidden,
                student_weight,
                student,
                row,
                column,
                N,
                V,
                BLOCK_N,
                BLOCK_V,
                BLOCK_D,
                TMA,
                PRECISION,
                STAGES,
            )
            carried += tl.sum(x, 1)
            for quarter in tl.static_range(4):
                v = column + quarter * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4)
                z_t, _ = _logits(tl.load(_place(scratch, quarter, BLOCK_N, BLOCK_V)), teacher.softcap)
                z_s, chain = _logits(_quarter(x, quarter), student.softcap)
                log_s = z_s - (tl.load(lse_2N + n, mask=n < N, other=0.0) * LOG2_E)[:, None]
                log_t = z_t - (tl.load(lse_2N + N + n, mask=n < N, other=0.0) * LOG2_E)[:, None]
                if KIND == 0:
                    slope = tl.exp2(log_s) - tl.exp2(log_t)
                else:
                    mean = tl.load(mean_ratio_N + n, mask=n < N, other=0.0)[:, None]
                    if KIND == 1:
                        ratio = (log_s - log_t) * _LN_2 - mean
                    else:
                        ratio = (1 - beta) * (_log2_to_mixture(log_t - log_s, beta) * _LN_2 - mean)
                    slope = tl.exp2(log_s) * ratio
                slope *= chain * tl.load(factor_N + n, mask=n < N, other=0.0)[:, None]
                pointers = out_NV + n[:, None].to(tl.int64) * V + v[None, :]
                tl.store(pointers, slope.to(out_NV.dtype.element_ty), mask=(n < N)[:, None] & (v < V)[None, :])
            tl.debug_barrier()
        tl.store(unread_N + n, carried, mask=n < N)


def _laid_out(side: Side) -> Side:
    """With rows whose elements are beside each other."""
    hidden_ND, weight_VD = (x if x.stride(1) == 1 else x.contiguous() for x in (side.hidden_ND, side.weight_VD))
    return side._replace(hidden_ND=hidden_ND, weight_VD=weight_VD)


def gradient_bytes(student: Side, teacher: Side) -> int:
    """See `kernels/two_heads.py`."""
    return student.hidden_ND.shape[0] * student.hidden_ND.element_size()


def sums(student: Side, teacher: Side, kind: Kind, workspace_bytes: int) -> Tensor:
    """See `kernels/two_heads.py`; takes no workspace."""
    if not student.weight_VD.shape[0]:
        return two_heads.sums(student, teacher, kind, workspace_bytes)
    parts_S5N = _over_splits(student, teacher, 5, kind, None, 0.0)
    max_2N = parts_S5N[:, 0:4:2].amax(0)
    decay_s, decay_t = (parts_S5N[:, 0:4:2] - max_2N).exp().unbind(1)
    of_weighted = decay_t if kind == "forward" else decay_s
    summed = [(parts_S5N[:, f] * decay).sum(0) for f, decay in ((1, decay_s), (3, decay_t), (4, of_weighted))]
    return torch.stack((max_2N[0], summed[0], max_2N[1], summed[1], summed[2]))


def mixture(student: Side, teacher: Side, lse_2N: Tensor, beta: float, workspace_bytes: int) -> Tensor:
    """See `kernels/two_heads.py`; takes no workspace."""
    if not student.weight_VD.shape[0]:
        return two_heads.mixture(student, teacher, lse_2N, beta, workspace_bytes)
    return _over_splits(student, teacher, 2, "jsd", lse_2N, beta).sum(0)


def _over_splits(student: Side, teacher: Side, fields: int, kind: Kind, lse_2N: Tensor | None, beta: float) -> Tensor:
    student, teacher = _laid_out(student), _laid_out(teacher)
    (tokens, _), vocab = student.hidden_ND.shape, student.weight_VD.shape[0]
    tuning = _tuning(student, teacher)
    blocks = triton.cdiv(vocab, tuning.block_v)
    blocks_per_split = triton.cdiv(blocks, tuning.splits)
    splits = triton.cdiv(blocks, blocks_per_split)
    out_SFN = torch.empty((splits, fields, tokens), dtype=torch.float32, device=student.hidden_ND.device)
    if tokens:
        programs = min(num_programs(student.hidden_ND), triton.cdiv(tokens, tuning.block_n) * splits)
        with torch.cuda.device_of(out_SFN):
            _two_sums_kernel[(programs,)](
                out_SFN,
                _scratch(programs, tuning, out_SFN.device),
                lse_2N,
                beta,
                *_arguments(student, teacher, tuning),
                tokens,
                vocab,
                splits,
                blocks_per_split,
                FIELDS=fields,
                KIND=_KINDS[kind],
                **_options(student, teacher, tuning),
                **LAUNCH,
            )
    return out_SFN


def slope(
    student: Side,
    teacher: Side,
    lse_2N: Tensor,
    mean_ratio_N: Tensor | None,
    factor_N: Tensor,
    kind: Kind,
    beta: float,
) -> Tensor:
    """See `kernels/two_heads.py`."""
    student, teacher = _laid_out(student), _laid_out(teacher)
    (tokens, _), vocab = student.hidden_ND.shape, student.weight_VD.shape[0]
    out_NV = student.hidden_ND.new_empty((tokens, vocab))
    tuning = _tuning(student, teacher)
    if out_NV.numel():
        splits = triton.cdiv(triton.cdiv(vocab, tuning.block_v), _BLOCKS_OF_A_UNIT)
        programs = min(num_programs(out_NV), triton.cdiv(tokens, tuning.block_n) * splits)
        with torch.cuda.device_of(out_NV):
            _two_slope_kernel[(programs,)](
                out_NV,
                factor_N.new_empty(tokens),
                _scratch(programs, tuning, out_NV.device),
                lse_2N,
                mean_ratio_N,
                factor_N,
                beta,
                *_arguments(student, teacher, tuning),
                tokens,
                vocab,
                splits,
                _BLOCKS_OF_A_UNIT,
                KIND=_KINDS[kind],
                **_options(student, teacher, tuning),
                **LAUNCH,
            )
    return out_NV


def _tuning(student: Side, teacher: Side) -> Tuning:
    """Of the wider rows, which have to fit the shared memory."""
    wider = max((teacher, student), key=lambda side: side.weight_VD.element_size())
    return tuning_for(student.hidden_ND, wider.weight_VD)


def _scratch(programs: int, tuning: Tuning, device: torch.device) -> Tensor:
    return torch.empty(programs * tuning.block_n * tuning.block_v, dtype=torch.float32, device=device)


def _arguments(student: Side, teacher: Side, tuning: Tuning) -> list[Any]:
    """(hidden states, classifier, the rest) of both, as the kernels take them."""
    arguments: list[Any] = []
    tma = _tma(student, teacher, tuning)
    for side in (student, teacher):
        head = _Head(
            side.bias_V,
            side.scale,
            side.softcap,
            side.hidden_ND.shape[1],
            side.hidden_ND.stride(0),
            side.weight_VD.stride(0),
        )
        arguments += [
            descriptor(side.hidden_ND, tuning.block_n, tuning.block_d, tma),
            descriptor(side.weight_VD, tuning.block_v, tuning.block_d, tma),
            head,
        ]
    return arguments


def _options(student: Side, teacher: Side, tuning: Tuning) -> dict[str, Any]:
    return {
        "ROW_GROUP": tuning.row_group,
        "BLOCK_N": tuning.block_n,
        "BLOCK_V": tuning.block_v,
        "BLOCK_D": tuning.block_d,
        "TMA": _tma(student, teacher, tuning),
        "PRECISION": precision_of(torch.promote_types(student.hidden_ND.dtype, teacher.hidden_ND.dtype)),
        "STAGES": tuning.stages,
        "num_warps": tuning.warps,
    }


def _tma(student: Side, teacher: Side, tuning: Tuning) -> bool:
    matrices = [x for side in (student, teacher) for x in (side.hidden_ND, side.weight_VD)]
    # Wider elements beside would not fit the shared memory that the tuning is for.
    alike = all(x.dtype == student.hidden_ND.dtype for x in matrices)
    return tuning.tma and alike and can_use_tma(*matrices)
