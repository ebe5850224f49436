"""Differentiate over the kept pairs: dE[rows] += P C_tile and dC_tile = Pᵀ E[rows], P recomputed.

The kept rows of a tile, cut into blocks of PAIR_ROWS, are the "pair blocks". Work is a queue of items that programs
take in order with one atomic counter:
  - a pair item recomputes P of one pair block ([PAIR_ROWS, TILE]: a product over D), stores it in 16 bits in a ring in
    the workspace, and adds P C_tile to dE (fp32 atomics: rows of a tile lie anywhere);
  - a weight item computes WEIGHT_BLOCKS·BLOCK_D columns of a tile's dC, a product over its kept rows, and writes them
    once.
The ring bounds the memory: a pair item waits until the weight items of the tile that last used its slot are done, a
weight item until its tile's pair blocks are. What an item waits for stands earlier in the queue, and the earliest
unfinished item never waits, so no number of programs can deadlock. Nothing here depends on data that the host would
have to read.
FLOPs: 6·pairs·TILE·D. Bytes: dominated by dE's atomics, 4·pairs·D, and dC's V·D·2.

Shapes: N tokens, D hidden, V local rows, T tiles, B pair blocks.
"""

import torch
import triton
import triton.language as tl

from .blocks import can_use_tma, descriptor, load_block, load_rows, logits_of, precision, products_of_rows
from .problem import Logits, Normaliser, Upstream
from .select import Selection, pair_weight
from .tuning import num_programs, tuning_for

_SUB_BITS = tl.constexpr(15)
_WEIGHT_ITEM = tl.constexpr(1 << 30)


@triton.jit
def _offsets_kernel(count_T, end_T, total_ptr, T, PAIR_ROWS: tl.constexpr, TILES: tl.constexpr):
    """Where each tile's pair blocks end in the order of all pair blocks. Grid: one program."""
    t = tl.arange(0, TILES)
    blocks = tl.cdiv(tl.load(count_T + t, mask=t < T, other=0), PAIR_ROWS)
    tl.store(end_T + t, tl.cumsum(blocks, 0), mask=t < T)
    tl.store(total_ptr, tl.sum(blocks, 0))


@triton.jit
def _schedule_kernel(
    item_Q,
    guard_Q,
    count_T,
    end_T,
    total_ptr,
    T,
    ring_blocks,
    lookahead,
    PAIR_ROWS: tl.constexpr,
    WEIGHT_ITEMS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Writes each item to its place in the queue, and the tile whose weight items it must wait for, or −1.

    Weight items of a tile stand ``lookahead`` pair blocks after its last one: half of what the ring allows, so that
    they find their pair blocks done, and are themselves done when their slots are wanted again. Grid: one program a
    tile.
    """
    tile = tl.program_id(0)
    total = tl.load(total_ptr)
    t = tl.arange(0, TILES)
    end_T_all = tl.load(end_T + t, mask=t < T, other=2147483647 // 2)
    end = tl.load(end_T + tile)
    blocks = tl.cdiv(tl.load(count_T + tile), PAIR_ROWS)
    for sub in range(blocks):
        block = end - blocks + sub
        before = tl.sum((end_T_all + lookahead <= block).to(tl.int32), 0) * WEIGHT_ITEMS
        tl.store(item_Q + block + before, (tile << _SUB_BITS) + sub)
        displaced = tl.sum((end_T_all <= block - ring_blocks).to(tl.int32), 0)
        guarded = (block >= ring_blocks) & (WEIGHT_ITEMS > 0)
        tl.store(guard_Q + block + before, tl.where(guarded, displaced, -1))
    first = min(end + lookahead, total) + tile * WEIGHT_ITEMS
    for sub in range(WEIGHT_ITEMS):
        tl.store(item_Q + first + sub, (tile << _SUB_BITS) + sub + _WEIGHT_ITEM)
        tl.store(guard_Q + first + sub, -1)


@triton.jit
def _wait(counter, at_least):
    while tl.atomic_add(counter, 0, sem="acquire") < at_least:
        pass


@triton.jit
def _signal(counter):
    # All threads' stores come before the one release that publishes them.
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _ring_pointers(
    ring, first_block, k, ring_blocks, TILE: tl.constexpr, PAIR_ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Rows [k, k + BLOCK_K) of the P of a tile whose pair blocks start at ``first_block``."""
    slot = (first_block + k // PAIR_ROWS) % ring_blocks
    row = slot.to(tl.int64) * PAIR_ROWS + k % PAIR_ROWS + tl.arange(0, BLOCK_K)
    return ring + row[:, None] * TILE + tl.arange(0, TILE)[None, :]


@triton.jit
def _weight_item(
    tile,
    columns,
    sub,
    count,
    blocks,
    first_block,
    rows_of_tile,
    dweight_VD,
    dbias_V,
    ring,
    hidden,
    pi_V,
    tail_TD,
    tail_T,
    V,
    D,
    stride_hidden,
    factor,
    ring_blocks,
    HAS_TAIL: tl.constexpr,
    TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCKS·BLOCK_D columns of a tile's dC, from the ring's P and the tail."""
    pi = tl.zeros([TILE], tl.float32)
    if HAS_TAIL:
        pi = tl.load(pi_V + columns, mask=columns < V, other=0.0)
    first_d = sub * BLOCKS * BLOCK_D
    for d in range(first_d, min(first_d + BLOCKS * BLOCK_D, D), BLOCK_D):
        gradient = tl.zeros([TILE, BLOCK_D], tl.float32)
        for k in tl.range(0, blocks * PAIR_ROWS, BLOCK_K, num_stages=STAGES):
            place = k + tl.arange(0, BLOCK_K)
            n = tl.load(rows_of_tile + place, mask=place < count, other=0).to(tl.int32)
            p = tl.load(_ring_pointers(ring, first_block, k, ring_blocks, TILE, PAIR_ROWS, BLOCK_K))
            e = load_rows(hidden, n, place < count, d, D, stride_hidden, BLOCK_D)
            gradient = tl.dot(p.T, e, gradient, input_precision=PRECISION)
        d_range = d + tl.arange(0, BLOCK_D)
        if HAS_TAIL:
            tail = tl.load(tail_TD + tile.to(tl.int64) * D + d_range, mask=d_range < D, other=0.0)
            gradient += pi[:, None] * tail[None, :]
        pointers = dweight_VD + columns[:, None].to(tl.int64) * D + d_range[None, :]
        inside = (columns < V)[:, None] & (d_range < D)[None, :]
        tl.store(pointers, (gradient * factor).to(dweight_VD.dtype.element_ty), mask=inside)
    if HAS_BIAS:  # noqa: SIM102 (the outer condition is known when compiling)
        if sub == 0:
            bias_gradient = tl.zeros([TILE], tl.float32)
            for k in range(0, blocks * PAIR_ROWS, BLOCK_K):
                p = tl.load(_ring_pointers(ring, first_block, k, ring_blocks, TILE, PAIR_ROWS, BLOCK_K))
                bias_gradient += tl.sum(p.to(tl.float32), 0)
            if HAS_TAIL:
                bias_gradient += pi * tl.load(tail_T + tile)
            tl.store(dbias_V + columns, bias_gradient * factor, mask=columns < V)


@triton.jit
def _pair_probabilities(
    n,
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
        n,
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
    item_Q,
    guard_Q,
    head_ptr,
    ready_T,
    done_T,
    list_TN,
    count_T,
    end_T,
    total_ptr,
    hidden,
    weight,
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
    ring_blocks,
    WEIGHT_ITEMS: tl.constexpr,
    WANT_HIDDEN: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    TILE: tl.constexpr,
    UNBIASED: tl.constexpr,
    HAS_UNIFORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    PAIR_D: tl.constexpr,
    PAIR_STAGES: tl.constexpr,
    WEIGHT_BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_items = tl.load(total_ptr) + T * WEIGHT_ITEMS
    factor = tl.load(scale_ptr).to(tl.float32) * scale / headroom
    index = tl.atomic_add(head_ptr, 1)
    item = tl.load(item_Q + index, mask=index < num_items, other=0)
    while index < num_items:
        # The next item is fetched now, so that its latency is hidden; it comes later, so nothing new can wait on it.
        next_index = tl.atomic_add(head_ptr, 1)
        next_item = tl.load(item_Q + next_index, mask=next_index < num_items, other=0)
        is_weight_item = item >= _WEIGHT_ITEM
        packed = tl.where(is_weight_item, item - _WEIGHT_ITEM, item)
        tile = packed >> _SUB_BITS
        sub = packed - (tile << _SUB_BITS)
        count = tl.load(count_T + tile)
        blocks = tl.cdiv(count, PAIR_ROWS)
        first_block = tl.load(end_T + tile) - blocks
        rows_of_tile = list_TN + tile.to(tl.int64) * N
        columns = tile * TILE + tl.arange(0, TILE)
        if is_weight_item:
            _wait(ready_T + tile, blocks)
            _weight_item(
                tile,
                columns,
                sub,
                count,
                blocks,
                first_block,
                rows_of_tile,
                dweight_VD,
                dbias_V,
                ring,
                hidden,
                pi_V,
                tail_TD,
                tail_T,
                V,
                D,
                stride_hidden,
                factor,
                ring_blocks,
                HAS_TAIL,
                TILE,
                HAS_BIAS,
                PRECISION,
                PAIR_ROWS,
                PAIR_STAGES,
                WEIGHT_BLOCKS,
                BLOCK_D,
                BLOCK_K,
            )
            _signal(done_T + tile)
        else:
            place = sub * PAIR_ROWS + tl.arange(0, PAIR_ROWS)
            valid = place < count
            n = tl.load(rows_of_tile + place, mask=valid, other=0).to(tl.int32)
            p = _pair_probabilities(
                n,
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
            if WEIGHT_ITEMS > 0:
                displaced = tl.load(guard_Q + index)
                if displaced >= 0:
                    _wait(done_T + displaced, WEIGHT_ITEMS)
                tl.store(_ring_pointers(ring, first_block, sub * PAIR_ROWS, ring_blocks, TILE, PAIR_ROWS, PAIR_ROWS), p)
                _signal(ready_T + tile)
            if WANT_HIDDEN:
                for d in tl.range(0, D, PAIR_D, num_stages=PAIR_STAGES):
                    c = load_block(weight, tile * TILE, d, V, D, stride_weight, TILE, PAIR_D, TMA)
                    part = tl.dot(p, c, input_precision=PRECISION) * factor
                    d_range = d + tl.arange(0, PAIR_D)
                    pointers = dhidden_ND + n[:, None].to(tl.int64) * D + d_range[None, :]
                    tl.atomic_add(pointers, part, mask=valid[:, None] & (d_range < D)[None, :], sem="relaxed")
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
    tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    headroom: float,
    workspace_bytes: int,
) -> None:
    """Adds the kept pairs to ``dhidden_ND`` (fp32) and writes ``dweight_VD`` and ``dbias_V``, with
    ``tail`` = (π_V, (R E)_TD, (Σ R)_T)."""
    hidden_ND, weight_VD = logits.hidden_ND, logits.weight_VD
    (rows, hidden_size), vocab, device = hidden_ND.shape, weight_VD.shape[0], hidden_ND.device
    tuning, num_tiles = tuning_for(hidden_ND), logits.num_tiles
    tma = tuning.tma and can_use_tma(logits)
    wants_weight = dweight_VD is not None or dbias_V is not None
    if wants_weight and dweight_VD is None:  # dC is written along with dbias
        dweight_VD = torch.empty_like(weight_VD)
    if logits.bias_V is not None and dbias_V is None:
        dbias_V = torch.empty(vocab, dtype=torch.float32, device=device)
    weight_items = triton.cdiv(hidden_size, tuning.weight_block_d * tuning.weight_blocks) if wants_weight else 0

    most_blocks = triton.cdiv(rows, tuning.pair_rows)
    block_elements = tuning.pair_rows * logits.tile
    ring_blocks = max(workspace_bytes // (block_elements * hidden_ND.element_size()), most_blocks)
    ring_blocks = min(ring_blocks, most_blocks * num_tiles)
    ring = torch.empty(ring_blocks * block_elements if wants_weight else 1, dtype=hidden_ND.dtype, device=device)

    list_TN, count_T = selection.kept_rows()
    end_T, total = torch.empty_like(count_T), torch.empty_like(count_T[:1])
    queue = torch.empty((2, num_tiles * (most_blocks + weight_items)), dtype=torch.int32, device=device)
    counters = torch.zeros(2 * num_tiles + 1, dtype=torch.int32, device=device)
    power = triton.next_power_of_2(num_tiles)
    _offsets_kernel[(1,)](count_T, end_T, total, num_tiles, PAIR_ROWS=tuning.pair_rows, TILES=power)
    _schedule_kernel[(num_tiles,)](
        queue[0],
        queue[1],
        count_T,
        end_T,
        total,
        num_tiles,
        ring_blocks,
        (ring_blocks - most_blocks) // 2,
        PAIR_ROWS=tuning.pair_rows,
        WEIGHT_ITEMS=weight_items,
        TILES=power,
    )
    unused = counters  # stands in for the pointers that the flags switch off
    _differentiate_kernel[(num_programs(hidden_ND) * tuning.pair_programs,)](
        unused if dhidden_ND is None else dhidden_ND,
        unused if dweight_VD is None else dweight_VD,
        unused if dbias_V is None else dbias_V,
        ring,
        queue[0],
        queue[1],
        counters[2 * num_tiles :],
        counters,
        counters[num_tiles:],
        list_TN,
        count_T,
        end_T,
        total,
        hidden_ND,
        descriptor(weight_VD, logits.tile, tuning.pair_block_d, tma),
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
        num_tiles,
        vocab,
        hidden_size,
        hidden_ND.stride(0),
        weight_VD.stride(0),
        logits.logit_scale,
        1.0 if logits.softcap is None else logits.softcap,
        headroom,
        ring_blocks,
        WEIGHT_ITEMS=weight_items,
        WANT_HIDDEN=dhidden_ND is not None,
        HAS_TAIL=tail is not None,
        HAS_BIAS=logits.bias_V is not None,
        HAS_SOFTCAP=logits.softcap is not None,
        TMA=tma,
        PRECISION=precision(logits),
        PAIR_ROWS=tuning.pair_rows,
        PAIR_D=tuning.pair_block_d,
        PAIR_STAGES=tuning.pair_stages,
        WEIGHT_BLOCKS=tuning.weight_blocks,
        BLOCK_D=tuning.weight_block_d,
        BLOCK_K=tuning.weight_block_k,
        num_warps=tuning.pair_warps,
        **selection.flags,
    )
