"""The next token of a head, greedy or sampled, without logits of more than a chunk on any rank.

argmax_j(z_j / τ − log E_j), E_j independent and exponentially distributed, is a draw from softmax(z / τ) (Gumbel 1954;
as a race of exponentials: Yellott 1977). Each rank draws for its own rows, and the ranks compare their winners: a MAX
of one number a token and a MIN of its id. Draws are the first word of Philox4x32-10 of (seed; token, global row), as
in the loss: with one seed on all ranks, what is drawn does not depend on how the vocabulary is split.

Shapes: N tokens of the token group, D hidden, V local rows of the classifier; c tokens and v rows of a chunk.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cce_dist.kernels.torch_backend import philox
from cce_dist.loss.chunks import Rows, Tokens, global_rows, logits_of, split
from cce_dist.loss.tokens import gather_values, own
from cce_dist.shard import VocabShard
from cce_dist.shard.agreement import agree
from cce_dist.shard.rows import local_rows


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
        temperature: 0 or more; 0: the most likely token, the first of several.
        seed: of the draws, an int or a 0-d int64 tensor. None: drawn from the default generator of the device. Ranks
            may have different ones; the same one on all makes the draws those of one process.

    Returns:
        int64 [...], global ids; the same on all ranks that bring the same tokens.

    Raises:
        ValueError, TypeError: for arguments that do not fit, on every rank of the vocabulary group (there a
            ValueError).
    """
    if shard is not None and not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a VocabShard or None, got {type(shard).__name__}.")
    weight_VD, bias_V = local_rows(weight), local_rows(bias)
    shard = VocabShard.whole(max(weight_VD.shape[0], 1)) if shard is None else shard
    fault: Exception | None = None
    alike: dict[str, Any] = {"softcap": softcap, "logit_scale": logit_scale, "temperature": temperature}
    number = 0
    try:
        _check(hidden, weight_VD, bias_V, shard, temperature)
        number = hidden[..., 0].numel()
        alike |= {"hidden's last dimension": hidden.shape[-1], "hidden's dtype": str(hidden.dtype)}
        alike["bias"] = bias_V is not None
    except Exception as error:
        fault = error  # told to every rank, and raised there
    most = agree(shard, "the next tokens", number, alike, fault)
    tokens = Tokens(gather_values(hidden.reshape(-1, hidden.shape[-1]).contiguous(), shard, most, 0), None, None)
    real = shard.num_real_rows
    rows = Rows(
        weight_VD[:real],
        None if bias_V is None else bias_V[:real],
        shard,
        1.0 if logit_scale is None else logit_scale,
        softcap,
    )
    seed_1 = _seed(seed, hidden.device) if temperature > 0 else None
    best, first_token = [], 0
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in split(tokens):
            best.append(_best(chunk, rows, temperature, seed_1, first_token))
            first_token += chunk.hidden_cD.shape[0]
    score_N, row_N = (torch.cat(parts) for parts in zip(*best, strict=True))
    if shard.vocab_group is not None:
        own_score_N, score_N = score_N, score_N.clone()
        dist.all_reduce(score_N, dist.ReduceOp.MAX, group=shard.vocab_group)
        row_N = torch.where(own_score_N == score_N, row_N, shard.vocab_size - 1)
        dist.all_reduce(row_N, dist.ReduceOp.MIN, group=shard.vocab_group)
    return own(row_N, number, most, shard).view(hidden.shape[:-1])


def _check(hidden: Any, weight_VD: Tensor, bias_V: Tensor | None, shard: VocabShard, temperature: Any) -> None:
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point() or hidden.ndim < 1:
        raise TypeError(f"hidden must be a floating-point tensor [..., D], got {type(hidden).__name__}.")
    if list(weight_VD.shape) != [shard.num_rows, hidden.shape[-1]]:
        raise ValueError(
            f"weight must be [{shard.num_rows}, {hidden.shape[-1]}], the shard's rows and hidden's last dimension, got "
            f"{list(weight_VD.shape)}."
        )
    if bias_V is not None and list(bias_V.shape) != [shard.num_rows]:
        raise ValueError(f"bias must be [{shard.num_rows}], one entry per local row, got {list(bias_V.shape)}.")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number, 0 or more, got {temperature!r}.")


def _seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(1)


def _best(
    tokens: Tokens, rows: Rows, temperature: float, seed_1: Tensor | None, first_token: int
) -> tuple[Tensor, Tensor]:
    """The largest score over this rank's rows [c], and its global row, the first of several."""
    number, device = tokens.hidden_cD.shape[0], tokens.hidden_cD.device
    score_c = torch.full((number,), -torch.inf, dtype=tokens.dtype, device=device)
    row_c = torch.full((number,), rows.shard.vocab_size - 1, dtype=torch.int64, device=device)
    token_c = torch.arange(first_token, first_token + number, device=device)
    for first, z_cv in logits_of(tokens, rows):
        global_v = global_rows(torch.arange(first, first + z_cv.shape[1], device=device), rows.shard)
        if seed_1 is not None:
            z_cv = z_cv / temperature - _exponential(seed_1, token_c, global_v, z_cv).log()
        best_c, where_c = z_cv.max(1)
        is_better_c = best_c > score_c
        row_c = torch.where(is_better_c, global_v[where_c], row_c)
        score_c = torch.where(is_better_c, best_c, score_c)
    return score_c, row_c


def _exponential(seed_1: Tensor, token_c: Tensor, row_v: Tensor, like_cv: Tensor) -> Tensor:
    """E of each (token, row). Small ones decide, and are exact: 1 − u is what is drawn."""
    bits_cv = philox(seed_1, token_c[:, None].expand_as(like_cv), row_v[None, :].expand_as(like_cv))
    return -torch.log1p(-(bits_cv.to(like_cv.dtype) + 0.5) * 2.0**-32)
