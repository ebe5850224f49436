"""Divergences of two heads over the whole vocabulary: those of plain torch, on whole and on sharded vocabularies."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import DEVICE, TRITON_DTYPES, grad_of, leaf, relative_error
from sharded import Layout, Runs, local_rows, part_of, shard_of
from teachers import all_logits, plain_terms, rows_of, runs_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from watched import LargestTensor

from cce_dist import VocabShard, linear_kl_div

VOCAB = 301
FORM = {
    "temperature": 1.7,
    "student_softcap": 3.0,
    "student_logit_scale": 0.7,
    "teacher_softcap": 5.0,
    "teacher_logit_scale": 1.3,
}
PLAIN: dict[str, Any] = {}
KINDS: dict[str, dict[str, Any]] = {
    "forward": {"kind": "forward"},
    "reverse": {"kind": "reverse"},
    "jsd": {"kind": "jsd"},
    "jsd, 0.1 of the teacher": {"kind": "jsd", "beta": 0.1},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def problem(parts: tuple[int, ...] = (6,), dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> dict[str, Any]:
    """A teacher wider than its student; a third of the tokens is ignored, with NaN for hidden states."""
    draw = torch.Generator().manual_seed(0)
    labels = [torch.where(torch.rand(n, generator=draw) < 0.3, -100, 1) for n in parts]
    given: dict[str, Any] = {"labels": labels}
    for name, dim in (("student", 8), ("teacher", 12)):
        hidden = [torch.randn(n, dim, generator=draw).to(dtype) for n in parts]
        given[f"{name}_hidden"] = [
            x.masked_fill((own == -100)[:, None], torch.nan) for x, own in zip(hidden, labels, strict=True)
        ]
        given[f"{name}_weight"] = torch.randn(vocab, dim, generator=draw).to(dtype)
        given[f"{name}_bias"] = torch.randn(vocab, generator=draw).to(dtype)
    return given


def form_of(side: str, form: dict[str, Any]) -> dict[str, Any]:
    own = {name.removeprefix(f"{side}_"): x for name, x in form.items() if name.startswith(side)}
    return {**own, "temperature": form.get("temperature", 1.0)}


def plain(given: dict[str, Any], form: dict[str, Any], kind: str, beta: float = 0.5) -> dict[str, Any]:
    """In fp64: the losses of each part's tokens, and the gradients of the mean over all valid ones."""
    hidden = [leaf(x.double()) for x in given["student_hidden"]]
    weight, bias = (leaf(given[name].double()) for name in ("student_weight", "student_bias"))
    losses = []
    for x, t, labels in zip(hidden, given["teacher_hidden"], given["labels"], strict=True):
        valid = labels != -100
        log_s = all_logits(x[valid], weight, bias, **form_of("student", form)).log_softmax(-1)
        teacher = (t[valid].double(), given["teacher_weight"].double(), given["teacher_bias"].double())
        log_t = all_logits(*teacher, **form_of("teacher", form)).log_softmax(-1)
        of_valid = plain_terms(log_s, log_t, kind, beta).sum(-1)
        losses.append(of_valid.new_zeros(labels.shape).index_put((valid,), of_valid))
    mean = torch.cat(losses).sum() / sum(int((labels != -100).sum()) for labels in given["labels"])
    mean.backward()
    grads = {"dhidden": [grad_of(x) for x in hidden], "dweight": grad_of(weight), "dbias": grad_of(bias)}
    return {"losses": [x.detach() for x in losses], "mean": mean.detach(), **grads}


def computed(given: dict[str, Any], part: int, shard: VocabShard, **settings: Any) -> dict[str, Tensor]:
    hidden = leaf(given["student_hidden"][part])
    weight, bias, *teacher = (
        local_rows(given[name], shard) for name in ("student_weight", "student_bias", "teacher_weight", "teacher_bias")
    )
    weight, bias = leaf(weight), leaf(bias)

    def loss(reduction: str) -> Tensor:
        return linear_kl_div(
            hidden,
            weight,
            given["teacher_hidden"][part],
            teacher[0],
            student_bias=bias,
            teacher_bias=teacher[1],
            labels=given["labels"][part],
            shard=shard,
            reduction=reduction,
            workspace_mb=1,
            **settings,
        )

    losses, mean = loss("none").detach(), loss("mean")
    mean.backward()
    grads = {"dhidden": grad_of(hidden), "dweight": grad_of(weight), "dbias": grad_of(bias)}
    return {"losses": losses, "mean": mean.detach(), **grads}


def assert_close(
    got: dict[str, Tensor], truth: dict[str, Any], part: int, runs: Any, times: int = 1, bound: float = 5e-6
) -> None:
    """``times``: ranks whose means' gradients add up."""
    for name, x in got.items():
        expected = truth[name][part] if isinstance(truth[name], list) else truth[name]
        if name in ("dweight", "dbias"):
            expected = rows_of(expected, runs)
        error = relative_error(x, expected * (times if name.startswith("d") else 1))
        assert error < bound, f"{name}: {error:.1e}"


@every_kind
@pytest.mark.parametrize("form", [PLAIN, FORM], ids=["plain", "softcap"])
@pytest.mark.parametrize("tokens", [600, 300])  # chunks of 128 rows; their gradients one by one, and all together
def test_it_is_that_of_all_logits(tokens: int, form: dict[str, Any], kind: dict[str, Any]) -> None:
    given = problem((tokens,))
    got = computed(given, 0, VocabShard.whole(VOCAB), **form, **kind)
    assert_close(got, plain(given, form, **kind), 0, ((0, VOCAB),))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_16_bits_only_the_gradient_is_rounded(dtype: torch.dtype, kind: dict[str, Any]) -> None:
    given = problem((40,), dtype)
    got, truth = computed(given, 0, VocabShard.whole(VOCAB), **FORM, **kind), plain(given, FORM, **kind)
    assert got["dweight"].dtype == got["dhidden"].dtype == dtype
    assert_close({name: got.pop(name) for name in ("losses", "mean")}, truth, 0, ())
    assert_close(got, truth, 0, ((0, VOCAB),), bound=torch.finfo(dtype).eps)


@every_kind
@pytest.mark.parametrize("form", [PLAIN, FORM], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_the_kernels_give_it_too(dtype: torch.dtype, form: dict[str, Any], kind: dict[str, Any]) -> None:
    given = problem((7,), dtype, 1300)  # more than a block
    given = {name: [y.to(DEVICE) for y in x] if isinstance(x, list) else x.to(DEVICE) for name, x in given.items()}
    got = computed(given, 0, VocabShard.whole(1300), backend="triton", **form, **kind)
    truth = plain(given, form, **kind)
    assert_close({name: got.pop(name) for name in ("losses", "mean")}, truth, 0, ())
    bound = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps  # small ones are subnormal in fp16
    assert_close(got, truth, 0, ((0, 1300),), bound=bound)


@every_kind
def test_gradients_are_those_of_finite_differences(kind: dict[str, Any]) -> None:
    hidden, weight, bias = (leaf(torch.randn(*shape).double()) for shape in ((3, 4), (9, 4), (9,)))
    teacher = torch.randn(3, 5), torch.randn(9, 5).double()

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_kl_div(hidden, weight, *teacher, student_bias=bias, reduction="none", **FORM, **kind)

    torch.autograd.gradcheck(function, (hidden, weight, bias))


@every_kind
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_student_that_is_the_teacher_has_neither_loss_nor_gradient(backend: str, kind: dict[str, Any]) -> None:
    hidden, weight = leaf(torch.randn(9, 8, device=DEVICE)), leaf(torch.randn(VOCAB, 8, device=DEVICE))
    kind = {"backend": backend, **kind}
    form = {f"{side}_{name}": x for side in ("student", "teacher") for name, x in form_of("student", FORM).items()}
    form = {name: x for name, x in form.items() if not name.endswith("temperature")}
    losses = linear_kl_div(hidden, weight, hidden, weight, reduction="none", temperature=1.7, **form, **kind)
    losses.sum().backward()
    assert not losses.any()
    assert not grad_of(hidden).any() and not grad_of(weight).any()


@every_kind
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("offset", [-200.0, 1e4])
def test_far_logits_have_finite_losses(offset: float, backend: str, kind: dict[str, Any]) -> None:
    """A student all of whose logits are far away, and a teacher who is sure of one id."""
    kind = {"backend": backend, **kind}
    hidden, weight = leaf(torch.randn(5, 8, device=DEVICE)), leaf(torch.randn(VOCAB, 8, device=DEVICE))
    student_bias = torch.full((VOCAB,), offset, device=DEVICE)
    teacher_bias = torch.zeros(VOCAB, device=DEVICE)
    teacher_bias[7] = 1e4
    loss = linear_kl_div(
        hidden, weight, hidden, weight, student_bias=student_bias, teacher_bias=teacher_bias, reduction="sum", **kind
    )
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert grad_of(hidden).isfinite().all() and grad_of(weight).isfinite().all()


CASES: dict[str, tuple[int, Layout, tuple[int, ...], Runs | None]] = {
    "2 ranks, the same tokens": (2, "replicated", (7,), None),
    "3 ranks, own tokens, one has none": (3, "sharded", (4, 0, 6), (((0, 99),), ((99, 301),), ())),
    "4 ranks, uneven shards": (
        4,
        "replicated",
        (5,),
        (((0, 30), (200, 301)), ((30, 40),), ((40, 120),), ((120, 200),)),
    ),
    "2 x 2 ranks": (4, "grid", (5, 3), None),
}


def _on_rank(given: dict[str, Any], layout: Layout, runs: Runs | None, settings: dict[str, Any]) -> dict[str, Tensor]:
    return computed(given, part_of(dist.get_rank(), layout), shard_of(VOCAB, layout, runs), **settings)


@pytest.mark.parametrize("kind", [KINDS[name] for name in ("forward", "reverse", "jsd, 0.1 of the teacher")], ids=str)
@pytest.mark.parametrize(("world", "layout", "parts", "runs"), CASES.values(), ids=CASES)
def test_on_ranks_it_is_that_of_all_tokens(
    ranks: RankPool, world: int, layout: Layout, parts: tuple[int, ...], runs: Runs | None, kind: dict[str, Any]
) -> None:
    given = problem(parts)
    truth, blocks = plain(given, FORM, **kind), runs_of(VOCAB, world, runs)
    times = {"replicated": 1, "sharded": world, "grid": 2}[layout]
    for rank, got in enumerate(ranks.run(world, _on_rank, given, layout, runs, {**FORM, **kind})):
        assert_close(got, truth, part_of(rank, layout), blocks[rank], times)


def _padded(given: dict[str, Any], as_dtensor: bool) -> tuple[Tensor, Tensor]:
    """Students' rows padded to 302, teachers' to 304."""
    world = dist.group.WORLD
    shard = VocabShard.even(VOCAB, world, padded_vocab_size=302)
    teacher_shard = VocabShard(((shard.start, shard.stop),), VOCAB, world)
    weight = torch.cat([given["student_weight"], torch.full((1, 8), torch.nan)])
    if dist.get_rank() == 1:
        teacher_shard = VocabShard(((151, 304),), VOCAB, world)
    teacher = torch.cat([given["teacher_weight"], torch.full((3, 12), torch.nan)])
    mesh = init_device_mesh("cpu", (2,))
    rows = distribute_tensor(weight, mesh, [Shard(0)]) if as_dtensor else weight[shard.start : shard.stop].clone()
    rows = rows.detach().requires_grad_()
    loss = linear_kl_div(
        given["student_hidden"][0],
        rows,
        given["teacher_hidden"][0],
        local_rows(teacher, teacher_shard),
        labels=given["labels"][0],
        shard=shard,
        teacher_shard=teacher_shard,
    )
    loss.backward()
    grad = rows.grad.to_local() if as_dtensor else rows.grad
    return loss.detach(), grad


@pytest.mark.parametrize("as_dtensor", [False, True])
def test_padding_rows_of_either_head_take_no_part(ranks: RankPool, as_dtensor: bool) -> None:
    given = problem() | {"student_bias": torch.zeros(VOCAB), "teacher_bias": torch.zeros(VOCAB)}
    truth = plain(given, PLAIN, "forward")
    got = ranks.run(2, _padded, given, as_dtensor)
    dweight = torch.cat([grad for _, grad in got])
    assert not dweight[VOCAB:].any()
    assert relative_error(dweight[:VOCAB], truth["dweight"]) < 5e-6
    assert all(relative_error(loss, truth["mean"]) < 5e-6 for loss, _ in got)


def test_neither_logits_nor_ignored_tokens_exist() -> None:
    tokens, vocab, valid = 1024, 4096, 300
    hidden, weight = leaf(torch.randn(tokens, 8)), leaf(torch.randn(vocab, 8))
    labels = torch.full((tokens,), -100)
    labels[torch.randperm(tokens)[:valid]] = 0
    teacher = hidden.detach(), weight.detach()
    for kind in ("forward", "jsd"):
        with LargestTensor() as seen:
            linear_kl_div(hidden, weight, *teacher, labels=labels, kind=kind, workspace_mb=1).backward()
        assert seen.largest <= 1 << 19 < valid * vocab * 4  # half of the workspace


def test_one_label_without_an_axis_is_refused() -> None:
    hidden, weight = torch.randn(8), torch.randn(VOCAB, 8)
    with pytest.raises(ValueError, match="labels must have one axis or more"):
        linear_kl_div(hidden, weight, hidden, weight, labels=torch.tensor(3))


def test_sums_counts_and_shifted_labels_are_those_of_the_losses() -> None:
    hidden, weight = torch.randn(2, 5, 8), torch.randn(VOCAB, 8)
    teacher = torch.randn(2, 5, 12), torch.randn(VOCAB, 12)
    labels = torch.tensor([[1, 1, -100, 1, -100], [1, -100, 1, 1, 1]])
    every = linear_kl_div(hidden, weight, *teacher, reduction="none")
    valid = labels[:, 1:] != -100
    losses = linear_kl_div(hidden, weight, *teacher, labels=labels, shift=1, reduction="none")
    torch.testing.assert_close(losses, torch.where(valid, every[:, :-1], 0))
    for settings, count in (
        ({"reduction": "sum"}, 1),
        ({}, int(valid.sum())),
        ({"num_valid_tokens": 3}, 3),
        ({"num_valid_tokens": torch.tensor(4)}, 4),
    ):
        got = linear_kl_div(hidden, weight, *teacher, labels=labels, shift=1, **settings)
        torch.testing.assert_close(got, losses.sum() / count)
    nothing = linear_kl_div(leaf(hidden), weight, *teacher, labels=torch.full_like(labels, -100))
    nothing.backward()
    assert nothing.isnan()
    assert linear_kl_div(hidden[:, :0], weight, teacher[0][:, :0], teacher[1], reduction="none").shape == (2, 0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_nan_in_a_valid_token_reaches_loss_and_gradient(backend: str) -> None:
    for side in range(2):
        hidden, weight = [torch.randn(4, 8, device=DEVICE) for _ in range(2)], torch.randn(VOCAB, 8, device=DEVICE)
        hidden[side][2, 0] = torch.nan
        student = leaf(hidden[0])
        losses = linear_kl_div(student, weight, hidden[1], weight, reduction="none", backend=backend)
        losses.sum().backward()
        assert losses.isnan().tolist() == grad_of(student).isnan().any(1).tolist() == [False, False, True, False]


def test_under_autocast_both_heads_are_computed_in_its_dtype() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(VOCAB, 8)
    teacher = torch.randn(4, 12), torch.randn(VOCAB, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_kl_div(hidden, weight, *teacher)
    assert torch.equal(got, linear_kl_div(hidden.bfloat16(), weight, teacher[0].bfloat16(), teacher[1]))


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"kind": "x"}, 'kind must be "forward", "reverse" or "jsd"; got \'x\''),
    "a beta without its kind": ({"beta": 0.3}, "beta goes with kind=\"jsd\"; got 'forward'"),
    "no backend of fp64": (
        {"teacher_hidden": torch.zeros(6, 12).double(), "backend": "triton"},
        'backend="triton" needs CUDA',
    ),
    "a softcap of 0": ({"teacher_softcap": 0.0}, "teacher_softcap must be a positive float or None; got 0.0"),
    "a temperature of 0": ({"temperature": 0.0}, "temperature must be a positive float; got 0.0"),
    "other tokens": ({"teacher_hidden": torch.zeros(5, 12)}, r"teacher_hidden must be \[6, E\] on cpu"),
    "other rows": ({"teacher_weight": torch.zeros(5, 12)}, "teacher_weight must hold the shard's 301 rows"),
    "another bias": ({"student_bias": torch.zeros(3)}, r"student_bias must be \[301\]"),
    "another vocabulary": (
        {"teacher_shard": VocabShard.whole(300), "teacher_weight": torch.zeros(300, 12)},
        r"teacher_shard must hold the rows of shard but for padding, \[\(0, 301\)\] of 301; got \[\(0, 300\)\] of 300",
    ),
    "labels of others": ({"labels": torch.zeros(5).long()}, "labels must have student_hidden's shape less its last"),
    "labels that are floats": ({"labels": torch.zeros(6)}, "labels must be integers; got torch.float32"),
    "a shift of nothing": ({"shift": 1}, "shift goes with labels; got 1"),
    "no memory": ({"workspace_mb": 0}, "workspace_mb must be an int, 1 or more, or None; got 0"),
}


@pytest.mark.parametrize(("arguments", "says"), FAULTS.values(), ids=FAULTS)
def test_what_is_not_allowed_is_named(arguments: dict[str, Any], says: str) -> None:
    given = problem()
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    tensors = {name: given[name][0] if name.endswith("hidden") else given[name] for name in names}
    with pytest.raises(ValueError, match=says):
        linear_kl_div(**{**tensors, **arguments})


def _differing(arguments: dict[str, Any]) -> str:
    given, shard = problem(), VocabShard.even(VOCAB, dist.group.WORLD)
    weight, teacher = (given[f"{side}_weight"][shard.start : shard.stop] for side in ("student", "teacher"))
    arguments = {"labels": given["labels"][0], **(arguments if dist.get_rank() else {})}
    try:
        linear_kl_div(given["student_hidden"][0], weight, given["teacher_hidden"][0], teacher, shard=shard, **arguments)
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "reverse"}, "kind must be equal on all ranks, got rank 0: forward, rank 1: reverse"),
        ({"labels": torch.zeros(6).long()}, "number of tokens must be equal on all ranks"),
        ({"labels": problem()["labels"][0].roll(1)}, "labels differ between ranks that bring the same tokens"),
        ({"num_valid_tokens": 3}, "whether there is num_valid_tokens must be equal on all ranks"),
        (
            {"teacher_bias": torch.zeros(150)},
            "teacher_bias must be equal on all ranks, got rank 0: False, rank 1: True",
        ),
        ({"colour": 3}, "rank 1: linear_kl_div takes no argument colour"),
    ],
    ids=["kind", "valid labels", "places", "count", "bias", "unknown"],
)
def test_what_one_rank_gets_wrong_is_an_error_on_all(ranks: RankPool, arguments: dict[str, Any], says: str) -> None:
    for text in ranks.run(2, _differing, arguments):
        assert says in text
