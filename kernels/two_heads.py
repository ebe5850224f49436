"""What a chunk of two heads' logits, a student's and a teacher's, adds to each token's divergence, and its gradient.

The readable reference of `triton/two_heads.py`, on any device. In: products of both heads' hidden states with some
rows, in fp32 (fp64 for fp64), which are used up. s and t are the probabilities, m = β·t + (1 − β)·s; formulas are those
of `cce_dist/distillation/divergence.py`.

Shapes: N tokens, v rows of a chunk.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["forward", "reverse", "jsd"]

ALIVE = 6
"""Tensors of a chunk's size, in the dtype of logits, that are alive at a time."""
LOWEST = -1e30
"""What stands for −∞ among logits: differences of two are numbers still."""


class Side(NamedTuple):
    """z = f(scale·(products + bias)) of one head, f the softcap or the identity."""

    products_Nv: Tensor
    bias_v: Tensor | None
    scale: float
    softcap: float | None


def no_sums(tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[5, N] of no row: what `add` adds to."""
    sums_5N = torch.zeros((5, tokens), dtype=dtype, device=device)
    sums_5N[0], sums_5N[2] = LOWEST, LOWEST
    return sums_5N


def add(sums_5N: Tensor, student: Side, teacher: Side, kind: Kind) -> None:
    """Of each token, in place: max z and Σ exp(z − max) of the student, then of the teacher; then, with the weights of
    the teacher in "forward" and of the student in "reverse", Σ exp(z − max)·(z − z of the other)."""
    z_s, z_t = _logits(student), _logits(teacher)
    max_s, sum_s, max_t, sum_t, weighted = sums_5N.clone()
    new_s, new_t = torch.maximum(max_s, z_s.amax(1)), torch.maximum(max_t, z_t.amax(1))
    decay_s, decay_t = (max_s - new_s).exp(), (max_t - new_t).exp()
    e_s, e_t = (z_s - new_s[:, None]).exp_(), (z_t - new_t[:, None]).exp_()
    if kind == "forward":
        weighted = weighted * decay_t + (e_t * z_t.sub_(z_s)).sum(1)
    elif kind == "reverse":
        weighted = weighted * decay_s + (e_s * z_s.sub_(z_t)).sum(1)
    torch.stack((new_s, sum_s * decay_s + e_s.sum(1), new_t, sum_t * decay_t + e_t.sum(1), weighted), out=sums_5N)


def add_mixture(parts_2N: Tensor, student: Side, teacher: Side, lse_2N: Tensor, beta: float) -> None:
    """Adds Σ s·log(s/m) and Σ t·log(t/m); ``lse_2N``: over all rows, of the student and of the teacher."""
    log_s, log_t = (_logits(side).sub_(lse_N[:, None]) for side, lse_N in zip((student, teacher), lse_2N, strict=True))
    difference = log_t - log_s
    ratio = log_to_mixture(difference, beta)
    parts_2N += torch.stack(((log_s.exp() * ratio).sum(1), (log_t.exp() * difference.add_(ratio)).sum(1)))


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
    """``out_Nv`` becomes ``factor`` times the gradient of each token's divergence with respect to the student's scaled
    products; its rows may be apart.

    ``mean_ratio_N``: Σ s·r over all rows, r = log(s/t) for "reverse" and log(s/m) for "jsd".
    """
    z_s, z_t = _logits(student), _logits(teacher)
    chain = None if student.softcap is None else 1 - (z_s / student.softcap).square_()
    log_s, log_t = z_s.sub_(lse_2N[0][:, None]), z_t.sub_(lse_2N[1][:, None])
    if mean_ratio_N is None:
        slope_Nv = log_s.exp_().sub_(log_t.exp_())
    elif kind == "reverse":
        slope_Nv = (log_s - log_t).sub_(mean_ratio_N[:, None]).mul_(log_s.exp_())
    else:
        ratio = log_to_mixture(log_t.sub_(log_s), beta)
        slope_Nv = ratio.sub_(mean_ratio_N[:, None]).mul_(1 - beta).mul_(log_s.exp_())
    if chain is not None:
        slope_Nv.mul_(chain)
    out_Nv.copy_(slope_Nv.mul_(factor_N[:, None]))


def log_to_mixture(difference: Tensor, beta: float) -> Tensor:
    """log(s/m) from log(t/s): by the larger of s and t, so that nothing overflows."""
    below = torch.log1p(beta * torch.expm1(difference.clamp(max=0)))
    above = difference + torch.log1p((1 - beta) * torch.expm1(-difference.clamp(min=0)))
    return -torch.where(difference <= 0, below, above)


def _logits(side: Side) -> Tensor:
    z_Nv = side.products_Nv
    if side.bias_v is not None:
        z_Nv += side.bias_v.to(z_Nv.dtype)
    z_Nv *= side.scale
    if side.softcap is not None:
        z_Nv.div_(side.softcap).tanh_().mul_(side.softcap)
    return z_Nv.clamp_(min=LOWEST)
