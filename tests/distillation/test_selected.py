"""Logits of chosen ids: those of all logits, with their gradients, on a whole and on a sharded vocabulary."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import DEVICE, GPU_BF16, grad_of, leaf, relative_error
from sharded import Layout, Runs, local_rows, part_of, shard_of
from teachers import all_logits, rows_of, runs_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._pytree import tree_map_only
from watched import LargestTensor

from cce_dist import VocabShard, linear_selected_logits

FORM = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.7}
PLAIN: dict[str, Any] = {}


def problem(
    parts: tuple[int, ...] = (6,), vocab: int = 301, k: int = 7, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Tokens in parts; ids that stand more than once, and padding, of one token all."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocab, (n, k), generator=draw) for n in parts]
    for x in ids:
        if k > 1:
            x[:, -1] = x[:, 0]
        if x.shape[0]:
            x[torch.rand(x.shape, generator=draw) < 0.2] = -1
            x[-1] = -1
    return {
        "hidden": [torch.randn(n, 8, generator=draw).to(dtype) for n in parts],
        "ids": ids,
        "weight": torch.randn(vocab, 8, generator=draw).to(dtype),
        "bias": torch.randn(vocab, generator=draw).to(dtype),
        "upstream": [torch.randn(n, k, generator=draw) for n in parts],
        "lse_upstream": [torch.randn(n, generator=draw) for n in parts],
    }


def plain(given: dict[str, Any], form: dict[str, Any], return_lse: bool = True) -> dict[str, Any]:
    """In fp64, from all logits: of each part, and the gradients of all rows."""
    hidden = [leaf(x.double()) for x in given["hidden"]]
    weight, bias = leaf(given["weight"].double()), leaf(given["bias"].double())
    found: dict[str, Any] = {"z": [], "lse": []}
    objective = torch.zeros((), dtype=torch.float64)
    for x, ids, u, v in zip(hidden, given["ids"], given["upstream"], given["lse_upstream"], strict=True):
        z_nV = all_logits(x, weight, bias, **form)
        z = torch.where(ids == -1, 0, z_nV.gather(1, ids.clamp(min=0)))
        lse = torch.where((ids != -1).any(1), z_nV.logsumexp(1), 0)
        objective = objective + (z * u).sum() + ((lse * v).sum() if return_lse else 0)
        found["z"].append(z.detach())
        found["lse"].append(lse.detach())
    objective.backward()
    return {**found, "dhidden": [grad_of(x) for x in hidden], "dweight": grad_of(weight), "dbias": grad_of(bias)}


def computed(
    given: dict[str, Any], part: int, shard: VocabShard | None, form: dict[str, Any], return_lse: bool = True
) -> dict[str, Tensor]:
    whole = VocabShard.whole(given["weight"].shape[0])
    hidden = leaf(given["hidden"][part])
    weight, bias = (leaf(local_rows(given[name], shard or whole)) for name in ("weight", "bias"))
    got = linear_selected_logits(
        hidden, weight, given["ids"][part], bias=bias, shard=shard, return_lse=return_lse, **form
    )
    z, lse = got if return_lse else (got, None)
    objective = (z * given["upstream"][part]).sum()
    if lse is not None:
        objective = objective + (lse * given["lse_upstream"][part]).sum()
    objective.backward()
    found = {"z": z.detach(), "dhidden": grad_of(hidden), "dweight": grad_of(weight), "dbias": grad_of(bias)}
    return found if lse is None else {**found, "lse": lse.detach()}


def assert_close(got: dict[str, Tensor], truth: dict[str, Any], part: int, bound: float, **rows: Tensor) -> None:
    for name, x in got.items():
        expected = rows[name] if name in rows else truth[name]
        expected = expected[part] if isinstance(expected, list) else expected
        assert relative_error(x, expected) < bound, f"{name}: {relative_error(x, expected):.1e}"


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("form", [PLAIN, FORM], ids=["plain", "softcap"])
@pytest.mark.parametrize("k", [1, 7, 400])
def test_they_are_those_of_all_logits(k: int, form: dict[str, Any], return_lse: bool) -> None:
    given = problem(k=k)
    got = computed(given, 0, None, form, return_lse)
    assert_close(got, plain(given, form, return_lse), 0, 2e-6)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, GPU_BF16])
def test_the_kernels_give_what_plain_torch_gives(dtype: torch.dtype, return_lse: bool) -> None:
    given = problem((5, 0), 301, 20, dtype)
    given = {name: [y.to(DEVICE) for y in x] if isinstance(x, list) else x.to(DEVICE) for name, x in given.items()}
    form = {**FORM, "backend": "triton", "gradient": "exact"}
    for part in (0, 1):
        got = computed(given, part, None, form, return_lse)
        expected = computed(given, part, None, {**form, "backend": "torch"}, return_lse)
        for name, x in got.items():
            bound = 2e-6 if x.dtype == torch.float32 else 2 * torch.finfo(x.dtype).eps
            assert x.dtype == expected[name].dtype and relative_error(x, expected[name]) < bound, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_16_bits_sums_are_not(dtype: torch.dtype) -> None:
    given = problem((40,), k=20, dtype=dtype)
    got, truth = computed(given, 0, None, FORM, False), plain(given, FORM, False)
    assert got["z"].dtype == torch.float32 and got["dweight"].dtype == dtype
    assert relative_error(got.pop("z"), truth["z"][0]) < 1e-6
    assert_close(got, truth, 0, torch.finfo(dtype).eps)


def test_gradients_are_those_of_finite_differences() -> None:
    given = problem((3,), 11, 4, torch.float64)
    inputs = [leaf(x) for x in (given["hidden"][0], given["weight"], given["bias"])]

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_selected_logits(hidden, weight, given["ids"][0], bias=bias, return_lse=True, **FORM)

    torch.autograd.gradcheck(function, inputs)


def _on_rank(
    given: dict[str, Any], layout: Layout, runs: Runs | None, form: dict[str, Any], return_lse: bool
) -> dict[str, Tensor]:
    if form.get("backend") == "triton":
        given = tree_map_only(Tensor, lambda x: x.to(DEVICE), given)
    shard = shard_of(given["weight"].shape[0], layout, runs)
    return computed(given, part_of(dist.get_rank(), layout), shard, form, return_lse)


CASES: dict[str, tuple[int, Layout, tuple[int, ...], Runs | None]] = {
    "2 ranks, the same tokens": (2, "replicated", (5,), None),
    "3 ranks, own tokens, one has none, an empty shard": (3, "sharded", (4, 0, 6), (((0, 99),), (), ((99, 301),))),
    "4 ranks, uneven shards": (4, "replicated", (5,), (((0, 3), (200, 301)), ((3, 4),), ((4, 120),), ((120, 200),))),
    "2 x 2 ranks": (4, "grid", (5, 3), None),
}


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(("world", "layout", "parts", "runs"), CASES.values(), ids=CASES)
def test_on_ranks_each_gets_those_of_its_own_tokens(
    ranks: RankPool, world: int, layout: Layout, parts: tuple[int, ...], runs: Runs | None, return_lse: bool
) -> None:
    given = problem(parts)
    truth = plain(given, FORM, return_lse)
    blocks = runs_of(301, world, runs)
    for rank, got in enumerate(ranks.run(world, _on_rank, given, layout, runs, FORM, return_lse)):
        rows = {name: rows_of(truth[name], blocks[rank]) for name in ("dweight", "dbias")}
        assert_close(got, truth, part_of(rank, layout), 2e-6, **rows)


def test_the_kernels_leave_out_what_other_ranks_hold(ranks: RankPool) -> None:
    world, layout, parts, runs = CASES["3 ranks, own tokens, one has none, an empty shard"]
    given = problem(parts)
    truth = plain(given, FORM)
    settings = {**FORM, "backend": "triton", "gradient": "exact"}
    for rank, got in enumerate(ranks.run(world, _on_rank, given, layout, runs, settings, True)):
        rows = {name: rows_of(truth[name], runs_of(301, world, runs)[rank]) for name in ("dweight", "dbias")}
        assert_close(got, truth, part_of(rank, layout), 2e-6, **rows)


def _dtensor(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(given["weight"], mesh, [Shard(0)]).requires_grad_()
    z, lse = linear_selected_logits(given["hidden"][0], weight, given["ids"][0], return_lse=True)
    ((z * given["upstream"][0]).sum() + lse.sum()).backward()
    return z.detach(), weight.grad.full_tensor()


def test_a_dtensor_brings_its_rows_and_group_along(ranks: RankPool) -> None:
    given = problem()
    given |= {"lse_upstream": [torch.ones(6)], "bias": torch.zeros(301)}
    truth = plain(given, PLAIN)
    for z, dweight in ranks.run(2, _dtensor, given):
        assert relative_error(z, truth["z"][0]) < 2e-6
        assert relative_error(dweight, truth["dweight"]) < 2e-6


def test_a_gradient_may_be_unwanted_and_others_stay() -> None:
    given = problem()
    whole = computed(given, 0, None, FORM)
    for wanted in ("dhidden", "dweight"):
        hidden, weight = given["hidden"][0].clone(), given["weight"].clone()
        {"dhidden": hidden, "dweight": weight}[wanted].requires_grad_()
        z, lse = linear_selected_logits(hidden, weight, given["ids"][0], bias=given["bias"], return_lse=True, **FORM)
        ((z * given["upstream"][0]).sum() + (lse * given["lse_upstream"][0]).sum()).backward()
        got = hidden.grad if wanted == "dhidden" else weight.grad
        assert got is not None and torch.equal(got, whole[wanted])
        assert (weight if wanted == "dhidden" else hidden).grad is None


def test_a_second_backward_gives_the_same_gradient() -> None:
    """Into the log-sum-exp's gradient of the rows that of the ids is added in place."""
    given = problem()
    hidden, weight = leaf(given["hidden"][0]), leaf(given["weight"])
    z, lse = linear_selected_logits(hidden, weight, given["ids"][0], return_lse=True, **FORM)
    objective = (z * given["upstream"][0]).sum() + (lse * given["lse_upstream"][0]).sum()
    first = torch.autograd.grad(objective, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(objective, (hidden, weight))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    (of_z,) = torch.autograd.grad(linear_selected_logits(hidden, weight, given["ids"][0]).sum(), weight)
    z, _ = linear_selected_logits(hidden, weight, given["ids"][0], return_lse=True)
    assert torch.equal(torch.autograd.grad(z.sum(), weight)[0], of_z)


def test_neither_all_logits_nor_a_row_of_each_pair_exist() -> None:
    tokens, k, vocab, dim = 2048, 32, 8192, 256
    hidden, weight = leaf(torch.randn(tokens, dim)), leaf(torch.randn(vocab, dim))
    ids = torch.randint(vocab, (tokens, k))
    with LargestTensor() as seen:
        linear_selected_logits(hidden, weight, ids).sum().backward()
    assert seen.largest <= 16 << 20 < 4 * tokens * min(k * dim, vocab)


def test_what_a_token_without_ids_holds_reaches_nothing() -> None:
    given = problem()
    clean = computed(given, 0, None, FORM)
    given["hidden"][0][-1] = torch.nan
    for name, x in computed(given, 0, None, FORM).items():
        assert torch.equal(x, clean[name]), name
    given["hidden"][0][0] = torch.nan
    dirty = computed(given, 0, None, FORM)
    assert dirty["z"][0].isnan().sum() == (given["ids"][0][0] != -1).sum() and dirty["lse"][0].isnan()


def test_padding_is_the_id_that_is_said_to_be() -> None:
    given = problem()
    ids = given["ids"][0]
    one, other = (
        linear_selected_logits(given["hidden"][0], given["weight"], x, padding_id=padding)
        for x, padding in ((ids, -1), (ids.masked_fill(ids == -1, 9999), 9999))
    )
    assert torch.equal(one, other)


def test_under_autocast_it_is_computed_in_its_dtype() -> None:
    given = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_selected_logits(given["hidden"][0], given["weight"], given["ids"][0])
    cast = linear_selected_logits(given["hidden"][0].bfloat16(), given["weight"], given["ids"][0])
    assert got.dtype == torch.float32 and torch.equal(got, cast)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "an id out of range": (
        {"ids": torch.full((6, 2), 301)},
        r"ids must be in \[0, 301\) or padding_id = -1, got \[301",
    ),
    "floats": ({"ids": torch.zeros(6, 2)}, "ids must be integers; got torch.float32"),
    "other tokens": ({"ids": torch.zeros(5, 2).long()}, r"ids must be \[6, K\], hidden's shape with K ids"),
    "no id": ({"ids": torch.zeros(6, 0).long()}, "with K ids, 1 or more"),
    "a temperature of 0": ({"temperature": 0.0}, "temperature must be a positive float; got 0.0"),
    "a tensor": ({"temperature": torch.ones(())}, "temperature must be a positive float"),
    "a softcap of 0": ({"softcap": 0.0}, "softcap must be a positive float or None; got 0.0"),
    "another padding": ({"padding_id": "x"}, "padding_id must be an int; got 'x'"),
    "no such backend here": (
        {"backend": "triton", "hidden": torch.zeros(6, 8).double()},
        'backend="triton" needs CUDA',
    ),
    "other rows": ({"shard": VocabShard.whole(20)}, "weight must hold the shard's 20 rows"),
    "another bias": ({"bias": torch.zeros(3)}, r"bias must be \[301\]"),
}


@pytest.mark.parametrize(("arguments", "says"), FAULTS.values(), ids=FAULTS)
def test_what_is_not_allowed_is_named(arguments: dict[str, Any], says: str) -> None:
    given = problem()
    tensors = {"hidden": given["hidden"][0], "weight": given["weight"], "ids": given["ids"][0]}
    with pytest.raises(ValueError, match=says):
        linear_selected_logits(**{**tensors, **arguments})
    with pytest.raises(TypeError, match="linear_selected_logits takes no argument colour"):
        linear_selected_logits(given["hidden"][0], given["weight"], given["ids"][0], colour=1)


def _differing(arguments: dict[str, Any]) -> str:
    given, shard = problem(), VocabShard.even(301, dist.group.WORLD)
    arguments = {"ids": given["ids"][0], **(arguments if dist.get_rank() else {})}
    try:
        linear_selected_logits(given["hidden"][0], given["weight"][shard.start : shard.stop], shard=shard, **arguments)
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"ids": torch.full((6, 7), 999)}, "rank 1: ids must be in [0, 301) or padding_id = -1, got [999]"),
        ({"ids": torch.zeros(6, 2).long()}, "ids of a token must be equal on all ranks, got rank 0: 7, rank 1: 2"),
        ({"ids": torch.zeros(6, 7).long()}, "ids differ between ranks that bring the same tokens"),
        ({"temperature": 2.0}, "temperature must be equal on all ranks, got rank 0: 1.0, rank 1: 2.0"),
        ({"colour": 2.0}, "rank 1: linear_selected_logits takes no argument colour"),
        ({"return_lse": True}, "return_lse must be equal on all ranks"),
    ],
    ids=["out of range", "another K", "other ids", "temperature", "unknown", "lse"],
)
def test_what_one_rank_gets_wrong_is_an_error_on_all(ranks: RankPool, arguments: dict[str, Any], says: str) -> None:
    for text in ranks.run(2, _differing, arguments):
        assert says in text
