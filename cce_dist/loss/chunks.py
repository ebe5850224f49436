"""Logits of a chunk of tokens and of rows at a time: what is not worth a kernel of its own.

Products are the library's, without rounding their sums to 16 bits; the same bits each time.

Shapes: N tokens, D hidden, V local rows of the classifier; c tokens and v rows of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cce_dist.kernels.products import product
from cce_dist.shard import VocabShard

_TOKENS, _ROWS = 4096, 2048
"""Size of a chunk: 32 MiB of fp32, of which about four are alive at a time."""


class Rows(NamedTuple):
    """This rank's rows of the classifier, and what makes logits of their products. With an adapter's rows beside,
    hidden states are [.., D + R]: they and its a."""

    weight_VD: Tensor
    bias_V: Tensor | None
    shard: VocabShard
    logit_scale: float
    softcap: float | None
    adapter_VR: Tensor | None = None


class Tokens(NamedTuple):
    """A chunk of tokens; ``column_c``: the local row of the label, −1 where there is none."""

    hidden_cD: Tensor
    temperature_c: Tensor | None
    column_c: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.hidden_cD.dtype, torch.float32)


def rows_of(
    weight_VD: Tensor,
    bias_V: Tensor | None,
    shard: VocabShard,
    logit_scale: float | None,
    softcap: float | None,
    adapter_VR: Tensor | None = None,
) -> Rows:
    """The real rows of the shard."""
    real = shard.num_real_rows
    scale = 1.0 if logit_scale is None else logit_scale
    bias_V, adapter_VR = (None if x is None else x[:real] for x in (bias_V, adapter_VR))
    return Rows(weight_VD[:real], bias_V, shard, scale, softcap, adapter_VR)


def split(tokens: Tokens) -> list[Tokens]:
    """Into chunks; one of no token, if there is none."""
    number = max(-(-tokens.hidden_cD.shape[0] // _TOKENS), 1)
    parts = [(None,) * number if x is None else x.split(_TOKENS) for x in tokens]
    return [Tokens(*chunk) for chunk in zip(*parts, strict=True)]


def split_rows(rows: Rows) -> Iterator[tuple[slice, Rows]]:
    """(v, the rows v) of each chunk."""
    for first in range(0, rows.weight_VD.shape[0], _ROWS):
        v = slice(first, min(first + _ROWS, rows.weight_VD.shape[0]))
        bias_v, adapter_vR = (None if x is None else x[v] for x in (rows.bias_V, rows.adapter_VR))
        yield v, rows._replace(weight_VD=rows.weight_VD[v], bias_V=bias_v, adapter_VR=adapter_vR)


def logits_of(tokens: Tokens, rows: Rows) -> Iterator[tuple[int, Tensor]]:
    """(first row, logits [c, v]) of each chunk of rows: the same bits each time."""
    for v, of_v in split_rows(rows):
        yield v.start, chunk_logits(tokens, of_v)


def chunk_logits(tokens: Tokens, rows: Rows) -> Tensor:
    """[c, v] of a chunk of rows."""
    hidden_cD, a_cR = tokens.hidden_cD.tensor_split([rows.weight_VD.shape[1]], 1)
    z_cv = product(hidden_cD, rows.weight_VD.to(hidden_cD.dtype).T)
    if rows.adapter_VR is not None:
        z_cv += product(a_cR, rows.adapter_VR.to(a_cR.dtype).T)
    if rows.bias_V is not None:
        z_cv += rows.bias_V.to(tokens.dtype)
    z_cv *= rows.logit_scale
    if rows.softcap is not None:
        z_cv = rows.softcap * torch.tanh(z_cv / rows.softcap)
    if tokens.temperature_c is not None:
        z_cv /= tokens.temperature_c[:, None]
    return z_cv


def first_row(row_N: Tensor, wins_N: Tensor, shard: VocabShard) -> Tensor:
    """Of the ranks that win a token, the smallest global row: a MIN over the vocabulary group."""
    row_N = torch.where(wins_N, row_N, shard.vocab_size - 1)
    dist.all_reduce(row_N, dist.ReduceOp.MIN, group=shard.vocab_group)
    return row_N


def global_rows(column_c: Tensor, shard: VocabShard) -> Tensor:
    """The global row of each local one."""
    row_c, offset = column_c, 0
    for start, stop in shard.runs:
        row_c = torch.where((column_c >= offset) & (column_c < offset + stop - start), column_c + start - offset, row_c)
        offset += stop - start
    return row_c
