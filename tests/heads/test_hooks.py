"""Hooks of users count in training; those by which FSDP2 and ZeRO-3 gather the classifier are told apart."""

from typing import Any

import architectures
import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune

from cce_dist import CCEConfig
from cce_dist.heads.find import output_layer
from cce_dist.heads.hooks import is_of_sharding, is_of_users
from cce_dist.heads.lazy import MaterializedLogitsWarning, make_lazy
from cce_dist.heads.owner import ModuleOwner
from cce_dist.transformers import patch

EXACT = CCEConfig(gradient="exact", materialize="raise")


def _halve(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return args[0] / 2


def _scale(module: nn.Module, args: Any, output: Any) -> Any:
    return torch.tanh(output * 1.5)


def _add_hooks(head: nn.Module) -> None:
    head.register_forward_pre_hook(_halve)
    head.register_forward_hook(_scale)


def _all_hooks(head: nn.Module) -> list[Any]:
    return [*head._forward_pre_hooks.values(), *head._forward_hooks.values()]


def _fsdp2(patched: bool) -> tuple[list[float], list[bool]]:
    """Losses of two steps, the head in a group of its own; which of its hooks are FSDP's."""
    model = architectures.build("llama")
    fully_shard(model.lm_head)
    fully_shard(model)
    are_fsdps = [is_of_sharding(hook) for hook in _all_hooks(model.lm_head)]
    if patched:
        patch(model, EXACT)
    _add_hooks(model.lm_head)
    assert [is_of_users(hook) for hook in _all_hooks(model.lm_head)].count(True) == 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batch = {key: x[dist.get_rank()][None] for key, x in architectures.batch().items()}
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, are_fsdps


def test_hooks_of_users_count_beside_those_of_fsdp2(ranks: RankPool) -> None:
    for ours, stock in zip(ranks.run(2, _fsdp2, True), ranks.run(2, _fsdp2, False), strict=True):
        assert ours[0] == pytest.approx(stock[0], rel=1e-5)
        assert ours[1] == [True, True]


def _real_logits_under_fsdp2(patched: bool) -> list[Tensor]:
    """The loss of an entropy, and the gradient of this rank's rows."""
    model = architectures.build("llama")
    fully_shard(model)
    if patched:
        patch(model, gradient="exact")
    _add_hooks(model.lm_head)
    logits = model(architectures.batch()["input_ids"][dist.get_rank()][None]).logits
    if patched:
        with pytest.warns(MaterializedLogitsWarning, match="softmax"):
            p = logits.softmax(-1)
    else:
        p = logits.softmax(-1)
    loss = -(p * p.log()).sum(-1).mean()
    loss.backward()
    return [loss.detach(), model.lm_head.weight.grad.to_local()]


def test_real_logits_under_fsdp2_are_those_of_the_hooked_call(ranks: RankPool) -> None:
    ours, stock = (ranks.run(2, _real_logits_under_fsdp2, patched) for patched in (True, False))
    for got, wanted in zip(ours, stock, strict=True):
        for x, y in zip(got, wanted, strict=True):
            assert (x - y).norm() <= 1e-5 * y.norm()


def _computed_weights() -> list[str]:
    """What a sharded head says to a weight that is computed for each call."""
    texts = []
    for change in (
        lambda head: parametrize.register_parametrization(head, "weight", nn.Identity()),
        lambda head: prune.identity(head, "weight"),
    ):
        model = architectures.build("llama")
        fully_shard(model)
        patch(model, EXACT)
        change(model.lm_head)
        try:
            model(**architectures.batch())
        except RuntimeError as error:
            texts.append(str(error))
    return texts


def test_a_weight_that_is_computed_for_each_call_is_refused_where_rows_are_sharded(ranks: RankPool) -> None:
    for texts in ranks.run(2, _computed_weights):
        assert len(texts) == 2
        assert all("parametrization" in text and "FSDPOwner" in text for text in texts)


def _zero3_head_hooks() -> tuple[list[float], list[float], int, bool]:
    """Losses of four micro-steps (two optimizer steps) through the engine and of one process."""
    from deepspeed_runs import ACCUMULATION, ADAMW, CLIP, Case, make_batch, make_engine, make_model, take_steps

    case, rank = Case(), dist.get_rank()
    engine = make_engine(case)
    head = engine.module.get_output_embeddings()
    of_zero3, all_are = len(_all_hooks(head)), all(map(is_of_sharding, _all_hooks(head)))
    _add_hooks(head)
    losses = take_steps(engine, case, range(2 * ACCUMULATION))
    model, plain = make_model(case), []
    _add_hooks(model.get_output_embeddings())
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for micro_step in range(2 * ACCUMULATION):
        of_ranks = [model(**make_batch(case, micro_step, r)) for r in range(dist.get_world_size())]
        (torch.stack(of_ranks).mean() / ACCUMULATION).backward()
        plain.append(of_ranks[rank].item())
        if micro_step % ACCUMULATION:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return losses, plain, of_zero3, all_are


def test_hooks_of_users_count_beside_those_of_zero3(ranks: RankPool) -> None:
    pytest.importorskip("deepspeed")
    for losses, plain, of_zero3, all_are in ranks.run(2, _zero3_head_hooks, timeout=120):
        assert losses == pytest.approx(plain, rel=1e-5)
        assert of_zero3 >= 4  # gather before and let go after, in forward and in backward
        assert all_are


def test_a_torch_that_keeps_hooks_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.modules.module, "_global_forward_hooks")
    head = nn.Linear(3, 5)
    with pytest.raises(RuntimeError, match="_global_forward_hooks are not there"):
        make_lazy(head, ModuleOwner(head), EXACT)
    assert type(head) is nn.Linear


def test_hooks_run_in_training_and_in_evaluation() -> None:
    model, stock = patch(architectures.build("llama"), EXACT), architectures.build("llama")
    for m in (model, stock):
        _add_hooks(output_layer(m))
    losses = [m(**architectures.batch()).loss for m in (model, stock)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    with torch.no_grad():
        assert torch.equal(*(m.eval()(**architectures.batch()).logits for m in (model, stock)))
