"""Checkpoints, state dicts and models on the meta device, with a head that FSDP2 shards."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsdp_runs import (
    SLOW_START,
    Case,
    build,
    finish_step,
    full_weights,
    losses_of,
    mesh_of,
    model_of,
    reader,
    shard_model,
    train_plain,
)
from ranks import RankPool, device
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)


def _steps_between_checkpoints(case: Case, read: str, write: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was read from one folder, if given, and what is written into another after an optimizer step."""
    torch.manual_seed(dist.get_world_size())
    model = build(case)
    shard_model(model, case, mesh_of(case))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loaded = {}
    if read:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=read)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        loaded = full_weights(model) | _full_moments(model, optimizer)
    losses_of(model, case, 0, 0, reader(case)).backward()
    finish_step(model, optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=write)
    return loaded, full_weights(model) | _full_moments(model, optimizer)


def _full_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name} moment": optimizer.state[p]["exp_avg"].full_tensor().clone() for name, p in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("four", "two", "four_again"),
    [
        (Case(model="llama"), Case(model="llama", entry="adopt"), Case(model="llama", entry="stock")),
        (
            Case(model="llama", tied=True, mesh=(2, 2)),
            Case(model="llama", tied=True, entry="after"),
            Case(model="llama", tied=True, vocab_parallel=2),
        ),
        (Case(entry="stock"), Case(vocab_parallel=1), Case(tp=2)),
        (Case(tp=2, entry="adopt", head_in_plan=True), Case(tp=2), Case(mesh=(2, 2), vocab_parallel=1)),
    ],
    ids=str,
)
def test_checkpoints_go_from_four_ranks_to_two_and_back_to_four(
    ranks: RankPool, tmp_path: Path, four: Case, two: Case, four_again: Case
) -> None:
    folders = [str(tmp_path / name) for name in ("four", "two", "four_again")]
    runs = [(4, four, "", folders[0]), (2, two, folders[0], folders[1]), (4, four_again, folders[1], folders[2])]
    written: dict[str, Tensor] = {}
    for world, *arguments in runs:
        results = ranks.run(world, _steps_between_checkpoints, *arguments, timeout=SLOW_START)
        for loaded, _ in results:
            assert loaded.keys() == written.keys()
            for name, value in written.items():
                assert torch.equal(loaded[name], value), name
        written = results[0][1]


def _pretrained(case: Case, read: str, write: str) -> bool:
    """A model from the folder that `save_pretrained` wrote, sharded, and written as it would have been unsharded."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(read)
    shard_model(model, case, mesh_of(case))
    losses_of(model, case, 0, 0, dist.get_rank()).backward()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    expected = set(build(case).state_dict()) if dist.get_rank() == 0 else set()
    as_expected = set(state) == expected
    if dist.get_rank() == 0:
        AutoModelForCausalLM.from_config(model.config).save_pretrained(write, state_dict=state)
    return as_expected


@pytest.mark.parametrize("tied", [False, True])
def test_from_pretrained_reads_what_was_written_and_the_other_way_round(
    ranks: RankPool, tmp_path: Path, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    case = Case(model="llama", tied=tied, mesh=(2, 2), vocab_parallel=1)
    plain: Any = build(case)
    plain.save_pretrained(tmp_path / "plain")
    arguments = (case, str(tmp_path / "plain"), str(tmp_path / "ours"))
    assert all(ranks.run(4, _pretrained, *arguments, timeout=SLOW_START))
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert read.keys() == plain.state_dict().keys()
    assert all(torch.equal(read[name], value) for name, value in plain.state_dict().items())


def _full_state(case: Case) -> bool:
    model = build(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    shard_model(model, case, mesh_of(case))
    _load_full(model, case)
    losses_of(model, case, 0, 0, dist.get_rank()).backward()
    written = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    expected = build(case).state_dict()
    return written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in expected)


def _load_full(model: nn.Module, case: Case) -> None:
    """The plain model's state dict from rank 0, as after `from_pretrained` there."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, build(case).state_dict() if dist.get_rank() == 0 else {}, options=options)


@pytest.mark.parametrize("entry", ["before", "adopt"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_full_state_dict_is_that_of_the_plain_model(ranks: RankPool, entry: str, tied: bool) -> None:
    assert all(ranks.run(2, _full_state, Case(model="llama", tied=tied, entry=entry), timeout=SLOW_START))


def _meta(case: Case) -> tuple[bool, float]:
    with torch.device("meta"):
        model = model_of(case)
    shard_model(model, case, mesh_of(case))
    on_meta = all(p.is_meta for p in model.parameters())
    model.to_empty(device=device())
    _load_full(model, case)
    return on_meta, float(losses_of(model, case, 0, 0, reader(case)))


@pytest.mark.parametrize(
    ("world", "case"), [(2, Case()), (2, Case(tied=True)), (4, Case(tp=2)), (4, Case(vocab_parallel=2))], ids=str
)
def test_a_model_built_on_the_meta_device_trains_after_loading(ranks: RankPool, world: int, case: Case) -> None:
    expected = train_plain(case, world).losses[0]
    for rank, (on_meta, loss) in enumerate(ranks.run(world, _meta, case)):
        assert on_meta and abs(loss / expected[rank // case.tp] - 1) < 1e-5


def _saved_and_copied(case: Case) -> list[str]:
    """What saving and copying the sharded modules says; the state dict is saved and read again."""
    model = build(case)
    shard_model(model, case, mesh_of(case))
    losses_of(model, case, 0, 0, reader(case)).backward()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    for name, value in torch.load(file, weights_only=False).items():
        assert torch.equal(value.to_local(), model.state_dict()[name].to_local()), name
    texts = []
    with pytest.raises(TypeError, match="cannot be copied") as caught:
        copy.deepcopy(model.lm_head)
    texts.append(str(caught.value))
    for module in (model.lm_head, model.embed) if case.tied else (model.lm_head,):
        with pytest.raises(TypeError, match="neither be pickled") as caught:
            torch.save(module, io.BytesIO())
        texts.append(str(caught.value))
    return texts


@pytest.mark.parametrize("case", [Case(), Case(tied=True)], ids=str)
def test_state_dicts_can_be_saved_and_modules_say_that_they_cannot(ranks: RankPool, case: Case) -> None:
    for texts in ranks.run(2, _saved_and_copied, case):
        assert len(texts) == 2 + case.tied and all("before" in text for text in texts)
