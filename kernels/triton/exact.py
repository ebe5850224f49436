"""Exact gradient: the probabilities of a chunk of the vocabulary at a time in 16 bits, and two library products each.

Grid of the kernel: (rows / BLOCK_N) x (blocks of the chunk), columns fastest within a group of row blocks. FLOPs of the
whole: 6·N·V·D (recomputed products, dE, dC). Bytes: P is written and read twice, 6·N·V, from a chunk that the
workspace bounds.

Shapes: N tokens, D hidden, V local rows, v the rows of a chunk.
"""

import torch
import triton
import triton.language as tl

from ..problem import Gradients, Logits, Normaliser, Upstream
from ..products import add_product, product, write_product
from .blocks import add_adapter, can_use_tma, descriptor, load_block, logits_of, precision, probabilities
from .compact import compacted, write_rows
from .operands import LAUNCH, operands_of
from .tuning import tuning_for


@triton.jit
def _probability_kernel(
    p_Nv,
    operands,
    hidden,
    weight,
    upstream,
    normaliser,
    first_column,
    chunk_columns,
    headroom,
    ROW_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    N, V, D = operands.N, operands.V, operands.D
    blocks = tl.cdiv(chunk_columns, BLOCK_V)
    row_blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first_block = program // (ROW_GROUP * blocks) * ROW_GROUP
    blocks_in_group = min(row_blocks - first_block, ROW_GROUP)
    within = program - first_block * blocks
    row = (first_block + within % blocks_in_group) * BLOCK_N
    n_valid = tl.load(operands.n_valid)
    column = within // blocks_in_group * BLOCK_V
    n = row + tl.arange(0, BLOCK_N)
    chunk_range = column + tl.arange(0, BLOCK_V)
    columns = first_column + chunk_range
    p = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if row < n_valid:
        if operands.adapter_NR is not None:
            token = tl.load(operands.token_N + n, mask=n < n_valid, other=0)
            p = add_adapter(p, operands, token, n < n_valid, columns, None, PRECISION)
        for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            e = load_block(hidden, row, d, N, D, operands.stride_hidden, BLOCK_N, BLOCK_D, TMA)
            c = load_block(weight, first_column + column, d, V, D, operands.stride_weight, BLOCK_V, BLOCK_D, TMA)
            p = tl.dot(e, c.T, p, input_precision=PRECISION)
        z, slope = logits_of(operands, p, columns, n, n < n_valid)
        p = probabilities(operands, upstream, normaliser, z, slope, n, n < n_valid, columns, headroom)
    pointers = p_Nv + n[:, None].to(tl.int64) * chunk_columns + chunk_range[None, :]
    inside = (n < N)[:, None] & (chunk_range < chunk_columns)[None, :]
    tl.store(pointers, p.to(p_Nv.dtype.element_ty), mask=inside)


def _not_zero(factor: torch.Tensor) -> torch.Tensor:
    """1 for 0, which a logit_scale of 0 makes: then nothing is added, and what was is 0 too."""
    return torch.where(factor == 0, 1.0, factor)


def _probabilities(
    p_Nv: torch.Tensor,
    logits: Logits,
    hidden_ND: torch.Tensor,
    upstream: Upstream,
    normaliser: Normaliser,
    first: int,
    headroom: float,
) -> None:
    """Fills p_Nv with P of the columns from ``first`` on; ``hidden_ND``: compacted."""
    (rows, columns), weight_VD = p_Nv.shape, logits.weight_VD
    tuning = tuning_for(hidden_ND)
    tma = tuning.tma and can_use_tma(hidden_ND, weight_VD)
    _probability_kernel[(triton.cdiv(rows, tuning.block_n) * triton.cdiv(columns, tuning.block_v),)](
        p_Nv,
        operands_of(logits._replace(hidden_ND=hidden_ND)),
        descriptor(hidden_ND, tuning.block_n, tuning.block_d, tma),
        descriptor(weight_VD, tuning.block_v, tuning.block_d, tma),
        upstream,
        normaliser,
        first,
        columns,
        headroom,
        ROW_GROUP=tuning.row_group,
        BLOCK_N=tuning.block_n,
        BLOCK_V=tuning.block_v,
        BLOCK_D=tuning.block_d,
        TMA=tma,
        PRECISION=precision(logits),
        STAGES=tuning.stages,
        num_warps=tuning.warps,
        **LAUNCH,
    )


def differentiate_exactly(
    logits: Logits,
    normaliser: Normaliser,
    upstream: Upstream,
    dhidden_ND: torch.Tensor | None,
    dweight_VD: torch.Tensor | None,
    dbias_V: torch.Tensor | None,
    headroom: float,
    workspace_bytes: int,
    hidden_begun: bool = False,
    add_weight: bool = False,
    dadapter_NR: torch.Tensor | None = None,
    adapter_begun: bool = False,
) -> None:
    """Adds to ``dhidden_ND`` (fp32; zeros, unless ``hidden_begun``) and writes ``dweight_VD`` (or adds to it, in fp32)
    and ``dbias_V``; adds to an adapter's ``dadapter_NR`` as to dE."""
    hidden_ND, weight_VD = compacted(logits), logits.weight_VD
    trained_ND = hidden_ND if logits.adapter_NR is None else compacted(logits, logits.adapter_NR)
    (rows, hidden_size), vocab = hidden_ND.shape, weight_VD.shape[0]
    factor = upstream.scale * (logits.logit_scale / headroom)
    # P of a chunk, and where dC is not bf16 the chunk of dC in fp32, fit the workspace.
    row_bytes = max(rows * hidden_ND.element_size(), 4 * hidden_size)
    chunk = max(workspace_bytes // row_bytes // logits.tile, 1) * logits.tile
    # Chunks of equal size: the last product would otherwise be a thin one.
    chunks = triton.cdiv(vocab, chunk)
    chunk = triton.cdiv(triton.cdiv(vocab, chunks), logits.tile) * logits.tile
    workspace = torch.empty(rows * min(chunk, vocab), dtype=hidden_ND.dtype, device=hidden_ND.device)
    # In bf16 a factor that is a power of two is exact in the hidden states, and spares a pass over dC (of fewer rows
    # than there are tokens that pass is the smaller one).
    scaled_ND = None
    exact_factor = hidden_ND.dtype == torch.bfloat16 and logits.logit_scale == 1.0
    writes_bf16 = dweight_VD is not None and dweight_VD.dtype == torch.bfloat16
    if exact_factor and (add_weight or (writes_bf16 and vocab > rows)):
        scaled_ND = trained_ND * factor.to(torch.bfloat16)
    if dhidden_ND is not None and hidden_begun:
        dhidden_ND /= _not_zero(factor)
    if dadapter_NR is not None and adapter_begun:
        dadapter_NR /= _not_zero(factor)
    for first in range(0, vocab, chunk):
        columns = min(chunk, vocab - first)
        p_Nv = workspace[: rows * columns].view(rows, columns)
        _probabilities(p_Nv, logits, hidden_ND, upstream, normaliser, first, headroom)
        v = slice(first, first + columns)
        if dhidden_ND is not None:
            add_product(dhidden_ND, p_Nv, weight_VD[v])
        if dadapter_NR is not None and logits.adapter_VR is not None:
            add_product(dadapter_NR, p_Nv, logits.adapter_VR[v])
        if dweight_VD is not None and add_weight and scaled_ND is not None:
            add_product(dweight_VD[v], p_Nv.T, scaled_ND)
        elif dweight_VD is not None and add_weight:
            dweight_VD[v] += product(p_Nv.T, trained_ND).mul_(factor)
        elif dweight_VD is not None and scaled_ND is not None:
            torch.mm(p_Nv.T, scaled_ND, out=dweight_VD[v])
        elif dweight_VD is not None and exact_factor and writes_bf16:
            torch.mm(p_Nv.T, trained_ND, out=dweight_VD[v])
            dweight_VD[v] *= factor
        elif dweight_VD is not None and dweight_VD.dtype == torch.float32:
            write_product(dweight_VD[v], p_Nv.T, trained_ND)
            dweight_VD[v] *= factor
        elif dweight_VD is not None:
            dweight_VD[v] = product(p_Nv.T, trained_ND).mul_(factor)
        if dbias_V is not None:
            dbias_V[v] = p_Nv.sum(0, dtype=torch.float32) * factor
    if dhidden_ND is not None:
        dhidden_ND *= factor
    if dadapter_NR is not None:
        dadapter_NR *= factor


def differentiate_rows(
    logits: Logits,
    row_K: torch.Tensor,
    normaliser: Normaliser,
    upstream: Upstream,
    out: Gradients,
    headroom: float,
    workspace_bytes: int,
    add_weight: bool = False,
) -> None:
    """The same of some rows of the classifier: adds to dE, and writes these rows of dC (or adds to them) and dbias.

    ``logits.target_N`` are places in ``row_K``. Of rows, P and dC there is never more than a chunk.
    """
    hidden_ND, dhidden_ND = compacted(logits), out.hidden_ND
    trained_ND = hidden_ND if logits.adapter_NR is None else compacted(logits, logits.adapter_NR)
    rows, dtype = hidden_ND.shape[0], hidden_ND.dtype
    factor = upstream.scale * (logits.logit_scale / headroom)
    exact_factor = dtype == torch.bfloat16 and logits.logit_scale == 1.0  # see differentiate_exactly
    if dhidden_ND is not None and not exact_factor:
        dhidden_ND /= _not_zero(factor)
    chunk = max(workspace_bytes // max(rows * hidden_ND.element_size(), 1) // logits.tile, 1) * logits.tile
    memory = torch.empty(rows * min(chunk, row_K.shape[0]), dtype=dtype, device=hidden_ND.device)
    for row_k, first in zip(row_K.split(chunk), range(0, row_K.shape[0], chunk), strict=True):
        weight_kD = logits.weight_VD.index_select(0, row_k)
        bias_k = None if logits.bias_V is None else logits.bias_V.index_select(0, row_k)
        target_N = logits.target_N - first if first else logits.target_N
        part = logits._replace(weight_VD=weight_kD, bias_V=bias_k, target_N=target_N, frequent_V=None)
        adapter_kR = None if logits.adapter_VR is None else logits.adapter_VR.index_select(0, row_k)
        part = part._replace(adapter_VR=adapter_kR)
        p_Nk = memory[: rows * row_k.shape[0]].view(rows, -1)
        _probabilities(p_Nk, part, hidden_ND, upstream, normaliser, 0, headroom)
        if out.weight_VD is not None:
            exact = exact_factor and out.weight_VD.dtype == dtype
            dweight_kD = torch.mm(p_Nk.T, trained_ND) if exact else product(p_Nk.T, trained_ND)
            write_rows(out.weight_VD, dweight_kD.mul_(factor), row_k, add_weight)
            del dweight_kD
        if out.bias_V is not None:
            write_rows(out.bias_V, p_Nk.sum(0, dtype=torch.float32).mul_(factor), row_k)
        if dhidden_ND is not None:
            add_product(dhidden_ND, p_Nk, weight_kD.mul_(factor) if exact_factor else weight_kD)
        if out.adapter_NR is not None and adapter_kR is not None:
            out.adapter_NR.add_(product(p_Nk, adapter_kR).mul_(factor))
        del weight_kD, part  # before the next chunk's
    if dhidden_ND is not None and not exact_factor:
        dhidden_ND *= factor
