"""The next token: the most likely one, or a draw from the softmax, of a whole and of a sharded vocabulary."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import DEVICE
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

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
    "negative": ({"temperature": -1.0}, "temperature must be a finite number, 0 or more, got -1.0"),
    "a tensor": ({"temperature": torch.ones(5)}, "temperature must be a finite number"),
    "other rows": ({"shard": VocabShard.whole(20)}, r"weight must be \[20, 8\]"),
    "another bias": ({"bias": torch.zeros(3)}, r"bias must be \[300\]"),
}


@pytest.mark.parametrize(("arguments", "says"), FAULTS.values(), ids=FAULTS)
def test_what_is_not_allowed_is_named(arguments: dict[str, Any], says: str) -> None:
    given = problem()
    with pytest.raises(ValueError, match=says):
        linear_next_token(given["hidden"], given["weight"], **arguments)


def _other_temperatures() -> str:
    given, shard = problem(), VocabShard.even(300, dist.group.WORLD)
    rows = given["weight"][shard.start : shard.stop]
    try:
        linear_next_token(given["hidden"], rows, shard=shard, temperature=float(dist.get_rank()))
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_ranks_that_differ_all_say_so(ranks: RankPool) -> None:
    for text in ranks.run(2, _other_temperatures):
        assert "temperature must be equal on all ranks, got rank 0: 0.0, rank 1: 1.0" in text
