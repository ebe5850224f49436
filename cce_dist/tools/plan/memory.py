"""Bytes of one rank: what each way to spread the head stores, and what the loss holds beside.

In: tokens and rows that a rank works on. Out: `Bytes` and the terms of the loss, derived from what the code allocates.
"""

from typing import Literal, NamedTuple

import torch

from cce_dist.kernels.problem import TILE
from cce_dist.loss.settings import (
    FREQUENT_WORKSPACE,
    LARGE_VOCABULARY,
    MANY_FREQUENT,
    Method,
    Split,
    default_workspace_mb,
    split_budget,
)
from cce_dist.tools.plan.job import ELEMENT

_PAIR_ROWS, _FEW_PAIR_ROWS, _CHUNK_D, _AT_ONCE_D = 128, 64, 512, 1024
"""The sparse backward's work items, as on Hopper (kernels/triton/tuning.json): an 8-byte entry of its queue each."""
OPTIMIZER = 12
"""Bytes of AdamW's state a weight: fp32 weight and two moments."""


class Bytes(NamedTuple):
    """Of one rank, at the head's peak.

    Attributes:
        weight, gradient, optimizer: what the rank stores.
        rows: copies of weights that were gathered, and gradients that are not yet reduced.
        hidden: hidden states of all tokens that the rank works on, and their gradient, where there are others' too.
        logits: logits, or what stands for them from forward to backward.
        workspace: what backward takes beside.
    """

    weight: float = 0.0
    gradient: float = 0.0
    optimizer: float = 0.0
    rows: float = 0.0
    hidden: float = 0.0
    logits: float = 0.0
    workspace: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)


_EXACT = Method("exact", 0.0, "triton", "full", 0)


def budget_of(tokens: int, rows: int, gradient: str, workspace_mb: int | Literal["logits"] | None) -> Split:
    """What is kept of 16-bit ``tokens`` by ``rows`` of the classifier, without a bias, and the bytes beside."""
    exact = gradient == "exact"
    chosen = workspace_mb if isinstance(workspace_mb, int) else default_workspace_mb(tokens, ELEMENT, exact)
    if not exact:
        return Split(0, chosen << 20)
    split = split_budget(workspace_mb, chosen << 20, _EXACT, tokens, rows, torch.bfloat16, read=False)
    return split._replace(workspace=0) if split.columns == rows else split


def loss_bytes(
    tokens: int,
    rows: int,
    hidden: int,
    gradient: str,
    workspace_mb: int | Literal["logits"] | None,
    ranks: int,
) -> tuple[float, ...]:
    """What the loss holds beside its inputs and dC, for 16-bit ``tokens`` by ``rows`` of the classifier.

    Returns:
        The hidden states of all ranks that it saves and the fp32 dE; the summaries of the tiles that it saves, or the
        exponentials of an exact loss's logits; what the
        rest of backward takes at its peak: the workspace, and the tail's (R E) and the queue of pairs, or two copies of
        the hidden states; or the copy of dE at the end (in 16 bits, or in fp32 where ``ranks`` reduce-scatter it); or
        what the frequent rows take, in chunks in one process, with all of them and their fp32 gradient on several.
    """
    exact = gradient == "exact"
    elements = tokens * hidden
    tiles = -(-rows // TILE)
    kept, workspace = budget_of(tokens, rows, gradient, workspace_mb)
    chunks = 0 if hidden <= _AT_ONCE_D else -(-hidden // _CHUNK_D)
    frequent = 0 if exact or rows * ranks < LARGE_VOCABULARY else MANY_FREQUENT
    queue = 8 * tiles * -(-tokens // (_FEW_PAIR_ROWS if frequent else _PAIR_ROWS)) * (1 + chunks)
    beside = 2 * ELEMENT * elements if exact else ELEMENT * tiles * hidden + queue
    at_work = workspace + beside
    at_end = (ELEMENT if ranks == 1 else 4) * elements
    of_frequent = 0
    if frequent and ranks == 1:
        rows_at_once = min(FREQUENT_WORKSPACE // (ELEMENT * tokens), frequent)
        of_frequent = ELEMENT * (elements + rows_at_once * (tokens + 2 * hidden))
    elif frequent:
        at_work += (ELEMENT + 4) * frequent * hidden
    summaries = ELEMENT * tokens * (kept if exact else tiles)
    gathered = 0 if ranks == 1 else ELEMENT * elements
    return float(gathered + 4 * elements), float(summaries), float(max(at_work, of_frequent, at_end))
