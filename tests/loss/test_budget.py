"""The exact loss by ``workspace_mb``: the same gradients whatever forward keeps, and never more than it may.

Shapes of the cases: a few dozen tokens, a few tiles of the vocabulary.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ranks import RankPool
from reference import (
    DEVICE,
    ROUNDING,
    Problem,
    assert_bitwise,
    assert_no_worse,
    assert_within,
    cce_outcome,
    leaf,
    make_problem,
    plain_outcome,
    relative_error,
)
from sharded import Layout, assert_ranks_no_worse, make_rank_problem
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from watched import LargestTensor

from cce_dist import linear_cross_entropy, linear_logprobs
from cce_dist.kernels.problem import TILE
from cce_dist.loss import settings
from cce_dist.loss.settings import Method, default_workspace_mb, split_budget, workspace_bytes

EXACT: dict[str, Any] = {"gradient": "exact", "backend": "triton"}
ALL: dict[str, Any] = {**EXACT, "workspace_mb": "logits"}
METHOD = Method("exact", 0.0, "triton", "full", 0)


@pytest.fixture
def _without_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small budgets, too, then keep a part of the logits: all but 1 MB of them."""
    monkeypatch.setattr(settings, "_EXACT_WORKSPACE_MB", 0)


def saved_bytes(problem: Problem, **options: Any) -> int:
    """What autograd holds of the loss, but for its inputs."""
    hidden, weight = leaf(problem.hidden[0]), leaf(problem.weight)
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        loss = linear_cross_entropy(hidden, weight, problem.labels[0], **options)
    assert loss.requires_grad
    for x in (hidden, weight, problem.labels[0]):
        held.pop(x.untyped_storage().data_ptr(), None)
    return sum(held.values())


@given(
    budget=st.one_of(st.none(), st.just("logits"), st.integers(1, 1 << 15)),
    tokens=st.integers(0, 1 << 16),
    rows=st.integers(0, 300_000),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    read=st.booleans(),
)
@hypothesis_settings(max_examples=300, deadline=None)
def test_what_is_kept_and_the_workspace_are_within_the_budget(
    budget: Any, tokens: int, rows: int, dtype: torch.dtype, read: bool
) -> None:
    try:
        whole = workspace_bytes(budget, METHOD, tokens, dtype.itemsize)
    except ValueError:
        return
    split = split_budget(budget, whole, METHOD, tokens, rows, dtype, read)
    padded = -(-split.columns // TILE) * TILE * tokens * dtype.itemsize
    assert 0 <= split.columns <= rows
    assert split.workspace >= 0
    if dtype == torch.float16 or budget is None:
        assert split == (0, whole)
    elif budget == "logits":
        assert split == (rows if tokens else 0, whole)
    else:
        assert padded + split.workspace <= whole
        if split.columns < rows or read:  # what is left serves backward as well as the default does
            least = min(default_workspace_mb(tokens, dtype.itemsize, True) << 20, whole)
            assert split.workspace >= least or split.columns == 0


@pytest.mark.full
def test_only_a_budget_keeps_logits_and_no_more_than_it_says() -> None:
    problem = make_problem(((512,),), 9 * TILE, 8, ignored=0.0)
    logits = 512 * 9 * TILE * 4
    nothing = saved_bytes(problem, **EXACT)
    assert nothing < logits / 10
    assert saved_bytes(problem, workspace_mb=2, **EXACT) == nothing  # not all, and no 256 MB beside
    for budget in (3, "logits"):
        assert logits < saved_bytes(problem, workspace_mb=budget, **EXACT) < logits + 2 * nothing
    assert saved_bytes(problem, workspace_mb="logits", gradient="exact", backend="torch") < logits / 10


@pytest.mark.full
@pytest.mark.usefixtures("_without_beside")
def test_a_part_of_the_logits_is_kept_within_the_budget() -> None:
    problem = make_problem(((512,),), 9 * TILE, 8, ignored=0.0)
    nothing = saved_bytes(problem, **EXACT)
    assert 0 < saved_bytes(problem, workspace_mb=2, **EXACT) - nothing <= 4 * TILE * 512 * 4 + 10 * 512
    with LargestTensor() as seen:
        got = cce_outcome(problem, workspace_mb=2, **EXACT)
    assert seen.largest <= 1 << 20
    truth, plain = plain_outcome(problem, torch.float64), plain_outcome(problem)
    assert_within(got._replace(dweight=truth.dweight), truth, plain)
    # Kept exponentials meet f ⊙ E, which is rounded once more.
    off, allowed = (relative_error(x.dweight[0], truth.dweight[0]) for x in (got, plain))
    assert off <= 1.5 * allowed + 2 * ROUNDING[torch.float32]


@pytest.mark.full
def test_without_a_gradient_nothing_is_kept() -> None:
    problem = make_problem(((512,),), 9 * TILE, 8)
    with LargestTensor() as seen, torch.no_grad():
        linear_cross_entropy(problem.hidden[0], leaf(problem.weight), problem.labels[0], **ALL)
    assert seen.largest < 1 << 20


OPTIONS: dict[str, dict[str, Any]] = {
    "softcap and scale": {"softcap": 4.0, "logit_scale": 0.7},
    "bias and softcap": {"bias": True, "softcap": 4.0},
    "smoothing and z-loss": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "lse": {"lse_gradient": True, "reduction": "none"},
    "shift": {"shift": 1, "reduction": "sum"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_of_the_loss_goes_with_kept_logits(options: dict[str, Any]) -> None:
    problem = make_problem(((3, 9),), 300, 16, ignored=0.3, **options)
    assert_no_worse(cce_outcome(problem, **ALL), problem)


@pytest.mark.parametrize("each", [False, True], ids=["one temperature", "one a token"])
@pytest.mark.parametrize("softcap", [pytest.param(None, marks=pytest.mark.full), 4.0])
@pytest.mark.parametrize("entropy", [True, pytest.param("value", marks=pytest.mark.full)])
def test_the_entropy_has_its_gradient(entropy: Any, softcap: float | None, each: bool) -> None:
    problem = make_problem(((3, 9),), 300, 16, ignored=0.3, spread=4.0)
    temperature: Any = torch.linspace(0.5, 2, 27, device=DEVICE).view(3, 9) if each else 0.8
    grads = []
    for dtype, given_ in ((torch.float64, {"gradient": "exact"}), (torch.float32, ALL)):
        hidden, weight = leaf(problem.hidden[0].to(dtype)), leaf(problem.weight.to(dtype))
        tau = temperature.to(dtype) if each else temperature
        found = linear_logprobs(
            hidden, weight, problem.labels[0], entropy=entropy, temperature=tau, softcap=softcap, **given_
        )
        assert found.entropy is not None
        total = found.logprob.sum() + (3 * found.entropy.sum() if entropy is True else 0)
        total.backward()
        grads.append((hidden.grad, weight.grad))
    for truth, got in zip(*grads, strict=True):
        assert relative_error(got, truth) < 3e-6


def test_class_weights_and_an_accumulator_go_with_kept_logits() -> None:
    problem = make_problem(((40,),), 300, 16)
    class_weights = torch.rand(300, device=DEVICE)
    onto, weight, hidden = torch.ones(300, 16, device=DEVICE), leaf(problem.weight), leaf(problem.hidden[0])
    given_ = {"class_weights": class_weights, "grad_accumulator": onto, "reduction": "sum"}
    linear_cross_entropy(hidden, weight, problem.labels[0], **given_, **ALL).backward()
    plain, rows = leaf(problem.hidden[0].double()), leaf(problem.weight.double())
    F.cross_entropy(plain @ rows.T, problem.labels[0], class_weights.double(), reduction="sum").backward()
    assert weight.grad is None
    assert rows.grad is not None
    assert relative_error(onto.double() - 1, rows.grad) < 3e-6
    assert relative_error(hidden.grad, plain.grad) < 3e-6


@pytest.mark.full
def test_recomputation_by_checkpointing_holds_nothing_between_and_gives_the_same_bits() -> None:
    problem = make_problem(((40,),), 5 * TILE, 16)

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, problem.labels[0], **ALL)

    grads = []
    for recompute in (False, True):
        hidden, weight = leaf(problem.hidden[0]), leaf(problem.weight)
        loss = checkpoint(loss_of, hidden, weight, use_reentrant=False) if recompute else loss_of(hidden, weight)
        loss.backward(retain_graph=not recompute)
        grads.append((hidden.grad, weight.grad))
    for one, other in zip(*grads, strict=True):
        assert_bitwise(one, other)


def test_deterministic_mode_repeats_gradients_bitwise() -> None:
    """Labels that many tokens share are summed in one order."""
    problem = make_problem(((90,),), 3 * TILE, 16, lse_gradient=True)
    problem = replace(problem, labels=(problem.labels[0] % 5,))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (cce_outcome(problem, **ALL) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_bitwise(first.dweight[0], second.dweight[0])
    assert_bitwise(first.dhidden[0], second.dhidden[0])
    assert_no_worse(first, problem)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"gradient": "unbiased"}, 'workspace_mb="logits" goes with gradient="exact".*got \'unbiased\''),
        ({"gradient": None}, 'workspace_mb="logits" goes with gradient="exact"'),
        ({"dtype": torch.float16}, 'workspace_mb="logits" goes with bf16 or fp32.*got torch.float16'),
        ({"workspace_mb": "all"}, "workspace_mb must be an int, 1 or more, \"logits\" or None; got 'all'"),
        ({"exact_sums": True}, 'workspace_mb="logits" goes without exact_sums'),
        ({"fp32_head": True}, 'workspace_mb="logits" goes without fp32_head'),
    ],
    ids=str,
)
def test_what_keeps_no_logits_is_refused_by_name(change: dict[str, Any], text: str) -> None:
    change = dict(change)
    hidden = torch.randn(4, 16, device=DEVICE).to(change.pop("dtype", torch.float32))
    function = linear_logprobs if "exact_sums" in change else linear_cross_entropy
    with pytest.raises(ValueError, match=text):
        function(hidden, torch.randn(9, 16, device=DEVICE), torch.zeros(4).long().to(DEVICE), **{**ALL, **change})


# Several ranks


@pytest.mark.full
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_keep_their_own_logits(ranks: RankPool, world: int, layout: Layout) -> None:
    """Uneven shards, one of them empty; a rank without a valid token."""
    cuts = {2: [0, 523, 523], 4: [0, 257, 260, 260, 523]}[world]
    runs = [((start, stop),) if start < stop else () for start, stop in pairwise(cuts)]
    shapes = ((9,),) if layout == "replicated" else tuple((9 + rank,) for rank in range(world))
    problem = make_rank_problem(shapes, 523, 16, lse_gradient=True, reduction="none")
    if layout == "sharded":
        problem = replace(problem, labels=(torch.full_like(problem.labels[0], -100), *problem.labels[1:]))
    assert_ranks_no_worse(ranks, world, problem, layout, runs, **ALL)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("upstream", [1.0, 0.7], ids=str)
def test_in_bf16_the_errors_stay_below_those_of_bf16_logits(upstream: float) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2048, 512, generator=draw), 0.15 * torch.randn(20_000, 512, generator=draw)
    hidden, weight = hidden.to(DEVICE, torch.bfloat16), weight.to(DEVICE, torch.bfloat16)
    labels = torch.multinomial((hidden.float() @ weight.float().T).softmax(1), 1)[:, 0]
    grads = {}
    for name in ("truth", "logits in bf16", "computed again", "kept"):
        dtype = torch.float64 if name == "truth" else torch.bfloat16
        e, c = leaf(hidden.to(dtype)), leaf(weight.to(dtype))
        if name in ("truth", "logits in bf16"):
            z = e @ c.T
            loss = F.cross_entropy(z if name == "truth" else z.float(), labels, reduction="sum")
        else:
            size = "logits" if name == "kept" else None
            loss = linear_cross_entropy(e, c, labels, reduction="sum", gradient="exact", workspace_mb=size)
        (upstream * loss).backward()
        grads[name] = e.grad, c.grad
    errors = {name: [relative_error(x, y) for x, y in zip(g, grads["truth"], strict=True)] for name, g in grads.items()}
    assert errors["kept"][0] < 0.5 * errors["logits in bf16"][0]
    assert errors["kept"][1] < 0.8 * errors["logits in bf16"][1]
    assert all(x < 1.1 * y for x, y in zip(errors["kept"], errors["computed again"], strict=True))
