"""What the loss of a token can be beside its cross-entropy: label smoothing, a z-loss, weights of tokens."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import RankPool
from reference import (
    DEVICE,
    TRITON_DTYPES,
    Outcome,
    Problem,
    assert_no_worse,
    cce_outcome,
    grad_of,
    leaf,
    make_problem,
    relative_error,
)
from sharded import Layout, assert_ranks_no_worse, local_rows, make_rank_problem, make_shard, part_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from cce_dist import VocabShard, linear_cross_entropy

UNEVEN = ((13,), (5,), (2, 4), (9,))
every_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def test_label_smoothing_is_that_of_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=draw).double() for shape in ((7, 16), (90, 16), (90,)))
    labels = torch.tensor([0, 5, -100, 89, 2, 2, 7])
    for smoothing in (0.1, 1.0):
        leaves = [leaf(x) for x in (hidden, weight, bias)]
        stock = F.cross_entropy(leaves[0] @ leaves[1].T + leaves[2], labels, label_smoothing=smoothing)
        ours = [leaf(x) for x in (hidden, weight, bias)]
        loss = linear_cross_entropy(ours[0], ours[1], labels, bias=ours[2], label_smoothing=smoothing)
        assert float(loss) == pytest.approx(float(stock), rel=1e-12)
        pairs = zip(torch.autograd.grad(loss, ours), torch.autograd.grad(stock, leaves), strict=True)
        assert all(relative_error(got, wanted) < 1e-12 for got, wanted in pairs)


OPTIONS: dict[str, dict[str, Any]] = {
    "smoothing": {"label_smoothing": 0.1},
    "smoothing, scale, bias": {"label_smoothing": 0.3, "logit_scale": 0.7, "bias": True},
    "smoothing, softcap, bias": {"label_smoothing": 0.3, "softcap": 5.0, "bias": True},
    "z-loss": {"z_loss": 1e-2},
    "z-loss, softcap": {"z_loss": 1e-2, "softcap": 5.0, "reduction": "none"},
    "both": {"label_smoothing": 0.1, "z_loss": 1e-3, "reduction": "sum", "shift": 1, "lse_gradient": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mode", [{"gradient": "exact"}, {"gradient": "unbiased", "filter_eps": 1e-9}], ids=str)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@every_backend
def test_options_match_full_logits(
    options: dict[str, Any], mode: dict[str, Any], backend: str, dtype: torch.dtype
) -> None:
    problem = make_problem(((3, 17),), 300, 24, dtype=dtype, **options)
    assert_no_worse(cce_outcome(problem, backend=backend, **mode), problem)


@pytest.mark.parametrize("layout", ["replicated", "sharded", "grid"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_smoothing_over_uneven_shards_is_that_of_the_whole_vocabulary(
    ranks: RankPool, world: int, layout: Layout
) -> None:
    """Megatron smooths within each rank's part of the vocabulary; here the mean is that of all rows."""
    if layout == "grid" and world != 4:
        pytest.skip("a grid has 4 ranks")
    shapes = UNEVEN[: part_of(world - 1, layout) + 1]
    problem = make_rank_problem(
        shapes, 301, bias=True, padding_rows=7, lse_gradient=True, label_smoothing=0.2, z_loss=1e-2, logit_scale=0.9
    )
    assert_ranks_no_worse(ranks, world, problem, layout, gradient="exact")


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_a_rank_without_rows_smooths_with_the_others(ranks: RankPool, layout: Layout) -> None:
    problem = make_rank_problem(UNEVEN[: part_of(1, layout) + 1], 60, bias=True, label_smoothing=0.2)
    assert_ranks_no_worse(ranks, 2, problem, layout, [((0, 60),), ((60, 60),)], gradient="exact")


@every_backend
def test_weights_of_tokens_multiply_their_losses(backend: str) -> None:
    problem = make_problem(((4, 9),), 300, 24, shift=1, z_loss=1e-2)
    weights = torch.rand(4, 9, device=DEVICE)
    hidden, weight = leaf(problem.hidden[0]), leaf(problem.weight)

    def loss(reduction: str, **given: Any) -> torch.Tensor:
        return linear_cross_entropy(
            hidden, weight, problem.labels[0], shift=1, z_loss=1e-2, reduction=reduction, backend=backend, **given
        )

    mean, each = loss("mean", token_weights=weights, gradient="exact"), loss("none", gradient="exact")
    valid = problem.labels[0][:, 1:] != -100
    wanted = (each * weights[:, 1:]).sum() / valid.sum()
    assert float(mean) == pytest.approx(float(wanted), rel=1e-5)
    for got, expected in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (mean, wanted)), strict=True):
        assert relative_error(got, expected) < 1e-5


def _with_class_weights(
    problem: Problem, class_weights: torch.Tensor, layout: Layout, smoothing: float, softcap: float | None
) -> Outcome:
    shard, part = make_shard(problem, layout), part_of(dist.get_rank(), layout)
    hidden, weight = leaf(problem.hidden[part]), leaf(local_rows(problem.weight, shard))
    own = local_rows(class_weights, shard)
    settings = {
        "class_weights": own,
        "label_smoothing": smoothing,
        "softcap": softcap,
        "gradient": "exact",
        "backend": "torch",
    }
    loss = linear_cross_entropy(hidden, weight, problem.labels[part], shard=shard, **settings)
    (loss * problem.upstream[part]).backward()
    return Outcome((loss.detach(),), (), (grad_of(hidden),), (grad_of(weight),), ())


@pytest.mark.parametrize(
    ("world", "layout"), [(1, "replicated"), (2, "replicated"), (3, "sharded"), (4, "grid"), (4, "sharded")]
)
@pytest.mark.parametrize(("smoothing", "softcap"), [(0.0, None), (0.3, None), (0.3, 2.0)])
def test_class_weights_on_sharded_vocabularies_are_those_of_torch(
    ranks: RankPool, world: int, layout: Layout, smoothing: float, softcap: float | None
) -> None:
    problem = make_rank_problem(UNEVEN[: part_of(world - 1, layout) + 1], 61)
    class_weights = torch.rand(61) + 0.5
    weight, hidden = leaf(problem.weight.double()), [leaf(x.double()) for x in problem.hidden]
    logits = torch.cat([(x @ weight.T).flatten(0, -2) for x in hidden])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    labels = torch.cat([x.flatten() for x in problem.labels])
    loss = F.cross_entropy(logits, labels, weight=class_weights.double(), label_smoothing=smoothing)
    # The mean of all tokens is on every rank; its gradient is that of the sum of the parts' losses.
    (loss * sum(float(u) for u in problem.upstream)).backward()
    got = ranks.run(world, _with_class_weights, problem, class_weights, layout, smoothing, softcap)
    rows = -(-61 // world)
    for rank, outcome in enumerate(got):
        assert float(outcome.loss[0]) == pytest.approx(float(loss), rel=1e-5)
        assert relative_error(outcome.dhidden[0], grad_of(hidden[part_of(rank, layout)])) < 1e-5
        assert relative_error(outcome.dweight[0], grad_of(weight)[rows * rank : rows * (rank + 1)]) < 1e-5


def test_weights_that_follow_from_the_log_probability() -> None:
    """As in DFT (arXiv 2508.05629): the loss of a token counts as much as the token is likely."""
    problem = make_problem(((11,),), 300, 24)
    hidden, labels = leaf(problem.hidden[0]), problem.labels[0]
    with torch.no_grad():
        nll = linear_cross_entropy(hidden, problem.weight, labels, reduction="none", gradient="exact")
    loss = linear_cross_entropy(hidden, problem.weight, labels, token_weights=torch.exp(-nll), gradient="exact")
    log_p = -F.cross_entropy(hidden @ problem.weight.T, labels, reduction="none")
    wanted = -(log_p.exp().detach() * log_p).sum() / (labels != -100).sum()
    got, expected = (torch.autograd.grad(x, hidden)[0] for x in (loss, wanted))
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing must be a float in"),
        ({"z_loss": -1.0}, "z_loss must be a finite float, 0 or more"),
        ({"class_weights": torch.ones(3)}, r"class_weights must be \[40\], one for each row"),
        ({"token_weights": torch.ones(4)}, r"token_weights must be \[3\], one for each label"),
        ({"token_weights": torch.ones(3).long()}, "token_weights must be a tensor of floats"),
        ({"token_weights": torch.ones(3, requires_grad=True)}, "token_weights must be a tensor of floats"),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_named(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        linear_cross_entropy(torch.zeros(3, 8), torch.zeros(40, 8), torch.zeros(3).long(), **given)


def _weights_as_dtensors() -> list[str]:
    mesh, said = init_device_mesh("cpu", (dist.get_world_size(),)), []
    shard = VocabShard.even(40, dist.group.WORLD)
    hidden, rows, labels = torch.zeros(4, 8), torch.zeros(shard.num_rows, 8), torch.zeros(4).long()
    for options in (
        {"class_weights": distribute_tensor(torch.ones(40), mesh, [Shard(0)])},
        {"token_weights": distribute_tensor(torch.ones(4), mesh, [Replicate()])},
    ):
        try:
            linear_cross_entropy(hidden, rows, labels, shard=shard, **options)
        except ValueError as error:
            said.append(str(error))
    return said


def test_weights_that_are_dtensors_are_refused_before_any_collective(ranks: RankPool) -> None:
    for said in ranks.run(2, _weights_as_dtensors, timeout=30):
        assert ["must be a plain tensor" in text for text in said] == [True, True]


def test_hidden_states_of_ignored_tokens_may_be_anything() -> None:
    hidden, weight = torch.randn(4, 8), leaf(torch.randn(40, 8))
    hidden[2] = torch.nan
    hidden = leaf(hidden)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 2, -100, 3]), label_smoothing=0.1)
    loss.backward()
    assert loss.isfinite() and weight.grad is not None and weight.grad.isfinite().all()
    assert hidden.grad is not None and not hidden.grad[2].any()


def test_options_that_are_off_leave_no_trace_in_the_graph() -> None:
    hidden, weight, labels = leaf(torch.randn(5, 8)), leaf(torch.randn(40, 8)), torch.arange(5)

    def nodes(**options: Any) -> list[str]:
        losses = linear_cross_entropy(hidden, weight, labels, reduction="none", **options)  # holds the graph
        found, todo = [], [losses.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None:
                found.append(node.name())
                todo += [following for following, _ in node.next_functions]
        return found

    off = nodes(label_smoothing=0.0, z_loss=0.0, token_weights=None, class_weights=None)
    of_views = {"ViewBackward0", "ReshapeAliasBackward0", "torch::autograd::AccumulateGrad"}
    assert set(off) - of_views == {"LinearCrossEntropyBackward"}
    for options in ({"label_smoothing": 0.1}, {"z_loss": 0.1}, {"token_weights": torch.ones(5)}):
        assert len(nodes(**options)) > len(off)


def test_labels_that_lie_apart_have_the_loss_of_their_copy() -> None:
    """A slice of the last position, say, whose stride a kernel must not overlook."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=draw).to(DEVICE) for shape in ((4, 1, 24), (300, 24)))
    labels = torch.randint(300, (4, 6), generator=draw).to(DEVICE)[:, -1:]
    for backend in ("torch", "triton"):
        got, wanted = (
            linear_cross_entropy(hidden, leaf(weight), y, backend=backend, gradient="exact")
            for y in (labels, labels.clone())
        )
        assert float(got) == float(wanted)
        assert float(got) == pytest.approx(float(F.cross_entropy(hidden[:, 0] @ weight.T, labels[:, 0])), rel=1e-5)


def test_under_autocast_the_mean_logit_keeps_its_precision() -> None:
    problem = make_problem(((200,),), 300, 24, label_smoothing=0.5)
    rounded = replace(problem, hidden=(problem.hidden[0].bfloat16(),), weight=problem.weight.bfloat16())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = cce_outcome(problem, backend="torch", gradient="exact")
    hidden, weight = (leaf(x.double()) for x in (rounded.hidden[0], rounded.weight))
    logits = hidden @ weight.T
    truth = F.cross_entropy(logits, problem.labels[0], label_smoothing=0.5)
    assert float(got.loss[0]) == pytest.approx(float(truth), rel=2e-4)
    (truth * problem.upstream[0]).backward()
    assert relative_error(got.dweight[0], grad_of(weight)) < 3e-3


def test_weights_of_ignored_tokens_may_be_anything() -> None:
    weights = torch.tensor([1.0, 2.0, torch.nan, torch.inf])
    labels = torch.tensor([1, 2, -100, -100])
    hidden, weight = torch.randn(4, 8), torch.randn(40, 8)
    assert linear_cross_entropy(hidden, weight, labels, token_weights=weights).isfinite()


def in_fp64(problem: Problem) -> Problem:
    """Few tokens of few dimensions in fp32 have errors of single roundings."""
    return replace(
        problem,
        hidden=tuple(x.double() for x in problem.hidden),
        weight=problem.weight.double(),
        bias=None if problem.bias is None else problem.bias.double(),
        upstream=tuple(x.double() for x in problem.upstream),
        lse_upstream=tuple(x.double() for x in problem.lse_upstream),
    )


@settings(derandomize=True, deadline=None, max_examples=25, database=None)
@given(st.data())
def test_any_options_match_full_logits(data: st.DataObject) -> None:
    softcap = data.draw(st.sampled_from([None, 3.0]), "softcap")
    problem = make_problem(
        ((data.draw(st.integers(2, 40), "tokens"),),),
        data.draw(st.integers(2, 400), "vocabulary"),
        data.draw(st.integers(1, 40), "dim"),
        bias=data.draw(st.booleans(), "bias"),
        softcap=softcap,
        logit_scale=data.draw(st.sampled_from([None, 0.5, -1.5]), "scale"),
        label_smoothing=data.draw(st.sampled_from([0.0, 0.1, 1.0]), "smoothing"),
        z_loss=data.draw(st.sampled_from([0.0, 1e-3]), "z_loss"),
        reduction=data.draw(st.sampled_from(["none", "sum", "mean"]), "reduction"),
        ignored=data.draw(st.sampled_from([0.0, 0.3]), "ignored"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    problem = in_fp64(problem)
    assert_no_worse(cce_outcome(problem, gradient="exact"), problem)


@pytest.mark.full
@settings(
    derandomize=True,
    deadline=None,
    max_examples=20,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_options_on_ranks_match_full_logits(ranks: RankPool, data: st.DataObject) -> None:
    layout: Layout = data.draw(st.sampled_from(["replicated", "sharded", "grid"]), "layout")
    world = 4 if layout == "grid" else data.draw(st.integers(1, 4), "world")
    softcap = data.draw(st.sampled_from([None, 3.0]), "softcap")
    sampled = {"gradient": "unbiased", "filter_eps": 1e-30, "frequent_rows": 20}
    mode: dict[str, Any] = data.draw(st.sampled_from([{"gradient": "exact"}, sampled]), "mode")
    parts = [(data.draw(st.integers(0, 9), "tokens"),) for _ in range(part_of(world - 1, layout) + 1)]
    parts[0] = (parts[0][0] + 2,)
    problem = make_rank_problem(
        tuple(parts),
        data.draw(st.integers(4, 300), "vocabulary"),
        data.draw(st.integers(1, 40), "dim"),
        bias=data.draw(st.booleans(), "bias"),
        padding_rows=data.draw(st.sampled_from([0, 5]), "padding"),
        softcap=softcap,
        logit_scale=data.draw(st.sampled_from([None, 0.5, -1.5]), "scale"),
        label_smoothing=data.draw(st.sampled_from([0.0, 0.1, 1.0]), "smoothing"),
        z_loss=data.draw(st.sampled_from([0.0, 1e-3]), "z_loss"),
        reduction=data.draw(st.sampled_from(["none", "sum", "mean"]), "reduction"),
        lse_gradient=data.draw(st.booleans(), "lse"),
        ignored=data.draw(st.sampled_from([0.0, 0.3]), "ignored"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    assert_ranks_no_worse(ranks, world, in_fp64(problem), layout, backend="torch", **mode)


def test_labels_and_weights_that_are_others_in_backward_change_no_gradient() -> None:
    """A buffer that each micro-step's labels are copied into."""
    problem = make_problem(((20,),), 300, 24, bias=True)
    hidden, weight, bias = leaf(problem.hidden[0]), leaf(problem.weight), leaf(problem.bias)
    buffer, class_weights = problem.labels[0].clone(), torch.rand(300, device=DEVICE)

    def loss(labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, labels, bias=bias, label_smoothing=0.2, class_weights=weights)

    wanted = torch.autograd.grad(loss(problem.labels[0], class_weights), (hidden, weight, bias))
    later = loss(buffer, class_weights)
    buffer.fill_(-100)
    for got, expected in zip(torch.autograd.grad(later, (hidden, weight, bias)), wanted, strict=True):
        assert relative_error(got, expected) < 1e-6
    later, changed = loss(buffer, class_weights), class_weights
    changed.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()
