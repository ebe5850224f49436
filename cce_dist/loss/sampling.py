"""The next token of a head, greedy or sampled, without logits of more than a chunk on any rank.

argmax_j(z_j / τ − log E_j), E_j independent and exponentially distributed, is a draw from softmax(z / τ) (Gumbel 1954;
as a race of exponentials: Yellott 1977). Each rank draws for its own rows, and the ranks compare their winners: a MAX
of two numbers a token and a MIN of its id. Draws are the first word of Philox4x32-10 of (seed; token, global row), as
in the loss: with one seed on all ranks, what is drawn does not depend on how the vocabulary is split.

Shapes: N tokens of the token group, D hidden, V local rows of the classifier; c tokens and v rows of a chunk.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cce_dist.kernels.torch_backend import philox
from cce_dist.loss.call import begin_without_labels
from cce_dist.loss.chunks import Rows, Tokens, first_row, global_rows, logits_of, rows_of, split
from cce_dist.loss.settings import SamplingSettings, check_seed
from cce_dist.loss.tokens import gather_values, own
from cce_dist.shard import VocabShard


@torch.no_grad()
def linear_next_token(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    shard: VocabShard | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    temperature: float = 1.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A token drawn from softmax(z / temperature) for each hidden state, z as in `linear_cross_entropy`.

    Every rank of ``shard.vocab_group`` must make the call, also with no token.

    Args:
        hidden: [..., D]; the last position of each sequence, as it were.
        weight: [V, D], this rank's rows.
        bias: [V], this rank's.
        shard: which global rows these are, and the process groups. None: all rows, in this process alone.
        softcap, logit_scale: None leaves them out.
        temperature: a float, 0 or more; 0: the most likely token, the first of several.
        seed: of the draws, an int or a 0-d int64 tensor. None: drawn from the default generator of the device. Ranks
            may have different ones; where all bring the same tokens, the same one makes the draws those of one process.

    Returns:
        int64 [...], global ids; the same on all ranks that bring the same tokens. −1 where logits are no numbers.

    Raises:
        ValueError, TypeError: for arguments that do not fit, on every rank of the vocabulary group (there a
            ValueError).
    """
    given = {"softcap": softcap, "logit_scale": logit_scale, "temperature": temperature, "seed": seed}

    def check(settings: SamplingSettings, shard: VocabShard) -> tuple[int, dict[str, Any]]:
        check_seed(settings.seed, hidden.device)
        return hidden.shape[:-1].numel(), {}

    head = begin_without_labels(hidden, weight, bias, shard, given, SamplingSettings, "the next tokens", check)
    shard, settings, most, number = head.shard, head.settings, head.most, head.hidden_nD.shape[0]
    tokens = Tokens(gather_values(head.hidden_nD.contiguous(), shard, most, 0), None, None)
    rows = rows_of(head.weight_VD, head.bias_V, shard, settings.logit_scale, settings.softcap)
    seed_1 = _seed(settings.seed, hidden.device) if settings.temperature > 0 else None
    best, first_token = [], 0
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in split(tokens):
            best.append(_best(chunk, rows, settings.temperature, seed_1, first_token))
            first_token += chunk.hidden_cD.shape[0]
    score_2N, row_N = torch.cat([x for x, _ in best], 1), torch.cat([x for _, x in best])
    if shard.vocab_group is not None:
        own_score_N, score_2N = score_2N[0], score_2N.clone()
        dist.all_reduce(score_2N, dist.ReduceOp.MAX, group=shard.vocab_group)
        row_N = first_row(row_N, own_score_N == score_2N[0], shard)
    row_N = torch.where(score_2N[1] > 0, -1, row_N)
    return own(row_N, number, most, shard).view(hidden.shape[:-1])


def _seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _best(
    tokens: Tokens, rows: Rows, temperature: float, seed_1: Tensor | None, first_token: int
) -> tuple[Tensor, Tensor]:
    """[2, c]: the largest score over this rank's rows, and 1 where one is no number; and its global row, the first of
    several."""
    number, device = tokens.hidden_cD.shape[0], tokens.hidden_cD.device
    score_c = torch.full((number,), -torch.inf, dtype=tokens.dtype, device=device)
    is_nan_c = torch.zeros_like(score_c)
    row_c = torch.full((number,), rows.shard.vocab_size - 1, dtype=torch.int64, device=device)
    token_c = torch.arange(first_token, first_token + number, device=device)
    for first, z_cv in logits_of(tokens, rows):
        global_v = global_rows(torch.arange(first, first + z_cv.shape[1], device=device), rows.shard)
        if seed_1 is not None:
            z_cv = z_cv / temperature - _exponential(seed_1, token_c, global_v, z_cv).log()
        best_c, where_c = z_cv.max(1)  # NaN where there is one
        is_nan_c = torch.maximum(is_nan_c, best_c.isnan().to(is_nan_c.dtype))
        is_better_c = best_c > score_c
        row_c = torch.where(is_better_c, global_v[where_c], row_c)
        score_c = torch.where(is_better_c, best_c, score_c)
    return torch.stack((score_c, is_nan_c)), row_c


def _exponential(seed_1: Tensor, token_c: Tensor, row_v: Tensor, like_cv: Tensor) -> Tensor:
    """E of each (token, row). Small ones decide, and are exact: 1 − u is what is drawn."""
    bits_cv = philox(seed_1, token_c[:, None].expand_as(like_cv), row_v[None, :].expand_as(like_cv))
    return -torch.log1p(-(bits_cv.to(like_cv.dtype) + 0.5) * 2.0**-32)
