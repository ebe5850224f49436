"""The torch backend: the readable reference, on any device, without ever forming N x V logits.

It works on chunks of whole tiles by chunks of rows, in the order summarise -> select -> tail -> differentiate.
Formulas: "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009), section 4, for the loss; the kept
pairs, mean-field tail and unbiased weights are described in `kernels/triton/select.py` and `tail.py`.

Shapes: N tokens, D hidden, V local rows, T tiles; n, v, t the rows, columns and tiles of a chunk.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from .problem import (
    FAR,
    SUM_BITS,
    Exponentials,
    Filter,
    GlobalTiles,
    Gradients,
    Keep,
    Logits,
    Normaliser,
    Order,
    Ordered,
    OutputGradients,
    Share,
    Summary,
    Tiles,
    TileSums,
    Upstream,
    Wanted,
    largest_scale,
)

SAMPLED_ROWS = 128
SMALLEST_DRAW = 2.0**-32
_TILES_AT_ONCE, _TOKENS_AT_ONCE = 64, 256
"""Of exact sums; chunks of so many tokens stay in a CPU's cache."""


def summarise(
    logits: Logits, want_tiles: bool, workspace_bytes: int, want_entropy: bool = False, keep: Keep | None = None
) -> Summary:
    """Max, Σ exp and target logit of each row; the log-sum-exp of each (tile, row) when ``want_tiles``; Σ exp(z − m)·
    (z − m) when ``want_entropy``. It keeps nothing for backward, whatever ``keep`` says."""
    logits = _compacted(logits)
    rows = logits.num_tokens
    sumexp_N = torch.zeros(rows, dtype=logits.accumulator, device=logits.hidden_ND.device)
    max_N, target_N = torch.full_like(sumexp_N, -torch.inf), torch.zeros_like(sumexp_N)
    tile_lse_TN = sumexp_N.new_empty((logits.num_tiles, rows)) if want_tiles else None
    weighted_N = torch.zeros_like(sumexp_N) if want_entropy else None
    for n, v, t in _chunks(logits, workspace_bytes):
        z_nv = _logits(logits, n, v)[0]
        new_max_n = torch.maximum(max_N[n], z_nv.amax(1))
        safe_max_n = torch.where(new_max_n == -torch.inf, 0.0, new_max_n)
        below_n, below_nv = max_N[n] - safe_max_n, z_nv - safe_max_n[:, None]
        if weighted_N is not None:
            weighted_n = weighted_N[n] + sumexp_N[n] * below_n.clamp(min=FAR)
            weighted_N[n] = weighted_n * below_n.exp() + (below_nv.exp() * below_nv.clamp(min=FAR)).sum(1)
        sumexp_N[n] = sumexp_N[n] * below_n.exp() + below_nv.exp().sum(1)
        max_N[n] = new_max_n
        is_target_nv = _is_target(logits, n, v)
        target_N[n] += torch.where(is_target_nv, z_nv, 0.0).sum(1)
        if tile_lse_TN is not None:
            tile_lse_TN[t, n] = torch.logsumexp(_by_tile(_cold(logits, z_nv, v), logits.tile, -torch.inf), dim=2).T
    tiles = None if tile_lse_TN is None else Tiles(tile_lse_TN)
    return Summary(max_N, sumexp_N, target_N, 1.0, tiles, weighted_N)


def sum_tiles(logits: Logits, tiles: GlobalTiles, workspace_bytes: int) -> TileSums:
    """Max, Σ exp and target logit of each (tile, token), the same bits whatever other tokens and tiles there are.

    Not by a library's product or sum, whose order depends on the number of tokens: products of elements, added by
    halves. So it takes about ten times as long as `summarise`; `triton/exact_sums.py` is the fast one.
    """
    logits = _compacted(logits)
    tokens, hidden_size = logits.hidden_ND.shape
    dtype, hidden_ND = logits.accumulator, logits.hidden_ND
    max_TN = torch.full((len(tiles.spans), tokens), -torch.inf, dtype=dtype, device=hidden_ND.device)
    sumexp_TN, target_N = torch.zeros_like(max_TN), max_TN.new_zeros(tokens)
    chunks = hidden_size.bit_length() + 4  # of that size are alive at a time
    step = max(min(workspace_bytes // (chunks * dtype.itemsize * logits.tile), _TOKENS_AT_ONCE), 1)
    for t, (row, rows) in enumerate(tiles.spans):
        v = slice(row, row + rows)
        weight_Dv = logits.weight_VD[v].to(dtype).T.contiguous()
        for first in range(0, tokens, step):
            n = slice(first, min(first + step, tokens))
            x_nv = _product_by_halves(hidden_ND[n].to(dtype).T.contiguous(), weight_Dv)
            z_nv = _of_products(logits, x_nv, n, v)[0]
            max_n = z_nv.amax(1)
            safe_max_n = torch.where(max_n == -torch.inf, 0.0, max_n)
            # exp, not exp2: on a CPU torch's exp2 has other bits at the end of a vector.
            e_nv = _by_tile((z_nv - safe_max_n[:, None]).exp(), logits.tile, 0.0)[:, 0]
            max_TN[t, n], sumexp_TN[t, n] = max_n, _sum_by_halves(e_nv)
            target_N[n] += torch.where(_is_target(logits, n, v), z_nv, 0.0).sum(1)  # of one number: exact
    none_N = max_TN.new_full((1, tokens), -torch.inf)
    return TileSums(max_TN, sumexp_TN, torch.cat((none_N, max_TN)).amax(0), target_N, 1.0)


def exact_units(sums: TileSums, max_N: Tensor, n_valid: Tensor) -> Tensor:
    """[3, N] int64, to be added over parts of the vocabulary in any order: Σ exp(z − max) in units of 2^-SUM_BITS, each
    tile's rounded; the bits of the target's logit; the number of tiles that are no numbers.

    ``max_N``: of all parts. Of tokens that are not valid the triton backend has no sum.
    """
    bits = torch.int64 if sums.target_N.dtype == torch.float64 else torch.int32
    units_3N = torch.zeros((3, max_N.shape[0]), dtype=torch.int64, device=max_N.device)
    units_3N[1] = sums.target_N.view(bits)
    safe_max_N = torch.where(max_N == -torch.inf, 0.0, max_N)
    for max_tN, sumexp_tN in zip(sums.max_TN.split(_TILES_AT_ONCE), sums.sumexp_TN.split(_TILES_AT_ONCE), strict=True):
        unit_tN = (sumexp_tN * torch.exp((max_tN - safe_max_N) * sums.unit)) * 2.0**SUM_BITS
        is_nan_tN = unit_tN.isnan()
        units_3N[0] += torch.where(is_nan_tN, 0.0, unit_tN).round().long().sum(0)
        units_3N[2] += is_nan_tN.sum(0)
    return units_3N


def join(others: Summary, part: Summary, share: Share | None) -> Summary:
    """The summary of two sets of rows, ``part`` of them for a share of the tokens (None: all of them)."""
    more_3N = torch.stack(part[:3])
    if share is not None:
        place_N = torch.arange(others.max_N.shape[0], device=others.max_N.device) - share.first - share.turn
        index_N = place_N.div(share.turns, rounding_mode="floor")
        use_N = (place_N >= 0) & (place_N % share.turns == 0) & (index_N < share.valid_M)
        none_31 = more_3N.new_tensor((-torch.inf, 0.0, 0.0))[:, None]
        if more_3N.shape[1]:
            more_3N = more_3N[:, index_N.clamp(0, more_3N.shape[1] - 1)]
        more_3N = torch.where(use_N, more_3N, none_31) if more_3N.shape[1] else none_31.expand(3, use_N.shape[0])
    max_N = torch.maximum(others.max_N, more_3N[0])
    shift_N = torch.where(max_N == -torch.inf, 0.0, max_N)
    sumexp_N = others.sumexp_N * torch.exp((others.max_N - shift_N) * others.unit)
    sumexp_N += more_3N[1] * torch.exp((more_3N[0] - shift_N) * others.unit)
    return others._replace(max_N=max_N, sumexp_N=sumexp_N, target_N=others.target_N + more_3N[2])


def differentiate(
    logits: Logits,
    tiles: Tiles | None,
    normaliser: Normaliser,
    upstream: Upstream,
    filter_: Filter,
    wanted: Wanted,
    hidden_ready: Callable[[Tensor], None] | None = None,
    onto_ND: Tensor | None = None,
    onto_NR: Tensor | None = None,
    exponentials: Exponentials | None = None,
) -> Gradients:
    """The gradient of what `Upstream` stands for; see `Filter` and `Gradients`.

    ``onto_ND``, ``onto_NR``: what dE and an adapter's da are added to, in place. ``hidden_ready`` is not called: here
    dE is complete no sooner than dC.
    """
    logits = _compacted(logits)
    hidden_ND, weight_VD = logits.hidden_ND, logits.weight_VD
    trained_ND, trained_VD = logits.trained
    dtype, scale = logits.accumulator, upstream.scale * logits.logit_scale
    dhidden_ND = torch.zeros_like(hidden_ND, dtype=dtype)
    dadapter_NR = None if logits.adapter_NR is None else torch.zeros_like(logits.adapter_NR, dtype=dtype)
    dweight_VD, weight_scale = wanted.onto_VD, scale
    if wanted.weight and dweight_VD is None:
        dweight_VD, weight_scale = torch.zeros_like(trained_VD, dtype=dtype), torch.ones_like(scale)
    dbias_V = torch.zeros(weight_VD.shape[0], dtype=dtype, device=hidden_ND.device)
    eps_N = None if tiles is None else drawing_eps(logits, tiles, normaliser.lse_N, filter_)
    for n, v, t in _chunks(logits, wanted.workspace_bytes):
        z_nv, slope_nv = _logits(logits, n, v)
        z_nv = _cold(logits, z_nv, v)
        log_p_nv = (z_nv - normaliser.max_N[n, None]) - normaliser.log_sum_N[n, None]
        is_target_nv = _is_target(logits, n, v)
        p_nv = _share_of(upstream, n, log_p_nv) * log_p_nv.exp()
        p_nv = torch.where(is_target_nv, p_nv - upstream.target_N[n, None], p_nv) * slope_nv
        if tiles is not None and eps_N is not None:
            weight_tn, _ = keep(logits, tiles, normaliser.lse_N, eps_N, filter_, t, n)
            weight_nv = weight_tn.T.repeat_interleave(logits.tile, dim=1)[:, : p_nv.shape[1]]
            p_nv = torch.where(weight_nv == 0, 0.0, p_nv * weight_nv)
        p_nv = torch.where(_valid(logits, n)[:, None], p_nv, 0.0)
        dhidden_ND[n] += p_nv @ weight_VD[v].to(dtype)
        if dadapter_NR is not None and logits.adapter_VR is not None:
            dadapter_NR[n] += p_nv @ logits.adapter_VR[v].to(dtype)
        if dweight_VD is not None:
            dweight_VD[v] += weight_scale * (p_nv.T @ trained_ND[n].to(dtype))
        dbias_V[v] += p_nv.sum(0)
    if eps_N is not None and tiles is not None and hidden_ND.shape[0] and (filter_.tail or filter_.mode == "unbiased"):
        out = dhidden_ND, dadapter_NR, dweight_VD, dbias_V
        _add_tail(logits, tiles, normaliser.lse_N, eps_N, upstream, filter_, *out, weight_scale)
    dhidden_ND.mul_(scale)
    if dadapter_NR is not None:
        dadapter_NR.mul_(scale)
        dadapter_NR = (dadapter_NR if onto_NR is None else onto_NR.add_(dadapter_NR)) if wanted.adapter else None
    if dweight_VD is not None and wanted.onto_VD is None:
        dweight_VD = dweight_VD.mul_(scale).to(wanted.weight_dtype)
    return Gradients(
        (dhidden_ND if onto_ND is None else onto_ND.add_(dhidden_ND)) if wanted.hidden else None,
        dweight_VD,
        dbias_V.mul_(scale) if wanted.bias else None,
        dadapter_NR,
    )


def add_rows(
    logits: Logits,
    row_K: Tensor,
    normaliser: Normaliser,
    upstream: Upstream,
    out: Gradients,
    workspace_bytes: int,
    add_weight: bool = False,
) -> None:
    """Adds the gradient of some rows, exactly: dE to ``out``, their dC and dbias in place of what stands there, or dC
    to it (``add_weight``).

    ``logits.target_N`` are places in ``row_K`` (int32), or −1.
    """
    bias_K = None if logits.bias_V is None else logits.bias_V[row_K]
    adapter_KR = None if logits.adapter_VR is None else logits.adapter_VR[row_K]
    part = logits._replace(weight_VD=logits.weight_VD[row_K], bias_V=bias_K, frequent_V=None, adapter_VR=adapter_KR)
    dtype = logits.weight_VD.dtype if out.weight_VD is None else out.weight_VD.dtype
    hidden, weight, bias, adapter = (x is not None for x in out)
    wanted = Wanted(hidden, weight, bias, dtype, workspace_bytes, adapter=adapter)
    onto = out.hidden_ND, out.adapter_NR
    got = differentiate(part, None, normaliser, upstream, Filter("exact"), wanted, None, *onto)
    if got.weight_VD is not None and out.weight_VD is not None:
        write_rows(out.weight_VD, got.weight_VD, row_K, add_weight)
    if got.bias_V is not None and out.bias_V is not None:
        write_rows(out.bias_V, got.bias_V, row_K)


def valid_first(labels_N: Tensor, column_N: Tensor, ignore_index: int, vocab_size: int) -> Ordered:
    """The order of the tokens whose label is not ``ignore_index``, and their targets; ``column_N``: of the labels."""
    valid_N = labels_N != ignore_index
    before_N = valid_N.cumsum(0)
    n_valid = before_N[-1:] if valid_N.shape[0] else before_N.new_zeros(1)
    index_N = torch.arange(valid_N.shape[0], device=valid_N.device)
    place_N = torch.where(valid_N, before_N - 1, n_valid + index_N - before_N)
    token_N = torch.empty_like(index_N).scatter_(0, place_N, index_N)
    order = Order(token_N.to(torch.int32), place_N.to(torch.int32), n_valid.to(torch.int32))
    target_N = column_N.masked_fill(~valid_N, -1)[token_N].to(torch.int32)
    return Ordered(order, target_N, (~valid_N | ((labels_N >= 0) & (labels_N < vocab_size))).all())


def losses(normaliser: Normaliser, target_logit_N: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """(nll [N], lse [N]) in the order before compaction, 0 where not valid."""
    return order.restore(normaliser.nll(target_logit_N)), order.restore(normaliser.lse_N)


def upstream(
    gradients: OutputGradients,
    order: Order,
    hidden_dtype: torch.dtype,
    dtype: torch.dtype,
    entropy_N: Tensor | None = None,
    inverse_temperature_N: Tensor | None = None,
) -> Upstream:
    """What the kernels take of the outputs' gradients. ``entropy_N``: of each token, where its gradient is wanted."""
    index_N = torch.arange(order.token_N.shape[0], device=order.token_N.device)

    def to_front(grad_N: Tensor | None) -> Tensor:
        if grad_N is None:
            return torch.zeros(index_N.shape, dtype=dtype, device=index_N.device)
        return torch.where(index_N < order.n_valid, grad_N.to(dtype)[order.token_N], 0)

    nll_N, lse_N, of_entropy_N = (to_front(grad_N) for grad_N in gradients)
    parts = [nll_N + lse_N, nll_N]
    if entropy_N is not None:  # dH/dz_j = −p_j·(log p_j + H)
        parts[0] = parts[0] - of_entropy_N * entropy_N
        parts.append(-of_entropy_N)
    if inverse_temperature_N is not None:
        parts = [part_N * inverse_temperature_N for part_N in parts]
    scale = torch.ones((), dtype=dtype, device=index_N.device)
    if index_N.shape[0]:
        largest = torch.stack(parts).nan_to_num(0.0, 0.0, 0.0).abs().amax()
        scale = torch.exp2(largest.frexp().exponent.clamp(max=largest_scale(hidden_dtype, dtype)).to(dtype))  # 1 for 0
    softmax_N, target_N, *log = (part_N / scale for part_N in parts)
    return Upstream(softmax_N, target_N, scale, log[0] if log else None)


def scatter_rows(rows_ND: Tensor, token_N: Tensor, n_valid: Tensor, dtype: torch.dtype) -> Tensor:
    """out[token[n]] = rows[n] in ``dtype`` for the first n_valid rows, 0 for the others."""
    valid_N = torch.arange(rows_ND.shape[0], device=rows_ND.device) < n_valid
    rows_ND = torch.where(valid_N[:, None], rows_ND, 0).to(dtype)
    return torch.empty_like(rows_ND).index_copy_(0, token_N.long(), rows_ND)


def write_rows(out_VD: Tensor, rows_KD: Tensor, row_K: Tensor, add: bool = False) -> None:
    """out[row[k]] = rows[k], or += if ``add``, but for row −1. Rows differ."""
    if out_VD.shape[0] == 0:
        return
    slot_K = torch.where(row_K >= 0, torch.arange(row_K.shape[0], device=row_K.device), -1)
    slot_V = torch.full((out_VD.shape[0],), -1, device=row_K.device)
    slot_V.scatter_reduce_(0, row_K.clamp(min=0).long(), slot_K, "amax")
    is_written_V = (slot_V >= 0).view(-1, *(1,) * (out_VD.ndim - 1))
    written_VD = rows_KD[slot_V.clamp(min=0)].to(out_VD.dtype)
    out_VD.copy_(torch.where(is_written_V, written_VD + out_VD if add else written_VD, out_VD))


def _compacted(logits: Logits) -> Logits:
    """With the hidden states in the order of the other tensors, 0 for tokens that are not valid."""
    hidden_ND = logits.hidden_ND[logits.token_N]
    valid_N = _valid(logits, slice(0, hidden_ND.shape[0]))
    if logits.adapter_NR is not None:
        logits = logits._replace(adapter_NR=logits.adapter_NR[logits.token_N].masked_fill_(~valid_N[:, None], 0))
    return logits._replace(hidden_ND=hidden_ND.masked_fill_(~valid_N[:, None], 0))


def drawing_eps(logits: Logits, tiles: Tiles, lse_N: Tensor, filter_: Filter) -> Tensor:
    """eps_i of each row: ``eps``, or more where more than ``most_drawn`` pairs would be drawn."""
    mass_N = torch.zeros_like(lse_N)
    for tile in range(logits.num_tiles):
        mass_tN, large_tN = _masses(logits, tiles, lse_N, filter_, slice(tile, tile + 1), slice(0, lse_N.shape[0]))
        mass_N += torch.where(large_tN[0], 0.0, mass_tN[0])
    return (mass_N / filter_.most_drawn).clamp_(min=filter_.eps)


def _masses(logits: Logits, tiles: Tiles, lse_N: Tensor, filter_: Filter, t: slice, n: slice) -> tuple[Tensor, Tensor]:
    """The softmax mass of each pair [t, n], and whether it is large. Written so that a NaN is."""
    mass_tn = torch.exp(tiles.lse_TN[t, n] - lse_N[n])
    tile_ids_t = torch.arange(t.start, t.stop, device=mass_tn.device)[:, None]
    target_n = logits.target_N[n]
    return mass_tn, ~(mass_tn <= filter_.eps) | ((target_n >= 0) & (target_n // logits.tile == tile_ids_t))


def keep(
    logits: Logits, tiles: Tiles, lse_N: Tensor, eps_N: Tensor, filter_: Filter, t: slice, n: slice
) -> tuple[Tensor, Tensor]:
    """The weight k of each pair [t, n] (0: dropped), and which pairs are large: kept whatever is drawn."""
    mass_tn, large_tn = _masses(logits, tiles, lse_N, filter_, t, n)
    if filter_.mode == "filtered":
        return large_tn.to(mass_tn.dtype), large_tn
    chance_tn = mass_tn / eps_N[n]
    draw_tn = _draw(filter_, logits.token_N[n], logits.tile_key_T[t], mass_tn)
    drawn_tn = (draw_tn < chance_tn) & (chance_tn > SMALLEST_DRAW)
    weight_tn = torch.where(drawn_tn, 1 / chance_tn, 0.0)
    return torch.where(large_tn, 1.0, weight_tn), large_tn


def _share_of(upstream: Upstream, n: slice, log_p_nx: Tensor) -> Tensor:
    """What the softmax of tokens n is multiplied with, given its logarithm [n] or [n, v]."""
    shape = (-1, *(1,) * (log_p_nx.ndim - 1))
    share_nx = upstream.softmax_N[n].view(shape)
    return share_nx if upstream.log_N is None else share_nx + upstream.log_N[n].view(shape) * log_p_nx.clamp(min=FAR)


def _add_tail(
    logits: Logits,
    tiles: Tiles,
    lse_N: Tensor,
    eps_N: Tensor,
    upstream: Upstream,
    filter_: Filter,
    dhidden_ND: Tensor,
    dadapter_NR: Tensor | None,
    dweight_VD: Tensor | None,
    dbias_V: Tensor,
    weight_scale: Tensor,
) -> None:
    """Adds R c̃ to dE, π RᵀE to dC, times ``weight_scale``, and π R to dbias; R_ti = a_i·mass_ti·(1 − k_ti), c̃_t = Σ π_j
    c_j over tile t. With an adapter the same of B: to da, and to dB in place of dC.

    With an upstream of the entropy, a_i + log_N·(the mean of log p over the tile, as if p lay over it like π).
    """
    everything = slice(0, logits.num_tokens)
    for tile in range(logits.num_tiles):
        t = slice(tile, tile + 1)
        v = slice(tile * logits.tile, min((tile + 1) * logits.tile, logits.weight_VD.shape[0]))
        weight_N, large_N = (x[0] for x in keep(logits, tiles, lse_N, eps_N, filter_, t, everything))
        mass_N = torch.exp(tiles.lse_TN[tile] - lse_N)
        pi_v = tile_profile(logits, lse_N, large_N, v)
        mean_log_p_N = (tiles.lse_TN[tile] - lse_N) + torch.xlogy(pi_v, pi_v).sum()
        tail_N = torch.where(
            weight_N == 1, 0.0, _share_of(upstream, everything, mean_log_p_N) * mass_N * (1 - weight_N)
        )
        tail_N = torch.where(_valid(logits, everything), tail_N, 0.0)
        weight_vD = logits.weight_VD[v].to(pi_v.dtype)
        dhidden_ND += torch.outer(tail_N, pi_v @ weight_vD)
        if dadapter_NR is not None and logits.adapter_VR is not None:
            dadapter_NR += torch.outer(tail_N, pi_v @ logits.adapter_VR[v].to(pi_v.dtype))
        if dweight_VD is not None:
            dweight_VD[v] += torch.outer(pi_v, weight_scale * (tail_N @ logits.trained[0].to(tail_N.dtype)))
        dbias_V[v] += pi_v * tail_N.sum()


def tile_profile(logits: Logits, lse_N: Tensor, large_N: Tensor, v: slice) -> Tensor:
    """π_j = Σ_i p_ij f'_ij / Σ_i mass_i over up to 128 sampled tail rows; uniform where those have no mass."""
    sample_n = torch.arange(SAMPLED_ROWS, device=lse_N.device) * logits.n_valid // SAMPLED_ROWS
    z_nv, slope_nv = _logits(logits, sample_n, v)
    z_nv = _cold(logits, z_nv, v)
    softmax_nv = torch.exp(z_nv - lse_N[sample_n, None])
    use_n = ~large_N[sample_n] & ~softmax_nv.isnan().any(1)
    profile_v = torch.where(use_n[:, None], softmax_nv * slope_nv, 0.0).sum(0)
    mass = torch.where(use_n[:, None], softmax_nv, 0.0).sum()
    cold_v = torch.ones_like(softmax_nv[0]) if logits.frequent_V is None else (logits.frequent_V[v] < 0).to(lse_N.dtype)
    uniform_v = cold_v / cold_v.sum().clamp(min=1)
    return torch.where(mass > 0, profile_v / mass, uniform_v)


def _draw(filter_: Filter, token_n: Tensor, key_t: Tensor, like_tn: Tensor) -> Tensor:
    if filter_.uniform is not None:
        return torch.full_like(like_tn, filter_.uniform)
    assert filter_.seed is not None
    bits_tn = philox(filter_.seed, token_n.long()[None, :].expand_as(like_tn), key_t.long()[:, None].expand_as(like_tn))
    return bits_tn.to(torch.float32) * 2.0**-32


def philox(seed: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
    """The first word of Philox4x32-10 (Salmon et al., SC 2011) of counter (c0, c1, 0, 0): int64 in [0, 2^32).

    The same function as ``tl.philox``, so that both backends draw alike.
    """
    low = 0xFFFFFFFF
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        # int64 products wrap, and the wrapped bits are those of the unsigned product.
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((product2 >> 32) & low) ^ c1 ^ k0, ((product0 >> 32) & low) ^ c3 ^ k1
        c1, c3 = product2 & low, product0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0


def _chunks(logits: Logits, workspace_bytes: int) -> Iterator[tuple[slice, slice, slice]]:
    """(rows, columns, tiles) of each chunk; about four chunk-sized temporaries are alive at a time."""
    rows, vocab = logits.num_tokens, logits.weight_VD.shape[0]
    entries = max(workspace_bytes // (4 * logits.accumulator.itemsize), 1)
    row_step = max(min(rows, entries // logits.tile), 1)
    tile_step = max(entries // (row_step * logits.tile), 1)
    for tile in range(0, logits.num_tiles, tile_step):
        t = slice(tile, min(tile + tile_step, logits.num_tiles))
        v = slice(t.start * logits.tile, min(t.stop * logits.tile, vocab))
        for row in range(0, rows, row_step):
            yield slice(row, min(row + row_step, rows)), v, t


def _logits(logits: Logits, n: slice | Tensor, v: slice) -> tuple[Tensor, Tensor]:
    """z and f' of a chunk, accumulated in fp32 (fp64); the temperature is in z, not in f'."""
    dtype = logits.accumulator
    x_nv = logits.hidden_ND[n].to(dtype) @ logits.weight_VD[v].to(dtype).T
    if logits.adapter_NR is not None and logits.adapter_VR is not None:
        x_nv += logits.adapter_NR[n].to(dtype) @ logits.adapter_VR[v].to(dtype).T
    return _of_products(logits, x_nv, n, v)


def _of_products(logits: Logits, x_nv: Tensor, n: slice | Tensor, v: slice) -> tuple[Tensor, Tensor]:
    """The same of products e·c, which are overwritten."""
    dtype = x_nv.dtype
    if logits.bias_V is not None:
        x_nv += logits.bias_V[v].to(dtype)
    x_nv *= logits.logit_scale
    slope_nv = torch.ones((), dtype=dtype, device=x_nv.device).expand_as(x_nv)
    if logits.softcap is not None:
        tanh_nv = torch.tanh(x_nv / logits.softcap)
        x_nv, slope_nv = logits.softcap * tanh_nv, 1 - tanh_nv * tanh_nv
    if logits.inverse_temperature_N is not None:
        x_nv = x_nv * logits.inverse_temperature_N[n, None]
    return x_nv, slope_nv


def _product_by_halves(hidden_Dn: Tensor, weight_Dv: Tensor) -> Tensor:
    """[n, v] products e·c, each the sum of those of both halves of D: in an order that D alone decides."""
    if hidden_Dn.shape[0] == 1:
        return hidden_Dn[0, :, None] * weight_Dv[0]
    half = hidden_Dn.shape[0] // 2
    first_nv = _product_by_halves(hidden_Dn[:half], weight_Dv[:half])
    return first_nv.add_(_product_by_halves(hidden_Dn[half:], weight_Dv[half:]))


def _sum_by_halves(x_nv: Tensor) -> Tensor:
    """Σ over the last axis, a power of two, in an order that it alone decides."""
    while x_nv.shape[1] > 1:
        half = x_nv.shape[1] // 2
        x_nv = x_nv[:, :half] + x_nv[:, half:]
    return x_nv[:, 0]


def _cold(logits: Logits, z_nv: Tensor, v: slice) -> Tensor:
    """Logits with −inf in the columns of frequent rows: after the softcap, which would make a number of it."""
    return z_nv if logits.frequent_V is None else z_nv.masked_fill(logits.frequent_V[v] >= 0, -torch.inf)


def _is_target(logits: Logits, n: slice, v: slice) -> Tensor:
    columns_v = torch.arange(v.start, v.stop, device=logits.target_N.device)
    return logits.target_N[n, None] == columns_v


def _valid(logits: Logits, n: slice) -> Tensor:
    return torch.arange(n.start, n.stop, device=logits.n_valid.device) < logits.n_valid


def _by_tile(z_nv: Tensor, tile: int, fill: float) -> Tensor:
    """[n, v] as [n, t, tile], the last tile filled up."""
    tiles = -(-z_nv.shape[1] // tile)
    return pad(z_nv, (0, tiles * tile - z_nv.shape[1]), value=fill).view(z_nv.shape[0], tiles, tile)
