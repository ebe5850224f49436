"""Summaries, the selection of pairs, and the draws: each stage against all logits in fp64."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from dense import dense, is_large, make_logits, padded_lse
from reference import DEVICE, relative_error
from torch import Tensor

from cce_dist.kernels import torch_backend
from cce_dist.kernels.problem import TILE, Filter, GlobalTiles, Logits, Tiles
from cce_dist.kernels.triton import backend as triton_backend
from cce_dist.kernels.triton.blocks import LN_2
from cce_dist.kernels.triton.select import kept_tokens, select

EPS = 2.0**-4
BACKENDS = {"torch": torch_backend, "triton": triton_backend}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "half precision": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
    "softcap, no bias": {"softcap": 6.0, "bias": False},
    "some rows not valid": {"num_valid": 17},
    "less than a tile": {"vocab": 77},
    "ten tiles, the last of one column": {"vocab": 9 * TILE + 1, "rows": 5},
}
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[pytest.mark.gpu] if name == "bf16" else []) for name, case in CASES.items()],
)


def absolute_lse(tiles: Tiles, num_tiles: int) -> Tensor:
    """The natural log-sum-exp [T, N] of each (tile, row), whichever way the backend stores it."""
    if tiles.reference_SN is None:
        return tiles.lse_TN.double()
    split_T = torch.arange(num_tiles, device=DEVICE) // tiles.tiles_per_split
    return (tiles.lse_TN.double() + tiles.reference_SN.double()[split_T]) * math.log(2)


@every_backend
@every_case
def test_summaries(case: dict[str, Any], backend: ModuleType) -> None:
    logits = make_logits(**case)
    d = dense(logits)
    n = slice(int(logits.n_valid))
    summary = backend.summarise(logits, True, 1 << 20)
    lse_N = summary.max_N[n].double() * summary.unit + summary.sumexp_N[n].double().log()
    assert relative_error(lse_N, d.lse_N) < 3e-7
    has_target_N = logits.target_N[n] >= 0
    target_N = d.z_NV.gather(1, logits.target_N[n, None].clamp(min=0).long())[:, 0] * has_target_N
    assert relative_error(summary.target_N[n], target_N) < 1e-6
    tile_lse_TN = (d.lse_N[:, None] + d.mass_NT.log()).T
    got_TN = absolute_lse(summary.tiles, logits.num_tiles)[:, n]
    # fp16 relative to the first tile of the split: 2^-11 of the distance from it.
    rounding = 2.0**-22 if logits.hidden_ND.dtype == torch.float32 else 2.0**-11
    reach_TN = (tile_lse_TN.amax(0) - tile_lse_TN.amin(0)) + tile_lse_TN.abs() * 2.0**-10
    assert ((got_TN - tile_lse_TN).abs() <= rounding * reach_TN + 1e-5).all()
    assert backend.summarise(logits, False, 1 << 20).tiles is None


@every_backend
@every_case
def test_sums_of_tiles_that_begin_anywhere(case: dict[str, Any], backend: ModuleType) -> None:
    logits = make_logits(**case)
    z_NV, n = dense(logits).z_NV, slice(int(logits.n_valid))
    vocab = z_NV.shape[1]
    spans = [(first, min(TILE, vocab - first)) for first in range(5, vocab, TILE)]
    row_T, rows_T = torch.tensor(spans, dtype=torch.int32, device=DEVICE).T.contiguous()
    sums = backend.sum_tiles(logits, GlobalTiles(tuple(spans), row_T, rows_T), 1 << 12)
    target_n = logits.target_N[n].long()
    wanted_n = z_NV.gather(1, target_n.clamp(min=0)[:, None])[:, 0].where(target_n >= 5, 0)
    assert relative_error(sums.target_N[n] * sums.unit, wanted_n) < 1e-6
    assert (sums.max_N[n] == sums.max_TN[:, n].amax(0)).all()
    for (first, count), max_N, sumexp_N in zip(spans, sums.max_TN, sums.sumexp_TN, strict=True):
        z_nv = z_NV[:, first : first + count]
        assert relative_error(max_N[n] * sums.unit, z_nv.amax(1)) < 1e-6
        lse_n = max_N[n].double() * sums.unit + sumexp_N[n].double().log()
        assert relative_error(lse_n, z_nv.logsumexp(1)) < 1e-6


@every_backend
def test_chunking_by_the_workspace_does_not_change_summaries(backend: ModuleType) -> None:
    logits = make_logits()
    wide, narrow = (backend.summarise(logits, True, size) for size in (1 << 24, 1 << 12))
    lse_N, same_N = (s.max_N * s.unit + s.sumexp_N.log() for s in (wide, narrow))
    assert relative_error(same_N, lse_N) < 1e-6
    assert relative_error(narrow.tiles.lse_TN, wide.tiles.lse_TN) < 1e-6


def kept_pairs(backend: ModuleType, logits: Logits, filter_: Filter, lse_N: Tensor) -> Tensor:
    """[N, T] of the valid rows: is the pair recomputed?"""
    tiles = backend.summarise(logits, True, 1 << 20).tiles
    num_valid = int(logits.n_valid)
    if backend is torch_backend:
        everything = slice(0, logits.num_tiles), slice(0, num_valid)
        eps_N = torch_backend.drawing_eps(logits, tiles, lse_N, filter_)
        return torch_backend.keep(logits, tiles, lse_N, eps_N, filter_, *everything)[0].T != 0
    token_TN, _, count_T = kept_tokens(logits, select(logits, tiles, lse_N / LN_2, filter_))
    kept_NT = torch.zeros(num_valid, logits.num_tiles, dtype=torch.bool, device=DEVICE)
    for tile, count in enumerate(count_T.tolist()):
        rows = logits.place_N[token_TN[tile, :count].long()].long()
        assert (rows[1:] > rows[:-1]).all(), "tokens of a tile must be listed in order, once"
        kept_NT[rows, tile] = True
    return kept_NT


@every_backend
@every_case
@pytest.mark.parametrize("mode", ["filtered", "unbiased"])
def test_pairs_above_eps_and_those_of_targets_are_kept(case: dict[str, Any], mode: Any, backend: ModuleType) -> None:
    logits = make_logits(**case)
    d = dense(logits)
    kept_NT = kept_pairs(backend, logits, Filter(mode, EPS, uniform=0.999), padded_lse(logits, d))
    assert kept_NT[is_large(logits, d, EPS * 1.001)].all()
    # Half precision keeps a little more: it adds its rounding error to the mass before the test.
    assert not kept_NT[~is_large(logits, d, EPS * (0.999 if mode == "filtered" else 0.98) * 0.98)].any()


def test_rounding_of_stored_summaries_drops_no_pair_that_is_large() -> None:
    """Masses just above eps, whose stored log-sum-exp fp16 has rounded up or down, far from the reference and near."""
    tokens = 512
    logits = make_logits(tokens, 2 * TILE, 16, dtype=torch.float16, bias=False)
    relative_N = -torch.linspace(3.0, 40.0, tokens, device=DEVICE)
    rounded_TN = torch.stack((relative_N, relative_N)).half()
    assert (rounded_TN[0].float() < relative_N).float().mean() > 0.3
    tiles = Tiles(rounded_TN, torch.zeros(1, tokens, device=DEVICE), 2)
    lse2_N = relative_N - math.log2(EPS) - 1e-5
    logits = logits._replace(target_N=torch.full_like(logits.target_N, -1))
    _, _, count_T = kept_tokens(logits, select(logits, tiles, lse2_N, Filter("filtered", EPS)))
    assert count_T.tolist() == [tokens, tokens]


def test_tokens_beyond_16_bits_are_listed_by_their_own_numbers() -> None:
    tokens = (1 << 15) + 700
    logits = make_logits(tokens, 2 * TILE, 2, bias=False)
    lowest = torch.full((2, tokens), -1.0, device=DEVICE)
    tiles = Tiles(lowest, torch.zeros(1, tokens, device=DEVICE), 2)
    token_TN, _, count_T = kept_tokens(logits, select(logits, tiles, lowest[0], Filter("filtered", EPS)))
    assert count_T.tolist() == [tokens, tokens]
    for tile in range(2):
        assert torch.equal(token_TN[tile, :tokens].long(), logits.token_N.long())


@every_backend
@pytest.mark.parametrize("mode", ["filtered", "unbiased"])
def test_a_row_of_nan_is_kept_in_every_tile(mode: Any, backend: ModuleType) -> None:
    logits = make_logits()
    logits.hidden_ND[logits.token_N[3], 2] = torch.nan
    lse_N = padded_lse(logits, dense(logits))
    assert lse_N[3].isnan()
    kept_NT = kept_pairs(backend, logits, Filter(mode, EPS, uniform=0.9), lse_N)
    assert kept_NT[3].all()
    assert not kept_NT.all()


@every_backend
def test_mass_far_from_the_first_tile_is_neither_lost_nor_invented(backend: ModuleType) -> None:
    """fp16 summaries relative to the first tile: one tile 10^4 above it, and one 10^4 below."""
    logits = make_logits(rows=6, vocab=3 * TILE, dtype=torch.float16)
    bias_V = torch.zeros(3 * TILE, device=DEVICE)
    bias_V[TILE : 2 * TILE], bias_V[2 * TILE :] = 1e4, -1e4
    logits = logits._replace(bias_V=bias_V, target_N=torch.full_like(logits.target_N, -1), logit_scale=1.0)
    kept_NT = kept_pairs(backend, logits, Filter("filtered", EPS), padded_lse(logits, dense(logits)))
    assert kept_NT.tolist() == [[False, True, False]] * 6


@every_backend
@pytest.mark.parametrize("none", [(0,), (0, 1, 4, 5, 8, 9), (1, 4, 6, 7, 9)], ids=str)
def test_tiles_without_a_finite_logit_have_no_mass_and_leave_the_others_theirs(
    none: tuple[int, ...], backend: ModuleType
) -> None:
    """Also the first ones of a split, to which the others' summaries are relative, and all of a split."""
    logits = make_logits(vocab=10 * TILE, dtype=torch.float16)
    bias_V = logits.bias_V.clone()
    bias_V.view(10, TILE)[list(none)] = -torch.inf
    logits = logits._replace(bias_V=bias_V, target_N=torch.full_like(logits.target_N, -1))
    d = dense(logits)
    tiles = backend.summarise(logits, True, 1 << 20).tiles
    got_TN = absolute_lse(tiles, logits.num_tiles)
    assert (got_TN[list(none)] == -torch.inf).all()
    some = [tile for tile in range(10) if tile not in none]
    assert (got_TN[some] - (d.lse_N[:, None] + d.mass_NT.log()).T[some]).abs().max() < 0.05
    kept_NT = kept_pairs(backend, logits, Filter("filtered", EPS), padded_lse(logits, d))
    assert kept_NT[is_large(logits, d, EPS * 1.02)].all()
    assert not kept_NT[~is_large(logits, d, EPS * 0.98)].any()


def philox_first_word(seed: int, c0: int, c1: int) -> int:
    """Philox4x32-10 by the definition, in Python's integers."""
    counter, key = [c0, c1, 0, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        high0, low0 = divmod(counter[0] * 0xD2511F53, 1 << 32)
        high2, low2 = divmod(counter[2] * 0xCD9E8D57, 1 << 32)
        counter = [high2 ^ counter[1] ^ key[0], low2, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter[0]


COUNTERS = [
    (0, 0, 0),
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
    (2**63 - 1, 2**31 - 1, 2**31 - 1),
    (0xDEADBEEF12345678, 77, 262144),
]


def test_philox_gives_the_published_word() -> None:
    assert philox_first_word(0, 0, 0) == 0x6627E8D5, "known answer of Random123"
    for seed, c0, c1 in COUNTERS:
        seed = seed - (1 << 64) if seed >= 1 << 63 else seed
        got = torch_backend.philox(torch.tensor([seed]), torch.tensor([c0]), torch.tensor([c1]))
        assert int(got) == philox_first_word(seed & (1 << 64) - 1, c0, c1)


@triton.jit
def _philox_kernel(out, seed_ptr, c0, c1):
    word, _, _, _ = tl.philox(
        tl.load(seed_ptr),
        tl.full([1], c0, tl.int32),
        tl.full([1], c1, tl.int32),
        tl.zeros([1], tl.int32),
        tl.zeros([1], tl.int32),
    )
    tl.store(out + tl.arange(0, 1), word.to(tl.uint32, bitcast=True).to(tl.int64))


def test_triton_philox_is_the_same_function() -> None:
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for seed, c0, c1 in COUNTERS[:-1]:
        _philox_kernel[(1,)](out, torch.tensor([seed], device=DEVICE), c0, c1)
        assert int(out) == philox_first_word(seed, c0, c1)


def test_draws_are_uniform_and_differ_by_token_tile_and_seed() -> None:
    token_N, key_T = torch.arange(200)[None, :].expand(50, 200), torch.arange(50)[:, None].expand(50, 200)
    draws = [torch_backend.philox(torch.tensor([seed]), token_N, key_T).double() / 2**32 for seed in (1, 2)]
    for draw in draws:
        assert draw.unique().numel() > 9990
        histogram = torch.histc(draw, 10, 0, 1)
        assert (histogram - 1000).abs().max() < 150
    correlation = torch.corrcoef(torch.stack([draws[0].flatten(), draws[1].flatten()]))[0, 1]
    assert abs(correlation) < 0.05
