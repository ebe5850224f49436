"""``fp32_head``: a classifier in fp32 beside hidden states in bf16. Log-probabilities are those of fp32 logits, and
gradients no worse than those of a head in bf16: in every mode, on one and several ranks, of lazy and sharded heads.

Triton's kernels multiply in bf16 on a GPU alone; what they do with fp32 rows is in tests/kernels/test_fp32_rows.py.

Shapes: n tokens of a part, D hidden, V rows of the vocabulary.
"""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import DEVICE, ROUNDING, grad_of, leaf, relative_error
from sharded import Layout, Runs, device_of, local_rows, part_of, shard_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from cce_dist import CCEConfig, ShardedCCEHead, linear_cross_entropy, linear_logprobs
from cce_dist.fsdp import adopt, shard_head
from cce_dist.heads.lazy import LazyLogits, MaterializedLogitsWarning, fused_evaluation, is_in_fp32, make_lazy
from cce_dist.heads.owner import ModuleOwner

BF16 = torch.bfloat16
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.gpu)]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
WAYS: dict[str, dict[str, Any]] = {
    "exact": {"gradient": "exact"},
    "unbiased": {"gradient": "unbiased", "filter_eps": 1e-30},
    "filtered": {"gradient": "filtered", "filter_eps": 1e-30},
    "frequent rows": {"gradient": "unbiased", "filter_eps": 1e-30, "frequent_rows": 40},
    "exact sums": {"gradient": "exact", "exact_sums": True},
}


class Found(NamedTuple):
    logprob: Tensor
    dhidden: Tensor
    dweight: Tensor


class Case(NamedTuple):
    """Hidden states in bf16, labels and upstream of each part; one classifier in fp32."""

    hidden: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    weight: Tensor
    upstream: tuple[Tensor, ...]

    def to(self, device: str) -> "Case":
        parts = [tuple(x.to(device) for x in field) for field in (self.hidden, self.labels, self.upstream)]
        return Case(parts[0], parts[1], self.weight.to(device), parts[2])


def make_case(tokens: tuple[int, ...] = (23,), vocab: int = 331, dim: int = 48) -> Case:
    draw = torch.Generator().manual_seed(0)
    labels = [torch.randint(vocab, (n,), generator=draw) for n in tokens]
    return Case(
        tuple(torch.randn(n, dim, generator=draw).to(BF16) for n in tokens),
        tuple(x.masked_fill_(torch.arange(x.shape[0]) % 6 == 3, -100) for x in labels),
        0.4 * torch.randn(vocab, dim, generator=draw),
        tuple(torch.randn(n, generator=draw) for n in tokens),
    )


def with_logits(case: Case, dtype: torch.dtype, weight: Tensor | None = None) -> list[Found]:
    """Of each part; dC is that of all of them."""
    rows = leaf((case.weight if weight is None else weight).to(dtype))
    found = []
    for hidden, labels, upstream in zip(*case[:2], case.upstream, strict=True):
        states = leaf(hidden.to(dtype))
        log_p = F.linear(states, rows).log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        log_p = log_p.masked_fill(labels == -100, 0)
        (log_p * upstream).sum().backward()
        found.append((log_p.detach(), grad_of(states)))
    return [Found(*x, grad_of(rows)) for x in found]


def error_of_tensor_cores(case: Case, part: int) -> float:
    """Of log-probabilities from bf16 products that a GPU's library sums in fp32, where tensor cores cut sums off; of
    three times as many summands."""
    hidden, weight = case.hidden[part].cuda(), case.weight.to(BF16).cuda()
    labels = case.labels[part].clamp(min=0).cuda()[:, None]
    logits = torch.mm(hidden, weight.T, out_dtype=torch.float32), hidden.double() @ weight.double().T
    return math.sqrt(3) * relative_error(*(z.double().log_softmax(-1).gather(-1, labels) for z in logits))


def assert_fp32(
    got: Found, case: Case, part: int = 0, rows: slice | Tensor = slice(None), error_of_sums: float = 0.0
) -> None:
    """Log-probabilities as near as those of F.linear in fp32, or as ``error_of_sums``; gradients no further off than
    those of a head in bf16."""
    truth, fp32 = with_logits(case, torch.float64)[part], with_logits(case, torch.float32)[part]
    assert got.logprob.dtype == torch.float32 and got.dhidden.dtype == BF16 and got.dweight.dtype == torch.float32
    bound = 1.5 * max(relative_error(fp32.logprob, truth.logprob), error_of_sums) + 2 * ROUNDING[torch.float32]
    assert relative_error(got.logprob, truth.logprob) <= bound
    bf16 = with_logits(case, torch.float64, case.weight.to(BF16))[part]
    for mine, other, true in (
        (got.dhidden, bf16.dhidden, truth.dhidden),
        (got.dweight, bf16.dweight[rows], truth.dweight[rows]),
    ):
        assert relative_error(mine, true) <= 1.1 * relative_error(other, true) + ROUNDING[BF16]


def ours(case: Case, part: int = 0, **given: Any) -> Found:
    shard = given.get("shard")
    hidden = leaf(case.hidden[part])
    weight = leaf(case.weight if shard is None else local_rows(case.weight, shard))
    found = linear_logprobs(hidden, weight, case.labels[part], **{"fp32_head": True, "seed": 1, **given})
    (found.logprob * case.upstream[part]).sum().backward()
    return Found(found.logprob.detach(), grad_of(hidden), grad_of(weight))


@every_backend
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_log_probabilities_are_those_of_fp32_logits(way: dict[str, Any], backend: str) -> None:
    case = make_case().to(DEVICE)
    assert_fp32(ours(case, backend=backend, **way), case)
    plain, truth = ours(case, backend=backend, fp32_head=False, **way), with_logits(case, torch.float64)[0]
    assert relative_error(plain.logprob, truth.logprob) > 1e-4  # what rounding the rows costs, as autocast does


@every_backend
def test_values_are_the_same_without_a_gradient_and_of_the_loss(backend: str) -> None:
    case = make_case().to(DEVICE)
    hidden, labels, weight = case.hidden[0], case.labels[0], case.weight
    given: dict[str, Any] = {"backend": backend, "fp32_head": True}
    got = ours(case, backend=backend, gradient="unbiased").logprob
    assert torch.equal(linear_logprobs(hidden, weight, labels, **given).logprob, got)
    loss = linear_cross_entropy(leaf(hidden), leaf(weight), labels, reduction="none", **given)
    assert torch.equal(-loss.detach(), got)
    with torch.autocast(DEVICE, dtype=BF16):  # which would round the rows
        assert torch.equal(linear_logprobs(hidden, weight, labels, **given).logprob, got)


def test_entropy_and_statistics_are_those_of_fp32_logits() -> None:
    case = make_case()
    given: dict[str, Any] = {
        "fp32_head": True,
        "entropy": "value",
        "statistics": ("top1", "rank", "mean_logit", "sum_sq_probs"),
    }
    got = linear_logprobs(case.hidden[0], case.weight, case.labels[0], temperature=0.7, **given)
    valid = case.labels[0] != -100
    z = F.linear(case.hidden[0].double(), case.weight.double()) / 0.7
    log_p, own = z.log_softmax(-1), z.gather(-1, case.labels[0].clamp(min=0)[:, None])
    wanted = {
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_logit": z.mean(-1),
        "sum_sq_probs": log_p.exp().square().sum(-1),
        "top1": z.argmax(-1),
        "rank": (z > own).sum(-1),
    }
    for name, x in wanted.items():
        assert relative_error(getattr(got, name)[valid].double(), x[valid].double()) < 1e-6, name


def _sharded(case: Case, layout: Layout, runs: Runs, given: dict[str, Any]) -> Found:
    case = case.to(device_of(given))
    shard = shard_of(case.weight.shape[0], layout, runs)
    return Found(*(x.cpu() for x in ours(case, part_of(dist.get_rank(), layout), shard=shard, **given)))


UNEVEN: dict[int, Runs] = {
    1: [((0, 331),)],
    2: [((0, 200),), ((200, 331),)],
    3: [((0, 50),), ((50, 50),), ((50, 331),)],
    4: [((0, 100),), ((100, 130), (300, 331)), ((130, 290),), ((290, 300),)],
}


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "world", [pytest.param(1, marks=pytest.mark.full), 2, *(pytest.param(w, marks=pytest.mark.full) for w in (3, 4))]
)
def test_uneven_shards_have_the_log_probabilities_of_fp32_logits(
    ranks: RankPool, world: int, way: str, layout: Layout
) -> None:
    case, runs = make_case((23, 7, 0, 12)[: world if layout == "sharded" else 1]), UNEVEN[world]
    every = ranks.run(world, _sharded, case, layout, runs, {**WAYS[way], "backend": "torch"})
    for rank, got in enumerate(every):
        rows = torch.cat([torch.arange(*run) for run in runs[rank]])
        if case.hidden[part_of(rank, layout)].shape[0] and rows.shape[0]:
            assert_fp32(got, case, part_of(rank, layout), rows)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
@pytest.mark.parametrize("way", WAYS)
def test_uneven_shards_on_a_gpu(ranks: RankPool, way: str, layout: Layout) -> None:
    case, runs = make_case((230, 70)[: 2 if layout == "sharded" else 1], 331, 128), UNEVEN[2]
    every = ranks.run(2, _sharded, case, layout, runs, {**WAYS[way], "backend": "triton"})
    for rank, got in enumerate(every):
        part, rows = part_of(rank, layout), torch.cat([torch.arange(*run) for run in runs[rank]])
        assert_fp32(got, case, part, rows, error_of_tensor_cores(case, part))


def _of_two_dtypes() -> str:
    case = make_case()
    rank = dist.get_rank()
    shard = shard_of(case.weight.shape[0], "replicated")
    rows = local_rows(case.weight, shard).to(torch.float32 if rank else torch.float16)
    with pytest.raises(ValueError, match="weight's dtype") as caught:
        linear_logprobs(case.hidden[0], rows, case.labels[0], shard=shard, fp32_head=True)
    return str(caught.value)


def test_rows_of_other_dtypes_on_other_ranks_are_an_error_on_all(ranks: RankPool) -> None:
    for text in ranks.run(2, _of_two_dtypes):
        assert "float16" in text and "float32" in text


def test_what_does_not_go_with_it_is_refused_by_name() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"fp32_head=True needs hidden states in bf16, fp32 or fp64.*float16"):
        linear_cross_entropy(case.hidden[0].half(), case.weight, case.labels[0], fp32_head=True)
    with pytest.raises(ValueError, match='fp32_head=True goes with first_pass="full"'):
        linear_cross_entropy(leaf(case.hidden[0]), case.weight, case.labels[0], fp32_head=True, first_pass="fp8")


# Heads


def _head(weight: Tensor) -> nn.Linear:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = nn.Parameter(weight.clone())
    return head


@pytest.mark.parametrize("autocast", [False, True])
def test_a_lazy_head_in_fp32_takes_hidden_states_in_bf16(autocast: bool) -> None:
    case = make_case()
    head = _head(case.weight)
    make_lazy(head, ModuleOwner(head), CCEConfig(fp32_head=True, gradient="exact", materialize="raise"))
    assert is_in_fp32(head)
    hidden, valid, labels = leaf(case.hidden[0]), case.labels[0] != -100, case.labels[0]
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        logits: Any = head(hidden)
        assert isinstance(logits, LazyLogits) and logits.dtype == torch.float32
        loss = F.cross_entropy(logits, labels, reduction="none")
        (-loss * case.upstream[0]).sum().backward()
        assert_fp32(Found(-loss.detach(), grad_of(hidden), grad_of(head.weight)), case)
        wanted = F.linear(case.hidden[0].double(), case.weight.double())
        with torch.no_grad():
            real = head.eval()(hidden)
            with fused_evaluation(head):
                lazy: Any = head(hidden)
                assert torch.equal(lazy.argmax(-1), wanted.argmax(-1))
                of_lazy = lazy.logprobs(labels).logprob
    assert real.dtype == torch.float32 and relative_error(real, wanted) < 1e-6
    assert torch.equal(of_lazy[valid], -loss.detach()[valid])


@pytest.mark.parametrize(("rows", "states"), [(BF16, BF16), (BF16, torch.float32), (torch.float16, BF16)], ids=str)
def test_rows_that_are_16_bit_have_logits_in_fp32(rows: torch.dtype, states: torch.dtype) -> None:
    """As DeepSpeed's bf16 leaves a head that TRL has cast to fp32."""
    case = make_case()
    head = _head(case.weight).to(rows)
    make_lazy(head, ModuleOwner(head), CCEConfig(fp32_head=True, gradient="exact", materialize="warn"))
    hidden = case.hidden[0].to(states)
    wanted = F.linear(hidden.double(), head.weight.detach().double())
    with torch.autocast("cpu", dtype=BF16, enabled=states == torch.float32):
        with torch.no_grad():
            assert relative_error(head.eval()(hidden), wanted) < 1e-6
        logits: Any = head.train()(leaf(hidden))
        with pytest.warns(MaterializedLogitsWarning):
            found = logits.sort(-1).values
    assert relative_error(found.detach(), wanted.sort(-1).values) < 1e-6


def test_what_has_no_such_setting_computes_with_hidden_states_in_fp32() -> None:
    case, ids = make_case(), torch.arange(23)[:, None] + torch.arange(5)
    head = _head(case.weight)
    make_lazy(head, ModuleOwner(head), CCEConfig(fp32_head=True, materialize="raise"))
    logits: Any = head(leaf(case.hidden[0]))
    wanted = F.linear(case.hidden[0].double(), case.weight.double())
    assert relative_error(logits.selected(ids), wanted.gather(-1, ids)) < 1e-6
    with torch.no_grad(), fused_evaluation(head):
        teacher: Any = head(case.hidden[0].flip(0))
    log_p, log_q = wanted.log_softmax(-1), wanted.flip(0).log_softmax(-1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert relative_error(logits.kl_div(teacher, reduction="none", kind="forward"), divergence) < 1e-5


def _sharded_head(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    head = ShardedCCEHead.from_linear(_head(case.weight), mesh, config=CCEConfig(fp32_head=True, gradient="exact"))
    hidden = case.hidden[0]
    logprob = head.logprobs(hidden, case.labels[0]).logprob.detach()
    with torch.autocast("cpu", dtype=BF16):
        return logprob, head.logits(hidden), head.next_token(hidden, 0.0)


def test_a_sharded_head_in_fp32(ranks: RankPool) -> None:
    case = make_case()
    wanted, logits = (
        with_logits(case, torch.float64)[0].logprob,
        F.linear(case.hidden[0].double(), case.weight.double()),
    )
    for logprob, real, token in ranks.run(2, _sharded_head, case):
        assert relative_error(logprob, wanted) < 1e-6 and relative_error(real, logits) < 1e-6
        assert torch.equal(token, logits.argmax(-1))


class _Model(nn.Module):
    """Hidden states that are rows of a table, in the dtype that FSDP's policy computes in."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embedding = nn.Embedding(case.hidden[0].shape[0], case.weight.shape[1])
        self.embedding.weight = nn.Parameter(case.hidden[0].float())
        self.lm_head = _head(case.weight)

    def forward(self, ids: Tensor) -> Any:
        return self.lm_head(self.embedding(ids))


def _under_fsdp2(case: Case, head_first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mesh, model = init_device_mesh("cpu", (dist.get_world_size(),)), _Model(case)
    config = CCEConfig(fp32_head=True, gradient="exact", materialize="raise")
    if head_first:
        shard_head(model, mesh, config=config)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(BF16, reduce_dtype=torch.float32, output_dtype=None))
    if not head_first:
        adopt(model, config=config)
    logits = model(torch.arange(case.hidden[0].shape[0]))
    assert isinstance(logits, LazyLogits) and logits.hidden_XD.dtype == BF16
    found = logits.logprobs(case.labels[0])
    (found.logprob * case.upstream[0]).sum().backward()
    grads = [p.grad.full_tensor() for p in (model.embedding.weight, model.lm_head.weight)]  # type: ignore[union-attr]
    with torch.no_grad():
        real = model.eval()(torch.arange(case.hidden[0].shape[0]))
    return found.logprob.detach(), grads[0].to(BF16), grads[1], real


@pytest.mark.parametrize("head_first", [True, pytest.param(False, marks=pytest.mark.full)])
def test_the_rows_that_fsdp2_keeps_are_not_rounded_by_its_mixed_precision(ranks: RankPool, head_first: bool) -> None:
    case = make_case()
    logits = F.linear(case.hidden[0].double(), case.weight.double())
    for logprob, dhidden, dweight, real in ranks.run(2, _under_fsdp2, case, head_first):
        assert_fp32(Found(logprob, dhidden, dweight), case)
        assert relative_error(real, logits) < 1e-6
