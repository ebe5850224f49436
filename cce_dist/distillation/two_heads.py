"""Two heads over one vocabulary, chunk by chunk: the divergence of each token, and its gradient.

Forward goes over chunks of the vocabulary, student's and teacher's logits side by side, and leaves of each token the
two log-sum-exps and the divergence; backward computes the logits again. With z the student's logits, r = log(s/t) in
"reverse" and log(s/m) in "jsd", and R = Σ s·r, the gradient with respect to z is

    forward  s − t               reverse  s·(r − R)               jsd  (1 − β)·s·(r − R)

(of the mixture's own derivative m' there remains −Σ m' = 0). Products are the library's, in the dtype of the hidden
states with sums in fp32; in backward the gradient's factor is rounded to that dtype. Products of N·V·D, with equal
widths: 2 in forward and 4 in backward; for "jsd" 2 more, since r needs both log-sum-exps.

Shapes: n tokens of this rank, N of the token group, D hidden of the student, E of the teacher, V local rows; v rows of
a chunk, w of the chunks that are multiplied together.
"""

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cce_dist.kernels import two_heads as torch_chunks
from cce_dist.kernels.problem import TILE, largest_scale
from cce_dist.kernels.products import add_product, columns_at_once, product, rounds, time_of_gradients
from cce_dist.kernels.two_heads import Kind, Side
from cce_dist.loss.tokens import gather_values, in_reduce_dtype, own, start_sum
from cce_dist.shard import VocabShard

_HEADROOM = {torch.float16: 2.0**8}
"""The gradient's factor is multiplied with it before it is rounded: fp16 has no range for small ones, and those of
"reverse" may be some hundred times as large as a probability."""


class Job(NamedTuple):
    """A call, apart from its tensors. ``most``: tokens that any rank brings; forms: scale and softcap."""

    shard: VocabShard
    most: int
    kind: Kind
    beta: float
    student_form: tuple[float, float | None]
    teacher_form: tuple[float, float | None]
    workspace_bytes: int
    backend: Literal["triton", "torch"]

    @property
    def kernels(self) -> ModuleType:
        if self.backend == "torch":
            return torch_chunks
        from cce_dist.kernels.triton import two_heads  # imports triton

        return two_heads


class _Heads(NamedTuple):
    """What backward needs beside numbers of each token."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    teacher_NE: Tensor
    teacher_VE: Tensor
    teacher_bias_V: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Of logits."""
        return torch.promote_types(torch.promote_types(self.hidden_ND.dtype, self.teacher_NE.dtype), torch.float32)

    def sizes(self, job: Job) -> tuple[int, int]:
        """See `_sizes`: half of the workspace each."""
        tokens, half = self.hidden_ND.shape[0], job.workspace_bytes // 2
        most = half // max(tokens * self.dtype.itemsize * job.kernels.ALIVE, 1)
        most_together = half // max(tokens * self.hidden_ND.element_size(), 1)
        widths, device = (self.hidden_ND.shape[1], self.teacher_NE.shape[1]), self.hidden_ND.device
        return _sizes(job.shard.num_real_rows, most, most_together, tokens, widths, device)

    def chunks(self, job: Job, rows: slice = slice(None)) -> Iterator[tuple[slice, Side, Side]]:
        """(v, the student's side, the teacher's) of some of the real rows at a time, by default of all: the same bits
        each time where ``rows`` are of whole chunks, and of equal heads."""
        size, _ = self.sizes(job)
        first, stop, _ = rows.indices(job.shard.num_real_rows)
        for start in range(first, stop, size):
            v = slice(start, min(start + size, stop))
            yield (
                v,
                self._side(self.hidden_ND, self.weight_VD, self.bias_V, v, job.student_form),
                self._side(self.teacher_NE, self.teacher_VE, self.teacher_bias_V, v, job.teacher_form),
            )

    def _side(
        self, hidden: Tensor, weight: Tensor, bias_V: Tensor | None, v: slice, form: tuple[float, float | None]
    ) -> Side:
        products_Nv = product(hidden, weight[v].to(hidden.dtype).T).to(self.dtype)
        return Side(products_Nv, None if bias_V is None else bias_V[v].contiguous(), *form)


@functools.lru_cache(maxsize=1024)
def _sizes(
    rows: int, most: int, most_together: int, tokens: int, widths: tuple[int, int], device: torch.device
) -> tuple[int, int]:
    """(Rows of a chunk, and of the chunks whose gradients are multiplied together.)

    Both so that products fill the GPU in whole rounds. For each of the latter dE is read and written in fp32.
    """
    size = columns_at_once(rows, most, TILE, lambda v: rounds(tokens, v, device) * sum(widths))
    return size, columns_at_once(rows, most_together, size, lambda v: time_of_gradients(tokens, v, widths[0], device))


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
            found = _forward(heads, job)
        ctx.job, ctx.num_tokens = job, hidden_nD.shape[0]
        ctx.save_for_backward(*heads, found.lse_2N, found.mean_ratio_N)
        return own(found.divergence_N, ctx.num_tokens, job.most, job.shard)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor | None, ...]:
        job: Job = ctx.job
        *tensors, lse_2N, mean_ratio_N = ctx.saved_tensors
        heads = _Heads(*tensors)
        with torch.autocast(grad_n.device.type, enabled=False):
            grad_N = gather_values(grad_n.contiguous(), job.shard, job.most, 0)
            grads = _backward(heads, lse_2N, mean_ratio_N, grad_N, job, ctx.needs_input_grad[:3])
            dhidden_ND, dweight_VD, dbias_V = grads
            dhidden_nD = None
            if dhidden_ND is not None:
                dhidden_nD = start_sum(in_reduce_dtype(dhidden_ND, job.shard), ctx.num_tokens, job.shard)().to(
                    heads.hidden_ND.dtype
                )
        return dhidden_nD, dweight_VD, dbias_V, None, None, None, None


class _Found(NamedTuple):
    """Of each token: the divergence, the student's and the teacher's log-sum-exp, and R."""

    divergence_N: Tensor
    lse_2N: Tensor
    mean_ratio_N: Tensor | None


def _forward(heads: _Heads, job: Job) -> _Found:
    sums_5N = torch_chunks.no_sums(heads.hidden_ND.shape[0], heads.dtype, heads.hidden_ND.device)
    for _, student, teacher in heads.chunks(job):
        job.kernels.add(sums_5N, student, teacher, job.kind)
    sums_5N = _over_ranks(sums_5N, job)
    lse_2N = sums_5N[0:4:2] + sums_5N[1:4:2].log()
    lse_s, lse_t = lse_2N
    if job.kind == "forward":
        return _Found(sums_5N[4] / sums_5N[3] - (lse_t - lse_s), lse_2N, None)
    if job.kind == "reverse":
        divergence_N = sums_5N[4] / sums_5N[1] - (lse_s - lse_t)
        return _Found(divergence_N, lse_2N, divergence_N)
    parts_2N = torch.zeros_like(lse_2N)
    for _, student, teacher in heads.chunks(job):
        job.kernels.add_mixture(parts_2N, student, teacher, lse_2N, job.beta)
    if job.shard.vocab_group is not None:
        dist.all_reduce(parts_2N, group=job.shard.vocab_group)
    of_student_N, of_teacher_N = parts_2N
    return _Found((1 - job.beta) * of_student_N + job.beta * of_teacher_N, lse_2N, of_student_N)


def _over_ranks(sums_5N: Tensor, job: Job) -> Tensor:
    """A MAX, then one packed SUM, in which a NaN rides."""
    if job.shard.vocab_group is None:
        return sums_5N
    own_2N = sums_5N[0:4:2]
    max_2N = own_2N.clone()
    dist.all_reduce(max_2N, dist.ReduceOp.MAX, group=job.shard.vocab_group)
    decay_s, decay_t = (own_2N - max_2N).exp()
    weighted_N = sums_5N[4] * (decay_t if job.kind == "forward" else decay_s)
    packed_3N = torch.stack((sums_5N[1] * decay_s, sums_5N[3] * decay_t, weighted_N))
    dist.all_reduce(packed_3N, group=job.shard.vocab_group)
    return torch.stack((max_2N[0], packed_3N[0], max_2N[1], packed_3N[1], packed_3N[2]))


def _backward(
    heads: _Heads,
    lse_2N: Tensor,
    mean_ratio_N: Tensor | None,
    grad_N: Tensor,
    job: Job,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(this rank's part of dE [N, D], dC [V, D], dbias [V])."""
    hidden_ND, weight_VD, bias_V, *_ = heads
    real, dtype = job.shard.num_real_rows, hidden_ND.dtype
    wide = torch.promote_types(dtype, torch.float32)
    dhidden_ND = torch.zeros_like(hidden_ND, dtype=wide) if wanted[0] else None
    dweight_VD = _empty(weight_VD, real) if wanted[1] else None
    dbias_V = _empty(bias_V, real) if bias_V is not None and wanted[2] else None
    headroom = _HEADROOM.get(dtype, 1.0)
    scale, upstream_N = _normalised(grad_N, dtype)
    factor, factor_N = scale * (job.student_form[0] / headroom), upstream_N * headroom
    # A power of two is exact in bf16 hidden states, and spares a pass over dC.
    scaled_ND = None
    if dtype == torch.bfloat16 and weight_VD.dtype == dtype and job.student_form[0] == 1.0 and hidden_ND.is_cuda:
        scaled_ND = hidden_ND * factor.to(dtype)
    _, together = heads.sizes(job)
    memory_Nw = hidden_ND.new_empty((hidden_ND.shape[0], together))
    for first in range(0, real, together):
        w = slice(first, min(first + together, real))
        p_Nw = memory_Nw[:, : w.stop - first]
        for v, *sides in heads.chunks(job, w):
            out_Nv = p_Nw[:, v.start - first : v.stop - first]
            job.kernels.slope(*sides, lse_2N, mean_ratio_N, factor_N, job.kind, job.beta, out_Nv)
            del sides  # their memory, for the next one's
        if dbias_V is not None:
            dbias_V[w] = p_Nw.sum(0, dtype=wide) * factor
        if dhidden_ND is not None:
            add_product(dhidden_ND, p_Nw, weight_VD[w].to(dtype))
        if dweight_VD is not None and scaled_ND is not None:
            torch.mm(p_Nw.T, scaled_ND, out=dweight_VD[w])
        elif dweight_VD is not None:
            dweight_VD[w] = product(p_Nw.T, hidden_ND).mul_(factor)
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
