"""Backward on one shard, every mode, both backends, against the same formula with all logits in fp64."""

import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from dense import (
    EVERYTHING,
    dense,
    gradients,
    is_large,
    make_clear_logits,
    make_logits,
    make_upstream,
    normaliser,
    pair_weights,
)
from reference import (
    DEVICE,
    GPU_BF16,
    ROUNDING,
    TRITON_DTYPES,
    cce_outcome,
    make_problem,
    plain_outcome,
    relative_error,
)

from cce_dist.kernels import torch_backend
from cce_dist.kernels.problem import TILE, Filter, Logits, Wanted
from cce_dist.kernels.triton import backend as triton_backend
from cce_dist.kernels.triton import tuning

EPS = 2.0**-4
BACKENDS = {"torch": torch_backend, "triton": triton_backend}
MODES = {
    "exact": Filter("exact"),
    "filtered": Filter("filtered", EPS),
    "drop": Filter("filtered", EPS, tail=False),
    "unbiased": Filter("unbiased", EPS, uniform=0.3),
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"bias": False},
    "softcap": {"softcap": 6.0},
    "some rows not valid": {"num_valid": 17},
    "one tile": {"vocab": 100},
    "one row": {"rows": 1},
    "more rows than are sampled": {"rows": 150, "vocab": 300},
    "D no multiple of a block": {"hidden_size": 45},
    "adapter": {"adapter": 5, "softcap": 6.0, "num_valid": 25},
    "adapter of more columns than a step": {"adapter": 21, "hidden_size": 45, "rows": 12},
}
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


def differentiate(backend: ModuleType, logits: Logits, filter_: Filter, wanted: Wanted = EVERYTHING) -> Any:
    tiles = backend.summarise(logits, filter_.mode != "exact", 1 << 20).tiles
    wanted = wanted._replace(bias=wanted.bias and logits.bias_V is not None, adapter=logits.adapter_NR is not None)
    return backend.differentiate(
        logits, tiles, normaliser(backend, logits, dense(logits)), make_upstream(logits), filter_, wanted
    )


@every_backend
@pytest.mark.parametrize("filter_", MODES.values(), ids=MODES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_follow_the_formula(case: dict[str, Any], filter_: Filter, backend: ModuleType) -> None:
    logits = make_logits(**case)
    d = dense(logits)
    if filter_.mode != "exact":
        # A pair at the threshold may go either way by rounding; the seed is such that there is none.
        chance = d.mass_NT / EPS
        for threshold in (1.0, 0.3):
            assert ((chance / threshold).log().abs() > 2e-3).all()
    expected = gradients(logits, d, make_upstream(logits), filter_)
    got = differentiate(backend, logits, filter_)
    num_valid = int(logits.n_valid)
    assert relative_error(got.hidden_ND[:num_valid], expected[0]) < 3e-6
    assert [got.adapter_NR is not None] == [len(expected) == 4]
    for x, y in zip(got[3:], expected[3:], strict=False):
        assert relative_error(x[:num_valid], y) < 3e-6
    assert relative_error(got.weight_VD, expected[1]) < 3e-6
    if logits.bias_V is not None:
        assert relative_error(got.bias_V, expected[2]) < 3e-6


@every_backend
def test_rows_of_flat_softmax_draw_no_more_pairs_than_asked(backend: ModuleType) -> None:
    logits = make_logits(rows=60, vocab=12 * TILE)
    d, filter_ = dense(logits), Filter("unbiased", EPS, most_drawn=1.5, uniform=0.3)
    small_NT = ~is_large(logits, d, EPS)
    mass_N = (d.mass_NT * small_NT).sum(1)
    assert (mass_N > 1.5 * EPS).any() and (mass_N < 1.5 * EPS).any()
    chance_NT = d.mass_NT / (mass_N / 1.5).clamp(min=EPS)[:, None]
    clear_N = ((chance_NT / 0.3).log().abs() > 2e-3).all(1) & ((d.mass_NT / EPS).log().abs() > 2e-3).all(1)
    assert clear_N.double().mean() > 0.8
    expected = gradients(logits, d, make_upstream(logits), filter_)
    got = differentiate(backend, logits, filter_)
    assert relative_error(got.hidden_ND[clear_N], expected[0][clear_N]) < 3e-6
    if clear_N.all():
        assert relative_error(got.weight_VD, expected[1]) < 3e-6
    unbounded = gradients(logits, d, make_upstream(logits), filter_._replace(most_drawn=math.inf))
    assert relative_error(got.hidden_ND, unbounded[0]) > 1e-3


# In 16 bits weights 1/q and the tail come from summaries in fp16: an error of 2^-11 of their logarithm. P and R are
# rounded too.
HALF_BOUNDS = {torch.float16: 4e-3, torch.bfloat16: 1.2e-2}


@pytest.mark.parametrize("workspace", [1 << 20, 1 << 12], ids=["wide", "narrow"])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("chunks", [1, 2])
def test_chunks_of_hidden_columns_the_last_cut_off_follow_the_formula(
    chunks: int, dtype: torch.dtype, workspace: int
) -> None:
    """In one chunk P is added to dE where it is computed, in several it is read from the ring."""
    like = torch.empty(1, 1, device=DEVICE, dtype=dtype)
    base = tuning.tuning_for(like, like)
    logits = make_clear_logits(70, 4 * TILE - 40, 2 * base.weight_block_d + 5, EPS, dtype=dtype)
    expected = gradients(logits, dense(logits), make_upstream(logits), MODES["unbiased"])
    with tuning.forced(base._replace(chunk_d=4 * base.weight_block_d // chunks)):
        got = differentiate(triton_backend, logits, MODES["unbiased"], EVERYTHING._replace(workspace_bytes=workspace))
    for x, y in zip(got[:3], expected, strict=True):
        assert relative_error(x, y) < HALF_BOUNDS.get(dtype, 3e-6)


@every_backend
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, GPU_BF16], ids=str)
def test_half_precision_follows_the_formula_to_its_rounding(dtype: torch.dtype, mode: str, backend: ModuleType) -> None:
    logits = make_clear_logits(30, 4 * TILE - 40, 16, EPS, dtype=dtype, softcap=6.0)
    filter_ = MODES[mode]
    expected = gradients(logits, dense(logits), make_upstream(logits), filter_)
    got = differentiate(backend, logits, filter_)
    for x, y in zip(got[:3], expected, strict=True):
        assert relative_error(x, y) < HALF_BOUNDS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("hidden_size", [64, 256])
@pytest.mark.parametrize("filter_", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_BOUNDS], ids=str)
def test_several_blocks_of_everything_follow_the_formula(dtype: torch.dtype, filter_: Filter, hidden_size: int) -> None:
    """Rows, tiles and D of more than one block of any tuning, the last ones partly filled."""
    logits = make_clear_logits(513, 5000, hidden_size, EPS, dtype=dtype)
    expected = gradients(logits, dense(logits), make_upstream(logits), filter_)
    got = differentiate(triton_backend, logits, filter_)
    for x, y in zip(got[:3], expected, strict=True):
        assert relative_error(x, y) < (3e-6 if dtype == torch.float32 else HALF_BOUNDS[dtype])


def test_the_problem_has_pairs_of_every_kind() -> None:
    """Otherwise the other tests of this folder prove little."""
    for case in ("plain", "softcap", "more rows than are sampled"):
        logits = make_logits(**CASES[case])
        weights = pair_weights(logits, dense(logits), MODES["unbiased"])
        assert (weights == 0).double().mean() > 0.1
        assert (weights > 1).any()
        assert (weights == 1).double().mean() > 0.1


@every_backend
def test_backends_make_the_same_draws(backend: ModuleType) -> None:
    logits = make_logits(rows=40)
    seed = torch.tensor([0x1234_5678_9ABC_DEF0], device=DEVICE)
    filter_ = Filter("unbiased", EPS, seed=seed)
    one, other = (differentiate(b, logits, filter_) for b in (torch_backend, backend))
    for x, y in zip(one[:3], other[:3], strict=True):
        assert relative_error(x, y) < 3e-6
    changed = differentiate(backend, logits, Filter("unbiased", EPS, seed=seed + 1))
    assert relative_error(changed[0], one[0]) > 1e-3


@every_backend
@pytest.mark.parametrize("filter_", MODES.values(), ids=MODES)
def test_only_wanted_gradients_come_back(filter_: Filter, backend: ModuleType) -> None:
    logits = make_logits(vocab=300)
    everything = differentiate(backend, logits, filter_)
    for i in range(3):
        wanted = Wanted(i == 0, i == 1, i == 2, torch.float32, 1 << 20)
        got = differentiate(backend, logits, filter_, wanted)
        assert [x is not None for x in got[:3]] == [j == i for j in range(3)]
        assert relative_error(got[i], everything[i]) < 1e-6


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_weight_gradient_comes_in_the_wanted_dtype(dtype: torch.dtype, backend: ModuleType) -> None:
    logits = make_logits(vocab=300)
    expected = differentiate(backend, logits, MODES["filtered"]).weight_VD
    got = differentiate(backend, logits, MODES["filtered"], EVERYTHING._replace(weight_dtype=dtype)).weight_VD
    assert got.dtype == dtype
    assert relative_error(got, expected) < torch.finfo(dtype).eps


def test_hidden_gradients_handed_over_early_are_the_same() -> None:
    """In the sparse backward dE is complete before dC is begun, whatever becomes of it afterwards."""
    logits = make_logits(vocab=600)
    tiles = triton_backend.summarise(logits, True, 1 << 20).tiles
    arguments = (
        logits,
        tiles,
        normaliser(triton_backend, logits, dense(logits)),
        make_upstream(logits),
        MODES["unbiased"],
    )
    together = triton_backend.differentiate(*arguments, EVERYTHING)
    early: list[torch.Tensor] = []

    def take(dhidden_ND: torch.Tensor) -> None:
        early.append(dhidden_ND.clone())
        dhidden_ND.zero_()

    apart = triton_backend.differentiate(*arguments, EVERYTHING, take)
    assert len(early) == 1
    assert relative_error(early[0], together.hidden_ND) < 1e-6
    assert apart.hidden_ND is not None
    assert not apart.hidden_ND.any(), "dE must be left alone once it is handed over"
    assert relative_error(apart.weight_VD, together.weight_VD) < 1e-6
    assert relative_error(apart.bias_V, together.bias_V) < 1e-6


@every_backend
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("gradient", ["exact", "unbiased", "filtered"])
def test_upstream_gradients_near_the_largest_number_give_gradients(gradient: str, dtype: Any, backend: Any) -> None:
    """2 to the power of log2(3e38), rounded up, is infinite in fp32."""
    problem = make_problem(((9,),), 300, 16, dtype=torch.float32, reduction="none", ignored=0.0)
    upstream_n = problem.upstream[0] / problem.upstream[0].abs().max() * 3e38
    assert upstream_n.abs().max() > 2.0**127
    # In fp16 dE has no room for it, but dC in fp32 has.
    hidden_nD, weight_VD = (0.1 * problem.hidden[0]).to(dtype), 0.5 * problem.weight
    weight_VD = weight_VD if dtype == torch.float16 else weight_VD.to(dtype)
    problem = replace(problem, hidden=(hidden_nD,), weight=weight_VD, upstream=(upstream_n,))
    truth = plain_outcome(problem, torch.float64)
    name = next(name for name, module in BACKENDS.items() if module is backend)
    got = cce_outcome(problem, backend=name, gradient=gradient, filter_eps=0.0 if gradient == "exact" else 1e-9)
    bound = 8 * ROUNDING[dtype] + 1e-5
    assert relative_error(got.dweight[0], truth.dweight[0]) < bound
    assert dtype == torch.float16 or relative_error(got.dhidden[0], truth.dhidden[0]) < bound
