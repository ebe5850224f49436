"""Log-probabilities within a set of ids that is kept of each token: a sampler's top-k or top-p mask.

Of the vocabulary nothing else is computed: log p_k = z_k − log Σ_j exp z_j over the kept j. Collectives are those of
`selected`; where ids come in CSR form, the hosts exchange their number too.

Shapes: n tokens of this rank, K ids of a token, D hidden, V local rows of the classifier; m ids of all tokens.
"""

from typing import Any

import torch
from torch import Tensor

from cce_dist.device_check import check_token_ids, device_check
from cce_dist.distillation.selected import check_ids, legal_ids, logits_of_pairs, selected
from cce_dist.distillation.settings import KeptSettings
from cce_dist.kernels.problem import FAR
from cce_dist.loss.call import begin_without_labels
from cce_dist.loss.settings import check_integers, choose_backend, takes_settings
from cce_dist.shard import VocabShard
from cce_dist.shard.agreement import agree

_MUST_BE = "offsets must begin with 0, never fall, and end with the number of ids"


@takes_settings(KeptSettings)
def linear_kept_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    offsets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    shard: VocabShard | None = None,
    **settings: Any,
) -> Tensor:
    """log softmax of logits z / temperature over each token's own ids; z as in `linear_cross_entropy`; differentiable.

    With an id's log-probability within what its sampler kept, a policy's ratio is that of the distribution that was
    sampled from. Every rank of ``shard.vocab_group`` must make the call in every step, also with no token.

    Args:
        hidden: [..., D], fp32, fp16, bf16 or fp64; cast to the autocast dtype under autocast.
        weight: [V, D], this rank's rows.
        ids: [..., K] with K on all ranks the same, or [m] in CSR form: integers in [0, vocab_size) over the GLOBAL
            vocabulary, each at most once a token, or the padding one. Ranks that bring the same tokens must bring the
            same ids, which is checked (on CUDA by a device-side assertion).
        offsets: of the CSR form, [n + 1] integers: ids[offsets[i] : offsets[i + 1]] are those of the i-th of hidden's
            tokens. None: ids are [..., K].
        bias: [V], this rank's.
        shard: which global rows these are, and the process groups. None: all rows, in this process alone.
        softcap, logit_scale: None leaves them out.
        temperature: what the logits are divided by, after the softcap.
        padding_id: the id of places that have none.
        backend: "triton" (CUDA), "torch" (any device), "auto": triton on CUDA.

    Returns:
        The shape of ids, in fp32 (fp64 for fp64); −∞, without a gradient, where an id is padding.

    Raises:
        ValueError, TypeError: for arguments that do not fit, on every rank of the vocabulary group (there a
            ValueError), before anything is computed. On CUDA an id out of range and offsets that do not fit the ids are
            device-side assertions.
    """

    def check(chosen: KeptSettings, shard: VocabShard) -> tuple[int, dict[str, Any]]:
        tokens = hidden.shape[:-1].numel()
        if offsets is None:
            check_ids(ids, hidden, chosen, shard.vocab_size)
            return tokens, {"ids of a token": ids.shape[-1]}
        _check_csr(ids, offsets, hidden, chosen, shard.vocab_size)
        return tokens, {"ids of a token": "in CSR form"}

    head = begin_without_labels(
        hidden, weight, bias, shard, settings, KeptSettings, "log-probabilities within kept ids", check
    )
    is_none = ids == head.settings.padding_id
    if offsets is None:
        z, _ = selected(head, weight, ids)
        return log_softmax(z, is_none).masked_fill(is_none, -torch.inf)
    if ids.is_cuda:
        holds = (offsets[0] == 0) & (offsets[-1] == ids.shape[0]) & (offsets.diff() >= 0).all()
        device_check(holds, f"{_MUST_BE}.")
    most = agree(head.shard, "the number of kept ids", ids.shape[0], {})
    token_n = torch.arange(offsets.shape[0] - 1, device=ids.device)
    token_m = token_n.repeat_interleave(offsets.diff(), output_size=ids.shape[0])
    z_m, _ = logits_of_pairs(head, ids, token_m, most)
    return _log_softmax_of_segments(z_m.masked_fill(is_none, FAR), token_m, token_n.shape[0]).masked_fill(
        is_none, -torch.inf
    )


def log_softmax(z: Tensor, is_none: Tensor) -> Tensor:
    """Along the last axis, over what is there; finite, and without a gradient, where it is not."""
    z = z.masked_fill(is_none, FAR)
    return (z - z.logsumexp(-1, keepdim=True)).masked_fill(is_none, FAR)


def _log_softmax_of_segments(z_m: Tensor, token_m: Tensor, tokens: int) -> Tensor:
    """Over each token's."""
    max_n = z_m.new_full((tokens,), FAR).scatter_reduce(0, token_m, z_m.detach(), "amax")
    z_m = z_m - max_n[token_m]
    sum_n = z_m.new_zeros(tokens).index_add(0, token_m, z_m.exp())
    return z_m - sum_n.log()[token_m]


def _check_csr(ids: Any, offsets: Any, hidden: Tensor, settings: KeptSettings, vocab_size: int) -> None:
    """Raises TypeError or ValueError for what does not fit; on CUDA not for values."""
    choose_backend(settings.backend, hidden)
    for name, x in (("ids", ids), ("offsets", offsets)):
        check_integers(name, x, hidden.device)
    tokens = hidden.shape[:-1].numel()
    if ids.ndim != 1 or list(offsets.shape) != [tokens + 1]:
        raise ValueError(
            f"ids must be [m] and offsets [{tokens + 1}], one more than there are tokens, in CSR form; got ids of "
            f"shape {list(ids.shape)} and offsets of shape {list(offsets.shape)}."
        )
    if ids.is_cuda:
        return
    check_token_ids(ids, vocab_size, settings.padding_id, legal_ids(settings.padding_id, vocab_size))
    if offsets[0] != 0 or offsets[-1] != ids.shape[0] or (offsets.diff() < 0).any():
        raise ValueError(f"{_MUST_BE}, {ids.shape[0]}; got {offsets[:3].tolist()} to {offsets[-1].item()}.")
