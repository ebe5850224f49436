"""Rows in 8 bits for the first pass: e4m3 numbers, the largest at e4m3's 448, and one fp32 scale a row.

With a common row h near the mean of the hidden states and a common row m near that of the classifier,

    hidden · weight = h · weight + (hidden − h) · m + (hidden − h) · (weight − m)

and only the last product is rounded. What all logits of a token have in common and what all tokens' logits of a column
have in common (both can be large) are thus kept exactly, as offsets of rows and columns.

The error η of the last product has mean zero and a variance σ² ≈ Σ_d (r_id² w_jd² + e_id² r_jd²), r the rounding errors
of e = hidden − h and w = weight − m; so a sum of exp(z + η) is too large by the factor exp(σ²/2). That is taken out:
σ² is about A_i + B_j − K, with A_i = Σ_d (r_id² + ρ² e_id²) Q_d from the token, K = 2ρ² Σ_d P_d Q_d, and from the
column B_j = ‖w_j‖²·K / Σ_d Q_d; ρ² is the mean of a squared relative rounding error, P and Q are the variances of the
hidden states' and the classifier's numbers along D, from samples. Offsets hold it, so that it costs nothing. Under a
softcap σ² is A_i, and f' decides how much of it is taken out.

A row with NaN or inf becomes NaN. Grids: moments, one program a block of columns; rounding, one a block of rows, which
reads its rows twice, the second time from cache. Bytes: 3 an element.

Shapes: R rows, D hidden, N tokens, V local rows of the classifier.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .blocks import LOG2_E, add_adapter, softcapped, without_frequent
from .operands import LAUNCH

LARGEST = tl.constexpr(448.0)
_RELATIVE_VARIANCE = tl.constexpr(7e-4)
"""ρ², of one rounding; by as much rounding to e4m3 also shrinks a vector along itself. Measured on random and on
trained rows."""
_CUT_PER_COLUMN = 2.5e-6 / 32
"""Sums of 8-bit products are cut, not rounded: by 1.8e-6 for 32 columns of noise, 3e-6 to 4.6e-6 of trained rows, on an
H100."""
_MOST_FACTOR = tl.constexpr(2.0**126)  # its inverse is the smallest normal number: rows of less lose bits
_NOISE = 0.037
"""Relative error of a rounded product e_d·c_d; a sum's is at most NOISE·‖e‖₄·‖c‖₄ (Cauchy-Schwarz on Σ e²c²)."""
_DEVIATIONS = 4.0
_TOLERATED = tl.constexpr(0.9)
"""Four times the bound on the standard deviation (1.7 times it, for rows like noise) may be so many nats."""
_MOST_TAKEN_OUT = tl.constexpr(0.04)
"""Of log2 exp(σ²/2), by columns and by tokens: what more noise leaves to estimates counts for nothing."""
_HOPELESS = tl.constexpr(4.0)
"""Nats above the tolerated ones, and above twice the deviation of the logits, at which most pairs would be refined."""
_MARGIN_TOKENS = 1024
_ROWS, _SAMPLES, _SAMPLED_AT_ONCE, _SAMPLED_D = 4, 1024, 128, 32


@triton.jit
def _moments_kernel(
    out,
    x_RD,
    token_R,
    n_valid_ptr,
    R,
    D,
    stride_x,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean and variance of every column over evenly spread rows, or valid tokens; numbers that are not finite do not
    count."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    count = R
    if token_R is not None:
        count = tl.load(n_valid_ptr)
    first = tl.zeros([ROWS, BLOCK_D], tl.float32)
    second = tl.zeros([ROWS, BLOCK_D], tl.float32)
    number = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for sample in range(0, SAMPLES, ROWS):
        row = (sample + tl.arange(0, ROWS)).to(tl.int64) * count // SAMPLES
        use = row < count
        if token_R is not None:
            row = tl.load(token_R + row, mask=use, other=0).to(tl.int64)
        inside = use[:, None] & (columns < D)[None, :]
        x = tl.load(x_RD + row[:, None] * stride_x + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        inside = inside & (tl.abs(x) < float("inf"))
        x = tl.where(inside, x, 0.0)
        first += x
        second += x * x
        number += inside.to(tl.float32)
    total = tl.maximum(tl.sum(number, 0), 1.0)
    mean = tl.sum(first, 0) / total
    tl.store(out.mean_D + columns, mean, mask=columns < D)
    tl.store(out.variance_D + columns, tl.maximum(tl.sum(second, 0) / total - mean * mean, 0.0), mask=columns < D)


@triton.jit
def _rounded(y):
    """To the nearest number of e4m3, for |y| up to 448: multiples of an eighth of a power of two, at least of 2^-9."""
    power = (y.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    far = tl.maximum(power, 2.0**-6) * (1.5 * 2.0**20)  # sums with it have no finer bits
    return (y + far) - far


@triton.jit
def _load(x_RD, row, use, d, D, stride_x, BLOCK_D: tl.constexpr, KEEP: tl.constexpr):
    """BLOCK_D columns of the rows, to be kept in cache or not, and which they are."""
    columns = d + tl.arange(0, BLOCK_D)
    pointers = x_RD + row[:, None].to(tl.int64) * stride_x + columns[None, :]
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    x = tl.load(pointers, mask=use[:, None] & (columns < D)[None, :], other=0.0, eviction_policy=policy)
    return x.to(tl.float32), columns


@triton.jit
def _factor(largest, sums):
    """What brings the row to 448; NaN where it holds NaN or inf (the max alone would drop NaN, sums do not)."""
    is_finite = (sums == sums) & (largest < float("inf"))
    return tl.where(is_finite, tl.minimum(LARGEST / largest, _MOST_FACTOR), float("nan"))


@triton.jit
def _quantise_weight_kernel(
    out,
    largest_norm_ptr,
    weight_RD,
    bias_R,
    frequent_R,
    common,
    R,
    D,
    stride_weight,
    unit,
    correction,
    HAS_SOFTCAP: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows less the common one; offset = unit·(h · row + bias) − B, or −inf; the largest 4-norm of all rows."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    use = r < R
    # Reduced over columns once, at the end.
    largest = tl.zeros([ROWS, BLOCK_D], tl.float32)
    offset = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        row, columns = _load(weight_RD, r, use, d, D, stride_weight, BLOCK_D, True)
        x = row - tl.load(common.weight_D + columns, mask=columns < D, other=0.0)[None, :]
        largest = tl.maximum(largest, tl.abs(x))
        offset += row * tl.load(common.hidden_D + columns, mask=columns < D, other=0.0)[None, :]
    offset = tl.sum(offset, 1)
    factor = _factor(tl.max(largest, 1), offset)
    fourths = tl.zeros([ROWS, BLOCK_D], tl.float32)
    spread = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        row, columns = _load(weight_RD, r, use, d, D, stride_weight, BLOCK_D, False)
        y = (row - tl.load(common.weight_D + columns, mask=columns < D, other=0.0)[None, :]) * factor[:, None]
        square = y * y
        fourths += square * square
        spread += square
        if not ROUNDS:
            y = _rounded(y)
        pointers = out.rows_VD + r[:, None].to(tl.int64) * D + columns[None, :]
        tl.store(pointers, y.to(out.rows_VD.dtype.element_ty), mask=use[:, None] & (columns < D)[None, :])
    if bias_R is not None:
        offset += tl.load(bias_R + r, mask=use, other=0.0).to(tl.float32)
    offset *= unit
    if not HAS_SOFTCAP:
        variance = tl.load(common.column_variance) * tl.sum(spread, 1) / factor / factor
        offset -= tl.minimum(variance, _MOST_TAKEN_OUT)
    if frequent_R is not None:
        offset = tl.where(tl.load(frequent_R + r, mask=use, other=-1) >= 0, -float("inf"), offset)
    tl.store(out.scale_V + r, correction / factor, mask=use)
    tl.store(out.offset_V + r, offset, mask=use)
    norm = tl.where(use, tl.sqrt(tl.sqrt(tl.sum(fourths, 1))) / factor, 0.0)
    norm = tl.where(norm == norm, norm, float("inf"))
    norm = tl.max(norm, 0)
    if norm > tl.load(largest_norm_ptr, cache_modifier=".cg"):  # spares nearly all of the atomics
        tl.atomic_max(largest_norm_ptr, norm, sem="relaxed")


@triton.jit
def _quantise_hidden_kernel(
    out,
    hidden_ND,
    of_hidden,
    of_weight,
    token_N,
    n_valid_ptr,
    N,
    D,
    stride_hidden,
    unit,
    half_square,
    scale,
    correction,
    deviations,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The tokens token_N less the common row, of which n_valid count and the others are zero. See `QuantisedHidden`."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    use = (n < N) & (n < tl.load(n_valid_ptr))
    token = tl.load(token_N + n, mask=use, other=0)
    largest = tl.zeros([ROWS, BLOCK_D], tl.float32)
    offset = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        row, columns = _load(hidden_ND, token, use, d, D, stride_hidden, BLOCK_D, True)
        common = tl.load(of_hidden.mean_D + columns, mask=columns < D, other=0.0)
        x = tl.where(use[:, None], row - common[None, :], 0.0)
        other = tl.load(of_weight.mean_D + columns, mask=columns < D, other=0.0)
        largest = tl.maximum(largest, tl.abs(x))
        offset += x * other[None, :]
    offset = tl.sum(offset, 1)
    factor = _factor(tl.max(largest, 1), offset)
    fourths = tl.zeros([ROWS, BLOCK_D], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_D], tl.float32)
    along = tl.zeros([ROWS, BLOCK_D], tl.float32)  # y · rounded y
    spread = tl.zeros([ROWS, BLOCK_D], tl.float32)  # weighted with the classifier's variances, as is error
    error = tl.zeros([ROWS, BLOCK_D], tl.float32)
    common_spread = tl.zeros([BLOCK_D], tl.float32)
    expected = tl.zeros([BLOCK_D], tl.float32)
    column_square = tl.zeros([BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        row, columns = _load(hidden_ND, token, use, d, D, stride_hidden, BLOCK_D, False)
        common = tl.load(of_hidden.mean_D + columns, mask=columns < D, other=0.0)
        variance = tl.load(of_weight.variance_D + columns, mask=columns < D, other=0.0)
        own_variance = tl.load(of_hidden.variance_D + columns, mask=columns < D, other=0.0)
        y = tl.where(use[:, None], row - common[None, :], 0.0) * factor[:, None]
        rounded = _rounded(y)
        fourths += (y * y) * (y * y)
        squares += y * y
        along += y * rounded
        spread += y * y * variance[None, :]
        error += (rounded - y) * (rounded - y) * variance[None, :]
        common_spread += common * common * variance
        expected += own_variance * variance
        column_square += variance
        pointers = out.rows_ND + n[:, None].to(tl.int64) * D + columns[None, :]
        inside = (n < N)[:, None] & (columns < D)[None, :]
        tl.store(pointers, rounded.to(out.rows_ND.dtype.element_ty), mask=inside)
    along, spread = tl.sum(along, 1), tl.sum(spread, 1) / factor / factor
    variance = half_square * (tl.sum(error, 1) / factor / factor + _RELATIVE_VARIANCE * spread)
    offset *= unit
    expected = half_square * (2 * _RELATIVE_VARIANCE) * tl.sum(expected, 0)
    all_squares = tl.sum(column_square, 0)
    if tl.program_id(0) == 0:
        tl.store(out.column_variance, expected / tl.where(all_squares == 0, 1.0, all_squares))
    if not HAS_SOFTCAP:
        beyond = variance - expected
        offset -= tl.minimum(tl.maximum(beyond, -_MOST_TAKEN_OUT), _MOST_TAKEN_OUT)
    # Rounding shrinks each row along itself, by what is known here: that error would be common to all its logits.
    along = tl.where(along == 0, 1.0, tl.sum(squares, 1) / along)
    deviation = deviations * tl.abs(scale) * tl.sqrt(tl.sqrt(tl.sum(fourths, 1))) / factor
    spread = tl.abs(scale) * tl.sqrt(spread + tl.sum(common_spread, 0))
    tl.store(out.scale_N + n, unit * correction * along / factor, mask=n < N)
    tl.store(out.offset_N + n, offset, mask=n < N)
    tl.store(out.variance_N + n, tl.minimum(variance, _MOST_TAKEN_OUT), mask=n < N)
    tl.store(out.deviation_N + n, deviation, mask=n < N)
    tl.store(out.hopeless_N + n, deviation / (_TOLERATED + _HOPELESS + 2 * spread), mask=n < N)


@triton.jit
def _margin_kernel(margin_N, deviation_N, hopeless_N, largest_norm_ptr, N, TOKENS: tl.constexpr):
    """See `QuantisedHidden.margin`. Grid: blocks of tokens. Bytes: 12·N."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    largest_norm = tl.load(largest_norm_ptr)
    deviation = tl.load(deviation_N + n, mask=n < N, other=0.0) * largest_norm
    is_hopeless = tl.load(hopeless_N + n, mask=n < N, other=0.0) * largest_norm > 1
    margin = tl.where(deviation < _TOLERATED, 0.0, deviation - _TOLERATED)  # a NaN stays one
    tl.store(margin_N + n, tl.where(is_hopeless, float("inf"), margin), mask=n < N)


class Moments(NamedTuple):
    """Mean and variance of each column [D], fp32."""

    mean_D: torch.Tensor
    variance_D: torch.Tensor


class Common(NamedTuple):
    """The common rows [D] of the classifier and of the hidden states, and B/2 of a row whose squared norm is one."""

    weight_D: torch.Tensor
    hidden_D: torch.Tensor
    column_variance: torch.Tensor


class QuantisedWeight(NamedTuple):
    """Rows in e4m3 [V, D], their scales [V], and what is added to a column's logits [V]."""

    rows_VD: torch.Tensor
    scale_V: torch.Tensor
    offset_V: torch.Tensor


class QuantisedHidden(NamedTuple):
    """Compacted hidden states in e4m3, and a number of each token; where there is no softcap, logits are in base 2.

    Attributes:
        rows_ND, scale_N, offset_N: products times both scales, plus both offsets, are the logits.
        variance_N: half the variance of a logit's error, what a softcap leaves to be taken out.
        deviation_N: times the largest 4-norm of the classifier's rows, a bound on four standard deviations of an error.
        hopeless_N: times that norm, above 1 where most pairs would be refined: then an estimate is not worth its time.
        column_variance: times the squared norm of a classifier's row, B/2.
    """

    rows_ND: torch.Tensor
    scale_N: torch.Tensor
    offset_N: torch.Tensor
    variance_N: torch.Tensor
    deviation_N: torch.Tensor
    hopeless_N: torch.Tensor
    column_variance: torch.Tensor

    def margin(self, largest_norm: torch.Tensor) -> torch.Tensor:
        """Nats by which a pair's mass may be more than estimated; infinite where nothing was estimated."""
        margin_N = torch.empty_like(self.deviation_N)
        tokens = margin_N.shape[0]
        _margin_kernel[(triton.cdiv(tokens, _MARGIN_TOKENS),)](
            margin_N, self.deviation_N, self.hopeless_N, largest_norm, tokens, TOKENS=_MARGIN_TOKENS, **LAUNCH
        )
        return margin_N


class InEightBits(NamedTuple):
    """What turns 8-bit products into logits; see `QuantisedHidden` and `QuantisedWeight`."""

    row_scale_N: torch.Tensor
    column_scale_V: torch.Tensor
    offset_N: torch.Tensor
    offset_V: torch.Tensor
    variance_N: torch.Tensor
    hopeless_N: torch.Tensor
    largest_norm: torch.Tensor


@triton.jit
def logits_in_8_bits(
    operands,
    in_8_bits,
    products,
    columns,
    row_scale_n,
    offset_n,
    variance_n,
    token_n,
    valid,
    PRECISION: tl.constexpr,
):
    """Base-2 logits of a block of 8-bit products, without the known bias of their exponentials; −inf past the last
    column and in those of frequent rows, whose offsets are that."""
    inside = columns < operands.V
    column_scale = tl.load(in_8_bits.column_scale_V + columns, mask=inside, other=0.0)
    column_offset = tl.load(in_8_bits.offset_V + columns, mask=inside, other=-float("inf"))
    z = products * row_scale_n[:, None] * column_scale[None, :] + (offset_n[:, None] + column_offset[None, :])
    if operands.adapter_NR is not None:  # in 16 bits: it is small, and so adds nothing to the error
        unit = operands.scale
        if operands.softcap is None:
            unit = unit * LOG2_E
        z = add_adapter(z, operands, token_n, valid, columns, unit, PRECISION)
    if operands.softcap is not None:
        z, slope = softcapped(z, operands.softcap)
        # The mean of exp(f(x + η)) is exp(f)·(1 + (f'² + f'')·σ²/2), and f'' = −2·f·f'/softcap².
        z -= slope * (slope - z * (2 / (LOG2_E * operands.softcap * operands.softcap))) * variance_n[:, None]
        z = without_frequent(operands, tl.where(inside[None, :], z, -float("inf")), columns)
    return z


def moments(x_RD: torch.Tensor, token_R: torch.Tensor | None = None, n_valid: torch.Tensor | None = None) -> Moments:
    """Of the rows, or of the valid tokens; 0 where no row has a finite number."""
    rows, columns = x_RD.shape
    both = Moments(*torch.empty((2, columns), dtype=torch.float32, device=x_RD.device))
    _moments_kernel[(triton.cdiv(columns, _SAMPLED_D),)](
        both,
        x_RD,
        token_R,
        n_valid,
        rows,
        columns,
        x_RD.stride(0),
        SAMPLES=_SAMPLES,
        ROWS=_SAMPLED_AT_ONCE,
        BLOCK_D=_SAMPLED_D,
        **LAUNCH,
    )
    return both


def quantise_weight(
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    frequent_V: torch.Tensor | None,
    common: Common,
    logit_scale: float,
    has_softcap: bool,
    largest_norm: torch.Tensor,
    memory_VD: torch.Tensor,
) -> QuantisedWeight:
    """weight − common row, in ``memory_VD``; ``largest_norm`` [1] becomes at least that of each of the rows."""
    rows, columns = weight_VD.shape
    scale_V, offset_V = torch.empty((2, rows), dtype=torch.float32, device=weight_VD.device)
    quantised = QuantisedWeight(memory_VD, scale_V, offset_V)
    _quantise_weight_kernel[(triton.cdiv(rows, _ROWS),)](
        quantised,
        largest_norm,
        weight_VD,
        bias_V,
        frequent_V,
        common,
        rows,
        columns,
        weight_VD.stride(0),
        _unit(logit_scale, has_softcap),
        1 + _RELATIVE_VARIANCE.value,
        HAS_SOFTCAP=has_softcap,
        ROUNDS=memory_VD.dtype == torch.float8_e4m3fn,  # by the conversion
        ROWS=_ROWS,
        BLOCK_D=_block_d(columns),
        **LAUNCH,
    )
    return quantised


def quantise_hidden(
    hidden_ND: torch.Tensor,
    of_hidden: Moments,
    of_weight: Moments,
    token_N: torch.Tensor,
    n_valid: torch.Tensor,
    logit_scale: float,
    has_softcap: bool,
) -> QuantisedHidden:
    """hidden − common row, compacted."""
    rows, columns = token_N.shape[0], hidden_ND.shape[1]
    device = hidden_ND.device
    rows_ND = torch.empty((rows, columns), dtype=storage_dtype(hidden_ND), device=device)
    scale_N, offset_N, variance_N, deviation_N, hopeless_N = torch.empty((5, rows), dtype=torch.float32, device=device)
    hidden = QuantisedHidden(
        rows_ND, scale_N, offset_N, variance_N, deviation_N, hopeless_N, column_variance=scale_N.new_empty(1)
    )
    _quantise_hidden_kernel[(triton.cdiv(rows, _ROWS),)](
        hidden,
        hidden_ND,
        of_hidden,
        of_weight,
        token_N,
        n_valid,
        rows,
        columns,
        hidden_ND.stride(0),
        _unit(logit_scale, has_softcap),
        logit_scale * logit_scale * LOG2_E.value / 2,
        logit_scale,
        1 + _CUT_PER_COLUMN * columns,
        _DEVIATIONS * _NOISE,
        HAS_SOFTCAP=has_softcap,
        ROWS=_ROWS,
        BLOCK_D=_block_d(columns),
        **LAUNCH,
    )
    return hidden


def storage_dtype(x: torch.Tensor) -> torch.dtype:
    """Triton's interpreter knows no 8-bit floats: there fp16 holds the same numbers."""
    return torch.float8_e4m3fn if x.is_cuda else torch.float16


def _unit(logit_scale: float, has_softcap: bool) -> float:
    """What products are multiplied with: logits are in base 2, or what the softcap gets."""
    return logit_scale if has_softcap else logit_scale * LOG2_E.value


def _block_d(columns: int) -> int:
    return 512 if columns > 3072 else 256  # measured on an H100
