"""Exact gradient: the probabilities of a chunk of the vocabulary at a time in 16 bits, and two library products each.

Grid of the kernel: one program a multiprocessor, each walking over units (block of rows, block of the chunk), rows
fastest within a group of row blocks; where D is short in one flat loop with the steps along D, so that the next unit's
loads are under way while P is formed, as in summarise.py. FLOPs of the whole: 6·N·V·D (recomputed products, dE, dC).
Bytes: P is written and read twice, 6·N·V, from a chunk that the workspace bounds.

Of columns whose exponentials forward kept nothing is computed again: 4·N·K·D FLOPs, 4·N·K bytes. There P is f_n·exp(z −
origin) with a factor f_n for each token, but for the label's entry c_n, which is formed in fp32. So dE is f ⊙ (exp C)
plus c_n C_label, and dC is expᵀ (f ⊙ E), one library product each, to whose rows c_n E_n is added, a label's tokens by
one program. What rounding f ⊙ E costs is small, since the labels' part has none of it. Where P is more than a factor a
token (an entropy's gradient) or its columns' sums are wanted (a bias), P is read from the exponentials, a chunk at a
time.

Shapes: N tokens, D hidden, V local rows, K kept columns, v the rows of a chunk.
"""

import functools

import torch
import triton
import triton.language as tl

from ..problem import KEPT_SUMS_BYTES, Exponentials, Gradients, Logits, Normaliser, Upstream
from ..products import add_product, columns_at_once, product, rounds, time_of_gradients, write_product
from .blocks import (
    LN_2,
    add_adapter,
    can_use_tma,
    descriptor,
    load_block,
    logits_of,
    precision,
    probabilities,
)
from .compact import compacted, write_rows
from .operands import LAUNCH, operands_of
from .parts import PARTS, are_in_parts, columns_of_a_copy, hidden_column, high_part, in_parts, width_of
from .tuning import num_programs, tuning_for

_LN_2 = tl.constexpr(LN_2)
_FACTOR_TOKENS = 128
_READ_TOKENS, _READ_COLUMNS = 16, 512
_LABEL_TOKENS, _LABEL_BLOCK_D = 32, 256
_SAME, _LARGEST_SHARE = tl.constexpr(1e-5), tl.constexpr(64.0)


@triton.jit
def _place_of(unit, row_blocks, blocks, ROW_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """The first row and the first column of a unit's block."""
    first_block = unit // (ROW_GROUP * blocks) * ROW_GROUP
    blocks_in_group = min(row_blocks - first_block, ROW_GROUP)
    within = unit - first_block * blocks
    return (first_block + within % blocks_in_group) * BLOCK_N, within // blocks_in_group * BLOCK_V


@triton.jit
def _store_block(p_Nv, p, row, column, N, chunk_columns, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    n = row + tl.arange(0, BLOCK_N)
    chunk_range = column + tl.arange(0, BLOCK_V)
    pointers = p_Nv + n[:, None].to(tl.int64) * chunk_columns + chunk_range[None, :]
    inside = (n < N)[:, None] & (chunk_range < chunk_columns)[None, :]
    tl.store(pointers, p.to(p_Nv.dtype.element_ty), mask=inside)


@triton.jit
def _block_probabilities(
    operands,
    upstream,
    normaliser,
    products,
    row,
    column,
    headroom,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = row + tl.arange(0, BLOCK_N)
    columns = column + tl.arange(0, BLOCK_V)
    valid = n < tl.load(operands.n_valid)
    z, slope = logits_of(operands, products, columns, n, valid)
    return probabilities(operands, upstream, normaliser, z, slope, n, valid, columns, headroom)


@triton.jit
def _probability_kernel(
    p_Nv,
    operands,
    hidden,
    weight,
    upstream,
    normaliser,
    first_column,
    chunk_columns,
    headroom,
    ROW_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``weight``: the whole classifier, or the chunk's copy in parts."""
    N, V, D = operands.N, operands.V, operands.D
    first_row = first_column
    if PARTS > 1:
        V = chunk_columns
        first_row = 0
    width = width_of(D, BLOCK_D, PARTS)
    program, programs = tl.program_id(0), tl.num_programs(0)
    blocks = tl.cdiv(chunk_columns, BLOCK_V)
    row_blocks = tl.cdiv(tl.load(operands.n_valid), BLOCK_N)
    units = row_blocks * blocks
    if FLAT:
        d_steps = tl.cdiv(width, BLOCK_D)
        own_units = tl.cdiv(tl.maximum(units - program, 0), programs)
        products = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for step in tl.range(0, own_units * d_steps, num_stages=STAGES):
            unit = program + step // d_steps * programs
            row, column = _place_of(unit, row_blocks, blocks, ROW_GROUP, BLOCK_N, BLOCK_V)
            d = step % d_steps * BLOCK_D
            of_hidden = hidden_column(d, D, BLOCK_D, PARTS)
            e = load_block(hidden, row, of_hidden, N, D, operands.stride_hidden, BLOCK_N, BLOCK_D, TMA)
            c = load_block(weight, first_row + column, d, V, width, operands.stride_weight, BLOCK_V, BLOCK_D, TMA)
            products = tl.dot(e, c.T, products, input_precision=PRECISION)
            if d + BLOCK_D >= width:
                of_all = first_column + column
                p = _block_probabilities(
                    operands, upstream, normaliser, products, row, of_all, headroom, BLOCK_N, BLOCK_V
                )
                _store_block(p_Nv, p, row, column, N, chunk_columns, BLOCK_N, BLOCK_V)
                products = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    else:
        for unit in range(program, units, programs):
            row, column = _place_of(unit, row_blocks, blocks, ROW_GROUP, BLOCK_N, BLOCK_V)
            products = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
            if operands.adapter_NR is not None:
                n = row + tl.arange(0, BLOCK_N)
                valid = n < tl.load(operands.n_valid)
                token = tl.load(operands.token_N + n, mask=valid, other=0)
                columns = first_column + column + tl.arange(0, BLOCK_V)
                products = add_adapter(products, operands, token, valid, columns, None, PRECISION)
            for d in tl.range(0, width, BLOCK_D, num_stages=STAGES):
                of_hidden = hidden_column(d, D, BLOCK_D, PARTS)
                e = load_block(hidden, row, of_hidden, N, D, operands.stride_hidden, BLOCK_N, BLOCK_D, TMA)
                c = load_block(weight, first_row + column, d, V, width, operands.stride_weight, BLOCK_V, BLOCK_D, TMA)
                products = tl.dot(e, c.T, products, input_precision=PRECISION)
            of_all = first_column + column
            p = _block_probabilities(operands, upstream, normaliser, products, row, of_all, headroom, BLOCK_N, BLOCK_V)
            _store_block(p_Nv, p, row, column, N, chunk_columns, BLOCK_N, BLOCK_V)
    # Of tokens that are not valid.
    for unit in range(units + program, tl.cdiv(N, BLOCK_N) * blocks, programs):
        row, column = unit // blocks * BLOCK_N, unit % blocks * BLOCK_V
        zeros = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        _store_block(p_Nv, zeros, row, column, N, chunk_columns, BLOCK_N, BLOCK_V)


@triton.jit
def _slope_of(operands, z, temperature):
    """f' of base-2 logits, which are divided by the temperature."""
    t = z * temperature * (_LN_2 / operands.softcap)
    return 1 - t * t


@triton.jit
def _temperature_of(operands, n, valid):
    temperature = tl.full(n.shape, 1.0, tl.float32)
    if operands.inverse_temperature_N is not None:
        temperature /= tl.load(operands.inverse_temperature_N + n, mask=valid, other=1.0)
    return temperature


@triton.jit
def _label_logit(target_logit_N, max2, n, valid):
    """In base 2. It comes from another sum than the largest logit; a token that is almost certain lives from their
    difference, so of two that are the same but for rounding it is that one."""
    z = tl.load(target_logit_N + n, mask=valid, other=0.0) / _LN_2
    return tl.where(tl.abs(z - max2) <= _SAME * tl.maximum(tl.abs(max2), 1.0), max2, z)


@triton.jit
def _factor_kernel(
    factor_N,
    label_N,
    exp_NK,
    operands,
    upstream,
    normaliser,
    origin_N,
    target_logit_N,
    kept_columns,
    stride,
    TOKENS: tl.constexpr,
):
    """f_n = a_n·exp(origin − lse), and P of the labels among the kept columns, where 0 takes the exponential's place.
    Grid: one program a block of TOKENS."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = n < tl.load(operands.n_valid)
    a = tl.load(upstream.softmax_N + n, mask=valid, other=0.0)
    b = tl.load(upstream.target_N + n, mask=valid, other=0.0)
    max2 = tl.load(normaliser.max_N + n, mask=valid, other=0.0)
    log2_sum = tl.load(normaliser.log_sum_N + n, mask=valid, other=0.0)
    log2_share = (tl.load(origin_N + n, mask=valid, other=0.0) - max2) - log2_sum
    # It is large only where all kept logits are −inf, beside an origin of 0.
    share = tl.exp2(tl.where(log2_share > _LARGEST_SHARE, _LARGEST_SHARE, log2_share))
    tl.store(factor_N + n, a * share, mask=n < operands.N)
    target = tl.load(operands.target_N + n, mask=valid, other=-1)
    here = (target >= 0) & (target < kept_columns)
    z = _label_logit(target_logit_N, max2, n, valid)
    p = tl.exp2((z - max2) - log2_sum) * a - b
    if operands.softcap is not None:
        p *= _slope_of(operands, z, _temperature_of(operands, n, valid))
    tl.store(label_N + n, tl.where(here, p, 0.0), mask=n < operands.N)
    zero = tl.zeros([TOKENS], exp_NK.dtype.element_ty)
    tl.store(exp_NK + n.to(tl.int64) * stride + target, zero, mask=here)


@triton.jit
def _finish_hidden_kernel(
    dhidden_ND, operands, weight, factor_N, label_N, kept_columns, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """dE = f ⊙ dE + c C_label. Grid: (blocks of TOKENS, of BLOCK_D). Bytes: 10·N·D."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    factor = tl.load(factor_N + n, mask=n < operands.N, other=0.0)
    label = tl.load(label_N + n, mask=n < operands.N, other=0.0)
    target = tl.load(operands.target_N + n, mask=n < tl.load(operands.n_valid), other=-1)
    here = (target >= 0) & (target < kept_columns)
    inside = (n < operands.N)[:, None] & (d < operands.D)[None, :]
    pointers = dhidden_ND + n.to(tl.int64)[:, None] * operands.D + d[None, :]
    row = weight + target.to(tl.int64)[:, None] * operands.stride_weight + d[None, :]
    c = tl.load(row, mask=inside & here[:, None], other=0.0).to(tl.float32)
    sums = tl.load(pointers, mask=inside, other=0.0) * factor[:, None] + label[:, None] * c
    tl.store(pointers, sums, mask=inside)


@triton.jit
def _add_labels_kernel(
    dweight_kD,
    hidden_ND,
    label_N,
    target_N,
    token_N,
    end_N,
    first_column,
    end_column,
    D,
    dweight_stride,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dC_label += c E of all tokens of a label within the given columns. Grid: (N, blocks of BLOCK_D); the program of a
    label's first token in ascending order adds them all. Bytes: 2·N·D, and the labels' rows twice."""
    first = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    target = tl.load(target_N + first)
    before = tl.load(target_N + first - 1, mask=first > 0, other=-1)
    if (target != before) & (target >= first_column) & (target < end_column):
        end = tl.load(end_N + first).to(tl.int32)
        sums = tl.zeros([BLOCK_D], tl.float32)
        for m in range(first, end, TOKENS):
            place = m + tl.arange(0, TOKENS)
            n = tl.load(token_N + place, mask=place < end, other=0)
            label = tl.load(label_N + n, mask=place < end, other=0.0)
            inside = (place < end)[:, None] & (d < D)[None, :]
            e = tl.load(hidden_ND + n.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0)
            sums += tl.sum(label[:, None] * e.to(tl.float32), 0)
        pointers = dweight_kD + (target - first_column).to(tl.int64) * dweight_stride + d
        sums += tl.load(pointers, mask=d < D, other=0.0)
        tl.store(pointers, sums, mask=d < D)


@triton.jit
def _read_kernel(
    p_Nv,
    exp_NK,
    operands,
    upstream,
    normaliser,
    origin_N,
    target_logit_N,
    first_column,
    chunk_columns,
    stride,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """P of a chunk from exponentials without f'. Grid: (blocks of BLOCK_N tokens, of BLOCK_V columns). Bytes: 4·N·v."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk_range = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    valid = n < tl.load(operands.n_valid)
    columns = first_column + chunk_range
    inside = (n < operands.N)[:, None] & (chunk_range < chunk_columns)[None, :]
    kept = tl.load(exp_NK + n.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    z = tl.log2(kept.to(tl.float32)) + tl.load(origin_N + n, mask=valid, other=0.0)[:, None]
    target = tl.load(operands.target_N + n, mask=valid, other=-1)
    max2 = tl.load(normaliser.max_N + n, mask=valid, other=0.0)
    label_logit = _label_logit(target_logit_N, max2, n, valid)
    z = tl.where(target[:, None] == columns[None, :], label_logit[:, None], z)
    if operands.softcap is not None:
        # Of −inf, whose P is 0, any slope will do.
        temperature = _temperature_of(operands, n, valid)
        slope = _slope_of(operands, tl.where(z == -float("inf"), 0.0, z), temperature[:, None])
    else:
        slope = 1.0
    p = probabilities(operands, upstream, normaliser, z, slope, n, valid, columns, 1.0)
    tl.store(p_Nv + n[:, None].to(tl.int64) * chunk_columns + chunk_range[None, :], p.to(p_Nv.dtype.element_ty), inside)


def _not_zero(factor: torch.Tensor) -> torch.Tensor:
    """1 for 0, which a logit_scale of 0 makes: then nothing is added, and what was is 0 too."""
    return torch.where(factor == 0, 1.0, factor)


def _probabilities(
    p_Nv: torch.Tensor,
    logits: Logits,
    hidden_ND: torch.Tensor,
    upstream: Upstream,
    normaliser: Normaliser,
    first: int,
    headroom: float,
    copy_vC: torch.Tensor | None,
) -> torch.Tensor:
    """Fills p_Nv with P of the columns from ``first`` on; ``hidden_ND``: compacted. ``copy_vC``: memory for a copy of
    rows in fp32. Returns these columns' rows in the hidden states' dtype."""
    columns = p_Nv.shape[1]
    rows_vD = logits.weight_VD[first : first + columns]
    weight = logits.weight_VD if copy_vC is None else in_parts(rows_vD, copy_vC[:columns])
    tuning = tuning_for(hidden_ND, hidden_ND)
    tma = tuning.tma and can_use_tma(hidden_ND, weight)
    _probability_kernel[(num_programs(hidden_ND),)](
        p_Nv,
        operands_of(logits._replace(hidden_ND=hidden_ND))._replace(stride_weight=weight.stride(0)),
        descriptor(hidden_ND, tuning.block_n, tuning.block_d, tma),
        descriptor(weight, tuning.block_v, tuning.block_d, tma),
        upstream,
        normaliser,
        first,
        columns,
        headroom,
        ROW_GROUP=tuning.row_group,
        BLOCK_N=tuning.block_n,
        BLOCK_V=tuning.block_v,
        BLOCK_D=tuning.block_d,
        TMA=tma,
        PRECISION=precision(logits),
        STAGES=tuning.stages,
        FLAT=tuning.flat_below >= weight.shape[1] and logits.adapter_NR is None,
        PARTS=1 if copy_vC is None else PARTS,
        num_warps=tuning.warps,
        **LAUNCH,
    )
    return rows_vD if copy_vC is None else high_part(weight, hidden_ND.shape[1])


def _columns_of_a_copy(logits: Logits) -> int:
    """Of what `_probabilities` takes memory for; 0: none."""
    hidden_ND = logits.hidden_ND
    if not are_in_parts(logits):
        return 0
    return columns_of_a_copy(hidden_ND.shape[1], tuning_for(hidden_ND, hidden_ND).block_d)


def _memory_for_copies(logits: Logits, rows: int) -> torch.Tensor | None:
    columns = _columns_of_a_copy(logits)
    return logits.hidden_ND.new_empty((rows, columns)) if columns else None


def _read_probabilities(
    p_Nv: torch.Tensor,
    exponentials: Exponentials,
    logits: Logits,
    upstream: Upstream,
    normaliser: Normaliser,
    first: int,
) -> None:
    """Fills p_Nv with P of kept columns from ``first`` on."""
    rows, columns = p_Nv.shape
    _read_kernel[(triton.cdiv(rows, _READ_TOKENS), triton.cdiv(columns, _READ_COLUMNS))](
        p_Nv,
        exponentials.exp_NK,
        operands_of(logits),
        upstream,
        normaliser,
        exponentials.origin_N,
        exponentials.target_N,
        first,
        columns,
        exponentials.exp_NK.stride(0),
        BLOCK_N=_READ_TOKENS,
        BLOCK_V=_READ_COLUMNS,
        **LAUNCH,
    )


def _differentiate_kept(
    exponentials: Exponentials,
    logits: Logits,
    hidden_ND: torch.Tensor,
    upstream: Upstream,
    normaliser: Normaliser,
    dhidden_ND: torch.Tensor | None,
    dweight_VD: torch.Tensor | None,
    factor: torch.Tensor,
    workspace_bytes: int,
    add_weight: bool,
) -> None:
    """dE of kept columns in place of zeros, with ``factor`` if these are all columns; their dC, with it, or what is
    added to that."""
    exp_NK, operands = exponentials.exp_NK, operands_of(logits)
    (rows, kept), hidden_size = exp_NK.shape, hidden_ND.shape[1]
    factor_N, label_N = (torch.empty_like(exponentials.origin_N) for _ in range(2))
    _factor_kernel[(triton.cdiv(rows, _FACTOR_TOKENS),)](
        factor_N,
        label_N,
        exp_NK,
        operands,
        upstream,
        normaliser,
        exponentials.origin_N,
        exponentials.target_N,
        kept,
        exp_NK.stride(0),
        TOKENS=_FACTOR_TOKENS,
        num_warps=4,
        **LAUNCH,
    )
    whole_N, whole_label_N = factor_N * factor, label_N * factor
    if dhidden_ND is not None:
        add_product(dhidden_ND, exp_NK, logits.weight_VD[:kept])
        now = (whole_N, whole_label_N) if kept == logits.weight_VD.shape[0] else (factor_N, label_N)
        _finish_hidden_kernel[(triton.cdiv(rows, 4), triton.cdiv(hidden_size, 1024))](
            dhidden_ND, operands, logits.weight_VD, *now, kept, TOKENS=4, BLOCK_D=1024, **LAUNCH
        )
    if dweight_VD is not None:
        scaled_ND = torch.mul(hidden_ND, whole_N[:, None], out=torch.empty_like(hidden_ND))
        _write_kept(dweight_VD[:kept], exp_NK, scaled_ND, logits.target_N, whole_label_N, hidden_ND, add_weight)


def _write_kept(
    dweight_KD: torch.Tensor,
    exp_NK: torch.Tensor,
    scaled_ND: torch.Tensor,
    target_N: torch.Tensor,
    label_N: torch.Tensor,
    hidden_ND: torch.Tensor,
    add: bool,
) -> None:
    """dC of kept columns, or what is added to it, in fp32. What a row has of all tokens and of those whose label it is
    nearly cancel: both are summed before they are rounded, some rows at a time."""
    in_fp32 = dweight_KD.dtype == torch.float32
    kept, hidden_size = dweight_KD.shape
    step = kept if in_fp32 else min(max(KEPT_SUMS_BYTES // (4 * hidden_size) // 128, 1) * 128, kept)
    sums_kD = dweight_KD if in_fp32 else dweight_KD.new_empty((step, hidden_size), dtype=torch.float32)
    labels_N, token_N = target_N.sort(stable=True)
    end_N = torch.searchsorted(labels_N, labels_N, right=True)
    grid = target_N.shape[0], triton.cdiv(hidden_size, _LABEL_BLOCK_D)
    for first, exp_Nk in zip(range(0, kept, step), exp_NK.split(step, 1), strict=True):
        part_kD = sums_kD[: exp_Nk.shape[1]]
        if add:
            add_product(part_kD, exp_Nk.T, scaled_ND)
        else:
            write_product(part_kD, exp_Nk.T, scaled_ND)
        _add_labels_kernel[grid](
            part_kD,
            hidden_ND,
            label_N,
            labels_N,
            token_N,
            end_N,
            first,
            first + part_kD.shape[0],
            hidden_size,
            part_kD.stride(0),
            TOKENS=_LABEL_TOKENS,
            BLOCK_D=_LABEL_BLOCK_D,
            **LAUNCH,
        )
        if not in_fp32:
            dweight_KD[first : first + part_kD.shape[0]] = part_kD


def _chunk_size(logits: Logits, columns: int, workspace_bytes: int) -> int:
    """Columns of a chunk: P of it, with a copy of rows in fp32, and where dC is not bf16 its dC in fp32, fit the
    workspace."""
    hidden_ND = logits.hidden_ND
    row_bytes = (logits.num_tokens + _columns_of_a_copy(logits)) * hidden_ND.element_size()
    row_bytes = max(row_bytes, 4 * hidden_ND.shape[1])
    return _columns_at_once(columns, workspace_bytes // row_bytes, logits.tile, *hidden_ND.shape, hidden_ND.device)


@functools.lru_cache(maxsize=1024)
def _columns_at_once(columns: int, most: int, step: int, tokens: int, hidden_size: int, device: torch.device) -> int:
    def time(v: int) -> int:
        return rounds(tokens, v, device) * hidden_size + time_of_gradients(tokens, v, hidden_size, device)

    return columns_at_once(columns, most, step, time)


def differentiate_exactly(
    logits: Logits,
    normaliser: Normaliser,
    upstream: Upstream,
    dhidden_ND: torch.Tensor | None,
    dweight_VD: torch.Tensor | None,
    dbias_V: torch.Tensor | None,
    headroom: float,
    workspace_bytes: int,
    hidden_begun: bool = False,
    add_weight: bool = False,
    dadapter_NR: torch.Tensor | None = None,
    adapter_begun: bool = False,
    exponentials: Exponentials | None = None,
) -> None:
    """Adds to ``dhidden_ND`` (fp32; zeros, unless ``hidden_begun``) and writes ``dweight_VD`` (or adds to it, in fp32)
    and ``dbias_V``; adds to an adapter's ``dadapter_NR`` as to dE. ``exponentials``: what forward kept of the first
    columns, with ``dhidden_ND`` of zeros and no adapter."""
    hidden_ND, weight_VD = compacted(logits), logits.weight_VD
    trained_ND = hidden_ND if logits.adapter_NR is None else compacted(logits, logits.adapter_NR)
    rows, vocab = hidden_ND.shape[0], weight_VD.shape[0]
    factor = upstream.scale * (logits.logit_scale / headroom)
    kept = 0 if exponentials is None else exponentials.exp_NK.shape[1]
    begin = 0
    if exponentials is not None and exponentials.sloped:
        assert dbias_V is None and upstream.log_N is None and not hidden_begun and dadapter_NR is None
        begin = kept
        of_all = exponentials, logits, hidden_ND, upstream, normaliser
        _differentiate_kept(*of_all, dhidden_ND, dweight_VD, factor, workspace_bytes, add_weight)
        if kept == vocab:
            return
    # In bf16 a factor that is a power of two is exact in the hidden states, and spares a pass over dC (of fewer rows
    # than there are tokens that pass is the smaller one).
    scaled_ND = None
    exact_factor = hidden_ND.dtype == torch.bfloat16 and logits.logit_scale == 1.0
    writes_bf16 = dweight_VD is not None and dweight_VD.dtype == torch.bfloat16
    if exact_factor and (add_weight or (writes_bf16 and vocab > rows)):
        scaled_ND = trained_ND * factor.to(torch.bfloat16)
    if dhidden_ND is not None and hidden_begun:
        dhidden_ND /= _not_zero(factor)
    if dadapter_NR is not None and adapter_begun:
        dadapter_NR /= _not_zero(factor)
    chunk = _chunk_size(logits, vocab - begin, workspace_bytes)
    workspace = torch.empty(rows * min(chunk, vocab - begin), dtype=hidden_ND.dtype, device=hidden_ND.device)
    copy_vC = _memory_for_copies(logits, min(chunk, vocab - begin))
    parts = [(begin, kept), (kept, vocab)]
    for first, stop in [(x, min(x + chunk, end)) for start, end in parts for x in range(start, end, chunk)]:
        columns = stop - first
        p_Nv = workspace[: rows * columns].view(rows, columns)
        v = slice(first, first + columns)
        if exponentials is not None and first < kept:
            _read_probabilities(p_Nv, exponentials, logits, upstream, normaliser, first)
            weight_vD = weight_VD[v]
        else:
            weight_vD = _probabilities(p_Nv, logits, hidden_ND, upstream, normaliser, first, headroom, copy_vC)
        if dhidden_ND is not None:
            add_product(dhidden_ND, p_Nv, weight_vD)
        if dadapter_NR is not None and logits.adapter_VR is not None:
            add_product(dadapter_NR, p_Nv, logits.adapter_VR[v])
        if dweight_VD is not None and add_weight and scaled_ND is not None:
            add_product(dweight_VD[v], p_Nv.T, scaled_ND)
        elif dweight_VD is not None and add_weight:
            dweight_VD[v] += product(p_Nv.T, trained_ND).mul_(factor)
        elif dweight_VD is not None and scaled_ND is not None:
            torch.mm(p_Nv.T, scaled_ND, out=dweight_VD[v])
        elif dweight_VD is not None and exact_factor and writes_bf16:
            torch.mm(p_Nv.T, trained_ND, out=dweight_VD[v])
            dweight_VD[v] *= factor
        elif dweight_VD is not None and dweight_VD.dtype == torch.float32:
            write_product(dweight_VD[v], p_Nv.T, trained_ND)
            dweight_VD[v] *= factor
        elif dweight_VD is not None:
            dweight_VD[v] = product(p_Nv.T, trained_ND).mul_(factor)
        if dbias_V is not None:
            dbias_V[v] = p_Nv.sum(0, dtype=torch.float32) * factor
    if dhidden_ND is not None:
        dhidden_ND *= factor
    if dadapter_NR is not None:
        dadapter_NR *= factor


def differentiate_rows(
    logits: Logits,
    row_K: torch.Tensor,
    normaliser: Normaliser,
    upstream: Upstream,
    out: Gradients,
    headroom: float,
    workspace_bytes: int,
    add_weight: bool = False,
) -> None:
    """The same of some rows of the classifier: adds to dE, and writes these rows of dC (or adds to them) and dbias.

    ``logits.target_N`` are places in ``row_K``. Of rows, P and dC there is never more than a chunk.
    """
    hidden_ND, dhidden_ND = compacted(logits), out.hidden_ND
    trained_ND = hidden_ND if logits.adapter_NR is None else compacted(logits, logits.adapter_NR)
    rows, dtype = hidden_ND.shape[0], hidden_ND.dtype
    factor = upstream.scale * (logits.logit_scale / headroom)
    exact_factor = dtype == torch.bfloat16 and logits.logit_scale == 1.0  # see differentiate_exactly
    if dhidden_ND is not None and not exact_factor:
        dhidden_ND /= _not_zero(factor)
    row_bytes = max((rows + _columns_of_a_copy(logits)) * hidden_ND.element_size(), 1)
    chunk = max(workspace_bytes // row_bytes // logits.tile, 1) * logits.tile
    memory = torch.empty(rows * min(chunk, row_K.shape[0]), dtype=dtype, device=hidden_ND.device)
    copy_kC = _memory_for_copies(logits, min(chunk, row_K.shape[0]))
    for row_k, first in zip(row_K.split(chunk), range(0, row_K.shape[0], chunk), strict=True):
        weight_kD = logits.weight_VD.index_select(0, row_k)
        bias_k = None if logits.bias_V is None else logits.bias_V.index_select(0, row_k)
        target_N = logits.target_N - first if first else logits.target_N
        part = logits._replace(weight_VD=weight_kD, bias_V=bias_k, target_N=target_N, frequent_V=None)
        adapter_kR = None if logits.adapter_VR is None else logits.adapter_VR.index_select(0, row_k)
        part = part._replace(adapter_VR=adapter_kR)
        p_Nk = memory[: rows * row_k.shape[0]].view(rows, -1)
        rounded_kD = _probabilities(p_Nk, part, hidden_ND, upstream, normaliser, 0, headroom, copy_kC)
        if out.weight_VD is not None:
            exact = exact_factor and out.weight_VD.dtype == dtype
            dweight_kD = torch.mm(p_Nk.T, trained_ND) if exact else product(p_Nk.T, trained_ND)
            write_rows(out.weight_VD, dweight_kD.mul_(factor), row_k, add_weight)
            del dweight_kD
        if out.bias_V is not None:
            write_rows(out.bias_V, p_Nk.sum(0, dtype=torch.float32).mul_(factor), row_k)
        if dhidden_ND is not None:
            scaled_kD = rounded_kD.mul_(factor) if exact_factor else rounded_kD
            add_product(dhidden_ND, p_Nk, scaled_kD)
            del scaled_kD
        if out.adapter_NR is not None and adapter_kR is not None:
            out.adapter_NR.add_(product(p_Nk, adapter_kR).mul_(factor))
        del weight_kD, rounded_kD, part  # before the next chunk's
    if dhidden_ND is not None and not exact_factor:
        dhidden_ND *= factor
