"""One shard's part of the loss, run alone: what a rank computes between the collectives, without the other ranks.

The log-sum-exp of all shards comes from summarising them one after the other. Also the number of (row, tile) pairs
that a filter keeps, from exact softmax masses in plain torch.

Shapes: N tokens, D hidden, V vocabulary, T tiles of 256 rows; n the rows of a chunk.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from inputs import Inputs
from torch import Tensor

from cce_dist import VocabShard
from cce_dist.kernels import torch_backend
from cce_dist.kernels.problem import (
    MOST_DRAWN,
    TILE,
    Estimate,
    Filter,
    Gradients,
    Logits,
    Normaliser,
    Share,
    Summary,
    Upstream,
    Wanted,
)
from cce_dist.kernels.triton import backend as triton_backend
from cce_dist.loss.frequent import LabelCounts
from cce_dist.loss.settings import CallSettings, Method, check_settings, resolve, workspace_bytes
from cce_dist.shard.rows import even_parts


class Shard(NamedTuple):
    """Rank ``rank`` of ``world``: its logits, and the method that `linear_cross_entropy` would use.

    Attributes:
        frequent: the frequent rows' logits of this rank's share of the tokens, where there are any; then ``logits`` are
            without them. frequent_K: their ids. share: of the tokens, None for all.
    """

    logits: Logits
    method: Method
    workspace: int
    most_drawn: float
    frequent: Logits | None = None
    frequent_K: Tensor | None = None
    share: Share | None = None

    @property
    def backend(self) -> ModuleType:
        return triton_backend if self.method.backend == "triton" else torch_backend


def shard_of(
    inputs: Inputs,
    rank: int = 0,
    world: int = 1,
    gradient: str = "unbiased",
    backend: str = "auto",
    frequent_rows: int | None = None,
) -> Shard:
    """The contiguous shard that `VocabShard.even` gives to a rank; all tokens are valid, and on every rank the same."""
    hidden_ND, weight_VD, labels_N = (x.detach() for x in inputs[:3])
    vocab, tokens = weight_VD.shape[0], labels_N.shape[0]
    start, stop = even_parts((0, vocab), world)[rank]
    shard = VocabShard(((start, stop),), vocab, None)
    arange_N = torch.arange(tokens, dtype=torch.int32, device=labels_N.device)
    logits = Logits(
        hidden_ND,
        weight_VD[start:stop],
        None,
        shard.local_columns(labels_N),
        arange_N,
        arange_N,
        shard.tile_keys(TILE, labels_N.device),
        torch.full((1,), tokens, dtype=torch.int32, device=labels_N.device),
        1.0,
        None,
    )
    settings = check_settings({"gradient": gradient, "backend": backend, "frequent_rows": frequent_rows}, CallSettings)
    method = resolve(settings, hidden_ND, labels_N, shard, needs_grad=True)
    workspace = workspace_bytes(None, method, tokens, hidden_ND.element_size())
    whole = Shard(logits, method, workspace, MOST_DRAWN * (stop - start) / vocab)
    return whole if method.frequent_rows == 0 else _with_frequent_rows(whole, inputs, shard, rank, world)


def _with_frequent_rows(whole: Shard, inputs: Inputs, shard: VocabShard, rank: int, world: int) -> Shard:
    weight_VD, labels_N = inputs.weight_VD.detach(), inputs.labels_N
    counts = LabelCounts(torch.zeros(shard.vocab_size + 1, dtype=torch.int32, device=labels_N.device))
    if inputs.counts_V is not None:
        counts.counts_V[:-1].copy_(inputs.counts_V)
    choice = counts.choose(whole.method.frequent_rows, labels_N, shard)
    id_K = (choice.slot_V >= 0).nonzero()[:, 0]
    slot_N, token_M = choice.slot_V[labels_N], whole.logits.token_N[rank::world].contiguous()
    number = torch.full((1,), token_M.shape[0], dtype=torch.int32, device=labels_N.device)
    logits = whole.logits._replace(
        target_N=torch.where(slot_N >= 0, -1, whole.logits.target_N), frequent_V=choice.slot_v
    )
    frequent = whole.logits._replace(
        weight_VD=weight_VD[id_K], target_N=slot_N[rank::world].contiguous(), token_N=token_M, n_valid=number
    )
    share = None if world == 1 else Share(torch.zeros_like(number), number, rank, world)
    return whole._replace(logits=logits, frequent=frequent, frequent_K=id_K, share=share)


class First(NamedTuple):
    """What a rank has computed before the shards are merged for the first time.

    Attributes:
        summary: of its rows, and the frequent rows for its share of the tokens.
        estimate: of its rows without the frequent ones, None after a full pass, which leaves nothing to refine.
        part: of the frequent rows.
    """

    summary: Summary
    estimate: Estimate | None = None
    part: Summary | None = None


def first_pass(shard: Shard) -> First:
    if shard.method.first_pass == "full":
        return First(shard.backend.summarise(shard.logits, shard.method.gradient != "exact", shard.workspace))
    estimate = triton_backend.estimate(shard.logits)
    if shard.frequent is None:
        return First(estimate.summary, estimate)
    part = triton_backend.summarise(shard.frequent, False, shard.workspace)
    return First(triton_backend.join(estimate.summary, part, shard.share), estimate, part)


def refine(shard: Shard, first: First, estimates: Normaliser) -> Summary:
    """The rest of a forward, with what its backward needs; ``estimates``: the first passes of all shards, merged."""
    if first.estimate is None:
        return first.summary
    summary = triton_backend.refine(shard.logits, first.estimate, estimates, shard.method.refine_eps)
    return summary if first.part is None else triton_backend.join(summary, first.part, shard.share)


def summarise(shard: Shard, estimates: Normaliser | None = None) -> Summary:
    """Forward of one shard; ``estimates``: those of all shards (None: its own)."""
    first = first_pass(shard)
    return refine(shard, first, estimates or merge([first.summary]))


def merge(summaries: Sequence[Summary]) -> Normaliser:
    """What the two all-reduces compute: the log-sum-exp of all shards."""
    unit = summaries[0].unit
    max_N = torch.stack([summary.max_N for summary in summaries]).amax(0)
    sumexp_N = sum(summary.sumexp_N * torch.exp((summary.max_N - max_N) * unit) for summary in summaries)
    assert isinstance(sumexp_N, Tensor)
    return Normaliser(max_N, sumexp_N.log() / unit, unit)


def differentiate(shard: Shard, summary: Summary, normaliser: Normaliser, seed: Tensor) -> Gradients:
    """Backward of the mean loss on one shard: dE's partial sum, and dC of its rows (frequent ones: 0)."""
    logits, method, share = shard.logits, shard.method, shard.share
    tokens = logits.hidden_ND.shape[0]
    scale = 2.0 ** -(tokens.bit_length() - 1)  # 1 / tokens, rounded up to a power of two
    share_N = torch.full_like(normaliser.max_N, 1 / (tokens * scale))
    upstream = Upstream(share_N, share_N, torch.full((), scale, device=share_N.device))
    wanted = Wanted(True, True, False, logits.weight_VD.dtype, shard.workspace)
    onto_ND = None
    if shard.frequent is not None:
        onto_ND = torch.zeros(logits.hidden_ND.shape, dtype=share_N.dtype, device=share_N.device)
        m = slice(None) if share is None else slice(share.turn, None, share.turns)
        shard.backend.differentiate(
            shard.frequent,
            None,
            Normaliser(normaliser.max_N[m].contiguous(), normaliser.log_sum_N[m].contiguous(), normaliser.unit),
            upstream._replace(softmax_N=share_N[m].contiguous(), target_N=share_N[m].contiguous()),
            Filter("exact"),
            wanted,
            onto_ND=onto_ND[m],
        )
    gradients: Gradients = shard.backend.differentiate(
        logits,
        summary.tiles,
        normaliser,
        upstream,
        Filter(method.gradient, method.filter_eps, True, shard.most_drawn, seed),
        wanted,
        onto_ND=onto_ND,
    )
    return gradients


class Pairs(NamedTuple):
    """Per tile, over all tokens: large pairs (kept whatever is drawn), and expected kept ones of "unbiased"."""

    large_T: Tensor
    expected_T: Tensor


def count_pairs(inputs: Inputs, eps: float, rows: slice = slice(None), frequent_K: Tensor | None = None) -> Pairs:
    """Without the frequent rows. From exact masses: logits in fp32 (products of 16-bit factors, fp32 sums), a chunk of
    tokens at a time."""
    hidden_ND, weight_VD, labels_N = inputs.hidden_ND[rows], inputs.weight_VD, inputs.labels_N[rows]
    vocab = weight_VD.shape[0]
    tiles = -(-vocab // TILE)
    large_T = torch.zeros(tiles, dtype=torch.float64, device=hidden_ND.device)
    expected_T = torch.zeros_like(large_T)
    step = max((1 << 29) // vocab, 1)  # 2 GiB of logits
    for hidden_nD, labels_n in zip(hidden_ND.split(step), labels_N.split(step), strict=True):
        logits_nV = _products(hidden_nD, weight_VD)
        lse_n1 = logits_nV.logsumexp(1, keepdim=True)
        is_other_n = torch.ones_like(labels_n, dtype=torch.bool)
        if frequent_K is not None:
            logits_nV[:, frequent_K] = -torch.inf
            is_other_n = ~torch.isin(labels_n, frequent_K)
        if vocab % TILE:
            logits_nV = torch.nn.functional.pad(logits_nV, (0, tiles * TILE - vocab), value=-torch.inf)
        mass_nT = logits_nV.sub_(lse_n1).exp_().view(-1, tiles, TILE).sum(2)
        large_nT = ~(mass_nT <= eps)
        large_nT[torch.arange(labels_n.shape[0], device=labels_n.device), labels_n // TILE] |= is_other_n
        large_T += large_nT.sum(0)
        expected_T += torch.where(large_nT, 1.0, mass_nT / eps).double().sum(0)
    return Pairs(large_T, expected_T)


def _products(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    return a.float() @ b.float().T
