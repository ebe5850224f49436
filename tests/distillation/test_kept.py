"""Log-probabilities within kept ids: the softmax over those alone, padded and in CSR form."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import grad_of, leaf, relative_error
from sharded import Layout, Runs, local_rows, part_of, shard_of
from teachers import all_logits, rows_of, runs_of
from torch import Tensor

from cce_dist import VocabShard, linear_kept_logprobs

FORM = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.7}
VOCAB = 301


def problem(parts: tuple[int, ...] = (6,), most: int = 9) -> dict[str, Any]:
    """Of each token 0 to ``most`` distinct ids; upstream gradients are 0 at padding."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.rand(n, VOCAB, generator=draw).argsort(1)[:, :most].clone() for n in parts]
    for x in ids:
        x[torch.arange(most) >= torch.randint(most + 1, (x.shape[0], 1), generator=draw)] = -1
    return {
        "hidden": [torch.randn(n, 8, generator=draw) for n in parts],
        "ids": ids,
        "weight": torch.randn(VOCAB, 8, generator=draw),
        "bias": torch.randn(VOCAB, generator=draw),
        "upstream": [torch.randn(x.shape, generator=draw) * (x != -1) for x in ids],
    }


def plain(given: dict[str, Any]) -> dict[str, Any]:
    hidden = [leaf(x.double()) for x in given["hidden"]]
    weight, bias = leaf(given["weight"].double()), leaf(given["bias"].double())
    found: list[Tensor] = []
    for x, ids, u in zip(hidden, given["ids"], given["upstream"], strict=True):
        z = all_logits(x, weight, bias, **FORM)
        rows = [z[i, own[own != -1]].log_softmax(0) for i, own in enumerate(ids)]
        if rows:
            (torch.cat(rows) * u[ids != -1]).sum().backward(retain_graph=True)
        found.append(torch.cat([torch.zeros(0), *rows]).detach())
    return {"logp": found, "dhidden": [grad_of(x) for x in hidden], "dweight": grad_of(weight), "dbias": grad_of(bias)}


def computed(given: dict[str, Any], part: int, shard: VocabShard, csr: bool) -> dict[str, Tensor]:
    hidden = leaf(given["hidden"][part])
    weight, bias = (leaf(local_rows(given[name], shard)) for name in ("weight", "bias"))
    ids, upstream = given["ids"][part], given["upstream"][part]
    is_id, offsets = ids != -1, None
    if csr:
        offsets = torch.cat([torch.zeros(1).long(), is_id.sum(1).cumsum(0)])
        ids, upstream = ids[is_id], upstream[is_id]
        is_id = torch.ones_like(ids, dtype=torch.bool)
    logp = linear_kept_logprobs(hidden, weight, ids, offsets, bias=bias, shard=shard, **FORM)
    assert (logp[~is_id] == -torch.inf).all()
    (torch.where(is_id, logp, 0) * upstream).sum().backward()
    found = {"logp": logp.detach()[is_id], "dhidden": grad_of(hidden), "dweight": grad_of(weight)}
    return {**found, "dbias": grad_of(bias)}


def assert_close(got: dict[str, Tensor], truth: dict[str, Any], part: int, runs: Any) -> None:
    for name, x in got.items():
        expected = rows_of(truth[name], runs) if name in ("dweight", "dbias") else truth[name][part]
        assert relative_error(x, expected) < 2e-6, f"{name}: {relative_error(x, expected):.1e}"


@pytest.mark.parametrize("csr", [False, True])
def test_they_are_the_softmax_over_the_kept_ids(csr: bool) -> None:
    given = problem()
    assert_close(computed(given, 0, VocabShard.whole(VOCAB), csr), plain(given), 0, ((0, VOCAB),))


CASES: dict[str, tuple[int, Layout, tuple[int, ...], Runs | None]] = {
    "2 ranks, the same tokens": (2, "replicated", (5,), None),
    "3 ranks, own tokens, one has none, an empty shard": (3, "sharded", (4, 0, 6), (((0, 99),), ((99, 301),), ())),
    "2 x 2 ranks": (4, "grid", (5, 3), None),
}


def _on_rank(given: dict[str, Any], layout: Layout, runs: Runs | None, csr: bool) -> dict[str, Tensor]:
    return computed(given, part_of(dist.get_rank(), layout), shard_of(VOCAB, layout, runs), csr)


@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize(("world", "layout", "parts", "runs"), CASES.values(), ids=CASES)
def test_on_ranks_each_gets_those_of_its_own_tokens(
    ranks: RankPool, world: int, layout: Layout, parts: tuple[int, ...], runs: Runs | None, csr: bool
) -> None:
    given = problem(parts)
    truth, blocks = plain(given), runs_of(VOCAB, world, runs)
    for rank, got in enumerate(ranks.run(world, _on_rank, given, layout, runs, csr)):
        assert_close(got, truth, part_of(rank, layout), blocks[rank])


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "offsets that end early": ({"offsets": torch.tensor([0, 1, 2])}, "end with the number of ids, 3; got"),
    "offsets that fall": ({"offsets": torch.tensor([0, 4, 3])}, "offsets must begin with 0, never fall"),
    "offsets of other tokens": ({"offsets": torch.tensor([0, 3])}, r"offsets \[3\], one more than there are tokens"),
    "floats": ({"offsets": torch.zeros(3)}, "offsets must be integers"),
    "an id out of range": ({"ids": torch.tensor([0, 1, 301])}, r"ids must be in \[0, 301\)"),
}


@pytest.mark.parametrize(("arguments", "says"), FAULTS.values(), ids=FAULTS)
def test_what_is_not_allowed_is_named(arguments: dict[str, Any], says: str) -> None:
    arguments = {"ids": torch.tensor([0, 1, 2]), "offsets": torch.tensor([0, 1, 3]), **arguments}
    with pytest.raises(ValueError, match=says):
        linear_kept_logprobs(torch.randn(2, 8), torch.randn(VOCAB, 8), **arguments)


def _other_offsets() -> str:
    given, shard = problem((2,)), VocabShard.even(VOCAB, dist.group.WORLD)
    rows, offsets = given["weight"][shard.start : shard.stop], torch.tensor([0, 1 + dist.get_rank(), 3])
    try:
        linear_kept_logprobs(given["hidden"][0], rows, torch.arange(3), offsets, shard=shard)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_ranks_whose_ids_are_of_other_tokens_are_told(ranks: RankPool) -> None:
    for text in ranks.run(2, _other_offsets):
        assert "ids differ between ranks that bring the same tokens" in text


def _differing() -> str:
    given, shard = problem((2,)), VocabShard.even(VOCAB, dist.group.WORLD)
    given = {"hidden": given["hidden"][0], "weight": given["weight"][shard.start : shard.stop]}
    try:
        if dist.get_rank():
            linear_kept_logprobs(**given, ids=torch.arange(3), offsets=torch.tensor([0, 1, 3]), shard=shard)
        else:
            linear_kept_logprobs(**given, ids=torch.arange(4).view(2, 2), shard=shard)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_ranks_that_bring_another_form_are_told(ranks: RankPool) -> None:
    for text in ranks.run(2, _differing):
        assert "ids of a token must be equal on all ranks, got rank 0: 2, rank 1: in CSR form" in text
