"""Two heads over the same rows, a student's and a teacher's: what rows add to each divergence, and its gradient.

The readable reference of `triton/two_heads.py`, on any device. Sums go over chunks of rows, both heads' logits side by
side in fp32 (fp64 for fp64). s and t are the probabilities, m = β·t + (1 − β)·s; formulas are those of
`cce_dist/distillation/divergence.py`.

Shapes: N tokens, D hidden, V rows, v rows of a chunk.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .problem import TILE
from .products import product

Kind = Literal["forward", "reverse", "jsd"]

LOWEST = -1e30
"""What stands for −∞ among logits: differences of two are numbers still."""
_ALIVE = 6  # logits of a chunk that are in memory at a time


class Side(NamedTuple):
    """z = f(scale·(hidden·weightᵀ + bias)) of one head, f the softcap or the identity; weight is cast to hidden's
    dtype."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None

    def rows(self, v: slice) -> "Side":
        return self._replace(weight_VD=self.weight_VD[v], bias_V=None if self.bias_V is None else self.bias_V[v])


def dtype_of(student: Side, teacher: Side) -> torch.dtype:
    """Of logits, and of sums over them."""
    return torch.promote_types(torch.promote_types(student.hidden_ND.dtype, teacher.hidden_ND.dtype), torch.float32)


def gradient_bytes(student: Side, teacher: Side) -> int:
    """Of memory that `slope` takes for a row."""
    return student.hidden_ND.shape[0] * dtype_of(student, teacher).itemsize * _ALIVE


def sums(student: Side, teacher: Side, kind: Kind, workspace_bytes: int) -> Tensor:
    """[5, N]: max z and Σ exp(z − max) of the student, then of the teacher; then, with the weights of the teacher in
    "forward" and of the student in "reverse", Σ exp(z − max)·(z − z of the other)."""
    tokens, dtype = student.hidden_ND.shape[0], dtype_of(student, teacher)
    sums_5N = torch.zeros((5, tokens), dtype=dtype, device=student.hidden_ND.device)
    sums_5N[0], sums_5N[2] = LOWEST, LOWEST
    for z_s, z_t in _chunks(student, teacher, workspace_bytes):
        max_s, sum_s, max_t, sum_t, weighted = sums_5N.clone()
        new_s, new_t = torch.maximum(max_s, z_s.amax(1)), torch.maximum(max_t, z_t.amax(1))
        decay_s, decay_t = (max_s - new_s).exp(), (max_t - new_t).exp()
        e_s, e_t = (z_s - new_s[:, None]).exp_(), (z_t - new_t[:, None]).exp_()
        if kind == "forward":
            weighted = weighted * decay_t + (e_t * z_t.sub_(z_s)).sum(1)
        elif kind == "reverse":
            weighted = weighted * decay_s + (e_s * z_s.sub_(z_t)).sum(1)
        torch.stack((new_s, sum_s * decay_s + e_s.sum(1), new_t, sum_t * decay_t + e_t.sum(1), weighted), out=sums_5N)
    return sums_5N


def mixture(student: Side, teacher: Side, lse_2N: Tensor, beta: float, workspace_bytes: int) -> Tensor:
    """[2, N]: Σ s·log(s/m) and Σ t·log(t/m); ``lse_2N``: over the rows of all ranks, of the student and of the
    teacher."""
    parts_2N = torch.zeros_like(lse_2N)
    for log_s, log_t in _chunks(student, teacher, workspace_bytes):
        log_s, log_t = log_s.sub_(lse_2N[0][:, None]), log_t.sub_(lse_2N[1][:, None])
        difference = log_t - log_s
        ratio = log_to_mixture(difference, beta)
        parts_2N += torch.stack(((log_s.exp() * ratio).sum(1), (log_t.exp() * difference.add_(ratio)).sum(1)))
    return parts_2N


def slope(
    student: Side,
    teacher: Side,
    lse_2N: Tensor,
    mean_ratio_N: Tensor | None,
    factor_N: Tensor,
    kind: Kind,
    beta: float,
) -> Tensor:
    """[N, V] in the dtype of the student's hidden states: ``factor`` times the gradient of each token's divergence with
    respect to the student's scaled products, all rows in one chunk.

    ``mean_ratio_N``: Σ s·r over the rows of all ranks, r = log(s/t) for "reverse" and log(s/m) for "jsd".
    """
    dtype = dtype_of(student, teacher)
    z_s, z_t = _logits(student, dtype), _logits(teacher, dtype)
    chain = None if student.softcap is None else 1 - (z_s / student.softcap).square_()
    log_s, log_t = z_s.sub_(lse_2N[0][:, None]), z_t.sub_(lse_2N[1][:, None])
    if mean_ratio_N is None:
        slope_NV = log_s.exp_().sub_(log_t.exp_())
    elif kind == "reverse":
        slope_NV = (log_s - log_t).sub_(mean_ratio_N[:, None]).mul_(log_s.exp_())
    else:
        ratio = log_to_mixture(log_t.sub_(log_s), beta)
        slope_NV = ratio.sub_(mean_ratio_N[:, None]).mul_(1 - beta).mul_(log_s.exp_())
    if chain is not None:
        slope_NV.mul_(chain)
    return slope_NV.mul_(factor_N[:, None]).to(student.hidden_ND.dtype)


def log_to_mixture(difference: Tensor, beta: float) -> Tensor:
    """log(s/m) from log(t/s): by the larger of s and t, so that nothing overflows."""
    below = torch.log1p(beta * torch.expm1(difference.clamp(max=0)))
    above = difference + torch.log1p((1 - beta) * torch.expm1(-difference.clamp(min=0)))
    return -torch.where(difference <= 0, below, above)


def chunks_of_rows(rows: int, row_bytes: int, workspace_bytes: int) -> Iterator[slice]:
    """Whole tiles, of equal size: the last products would otherwise be thin ones."""
    most = max(workspace_bytes // max(row_bytes, 1) // TILE, 1) * TILE
    parts = max(-(-rows // most), 1)
    size = max(-(-rows // parts // TILE) * TILE, TILE)
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def _chunks(student: Side, teacher: Side, workspace_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Both heads' logits of some rows at a time."""
    dtype = dtype_of(student, teacher)
    for v in chunks_of_rows(student.weight_VD.shape[0], gradient_bytes(student, teacher), workspace_bytes):
        yield _logits(student.rows(v), dtype), _logits(teacher.rows(v), dtype)


def _logits(side: Side, dtype: torch.dtype) -> Tensor:
    z_Nv = product(side.hidden_ND, side.weight_VD.to(side.hidden_ND.dtype).T).to(dtype)
    if side.bias_V is not None:
        z_Nv += side.bias_V.to(dtype)
    z_Nv *= side.scale
    if side.softcap is not None:
        z_Nv.div_(side.softcap).tanh_().mul_(side.softcap)
    return z_Nv.clamp_(min=LOWEST)
