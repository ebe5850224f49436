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
from cce_dist.kernels.problem import MOST_DRAWN, TILE, Filter, Gradients, Logits, Normaliser, Summary, Upstream, Wanted
from cce_dist.kernels.triton import backend as triton_backend
from cce_dist.loss.settings import Method, check_settings, resolve, workspace_bytes
from cce_dist.shard.rows import even_parts


class Shard(NamedTuple):
    """Rank ``rank`` of ``world``: its logits, and the method that `linear_cross_entropy` would use."""

    logits: Logits
    method: Method
    workspace: int
    most_drawn: float

    @property
    def backend(self) -> ModuleType:
        return triton_backend if self.method.backend == "triton" else torch_backend


def shard_of(inputs: Inputs, rank: int = 0, world: int = 1, gradient: str = "unbiased", backend: str = "auto") -> Shard:
    """The contiguous shard that `VocabShard.even` gives to a rank; all tokens are valid."""
    hidden_ND, weight_VD, labels_N = inputs[:3]
    vocab, tokens = weight_VD.shape[0], labels_N.shape[0]
    start, stop = even_parts((0, vocab), world)[rank]
    shard = VocabShard(((start, stop),), vocab, None)
    arange_N = torch.arange(tokens, dtype=torch.int32, device=labels_N.device)
    logits = Logits(
        hidden_ND.detach(),
        weight_VD.detach()[start:stop],
        None,
        shard.local_columns(labels_N),
        arange_N,
        arange_N,
        shard.tile_keys(TILE, labels_N.device),
        torch.full((1,), tokens, dtype=torch.int32, device=labels_N.device),
        1.0,
        None,
    )
    settings = check_settings({"gradient": gradient, "backend": backend})
    method = resolve(settings, hidden_ND, labels_N, shard, needs_grad=True)
    workspace = workspace_bytes(None, method, tokens, hidden_ND.element_size())
    return Shard(logits, method, workspace, MOST_DRAWN * (stop - start) / vocab)


def summarise(shard: Shard, estimates: Normaliser | None = None) -> Summary:
    """Forward of one shard, with what its backward needs.

    After a first pass in 8 bits it is refined against ``estimates``, those of all shards (None: its own).
    """
    logits, method = shard.logits, shard.method
    if method.first_pass == "full":
        return shard.backend.summarise(logits, method.gradient != "exact", shard.workspace)
    estimate = triton_backend.estimate(logits)
    return triton_backend.refine(logits, estimate, estimates or merge([estimate.summary]), method.filter_eps)


def merged_estimates(shards: Sequence[Shard]) -> Normaliser | None:
    """What the all-reduces between the two passes compute; None where there is one pass."""
    if shards[0].method.first_pass == "full":
        return None
    return merge([triton_backend.estimate(shard.logits).summary for shard in shards])


def merge(summaries: Sequence[Summary]) -> Normaliser:
    """What the two all-reduces compute: the log-sum-exp of all shards."""
    unit = summaries[0].unit
    max_N = torch.stack([summary.max_N for summary in summaries]).amax(0)
    sumexp_N = sum(summary.sumexp_N * torch.exp((summary.max_N - max_N) * unit) for summary in summaries)
    assert isinstance(sumexp_N, Tensor)
    return Normaliser(max_N, sumexp_N.log() / unit, unit)


def differentiate(shard: Shard, summary: Summary, normaliser: Normaliser, seed: Tensor) -> Gradients:
    """Backward of the mean loss on one shard: dE's partial sum, and dC of its rows."""
    logits, method = shard.logits, shard.method
    tokens = logits.hidden_ND.shape[0]
    scale = 2.0 ** -(tokens.bit_length() - 1)  # 1 / tokens, rounded up to a power of two
    share_N = torch.full_like(normaliser.max_N, 1 / (tokens * scale))
    return shard.backend.differentiate(
        logits,
        summary.tiles,
        normaliser,
        Upstream(share_N, share_N, torch.full((), scale, device=share_N.device)),
        Filter(method.gradient, method.filter_eps, True, shard.most_drawn, seed),
        Wanted(True, True, False, logits.weight_VD.dtype, shard.workspace),
    )


class Pairs(NamedTuple):
    """Per tile, over all tokens: large pairs (kept whatever is drawn), and expected kept ones of "unbiased"."""

    large_T: Tensor
    expected_T: Tensor


def count_pairs(inputs: Inputs, eps: float, rows: slice = slice(None)) -> Pairs:
    """From exact masses: logits in fp32 (products of 16-bit factors, fp32 sums), a chunk of tokens at a time."""
    hidden_ND, weight_VD, labels_N = inputs.hidden_ND[rows], inputs.weight_VD, inputs.labels_N[rows]
    vocab = weight_VD.shape[0]
    tiles = -(-vocab // TILE)
    large_T = torch.zeros(tiles, dtype=torch.float64, device=hidden_ND.device)
    expected_T = torch.zeros_like(large_T)
    step = max((1 << 29) // vocab, 1)  # 2 GiB of logits
    for hidden_nD, labels_n in zip(hidden_ND.split(step), labels_N.split(step), strict=True):
        logits_nV = _products(hidden_nD, weight_VD)
        lse_n1 = logits_nV.logsumexp(1, keepdim=True)
        if vocab % TILE:
            logits_nV = torch.nn.functional.pad(logits_nV, (0, tiles * TILE - vocab), value=-torch.inf)
        mass_nT = logits_nV.sub_(lse_n1).exp_().view(-1, tiles, TILE).sum(2)
        large_nT = ~(mass_nT <= eps)
        large_nT.scatter_(1, labels_n[:, None] // TILE, True)
        large_T += large_nT.sum(0)
        expected_T += torch.where(large_nT, 1.0, mass_nT / eps).double().sum(0)
    return Pairs(large_T, expected_T)


def _products(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    return a.float() @ b.float().T
