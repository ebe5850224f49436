"""Exact backward from exponentials that forward kept: the same formula, and logits that a sample foretells badly.

Shapes: N tokens, D hidden, V local rows.
"""

from typing import Any

import pytest
import torch
from dense import EVERYTHING, Dense, dense, gradients, make_logits, make_upstream
from reference import DEVICE, assert_bitwise, relative_error
from torch import Tensor

from cce_dist.collectives import merge_softmax
from cce_dist.kernels.problem import TILE, Exponentials, Filter, Keep, Logits, Normaliser, Upstream
from cce_dist.kernels.triton import backend, summarise

EXACT = Filter("exact")
CASES: dict[str, dict[str, Any]] = {
    "plain": {"bias": False},
    "softcap": {"bias": False, "softcap": 6.0},
    "bias": {},
    "softcap and bias": {"softcap": 6.0},
    "some rows not valid": {"bias": False, "num_valid": 17},
    "D no multiple of a block": {"bias": False, "hidden_size": 45, "vocab": 300},
}


def kept_by_forward(logits: Logits, entropy: bool = False, columns: int | None = None) -> Exponentials:
    sloped = logits.bias_V is None and not entropy
    keep = Keep(logits.weight_VD.shape[0] if columns is None else columns, sloped)
    kept = backend.summarise(logits, False, 1 << 20, entropy, keep).exponentials
    assert kept is not None
    return kept


def differentiate(logits: Logits, upstream: Upstream, kept: Exponentials | None, **wanted: Any) -> Any:
    normaliser = merge_softmax(backend.summarise(logits, False, 1 << 20), None).normaliser
    wanted_ = EVERYTHING._replace(bias=logits.bias_V is not None, **wanted)
    return backend.differentiate(logits, None, normaliser, upstream, EXACT, wanted_, exponentials=kept)


def assert_follows(got: Any, logits: Logits, d: Dense, upstream: Upstream, bound: float = 3e-6) -> None:
    expected = gradients(logits, d, upstream, EXACT)
    assert relative_error(got.hidden_ND[: int(logits.n_valid)], expected[0]) < bound
    assert not got.hidden_ND[int(logits.n_valid) :].any()
    assert relative_error(got.weight_VD, expected[1]) < bound
    assert got.bias_V is None or relative_error(got.bias_V, expected[2]) < bound


@pytest.mark.parametrize("columns", [pytest.param(None, marks=pytest.mark.full), 2 * TILE], ids=["all", "two tiles"])
@pytest.mark.parametrize("entropy", [False, True], ids=["loss", "entropy"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_follow_the_formula(case: dict[str, Any], entropy: bool, columns: int | None) -> None:
    logits = make_logits(**case)
    d, upstream = dense(logits), make_upstream(logits, entropy=entropy)
    kept = kept_by_forward(logits, entropy, columns)
    assert_follows(differentiate(logits, upstream, kept), logits, d, upstream)


def test_each_token_has_a_temperature() -> None:
    logits = make_logits(bias=False, softcap=6.0)
    tau_N = torch.linspace(0.5, 2.0, logits.num_tokens, device=DEVICE)
    logits = logits._replace(inverse_temperature_N=tau_N)
    d, upstream = dense(logits), make_upstream(logits)
    z_NV = d.z_NV * tau_N[:, None].double()
    d = d._replace(z_NV=z_NV, softmax_NV=z_NV.softmax(1), lse_N=z_NV.logsumexp(1))
    assert_follows(differentiate(logits, upstream, kept_by_forward(logits)), logits, d, upstream)


def test_what_is_kept_changes_nothing_in_the_sums() -> None:
    logits = make_logits(bias=False)
    plain = backend.summarise(logits, False, 1 << 20, True)
    keeping = backend.summarise(logits, False, 1 << 20, True, Keep(300, True))
    for one, other in zip((*plain[:3], plain.weighted_N), (*keeping[:3], keeping.weighted_N), strict=True):
        assert_bitwise(one, other)


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_one_gradient_alone_has_the_same_bits(wanted: str) -> None:
    logits = make_logits(bias=False)
    upstream, kept = make_upstream(logits), kept_by_forward(logits)
    both = differentiate(logits, upstream, kept)
    alone = differentiate(logits, upstream, kept, **{{"hidden": "weight", "weight": "hidden"}[wanted]: False})
    assert [x is not None for x in alone] == [wanted == "hidden", wanted == "weight", False, False]
    assert_bitwise(getattr(alone, f"{wanted}_{'ND' if wanted == 'hidden' else 'VD'}"), both[wanted == "weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_the_weight_gradient_comes_in_the_wanted_dtype(dtype: torch.dtype) -> None:
    logits = make_logits(bias=False)
    d, upstream, kept = dense(logits), make_upstream(logits), kept_by_forward(logits)
    got = differentiate(logits, upstream, kept, weight_dtype=dtype, workspace_bytes=1).weight_VD
    assert got.dtype == dtype
    assert relative_error(got, gradients(logits, d, upstream, EXACT)[1]) < max(torch.finfo(dtype).eps, 3e-6)


def test_a_backward_after_another_upstream_is_as_the_first() -> None:
    """The labels' entries are written in place."""
    logits = make_logits(bias=False)
    d, kept = dense(logits), kept_by_forward(logits)
    first, other = make_upstream(logits), make_upstream(logits, seed=5)
    before = differentiate(logits, first, kept)
    assert_follows(differentiate(logits, other, kept), logits, d, other)
    for x, y in zip(differentiate(logits, first, kept)[:2], before[:2], strict=True):
        assert_bitwise(x, y)


@pytest.mark.parametrize("which", ["softmax_N", "target_N"])
def test_a_part_of_the_upstream_may_be_zero_or_next_to_nothing(which: str) -> None:
    """No factor makes P of a label alone out of what is multiplied with a = 0."""
    logits = make_logits(bias=False)
    d, upstream, kept = dense(logits), make_upstream(logits), kept_by_forward(logits)
    tiny_N = torch.where(torch.arange(logits.num_tokens, device=DEVICE) % 2 == 0, 0.0, 2.0**-40)
    upstream = upstream._replace(**{which: getattr(upstream, which) * tiny_N})
    assert_follows(differentiate(logits, upstream, kept), logits, d, upstream, 2.0**-16)


# Logits that are not as their sample says


def sampled(vocab: int) -> Tensor:
    return torch.arange(summarise._SAMPLED, device=DEVICE) * vocab // summarise._SAMPLED


def far_above_the_sample(logits: Logits) -> Logits:
    """Every fourth token prefers rows that are not in the sample, by 200."""
    weight_VD, hidden_ND = logits.weight_VD.clone(), logits.hidden_ND.clone()
    weight_VD[:, 0], hidden_ND[:, 0] = 200 / logits.logit_scale, 0
    weight_VD[sampled(weight_VD.shape[0]), 0] = 0
    hidden_ND[::4, 0] = 1
    return logits._replace(weight_VD=weight_VD, hidden_ND=hidden_ND)


def near_minus_200(logits: Logits) -> Logits:
    weight_VD, hidden_ND = logits.weight_VD.clone(), logits.hidden_ND.clone()
    weight_VD[:, 0], hidden_ND[:, 0] = -200 / logits.logit_scale, 1
    return logits._replace(weight_VD=weight_VD, hidden_ND=hidden_ND)


def with_bias(logits: Logits, rows: Any) -> Logits:
    bias_V = torch.zeros(logits.weight_VD.shape[0], device=DEVICE)
    bias_V[rows] = -torch.inf
    return logits._replace(bias_V=bias_V)


HOSTILE: dict[str, Any] = {
    "far above the sample": far_above_the_sample,
    "near -200": near_minus_200,
    "-inf in the sample": lambda logits: with_bias(logits, sampled(logits.weight_VD.shape[0])),
    "-inf in a tile": lambda logits: with_bias(logits, slice(TILE, 2 * TILE)),
}


@pytest.mark.parametrize("columns", [None, pytest.param(2 * TILE, marks=pytest.mark.full)], ids=["all", "two tiles"])
@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_hostile_logits_follow_the_formula(make: Any, columns: int | None) -> None:
    logits = make(make_logits(bias=False, vocab=4 * TILE - 40))
    logits = logits._replace(target_N=logits.target_N.clamp(max=TILE - 1))  # a label of probability 0 has loss inf
    if logits.bias_V is not None:
        row = (logits.target_N.clamp(min=0) + (logits.bias_V[logits.target_N.clamp(min=0)] == -torch.inf)).int()
        logits = logits._replace(target_N=torch.where(logits.target_N < 0, logits.target_N, row))
    d, upstream = dense(logits), make_upstream(logits)
    assert d.lse_N.isfinite().all()
    kept = kept_by_forward(logits, columns=columns)
    assert kept.exp_NK.isfinite().all()
    assert kept.exp_NK.max() <= 2.0**60
    # Logits of 200 are off by 1e-5 in fp32.
    assert_follows(differentiate(logits, upstream, kept), logits, d, upstream, 3e-5)


def test_a_shard_whose_logits_are_all_minus_infinity_has_no_gradient() -> None:
    logits = make_logits(bias=False, vocab=TILE)._replace(target_N=torch.full((30,), -1, device=DEVICE).int())
    kept = kept_by_forward(with_bias(logits, slice(None)))
    for lse in (-1e3, 0.0, 1e3):  # of other shards
        lse_N = torch.full((logits.num_tokens,), lse, device=DEVICE)
        others = Normaliser(lse_N, torch.zeros_like(lse_N), summarise.LN_2)
        for sloped in (True, False):
            some, wanted = kept._replace(sloped=sloped), EVERYTHING._replace(bias=False)
            got = backend.differentiate(logits, None, others, make_upstream(logits), EXACT, wanted, exponentials=some)
            assert got.hidden_ND is not None
            assert got.weight_VD is not None
            assert not got.hidden_ND.any()
            assert not got.weight_VD.any()


def test_tokens_that_are_almost_certain_have_their_gradient() -> None:
    """p − 1 of the label is formed in fp32, from the logit that is the largest: here 1 − p is about
    1e-5, and what rounding makes of a logit half of it."""
    logits = make_logits(bias=False, hidden_size=64, spread=1.0)
    place_N, top_N2 = logits.token_N.long(), dense(logits).z_NV.topk(2).values
    # Stretched until the largest logit lies 11 above the next one.
    stretch_N = 11 / (top_N2[:, 0] - top_N2[:, 1])
    hidden_ND = logits.hidden_ND.clone()
    hidden_ND[place_N] *= stretch_N.to(hidden_ND.dtype)[:, None]
    logits = logits._replace(hidden_ND=hidden_ND)
    d = dense(logits)
    logits = logits._replace(target_N=d.z_NV.argmax(1).to(torch.int32))
    upstream = make_upstream(logits)
    upstream = upstream._replace(softmax_N=upstream.target_N)
    rest_N = 1 - d.softmax_NV.amax(1)
    assert 5e-6 < rest_N.median() < 1e-4
    expected_ND = gradients(logits, d, upstream, EXACT)[0]
    for kept in (kept_by_forward(logits), None):
        error_N = (differentiate(logits, upstream, kept).hidden_ND - expected_ND).norm(dim=1) / expected_ND.norm(dim=1)
        assert error_N.median() < 0.03
