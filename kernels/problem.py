"""What the kernels compute on: one shard's logits, never formed, and what forward leaves for backward.

Shapes: N tokens, D hidden, V local classifier rows, T tiles of ``tile`` consecutive rows, S splits of the vocabulary.
Tokens are compacted, the valid ones first, in every [N] and [T, N] but the hidden states, which stay where they are.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

TILE = 128
"""Consecutive classifier rows whose softmax mass is kept or dropped together."""
MOST_DRAWN = 256
"""`Filter.most_drawn` for the whole vocabulary; a shard has its share of it."""
SUM_BITS = 40
"""Sums of tiles are added as whole numbers of 2^-SUM_BITS of the exponential of the largest logit."""
MOST_SUMMED = 1 << (63 - SUM_BITS)
"""Fewer rows than these have a sum that an int64 holds: none is above exp(0)."""
FAR = -1e5
"""Where a logarithm of something that does not count is cut off, since 0 · −∞ is no number."""

KEPT_SUMS_BYTES = 1 << 26
"""Of dC of kept logits that is summed in fp32 at a time: 512 blocks of 128 x 256, which fill the multiprocessors."""


class Logits(NamedTuple):
    """z_ij = τ_i·f(s·(e_i·c_j + bias_j)) with f(x) = softcap·tanh(x / softcap), or the identity.

    Attributes:
        hidden_ND: fp32, fp16 or bf16 (fp64 in the torch backend), contiguous rows, in the order before compaction; what
            stands in the rows of tokens that are not valid is never used.
        weight_VD: in the dtype of hidden, or in fp32 where that is bf16; contiguous rows.
        bias_V: or None.
        target_N: int32, the local column of the row's label, −1 where it is on another shard or the row is not valid.
        token_N: int32, the row's place before compaction: its row of hidden_ND, and its name for random draws.
        place_N: int32, the inverse of token_N: where a row of hidden_ND stands among the compacted.
        tile_key_T: int32, a name for each tile that no other shard uses.
        n_valid: int32 [1], on the device.
        frequent_V: int32, not below 0 in frequent rows, which are computed apart (see cce_dist/loss/frequent.py): they
            are not in tiles, nor in what backward computes. Of forward's sums a first pass in 8 bits leaves them out; a
            full one has them. None: there are none.
        inverse_temperature_N: τ in the accumulator's dtype; None: 1. `Upstream` has it too. The 8-bit pass has none.
        adapter_NR, adapter_VR: a and B of e_i·c_j + a_i·b_j, R small, contiguous, in the dtype of hidden; rows of a are
            named as those of hidden_ND. None: there is no adapter. With one the gradient of rows is B's, never C's.
    """

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    target_N: Tensor
    token_N: Tensor
    place_N: Tensor
    tile_key_T: Tensor
    n_valid: Tensor
    logit_scale: float
    softcap: float | None
    frequent_V: Tensor | None = None
    inverse_temperature_N: Tensor | None = None
    tile: int = TILE
    adapter_NR: Tensor | None = None
    adapter_VR: Tensor | None = None

    @property
    def trained(self) -> tuple[Tensor, Tensor]:
        """(x [N, ·], rows [V, ·]), of which the gradient of rows is one: hidden states and C, or an adapter's a and
        B."""
        if self.adapter_NR is None or self.adapter_VR is None:
            return self.hidden_ND, self.weight_VD
        return self.adapter_NR, self.adapter_VR

    @property
    def num_tokens(self) -> int:
        """Of the compacted ones, which may be some of those that hidden_ND holds."""
        return self.token_N.shape[0]

    @property
    def num_tiles(self) -> int:
        return -(-self.weight_VD.shape[0] // self.tile)

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.hidden_ND.dtype == torch.float64 else torch.float32


class Tiles(NamedTuple):
    """The log-sum-exp of each (tile, row) of a shard alone, from which backward selects.

    Attributes:
        lse_TN: the triton backend stores base-2 logarithms relative to ``reference_SN`` (fp16 for 16-bit inputs), the
            torch backend absolute natural ones in the accumulator's dtype.
        reference_SN: base-2 log-sum-exp of one of the first tiles of each split that have a finite one, 0 where none
            has; None in the torch backend.
        tiles_per_split: consecutive tiles that share a reference; 0 in the torch backend.
    """

    lse_TN: Tensor
    reference_SN: Tensor | None = None
    tiles_per_split: int = 0


class Keep(NamedTuple):
    """What forward keeps for an exact backward: `Exponentials` of the first ``columns``, times f' if ``sloped``."""

    columns: int
    sloped: bool


class Exponentials(NamedTuple):
    """exp(z − origin) of some columns [N, K], which a factor for each token turns into its softmax.

    Attributes:
        exp_NK: in hidden's dtype; 0 for tokens that are not valid. Rows may be apart.
        origin_N: in the backend's unit, not far from the token's largest logit on this shard.
        target_N: see `Summary`.
        sloped: whether they are times f'.
    """

    exp_NK: Tensor
    origin_N: Tensor
    target_N: Tensor
    sloped: bool = False


class Summary(NamedTuple):
    """Forward's result on one shard.

    Attributes:
        max_N, sumexp_N: local max m and Σ exp(z − m); m in the backend's unit.
        target_N: the target's logit where this shard holds it, else 0.
        unit: 1 in the torch backend, ln 2 in the triton backend, which computes in base 2.
        tiles: or None when backward will not filter.
        weighted_N: Σ exp(z − m)·(z − m), in the backend's unit, for the entropy; None where that is not wanted.
        exponentials: what is kept for backward, if anything is.
    """

    max_N: Tensor
    sumexp_N: Tensor
    target_N: Tensor
    unit: float
    tiles: Tiles | None = None
    weighted_N: Tensor | None = None
    exponentials: Exponentials | None = None


class GlobalTiles(NamedTuple):
    """Tiles that begin at multiples of ``Logits.tile`` in the GLOBAL vocabulary, as a matrix of rows holds them.

    Attributes:
        spans: of each the first of its rows there, and their number: ``Logits.tile``, or fewer at the vocabulary's end.
        row_T, rows_T: the same, int32, on the device.
    """

    spans: tuple[tuple[int, int], ...]
    row_T: Tensor
    rows_T: Tensor


class TileSums(NamedTuple):
    """Of `GlobalTiles`, what does not depend on other tiles or tokens, bit for bit; in the accumulator's dtype.

    Attributes:
        max_TN, sumexp_TN: max m and Σ exp(z − m) of each (tile, token); m in the backend's unit. Of tokens that are not
            valid they may be anything.
        max_N: the largest max; 0 for tokens that are not valid.
        target_N: the target's logit in the backend's unit, as its tile has it; 0 where it is in none.
        unit: see `Summary`.
    """

    max_TN: Tensor
    sumexp_TN: Tensor
    max_N: Tensor
    target_N: Tensor
    unit: float


class Share(NamedTuple):
    """Some of the compacted tokens: m is token first + turn + turns·m of all, the first valid_M of them.

    Attributes:
        first, valid_M: int32 [1], on the device.
    """

    first: Tensor
    valid_M: Tensor
    turn: int
    turns: int


class Estimate(NamedTuple):
    """A summary from a first pass in 8 bits, and the nats [N] by which `refine` must lower eps, since its tiles' masses
    may be off by more than what is tolerated; infinite where nothing was estimated."""

    summary: Summary
    margin_N: Tensor


class Normaliser(NamedTuple):
    """lse_i = log Σ_j exp z_ij over the whole vocabulary, in two numbers and the backend's unit.

    At logits near −200 one fp32 number would be off by 1e-5, and with it every softmax of the row: an error of dE that
    does not cancel. softmax = exp(unit·((z / unit − max) − log_sum)).
    """

    max_N: Tensor
    log_sum_N: Tensor
    unit: float

    @property
    def lse_N(self) -> Tensor:
        # One rounding on a GPU, where this is a fused multiply-add.
        return torch.add(self.log_sum_N * self.unit, self.max_N, alpha=self.unit)

    def nll(self, target_N: Tensor) -> Tensor:
        """lse − target logit, by way of the max, which is nearer to both."""
        return (self.max_N * self.unit - target_N) + self.log_sum_N * self.unit


class Filter(NamedTuple):
    """Which (row, tile) pairs backward recomputes.

    Attributes:
        mode: "exact": all. "filtered": those with softmax mass above ``eps``, and the targets'. "unbiased": those, and
            each other one with probability mass / eps_i and the weight eps_i / mass.
        eps: softmax mass of a (row, tile) pair.
        most_drawn: pairs of a row that are drawn at the most, on average: eps_i is ``eps``, or the row's mass in small
            pairs / most_drawn where that is more. It bounds the work where the softmax is flat, as at initialisation.
        tail: give what is not kept its mean-field gradient (always so in "unbiased").
        seed: int64 [1] on the device; keys the draws together with token_N and tile_key_T.
        uniform: one number in [0, 1) used for every draw, to test the unbiasedness without luck.
    """

    mode: Literal["exact", "filtered", "unbiased"]
    eps: float = 0.0
    tail: bool = True
    most_drawn: float = math.inf
    seed: Tensor | None = None
    uniform: float | None = None


class Order(NamedTuple):
    """A permutation that brings the valid tokens to the front, in their order.

    Attributes:
        token_N: int32, where the tokens at the front come from.
        place_N: int32, the inverse: where each token went.
        n_valid: int32 [1], on the device.
    """

    token_N: Tensor
    place_N: Tensor
    n_valid: Tensor

    def restore(self, values_N: Tensor) -> Tensor:
        """Values [N] back in the order before, 0 where not valid."""
        values_N = values_N.index_select(0, self.place_N)
        return values_N.masked_fill_(self.place_N >= self.n_valid, 0)


class Ordered(NamedTuple):
    """What comes of labels.

    Attributes:
        target_N: int32, the column of each token of the order; −1 of those that are not valid or have none here.
        legal: 0-d, on the device: whether all labels are allowed.
    """

    order: Order
    target_N: Tensor
    legal: Tensor


class OutputGradients(NamedTuple):
    """The upstream gradients of nll, lse and entropy of each token [N], in the order before compaction; None: 0."""

    nll_N: Tensor | None
    lse_N: Tensor | None = None
    entropy_N: Tensor | None = None


def largest_scale(hidden_dtype: torch.dtype, dtype: torch.dtype) -> int:
    """The largest power of two that `Upstream.scale` is, whose upstream gradients are of ``dtype``: the next one is
    infinite. With bf16 it is 2^60, since hidden states and rows are multiplied with it, and must not overflow."""
    return 60 if hidden_dtype == torch.bfloat16 else math.frexp(torch.finfo(dtype).max)[1] - 1


class Upstream(NamedTuple):
    """dL/d(s(e·c + bias))_ij = scale·(p_ij·(softmax_N[i] + log_N[i]·log p_ij) − target_N[i]·1[j = y_i])·f'_ij.

    p is the softmax. With H = −Σ p log p, dH/dz_j = −p_j·(log p_j + H).

    Attributes:
        softmax_N: τ_i·a_i / scale, a the upstream of nll plus that of lse, less that of the entropy times the entropy;
            0 in rows that are not valid.
        target_N: τ_i·b_i / scale, b the upstream of nll.
        scale: 0-d power of two on the device, the next above the largest of them, so that the rest is at most 1 in 16
            bits, but at most that of `largest_scale`.
        log_N: −τ_i·g_i / scale, g the upstream of the entropy; None where there is none.
    """

    softmax_N: Tensor
    target_N: Tensor
    scale: Tensor
    log_N: Tensor | None = None


class Wanted(NamedTuple):
    """Which gradients backward computes, dC's dtype, and the bytes that it may use for recomputed probabilities.

    ``onto_VD``: what dC is added to, in place, in the accumulator's dtype; None: dC is new. ``adapter``: da of one.
    ``weight`` is then about B in place of C.
    """

    hidden: bool
    weight: bool
    bias: bool
    weight_dtype: torch.dtype
    workspace_bytes: int
    onto_VD: Tensor | None = None
    adapter: bool = False


class Gradients(NamedTuple):
    """dE_ND (fp32, a partial sum over shards, compacted order), dC_VD (weight_dtype; with an adapter dB [V, R] in its
    place), dbias_V (fp32), da_NR of an adapter (as dE); or None."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    adapter_NR: Tensor | None = None
