"""Inputs that a benchmark of a filtering loss may be run on: the head of a language model trained for a moment.

Random hidden states and classifiers have flat softmaxes, zero inputs trivial ones; both misjudge any filter. Here a
small causal LM (two layers, untied head) is trained with plain PyTorch on token ids, and its last hidden states,
classifier and labels are the inputs. With ``steps=0`` they are those at random initialisation.

Shapes: N tokens, D hidden, V vocabulary.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cce_dist import VocabShard, linear_cross_entropy
from cce_dist.loss.frequent import counts_of

SEQUENCE = 512


class Inputs(NamedTuple):
    """hidden_ND and weight_VD in the benchmark's dtype, labels_N, the model's loss on them, and how often each row was
    a label in training, int32 [V] (None: never)."""

    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor
    loss: float
    counts_V: Tensor | None = None


def load_tokens(path: Path, vocab_size: int, dense: bool = False) -> np.ndarray:
    """Token ids below ``vocab_size`` from a .npy array, or an .npz with ``ids``, or with their low and high bits.

    A file of a larger vocabulary is mapped onto this one by spreading its distinct ids evenly, in their order, so that
    rows which never occur stand between those that do; ``dense``: they are the first ones, without any between.
    """
    stored = np.load(path)
    if isinstance(stored, np.ndarray):
        ids = stored.astype(np.int64)
    elif "ids" in stored:
        ids = stored["ids"].astype(np.int64)
    else:
        ids = stored["lo"].astype(np.int64) + (stored["hi"].astype(np.int64) << 16)
        ids = ids[ids < 262144]
    if ids.max() < vocab_size and not dense:
        return ids
    distinct, rank = np.unique(ids, return_inverse=True)
    if len(distinct) > vocab_size:
        raise ValueError(f"{path} holds {len(distinct)} distinct ids, more than the vocabulary of {vocab_size}.")
    return rank if dense else rank * vocab_size // len(distinct)


def tokens_for(path: Path, vocab_size: int) -> np.ndarray:
    """`load_tokens`, but of more distinct ids than ``vocab_size`` the rarest become one."""
    ids = load_tokens(path, 1 << 31)
    distinct, rank, count = np.unique(ids, return_inverse=True, return_counts=True)
    if ids.max() < vocab_size:
        return ids
    if len(distinct) > vocab_size:
        kept = np.sort(np.argsort(-count, kind="stable")[: vocab_size - 1])
        place = np.full(len(distinct), vocab_size - 1)
        place[kept] = np.arange(vocab_size - 1)
        return place[rank]
    return rank * vocab_size // len(distinct)


class _Model(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.position = nn.Embedding(SEQUENCE, hidden_size)
        heads = hidden_size // 64 if hidden_size % 64 == 0 else 1
        layer = nn.TransformerEncoderLayer(
            hidden_size, heads, 2 * hidden_size, dropout=0.0, batch_first=True, norm_first=True, bias=False
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.RMSNorm(hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=hidden_size**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device, dtype=x.dtype)
        return self.norm(self.layers(x, mask=mask, is_causal=True))


def trained_inputs(
    tokens: np.ndarray,
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    *,
    steps: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    cache: Path | None = None,
) -> Inputs:
    """Trains for ``steps`` steps of 8192 tokens and returns the head's inputs on ``num_tokens`` later tokens.

    Those that the folder ``cache`` holds, of this or another command, are taken from there, the first of as many.
    """
    path = None if cache is None else cache / f"inputs-{vocab_size}-{hidden_size}-{steps}-{dtype}.pt"
    if path is not None and path.exists():
        hidden_ND, weight_VD, labels_N, losses, counts_V = torch.load(path, map_location=device, weights_only=True)
        if labels_N.shape[0] >= num_tokens:
            loss = losses[: -(-num_tokens // 1024)].mean().item()
            return Inputs(hidden_ND[:num_tokens].clone(), weight_VD, labels_N[:num_tokens].clone(), loss, counts_V)
    torch.manual_seed(0)
    with torch.device(device):
        model = _Model(vocab_size, hidden_size)
    rate = 1e-3 * min(1.0, 768 / hidden_size)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=device == "cuda")
    per_step = 8192
    sequences = torch.from_numpy(tokens[: len(tokens) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE)
    shuffled = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0))
    stream = sequences[shuffled].view(-1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20)
        ids = stream[step * per_step : (step + 1) * per_step + 1].to(device)
        with torch.autocast(device, torch.bfloat16):
            hidden = model(ids[:-1].view(-1, SEQUENCE)).view(-1, hidden_size)
            loss = linear_cross_entropy(hidden, model.head.weight, ids[1:], gradient="exact")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    ids = stream[steps * per_step : steps * per_step + num_tokens + 1].to(device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        hidden = torch.cat([model(part.view(-1, SEQUENCE)).view(-1, hidden_size) for part in ids[:-1].split(per_step)])
        losses = [
            F.cross_entropy(model.head(h).float(), y)
            for h, y in zip(hidden.split(1024), ids[1:].split(1024), strict=True)
        ]
    stored = (
        hidden.to(dtype).contiguous(),
        model.head.weight.detach().to(dtype).contiguous(),
        ids[1:].clone(),
        torch.stack(losses),
        torch.bincount(stream[1 : steps * per_step + 1], minlength=vocab_size).to(device, torch.int32),
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(stored, path)
    return Inputs(*stored[:3], stored[3].mean().item(), stored[4])


def set_counts(weight_VD: Tensor, inputs: Inputs, shard: VocabShard | None = None) -> None:
    """Makes training's labels those that the classifier has counted: before each run, so that none counts its own.

    Rows are chosen in one of 16 calls, and where none was chosen yet.
    """
    if inputs.counts_V is not None:
        counts = counts_of(weight_VD, shard or VocabShard.whole(weight_VD.shape[0]), weight_VD.device)
        counts.counts_V[:-1].copy_(inputs.counts_V)
