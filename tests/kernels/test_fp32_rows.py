"""Rows of the classifier in fp32 beside 16-bit hidden states: every stage multiplies with all of their bits.

In the interpreter, whose bf16 products are wrong, hidden states are in fp16, and rows so large that their three parts
have the range that they need; on a GPU in bf16, as in use.
"""

from types import ModuleType
from typing import Any

import pytest
import torch
from dense import EVERYTHING, dense, gradients, make_clear_logits, make_logits, make_upstream, normaliser
from reference import DEVICE, ROUNDING, relative_error
from torch import Tensor

from cce_dist.kernels import torch_backend
from cce_dist.kernels.problem import TILE, Filter, GlobalTiles, Gradients, Logits, Summary
from cce_dist.kernels.triton import backend as triton_backend
from cce_dist.kernels.triton import parts, summarise, tuning

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
EPS = 2.0**-4
MODES = {
    "exact": Filter("exact"),
    "filtered": Filter("filtered", EPS),
    "drop": Filter("filtered", EPS, tail=False),
    "unbiased": Filter("unbiased", EPS, uniform=0.3),
}
every_backend = pytest.mark.parametrize("backend", [torch_backend, triton_backend], ids=["torch", "triton"])


def rows_in_fp32(make: Any = make_logits, *arguments: Any, **options: Any) -> Logits:
    logits: Logits = make(*arguments, dtype=DTYPE, **options)
    wide_VD = logits.weight_VD.float() + 2.0**-12 * torch.randn(logits.weight_VD.shape, device=DEVICE)
    logits = logits._replace(weight_VD=wide_VD)
    assert relative_error(wide_VD.to(DTYPE), wide_VD) > 1e-4  # of what rounding them would cost
    return logits


@every_backend
@pytest.mark.parametrize("hidden_size", [pytest.param(16, marks=pytest.mark.full), 45, 100])
def test_sums_and_targets_are_those_of_fp32_products(backend: ModuleType, hidden_size: int) -> None:
    logits = rows_in_fp32(rows=40, hidden_size=hidden_size, num_valid=33, softcap=9.0)
    d = dense(logits)
    summary = backend.summarise(logits, True, 1 << 20)
    lse_N = (summary.max_N * summary.unit + summary.sumexp_N.log())[:33]
    target_N = torch.where(
        logits.target_N[:33] >= 0, d.z_NV.gather(1, logits.target_N[:33, None].clamp(min=0).long())[:, 0], 0
    )
    assert relative_error(lse_N, d.lse_N) < 1e-6
    assert relative_error(summary.target_N[:33], target_N) < 1e-6


@pytest.mark.parametrize("entropy", [False, True])
def test_copies_of_chunks_leave_each_tile_and_row_in_its_place(monkeypatch: pytest.MonkeyPatch, entropy: bool) -> None:
    monkeypatch.setattr(summarise, "_COPY_BYTES", 1)
    logits = rows_in_fp32(rows=20, vocab=5 * TILE - 40, hidden_size=45, softcap=9.0, adapter=3)
    frequent_V = torch.full((5 * TILE - 40,), -1, dtype=torch.int32, device=DEVICE)
    frequent_V[3 * TILE + 9 : 4 * TILE + 30] = torch.arange(TILE + 21, dtype=torch.int32, device=DEVICE)
    logits = logits._replace(frequent_V=frequent_V)
    with tuning.forced(tuning.Tuning(block_n=32, block_v=TILE, splits=2, block_d=16)):  # chunks of 2, 2, 1 tiles
        got = triton_backend.summarise(logits, True, 1 << 20, entropy)
    wanted = torch_backend.summarise(logits, True, 1 << 20, entropy)
    valid = slice(int(logits.n_valid))
    lse_N = [(x.max_N * x.unit + x.sumexp_N.log())[valid] for x in (got, wanted)]
    assert relative_error(*lse_N) < 1e-6
    assert relative_error(got.target_N[valid], wanted.target_N[valid]) < 1e-6
    assert relative_error(*(_tile_lse(x)[:, valid] for x in (got, wanted))) < 2e-3  # of 16 bits
    if entropy:
        assert got.weighted_N is not None and wanted.weighted_N is not None
        assert relative_error(got.weighted_N[valid] * got.unit, wanted.weighted_N[valid] * wanted.unit) < 1e-5


def _tile_lse(summary: Summary) -> Tensor:
    tiles = summary.tiles
    assert tiles is not None
    if tiles.reference_SN is None:
        return tiles.lse_TN
    split_T = torch.arange(tiles.lse_TN.shape[0], device=DEVICE) // tiles.tiles_per_split
    return (tiles.lse_TN.float() + tiles.reference_SN[split_T]) * summary.unit


def test_the_parts_of_a_row_add_up_to_all_of_its_bits() -> None:
    whole_VD = 64 * (1 + torch.rand(5, 48, device=DEVICE))
    weight_VD = whole_VD[:, :45]  # rows that are apart
    copy_VC = torch.full((5, parts.columns_of_a_copy(45, 16)), torch.nan, dtype=DTYPE, device=DEVICE)
    parts.in_parts(weight_VD, copy_VC)
    parts_V3D = copy_VC.view(5, 3, 48).double()
    assert torch.equal(parts_V3D.sum(1)[:, :45], weight_VD.double())
    assert not parts_V3D[:, :, 45:].any()
    assert torch.equal(parts.high_part(copy_VC, 45), weight_VD.to(DTYPE))


@every_backend
def test_tiles_of_exact_sums_are_those_of_fp32_products(backend: ModuleType) -> None:
    logits = rows_in_fp32(rows=20, vocab=3 * TILE, bias=False)
    spans = tuple((row, TILE) for row in range(0, 3 * TILE, TILE))
    ints = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in zip(*spans, strict=True)]
    sums = backend.sum_tiles(logits, GlobalTiles(spans, *ints), 1 << 20)
    lse_TN = sums.max_TN * sums.unit + sums.sumexp_TN.log()
    wanted_TN = torch.stack([z_Nt.logsumexp(1) for z_Nt in dense(logits).z_NV.split(TILE, 1)])
    assert relative_error(lse_TN, wanted_TN) < 1e-6


@every_backend
@pytest.mark.parametrize(
    "mode", ["exact", "unbiased", *(pytest.param(x, marks=pytest.mark.full) for x in ("filtered", "drop"))]
)
def test_gradients_are_no_worse_than_those_of_rows_in_16_bits(backend: ModuleType, mode: str) -> None:
    logits, filter_ = rows_in_fp32(make_clear_logits, 30, 4 * TILE - 40, 16, EPS, softcap=6.0), MODES[mode]

    def errors(logits: Logits, truth: tuple[Tensor, ...]) -> list[float]:
        tiles = backend.summarise(logits, mode != "exact", 1 << 20).tiles
        of_softmax = normaliser(backend, logits, dense(logits))
        wanted = EVERYTHING._replace(workspace_bytes=1) if mode == "exact" else EVERYTHING  # a chunk for each tile
        got = backend.differentiate(logits, tiles, of_softmax, make_upstream(logits), filter_, wanted)
        assert got.weight_VD.dtype == torch.float32
        return [relative_error(x, y) for x, y in zip(got[:3], truth, strict=True)]

    def truth(logits: Logits) -> tuple[Tensor, ...]:
        return gradients(logits, dense(logits), make_upstream(logits), filter_)

    narrow = logits._replace(weight_VD=logits.weight_VD.to(DTYPE))
    plain = errors(narrow, truth(logits))  # of fp32 rows that are rounded before
    for error, other in zip(errors(logits, truth(logits)), plain, strict=True):
        assert error <= 1.1 * other + ROUNDING[DTYPE]


@every_backend
def test_rows_apart_are_those_of_all(backend: ModuleType) -> None:
    logits = rows_in_fp32(rows=30, vocab=2 * TILE)
    row_K = torch.randperm(2 * TILE, generator=torch.Generator().manual_seed(0))[: TILE + 5].to(DEVICE, torch.int32)
    d, upstream = dense(logits), make_upstream(logits)
    target_N = (logits.target_N[:, None] == row_K).int()
    slot_N = torch.where(target_N.any(1), target_N.argmax(1), -1).to(torch.int32)
    out = Gradients(*(torch.zeros(*shape, device=DEVICE) for shape in ((30, 16), (2 * TILE, 16), (2 * TILE,))))
    backend.add_rows(
        logits._replace(target_N=slot_N), row_K, normaliser(backend, logits, d), upstream, out, 1
    )  # two chunks
    p_NV = d.softmax_NV * upstream.softmax_N[:, None] * float(upstream.scale) * logits.logit_scale
    p_NV -= (
        upstream.target_N[:, None]
        * (logits.target_N[:, None] == torch.arange(2 * TILE, device=DEVICE))
        * (float(upstream.scale) * logits.logit_scale)
    )
    p_NK, rows = p_NV[:, row_K.long()], row_K.long()
    hidden_ND = logits.hidden_ND[logits.token_N.long()].double()
    assert relative_error(out.hidden_ND, p_NK @ logits.weight_VD[rows].double()) < 4 * ROUNDING[DTYPE]
    assert out.weight_VD is not None
    assert relative_error(out.weight_VD[rows], p_NK.T @ hidden_ND) < 4 * ROUNDING[DTYPE]


def test_their_blocks_take_as_many_bytes_as_those_of_16_bits() -> None:
    hidden, narrow = torch.empty(1, 64, dtype=DTYPE, device=DEVICE), torch.empty(1, 64, dtype=DTYPE, device=DEVICE)
    plain, wide = tuning.tuning_for(hidden, narrow), tuning.tuning_for(hidden, narrow.float())
    assert (wide.block_d, wide.block_n, wide.block_v) == (plain.block_d // 2, plain.block_n, plain.block_v)
    of_hopper = tuning.choose(("sm_90",), 2, 4096)
    assert of_hopper.for_fp32_rows().pair_warps == of_hopper.pair_warps * of_hopper.pair_programs
