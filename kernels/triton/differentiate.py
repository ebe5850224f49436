"""Differentiate over the kept pairs: dE[rows] += P C_tile and dC_tile = Pᵀ E[rows], P recomputed.

Programs take items from a queue (see schedule.py) with one atomic counter:
  - PAIR recomputes P of one pair block ([PAIR_ROWS, TILE]: a product over D) and stores it in 16 bits in the ring,
    with its tokens,
  - HIDDEN adds CHUNK_D columns of P C_tile to dE (fp32 atomics: rows of a tile lie anywhere),
  - WEIGHT computes some blocks of BLOCK_D columns of a tile's dC, products over its kept rows, and writes them once.
With an adapter WEIGHT items compute dB in place of dC, and PAIR items add P B_tile to da from registers.
Where one chunk holds all of D, a PAIR item adds to dE itself, from registers.
Grid: on Hopper two programs of one warpgroup a multiprocessor, 128 x 128 accumulators each, so that one's additions,
exponentials and waits run beside the other's products.
FLOPs: 6·pairs·TILE·D. Bytes: in L2 4·pairs·D of atomics and 4·pairs·D of gathered rows; in memory, by the queue's
order, dE and E about once a wave, and dC's V·D·2.

Shapes: N tokens, D hidden, V local rows, T tiles, W waves, Q items.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..problem import Gradients, Logits, Normaliser, Upstream
from .blocks import (
    BLOCK_R,
    can_use_tma,
    descriptor,
    load_block,
    load_rows,
    logits_of,
    precision,
    probabilities,
    products_of_rows,
)
from .operands import LAUNCH, Pairs, Tail, operands_of
from .schedule import PAIR, WEIGHT, schedule, unpack
from .select import kept_tokens, pair_weight
from .tuning import num_programs, tuning_for


class Ring(NamedTuple):
    """P of the pair blocks under way, [rows of all blocks, TILE] in 16 bits (fp32), and their tokens."""

    p: torch.Tensor
    token: torch.Tensor


@triton.jit
def _wait(counter, at_least):
    while tl.atomic_add(counter, 0, sem="acquire") < at_least:
        pass


@triton.jit
def _signal(counter):
    # All threads' loads and stores come before the one release.
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _ring_pointers(ring, row, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Rows [row, row + ROWS) of the ring."""
    rows = row + tl.arange(0, ROWS)
    return ring.p + rows[:, None].to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]


@triton.jit
def _hidden_item(
    dhidden_ND,
    p,
    n,
    valid,
    tile,
    first_d,
    operands,
    weight,
    factor,
    TILE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds CHUNK_D columns of P C to the tokens n of dE."""
    V, D = operands.V, operands.D
    for d in tl.range(first_d, min(first_d + CHUNK_D, D), BLOCK_D, num_stages=STAGES):
        c = load_block(weight, tile * TILE, d, V, D, operands.stride_weight, TILE, BLOCK_D, TMA)
        part = tl.dot(p, c.to(p.dtype), input_precision=PRECISION) * factor
        d_range = d + tl.arange(0, BLOCK_D)
        pointers = dhidden_ND + n[:, None].to(tl.int64) * D + d_range[None, :]
        tl.atomic_add(pointers, part, mask=valid[:, None] & (d_range < D)[None, :], sem="relaxed")


@triton.jit
def _trained(operands):
    """What the gradient of rows is a product with: (its rows, their length, their stride); see `Logits.trained`."""
    if operands.adapter_NR is not None:
        return operands.adapter_NR, operands.R, operands.R
    else:
        return operands.hidden, operands.D, operands.stride_hidden


@triton.jit
def _adapter_item(dadapter_NR, p, n, valid, columns, operands, factor, PRECISION: tl.constexpr):
    """Adds P B to the tokens n of an adapter's da."""
    R = operands.R
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        b = load_rows(operands.adapter_VR, columns, columns < operands.V, r, R, R, BLOCK_R)
        part = tl.dot(p, b, input_precision=PRECISION) * factor
        r_range = r + tl.arange(0, BLOCK_R)
        pointers = dadapter_NR + n[:, None].to(tl.int64) * R + r_range[None, :]
        tl.atomic_add(pointers, part, mask=valid[:, None] & (r_range < R)[None, :], sem="relaxed")


@triton.jit
def _weight_item(
    out,
    tile,
    columns,
    d,
    count,
    ring,
    ring_row,
    operands,
    tail,
    factor,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_D columns of a tile's dC, from the ring's P and the tail; added to what is there if ADD."""
    V = operands.V
    x_ND, D, stride = _trained(operands)
    pi = tl.zeros([TILE], tl.float32)
    if tail.pi_V is not None:
        pi = tl.load(tail.pi_V + columns, mask=columns < V, other=0.0)
    gradient = tl.zeros([TILE, BLOCK_D], tl.float32)
    for k in tl.range(0, count, BLOCK_K, num_stages=STAGES):
        listed = k + tl.arange(0, BLOCK_K)
        token = tl.load(ring.token + ring_row + listed)
        p = tl.load(_ring_pointers(ring, ring_row + k, BLOCK_K, TILE))
        e = load_rows(x_ND, token, listed < count, d, D, stride, BLOCK_D)
        gradient = tl.dot(p.T, e, gradient, input_precision=PRECISION)
    d_range = d + tl.arange(0, BLOCK_D)
    if tail.pi_V is not None:
        means = tl.load(tail.sum_TD + tile.to(tl.int64) * D + d_range, mask=d_range < D, other=0.0).to(tl.float32)
        gradient += pi[:, None] * means[None, :]
    pointers = out.weight_VD + columns[:, None].to(tl.int64) * D + d_range[None, :]
    inside = (columns < V)[:, None] & (d_range < D)[None, :]
    gradient *= factor
    if ADD:  # once for each element; reading it before would take registers that there are not
        tl.atomic_add(pointers, gradient, mask=inside, sem="relaxed")
    else:
        tl.store(pointers, gradient.to(out.weight_VD.dtype.element_ty), mask=inside)
    if out.bias_V is not None:  # noqa: SIM102 (the outer condition is known when compiling)
        if d == 0:
            bias_gradient = tl.zeros([TILE], tl.float32)
            for k in range(0, count, BLOCK_K):
                p = tl.load(_ring_pointers(ring, ring_row + k, BLOCK_K, TILE))
                bias_gradient += tl.sum(p.to(tl.float32), 0)
            if tail.pi_V is not None:
                bias_gradient += pi * tl.load(tail.sum_T + tile)
            tl.store(out.bias_V + columns, bias_gradient * factor, mask=columns < V)


@triton.jit
def _differentiate_kernel(
    out,
    operands,
    weight,
    weight_of_hidden,
    pairs,
    kept,
    upstream,
    normaliser,
    tail,
    ring,
    queue,
    T,
    headroom,
    ADD_WEIGHT: tl.constexpr,
    TILE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    ADD_AT_ONCE: tl.constexpr,
    USE_RING: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    PAIR_D: tl.constexpr,
    PAIR_STAGES: tl.constexpr,
    CHUNK_D: tl.constexpr,
    HIDDEN_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHT_BLOCKS: tl.constexpr,
):
    block_items = queue.chunks * queue.hidden_items
    tile_items = queue.chunks * queue.weight_items
    ready_W, done_W = queue.counters + 1, queue.counters + 1 + T
    _x, width, _stride = _trained(operands)
    num_items = tl.load(queue.total) * (1 + block_items) + T * tile_items
    factor = tl.load(upstream.scale).to(tl.float32) * operands.scale / headroom
    index = tl.atomic_add(queue.counters, 1, sem="relaxed")
    item = tl.load(queue.item_Q + index, mask=index < num_items, other=0)
    while index < num_items:
        # The next item is fetched now, so that its latency is hidden; it comes later, so nothing new can wait on it.
        next_index = tl.atomic_add(queue.counters, 1, sem="relaxed")
        next_item = tl.load(queue.item_Q + next_index, mask=next_index < num_items, other=0)
        kind, tile, sub, chunk = unpack(item)
        count = tl.load(kept.count_T + tile)
        wave = tl.load(queue.wave_T + tile)
        ring_row = tl.load(queue.slot_T + tile) * PAIR_ROWS
        columns = tile * TILE + tl.arange(0, TILE)
        listed = sub * PAIR_ROWS + tl.arange(0, PAIR_ROWS)
        valid = listed < count
        if kind == PAIR:
            token = tl.load(kept.list_TN + tile.to(tl.int64) * kept.stride + listed, mask=valid, other=0).to(tl.int32)
            n = tl.load(operands.place_N + token, mask=valid, other=0)
            products = products_of_rows(
                operands, weight, token, valid, tile, PAIR_ROWS, TILE, PAIR_D, TMA, PRECISION, PAIR_STAGES
            )
            z, slope = logits_of(operands, products, columns, n, valid)
            k, _ = pair_weight(operands, pairs, n, valid, tile, TILE)
            p = probabilities(operands, upstream, normaliser, z, slope, n, valid, columns, k * headroom)
            p = p.to(ring.p.dtype.element_ty)
            if out.adapter_NR is not None:
                _adapter_item(out.adapter_NR, p, n, valid, columns, operands, factor, PRECISION)
            if USE_RING:
                if wave >= queue.waves_at_once:
                    old = wave - queue.waves_at_once
                    items = tl.load(queue.blocks_W + old) * block_items + tl.load(queue.tiles_W + old) * tile_items
                    _wait(done_W + old, items)
                tl.store(_ring_pointers(ring, ring_row + sub * PAIR_ROWS, PAIR_ROWS, TILE), p)
                tl.store(ring.token + ring_row + listed, token)
                _signal(ready_W + wave)
            if ADD_AT_ONCE:
                _hidden_item(
                    out.hidden_ND,
                    p,
                    n,
                    valid,
                    tile,
                    0,
                    operands,
                    weight_of_hidden,
                    factor,
                    TILE,
                    TMA,
                    PRECISION,
                    PAIR_STAGES,
                    CHUNK_D,
                    HIDDEN_D,
                )
        else:
            _wait(ready_W + wave, tl.load(queue.blocks_W + wave))
            if kind == WEIGHT:
                if out.weight_VD is not None:
                    first_d = chunk * CHUNK_D + sub * WEIGHT_BLOCKS * BLOCK_D
                    if WEIGHT_BLOCKS == 1:  # as a loop of one it takes more registers
                        if first_d < width:  # the last chunk may be cut off
                            _weight_item(
                                out,
                                tile,
                                columns,
                                first_d,
                                count,
                                ring,
                                ring_row,
                                operands,
                                tail,
                                factor,
                                ADD_WEIGHT,
                                TILE,
                                PRECISION,
                                PAIR_STAGES,
                                BLOCK_D,
                                BLOCK_K,
                            )
                    else:
                        for d in range(first_d, min(first_d + WEIGHT_BLOCKS * BLOCK_D, width), BLOCK_D):
                            _weight_item(
                                out,
                                tile,
                                columns,
                                d,
                                count,
                                ring,
                                ring_row,
                                operands,
                                tail,
                                factor,
                                ADD_WEIGHT,
                                TILE,
                                PRECISION,
                                PAIR_STAGES,
                                BLOCK_D,
                                BLOCK_K,
                            )
            elif not ADD_AT_ONCE and out.hidden_ND is not None:
                token = tl.load(ring.token + ring_row + listed)
                n = tl.load(operands.place_N + token, mask=valid, other=0)
                _hidden_item(
                    out.hidden_ND,
                    tl.load(_ring_pointers(ring, ring_row + sub * PAIR_ROWS, PAIR_ROWS, TILE)),
                    n,
                    valid,
                    tile,
                    chunk * CHUNK_D,
                    operands,
                    weight_of_hidden,
                    factor,
                    TILE,
                    TMA,
                    PRECISION,
                    PAIR_STAGES,
                    CHUNK_D,
                    HIDDEN_D,
                )
            _signal(done_W + wave)
        index = next_index
        item = next_item


def differentiate(
    logits: Logits,
    pairs: Pairs,
    normaliser: Normaliser,
    upstream: Upstream,
    out: Gradients,
    tail: Tail,
    headroom: float,
    workspace_bytes: int,
    scratch_VD: torch.Tensor | None = None,
    add_weight: bool = False,
) -> None:
    """Adds the kept pairs to ``out.hidden_ND`` (fp32) and writes ``out.weight_VD`` (or adds to it) and ``out.bias_V``.

    ``scratch_VD``: memory that the lists of kept pairs may take, dC's: a tile's list is read for the last time before
    its rows are written.
    """
    hidden_ND, weight_VD = logits.hidden_ND, logits.weight_VD
    tokens, hidden_size = logits.num_tokens, hidden_ND.shape[1]
    device = hidden_ND.device
    tuning = tuning_for(hidden_ND, weight_VD)
    if logits.frequent_V is not None:
        tuning = tuning.for_few_pairs()
    tma = tuning.tma and can_use_tma(weight_VD)
    wants_weight = out.weight_VD is not None or out.bias_V is not None
    trained_VD = logits.trained[1]
    if wants_weight and out.weight_VD is None:  # dC is written along with dbias
        out = out._replace(weight_VD=torch.empty_like(trained_VD))
    chunk_d = max(tuning.chunk_d, tuning.weight_block_d)
    chunks = triton.cdiv(hidden_size, chunk_d)
    weight_blocks = min(tuning.weight_blocks, chunk_d // tuning.weight_block_d)
    weight_columns, few = weight_blocks * tuning.weight_block_d, logits.adapter_VR is not None
    add_at_once = out.hidden_ND is not None and chunks == 1
    block_elements = tuning.pair_rows * logits.tile
    ring_blocks = max(
        workspace_bytes // (block_elements * hidden_ND.element_size()), triton.cdiv(tokens, tuning.pair_rows)
    )
    kept = kept_tokens(logits, pairs, scratch_VD)
    queue = schedule(
        kept.count_T,
        tokens,
        tuning.pair_rows,
        ring_blocks,
        chunks,
        int(out.hidden_ND is not None and not add_at_once),
        triton.cdiv(min(trained_VD.shape[1], chunk_d) if few else chunk_d, weight_columns) if wants_weight else 0,
    )
    ring_rows = queue.waves_at_once * queue.capacity * tuning.pair_rows
    ring = Ring(
        torch.empty(ring_rows * logits.tile, dtype=hidden_ND.dtype, device=device),
        torch.empty(ring_rows, dtype=torch.int32, device=device),
    )
    _differentiate_kernel[(num_programs(hidden_ND) * tuning.pair_programs,)](
        out,
        operands_of(logits),
        descriptor(weight_VD, logits.tile, tuning.pair_block_d, tma),
        descriptor(weight_VD, logits.tile, tuning.hidden_block_d, tma),
        pairs,
        kept,
        upstream,
        normaliser,
        tail,
        ring,
        queue,
        logits.num_tiles,
        headroom,
        ADD_WEIGHT=add_weight,
        TILE=logits.tile,
        TMA=tma,
        PRECISION=precision(logits),
        ADD_AT_ONCE=add_at_once,
        USE_RING=wants_weight or not add_at_once,
        PAIR_ROWS=tuning.pair_rows,
        PAIR_D=tuning.pair_block_d,
        PAIR_STAGES=tuning.pair_stages,
        CHUNK_D=chunk_d,
        HIDDEN_D=tuning.hidden_block_d,
        BLOCK_D=tuning.weight_block_d,
        BLOCK_K=tuning.weight_block_k,
        WEIGHT_BLOCKS=weight_blocks,
        num_warps=tuning.pair_warps,
        **LAUNCH,
    )
