"""What shard_head and adopt leave behind, and what they refuse, by name and on every rank."""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_runs import EXACT, HIDDEN, Case, PlainLM, build, mesh_of, shard_model
from ranks import RankPool
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    RowwiseParallel,
    parallelize_module,
)

from cce_dist.config import CCEConfig
from cce_dist.fsdp import adopt, private, shard_head


def _what_entering_leaves_behind(entry: str) -> tuple[bool, list[str]]:
    """Whether random numbers go on as if nothing had been, and what was logged."""
    model, mesh, case = build(Case()), mesh_of(Case()), Case(entry=entry)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("cce_dist").addHandler(handler)
    before = torch.random.get_rng_state(), random.getstate()
    shard_model(model, case, mesh)
    same = torch.equal(torch.random.get_rng_state(), before[0]) and random.getstate() == before[1]
    logging.getLogger("cce_dist").removeHandler(handler)
    return same, lines


@pytest.mark.parametrize("entry", ["before", "adopt"])
def test_sharding_takes_no_random_numbers_and_says_once_that_it_is_active(ranks: RankPool, entry: str) -> None:
    (same, lines), (others_same, others_lines) = ranks.run(2, _what_entering_leaves_behind, entry)
    assert same and others_same
    assert others_lines == []
    assert lines == [
        "cce_dist is active: FSDP2, gradient=exact, 103 vocabulary rows over 2 rank(s), 52 of them on this one"
    ]


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def _refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))

    def plain(**changes: Any) -> nn.Module:
        model = PlainLM(11, tied=False)
        for name, module in changes.items():
            setattr(model, name, module)
        return model

    def twice() -> None:
        model = plain()
        shard_head(model, mesh)
        shard_head(model, mesh)

    def shared_with_a_linear() -> None:
        model = plain(norm=nn.Linear(HIDDEN, 11))
        model.norm.weight = model.lm_head.weight  # type: ignore[union-attr]
        shard_head(model, mesh)

    def column_parallel() -> None:
        model = plain()
        weight = distribute_tensor(model.lm_head.weight, mesh, [Shard(1)])  # type: ignore[union-attr,arg-type]
        model.lm_head.weight = nn.Parameter(weight)  # type: ignore[union-attr]
        adopt(model)

    def unmanaged() -> None:
        model = plain()
        weight = distribute_tensor(model.lm_head.weight, mesh, [Shard(0)])  # type: ignore[union-attr,arg-type]
        model.lm_head.weight = nn.Parameter(weight)  # type: ignore[union-attr]
        adopt(model)

    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", "tp"))

    def replicated_over_tp() -> None:
        model = plain()
        distribute_module(model.lm_head, both["tp"])  # type: ignore[arg-type]
        fully_shard(model, mesh=both["shard"])
        adopt(model)

    def tied_embedding_in_the_plan() -> None:
        model = PlainLM(11, tied=True)
        parallelize_module(model, both["tp"], {"embed": RowwiseParallel(input_layouts=Replicate())})
        model.lm_head.weight = model.embed.weight
        shard_head(model, both["shard"], tp=both["tp"])

    attempts: list[Callable[[], None]] = [
        lambda: shard_head(plain(), both["shard"], tp=both),
        lambda: shard_head(plain(), both["shard"], sequence_parallel=True),
        lambda: shard_head(PlainLM(11, tied=True), both["shard"], tp=both["tp"], sequence_parallel=True),
        replicated_over_tp,
        tied_embedding_in_the_plan,
        lambda: shard_head(plain(), both["shard"], tp=both["tp"], config=CCEConfig(vocab_parallel_size=1)),
        lambda: shard_head(nn.Sequential(nn.Linear(2, 2)), mesh),
        lambda: shard_head(plain(lm_head=ScaledLinear(HIDDEN, 11)), mesh),
        lambda: shard_head(plain(), mesh, head=nn.Linear(HIDDEN, 11)),
        lambda: shard_head(plain(), mesh, vocab_parallel_size=3),
        lambda: shard_head(plain(), mesh, gradeint="exact"),
        lambda: shard_head(plain(), mesh, config={"gradient": "exact"}),  # type: ignore[arg-type]
        lambda: shard_head(plain(), "mesh"),  # type: ignore[arg-type]
        lambda: adopt(plain(), config=CCEConfig(), tail=False),
        lambda: adopt(plain()),
        twice,
        shared_with_a_linear,
        column_parallel,
        unmanaged,
    ]
    texts = []
    for attempt in attempts:
        with pytest.raises((TypeError, ValueError)) as caught:
            attempt()
        texts.append(str(caught.value))
    return texts


def test_what_is_not_supported_is_refused_by_name(ranks: RankPool) -> None:
    parts = [
        "mesh['tp']",
        "pass tp",
        "untie",
        "replicates",
        "leave the embedding",
        "vocab_parallel_size must be 2, got 1",
        "head=",
        "ScaledLinear",
        "submodule",
        "vocab_parallel_size must be 1 or 2, got 3",
        "gradeint: unknown key",
        "config of shard_head must be a CCEConfig or None, got dict",
        "mesh of shard_head must be a DeviceMesh, got str",
        "adopt takes config or settings by keyword, not both; got config and tail",
        "prepare",
        "before",
        "Linear",
        "Shard(dim=1)",
        "fully_shard",
    ]
    for texts in ranks.run(2, _refusals):
        for text, part in zip(texts, parts, strict=True):
            assert part in text


def _over_all_dimensions() -> str:
    from torch.distributed.fsdp import DataParallelMeshDims

    mesh, model = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)), PlainLM(11, tied=False)
    distribute_module(model, mesh)
    fully_shard(model, mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard="dp"))
    with pytest.raises(ValueError, match="partial_dtensor") as caught:
        adopt(model)
    return str(caught.value)


@pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, "DataParallelMeshDims"), reason="a torch without dp_mesh_dims of fully_shard"
)
def test_a_mesh_of_all_parallelism_is_refused_by_name(ranks: RankPool) -> None:
    for text in ranks.run(2, _over_all_dimensions):
        assert "dp_mesh_dims" in text


def _ranks_apart(unequal_groups: bool) -> str:
    """What shard_head says on an HSDP mesh where rank 0 is in a group more, or has another setting."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    size = None
    if dist.get_rank() == 0 and unequal_groups:
        dist.new_group([0], use_local_synchronization=True)
    elif dist.get_rank() == 0:
        size = 1
    with pytest.raises(RuntimeError) as caught:
        shard_head(PlainLM(11, tied=False), mesh, config=EXACT.model_copy(update={"vocab_parallel_size": size}))
    return str(caught.value)


def test_ranks_in_unequal_numbers_of_groups_are_told_and_do_not_wait(ranks: RankPool) -> None:
    for text in ranks.run(4, _ranks_apart, True):
        assert "process groups" in text


def test_ranks_with_unequal_settings_are_told_and_do_not_wait(ranks: RankPool) -> None:
    for text in ranks.run(4, _ranks_apart, False):
        assert "do not agree" in text


@contextmanager
def _torch_that_moved_the_state() -> Iterator[None]:
    stock = private._holders
    private._holders = lambda fsdp_param: fsdp_param._renamed  # type: ignore[assignment]
    try:
        yield
    finally:
        private._holders = stock


def _unknown_torch() -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = PlainLM(11, tied=False)
    with _torch_that_moved_the_state(), pytest.raises(RuntimeError) as caught:
        shard_head(model, mesh)
    assert not isinstance(model.lm_head.weight, DTensor)
    return str(caught.value)


def test_a_torch_with_another_fsdp_is_refused_before_anything_changes(ranks: RankPool) -> None:
    for text in ranks.run(2, _unknown_torch):
        assert torch.__version__ in text


def test_a_disabled_config_leaves_the_model_alone(ranks: RankPool) -> None:
    assert ranks.run(1, _disabled) == [nn.Linear]


def _disabled() -> type:
    model = PlainLM(11, tied=False)
    shard_head(model, init_device_mesh("cpu", (1,)), config=CCEConfig(enabled=False))
    return type(model.lm_head)


def _sequence_parallel_refusal() -> str:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    head = nn.Linear(8, 20, bias=False)
    model = nn.Sequential(nn.Linear(8, 8), head)
    model.lm_head = head
    shard_head(model, mesh["dp"], tp=mesh["tp"], sequence_parallel=True, head=head)
    hidden = DTensor.from_local(torch.randn(2, 3, 8), mesh["tp"], [Replicate()], run_check=False)
    with pytest.raises(ValueError, match="every rank of tp would count the same tokens") as error:
        head(hidden)
    return str(error.value)


def test_replicated_hidden_states_of_a_sequence_parallel_head_are_refused(ranks: RankPool) -> None:
    """Counted by each rank of tp as its own, they would make the gradient as many times too large."""
    for text in ranks.run(2, _sequence_parallel_refusal):
        assert "sequence_parallel=True" in text
