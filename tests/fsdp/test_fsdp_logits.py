"""Real logits and the weight itself, where something wants them of a head that FSDP2 shards."""

import copy
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_runs import (
    EXACT,
    HIDDEN,
    SLOW_START,
    Case,
    LargestTensor,
    PlainLM,
    batch,
    build,
    by_reader,
    finish_step,
    loss_of,
    losses_of,
    mesh_of,
    reader,
    shard_model,
    slice_of,
)
from ranks import RankPool, device
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from cce_dist.fsdp import shard_head


def _evaluate(case: Case) -> dict[str, Any]:
    model = build(case)
    plain = copy.deepcopy(model).eval()
    shard_model(model, case, mesh_of(case))
    ids, labels = batch(case, 0, 0, reader(case))
    prompt = ids[:, :3]
    model.eval()
    with torch.no_grad():
        logits, expected = _logits(model, ids), _logits(plain, ids)
    if case.sequence == "own":
        expected = slice_of(expected, case.tp)
    same_tokens = True
    if not isinstance(model, PlainLM):
        tokens = model.generate(prompt, max_new_tokens=4, do_sample=False, synced_gpus=True)  # type: ignore[operator]
        same_tokens = torch.equal(tokens, plain.generate(prompt, max_new_tokens=4, do_sample=False))  # type: ignore[operator]
    whole = replace(case, sequence="gathered" if case.sequence else "")
    expected_loss = float(loss_of(plain, whole, ids, labels))
    model.train()
    loss = loss_of(model, case, ids, labels)
    loss.backward()
    whole_loss = by_reader(float(loss.detach()), case)[reader(case)]
    return {
        "logits": float((logits - expected).norm() / expected.norm()),
        "tokens": same_tokens,
        "loss": abs(whole_loss / expected_loss - 1),
    }


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids) if isinstance(model, PlainLM) else model(input_ids=ids).logits


@pytest.mark.parametrize(
    ("world", "case"),
    [
        (2, Case(model="llama")),
        (4, Case(model="llama", tied=True, mesh=(2, 2), entry="adopt, tied group")),
        (4, Case(model="llama", tied=True, entry="adopt", vocab_parallel=2)),
        (4, Case(tp=2)),
        (4, Case(tp=2, entry="adopt", head_in_plan=True, sequence="gathered")),
        (4, Case(tp=2, sequence="own")),
        pytest.param(4, Case(model="gemma", tied=True, entry="after"), marks=pytest.mark.full),
        pytest.param(2, Case(model="llama", entry="adopt, norm and head"), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_evaluation_and_generation_are_those_of_the_plain_model_and_training_goes_on(
    ranks: RankPool, world: int, case: Case
) -> None:
    for result in ranks.run(world, _evaluate, case, timeout=SLOW_START):
        assert result["tokens"] and result["logits"] < 1e-6 and result["loss"] < 1e-5


def _real_logits_norms(case: Case) -> list[tuple[float, float]]:
    """Gradient norms, ours and the plain model's, of a loss that also needs real logits in training."""

    def loss(model: nn.Module, case: Case, step: int, rank: int) -> Tensor:
        entropy = torch.logsumexp(model(batch(case, step, 0, rank)[0]), dim=-1).sum()
        return entropy + losses_of(model, case, step, 1, rank)

    model, plain, rank, readers = build(case), build(case), reader(case), dist.get_world_size() // case.tp
    shard_model(model, case, mesh_of(case), case.config.model_copy(update={"materialize": "warn"}))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, plain)]
    norms = []
    whole = replace(case, sequence="gathered" if case.sequence else "")
    for step in range(2):
        loss(model, case, step, rank).backward()
        for other in range(readers):
            (loss(plain, whole, step, other) / readers).backward()
        norms.append((finish_step(model, optimizers[0]), finish_step(plain, optimizers[1])))
    return norms


@pytest.mark.filterwarnings("ignore::cce_dist.heads.lazy.MaterializedLogitsWarning")
@pytest.mark.parametrize(
    ("world", "case"),
    [
        (2, Case()),
        (2, Case(entry="adopt, norm and head")),
        (4, Case(tied=True, mesh=(2, 2), entry="adopt")),
        (4, Case(vocab_parallel=2)),
        (4, Case(tp=2, tied=True)),
        (4, Case(tp=2, sequence="own")),
    ],
    ids=str,
)
def test_real_logits_in_training_have_the_gradient_of_the_plain_model(ranks: RankPool, world: int, case: Case) -> None:
    for norms in ranks.run(world, _real_logits_norms, case):
        for ours, plain in norms:
            assert abs(ours / plain - 1) < 1e-5


def _logits_on_one_rank(alone: int) -> tuple[str, float]:
    """What a rank is told that wants real logits which no other wants, and after how many seconds."""
    group = dist.new_group(timeout=timedelta(seconds=3))
    model = PlainLM(103, tied=False).eval()
    shard_head(model, DeviceMesh.from_group(group, "cpu", mesh_dim_names=("shard",)), config=EXACT)
    hidden = torch.randn(2, 4, HIDDEN)
    with torch.no_grad():
        model.lm_head(hidden)
        if dist.get_rank() != alone:
            return "", 0.0
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="collective over ranks") as caught:
            model.lm_head(hidden)
    return str(caught.value), time.monotonic() - start


@pytest.mark.parametrize("alone", [0, 1])
def test_logits_that_one_rank_alone_wants_are_an_error_within_the_groups_timeout(ranks: RankPool, alone: int) -> None:
    text, seconds = ranks.run(2, _logits_on_one_rank, alone)[alone]
    assert "the logits of a classifier that FSDP2 shards are collective over ranks [0, 1]" in text
    assert ("from rank 1", "from rank 0")[alone] in text and 2 < seconds < 10


def _attributes_inside_a_forward(materialize: str) -> tuple[Any, ...]:
    """What code in the body sees of the head's weight, the largest tensor then, and what comes of computing with it."""
    case = Case(vocab=4001, input_vocab=50)
    model = build(case)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    shard_model(model, case, mesh_of(case), EXACT.model_copy(update={"materialize": materialize}), mp_policy=policy)
    seen: list[Any] = []

    def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        weight = model.lm_head.weight
        assert weight is model.lm_head.weight
        seen.append((weight.dtype, weight.shape, weight.device.type == device()))  # type: ignore[union-attr]

    model.norm.register_forward_pre_hook(read)
    watch = LargestTensor()
    with watch:
        losses_of(model, case, 0, 0, reader(case)).backward()
    assert isinstance(model.lm_head.weight, DTensor)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            losses_of(model, replace(case, past_head=True), 0, 0, reader(case)).backward()
            said = "; ".join(str(warning.message) for warning in caught)
            assert isinstance(model.lm_head.weight, DTensor)
        except RuntimeError as error:
            said = str(error)
    with torch.no_grad():
        whole = model(batch(case, 0, 0, 0)[0], past_head=True)
        real = model.eval()(batch(case, 0, 0, 0)[0])
    return *seen[0], watch.elements, said, float((whole - real).norm() / real.norm())


@pytest.mark.parametrize(("materialize", "says"), [("warn", "is gathered on every rank"), ("raise", "forbids")])
def test_reading_the_dtype_of_the_heads_weight_gathers_nothing_and_computing_with_it_says_so(
    ranks: RankPool, materialize: str, says: str
) -> None:
    for dtype, shape, beside_it, elements, said, error in ranks.run(2, _attributes_inside_a_forward, materialize):
        assert (dtype, shape, beside_it) == (torch.bfloat16, (4001, HIDDEN), True)
        assert elements < 0.6 * 4001 * HIDDEN
        assert says in said and "fsdp_runs.py" in said and error < 1e-6
