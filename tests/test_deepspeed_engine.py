"""DeepSpeed: training through the engine equals one process training the plain model, and gathers no classifier.

A case trains a tiny model for five AdamW steps of two micro-steps, with clipping, on ragged batches, and is compared
with the same steps of the plain model on all ranks' batches in one process.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import RankPool
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("deepspeed")
transformers = pytest.importorskip("transformers")

import deepspeed  # noqa: E402
from deepspeed.runtime.sequence_parallel import parallel_state_sp  # noqa: E402
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload  # noqa: E402

import cce_dist.deepspeed as cce_deepspeed  # noqa: E402
from cce_dist.deepspeed.slices import SlicedRows  # noqa: E402
from cce_dist.lazy_logits import fused_evaluation  # noqa: E402

STEPS, ACCUMULATION = 5, 2
CLIP = 0.5
ADAMW = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-6}  # eps: rounding of a gradient that is almost zero is no update
HIDDEN = 32
EXACT = {"gradient": "exact"}
ZERO3 = Path(__file__).parents[1] / "configs" / "deepspeed" / "zero3.json"


@dataclass(frozen=True)
class Case:
    """One training run."""

    vocab_size: int = 96
    stage: int = 3
    tied: bool = False
    biased: bool = False
    two_losses: bool = False
    trained: str = ""  # only parameters whose name contains this
    evaluates: bool = False
    checkpoints: bool = False  # recomputes activations, the reentrant way
    zero_init: bool = False
    sequence_parallel: int = 1
    section: dict[str, Any] | None = field(default_factory=lambda: dict(EXACT))
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


class CausalLM(nn.Module):
    """A tiny Llama (or Phi, whose classifier has a bias), with a second loss on the same logits if asked for."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        kind, config = ("Phi", transformers.PhiConfig) if case.biased else ("Llama", transformers.LlamaConfig)
        self.lm = getattr(transformers, f"{kind}ForCausalLM")(
            config(
                vocab_size=case.vocab_size,
                hidden_size=HIDDEN,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
                tie_word_embeddings=case.tied,
            )
        )
        if case.checkpoints:
            self.lm.gradient_checkpointing_enable({"use_reentrant": True})
            self.lm.enable_input_require_grads()
        self.two_losses = case.two_losses

    def get_output_embeddings(self) -> nn.Module:
        return self.lm.get_output_embeddings()

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        output = self.lm(**inputs, labels=labels)
        if not self.two_losses:
            return output.loss
        ahead = F.cross_entropy(output.logits[:, :-2].flatten(0, 1), labels[:, 2:].flatten())
        return output.loss + 0.3 * ahead


def _model(case: Case) -> CausalLM:
    torch.manual_seed(1)
    model = CausalLM(case)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = case.trained in name
        if name.endswith("lm_head.bias"):
            nn.init.normal_(parameter)
    return model


def _batch(case: Case, micro_step: int, rank: int) -> dict[str, Tensor]:
    """Ragged over ranks and micro-steps, a third of the labels ignored."""
    draws = torch.Generator().manual_seed(100 * micro_step + rank)
    ids = torch.randint(case.vocab_size, (2, 6 + (3 * rank + micro_step) % 7), generator=draws)
    labels = torch.where(torch.rand(ids.shape, generator=draws) < 0.3, -100, ids)
    return {"input_ids": ids, "labels": labels}


def _config(case: Case) -> dict[str, Any]:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {**ADAMW, "torch_adam": True}},
        "zero_optimization": {"stage": case.stage, **case.zero},
        **case.config,
    }
    return config if case.section is None else {**config, "cce_dist": case.section}


def _fresh_deepspeed() -> None:
    """DeepSpeed keeps groups and counters of an earlier case; and its shared-memory collectives need a compiler."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.comm.cdb = None
    deepspeed.zero.Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    deepspeed.utils.groups._release_process_group_references()


def _engine(case: Case) -> Any:
    _fresh_deepspeed()
    config, mpu = _config(case), None
    if case.sequence_parallel > 1:
        deepspeed.init_distributed("gloo")
        parallel_state_sp.initialize_sequence_parallel(case.sequence_parallel)
        mpu = parallel_state_sp
    model = _model(case)
    if case.zero_init:
        plain = model.state_dict()
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = _model(case)
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                parameter.data.copy_(plain[name])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return cce_deepspeed.initialize(model=model, model_parameters=trained, config=config, mpu=mpu)[0]


def _weights(engine: Any) -> dict[str, Tensor]:
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().float().clone()
    return weights


def _steps(engine: Any, case: Case, micro_steps: range) -> list[float]:
    losses = []
    for micro_step in micro_steps:
        loss = engine(**_batch(case, micro_step, dist.get_rank()))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def _train(case: Case) -> dict[str, Any]:
    """What one rank sees of a run: its losses, the norms that DeepSpeed reports, the weights."""
    engine, rank = _engine(case), dist.get_rank()
    losses, norms, evaluated = [], [], []
    for micro_step in range(STEPS * ACCUMULATION):
        losses += _steps(engine, case, range(micro_step, micro_step + 1))
        if micro_step % ACCUMULATION:
            norms.append(engine.get_global_grad_norm())
            if case.evaluates:
                evaluated += _evaluate(engine, _batch(case, 1000, rank))
    return {"losses": losses, "norms": norms, "evaluated": evaluated, "weights": _weights(engine)}


def _evaluate(engine: Any, batch: dict[str, Tensor]) -> list[float]:
    """The loss through the stock classifier, and fused."""
    engine.eval()
    with torch.no_grad():
        stock = engine(**batch).item()
        with fused_evaluation(engine.module.get_output_embeddings()):
            fused = engine(**batch).item()
    engine.train()
    return [stock, fused]


def _train_plain(case: Case, world: int) -> dict[str, Any]:
    """The same steps in one process: the mean of the ranks' losses, so of their gradients."""
    model = _model(case)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, **ADAMW)
    losses, norms, evaluated = [], [], []
    for micro_step in range(STEPS * ACCUMULATION):
        for_ranks = [model(**_batch(case, micro_step, rank)) for rank in range(world)]
        (torch.stack(for_ranks).mean() / ACCUMULATION).backward()
        losses.append([loss.item() for loss in for_ranks])
        if micro_step % ACCUMULATION:
            norms.append(float(nn.utils.clip_grad_norm_(trained, CLIP)))
            optimizer.step()
            optimizer.zero_grad()
            if case.evaluates:
                with torch.no_grad():
                    evaluated += 2 * [[model(**_batch(case, 1000, rank)).item() for rank in range(world)]]
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"losses": losses, "norms": norms, "evaluated": evaluated, "weights": weights}


def _assert_trains_as_one_process(pool: RankPool, world: int, case: Case) -> None:
    expected, ranks = _train_plain(case, world), pool.run(world, _train, case, timeout=200)
    for rank, got in enumerate(ranks):
        assert got["losses"] == pytest.approx([step[rank] for step in expected["losses"]], rel=1e-5)
        assert got["evaluated"] == pytest.approx([step[rank] for step in expected["evaluated"]], rel=1e-5)
        if case.stage > 0:  # stage 0 reports none
            assert [float(norm) for norm in got["norms"]] == pytest.approx(expected["norms"], rel=1e-5)
        assert _distance(got["weights"], expected["weights"]) < 1e-5


def _distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative difference of a tensor; the key biases of Phi have no gradient but noise, and are left out."""
    floor = 1e-6 * torch.stack([weight.norm() for weight in expected.values()]).norm()
    return max(
        float((got[name] - weight).norm() / torch.maximum(weight.norm(), floor))
        for name, weight in expected.items()
        if not name.endswith("k_proj.bias")
    )


@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(2, Case(), id="untied"),
        pytest.param(4, Case(), id="untied, 4 ranks"),
        pytest.param(2, Case(tied=True, evaluates=True), id="tied, evaluated between steps"),
        pytest.param(2, Case(vocab_size=101, two_losses=True), id="two loss calls, uneven vocabulary"),
        pytest.param(2, Case(vocab_size=101, tied=True, two_losses=True), id="two loss calls, uneven, tied"),
        pytest.param(4, Case(vocab_size=101), id="uneven vocabulary, 4 ranks"),
        pytest.param(4, Case(vocab_size=101, tied=True, section={**EXACT, "vocab_parallel_size": 2}), id="2 x 2 ranks"),
    ],
)
def test_zero3_training_equals_one_process(ranks: RankPool, world: int, case: Case) -> None:
    _assert_trains_as_one_process(ranks, world, case)


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
        pytest.param(2, Case(stage=2, tied=True), id="stage 2, tied"),
    ],
)
def test_training_equals_one_process(ranks: RankPool, world: int, case: Case) -> None:
    _assert_trains_as_one_process(ranks, world, case)


@pytest.mark.full
@pytest.mark.parametrize("reduce_scatter", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_sequence_parallel_training_equals_stock_zero3(ranks: RankPool, world: int, reduce_scatter: bool) -> None:
    case = Case(sequence_parallel=2, zero={"reduce_scatter": reduce_scatter})
    stock = ranks.run(world, _train, replace(case, section=None), timeout=200)
    for got, expected in zip(ranks.run(world, _train, case, timeout=200), stock, strict=True):
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert torch.allclose(torch.stack(got["norms"]), torch.stack(expected["norms"]), rtol=1e-5)
        assert _distance(got["weights"], expected["weights"]) < 1e-5


@pytest.mark.full
def test_bf16_training_follows_stock_zero3(ranks: RankPool) -> None:
    case = Case(config={"bf16": {"enabled": True}})
    got, expected = (ranks.run(2, _train, c, timeout=200)[0] for c in (case, replace(case, section=None)))
    assert got["losses"] == pytest.approx(expected["losses"], rel=2e-3)
    assert torch.allclose(torch.stack(got["norms"]), torch.stack(expected["norms"]), rtol=1e-2)


def _train_save_and_resume(folder: str) -> dict[str, list[float]]:
    """Losses after a checkpoint: of the run that wrote it, of cce_dist resuming, of stock DeepSpeed resuming."""
    case, losses = Case(vocab_size=101, tied=True), {}
    engine = _engine(case)
    _steps(engine, case, range(2))
    engine.save_checkpoint(folder)
    losses["went on"] = _steps(engine, case, range(2, 6))
    for name, section in (("cce_dist", case.section), ("stock", None)):
        engine = _engine(replace(case, section=section))
        engine.load_checkpoint(folder)
        losses[name] = _steps(engine, case, range(2, 6))
    return losses


@pytest.mark.full
def test_a_checkpoint_resumes_with_and_without_cce_dist(ranks: RankPool, tmp_path: Path) -> None:
    for losses in ranks.run(2, _train_save_and_resume, str(tmp_path), timeout=200):
        assert losses["cce_dist"] == pytest.approx(losses["went on"], rel=1e-6)
        assert losses["stock"] == pytest.approx(losses["went on"], rel=1e-5)


class _Meter(TorchDispatchMode):
    """The elements of the largest tensor made, and the elements that all-gathers deliver."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.gathered = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        if "allgather" in str(op):
            self.gathered += args[0].numel() if isinstance(args[0], Tensor) else 0
        return result


def _measure_a_step(case: Case) -> dict[str, Any]:
    engine = _engine(case)
    inputs = torch.randn(2, 8, HIDDEN), torch.randint(case.vocab_size, (2, 8))
    with _Meter() as meter:
        loss = engine(inputs_embeds=inputs[0], labels=inputs[1])
        engine.backward(loss)
    engine.step()
    return {"largest": meter.largest, "gathered": meter.gathered, "tables": case.vocab_size * HIDDEN}


def test_zero3_never_gathers_the_classifier_nor_makes_its_whole_gradient(ranks: RankPool) -> None:
    stock = ranks.run(2, _measure_a_step, Case(vocab_size=4096, section=None))[0]
    ours = ranks.run(2, _measure_a_step, Case(vocab_size=4096))[0]
    assert stock["largest"] >= stock["tables"] and ours["largest"] < ours["tables"]
    assert ours["gathered"] <= stock["gathered"] - stock["tables"]


def _train_in_default_mode() -> list[float]:
    case = Case(section={})
    engine = _engine(case)
    return [loss for _ in range(20) for loss in _steps(engine, case, range(1))]


def test_default_mode_trains(ranks: RankPool) -> None:
    for losses in ranks.run(2, _train_in_default_mode):
        assert losses[-1] < losses[0] - 0.1


def _slices_there_and_back(num_rows: int, width: int, size: int) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    rows = SlicedRows(num_rows, width, dist.group.WORLD, size)
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
    _fresh_deepspeed()
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in _sources(_config(Case(stage=0)), tmp_path):
        model = _model(Case())
        engine = cce_deepspeed.initialize(model=model, model_parameters=model.parameters(), **source)[0]
        assert _is_active(engine), source
        assert capsys.readouterr().out.count("cce_dist is active: ZeRO stage 0, gradient=exact") == 1


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("section", [None, {"enabled": False}])
def test_without_the_section_it_is_stock_deepspeed(section: dict[str, Any] | None) -> None:
    assert not _is_active(_engine(Case(stage=0, section=section)))


@pytest.mark.usefixtures("alone")
def test_install_makes_deepspeed_itself_honour_the_section() -> None:
    stock = deepspeed.initialize
    cce_deepspeed.install()
    try:
        cce_deepspeed.install()
        model = _model(Case())
        engine = deepspeed.initialize(model=model, config=_config(Case(stage=0)))[0]
        assert _is_active(engine)
    finally:
        cce_deepspeed.uninstall()
    assert deepspeed.initialize is stock


def test_an_unknown_key_of_the_section_names_the_known_ones(tmp_path: Path) -> None:
    for source in _sources(_config(Case(section={"gradients": "exact"})), tmp_path):
        with pytest.raises(ValueError, match=r"gradients.*\n.*gradient, .*vocab_parallel_size"):
            cce_deepspeed.initialize(model=_model(Case()), **source)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"compile": {"deepcompile": True}}, "deepcompile"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine"),
        ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size"),
        ({"zero_optimization": {"stage": 3, "zenflow": {}}}, "zenflow"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"super_offload": True}}}, "super_offload"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"zero_optimization": {"stage": 2}}, "vocab_parallel_size"),
    ],
)
def test_what_was_never_tested_is_refused_by_name(changes: dict[str, Any], refused: str) -> None:
    config = _config(Case(section={"vocab_parallel_size": 2}, config=changes))
    with pytest.raises(NotImplementedError, match=refused):
        cce_deepspeed.initialize(model=_model(Case()), config=config)


def test_a_model_without_a_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match="get_output_embeddings"):
        cce_deepspeed.initialize(model=nn.Linear(2, 2), config=_config(Case()))


def _changed_internals() -> str:
    _fresh_deepspeed()
    stock = deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3
    partition_grads = stock.partition_grads
    stock.partition_grads = lambda self: []
    try:
        _engine(Case())
    except RuntimeError as error:
        return str(error)
    finally:
        stock.partition_grads = partition_grads
    return ""


def test_changed_deepspeed_internals_are_found_at_start(ranks: RankPool) -> None:
    for text in ranks.run(2, _changed_internals):
        assert "partition_grads" in text and deepspeed.__version__ in text and "pip install" in text


def _train_from_file(path: str) -> float:
    _fresh_deepspeed()
    model = _model(Case())
    engine = cce_deepspeed.initialize(model=model, model_parameters=model.parameters(), config=path)[0]
    return _steps(engine, Case(), range(1))[0]


def test_the_config_that_ships_runs(ranks: RankPool) -> None:
    expected = [_model(Case())(**_batch(Case(), 0, rank)).item() for rank in range(2)]
    assert ranks.run(2, _train_from_file, str(ZERO3)) == pytest.approx(expected, rel=1e-5)
