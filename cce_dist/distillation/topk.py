"""The largest logits of a head and their ids, exactly, over the whole vocabulary: what a teacher's file holds.

A pass over chunks of logits, each rank over its rows; the ranks' k largest are then gathered, and the k largest of
those taken. Without a gradient.

Collectives, with N tokens in all: own tokens: an all-gather of hidden [n, D] in its dtype. On several ranks, for each
chunk of 4096 tokens: all-gathers of k ids in int64 and of k numbers in fp32 a token (k + 1 with the log-sum-exp).

Shapes: n tokens of this rank, N tokens of the token group, k largest, D hidden, V local rows of the classifier, W ranks
of the vocabulary group; c tokens and v rows of a chunk.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce_dist.collectives import gather_tokens
from cce_dist.distillation.settings import TopkSettings
from cce_dist.loss.call import begin_without_labels
from cce_dist.loss.chunks import Rows, Tokens, global_rows, logits_of, rows_of, split
from cce_dist.loss.settings import takes_settings
from cce_dist.loss.tokens import gather_values, own
from cce_dist.shard import VocabShard


class TopLogits(NamedTuple):
    """Of each token the k largest logits, in descending order.

    Attributes:
        values: [..., k], in fp32 (fp64 for fp64).
        ids: [..., k], int64, global. Of equal logits it is open which come first; where a value is −∞, the id says
            nothing.
        lse: [...], log Σ exp z over the whole vocabulary, so that values − lse are log-probabilities. None unless it is
            asked for.
    """

    values: Tensor
    ids: Tensor
    lse: Tensor | None = None

    @property
    def logprobs(self) -> Tensor:
        """[..., k], of the ids in the whole vocabulary.

        Raises:
            ValueError: the log-sum-exp was not asked for.
        """
        if self.lse is None:
            raise ValueError("log-probabilities need the log-sum-exp: pass return_lse=True to linear_topk.")
        return self.values - self.lse[..., None]


@torch.no_grad()
@takes_settings(TopkSettings)
def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    shard: VocabShard | None = None,
    return_lse: bool = False,
    **settings: Any,
) -> TopLogits:
    """The k largest of all logits z / temperature of each token, z as in `linear_cross_entropy`.

    Every rank of ``shard.vocab_group`` must make the call, also with no token.

    Args:
        hidden: [..., D], fp32, fp16, bf16 or fp64; cast to the autocast dtype under autocast.
        weight: [V, D], this rank's rows.
        k: 1 to ``shard.vocab_size``, the same on all ranks; it may be more than a rank has rows.
        bias: [V], this rank's.
        shard: which global rows these are, and the process groups. None: all rows, in this process alone.
        softcap, logit_scale: None leaves them out.
        temperature: what the logits are divided by, after the softcap.
        return_lse: also find the log-sum-exp, in the same pass.

    Returns:
        `TopLogits`, the same on all ranks that bring the same tokens.

    Raises:
        ValueError, TypeError: for arguments that do not fit, on every rank of the vocabulary group (there a
            ValueError).
    """

    def check(chosen: TopkSettings, shard: VocabShard) -> tuple[int, dict[str, Any]]:
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= shard.vocab_size:
            raise ValueError(f"k must be an int from 1 to vocab_size = {shard.vocab_size}, got {k!r}.")
        return hidden.shape[:-1].numel(), {"k": k, "return_lse": return_lse}

    head = begin_without_labels(hidden, weight, bias, shard, settings, TopkSettings, "the largest logits", check)
    shard, number = head.shard, head.hidden_nD.shape[0]
    tokens = Tokens(gather_values(head.hidden_nD.contiguous(), shard, head.most, 0), None, None)
    rows = rows_of(head.weight_VD, head.bias_V, shard, *head.settings.scale_and_cap)
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [_merged(*_largest(chunk, rows, k, return_lse), shard) for chunk in split(tokens)]

    def shaped(parts_N: tuple[Tensor, ...]) -> Tensor:
        own_n = own(torch.cat(parts_N), number, head.most, shard)
        return own_n.view(*hidden.shape[:-1], *own_n.shape[1:])

    numbers, ids = (shaped(parts_N) for parts_N in zip(*parts, strict=True))
    return TopLogits(numbers[..., :k], ids, numbers[..., k] if return_lse else None)


def _largest(tokens: Tokens, rows: Rows, k: int, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Of this rank's rows: the k largest logits, −∞ where there are fewer rows, and where it is asked for the
    log-sum-exp as one more, [c, k or k + 1]; and the global rows [c, k]."""
    number, device = tokens.hidden_cD.shape[0], tokens.hidden_cD.device
    top_ck = torch.full((number, k), -torch.inf, dtype=tokens.dtype, device=device)
    row_ck = torch.zeros((number, k), dtype=torch.int64, device=device)
    lse_c1 = torch.full((number, 1), -torch.inf, dtype=tokens.dtype, device=device)
    for first, z_cv in logits_of(tokens, rows):
        if with_lse:
            lse_c1 = torch.logaddexp(lse_c1, z_cv.logsumexp(1, keepdim=True))
        chunk_ck, where_ck = z_cv.topk(min(k, z_cv.shape[1]))
        both, place_ck = torch.cat((top_ck, chunk_ck), 1).topk(k)
        row_ck, top_ck = torch.cat((row_ck, first + where_ck), 1).gather(1, place_ck), both
    return torch.cat((top_ck, lse_c1), 1) if with_lse else top_ck, global_rows(row_ck, rows.shard)


def _merged(numbers_cx: Tensor, row_ck: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The same over the rows of all ranks."""
    if shard.vocab_group is None:
        return numbers_cx, row_ck
    c, k = row_ck.shape
    numbers_Wcx = gather_tokens(numbers_cx, c, shard.vocab_group).view(-1, c, numbers_cx.shape[1])
    row_cX = gather_tokens(row_ck, c, shard.vocab_group).view(-1, c, k).transpose(0, 1).flatten(1)
    top_ck, place_ck = numbers_Wcx[:, :, :k].transpose(0, 1).flatten(1).topk(k)
    lse_c1 = numbers_Wcx[:, :, k:].logsumexp(0)  # [c, 0] where it is not asked for
    return torch.cat((top_ck, lse_c1), 1), row_cX.gather(1, place_ck)
