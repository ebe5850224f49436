"""ShardedCCEHead against nn.Linear and F.cross_entropy, by relative norm."""

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F

from cce_dist.config import CCEConfig
from cce_dist.heads.sharded_head import ShardedCCEHead

HIDDEN = 16
EXACT = CCEConfig(gradient="exact")


def _linear(vocab: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(HIDDEN, vocab, bias=bias)


def _tokens(rank: int, vocab: int) -> tuple[Tensor, Tensor]:
    """[2, L, D] and [2, L]: another length on every rank, and some ignored labels."""
    generator = torch.Generator().manual_seed(100 + rank)
    length = 3 + rank
    hidden = torch.randn(2, length, HIDDEN, generator=generator)
    labels = torch.randint(vocab, (2, length), generator=generator)
    labels[0, rank % length] = -100
    return hidden.requires_grad_(), labels


def _run_head(vocab: int, tokens: str, bias: bool) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    token_group = mesh if tokens == "sharded" else None
    head = ShardedCCEHead.from_linear(_linear(vocab, bias), mesh, token_group=token_group, config=EXACT)
    hidden, labels = _tokens(dist.get_rank() if tokens == "sharded" else 0, vocab)
    loss = head(hidden, labels)
    loss.backward()
    return {
        "loss": loss.detach(),
        "hidden": hidden.grad,
        "logits": head.logits(hidden),
        "rows": head.shard.num_rows,
        "placements": [str(p.placements) for p in head.parameters()],
        **{name: _full(p.grad) for name, p in head.named_parameters()},
    }


def _full(x: Tensor | None) -> Tensor:
    assert isinstance(x, DTensor)
    return x.full_tensor()


def _plain(vocab: int, ranks: list[int], bias: bool) -> tuple[Tensor, list[Tensor], nn.Linear]:
    linear = _linear(vocab, bias)
    tokens = [_tokens(rank, vocab) for rank in ranks]
    logits = torch.cat([linear(hidden).flatten(0, 1) for hidden, _ in tokens])
    loss = F.cross_entropy(logits, torch.cat([labels.flatten() for _, labels in tokens]))
    loss.backward()
    return loss.detach(), [hidden for hidden, _ in tokens], linear


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", ["replicated", "sharded"])
@pytest.mark.parametrize(("vocab", "bias"), [(103, True), (5, False)])  # 5 rows on 4 ranks: 2, 2, 1, 0
def test_loss_gradients_and_logits_equal_a_plain_linear(
    ranks: RankPool, world: int, tokens: str, vocab: int, bias: bool
) -> None:
    results = ranks.run(world, _run_head, vocab, tokens, bias)
    loss, hidden, linear = _plain(vocab, list(range(world)) if tokens == "sharded" else [0], bias)
    for rank, result in enumerate(results):
        own = hidden[rank if tokens == "sharded" else 0]
        # The mean over all ranks' tokens has W times its gradient, for a framework that averages over the ranks.
        scale = world if tokens == "sharded" else 1
        assert _error(result["loss"], loss) < 1e-6
        assert _error(result["hidden"], scale * own.grad) < 1e-5
        assert _error(result["logits"], linear(own).detach()) < 1e-6
        for name, parameter in linear.named_parameters():
            assert _error(result[name], parameter.grad) < 1e-5, name
        assert set(result["placements"]) == {"(Shard(dim=0),)"}
    assert sum(result["rows"] for result in results) == vocab


def _run_overrides() -> list[Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    linear = _linear(20)
    head = ShardedCCEHead.from_linear(linear, mesh, softcap=2.0, logit_scale=0.5, vocab_size=17, config=EXACT)
    hidden, labels = _tokens(0, 17)
    logits = 2.0 * torch.tanh(0.5 * linear(hidden)[..., :17] / 2.0)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(2, -1)
    return [head(hidden, labels, shift=1, reduction="none"), expected, head.logits(hidden), logits]


def test_settings_and_overrides_reach_the_loss_and_the_logits(ranks: RankPool) -> None:
    for loss, expected_loss, logits, expected_logits in ranks.run(2, _detached, "_run_overrides"):
        assert _error(loss, expected_loss) < 1e-6
        assert _error(logits, expected_logits) < 1e-6


def _detached(name: str) -> list[Tensor]:
    return [x.detach() for x in globals()[name]()]


def _run_state() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    head = ShardedCCEHead.from_linear(_linear(7), mesh)
    linear = nn.Linear(HIDDEN, 7, device="meta")
    linear.weight.requires_grad_(False)
    empty = ShardedCCEHead.from_linear(linear, mesh)
    on_meta = all(p.is_meta for p in empty.parameters())
    trainable = [p.requires_grad for p in empty.parameters()]
    empty.to_empty(device="cpu").load_state_dict(head.state_dict())
    same = all(
        torch.equal(p.to_local(), q.to_local()) for p, q in zip(empty.parameters(), head.parameters(), strict=True)
    )
    return {"keys": list(head.state_dict()), "meta": on_meta, "trainable": trainable, "same": same}


def test_state_dict_has_the_keys_of_a_linear_and_loads_into_a_head_from_the_meta_device(ranks: RankPool) -> None:
    for result in ranks.run(2, _run_state):
        assert result == {"keys": ["weight", "bias"], "meta": True, "trainable": [False, True], "same": True}


def _run_errors() -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    linear = _linear(8)
    line = mesh._flatten("all")
    weight = distribute_tensor(linear.weight, line, [Shard(0)])
    attempts: list[Any] = [
        lambda: ShardedCCEHead.from_linear(linear, mesh),
        lambda: ShardedCCEHead.from_linear(nn.Conv1d(1, 1, 1), line),  # type: ignore[arg-type]
        lambda: ShardedCCEHead(distribute_tensor(linear.weight, line, [Shard(1)])),
        lambda: ShardedCCEHead(weight, distribute_tensor(torch.zeros(9), line, [Shard(0)])),
        lambda: ShardedCCEHead(weight)(torch.zeros(3, HIDDEN + 1), torch.zeros(3, dtype=torch.long)),
    ]
    texts = []
    for attempt in attempts:
        with pytest.raises((TypeError, ValueError)) as caught:
            attempt()
        texts.append(str(caught.value))
    return texts


def test_what_does_not_fit_is_an_error_on_every_rank_that_names_the_argument(ranks: RankPool) -> None:
    for texts in ranks.run(4, _run_errors):
        for text, part in zip(texts, ["1-D", "nn.Linear", "Shard(0)", "bias", "hidden"], strict=True):
            assert part in text


def _head_with(rank_config: dict[str, Any]) -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(ValueError, match="does not look at") as error:
        ShardedCCEHead.from_linear(torch.nn.Linear(4, 40, bias=False), mesh, config=CCEConfig(**rank_config))
    return str(error.value)


@pytest.mark.parametrize("key", [{"enabled": False}, {"vocab_parallel_size": 2}, {"materialize": "raise"}])
def test_settings_that_the_head_does_not_look_at_are_refused(ranks: RankPool, key: dict[str, Any]) -> None:
    for text in ranks.run(2, _head_with, key):
        assert f"config sets {next(iter(key))} = {next(iter(key.values()))!r}" in text


def _logits_on_one_rank(alone: int) -> tuple[str, float]:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    head = ShardedCCEHead.from_linear(_linear(40), DeviceMesh.from_group(group, "cpu"))
    said, start = "", time.monotonic()
    if dist.get_rank() == alone:
        with pytest.raises(RuntimeError, match="not all of them came") as caught:
            head.logits(torch.zeros(3, HIDDEN))
        said = str(caught.value)
    return said, time.monotonic() - start


@pytest.mark.parametrize("alone", [0, 1])
def test_logits_on_one_rank_alone_are_an_error_within_the_groups_timeout(ranks: RankPool, alone: int) -> None:
    text, seconds = ranks.run(2, _logits_on_one_rank, alone, timeout=30)[alone]
    assert "the logits of a ShardedCCEHead are collective over ranks [0, 1]" in text
    assert 1 < seconds < 10


def _a_loss_on_one_rank_logits_on_another() -> tuple[str, float]:
    head = ShardedCCEHead.from_linear(_linear(40), init_device_mesh("cpu", (2,)), config=EXACT)
    hidden, labels = _tokens(0, 40)
    wanted = (lambda: head(hidden, labels)) if dist.get_rank() == 0 else (lambda: head.logits(hidden))
    with pytest.raises(ValueError, match="what is computed must be equal") as caught:
        wanted()
    return str(caught.value), float(head(hidden, labels))


def test_a_loss_on_one_rank_and_logits_on_another_is_an_error_after_which_training_goes_on(ranks: RankPool) -> None:
    results = ranks.run(2, _a_loss_on_one_rank_logits_on_another, timeout=20)
    for text, loss in results:
        assert "rank 0: a loss, rank 1: real logits" in text and loss == results[0][1] > 0


def _run_logprobs(vocab: int, tokens: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    token_group = mesh if tokens == "sharded" else None
    head = ShardedCCEHead.from_linear(
        _linear(vocab),
        mesh,
        token_group=token_group,
        softcap=2.0,
        config=CCEConfig(gradient="exact", first_pass="full"),
    )
    hidden, labels = _tokens(dist.get_rank() if tokens == "sharded" else 0, vocab)
    found = head.logprobs(hidden, labels, entropy=True, temperature=0.7)
    assert found.entropy is not None
    (found.logprob.sum() + 0.5 * found.entropy.sum()).backward()
    grads = {name: _full(p.grad) for name, p in head.named_parameters()}
    return {"logprob": found.logprob.detach(), "entropy": found.entropy.detach(), "hidden": hidden.grad, **grads}


@pytest.mark.parametrize("tokens", ["replicated", "sharded"])
def test_log_probabilities_and_their_gradients_equal_a_plain_linear(ranks: RankPool, tokens: str) -> None:
    world = 3
    results = ranks.run(world, _run_logprobs, 103, tokens)
    linear, brought = _linear(103), range(world) if tokens == "sharded" else [0]
    for rank in brought:
        hidden, labels = _tokens(rank, 103)
        log_p = (2 * torch.tanh(linear(hidden) / 2) / 0.7).log_softmax(-1)
        valid = labels != -100
        logprob = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * valid
        entropy = -(log_p.exp() * log_p).sum(-1) * valid
        (logprob.sum() + 0.5 * entropy.sum()).backward()
        for mine in results if tokens == "replicated" else [results[rank]]:
            assert hidden.grad is not None
            for name, wanted in (("logprob", logprob), ("entropy", entropy), ("hidden", hidden.grad)):
                assert _error(mine[name], wanted.detach()) < 2e-6, name
    divisor = world if tokens == "sharded" else 1
    for mine in results:
        for name, p in linear.named_parameters():
            assert p.grad is not None
            assert _error(mine[name], p.grad / divisor) < 2e-6, name
