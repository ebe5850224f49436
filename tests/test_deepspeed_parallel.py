"""DeepSpeed: the classifier sharded over data-parallel ranks (stages 0 to 2), and over tensor-parallel ranks (all)."""

import copy
import io
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool, device
from torch import Tensor

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

from deepspeed_runs import (
    ACCUMULATION,
    EXACT,
    HIDDEN,
    STEPS,
    Case,
    assert_trains_as_one_process,
    data_rank,
    distance,
    fresh_deepspeed,
    make_batch,
    make_config,
    make_engine,
    make_model,
    measure_a_step,
    take_steps,
    train,
    train_plain,
    trained_parameters,
    weights_of,
)

import cce_dist.deepspeed as cce_deepspeed
from cce_dist.deepspeed import sharded
from cce_dist.deepspeed.zero3 import vocab_group_size


@pytest.fixture(scope="module", autouse=True)
def _leave_no_deepspeed_behind(ranks: RankPool) -> Iterator[None]:
    """ZeRO-3 patches torch in its process."""
    yield
    ranks.close()


def _sharded(size: int, **settings: Any) -> Case:
    return Case(section={**EXACT, "vocab_parallel_size": size}, **settings)


@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(2, _sharded(2, stage=0, evaluates=True), id="stage 0"),
        pytest.param(4, _sharded(2, stage=1, tied=True, two_losses=True, vocab_size=101), id="stage 1, 2 x 2, tied"),
        pytest.param(2, _sharded(2, stage=2, evaluates=True), id="stage 2"),
    ],
)
def test_a_classifier_sharded_over_data_parallel_ranks_trains_as_in_one_process(
    ranks: RankPool, world: int, case: Case
) -> None:
    assert_trains_as_one_process(ranks, world, case)


def _head_saved_and_copied() -> tuple[list[str], bool]:
    engine = make_engine(_sharded(2, stage=0))  # above, DeepSpeed's own attributes of a parameter cannot be pickled
    head, texts = engine.module.get_output_embeddings(), []
    for attempt in (lambda: torch.save(head, io.BytesIO()), lambda: copy.deepcopy(head)):
        with pytest.raises(TypeError, match="cannot be copied|neither be") as caught:
            attempt()
        texts.append(str(caught.value))
    file = io.BytesIO()
    torch.save(engine.module.state_dict(), file)
    file.seek(0)
    rows = torch.load(file, weights_only=True, map_location="cpu")["lm.lm_head.weight"]
    return texts, torch.equal(rows.chunk(2)[dist.get_rank()], head.weight.cpu())


def test_state_dicts_can_be_saved_and_a_cut_head_says_that_it_cannot(ranks: RankPool) -> None:
    for texts, same in ranks.run(2, _head_saved_and_copied, timeout=200):
        assert same and all("before its" in text for text in texts)


def _logits_on_one_rank() -> tuple[str, float]:
    """What rank 0 is told when it alone evaluates, and after how many seconds."""
    engine = make_engine(_sharded(2, stage=1))
    head = engine.module.get_output_embeddings().eval()
    owner = head.forward.__self__
    owner.shard = replace(owner.shard, vocab_group=dist.new_group(timeout=timedelta(seconds=3)))
    if dist.get_rank() > 0:
        return "", 0.0
    start = time.monotonic()
    with torch.no_grad(), pytest.raises(RuntimeError, match="collective over ranks") as caught:
        head(torch.randn(2, HIDDEN))
    return str(caught.value), time.monotonic() - start


def test_logits_that_one_rank_alone_wants_are_an_error_within_the_groups_timeout(ranks: RankPool) -> None:
    text, seconds = ranks.run(2, _logits_on_one_rank, timeout=200)[0]
    assert "the logits of a classifier that cce_dist shards" in text and "from rank 1" in text and 2 < seconds < 10


def _train_in_a_second_engine(case: Case) -> dict[str, Any]:
    """A run on a model that an engine has had before, whose steps are undone; and what other settings are told."""
    first = make_engine(case)
    model, start = first.module, make_model(case).state_dict()
    take_steps(first, case, range(2))
    first.destroy()
    model.load_state_dict(start)
    refusals = []
    for other in (
        replace(case, stage=3),
        replace(case, section=EXACT),
        replace(case, section={**EXACT, "vocab_parallel_size": 4}),
    ):
        with pytest.raises(ValueError, match="has cut this model's classifier over 2 ranks") as caught:
            cce_deepspeed.initialize(model=model, config=make_config(other))
        refusals.append(str(caught.value))
    what = {"model_parameters": trained_parameters(case, model)}
    engine = cce_deepspeed.initialize(model=model, config=make_config(case), **what)[0]
    losses = take_steps(engine, case, range(STEPS * ACCUMULATION))
    return {"losses": losses, "weights": weights_of(engine), "refusals": refusals}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(_sharded(2, stage=0, tied=True), id="stage 0"),
        pytest.param(_sharded(2, stage=2), id="stage 2"),
        pytest.param(_sharded(2, stage=1, tied=True, vocab_size=101), id="stage 1", marks=pytest.mark.full),
    ],
)
def test_a_second_engine_on_a_model_whose_classifier_was_cut_trains_as_in_one_process(
    ranks: RankPool, case: Case
) -> None:
    expected = train_plain(case, 2)
    for rank, got in enumerate(ranks.run(2, _train_in_a_second_engine, case, timeout=200)):
        assert got["losses"] == pytest.approx([step[rank] for step in expected["losses"]], rel=1e-5)
        assert distance(got["weights"], expected["weights"]) < 1e-5
        for text in got["refusals"]:
            assert "build the model anew" in text and "experts" not in text


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    ("world", "size", "settings"),
    [
        pytest.param(2, 2, {"tied": True, "two_losses": True, "evaluates": True}, id="tied, two losses"),
        pytest.param(4, 4, {"vocab_size": 101, "two_losses": True}, id="4 ranks, uneven"),
        pytest.param(4, 2, {"tied": True, "vocab_size": 101, "evaluates": True}, id="2 x 2 ranks, uneven, tied"),
        pytest.param(2, 2, {"biased": True, "vocab_size": 101}, id="classifier with a bias, uneven"),
        pytest.param(2, 2, {"trained": "layers"}, id="frozen classifier"),
    ],
)
def test_every_stage_trains_as_in_one_process(
    ranks: RankPool, stage: int, world: int, size: int, settings: dict[str, Any]
) -> None:
    assert_trains_as_one_process(ranks, world, _sharded(size, stage=stage, **settings))


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(_sharded(2, stage=2, zero={"overlap_comm": True}), id="overlap_comm"),
        pytest.param(
            _sharded(
                2,
                stage=2,
                tied=True,
                zero={"offload_optimizer": {"device": "cpu"}},
                config={"zero_force_ds_cpu_optimizer": False},
            ),
            id="optimizer on the host",
        ),
        pytest.param(_sharded(2, stage=1, groups="optimizer"), id="a client's optimizer with groups"),
        pytest.param(_sharded(2, stage=2, groups="model_parameters"), id="groups of parameters"),
        pytest.param(_sharded(2, stage=1, checkpoints=True, tied=True), id="reentrant activation checkpoints"),
    ],
)
def test_what_goes_with_a_sharded_classifier(ranks: RankPool, case: Case) -> None:
    assert_trains_as_one_process(ranks, 2, case)


@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(2, Case(tensor_parallel=2, stage=1, evaluates=True), id="AutoTP, stage 1"),
        pytest.param(4, Case(tensor_parallel=2, stage=3, vocab_size=101), id="AutoTP, stage 3, 2 x 2"),
        pytest.param(4, Case(tensor_parallel=2, stage=2, mpu=True, tied=True, two_losses=True), id="mpu, 2 x 2, tied"),
    ],
)
def test_a_classifier_sharded_over_tensor_parallel_ranks_trains_as_in_one_process(
    ranks: RankPool, world: int, case: Case
) -> None:
    assert_trains_as_one_process(ranks, world, case)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("world", "settings"),
    [
        pytest.param(4, {"two_losses": True, "evaluates": True}, id="AutoTP, 2 x 2"),
        pytest.param(2, {"tied": True, "vocab_size": 101}, id="AutoTP, tied, uneven"),
        pytest.param(4, {"mpu": True, "vocab_size": 101, "evaluates": True}, id="mpu, 2 x 2, uneven"),
        pytest.param(2, {"mpu": True, "tied": True}, id="mpu, tied"),
        pytest.param(4, {"mpu": True, "marked": True, "vocab_size": 101}, id="mpu, cut by the client, 2 x 2, uneven"),
    ],
)
def test_tensor_parallelism_trains_as_in_one_process_at_every_stage(
    ranks: RankPool, stage: int, world: int, settings: dict[str, Any]
) -> None:
    assert_trains_as_one_process(ranks, world, Case(stage=stage, tensor_parallel=2, **settings))


@pytest.mark.full
@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(4, _sharded(1, tensor_parallel=2, vocab_size=101), id="copies of the rows, AutoTP"),
        pytest.param(2, Case(tensor_parallel=2, zero_init=True), id="zero.Init, AutoTP"),
        pytest.param(
            2,
            Case(
                tensor_parallel=2,
                tied=True,
                zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
                config={"zero_force_ds_cpu_optimizer": False},
            ),
            id="optimizer and parameters on the host, AutoTP",
        ),
    ],
)
def test_what_goes_with_tensor_parallelism_at_stage_3(ranks: RankPool, world: int, case: Case) -> None:
    assert_trains_as_one_process(ranks, world, case)


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(_sharded(2, stage=2, config={"bf16": {"enabled": True}}), id="bf16, stage 2"),
        pytest.param(_sharded(2, stage=0, config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}), id="0"),
        pytest.param(_sharded(2, stage=1, config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}), id="1"),
        pytest.param(Case(stage=2, config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}), id="2, whole"),
        pytest.param(Case(tied=True, config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}), id="3, tied"),
        pytest.param(
            Case(stage=1, tensor_parallel=2, config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
            id="1, AutoTP",
        ),
    ],
)
def test_low_precision_follows_stock_deepspeed(ranks: RankPool, case: Case) -> None:
    got, expected = (ranks.run(2, train, c, timeout=200)[0] for c in (case, replace(case, section=None)))
    assert got["losses"] == pytest.approx(expected["losses"], rel=2e-3)
    if case.stage > 0:
        assert torch.allclose(torch.stack(got["norms"]), torch.stack(expected["norms"]), rtol=1e-2)


def _save_and_resume(case: Case, folder: str, others: list[Case]) -> dict[str, Any]:
    """Losses after a checkpoint: of the run that wrote it, and of each other engine that loads it."""
    engine = make_engine(case)
    take_steps(engine, case, range(2))
    engine.save_checkpoint(folder, tag="saved")
    seen: dict[str, Any] = {"weights": weights_of(engine), "went on": take_steps(engine, case, range(2, 6))}
    for index, other in enumerate(others):
        engine = make_engine(other)
        try:
            engine.load_checkpoint(folder, tag="saved")
        except ValueError as error:
            seen[f"error {index}"] = str(error)
            engine.load_checkpoint(folder, tag="saved", load_module_only=True)
            seen[f"module only {index}"] = weights_of(engine)
        else:
            seen[f"losses {index}"] = take_steps(engine, other, range(2, 6))
    return seen


@pytest.mark.full
@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(4, _sharded(2, stage=0, vocab_size=101, tied=True), id="stage 0, 2 x 2, tied"),
        pytest.param(2, _sharded(2, stage=1, biased=True), id="stage 1"),
        pytest.param(4, _sharded(2, stage=2, vocab_size=101, tied=True), id="stage 2, 2 x 2, tied"),
    ],
)
def test_a_checkpoint_of_a_sharded_classifier_holds_all_rows_and_resumes(
    ranks: RankPool, world: int, case: Case, tmp_path: Path
) -> None:
    others = [case, replace(case, section=None)] if case.stage == 0 else [case]
    for seen in ranks.run(world, _save_and_resume, case, str(tmp_path), others, timeout=200):
        assert seen["losses 0"] == pytest.approx(seen["went on"], rel=1e-6)
        if case.stage == 0:  # the same file as stock DeepSpeed's
            assert seen["losses 1"] == pytest.approx(seen["went on"], rel=1e-5)
        weights = seen["weights"]
    file = tmp_path / "saved" / "mp_rank_00_model_states.pt"
    module = torch.load(file, map_location="cpu", weights_only=False)["module"]
    for name, weight in weights.items():
        assert torch.equal(module[name].float(), weight)
    assert module["lm.lm_head.weight"].shape == (case.vocab_size, HIDDEN)


@pytest.mark.full
def test_zero_state_of_other_shards_is_refused_and_its_weights_can_be_loaded(ranks: RankPool, tmp_path: Path) -> None:
    case = _sharded(2, stage=2)
    for seen in ranks.run(4, _save_and_resume, case, str(tmp_path), [_sharded(4, stage=2)], timeout=200):
        assert "written with another vocab_parallel_size" in seen["error 0"]
        for name, weight in seen["weights"].items():
            assert torch.equal(seen["module only 0"][name], weight), name


def _load_a_stock_checkpoint(folder: str) -> list[list[float]]:
    stock, case = Case(stage=0, section=None), _sharded(2, stage=0)
    engine = make_engine(stock)
    take_steps(engine, stock, range(2))
    engine.save_checkpoint(folder, tag="saved")
    losses = [take_steps(engine, stock, range(2, 6))]
    engine = make_engine(case)
    engine.load_checkpoint(folder, tag="saved")
    return [*losses, take_steps(engine, case, range(2, 6))]


@pytest.mark.full
def test_a_stock_checkpoint_of_stage_0_resumes_with_a_sharded_classifier(ranks: RankPool, tmp_path: Path) -> None:
    for stock, ours in ranks.run(2, _load_a_stock_checkpoint, str(tmp_path), timeout=200):
        assert ours == pytest.approx(stock, rel=1e-5)


def _state_dict_on_rank_0() -> str:
    usual, sharded.SECONDS_TO_SAVE = sharded.SECONDS_TO_SAVE, 2
    engine = make_engine(_sharded(2, stage=1))
    sharded.SECONDS_TO_SAVE = usual
    if dist.get_rank() == 0:
        try:
            engine.module.state_dict()
        except RuntimeError as error:
            return str(error)
    return ""


def test_a_state_dict_that_only_one_rank_asks_for_is_an_error_not_a_hang(ranks: RankPool) -> None:
    assert "call them on every rank" in ranks.run(2, _state_dict_on_rank_0, timeout=200)[0]


def _generate(case: Case) -> Tensor:
    engine = make_engine(case)
    engine.eval()
    model = getattr(engine.module, "lm", engine.module)
    ids = make_batch(case, 0, data_rank(case))["input_ids"]
    return model.generate(ids, max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize(
    "case",
    [_sharded(2, stage=2, tied=True, vocab_size=101), Case(stage=1, tensor_parallel=2)],
    ids=["stage 2, tied", "AutoTP"],
)
def test_generation_is_that_of_the_plain_model(ranks: RankPool, case: Case) -> None:
    model = make_model(case).eval()
    for rank, ids in enumerate(ranks.run(2, _generate, case, timeout=200)):
        prompt = make_batch(case, 0, rank // case.tensor_parallel)["input_ids"]
        assert torch.equal(ids, getattr(model, "lm", model).generate(prompt, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize(
    "case",
    [_sharded(2, vocab_size=4096), Case(tensor_parallel=2, mpu=True, vocab_size=4096)],
    ids=["data parallel", "tensor parallel"],
)
def test_no_rank_makes_the_whole_classifier_or_its_gradient(ranks: RankPool, case: Case) -> None:
    # Tied, or the embedding would be as large; DeepSpeed's own buffer is larger than this model.
    case = replace(case, stage=2, tied=True, zero={"reduce_bucket_size": 1000})
    for measured in ranks.run(2, measure_a_step, case, timeout=200):
        assert measured["largest"] < measured["tables"]


def _default_mode() -> list[float]:
    case = _sharded(2, stage=2)
    case = replace(case, section={"vocab_parallel_size": 2})
    engine = make_engine(case)
    assert engine.module.get_output_embeddings().weight.shape[0] == case.vocab_size // 2
    return [loss for _ in range(20) for loss in take_steps(engine, case, range(1))]


def test_default_mode_trains_a_sharded_classifier(ranks: RankPool) -> None:
    for losses in ranks.run(2, _default_mode, timeout=200):
        assert losses[-1] < losses[0] - 0.1


def _real_logits_in_training(case: Case) -> Tensor:
    """The gradient of this rank's rows where a model needs real logits."""
    engine = make_engine(case)
    ids = torch.arange(12, device=device()).view(2, 6) + data_rank(case)
    engine.module.lm(input_ids=ids).logits.square().sum().backward()
    return engine.module.get_output_embeddings().weight.grad


@pytest.mark.parametrize(
    "case",
    [_sharded(2, stage=0, vocab_size=101), Case(stage=0, tensor_parallel=2, mpu=True, vocab_size=101)],
    ids=["data parallel", "tensor parallel"],
)
def test_real_logits_have_the_gradient_of_the_plain_model(ranks: RankPool, case: Case) -> None:
    model = make_model(case)
    for rank in range(2 // case.tensor_parallel):
        model.lm(input_ids=torch.arange(12).view(2, 6) + rank).logits.square().sum().backward()
    got, expected = torch.cat(ranks.run(2, _real_logits_in_training, case, timeout=200)), model.lm.lm_head.weight.grad
    assert float((got - expected).norm() / expected.norm()) < 1e-5


def test_the_group_of_zero3_moves_the_fewest_bytes() -> None:
    assert vocab_group_size(64, 131072, None, 2) == 64, "all ranks where the tokens are not known"
    assert vocab_group_size(8, 131072, 64, 2) == 8, "few tokens: the rows never move"
    assert vocab_group_size(8, 1024, 10**6, 2) == 1, "few rows: the tokens never move"
    world, rows, tokens = 64, 262144, 8192
    received = {g: (g - 1) * tokens * 6 + (world / g - 1) * rows / world * 4 for g in (1, 2, 4, 8, 16, 32, 64)}
    assert vocab_group_size(world, rows, tokens, 2) == min(received, key=lambda g: received[g]) == 4


def _train_from_file(path: str) -> float:
    fresh_deepspeed()
    model = make_model(Case(tensor_parallel=2))
    engine = cce_deepspeed.initialize(model=model, model_parameters=model.parameters(), config=path)[0]
    return take_steps(engine, Case(tensor_parallel=2), range(1))[0]


@pytest.mark.full
def test_the_config_of_autotp_that_ships_runs(ranks: RankPool) -> None:
    path = Path(__file__).parents[1] / "configs" / "deepspeed" / "autotp.json"
    expected = make_model(Case(tensor_parallel=2))(**make_batch(Case(), 0, 0)).loss.item()
    assert ranks.run(2, _train_from_file, str(path), timeout=200) == pytest.approx([expected] * 2, rel=1e-5)
