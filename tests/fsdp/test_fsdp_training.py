"""FSDP2 training with a vocabulary-sharded head against the plain model in a single process."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_runs import (
    EXACT,
    HIDDEN,
    SLOW_START,
    STEPS,
    Case,
    LargestTensor,
    Record,
    assert_equal,
    batch,
    build,
    by_reader,
    finish_step,
    full_weights,
    losses_of,
    mesh_of,
    reader,
    shard_model,
    train_plain,
)
from ranks import RankPool
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from cce_dist.fsdp import adopt, private


def _train_sharded(case: Case) -> Record:
    model, rank = build(case), reader(case)
    shard_model(model, case, mesh_of(case))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=case.fused, foreach=not case.fused)
    record = Record([], [], {})
    for step in range(STEPS):
        own = 0.0
        for micro in range(case.micro_batches):
            if not case.sync_every_micro_batch:
                assert isinstance(model, FSDPModule)
                model.set_requires_gradient_sync(micro == case.micro_batches - 1)
            loss = losses_of(model, case, step, micro, rank)
            (loss * case.cp).backward()  # FSDP's average is over the slices too
            own += float(loss.detach())
        record.losses.append(by_reader(own, case))
        record.norms.append(finish_step(model, optimizer))
    record.weights = full_weights(model)
    return record


FAST = [
    (4, Case(tp=2, divide_factor=1.0)),
    (4, Case(tp=2, tied=True, vocab=5, micro_batches=2)),
    (4, Case(tp=2, entry="adopt", head_in_plan=True, sequence="gathered")),
    (4, Case(tp=2, sequence="own", micro_batches=2, sync_every_micro_batch=False)),
    (4, Case(vocab_parallel=2, losses_per_backward=2)),
    (4, Case(model="gemma", tied=True, entry="adopt", vocab_parallel=2, micro_batches=2)),
    (4, Case(cp=2)),
    (2, Case(model="llama")),
    (4, Case(entry="after", micro_batches=2, sync_every_micro_batch=False)),
    (4, Case(model="llama", mesh=(2, 2), entry="adopt, norm and head", micro_batches=2)),
    (4, Case(model="gemma", tied=True, losses_per_backward=2)),
    (4, Case(vocab=5, tied=True, mesh=(2, 2), entry="adopt")),
    (2, Case(entry="between", divide_factor=1.0)),
    (2, Case(entry="adopt, norm and head", losses_per_backward=2)),
    (4, Case(tp=2, frequent=20, micro_batches=2)),
    (4, Case(mesh=(2, 2), entry="adopt", frequent=60, losses_per_backward=2)),
    (2, Case(of_logprobs=True, losses_per_backward=2)),
    (4, Case(of_logprobs=True, tp=2, tied=True)),
    (2, Case(past_head=True)),
    (4, Case(past_head=True, tied=True, entry="adopt", mesh=(2, 2), losses_per_backward=2)),
    (4, Case(past_head=True, tp=2, losses_per_backward=2)),
]
FULL = [
    (4, Case(of_logprobs=True, vocab=5, mesh=(2, 2), entry="adopt", micro_batches=2)),
    (4, Case(of_logprobs=True, cp=2, vocab_parallel=2)),
    (2, Case(past_head=True, entry="adopt, norm and head", divide_factor=1.0, micro_batches=2)),
    (4, Case(past_head=True, vocab_parallel=2, vocab=5, losses_per_backward=2)),
    (2, Case(past_head=True, entry="adopt, own group", offload=True)),
    (4, Case(past_head=True, tp=2, sequence="own")),
    (4, Case(vocab=5, frequent=3)),
    (4, Case(vocab_parallel=2, frequent=20, micro_batches=2, sync_every_micro_batch=False)),
    (4, Case(cp=2, frequent=200)),
    (4, Case(tp=2, sequence="own", vocab_parallel=2, frequent=30)),
    (2, Case(entry="adopt, own group", offload=True, frequent=30)),
    (2, Case(tp=2)),  # one shard
    (4, Case(tp=4, vocab=5)),
    (4, Case(tp=2, mesh=(2, 1), entry="before")),  # replicas of one shard
    (4, Case(tp=2, mesh=(1, 2), entry="adopt", head_in_plan=True)),
    (4, Case(tp=2, entry="after", head_in_plan=True, losses_per_backward=2)),
    (4, Case(tp=2, entry="between", head_in_plan=True, vocab_parallel=2)),
    (4, Case(tp=2, vocab_parallel=2, tied=True, micro_batches=2, sync_every_micro_batch=False)),
    (4, Case(tp=2, sequence="own", vocab_parallel=2, entry="adopt", head_in_plan=True)),
    (4, Case(tp=2, sequence="gathered", fused=True)),
    (4, Case(vocab_parallel=1, vocab=5)),
    (2, Case(vocab_parallel=1, tied=True)),
    (4, Case(vocab_parallel=2, vocab=5, divide_factor=1.0)),
    (4, Case(mesh=(2, 2), vocab_parallel=1, micro_batches=2, sync_every_micro_batch=False)),
    (4, Case(mesh=(1, 4), vocab_parallel=2, tied=True, entry="after")),
    (4, Case(vocab_parallel=2, offload=True, entry="adopt, own group")),
    (4, Case(cp=4, tied=True, micro_batches=2)),
    (4, Case(cp=2, mesh=(2, 2), entry="adopt", vocab_parallel=1)),
    (2, Case(fused=True)),
    (4, Case(fused=True, mesh=(2, 2), entry="adopt", micro_batches=2, sync_every_micro_batch=False)),
    (4, Case(vocab=5)),  # 2, 2, 1 and 0 rows
    (2, Case(vocab=5, entry="adopt", micro_batches=2, sync_every_micro_batch=False)),
    (4, Case(mesh=(2, 2), micro_batches=2, sync_every_micro_batch=False, losses_per_backward=2)),
    (4, Case(mesh=(2, 2), entry="adopt", divide_factor=1.0)),
    (4, Case(model="llama", tied=True, entry="adopt, tied group", losses_per_backward=2)),
    (4, Case(model="llama", tied=True, entry="after", mesh=(2, 2))),
    (2, Case(model="gemma", tied=True, entry="adopt, tied group", micro_batches=2)),
    (3, Case(model="llama", entry="adopt, own group", micro_batches=3)),
    (1, Case(model="llama", tied=True)),
    (2, Case(entry="adopt, own group", offload=True)),
]


@pytest.mark.parametrize(
    ("world", "case"),
    [pytest.param(world, case, id=f"{world} ranks,{case}") for world, case in FAST]
    + [pytest.param(world, case, id=f"{world} ranks,{case}", marks=pytest.mark.full) for world, case in FULL],
)
def test_clipped_adamw_steps_equal_the_plain_model(ranks: RankPool, world: int, case: Case) -> None:
    expected = train_plain(case, world)
    for record in ranks.run(world, _train_sharded, case, timeout=SLOW_START):
        assert_equal(record, expected)


def _largest_tensor(case: Case) -> int:
    model = build(case)
    shard_model(model, case, mesh_of(case))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = LargestTensor()
    for step in range(2):
        with watch:
            losses_of(model, case, step, 0, reader(case)).backward()
            finish_step(model, optimizer)
    assert private.holding_group(model, model.lm_head) is None or case.entry == "stock"  # type: ignore[arg-type]
    return watch.elements


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, 1 / 2),
        ({"entry": "adopt"}, 1 / 2),
        ({"tp": 2}, 1 / 2),
        ({"vocab_parallel": 2}, 2 / 3),  # half of the rows, by its own choice
    ],
    ids=str,
)
def test_no_rank_ever_holds_the_classifier_in_training(
    ranks: RankPool, changes: dict[str, Any], share: float, tied: bool
) -> None:
    # Untied, FSDP gathers the embedding: that one has few rows here.
    vocab = 4001
    case = Case(vocab=vocab, tied=tied, input_vocab=vocab if tied else 50, **changes)
    assert max(ranks.run(4, _largest_tensor, case)) < vocab * HIDDEN * share


def test_the_watch_sees_the_classifier_of_stock_fsdp(ranks: RankPool) -> None:
    assert max(ranks.run(2, _largest_tensor, Case(vocab=4001, input_vocab=50, entry="stock"))) >= 4001 * HIDDEN


def _adopted_late(case: Case) -> Record:
    """A step of stock FSDP2 and an evaluation, then the head is adopted."""
    model, rank = build(case), dist.get_rank()
    shard_model(model, replace(case, entry="stock"), mesh_of(case))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    record = Record([], [], {})
    for step in range(STEPS):
        if step == 1:
            with torch.no_grad():
                model(batch(case, step, 0, rank)[0])
            adopt(model, config=EXACT)
        loss = losses_of(model, case, step, 0, rank)
        loss.backward()
        record.losses.append(by_reader(float(loss.detach()), case))
        record.norms.append(finish_step(model, optimizer))
    record.weights = full_weights(model)
    return record


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_can_be_adopted_in_the_middle_of_a_run(ranks: RankPool, tied: bool) -> None:
    case = Case(tied=tied)
    expected = train_plain(case, 2)
    for record in ranks.run(2, _adopted_late, case):
        assert_equal(record, expected)


def _mixed_precision(case: Case) -> list[float]:
    """Relative distance of our bf16 run's weights, and of stock FSDP2's, from fp32 weights after the same steps."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    finals = []
    for entry, settings in ((case.entry, {"mp_policy": policy}), ("stock", {"mp_policy": policy}), ("stock", {})):
        model = build(case)
        shard_model(model, replace(case, entry=entry), mesh_of(case), **settings)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for step in range(3):
            for micro in range(2):
                assert isinstance(model, FSDPModule)
                model.set_requires_gradient_sync(micro == 1)
                losses_of(model, case, step, micro, reader(case)).backward()
            finish_step(model, optimizer)
        finals.append(torch.cat([w.flatten() for w in full_weights(model).values()]))
    return [float((final - finals[2]).norm() / finals[2].norm()) for final in finals[:2]]


@pytest.mark.parametrize(
    "case",
    [
        Case(entry="before"),
        Case(entry="adopt, own group"),
        Case(tied=True, entry="adopt"),
        Case(tied=True, vocab_parallel=1),
        Case(tp=2, head_in_plan=True, entry="adopt"),
    ],
    ids=str,
)
def test_mixed_precision_is_as_close_to_fp32_as_stock_fsdp(ranks: RankPool, case: Case) -> None:
    for ours, stock in ranks.run(2, _mixed_precision, case):
        assert 0 < ours < 1.5 * stock
