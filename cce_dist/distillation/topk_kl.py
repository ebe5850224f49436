"""Divergence from a teacher of whom the most likely ids and their log-probabilities were stored.

The student's are logits of chosen ids (`selected`). What the teacher's ids leave out is one more outcome, the tail
bucket, with probability 1 − Σ p; or both distributions are those within the ids (`kept`). Collectives are those of
`selected`, with the tail bucket also those of the log-sum-exp; for a mean over ranks those of `loss.reduction`.

Shapes: n tokens of this rank, K ids of a token, D hidden, V local rows of the classifier.
"""

from typing import Any

import torch
from torch import Tensor

from cce_dist.distillation.divergence import terms
from cce_dist.distillation.kept import log_softmax
from cce_dist.distillation.selected import check_ids, selected
from cce_dist.distillation.settings import TopkKLSettings
from cce_dist.kernels.problem import FAR
from cce_dist.loss.call import begin_without_labels
from cce_dist.loss.reduction import reduced
from cce_dist.loss.settings import takes_settings
from cce_dist.shard import VocabShard


@takes_settings(TopkKLSettings)
def linear_topk_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    bias: Tensor | None = None,
    shard: VocabShard | None = None,
    **settings: Any,
) -> Tensor:
    """A divergence of the student's softmax(z / temperature) from a teacher's, known at some ids of each token.

    z is as in `linear_cross_entropy`; formulas are those of `divergence`, without a factor of temperature². Every rank
    of ``shard.vocab_group`` must make the call in every step, also with no token.

    Args:
        hidden: [..., D], the student's; fp32, fp16, bf16 or fp64; cast to the autocast dtype under autocast.
        weight: [V, D], this rank's rows.
        teacher_ids: [..., K], as ``ids`` of `linear_selected_logits`, each at most once a token. A token whose ids are
            all padding is ignored, and costs nothing.
        teacher_logprobs: [..., K], the teacher's log-probabilities of these ids at the same temperature, in any
            floating dtype, as `linear_topk` gives them. −∞ counts as a probability of 0. No gradient is theirs.
        bias: [V], this rank's.
        shard: which global rows these are, and the process groups. None: all rows, in this process alone.
        softcap, logit_scale: of the student; None leaves them out.
        temperature: what the student's logits are divided by, after the softcap.
        padding_id: the id of places that have none.
        backend: "triton" (CUDA), "torch" (any device), "auto": triton on CUDA.
        gradient: of the student's log-sum-exp, see `linear_cross_entropy`.
        kind: "forward": KL(teacher ‖ student). "reverse": KL(student ‖ teacher). "jsd": the generalised
            Jensen-Shannon divergence.
        beta: the teacher's share of the mixture of "jsd", as TRL has it. None: 0.5.
        tail_bucket: True: what is not among the ids is one more outcome. False: both distributions are those within the
            ids, and of the rest of the vocabulary nothing is computed; log-probabilities may then lack a constant a
            token, as logits do.
        reduction, num_valid_tokens: see `linear_cross_entropy`; a token with an id is valid.

    Returns:
        The loss in fp32 (fp64 for fp64); with "none" [...], 0 where ignored.

    Raises:
        ValueError, TypeError: for arguments that do not fit, on every rank of the vocabulary group (there a
            ValueError), before anything is computed. On CUDA an id out of range is a device-side assertion.
    """

    def check(chosen: TopkKLSettings, shard: VocabShard) -> tuple[int, dict[str, Any]]:
        alike = chosen.check()
        check_ids(teacher_ids, hidden, chosen, shard.vocab_size, "teacher_ids")
        if not isinstance(teacher_logprobs, Tensor) or not teacher_logprobs.is_floating_point():
            raise TypeError("teacher_logprobs must be a tensor of floats.")
        if teacher_logprobs.shape != teacher_ids.shape or teacher_logprobs.device != teacher_ids.device:
            raise ValueError(
                f"teacher_logprobs must be {list(teacher_ids.shape)} on {teacher_ids.device}, as teacher_ids are; got "
                f"{list(teacher_logprobs.shape)} on {teacher_logprobs.device}."
            )
        return hidden.shape[:-1].numel(), {"ids of a token": teacher_ids.shape[-1], **alike}

    head = begin_without_labels(
        hidden, weight, bias, shard, settings, TopkKLSettings, "a divergence from a teacher's stored ids", check
    )
    chosen = head.settings
    is_none = teacher_ids == chosen.padding_id
    z, lse = selected(head, weight, teacher_ids, return_lse=chosen.tail_bucket)
    log_teacher = teacher_logprobs.detach().to(z.dtype).clamp(min=FAR)
    if lse is None:
        log_student, log_teacher = log_softmax(z, is_none), log_softmax(log_teacher, is_none)
    else:
        log_student, log_teacher = (_with_tail(x, is_none) for x in (z - lse[..., None], log_teacher))
    loss = terms(log_student, log_teacher, chosen.kind, chosen.mixed).sum(-1)
    valid = ~is_none.all(-1)
    loss = torch.where(valid, loss, 0)
    if chosen.reduction == "none":
        return loss
    return reduced(loss, valid, chosen.reduction, chosen.num_valid_tokens, head.shard)


def _with_tail(log_p: Tensor, is_none: Tensor) -> Tensor:
    """Log-probabilities of the ids, and of all others together: no less than what rounding leaves of 1."""
    log_p = log_p.masked_fill(is_none, FAR)
    log_sum = log_p.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(log_p.dtype).eps)
    return torch.cat((log_p, torch.log(-torch.expm1(log_sum))), -1)
