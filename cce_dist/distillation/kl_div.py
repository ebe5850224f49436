"""Divergence of a student's whole distribution from a teacher's, two heads on one vocabulary, without their logits.

The tokens that count are picked out, `two_heads` finds the divergence of each, and they are summed up as the loss's.

Collectives, with N tokens in all, n of each rank; fp32 where no dtype is named:

| layout          | forward                                               | backward                               |
|-----------------|-------------------------------------------------------|----------------------------------------|
| single process  | none                                                  | none                                   |
| tensor parallel | MAX [2, N], SUM [3, N]; "jsd" SUM [2, N]; with labels | dE: all-reduce [N, D]                  |
|                 | MAX of 2 numbers, which compare them                  |                                        |
| own tokens      | all-gather both hidden states in their dtypes;        | all-gather [n]; dE: reduce-scatter     |
|                 | MAX and SUMs as above                                 | [N, D]; FSDP x TP: all-reduce [n, D]   |

A mean over several ranks: see `loss.reduction`.

Shapes: n tokens of this rank, N of the token group, L tokens of a sequence, D hidden of the student, E of the teacher,
V local rows.
"""

from typing import Any

import torch
from torch import Tensor

from cce_dist.collectives import check_same_tokens
from cce_dist.distillation.settings import KLDivSettings
from cce_dist.distillation.two_heads import Divergence, Job
from cce_dist.loss.call import autocast, begin_without_labels
from cce_dist.loss.reduction import reduced
from cce_dist.loss.settings import check_head, check_label_tensor, check_plain, choose_backend, takes_settings
from cce_dist.loss.tokens import gather_values, shifted, unflatten
from cce_dist.shard import VocabShard
from cce_dist.shard.rows import local_rows


@takes_settings(KLDivSettings)
def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    shard: VocabShard | None = None,
    teacher_shard: VocabShard | None = None,
    **settings: Any,
) -> Tensor:
    """A divergence of the student's softmax(z / temperature) from the teacher's, over the whole vocabulary.

    z is as in `linear_cross_entropy`; formulas are those of `divergence`, without a factor of temperature². The
    gradient is the student's alone. Every rank of ``shard.vocab_group`` must make the call in every step, also with no
    token or no valid label.

    Args:
        student_hidden: [..., D], fp32, fp16, bf16 or fp64; cast to the autocast dtype under autocast.
        student_weight: [V, D], this rank's rows; its gradient returns in its own dtype. A DTensor must be Shard(0) on a
            1-D mesh: rows and group come from it, and its gradient is a DTensor.
        teacher_hidden: [..., E], of the same tokens; another width and dtype are fine. Cast like the student's.
        teacher_weight: [V, E], the rows of the same ids; a DTensor or a plain tensor.
        student_bias, teacher_bias: [V], this rank's.
        labels: [...], of which only counts where they are ``ignore_index``: such tokens have neither loss nor gradient.
            On the CPU (whatever device the others are on) they are taken out before anything is computed, so that they
            cost nothing; on CUDA that would mean to wait for the device, and they cost as much as others. None: all
            tokens are valid.
        shard: which global rows these are, and the process groups. None: all rows, in this process alone.
        teacher_shard: where the teacher's rows are padded to another number; it has the same rows otherwise, and
            ``shard``'s groups are used. None: ``shard``.
        kind: "forward": KL(teacher ‖ student). "reverse": KL(student ‖ teacher). "jsd": the generalised
            Jensen-Shannon divergence.
        beta: the teacher's share of the mixture of "jsd", as TRL has it. None: 0.5.
        temperature: what both heads' logits are divided by, after their softcaps.
        student_softcap, student_logit_scale, teacher_softcap, teacher_logit_scale: None leaves them out.
        ignore_index, shift: of labels, see `linear_cross_entropy`.
        reduction, num_valid_tokens: see `linear_cross_entropy`.
        backend: "triton" (CUDA), "torch" (any device), "auto": triton on CUDA.
        workspace_mb: memory for the logits of a chunk, at least 128 rows of which are taken at a time. None: 256.

    Returns:
        The loss in fp32 (fp64 for fp64); with "none" [..., L - shift], 0 where ignored.

    Raises:
        ValueError, TypeError: for arguments that do not fit, on every rank of the vocabulary group (there a
            ValueError), before anything is computed.
    """
    valid_n: Tensor | None = None
    place_n: Tensor | None = None
    teacher_rows_VE, teacher_bias_V = (
        None if x is None else x.detach() for x in (local_rows(teacher_weight), local_rows(teacher_bias))
    )

    def check(chosen: KLDivSettings, shard: VocabShard) -> tuple[int, dict[str, Any]]:
        nonlocal valid_n, place_n
        alike = chosen.check()
        choose_backend(chosen.backend, student_hidden)
        _check_teacher(student_hidden, teacher_hidden, teacher_rows_VE, teacher_bias_V, shard, teacher_shard)
        choose_backend(chosen.backend, teacher_hidden)
        if labels is None:
            number = student_hidden.shape[:-1].numel()
            if chosen.shift:
                raise ValueError(f"shift goes with labels; got {chosen.shift}.")
        else:
            check_plain("labels", labels)
            check_label_tensor(labels, student_hidden, torch.device("cpu"), student_hidden.device, of="student_")
            if labels.ndim < 1:
                raise ValueError("labels must have one axis or more; got one label without an axis.")
            valid_n = shifted(labels.long(), chosen.shift, chosen.ignore_index).reshape(-1) != chosen.ignore_index
            if not valid_n.is_cuda:
                place_n = valid_n.nonzero()[:, 0]
            number = valid_n.shape[0] if place_n is None else place_n.shape[0]
        return number, {
            "labels": labels is not None,
            "teacher_hidden's last dimension": teacher_hidden.shape[-1],
            "teacher_hidden's dtype": str(teacher_hidden.dtype),
            "teacher_bias": teacher_bias is not None,
            **alike,
        }

    head = begin_without_labels(
        student_hidden,
        student_weight,
        student_bias,
        shard,
        settings,
        KLDivSettings,
        "a divergence from a teacher",
        check,
        "student_",
    )
    chosen = head.settings
    student_nD, teacher_nE = head.hidden_nD, autocast(teacher_hidden.detach()).reshape(-1, teacher_hidden.shape[-1])
    tokens = student_nD.shape[0]
    if valid_n is not None:
        valid_n = _moved(valid_n, student_nD.device)
    if place_n is not None:
        place_n = _moved(place_n, student_nD.device)
        if place_n.shape[0] < tokens:
            student_nD, teacher_nE = student_nD.index_select(0, place_n), teacher_nE.index_select(0, place_n)
    elif valid_n is not None:  # what is ignored may hold anything
        student_nD, teacher_nE = (torch.where(valid_n[:, None], x, 0) for x in (student_nD, teacher_nE))
    if valid_n is not None and head.shard.same_tokens:
        same_n = valid_n.long() if place_n is None else place_n
        check_same_tokens(gather_values(same_n, head.shard, head.most, -1), "labels", head.shard.vocab_group)
    workspace = (256 if chosen.workspace_mb is None else chosen.workspace_mb) << 20
    forms = chosen.student_form, chosen.teacher_form
    backend = choose_backend(chosen.backend, teacher_hidden if teacher_hidden.dtype == torch.float64 else student_nD)
    job = Job(head.shard, head.most, chosen.kind, chosen.mixed, *forms, workspace, backend)
    teacher = teacher_nE, teacher_rows_VE, teacher_bias_V
    loss_n = Divergence.apply(student_nD, head.weight_VD, head.bias_V, *teacher, job)
    if place_n is not None:
        loss_n = loss_n.new_zeros(tokens).index_copy(0, place_n, loss_n)
    elif valid_n is not None:
        loss_n = torch.where(valid_n, loss_n, 0)
    if chosen.reduction == "none":
        return unflatten(loss_n, student_hidden[..., 0], chosen.shift)
    counted_n = torch.ones_like(loss_n) if valid_n is None else valid_n
    return reduced(loss_n, counted_n, chosen.reduction, chosen.num_valid_tokens, head.shard)


def _check_teacher(
    student_hidden: Tensor,
    hidden: Any,
    weight_VE: Any,
    bias_V: Any,
    shard: VocabShard,
    teacher_shard: Any,
) -> None:
    if not isinstance(teacher_shard, VocabShard | None):
        raise TypeError(f"teacher_shard must be a VocabShard or None, got {type(teacher_shard).__name__}.")
    teacher_shard = shard if teacher_shard is None else teacher_shard
    if _real_runs(teacher_shard) != _real_runs(shard) or teacher_shard.vocab_size != shard.vocab_size:
        raise ValueError(
            f"teacher_shard must hold the rows of shard but for padding, {_real_runs(shard)} of {shard.vocab_size}; "
            f"got {_real_runs(teacher_shard)} of {teacher_shard.vocab_size}. Split both heads alike."
        )
    check_plain("teacher_hidden", hidden)
    check_head(hidden, weight_VE, bias_V, teacher_shard, "teacher_")
    if hidden.shape[:-1] != student_hidden.shape[:-1] or hidden.device != student_hidden.device:
        expected = ", ".join(map(str, [*student_hidden.shape[:-1], "E"]))
        raise ValueError(
            f"teacher_hidden must be [{expected}] on {student_hidden.device}, of student_hidden's tokens; got "
            f"{list(hidden.shape)} on {hidden.device}."
        )


def _real_runs(shard: VocabShard) -> list[tuple[int, int]]:
    size = shard.vocab_size
    return [(start, min(stop, size)) for start, stop in shard.runs if start < size]


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for what it is at."""
    return x if x.device == device else x.pin_memory().to(device, non_blocking=True)
