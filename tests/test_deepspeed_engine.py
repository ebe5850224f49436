"""DeepSpeed: training through the engine equals one process training the plain model, and gathers no classifier."""

import argparse
import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import RankPool
from torch import nn

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

import deepspeed
from deepspeed_runs import (
    EXACT,
    Case,
    assert_trains_as_one_process,
    distance,
    fresh_deepspeed,
    make_batch,
    make_config,
    make_engine,
    make_model,
    measure_a_step,
    take_steps,
    train,
)

import cce_dist.deepspeed as cce_deepspeed
from cce_dist.deepspeed.slices import RowsFromSlices

FREQUENT = {**EXACT, "gradient": "filtered", "filter_eps": 1e-30, "frequent_rows": 20}  # nothing is left out
ZERO3 = Path(__file__).parents[1] / "configs" / "deepspeed" / "zero3.json"


@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(2, Case(), id="untied"),
        pytest.param(4, Case(), id="untied, 4 ranks"),
        pytest.param(2, Case(tied=True, evaluates=True), id="tied, evaluated between steps"),
        pytest.param(2, Case(vocab_size=101, two_losses=True), id="two loss calls, uneven vocabulary"),
        pytest.param(2, Case(vocab_size=101, tied=True, two_losses=True), id="two loss calls, uneven, tied"),
        pytest.param(2, Case(vocab_size=101, tied=True, of_logprobs=True), id="log-probabilities and an entropy bonus"),
        pytest.param(4, Case(vocab_size=101), id="uneven vocabulary, 4 ranks"),
        pytest.param(
            4, Case(vocab_size=101, tied=True, two_losses=True, section=FREQUENT), id="frequent rows, 4 ranks, uneven"
        ),
        pytest.param(4, Case(vocab_size=101, tied=True, section={**EXACT, "vocab_parallel_size": 2}), id="2 x 2 ranks"),
    ],
)
def test_zero3_training_equals_one_process(ranks: RankPool, world: int, case: Case) -> None:
    assert_trains_as_one_process(ranks, world, case)


OFFLOAD: dict[str, Any] = {
    "zero": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    "config": {"zero_force_ds_cpu_optimizer": False},  # DeepSpeed's own one would be compiled first
}


@pytest.mark.full
@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(2, Case(biased=True, vocab_size=101), id="classifier with a bias, uneven"),
        pytest.param(
            4, Case(biased=True, section={**EXACT, "vocab_parallel_size": 2}), id="classifier with a bias, 2 x 2"
        ),
        pytest.param(4, Case(vocab_size=101, section={**EXACT, "vocab_parallel_size": 1}), id="4 copies of the rows"),
        pytest.param(
            4, Case(biased=True, section={**FREQUENT, "vocab_parallel_size": 2}), id="frequent rows, bias, 2 x 2"
        ),
        pytest.param(2, Case(checkpoints=True, section=FREQUENT), id="frequent rows, reentrant checkpoints"),
        pytest.param(2, Case(stage=2, section=FREQUENT), id="frequent rows, stage 2"),
        pytest.param(
            4, Case(two_losses=True, section={**EXACT, "vocab_parallel_size": 2}), id="2 x 2 ranks, two losses"
        ),
        pytest.param(2, Case(trained="lm_head"), id="only the classifier is trained"),
        pytest.param(2, Case(trained="layers"), id="frozen classifier"),
        pytest.param(2, Case(zero={"overlap_comm": True, "sub_group_size": 300}), id="overlap_comm, sub-groups"),
        pytest.param(2, Case(zero={"reduce_scatter": False}, tied=True), id="all-reduce of gradients"),
        pytest.param(2, Case(zero={"contiguous_gradients": False}), id="gradients not contiguous"),
        pytest.param(2, Case(zero={"stage3_param_persistence_threshold": 0}), id="nothing persistent"),
        pytest.param(
            2, Case(zero={"stage3_param_persistence_threshold": 10**9}, tied=True), id="everything persistent"
        ),
        pytest.param(4, Case(zero={"zero_hpz_partition_size": 2}, vocab_size=101), id="hpZ"),
        pytest.param(2, Case(tied=True, two_losses=True, **OFFLOAD), id="optimizer and parameters on the host"),
        pytest.param(2, Case(zero_init=True, tied=True), id="zero.Init"),
        pytest.param(2, Case(checkpoints=True, tied=True, two_losses=True), id="reentrant activation checkpoints"),
        pytest.param(2, Case(stage=0), id="stage 0"),
        pytest.param(2, Case(stage=1, two_losses=True), id="stage 1, two losses"),
        pytest.param(4, Case(of_logprobs=True, section={**EXACT, "vocab_parallel_size": 2}), id="2 x 2, of a policy"),
        pytest.param(2, Case(stage=2, of_logprobs=True), id="stage 2, of a policy"),
        pytest.param(2, Case(stage=2, tied=True), id="stage 2, tied"),
    ],
)
def test_training_equals_one_process(ranks: RankPool, world: int, case: Case) -> None:
    assert_trains_as_one_process(ranks, world, case)


@pytest.mark.full
@pytest.mark.parametrize("reduce_scatter", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_sequence_parallel_training_equals_stock_zero3(ranks: RankPool, world: int, reduce_scatter: bool) -> None:
    case = Case(sequence_parallel=2, zero={"reduce_scatter": reduce_scatter})
    stock = ranks.run(world, train, replace(case, section=None), timeout=200)
    for got, expected in zip(ranks.run(world, train, case, timeout=200), stock, strict=True):
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert torch.allclose(torch.stack(got["norms"]), torch.stack(expected["norms"]), rtol=1e-5)
        assert distance(got["weights"], expected["weights"]) < 1e-5


@pytest.mark.full
def test_bf16_training_follows_stock_zero3(ranks: RankPool) -> None:
    case = Case(config={"bf16": {"enabled": True}})
    got, expected = (ranks.run(2, train, c, timeout=200)[0] for c in (case, replace(case, section=None)))
    assert got["losses"] == pytest.approx(expected["losses"], rel=2e-3)
    assert torch.allclose(torch.stack(got["norms"]), torch.stack(expected["norms"]), rtol=1e-2)


def test_zero3_never_gathers_the_classifier_nor_makes_its_whole_gradient(ranks: RankPool) -> None:
    stock = ranks.run(2, measure_a_step, Case(vocab_size=4096, section=None))[0]
    ours = ranks.run(2, measure_a_step, Case(vocab_size=4096))[0]
    assert stock["largest"] >= stock["tables"] and ours["largest"] < ours["tables"]
    assert ours["gathered"] <= stock["gathered"] - stock["tables"]


def _train_in_default_mode() -> list[float]:
    case = Case(section={})
    engine = make_engine(case)
    return [loss for _ in range(20) for loss in take_steps(engine, case, range(1))]


def test_default_mode_trains(ranks: RankPool) -> None:
    for losses in ranks.run(2, _train_in_default_mode):
        assert losses[-1] < losses[0] - 0.1


def _slices_there_and_back(num_rows: int, width: int, size: int) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    rows = RowsFromSlices(num_rows, width, dist.group.WORLD, size)
    matrix = torch.arange(float(num_rows * width)).view(num_rows, width)
    length = -(-matrix.numel() // world)
    padded = F.pad(matrix.flatten(), (0, length * world - matrix.numel()))
    own = padded[rank * length : (rank + 1) * length]
    index = torch.cat([torch.arange(start, stop) for start, stop in rows.runs])
    assembled = rows.assemble(own)
    assert torch.equal(assembled, matrix[index])
    counts = torch.bincount(index, minlength=num_rows)
    dist.all_reduce(counts, group=rows.vocab_group)
    assert torch.equal(counts, torch.ones_like(counts)), "a vocabulary group holds every row once"
    back = rows.disassemble(assembled)
    assert torch.equal(back, own * (world // size)), "each of the copies brings the gradient once"


@pytest.mark.parametrize("num_rows", [4, 5, 7, 8, 61, 64])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_are_assembled_from_slices_and_their_gradient_returns(ranks: RankPool, num_rows: int, size: int) -> None:
    ranks.run(4, _slices_there_and_back, num_rows, 6, size)


@pytest.fixture(scope="module", autouse=True)
def _leave_no_deepspeed_behind(ranks: RankPool) -> Iterator[None]:
    """ZeRO-3 patches torch in its process."""
    yield
    ranks.close()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one rank, for what does not depend on others."""
    fresh_deepspeed()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1" if name == "WORLD_SIZE" else "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _is_active(engine: Any) -> bool:
    return type(engine.module.get_output_embeddings()) is not nn.Linear


def _sources(config: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    yield {"config": config}
    yield {"config": str(path)}
    yield {"config_params": config}
    yield {"args": argparse.Namespace(deepspeed_config=str(path), local_rank=0)}


@pytest.mark.usefixtures("alone")
def test_the_section_is_found_wherever_deepspeed_takes_its_config(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for source in _sources(make_config(Case(stage=0)), tmp_path):
        model = make_model(Case())
        engine = cce_deepspeed.initialize(model=model, model_parameters=model.parameters(), **source)[0]
        assert _is_active(engine), source
        said = [record.getMessage() for record in caplog.records if record.name == "cce_dist"]
        assert len(said) == 1 and said[0].startswith("cce_dist is active: ZeRO stage 0, gradient=exact")
        caplog.clear()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("error:.*no effect")
def test_a_reference_model_that_is_not_trained_is_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    config = {key: value for key, value in make_config(Case()).items() if key != "optimizer"}
    assert not _is_active(deepspeed.initialize(model=make_model(Case()), config=config)[0])
    engine = cce_deepspeed.initialize(model=make_model(Case()), config=config)[0]
    assert _is_active(engine)
    assert [record for record in caplog.records if record.name == "cce_dist"] == []
    with torch.no_grad():  # in training mode, as a reference may be left in
        batch = {name: x.to(engine.device) for name, x in make_batch(Case(), 0, 0).items()}
        loss, stock = engine(**batch), make_model(Case()).to(engine.device)(**batch)
    assert torch.equal(loss, stock)


@pytest.mark.usefixtures("alone")
def test_a_reward_model_with_the_config_of_a_policy_is_stock_deepspeeds() -> None:
    config = {key: value for key, value in make_config(Case()).items() if key != "optimizer"}
    engine = cce_deepspeed.initialize(model=nn.Linear(2, 2), config=config)[0]
    assert type(engine.module) is nn.Linear


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("section", [None, {"enabled": False}])
def test_without_the_section_it_is_stock_deepspeed(section: dict[str, Any] | None) -> None:
    assert not _is_active(make_engine(Case(stage=0, section=section)))


@pytest.mark.usefixtures("alone")
def test_install_makes_deepspeed_itself_honour_the_section() -> None:
    before = deepspeed.initialize
    assert not cce_deepspeed.installed()
    cce_deepspeed.install()
    try:
        cce_deepspeed.install()
        assert cce_deepspeed.installed()
        model = make_model(Case())
        engine = deepspeed.initialize(model=model, config=make_config(Case(stage=0)))[0]
        assert _is_active(engine)
    finally:
        cce_deepspeed.uninstall()
    assert deepspeed.initialize is before and not cce_deepspeed.installed()


@pytest.mark.usefixtures("alone")
def test_a_section_that_deepspeed_ignores_is_a_warning(tmp_path: Path) -> None:
    for source in _sources(make_config(Case(stage=0)), tmp_path):
        model = make_model(Case())
        with pytest.warns(UserWarning, match=r'section "cce_dist" .* no effect.*install\(\)'):
            engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), **source)[0]
        assert not _is_active(engine)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("section", [None, {"enabled": False}])
@pytest.mark.filterwarnings("error:.*no effect")
def test_stock_deepspeed_without_the_section_does_not_warn(section: dict[str, Any] | None) -> None:
    model, config = make_model(Case()), make_config(Case(stage=0, section=section))
    assert not _is_active(deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0])


@pytest.mark.usefixtures("alone")
def test_a_newer_deepspeed_is_a_warning_and_an_older_one_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "99.1")
    with pytest.warns(UserWarning, match=r"99.1 is newer than .*pip install deepspeed=="):
        assert _is_active(make_engine(Case(stage=0)))
    monkeypatch.setattr(deepspeed, "__version__", "0.14.4")
    with pytest.raises(RuntimeError, match=r"0.14.4 is older than .*pip install deepspeed=="):
        make_engine(Case(stage=0))


def test_an_unknown_key_of_the_section_names_the_known_ones(tmp_path: Path) -> None:
    for source in _sources(make_config(Case(section={"gradients": "exact"})), tmp_path):
        with pytest.raises(ValueError, match=r"gradients.*\n.*gradient, .*vocab_parallel_size"):
            cce_deepspeed.initialize(model=make_model(Case()), **source)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"compile": {"deepcompile": True}}, "deepcompile"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine"),
        ({"tensor_parallel": {"autotp_size": 2, "vocab_parallel_lm_head": False}}, "vocab_parallel_lm_head"),
        ({"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}}, "with tensor parallelism below"),
        ({"expert_parallel": {"autoep_size": 2}}, "autoep_size"),
        ({"amp": {"enabled": True}}, "amp.enabled"),
        ({"sparse_gradients": True}, "sparse_gradients"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.dtype = float16"),
        ({"data_parallel_size": 1, "sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"zero_optimization": {"stage": 3, "zenflow": {}}}, "zenflow"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"super_offload": True}}}, "super_offload"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, "stage 0 with bf16"),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "elastic_checkpoint"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients"),
        ({"zero_optimization": {"stage": 2, "reduce_scatter": False}}, "reduce_scatter"),
        ({"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, "contiguous_gradients"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Muon"}}, "Muon"),
    ],
)
def test_what_was_never_tested_is_refused_by_name(changes: dict[str, Any], refused: str) -> None:
    config = make_config(Case(section={"vocab_parallel_size": 2}, config=changes))
    with pytest.raises(NotImplementedError, match=refused):
        cce_deepspeed.initialize(model=make_model(Case()), config=config)


@pytest.mark.parametrize("name", ["cce-dist", "CCE_dist", "cce"])
def test_a_section_that_is_misspelt_is_not_ignored(name: str) -> None:
    with pytest.raises(ValueError, match=f'has the section "{name}", which nothing reads: its name is "cce_dist"'):
        cce_deepspeed.initialize(model=nn.Linear(2, 2), config={"train_batch_size": 1, name: {}})


def test_a_model_without_a_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match="get_output_embeddings"):
        cce_deepspeed.initialize(model=nn.Linear(2, 2), config=make_config(Case()))


def _changed_internals(owner: str, name: str, value: Any, case: Case) -> str:
    fresh_deepspeed()
    module, _, holder_name = owner.rpartition(".")
    holder = getattr(importlib.import_module(module), holder_name)
    stock = getattr(holder, name)
    if value is None:
        delattr(holder, name)
    else:
        setattr(holder, name, value)
    try:
        make_engine(case)
    except RuntimeError as error:
        return str(error)
    finally:
        setattr(holder, name, stock)
    return ""


def _partition_grads_without_arguments(self: Any) -> list[Any]:
    return []


@pytest.mark.parametrize(
    ("owner", "name", "value", "case"),
    [
        pytest.param(
            "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3",
            "partition_grads",
            _partition_grads_without_arguments,
            Case(),
            id="stage 3",
        ),
        pytest.param(
            "deepspeed.runtime.engine.DeepSpeedEngine",
            "clip_fp32_gradients",
            None,
            Case(stage=0, section={"vocab_parallel_size": 2}),
            id="stage 0, sharded",
        ),
        pytest.param(
            "deepspeed.utils.groups",
            "_clone_world_group",
            None,
            Case(stage=1, section={"vocab_parallel_size": 2}),
            id="stage 1, sharded",
        ),
    ],
)
def test_changed_deepspeed_internals_are_found_at_start(
    ranks: RankPool, owner: str, name: str, value: Any, case: Case
) -> None:
    for text in ranks.run(2, _changed_internals, owner, name, value, case, timeout=200):
        assert name in text and deepspeed.__version__ in text and "pip install" in text


def _train_from_file(path: str) -> float:
    fresh_deepspeed()
    model = make_model(Case())
    engine = cce_deepspeed.initialize(model=model, model_parameters=model.parameters(), config=path)[0]
    return take_steps(engine, Case(), range(1))[0]


def test_the_config_that_ships_runs(ranks: RankPool) -> None:
    expected = [make_model(Case())(**make_batch(Case(), 0, rank)).item() for rank in range(2)]
    assert ranks.run(2, _train_from_file, str(ZERO3)) == pytest.approx(expected, rel=1e-5)
