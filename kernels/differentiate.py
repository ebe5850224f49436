"""Differentiate over the kept pairs: dE[rows] += P C_tile and dC_tile = Pᵀ E[rows], P recomputed.

Programs take items from a queue (see schedule.py) with one atomic counter:
  - PAIR recomputes P of one pair block ([PAIR_ROWS, TILE]: a product over D) and stores it in 16 bits in the ring,
    with its tokens,
  - HIDDEN adds CHUNK_D columns of P C_tile to dE (fp32 atomics: rows of a tile lie anywhere),
  - WEIGHT computes BLOCK_D columns of a tile's dC, a product over its kept rows, and writes them once.
Where one chunk holds all of D, a PAIR item adds to dE itself, from registers.
Grid: on Hopper two programs of one warpgroup a multiprocessor, 128 x 128 accumulators each, so that one's additions,
exponentials and waits run beside the other's products.
FLOPs: 6·pairs·TILE·D. Bytes: in L2 4·pairs·D of atomics and 4·pairs·D of gathered rows; in memory, by the queue's
order, dE and E about once a wave, and dC's V·D·2.

Shapes: N tokens, D hidden, V local rows, T tiles, W waves, Q items.
"""

import torch
import triton
import triton.language as tl

from .blocks import LAUNCH, can_use_tma, descriptor, load_block, load_rows, logits_of, precision, products_of_rows
from .problem import Logits, Normaliser, Upstream
from .schedule import PAIR, WEIGHT, schedule, unpack
from .select import Selection, pair_weight
from .tuning import num_programs, tuning_for


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
    return ring + rows[:, None].to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]


@triton.jit
def _hidden_item(
    p,
    n,
    valid,
    tile,
    first_d,
    dhidden_ND,
    weight,
    V,
    D,
    stride_weight,
    factor,
    TILE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds CHUNK_D columns of P C to the rows n of dE."""
    for d in tl.range(first_d, min(first_d + CHUNK_D, D), BLOCK_D, num_stages=STAGES):
        c = load_block(weight, tile * TILE, d, V, D, stride_weight, TILE, BLOCK_D, TMA)
        part = tl.dot(p, c, input_precision=PRECISION) * factor
        d_range = d + tl.arange(0, BLOCK_D)
        pointers = dhidden_ND + n[:, None].to(tl.int64) * D + d_range[None, :]
        tl.atomic_add(pointers, part, mask=valid[:, None] & (d_range < D)[None, :], sem="relaxed")


@triton.jit
def _weight_item(
    tile,
    columns,
    d,
    count,
    ring_row,
    dweight_VD,
    dbias_V,
    ring,
    ring_token,
    hidden,
    pi_V,
    tail_TD,
    tail_T,
    V,
    D,
    stride_hidden,
    factor,
    HAS_TAIL: tl.constexpr,
    TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_D columns of a tile's dC, from the ring's P and the tail."""
    pi = tl.zeros([TILE], tl.float32)
    if HAS_TAIL:
        pi = tl.load(pi_V + columns, mask=columns < V, other=0.0)
    gradient = tl.zeros([TILE, BLOCK_D], tl.float32)
    for k in tl.range(0, count, BLOCK_K, num_stages=STAGES):
        listed = k + tl.arange(0, BLOCK_K)
        token = tl.load(ring_token + ring_row + listed)
        p = tl.load(_ring_pointers(ring, ring_row + k, BLOCK_K, TILE))
        e = load_rows(hidden, token, listed < count, d, D, stride_hidden, BLOCK_D)
        gradient = tl.dot(p.T, e, gradient, input_precision=PRECISION)
    d_range = d + tl.arange(0, BLOCK_D)
    if HAS_TAIL:
        tail = tl.load(tail_TD + tile.to(tl.int64) * D + d_range, mask=d_range < D, other=0.0).to(tl.float32)
        gradient += pi[:, None] * tail[None, :]
    pointers = dweight_VD + columns[:, None].to(tl.int64) * D + d_range[None, :]
    inside = (columns < V)[:, None] & (d_range < D)[None, :]
    tl.store(pointers, (gradient * factor).to(dweight_VD.dtype.element_ty), mask=inside)
    if HAS_BIAS:  # noqa: SIM102 (the outer condition is known when compiling)
        if d == 0:
            bias_gradient = tl.zeros([TILE], tl.float32)
            for k in range(0, count, BLOCK_K):
                p = tl.load(_ring_pointers(ring, ring_row + k, BLOCK_K, TILE))
                bias_gradient += tl.sum(p.to(tl.float32), 0)
            if HAS_TAIL:
                bias_gradient += pi * tl.load(tail_T + tile)
            tl.store(dbias_V + columns, bias_gradient * factor, mask=columns < V)


@triton.jit
def _pair_probabilities(
    n,
    token,
    valid,
    tile,
    columns,
    hidden,
    weight,
    bias,
    softmax_upstream_N,
    target_upstream_N,
    max2_N,
    log2_sum_N,
    tile_lse_TN,
    reference_SN,
    lse2_N,
    target_N,
    token_N,
    eps_N,
    key,
    seed_ptr,
    uniform,
    eps,
    N,
    tiles_per_split,
    V,
    D,
    stride_hidden,
    stride_weight,
    scale,
    softcap,
    headroom,
    TILE: tl.constexpr,
    UNBIASED: tl.constexpr,
    HAS_UNIFORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    PAIR_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """P of one pair block: (a·softmax − b·[target])·f'·k·headroom, zero past the kept rows and columns."""
    products = products_of_rows(
        token,
        valid,
        tile,
        hidden,
        weight,
        V,
        D,
        stride_hidden,
        stride_weight,
        PAIR_ROWS,
        TILE,
        PAIR_D,
        TMA,
        PRECISION,
        STAGES,
    )
    z, slope = logits_of(products, bias, columns, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    k, _ = pair_weight(
        n,
        valid,
        tile,
        tile_lse_TN,
        reference_SN,
        lse2_N,
        target_N,
        token_N,
        eps_N,
        key,
        seed_ptr,
        uniform,
        eps,
        N,
        tiles_per_split,
        TILE,
        UNBIASED,
        HAS_UNIFORM,
    )
    a = tl.load(softmax_upstream_N + n, mask=valid, other=0.0) * k * headroom
    b = tl.load(target_upstream_N + n, mask=valid, other=0.0) * k * headroom
    max2 = tl.load(max2_N + n, mask=valid, other=0.0)
    log2_sum = tl.load(log2_sum_N + n, mask=valid, other=0.0)
    target = tl.load(target_N + n, mask=valid, other=-1)
    p = tl.exp2((z - max2[:, None]) - log2_sum[:, None]) * a[:, None]
    p = tl.where(target[:, None] == columns[None, :], p - b[:, None], p) * slope
    return tl.where(valid[:, None] & (columns < V)[None, :], p, 0.0)


@triton.jit
def _differentiate_kernel(
    dhidden_ND,
    dweight_VD,
    dbias_V,
    ring,
    ring_token,
    item_Q,
    head_ptr,
    ready_W,
    done_W,
    wave_T,
    slot_T,
    blocks_W,
    tiles_W,
    list_TN,
    stride_list,
    count_T,
    place_N,
    total_ptr,
    hidden,
    weight,
    weight_of_hidden,
    bias,
    softmax_upstream_N,
    target_upstream_N,
    scale_ptr,
    max2_N,
    log2_sum_N,
    pi_V,
    tail_TD,
    tail_T,
    tile_lse_TN,
    reference_SN,
    lse2_N,
    target_N,
    token_N,
    eps_N,
    tile_key_T,
    seed_ptr,
    uniform,
    eps,
    N,
    tiles_per_split,
    T,
    V,
    D,
    stride_hidden,
    stride_weight,
    scale,
    softcap,
    headroom,
    waves_at_once,
    block_items,
    tile_items,
    HAS_TAIL: tl.constexpr,
    TILE: tl.constexpr,
    UNBIASED: tl.constexpr,
    HAS_UNIFORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
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
):
    num_items = tl.load(total_ptr) * (1 + block_items) + T * tile_items
    factor = tl.load(scale_ptr).to(tl.float32) * scale / headroom
    index = tl.atomic_add(head_ptr, 1, sem="relaxed")
    item = tl.load(item_Q + index, mask=index < num_items, other=0)
    while index < num_items:
        # The next item is fetched now, so that its latency is hidden; it comes later, so nothing new can wait on it.
        next_index = tl.atomic_add(head_ptr, 1, sem="relaxed")
        next_item = tl.load(item_Q + next_index, mask=next_index < num_items, other=0)
        kind, tile, sub, chunk = unpack(item)
        count = tl.load(count_T + tile)
        wave = tl.load(wave_T + tile)
        ring_row = tl.load(slot_T + tile) * PAIR_ROWS
        columns = tile * TILE + tl.arange(0, TILE)
        listed = sub * PAIR_ROWS + tl.arange(0, PAIR_ROWS)
        valid = listed < count
        if kind == PAIR:
            token = tl.load(list_TN + tile.to(tl.int64) * stride_list + listed, mask=valid, other=0).to(tl.int32)
            n = tl.load(place_N + token, mask=valid, other=0)
            p = _pair_probabilities(
                n,
                token,
                valid,
                tile,
                columns,
                hidden,
                weight,
                bias,
                softmax_upstream_N,
                target_upstream_N,
                max2_N,
                log2_sum_N,
                tile_lse_TN,
                reference_SN,
                lse2_N,
                target_N,
                token_N,
                eps_N,
                tl.load(tile_key_T + tile),
                seed_ptr,
                uniform,
                eps,
                N,
                tiles_per_split,
                V,
                D,
                stride_hidden,
                stride_weight,
                scale,
                softcap,
                headroom,
                TILE,
                UNBIASED,
                HAS_UNIFORM,
                HAS_BIAS,
                HAS_SOFTCAP,
                TMA,
                PRECISION,
                PAIR_ROWS,
                PAIR_D,
                PAIR_STAGES,
            ).to(ring.dtype.element_ty)
            if USE_RING:
                if wave >= waves_at_once:
                    old = wave - waves_at_once
                    items = tl.load(blocks_W + old) * block_items + tl.load(tiles_W + old) * tile_items
                    _wait(done_W + old, items)
                tl.store(_ring_pointers(ring, ring_row + sub * PAIR_ROWS, PAIR_ROWS, TILE), p)
                tl.store(ring_token + ring_row + listed, token)
                _signal(ready_W + wave)
            if ADD_AT_ONCE:
                _hidden_item(
                    p,
                    n,
                    valid,
                    tile,
                    0,
                    dhidden_ND,
                    weight_of_hidden,
                    V,
                    D,
                    stride_weight,
                    factor,
                    TILE,
                    TMA,
                    PRECISION,
                    PAIR_STAGES,
                    CHUNK_D,
                    HIDDEN_D,
                )
        else:
            _wait(ready_W + wave, tl.load(blocks_W + wave))
            if kind == WEIGHT:
                if chunk * CHUNK_D + sub * BLOCK_D < D:  # the last chunk may be cut off
                    _weight_item(
                        tile,
                        columns,
                        chunk * CHUNK_D + sub * BLOCK_D,
                        count,
                        ring_row,
                        dweight_VD,
                        dbias_V,
                        ring,
                        ring_token,
                        hidden,
                        pi_V,
                        tail_TD,
                        tail_T,
                        V,
                        D,
                        stride_hidden,
                        factor,
                        HAS_TAIL,
                        TILE,
                        HAS_BIAS,
                        PRECISION,
                        PAIR_STAGES,
                        BLOCK_D,
                        BLOCK_K,
                    )
            elif not ADD_AT_ONCE:
                token = tl.load(ring_token + ring_row + listed)
                n = tl.load(place_N + token, mask=valid, other=0)
                _hidden_item(
                    tl.load(_ring_pointers(ring, ring_row + sub * PAIR_ROWS, PAIR_ROWS, TILE)),
                    n,
                    valid,
                    tile,
                    chunk * CHUNK_D,
                    dhidden_ND,
                    weight_of_hidden,
                    V,
                    D,
                    stride_weight,
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
    selection: Selection,
    normaliser: Normaliser,
    upstream: Upstream,
    dhidden_ND: torch.Tensor | None,
    dweight_VD: torch.Tensor | None,
    dbias_V: torch.Tensor | None,
    tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None,
    headroom: float,
    workspace_bytes: int,
    scratch_VD: torch.Tensor | None = None,
) -> None:
    """Adds the kept pairs to ``dhidden_ND`` (fp32) and writes ``dweight_VD`` and ``dbias_V``, with
    ``tail`` = (π_V, (R E)_TD, (Σ R)_T where there is a bias).

    ``scratch_VD``: memory that the lists of kept pairs may take, dC's: a tile's list is read for the last time before
    its rows are written.
    """
    hidden_ND, weight_VD = logits.hidden_ND, logits.weight_VD
    (rows, hidden_size), vocab, device = hidden_ND.shape, weight_VD.shape[0], hidden_ND.device
    tuning = tuning_for(hidden_ND)
    tma = tuning.tma and can_use_tma(weight_VD)
    wants_weight = dweight_VD is not None or dbias_V is not None
    if wants_weight and dweight_VD is None:  # dC is written along with dbias
        dweight_VD = torch.empty_like(weight_VD)
    if logits.bias_V is not None and dbias_V is None:
        dbias_V = torch.empty(vocab, dtype=torch.float32, device=device)
    chunk_d = max(tuning.chunk_d, tuning.weight_block_d)
    chunks = triton.cdiv(hidden_size, chunk_d)
    add_at_once = dhidden_ND is not None and chunks == 1
    block_elements = tuning.pair_rows * logits.tile
    ring_blocks = max(
        workspace_bytes // (block_elements * hidden_ND.element_size()), triton.cdiv(rows, tuning.pair_rows)
    )
    list_TN, count_T = selection.kept_tokens(scratch_VD)
    plan = schedule(
        count_T,
        rows,
        tuning.pair_rows,
        ring_blocks,
        chunks,
        int(dhidden_ND is not None and not add_at_once),
        chunk_d // tuning.weight_block_d if wants_weight else 0,
    )
    ring_rows = plan.waves_at_once * plan.capacity * tuning.pair_rows
    ring = torch.empty(ring_rows * logits.tile, dtype=hidden_ND.dtype, device=device)
    ring_token = torch.empty(ring_rows, dtype=torch.int32, device=device)
    unused = plan.counters  # stands in for the pointers that the flags switch off
    _differentiate_kernel[(num_programs(hidden_ND) * tuning.pair_programs,)](
        unused if dhidden_ND is None else dhidden_ND,
        unused if dweight_VD is None else dweight_VD,
        unused if dbias_V is None else dbias_V,
        ring,
        ring_token,
        plan.item_Q,
        plan.counters,
        plan.counters[1:],
        plan.counters[1 + logits.num_tiles :],
        plan.wave_T,
        plan.slot_T,
        plan.blocks_W,
        plan.tiles_W,
        list_TN,
        list_TN.stride(0),
        count_T,
        logits.place_N,
        plan.total,
        hidden_ND,
        descriptor(weight_VD, logits.tile, tuning.pair_block_d, tma),
        descriptor(weight_VD, logits.tile, tuning.hidden_block_d, tma),
        logits.bias_V,
        upstream.softmax_N,
        upstream.target_N,
        upstream.scale,
        normaliser.max_N,
        normaliser.log_sum_N,
        *(tail or (unused, unused, unused)),
        *selection.tensors,
        logits.tile_key_T,
        *selection.draw,
        *selection.sizes,
        logits.num_tiles,
        vocab,
        hidden_size,
        hidden_ND.stride(0),
        weight_VD.stride(0),
        logits.logit_scale,
        1.0 if logits.softcap is None else logits.softcap,
        headroom,
        plan.waves_at_once,
        plan.chunks * plan.hidden_items,
        plan.chunks * plan.weight_items,
        HAS_TAIL=tail is not None,
        HAS_BIAS=logits.bias_V is not None,
        HAS_SOFTCAP=logits.softcap is not None,
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
        num_warps=tuning.pair_warps,
        **selection.flags,
        **LAUNCH,
    )
