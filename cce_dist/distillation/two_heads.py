"""Two heads over one vocabulary, chunk by chunk: the divergence of each token, and its gradient.

Forward goes over chunks of the vocabulary, student's and teacher's logits side by side, and leaves of each token the
two log-sum-exps and the divergence; backward computes the logits again. With z the student's logits, r = log(s/t) in
"reverse" and log(s/m) in "jsd", and R = Σ s·r, the gradient with respect to z is

    forward  s − t               reverse  s·(r − R)               jsd  (1 − β)·s·(r − R)

(of the mixture's own derivative m' there remains −Σ m' = 0). Products are the library's, in the dtype of the hidden
states with sums in fp32; in backward the gradient's factor is rounded to that dtype. Products of N·V·D, with equal
widths: 2 in forward and 4 in backward; for "jsd" 2 more, since r needs both log-sum-exps.

Shapes: n tokens of this rank, N of the token group, D hidden of the student, E of the teacher, V local rows; v rows of
a chunk.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cce_dist.distillation.divergence import Kind, log_to_mixture
from cce_dist.kernels.problem import TILE, largest_scale
from cce_dist.kernels.products import add_product, product
from cce_dist.loss.chunks import Rows, Tokens, logits_at, rows_of
from cce_dist.loss.tokens import gather_values, own, start_sum
from cce_dist.shard import VocabShard

_LOWEST = -1e30
"""What stands for −∞ among logits: differences of two are numbers still."""
_ALIVE = 6
"""Tensors of a chunk's size that are alive at a time."""
_HEADROOM = {torch.float16: 2.0**8}
"""The gradient's factor is multiplied with it before it is rounded: fp16 has no range for small ones, and those of
"reverse" may be some hundred times as large as a probability."""


class Job(NamedTuple):
    """A call, apart from its tensors. ``most``: tokens that any rank brings."""

    shard: VocabShard
    teacher_shard: VocabShard
    most: int
    kind: Kind
    beta: float
    student_form: tuple[float, float | None]
    teacher_form: tuple[float, float | None]
    workspace_bytes: int


class _Sides(NamedTuple):
    """All tokens of both, and both's rows."""

    student: Tokens
    student_rows: Rows
    teacher: Tokens
    teacher_rows: Rows

    def chunks(self, workspace_bytes: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, logits of the student [N, v], of the teacher [N, v]) of some rows at a time: the same bits each
        time, and of equal heads."""
        tokens, dtype = self.student.hidden_cD.shape[0], torch.promote_types(self.student.dtype, self.teacher.dtype)
        row_bytes = max(tokens * dtype.itemsize * _ALIVE, 1)
        number, most = self.student_rows.weight_VD.shape[0], max(workspace_bytes // row_bytes // TILE, 1) * TILE
        # Of equal size: the last products would otherwise be thin ones.
        parts = max(-(-number // most), 1)
        size = -(-number // parts // TILE) * TILE
        for first in range(0, number, max(size, 1)):
            v = slice(first, min(first + size, number))
            z_s, z_t = (
                logits_at(tokens, rows, v).to(dtype).clamp_(min=_LOWEST)
                for tokens, rows in ((self.student, self.student_rows), (self.teacher, self.teacher_rows))
            )
            yield v, z_s, z_t


class _Heads(NamedTuple):
    """What backward needs beside numbers of each token."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    teacher_NE: Tensor
    teacher_VE: Tensor
    teacher_bias_V: Tensor | None

    def sides(self, job: Job) -> _Sides:
        return _Sides(
            Tokens(self.hidden_ND, None, None),
            rows_of(self.weight_VD, self.bias_V, job.shard, *job.student_form),
            Tokens(self.teacher_NE, None, None),
            rows_of(self.teacher_VE, self.teacher_bias_V, job.teacher_shard, *job.teacher_form),
        )


class Divergence(torch.autograd.Function):
    """That of each of this rank's tokens [n]; the gradient is the student's."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        teacher_nE: Tensor,
        teacher_VE: Tensor,
        teacher_bias_V: Tensor | None,
        job: Job,
    ) -> Tensor:
        hidden_ND, teacher_NE = (gather_values(x.contiguous(), job.shard, job.most, 0) for x in (hidden_nD, teacher_nE))
        heads = _Heads(hidden_ND, weight_VD, bias_V, teacher_NE, teacher_VE, teacher_bias_V)
        with torch.autocast(hidden_nD.device.type, enabled=False):
            found = _forward(heads.sides(job), job)
        ctx.job, ctx.num_tokens = job, hidden_nD.shape[0]
        ctx.save_for_backward(*heads, found.lse_s, found.lse_t, found.mean_ratio)
        return own(found.divergence, ctx.num_tokens, job.most, job.shard)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor | None, ...]:
        job: Job = ctx.job
        *tensors, lse_s_N, lse_t_N, mean_ratio_N = ctx.saved_tensors
        heads = _Heads(*tensors)
        with torch.autocast(grad_n.device.type, enabled=False):
            grad_N = gather_values(grad_n.contiguous(), job.shard, job.most, 0)
            grads = _backward(heads, (lse_s_N, lse_t_N, mean_ratio_N), grad_N, job, ctx.needs_input_grad[:3])
            dhidden_ND, dweight_VD, dbias_V = grads
            dhidden_nD = None
            if dhidden_ND is not None:
                if job.shard.reduce_dtype is not None:
                    dhidden_ND = dhidden_ND.to(job.shard.reduce_dtype)
                dhidden_nD = start_sum(dhidden_ND, ctx.num_tokens, job.shard)().to(heads.hidden_ND.dtype)
        return dhidden_nD, dweight_VD, dbias_V, None, None, None, None


class _Found(NamedTuple):
    """Of each token [N]: the divergence, both log-sum-exps, and R."""

    divergence: Tensor
    lse_s: Tensor
    lse_t: Tensor
    mean_ratio: Tensor | None


class _Sums(NamedTuple):
    """Of each token [N] over rows: m = max z and Σ exp(z − m) of both, and, with the weights of the first ("forward":
    the teacher's, "reverse": the student's), Σ exp(z − m)·(z − z of the other)."""

    max_s: Tensor
    sum_s: Tensor
    max_t: Tensor
    sum_t: Tensor
    weighted: Tensor


def _add(sums: _Sums, z_s: Tensor, z_t: Tensor, kind: Kind) -> _Sums:
    """With some more rows, whose logits [N, v] are used up."""
    max_s, max_t = (torch.maximum(old, z.amax(1)) for old, z in ((sums.max_s, z_s), (sums.max_t, z_t)))
    decay_s, decay_t = (sums.max_s - max_s).exp(), (sums.max_t - max_t).exp()
    e_s, e_t = (z_s - max_s[:, None]).exp_(), (z_t - max_t[:, None]).exp_()
    weighted = sums.weighted
    if kind == "forward":
        weighted = weighted * decay_t + (e_t * z_t.sub_(z_s)).sum(1)
    elif kind == "reverse":
        weighted = weighted * decay_s + (e_s * z_s.sub_(z_t)).sum(1)
    return _Sums(max_s, sums.sum_s * decay_s + e_s.sum(1), max_t, sums.sum_t * decay_t + e_t.sum(1), weighted)


def _over_ranks(sums: _Sums, kind: Kind, shard: VocabShard) -> _Sums:
    """A MAX, then one packed SUM, in which a NaN rides."""
    if shard.vocab_group is None:
        return sums
    own_2N = torch.stack((sums.max_s, sums.max_t))
    max_2N = own_2N.clone()
    dist.all_reduce(max_2N, dist.ReduceOp.MAX, group=shard.vocab_group)
    decay_s, decay_t = (own_2N - max_2N).exp()
    weighted = sums.weighted * (decay_t if kind == "forward" else decay_s)
    packed_3N = torch.stack((sums.sum_s * decay_s, sums.sum_t * decay_t, weighted))
    dist.all_reduce(packed_3N, group=shard.vocab_group)
    return _Sums(max_2N[0], packed_3N[0], max_2N[1], packed_3N[1], packed_3N[2])


def _forward(sides: _Sides, job: Job) -> _Found:
    tokens, device = sides.student.hidden_cD.shape[0], sides.student.hidden_cD.device
    zero = torch.zeros(tokens, dtype=torch.promote_types(sides.student.dtype, sides.teacher.dtype), device=device)
    sums = _Sums(zero + _LOWEST, zero, zero + _LOWEST, zero, zero)
    for _, z_s, z_t in sides.chunks(job.workspace_bytes):
        sums = _add(sums, z_s, z_t, job.kind)
    sums = _over_ranks(sums, job.kind, job.shard)
    lse_s, lse_t = sums.max_s + sums.sum_s.log(), sums.max_t + sums.sum_t.log()
    if job.kind == "forward":
        return _Found(sums.weighted / sums.sum_t - (lse_t - lse_s), lse_s, lse_t, None)
    if job.kind == "reverse":
        divergence = sums.weighted / sums.sum_s - (lse_s - lse_t)
        return _Found(divergence, lse_s, lse_t, divergence)
    parts_2N = torch.zeros((2, tokens), dtype=zero.dtype, device=device)
    for _, z_s, z_t in sides.chunks(job.workspace_bytes):
        parts_2N += _mixture_parts(z_s.sub_(lse_s[:, None]), z_t.sub_(lse_t[:, None]), job.beta)
    if job.shard.vocab_group is not None:
        dist.all_reduce(parts_2N, group=job.shard.vocab_group)
    of_student, of_teacher = parts_2N
    return _Found((1 - job.beta) * of_student + job.beta * of_teacher, lse_s, lse_t, of_student)


def _mixture_parts(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """[2, N]: Σ s·log(s/m) and Σ t·log(t/m) over some rows."""
    difference = log_t - log_s
    ratio = log_to_mixture(difference, beta)
    return torch.stack(((log_s.exp() * ratio).sum(1), (log_t.exp() * difference.add_(ratio)).sum(1)))


def _slope(z_s: Tensor, z_t: Tensor, saved: tuple[Tensor, Tensor, Tensor | None], job: Job) -> Tensor:
    """The gradient [N, v] of each token's divergence with respect to the student's products; logits are used up.

    ``saved``: both log-sum-exps, and R.
    """
    lse_s, lse_t, mean_ratio = saved
    cap = job.student_form[1]
    chain = None if cap is None else 1 - (z_s / cap).square_()
    log_s, log_t = z_s.sub_(lse_s[:, None]), z_t.sub_(lse_t[:, None])
    if mean_ratio is None:
        slope = log_s.exp_().sub_(log_t.exp_())
    elif job.kind == "reverse":
        slope = (log_s - log_t).sub_(mean_ratio[:, None]).mul_(log_s.exp_())
    else:
        ratio = log_to_mixture(log_t.sub_(log_s), job.beta)
        slope = ratio.sub_(mean_ratio[:, None]).mul_(1 - job.beta).mul_(log_s.exp_())
    return slope if chain is None else slope.mul_(chain)


def _backward(
    heads: _Heads,
    saved: tuple[Tensor, Tensor, Tensor | None],
    grad_N: Tensor,
    job: Job,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(this rank's part of dE [N, D], dC [V, D], dbias [V])."""
    sides, (hidden_ND, weight_VD, bias_V, *_) = heads.sides(job), heads
    real = sides.student_rows.weight_VD.shape[0]
    dhidden_ND = torch.zeros_like(hidden_ND, dtype=sides.student.dtype) if wanted[0] else None
    dweight_VD = _empty(weight_VD, real) if wanted[1] else None
    dbias_V = _empty(bias_V, real) if bias_V is not None and wanted[2] else None
    headroom = _HEADROOM.get(hidden_ND.dtype, 1.0)
    scale, upstream_N = _normalised(grad_N, hidden_ND.dtype)
    factor = scale * (job.student_form[0] / headroom)
    for v, z_s, z_t in sides.chunks(job.workspace_bytes):
        p_Nv = _slope(z_s, z_t, saved, job).mul_(upstream_N[:, None] * headroom)
        if dbias_V is not None:
            dbias_V[v] = p_Nv.sum(0) * factor
        p_Nv = p_Nv.to(hidden_ND.dtype)
        if dhidden_ND is not None:
            add_product(dhidden_ND, p_Nv, weight_VD[v].to(hidden_ND.dtype))
        if dweight_VD is not None:
            dweight_VD[v] = product(p_Nv.T, hidden_ND).mul_(factor)
    if dhidden_ND is not None:
        dhidden_ND *= factor
    return dhidden_ND, dweight_VD, dbias_V


def _empty(x: Tensor, real: int) -> Tensor:
    """A gradient to be written, 0 in the rows of padding."""
    grad = torch.empty_like(x)
    grad[real:] = 0
    return grad


def _normalised(grad_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a power of two, gradients of at most about 1 that it makes these)."""
    scale = torch.ones((), dtype=grad_N.dtype, device=grad_N.device)
    if grad_N.shape[0]:
        largest = grad_N.nan_to_num(0.0, 0.0, 0.0).abs().amax()
        scale = torch.exp2(largest.frexp().exponent.clamp(max=largest_scale(dtype, grad_N.dtype)).to(grad_N.dtype))
    return scale, grad_N / scale
