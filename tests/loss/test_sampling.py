"""The next token: the most likely one, or a draw from the softmax, of a whole and of a sharded vocabulary."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import DEVICE
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from cce_dist import ShardedCCEHead, VocabShard, linear_next_token


def problem(tokens: int = 5, vocab: int = 300) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(tokens, 8, generator=draw),
        "weight": torch.randn(vocab, 8, generator=draw),
        "bias": torch.randn(vocab, generator=draw),
    }


def logits(given: dict[str, Tensor], softcap: float = 3.0) -> Tensor:
    z = (given["hidden"].double() @ given["weight"].double().T + given["bias"].double()) * 0.7
    return softcap * torch.tanh(z / softcap)


FORM = {"softcap": 3.0, "logit_scale": 0.7}


def test_at_temperature_0_it_is_the_most_likely_token() -> None:
    given = {name: x.to(DEVICE) for name, x in problem(4200, 5000).items()}
    got = linear_next_token(
        given["hidden"].view(2, 2100, 8), given["weight"], bias=given["bias"], temperature=0.0, **FORM
    )
    assert torch.equal(got.flatten(), logits(given).argmax(-1))
    tied = torch.zeros(40, 8, device=DEVICE)
    assert (linear_next_token(given["hidden"], tied, temperature=0) == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_are_distributed_as_the_softmax(temperature: float) -> None:
    given = {name: x.to(DEVICE) for name, x in problem(1, 24).items()}
    draws = 60000
    hidden = given["hidden"].expand(draws, 8)
    got = linear_next_token(hidden, given["weight"], bias=given["bias"], temperature=temperature, seed=3, **FORM)
    p = (logits(given)[0] / temperature).softmax(-1)
    expected, counts = p * draws, torch.bincount(got, minlength=24).double()
    chi_square = ((counts - expected).square() / expected)[expected > 5].sum()
    assert chi_square < 60  # of 23 degrees of freedom: once in 50,000 seeds


def test_a_seed_repeats_and_none_draws_anew() -> None:
    given = problem(64)
    same = [linear_next_token(given["hidden"], given["weight"], seed=seed) for seed in (7, torch.tensor(7))]
    assert torch.equal(*same)
    torch.manual_seed(0)
    other = [linear_next_token(given["hidden"], given["weight"]) for _ in range(2)]
    assert not torch.equal(*other)


def _on_rank(given: dict[str, Tensor], temperature: float, sharded: bool) -> Tensor:
    world, rank = dist.group.WORLD, dist.get_rank()
    shard = VocabShard.even(given["weight"].shape[0], world, world if sharded else None)
    rows = slice(shard.start, shard.stop)
    hidden = given["hidden"]
    if sharded:
        hidden = hidden.split(4)[rank] if rank * 4 < hidden.shape[0] else hidden[:0]
    return linear_next_token(
        hidden, given["weight"][rows], bias=given["bias"][rows], shard=shard, temperature=temperature, seed=11, **FORM
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("world", "vocab"), [(2, 301), (3, 300), (4, 5)])
def test_ranks_draw_what_one_process_draws(ranks: RankPool, world: int, vocab: int, temperature: float) -> None:
    given = problem(4 * world, vocab)
    alone = linear_next_token(
        given["hidden"], given["weight"], bias=given["bias"], temperature=temperature, seed=11, **FORM
    )
    for got in ranks.run(world, _on_rank, given, temperature, False):
        assert torch.equal(got, alone)
    assert torch.equal(torch.cat(ranks.run(world, _on_rank, given, temperature, True)), alone)


def _nan_on_ranks(given: dict[str, Tensor], temperature: float) -> Tensor:
    shard = VocabShard.even(300, dist.group.WORLD)
    bias = given["bias"].clone()
    bias[250] = torch.nan  # on the last rank
    hidden = torch.cat([given["hidden"], given["hidden"][:1] * torch.nan])
    rows = slice(shard.start, shard.stop)
    settings = {"shard": shard, "temperature": temperature}
    with_bias = linear_next_token(hidden, given["weight"][rows], bias=bias[rows], **settings)
    return torch.cat([with_bias, linear_next_token(hidden, given["weight"][rows], **settings)])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_logits_are_no_numbers_there_is_no_token(ranks: RankPool, temperature: float) -> None:
    for got in ranks.run(2, _nan_on_ranks, problem(), temperature):
        assert (got[:6] == -1).all() and (got[6:11] >= 0).all() and got[11] == -1


def _dtensor(given: dict[str, Tensor]) -> Tensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(given["weight"], mesh, [Shard(0)])
    return linear_next_token(given["hidden"], weight, temperature=0.0)


def test_a_dtensor_brings_its_rows_and_group_along(ranks: RankPool) -> None:
    given = problem()
    for got in ranks.run(2, _dtensor, given):
        assert torch.equal(got, (given["hidden"] @ given["weight"].T).argmax(-1))


def _head(given: dict[str, Tensor]) -> Tensor:
    linear = torch.nn.Linear(8, 300)
    with torch.no_grad():
        linear.weight.copy_(given["weight"])
        linear.bias.copy_(given["bias"])
    head = ShardedCCEHead.from_linear(linear, init_device_mesh("cpu", (dist.get_world_size(),)), **FORM)
    return head.next_token(given["hidden"], temperature=0.0)


def test_a_sharded_head_gives_its_next_token(ranks: RankPool) -> None:
    given = problem()
    for got in ranks.run(2, _head, given):
        assert torch.equal(got, logits(given).argmax(-1))


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"temperature": -1.0}, "temperature must be a finite float, 0 or more; got -1.0"),
    "a tensor": ({"temperature": torch.ones(5)}, "temperature must be a finite float"),
    "a softcap of 0": ({"softcap": 0.0}, "softcap must be a positive float or None"),
    "a scale that is none": ({"logit_scale": float("nan")}, "logit_scale must be a finite float or None"),
    "a seed too large": ({"seed": 2**63}, "seed must be a 64-bit int, a 0-d int64 tensor or None"),
    "a seed of two": ({"seed": torch.zeros(2, dtype=torch.int64)}, "a tensor as seed must be int64, 0-d, on cpu"),
    "other rows": ({"shard": VocabShard.whole(20)}, "weight must hold the shard's 20 rows"),
    "another bias": ({"bias": torch.zeros(3)}, r"bias must be \[300\]"),
}


@pytest.mark.parametrize(("arguments", "says"), FAULTS.values(), ids=FAULTS)
def test_what_is_not_allowed_is_named(arguments: dict[str, Any], says: str) -> None:
    given = problem()
    with pytest.raises(ValueError, match=says):
        linear_next_token(given["hidden"], given["weight"], **arguments)


def _differing(settings: dict[str, Any]) -> str:
    given, shard = problem(), VocabShard.even(300, dist.group.WORLD)
    rows = given["weight"][shard.start : shard.stop]
    try:
        linear_next_token(given["hidden"], rows, shard=shard, **(settings if dist.get_rank() else {}))
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": 0.0}, "temperature must be equal on all ranks, got rank 0: 1.0, rank 1: 0.0"),
        ({"seed": "x"}, "rank 1: seed must be a 64-bit int, a 0-d int64 tensor or None; got 'x'."),
        ({"softcap": -1.0}, "rank 1: softcap must be a positive float or None; got -1.0."),
    ],
    ids=str,
)
def test_what_one_rank_gets_wrong_is_an_error_on_all(ranks: RankPool, settings: dict[str, Any], says: str) -> None:
    for text in ranks.run(2, _differing, settings):
        assert says in text
