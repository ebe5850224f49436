"""What kernels take as one argument: NamedTuples of tensors and numbers, which Triton hands on to the functions within.

In: `Logits`, `Filter` and the like of `problem`. Out: tuples that ARE arguments, `kernel[grid](operands, pairs, ...)`.
A field that is None is known when a kernel is compiled: `if operands.bias is not None` chooses code, not at run time.
Tensor descriptors cannot stand in a tuple (Triton 3.6), so a matrix that may be one is an argument of its own.

Shapes: N tokens, D hidden, V local rows, T tiles, S splits, R rank of an adapter.
"""

from typing import Any, NamedTuple

import torch

from ..problem import Logits

LAUNCH: dict[str, Any] = {"enable_fp_fusion": True}
"""Options of every launch. Products and sums become fused multiply-adds, whatever Triton's default is: it changes."""


class Operands(NamedTuple):
    """z = τ·f(scale·(e·c + bias)), and the tokens: the fields of `Logits`.

    Attributes:
        hidden: [N, D], rows named by token_N; what is loaded in blocks is an argument of its own.
        softcap: None: f is the identity.
        adapter_NR, adapter_VR, R: of an adapter, or all None; contiguous.
    """

    hidden: torch.Tensor
    bias: torch.Tensor | None
    frequent_V: torch.Tensor | None
    target_N: torch.Tensor
    token_N: torch.Tensor
    place_N: torch.Tensor
    n_valid: torch.Tensor
    N: int
    V: int
    D: int
    stride_hidden: int
    stride_weight: int
    scale: float
    softcap: float | None
    inverse_temperature_N: torch.Tensor | None
    adapter_NR: torch.Tensor | None
    adapter_VR: torch.Tensor | None
    R: int | None


def operands_of(logits: Logits) -> Operands:
    hidden_ND, weight_VD = logits.hidden_ND, logits.weight_VD
    return Operands(
        hidden_ND,
        logits.bias_V,
        logits.frequent_V,
        logits.target_N,
        logits.token_N,
        logits.place_N,
        logits.n_valid,
        logits.num_tokens,
        weight_VD.shape[0],
        hidden_ND.shape[1],
        hidden_ND.stride(0),
        weight_VD.stride(0),
        logits.logit_scale,
        logits.softcap,
        logits.inverse_temperature_N,
        logits.adapter_NR,
        logits.adapter_VR,
        None if logits.adapter_VR is None else logits.adapter_VR.shape[1],
    )


class Pairs(NamedTuple):
    """Which (token, tile) pairs count, and with what weight: what `select.pair_weight` decides from.

    Attributes:
        tile_lse_TN, reference_SN, tiles_per_split: see `problem.Tiles`.
        lse2_N: the global log-sum-exp in base 2.
        eps: softmax mass of a pair that is large.
        eps_N: what small pairs are drawn by; None: they are dropped.
        tile_key_T, seed: key the draws, with token_N.
        uniform: one number for every draw; None: they are random.
    """

    tile_lse_TN: torch.Tensor
    reference_SN: torch.Tensor
    tiles_per_split: int
    lse2_N: torch.Tensor
    eps: float
    eps_N: torch.Tensor | None
    tile_key_T: torch.Tensor
    seed: torch.Tensor | None
    uniform: float | None

    @property
    def num_tiles(self) -> int:
        return self.tile_lse_TN.shape[0]


class Kept(NamedTuple):
    """The tokens kept with each tile: the first ``count_T`` of each row of a matrix [T, N], whose rows are ``stride``
    apart; in 16 bits where they suffice."""

    list_TN: torch.Tensor
    stride: int
    count_T: torch.Tensor


class Tail(NamedTuple):
    """What the tail adds to dC: π of each row, (R E) of each tile and, with a bias, Σ R; None where there is none.

    (Triton 3.6 cannot ask a tuple that holds a None whether it is None itself.)
    """

    pi_V: torch.Tensor | None = None
    sum_TD: torch.Tensor | None = None
    sum_T: torch.Tensor | None = None
