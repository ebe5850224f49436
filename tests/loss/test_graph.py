"""torch.compile sees one operator: no graph break, symbolic lengths, what the loss gives without it."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool, device
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from cce_dist import ShardedCCEHead, VocabShard, linear_cross_entropy
from cce_dist.loss import autograd, graph

VOCAB, DIM = 301, 16
SAMPLED = {"gradient": "unbiased", "filter_eps": 1e-3, "seed": 3, "frequent_rows": 8}


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """A body, and a loss with settings of its own."""

    def __init__(self, shard: VocabShard | None = None, bias: bool = False, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(DIM, DIM)
        rows = slice(None) if shard is None else slice(shard.start, shard.stop)
        self.weight = nn.Parameter(torch.randn(VOCAB, DIM)[rows].clone())
        self.bias = nn.Parameter(torch.randn(VOCAB)[rows].clone()) if bias else None
        self.shard, self.settings = shard, settings

    def forward(self, inputs: Tensor, labels: Tensor, **more: Any) -> Tensor:
        hidden = self.body(inputs).tanh()
        found = linear_cross_entropy(
            hidden, self.weight, labels, bias=self.bias, shard=self.shard, **self.settings, **more
        )
        return found[0].sum() + 1e-2 * found[1].square().sum() if isinstance(found, tuple) else found.sum()


def batch(length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCAB, (2, length), generator=draw)
    labels[0, 2] = -100
    return torch.randn(2, length, DIM, generator=draw), labels


def outcome(function: Any, module: nn.Module, *args: Any, **more: Any) -> list[Tensor]:
    """Loss and gradients of one step; ints as seeds start anew."""
    autograd._seeds.clear()
    loss = function(*args, **more)
    loss.backward()
    gradients = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in module.parameters()]
    module.zero_grad()
    return [loss.detach(), *gradients]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(got, expected, strict=True):
        assert y.norm() > 0 and (x - y).norm() <= 1e-6 * y.norm()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": SAMPLED,
    "with lse": {"return_lse": True, "bias": True, "shift": 1},
    "smoothing, z-loss": {"label_smoothing": 0.1, "z_loss": 1e-2, "reduction": "sum"},
    "of each token, softcap": {"reduction": "none", "softcap": 5.0, "shift": 1},
    "smoothing, softcap": {"label_smoothing": 0.1, "softcap": 5.0},
    "class weights": {"class_weights": torch.rand(VOCAB, generator=torch.Generator().manual_seed(0))},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_model_is_one_graph_for_all_lengths(options: dict[str, Any]) -> None:
    model = Model(**options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (7, 9, 12, 30):
        assert_same(outcome(compiled, model, *batch(length)), outcome(model, model, *batch(length)))
    assert counter.frame_count == 2, "the first length by itself, then one for all"
    gc.collect()
    assert not graph._runs, "what backward needed has gone with it"


def test_a_number_of_tokens_that_changes_is_no_other_graph() -> None:
    model = Model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for number in (11, 12, 13, 14, torch.tensor(15.0)):
        more = {"num_valid_tokens": number}
        assert_same(outcome(compiled, model, *batch(9), **more), outcome(model, model, *batch(9), **more))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("frozen", ["weight", "body"])
def test_what_is_frozen_has_no_gradient(frozen: str) -> None:
    model = Model()
    getattr(model, frozen).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    trained = [p for p in model.parameters() if p.requires_grad]
    got, expected = (torch.autograd.grad(f(*batch(9)), trained) for f in (compiled, model))
    assert_same(list(got), list(expected))


def test_autocast_and_evaluation() -> None:
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = outcome(compiled, model, *batch(9)), outcome(model, model, *batch(9))
        assert got[0].dtype == torch.float32
        assert_same(got, expected)
    with torch.no_grad():
        assert torch.equal(compiled(*batch(9)), model(*batch(9)))
    assert not graph._runs


def test_backward_can_come_again_or_never_and_checkpoints_recompute() -> None:
    model = Model(**SAMPLED)

    def recomputed(inputs: Tensor, labels: Tensor) -> Tensor:
        return checkpoint(model, inputs, labels, use_reentrant=False)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, other = compiled(*batch(9)), compiled(*batch(9, 1))
    assert len(graph._runs) == 2
    first = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
    assert_same(list(torch.autograd.grad(loss, model.parameters())), list(first))
    del loss, other
    gc.collect()
    assert not graph._runs
    compiled = torch.compile(recomputed, fullgraph=True, backend="aot_eager")
    exact = Model()
    model.settings = {}
    assert_same(outcome(compiled, model, *batch(9)), outcome(exact, exact, *batch(9)))


def test_another_shard_is_another_graph() -> None:
    model = Model(VocabShard.whole(VOCAB))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first = compiled(*batch(9)).detach()
    model.shard = VocabShard(((0, VOCAB),), 290, None)  # the last rows are padding
    inputs, labels = batch(9)
    got, expected = (f(inputs, labels.clamp(max=289)).detach() for f in (compiled, model))
    assert torch.equal(got, expected) and not torch.equal(got, first)


def test_faults_are_told_as_without_a_graph() -> None:
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(*batch(9))
    inputs, labels = batch(9)
    with pytest.raises(ValueError, match=rf"labels must be in \[0, {VOCAB}\)"):
        compiled(inputs, labels + VOCAB)


def test_the_operators_pass_torchs_own_checks() -> None:
    inputs, labels = batch(5)
    hidden, weight, bias = (x.requires_grad_() for x in (inputs, torch.randn(VOCAB, DIM), torch.randn(VOCAB)))
    every = graph._HIDDEN + graph._WEIGHT + graph._BIAS + graph._GRAD
    number = graph._number_of(None, ((), ("z_loss",), ("shift",)), ())
    torch.library.opcheck(graph._forward, (hidden, weight, labels, bias, [], [0.1], [1], every, 1, False, number))
    number = graph._number_of(None, (("class_weights",), (), ()), (("reduction", "none"),))
    given = (hidden, weight, labels, None, [torch.rand(VOCAB)], [], [], every - graph._BIAS, 0, True, number)
    torch.library.opcheck(graph._forward, given)


VIEWS: dict[str, Any] = {
    "as it is": lambda hidden: hidden,
    "less a position": lambda hidden: hidden[:, :-1],
    "of one sequence": lambda hidden: hidden[0],
    "reshaped": lambda hidden: hidden.reshape(-1, DIM),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_of_a_graphs_inputs_have_their_gradients_and_hooks_run_once(view: Any) -> None:
    inputs, labels = batch(9)
    hidden, weight = inputs.requires_grad_(), torch.randn(VOCAB, DIM, requires_grad=True)
    labels = view(labels[..., None].expand(-1, -1, DIM))[..., 0]
    for x in (hidden, weight):
        x.register_hook(lambda grad: 2 * grad)

    def loss(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(view(hidden), weight[:300], labels.clamp(max=299))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(function(hidden), (hidden, weight)) for function in (compiled, loss))
    assert_same(list(got), list(expected))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"softcap": torch.tensor(3.0)}, "softcap must be a positive float or None"),
        ({"token_weight": torch.ones(2, 9)}, "takes no argument token_weight"),
        ({"num_valid_tokens": -1}, "num_valid_tokens must be an int, 0 or more"),
        ({"num_valid_tokens": True}, "num_valid_tokens must be an int, 0 or more"),
        ({"grad_accumulator": torch.zeros(3)}, "grad_accumulator must be a contiguous"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_settings_that_do_not_fit_are_refused_by_name(given: dict[str, Any], text: str) -> None:
    model = Model()
    with pytest.raises((ValueError, TypeError), match=text):
        torch.compile(model, backend="aot_eager")(*batch(9), **given)


def test_numbers_may_change_from_call_to_call_and_labels_be_fewer_than_the_shift() -> None:
    model = Model(reduction="none")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for number in range(1, 4):
        more = {"seed": number, "gradient": "unbiased", "filter_eps": 0.01 * number, "z_loss": 0.1 * number}
        assert_same(outcome(compiled, model, *batch(9), **more), outcome(model, model, *batch(9), **more))
    assert float(compiled(*batch(3), shift=3).detach()) == 0.0


def test_weights_that_require_a_gradient_are_refused_as_without_a_graph() -> None:
    weights = torch.rand(2, 9, requires_grad=True)
    with pytest.raises(ValueError, match="token_weights must be a tensor of floats that requires no gradient"):
        torch.compile(Model(), backend="aot_eager")(*batch(9), token_weights=weights)


def _side_by_side(buffer: Tensor) -> tuple[Tensor, ...]:
    return buffer[:, :DIM], buffer[:30, DIM : 2 * DIM], buffer[:30, -1]


def _one_after_the_other(buffer: Tensor) -> tuple[Tensor, ...]:
    flat = buffer.view(-1)
    return flat[: 40 * DIM].view(40, DIM), flat[40 * DIM : 70 * DIM].view(30, DIM), flat[70 * DIM : 70 * DIM + 30]


@pytest.mark.parametrize("parts", [_side_by_side, _one_after_the_other])
def test_tensors_of_one_buffer_may_be_kept_elsewhere_until_backward(parts: Any) -> None:
    buffer, labels = torch.randn(40, 2 * DIM + 1, requires_grad=True), torch.arange(40) % 30

    def loss() -> Tensor:
        hidden, weight, bias = parts(buffer)
        return linear_cross_entropy(hidden, weight, labels, bias=bias)

    (expected,) = torch.autograd.grad(loss(), buffer)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone() if x.ndim else x, lambda x: x):
        (got,) = torch.autograd.grad(compiled(), buffer)
    assert_same([got], [expected])


def test_an_export_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="cannot be exported"):
        torch.export.export(Model(), batch(9), strict=False)


USES: dict[str, Any] = {
    "the loss": lambda hidden, loss, lse: hidden * 0 + loss.detach() + 3,
    "the log-sum-exps": lambda hidden, loss, lse: lse.detach() / 10,
    "the hidden states": lambda hidden, loss, lse: (hidden + 1).sin() * loss.detach(),
}


@pytest.mark.full
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_a_compiler_writes_over_changes_no_gradient(use: Any) -> None:
    """Inductor makes its results in memory that its graph needs no more."""
    inputs, labels = batch(9)
    leaf, weight = inputs.requires_grad_(), torch.randn(VOCAB, DIM, requires_grad=True)

    def steps(leaf: Tensor) -> tuple[Tensor, Tensor]:
        hidden = (leaf * 2).sin()
        count = (labels != -100).sum().float()
        of_classes = {"class_weights": weight[:, 0].detach().exp(), "num_valid_tokens": count}
        loss, lse = linear_cross_entropy(hidden, weight, labels, z_loss=0.1, return_lse=True, **of_classes)
        return loss, use(hidden, loss, lse) * count

    compiled = torch.compile(steps, fullgraph=True)
    got, expected = (torch.autograd.grad(function(leaf)[0], (leaf, weight)) for function in (compiled, steps))
    assert_same(list(got), list(expected))


@pytest.mark.full
def test_the_default_compiler_makes_one_graph_too() -> None:
    model = Model(**SAMPLED)
    compiled = torch.compile(model, fullgraph=True)
    for length in (7, 9):
        assert_same(outcome(compiled, model, *batch(length)), outcome(model, model, *batch(length)))


def _of_ranks(layout: str) -> list[tuple[list[Tensor], list[Tensor]]]:
    group = dist.group.WORLD
    torch._dynamo.reset()
    model = Model(VocabShard.even(VOCAB, group, group if layout == "own" else None), **SAMPLED).to(device())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seed = dist.get_rank() if layout == "own" else 0
    found = []
    for length in (7, 9):
        given = [x.to(device()) for x in batch(length, seed)]
        found.append((outcome(compiled, model, *given), outcome(model, model, *given)))
    return found


@pytest.mark.parametrize("layout", ["own", "same"])
def test_a_sharded_vocabulary_is_one_graph(ranks: RankPool, layout: str) -> None:
    for found in ranks.run(2, _of_ranks, layout, timeout=120):
        for got, expected in found:
            assert_same(got, expected)


def _of_a_head() -> tuple[list[Tensor], list[Tensor]]:
    torch._dynamo.reset()
    mesh = init_device_mesh(device(), (dist.get_world_size(),))
    torch.manual_seed(0)
    head = ShardedCCEHead.from_linear(nn.Linear(DIM, VOCAB), mesh, token_group=mesh).to(device())
    compiled = torch.compile(lambda inputs, labels: head(inputs.tanh(), labels), fullgraph=True, backend="aot_eager")
    inputs, labels = (x.to(device()) for x in batch(9, dist.get_rank()))
    return outcome(compiled, head, inputs, labels), outcome(head, head, inputs.tanh(), labels)


def test_a_sharded_head_is_one_graph(ranks: RankPool) -> None:
    for got, expected in ranks.run(2, _of_a_head, timeout=120):
        assert_same(got, expected)


def _of_a_dtensor() -> tuple[Tensor, Tensor]:
    torch._dynamo.reset()
    mesh = init_device_mesh(device(), (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(torch.randn(VOCAB, DIM, device=device()), mesh, [Shard(0)]))
    inputs, labels = (x.to(device()) for x in batch(9))
    compiled = torch.compile(lambda x: linear_cross_entropy(x.tanh(), weight, labels), backend="aot_eager")
    return compiled(inputs).detach(), linear_cross_entropy(inputs.tanh(), weight, labels).detach()


def test_a_classifier_that_is_a_dtensor_breaks_the_graph_and_no_more(ranks: RankPool) -> None:
    for got, expected in ranks.run(2, _of_a_dtensor, timeout=120):
        assert torch.equal(got, expected)
