"""The nuclear norm of each sequence's matrix of logits, without the logits: a score by which batches are selected.

Source: the utility of "Utility-Diversity Aware Online Batch Selection for LLM Supervised Fine-tuning" (UDS, 2025). The
singular values of Z = s·E·Cᵀ are the square roots of the eigenvalues of E·G·Eᵀ, G = s²·CᵀC the classifier's Gram
matrix, of which each rank adds the part of its rows. Squares cost half of the digits, so that all is in fp64, which
leaves eight. A sequence longer than the classifier is wide goes by R of E = Q·R: R·Cᵀ has the same singular values.
A bias is a column of ones beside E, and itself beside C.

Collectives: a SUM of G, [D, D] in fp64 (with a bias [D + 1, D + 1]). On CUDA the eigenvalues' library waits for the
device.

Shapes: B sequences, L positions of the longest, D hidden (one more with a bias), V local rows; v rows of a chunk.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cce_dist.distillation.settings import NuclearNormSettings
from cce_dist.loss.call import begin_without_labels
from cce_dist.loss.settings import check_integers, takes_settings
from cce_dist.shard import VocabShard

_ROWS = 4096


@torch.no_grad()
@takes_settings(NuclearNormSettings)
def logits_nuclear_norm(
    hidden: Tensor,
    weight: Tensor,
    lengths: Tensor,
    *,
    bias: Tensor | None = None,
    shard: VocabShard | None = None,
    **settings: Any,
) -> Tensor:
    """The sum of the singular values of each sequence's logits [length, vocab_size]; without a gradient.

    Every rank of ``shard.vocab_group`` must make the call, also with no sequence. It costs V·D² once, whatever the
    number of sequences, and a cube of the smaller of L and D for each: score all candidates in one call.

    Args:
        hidden: [B, L, D], fp32, fp16, bf16 or fp64; of each sequence the first positions count.
        weight: [V, D], this rank's rows.
        lengths: [B], integers: how many positions of each sequence count; more than L are L.
        bias: [V], this rank's.
        shard: which global rows these are, and the process groups. None: all rows, in this process alone.
        logit_scale: None leaves it out.
        softcap: None: of logits that are not linear in the hidden states there is no Gram matrix.

    Returns:
        [B], in fp64.

    Raises:
        ValueError, TypeError: for arguments that do not fit, and for a softcap, on every rank of the vocabulary group
            (there a ValueError).
    """

    def check(chosen: NuclearNormSettings, shard: VocabShard) -> tuple[int, dict[str, Any]]:
        if chosen.softcap is not None:
            raise ValueError(
                "softcap must be None: the nuclear norm of capped logits cannot be had from the classifier's Gram "
                f"matrix; got {chosen.softcap}."
            )
        check_integers("lengths", lengths, hidden.device)
        if hidden.ndim != 3 or lengths.shape != hidden.shape[:1]:
            raise ValueError(
                f"hidden must be [B, L, D] and lengths [B], got {list(hidden.shape)} and {list(lengths.shape)}."
            )
        return hidden.shape[:-1].numel(), {}

    head = begin_without_labels(
        hidden, weight, bias, shard, settings, NuclearNormSettings, "nuclear norms of logits", check
    )
    with torch.autocast(hidden.device.type, enabled=False):
        gram_DD = _gram(head.weight_VD, head.bias_V, head.shard)
        if head.shard.vocab_group is not None:
            dist.all_reduce(gram_DD, group=head.shard.vocab_group)
        hidden_BLD = head.hidden_nD.view(hidden.shape)
        norms = [
            _norm(hidden_LD, length, gram_DD, head.bias_V is not None)
            for hidden_LD, length in zip(hidden_BLD, lengths, strict=True)
        ]
        scale = abs(1.0 if head.settings.logit_scale is None else head.settings.logit_scale)
        return scale * torch.stack(norms) if norms else gram_DD.new_zeros(0)


def _gram(weight_VD: Tensor, bias_V: Tensor | None, shard: VocabShard) -> Tensor:
    """CᵀC of this rank's real rows, in fp64."""
    columns = weight_VD.shape[1] + (bias_V is not None)
    gram_DD = torch.zeros((columns, columns), dtype=torch.float64, device=weight_VD.device)
    for first in range(0, shard.num_real_rows, _ROWS):
        v = slice(first, min(first + _ROWS, shard.num_real_rows))
        rows_vD = weight_VD[v].double()
        if bias_V is not None:
            rows_vD = torch.cat((rows_vD, bias_V[v, None].double()), 1)
        gram_DD.addmm_(rows_vD.T, rows_vD)
    return gram_DD


def _norm(hidden_LD: Tensor, length: Tensor, gram_DD: Tensor, has_bias: bool) -> Tensor:
    """Of one sequence. Positions that do not count are 0, which adds singular values of 0."""
    counts_L = torch.arange(hidden_LD.shape[0], device=hidden_LD.device) < length
    hidden_LD = hidden_LD.double()
    if has_bias:
        hidden_LD = torch.nn.functional.pad(hidden_LD, (0, 1), value=1.0)
    hidden_LD = torch.where(counts_L[:, None], hidden_LD, 0)
    if hidden_LD.shape[0] > hidden_LD.shape[1]:
        hidden_LD = torch.linalg.qr(hidden_LD, mode="r").R
    square_LL = hidden_LD @ gram_DD @ hidden_LD.T
    return torch.linalg.eigvalsh(square_LL).clamp(min=0).sqrt().sum()
