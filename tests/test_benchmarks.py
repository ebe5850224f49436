"""The benchmark commands, as far as they can be tried without a GPU: their own arithmetic on tiny inputs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cce_dist import linear_cross_entropy
from cce_dist.kernels.problem import TILE
from cce_dist.kernels.triton import tuning
from cce_dist.kernels.triton.tuning import Row, Tuning

ROOT = Path(__file__).parent.parent
MODULES = (
    "convergence",
    "budget",
    "distillation",
    "first_pass",
    "hostile",
    "inputs",
    "logprobs",
    "loss",
    "methods",
    "overlap",
    "scaling",
    "shards",
    "stages",
    "timing",
    "tune",
)


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[Any]:
    """The modules of benchmarks/, which import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return sys.modules.pop(__import__("report").__name__)


@pytest.fixture
def inputs(benchmarks: Any) -> Any:
    hidden_ND, weight_VD = torch.randn(48, 16), 3 * torch.randn(5 * TILE, 16)
    return benchmarks.inputs.Inputs(hidden_ND, weight_VD, torch.randint(5 * TILE, (48,)), 0.0)


@pytest.mark.parametrize("frequent_rows", [0, 150])
@pytest.mark.parametrize(
    ("gradient", "backend"), [("exact", "torch"), ("exact", "triton"), ("unbiased", "torch"), ("unbiased", "triton")]
)
def test_shards_run_alone_give_the_gradient_of_the_whole_loss(
    benchmarks: Any, inputs: Any, gradient: str, backend: str, frequent_rows: int
) -> None:
    hidden_ND, weight_VD = (x.clone().requires_grad_() for x in inputs[:2])
    linear_cross_entropy(hidden_ND, weight_VD, inputs.labels_N, gradient=gradient, seed=7, backend="torch").backward()
    shards = benchmarks.shards
    parts = [shards.shard_of(inputs, rank, 3, gradient, backend, frequent_rows) for rank in range(3)]
    summaries = [shards.summarise(part) for part in parts]
    merged = shards.merge(summaries)
    seed = torch.tensor([7])
    gradients = [
        shards.differentiate(part, summary, merged, seed) for part, summary in zip(parts, summaries, strict=True)
    ]
    if gradient == "unbiased":  # the shards' tiles are others than those of the whole: equal in expectation only
        bound = 0.02
    else:
        bound = 1e-5
    dhidden_ND = sum(part.hidden_ND for part in gradients)
    dweight_VD, expected_VD = torch.cat([part.weight_VD for part in gradients]), weight_VD.grad
    if parts[0].frequent_K is not None:  # their gradient is summed over the ranks, and is not in the shards'
        assert not dweight_VD[parts[0].frequent_K].any()
        expected_VD[parts[0].frequent_K] = 0
    assert (dhidden_ND - hidden_ND.grad).norm() < bound * hidden_ND.grad.norm()
    assert (dweight_VD - expected_VD).norm() < bound * expected_VD.norm()


@pytest.mark.full
def test_the_ranks_of_a_run_are_timed_beside_one(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 300, 40_000))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--shapes", "512x300x16", "--steps", "1", "--rounds", "1", "--device", "cpu"]
    paths = ["--tokens", str(tmp_path / "tokens.npy"), "--out", str(tmp_path)]
    subprocess.run([*command, str(ROOT / "benchmarks/ranks.py"), *options, *paths], check=True, timeout=200)
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("ranks-*.json"))
    shape = result["shapes"]["512x300x16"]
    assert (result["ranks"], list(shape["layouts"])) == (2, ["one", "same tokens", "own tokens"])
    for layout, methods in shape["layouts"].items():
        others = {"same tokens": {"logits kept"}, "own tokens": {"classifier gathered"}}.get(layout, set())
        exact = {f"cce_dist {name}" for name in ("exact", "exact, 1024 MB", "exact, logits kept")} | others
        assert set(methods) == {"cce_dist", "cce_dist, no frequent rows"} | exact
        for name, row in methods.items():
            assert row["hidden_error"] < (1e-5 if name in exact else 0.05)
            assert row["weight_error"] < (1e-5 if name in exact else 0.05)
            assert (row["wire_mb"] > 0) == (layout != "one")
            assert min(row["forward_ms"], row["both_ms"]) > 0
    assert set(shape["efficiency"]) == {"same tokens", "own tokens"}


def test_kept_pairs_are_counted_from_exact_masses(benchmarks: Any, inputs: Any) -> None:
    eps = 0.05
    mass_NT = torch.softmax(inputs.hidden_ND @ inputs.weight_VD.T, 1).view(48, 5, TILE).sum(2)
    large_NT = mass_NT > eps
    large_NT[torch.arange(48), inputs.labels_N // TILE] = True
    pairs = benchmarks.shards.count_pairs(inputs, eps)
    assert pairs.large_T.tolist() == large_NT.sum(0).tolist()
    assert 0 < large_NT.sum() < large_NT.numel()
    expected_T = torch.where(large_NT, 1.0, mass_NT / eps).sum(0)
    torch.testing.assert_close(pairs.expected_T.float(), expected_T)


def test_a_launch_parameter_is_taken_where_it_is_faster_and_right(benchmarks: Any) -> None:
    """splits: 16 is wrong, 32 does not compile, 8 is the fastest; row_group makes no difference."""
    tried = torch.zeros(4, 16)

    def run() -> tuple[torch.Tensor, ...]:
        splits = tuning.tuning_for(tried, tried).splits
        if splits == 32:
            raise RuntimeError("out of resource: shared memory")
        benchmarks.timing.time.sleep(0.002 if splits == 8 else 0.008)
        return (torch.full((3,), 2.0 if splits == 16 else 1.0),)

    stage = benchmarks.tune.Stage("forward", {"splits": (8, 16, 32)}, run, 1e-5)
    row = benchmarks.tune.descend(stage, Tuning(splits=4), None, 2, "cpu")
    assert row == Tuning(splits=8)
    assert benchmarks.tune.descend(stage, Tuning(splits=4), ["stages"], 2, "cpu") == Tuning(splits=4)


def test_a_tuned_row_replaces_the_row_of_its_class(benchmarks: Any) -> None:
    assert [benchmarks.tune.hidden_class(size) for size in (768, 1024, 2304, 4096)] == [
        (None, 1024), (None, 1024), (1024, 3072), (3072, None),
    ]  # fmt: skip
    rows = (Row("H", 2, None, 1024, Tuning()), Row("H", 2, 1024, 3072, Tuning()))
    new = Row("H", 2, None, 1024, Tuning(splits=4))
    other = Row("G", 2, None, 1024, Tuning())
    assert benchmarks.tune.replace_row(rows, new) == [new, rows[1]]
    assert benchmarks.tune.replace_row(rows, other) == [*rows, other]
    parameters = {**benchmarks.tune.FORWARD, **benchmarks.tune.BACKWARD}
    assert set(parameters) <= set(Tuning._fields)


def test_the_tuned_rows_are_written_to_the_table(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels themselves would take minutes in the interpreter: a stage without parameters stands for them."""
    np.save(tmp_path / "ids.npy", np.arange(2000) % 200)
    table = tmp_path / "tuning.json"
    tuning.save([Row("H", None, None, None, Tuning())], table)
    stage = benchmarks.tune.Stage("none", {}, lambda: (torch.ones(1),), 1e-5)
    monkeypatch.setattr(benchmarks.tune, "stages", lambda shard: [stage])
    options = f"--tokens {tmp_path / 'ids.npy'} --shapes 512x300x16 --steps 0 --device cpu --write --table {table}"
    monkeypatch.setattr(sys, "argv", ["tune", *options.split()])
    benchmarks.tune.main()
    rows = tuning.load(table)
    assert [row.gpu for row in rows] == ["H", "interpreter"]
    assert rows[1] == Row("interpreter", 4, None, 1024, tuning.tuning_for(torch.empty(1, 16), torch.empty(1, 16)))


def test_a_shape_is_a_name_or_three_numbers(benchmarks: Any) -> None:
    assert benchmarks.loss.shape_of("gemma") == (8192, 262144, 2304)
    assert benchmarks.loss.shape_of("512x1000x64") == (512, 1000, 64)
    assert len(benchmarks.loss.GROUPS["liger"]) == 7
    for wrong in ("512x1000", "500x1000x64", "gema", "512x0x64"):
        with pytest.raises(ValueError, match="shape must be one of gemma, llama3"):
            benchmarks.loss.shape_of(wrong)


def test_a_loss_that_is_wrong_is_not_timed(benchmarks: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = benchmarks.loss
    good = {"hidden_error": 2e-3, "weight_error": 2e-3, "loss_error": 1e-6}
    loss.check("cce_dist exact", good)
    for name, wrong in (
        ("cce_dist exact", {"hidden_error": 6e-3}),
        ("cce_dist unbiased", {"weight_error": 2e-2}),
        ("cce_dist filtered", {"weight_error": float("nan")}),
        ("Liger", {"hidden_error": 1.0}),
        ("Liger", {"loss_error": 1e-2}),
    ):
        with pytest.raises(ArithmeticError, match=f"{name}: {next(iter(wrong))} is"):
            loss.check(name, good | wrong)

    def wrong_loss(hidden_ND: Any, weight_VD: Any, labels_N: Any) -> Any:
        return 2 * benchmarks.methods.eager(hidden_ND, weight_VD, labels_N)

    monkeypatch.setattr(loss, "trained_inputs", lambda *_, **__: inputs)
    monkeypatch.setattr(loss, "tokens_for", lambda *_: None)

    def measure(name: str) -> Any:
        monkeypatch.setattr(loss, "available_methods", lambda _: ({name: wrong_loss}, {"QuACK": "ImportError: none"}))
        return loss.benchmark(loss.Shape(48, 640, 16), ROOT, 0, 1, None, "cpu")["methods"]

    with pytest.raises(ArithmeticError, match="cce_dist exact: hidden_error is 1.0e"):
        measure("cce_dist exact")
    rows = measure("Liger")
    assert rows["QuACK"] == {"failed": "ImportError: none"} and "hidden_error" in rows["Liger"]["failed"]


@pytest.mark.parametrize(
    "name",
    [
        "F.linear_cross_entropy, chunks",
        *(pytest.param(x, marks=pytest.mark.full) for x in ("TRL, chunks", "DeepSpeed")),
    ],
)
def test_a_peer_that_is_installed_gives_the_loss_and_gradients_of_logits(
    benchmarks: Any, inputs: Any, name: str
) -> None:
    try:
        peer = benchmarks.methods.RIVALS[name]()
    except (ImportError, AttributeError) as error:
        pytest.skip(str(error))
    expected, got = (
        benchmarks.loss.measure_accuracy(method, inputs, benchmarks.loss.reference(inputs))
        for method in (benchmarks.methods.eager, peer)
    )
    assert max(error for key, error in got.items() if "error" in key) < 1e-5 + expected["hidden_error"]


def test_every_kernel_has_a_stage(benchmarks: Any) -> None:
    stages = benchmarks.stages
    own = {"_summarise_kernel", "_list_kernel", "_tail_mean_kernel", "_differentiate_kernel", "_probability_kernel"}
    assert own <= set(stages.own_kernels())
    for kernel, mode, stage in (
        ("_summarise_kernel", "exact", "summarise"),
        ("_tail_rows_kernel", "unbiased", "tail"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "unbiased", "tail's products"),
        ("sm90_xmma_gemm_bf16f32_bf16f32_f32_nt_n", "exact", "exact's products"),
        ("Memset (Device)", "exact", "memset and copies"),
        ("void at::native::elementwise_kernel<at::native::direct_copy_kernel_cuda>", "exact", "memset and copies"),
        (
            "void at::native::elementwise_kernel<4, at::native::MulFunctor>",
            "exact",
            "small torch operations",
        ),
        ("something new", "exact", "other"),
    ):
        assert stages.stage_of(kernel, mode) == stage
    kernels = [("_list_kernel", 3.0, 1.0), ("Memcpy DtoD", 1.0, 2.0), ("_tail_rows_kernel", 4.0, 1.0)]
    shares = {stage: row["share"] for stage, row in stages.by_stage(kernels, "unbiased").items()}
    assert shares == {"tail": 0.5, "select": 0.375, "memset and copies": 0.125}


def test_tiles_are_dealt_evenly_and_the_simulation_counts_every_pair(benchmarks: Any) -> None:
    scaling = benchmarks.scaling
    first_T, second_T = np.array([8.0, 1, 1, 1, 1, 1, 6, 1]), np.array([6.0, 1, 1, 1, 1, 1, 8, 1])
    for deal in (scaling.contiguous, scaling.in_turn, scaling.greedy):
        assert np.bincount(deal(first_T, 4)).tolist() == [2, 2, 2, 2]
    result = scaling.simulate_permutation(first_T, second_T, 2)
    assert result["contiguous"]["expected_pairs"] == [20, 20]
    assert result["in turn"]["expected_pairs"] == [32, 8]  # both heavy tiles are even ones
    assert result["in turn"]["imbalance"] == 1.6
    assert result["greedy"]["imbalance"] == 1.0
    assert sum(result["greedy, held out"]["expected_pairs"]) == second_T.sum()


def test_ids_of_a_larger_vocabulary_are_mapped_and_the_rarest_merged(benchmarks: Any, tmp_path: Path) -> None:
    ids = np.array([5, 5, 5, 900, 900, 70, 30, 2000])
    np.save(tmp_path / "ids.npy", ids)
    path = tmp_path / "ids.npy"
    assert benchmarks.scaling.tokens_for(path, 2001).tolist() == ids.tolist()
    assert benchmarks.scaling.tokens_for(path, 10).tolist() == [0, 0, 0, 6, 6, 4, 2, 8]
    assert benchmarks.scaling.tokens_for(path, 3).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.full
def test_the_commands_run_and_write_their_results(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 200, 2000))
    common = ["--tokens", str(tmp_path / "ids.npy"), "--steps", "0", "--rounds", "1", "--device", "cpu"]
    common += ["--cache", "cache"]
    monkeypatch.chdir(tmp_path)
    for name, options in {
        "loss": "--shapes 512x300x16 --only unbiased eager",
        "scaling": "--counts 512 1024 --vocabularies 300 512 --worlds 1 2 --num-tokens 512 --hidden 16",
        "logprobs": "--shapes 512x300x16 --eps -3",
        "stages": "--shapes 512x300x16 --modes unbiased",
        "distillation": "--shapes 512x300x16",
        "hostile": "--shape 512x300x16",
        "first_pass": "--shapes 512x200x16 --noise 512x200x16 --only 0.05",
        "budget": "--shapes 512x300x16 --budgets 256 logits",
    }.items():
        given = [x for x in common if name != "hostile" or x not in ("--rounds", "1")]
        monkeypatch.setattr(sys, "argv", [name, *given, *options.split(), "--out", "results"])
        getattr(benchmarks, name).main()
    assert len(list(Path("cache").iterdir())) == 3, "stages takes the inputs that loss has trained"
    budget, distillation, first_pass, hostile, logprobs, loss, scaling, stages = (
        json.loads(path.read_text()) for path in sorted(Path("results").iterdir())
    )
    rows = budget["shapes"]["512x300x16"]["budgets"]
    assert list(rows) == ["256 MB", "logits"]
    assert all(min(row["both_x"], row["forward_x"]) > 0 and row["weight_error"] < 1e-5 for row in rows.values())
    assert {len(case["errors"]) for case in first_pass["cases"].values()} == {3}
    assert first_pass["times"]["512x200x16"]["forward, fp8"] > 0
    assert len(hostile["hostile"]) == 10 + 7 + 11
    for case, found in hostile["hostile"].items():
        row = found["modes"]["exact"]
        assert max(row["loss_error"], row["hidden_error"], row["weight_error"]) < 1e-4, case
    rows = distillation["shapes"]["512x300x16"]["methods"]
    assert all(row["both_x"] > 0 for row in rows.values()) and len(rows) == 11
    errors = [x for name, row in rows.items() for key, x in row.items() if "error" in key and name.startswith("cce")]
    assert len(errors) == 9 and max(errors) < 1e-4
    rows = logprobs["shapes"]["512x300x16"]["methods"]
    assert list(rows) == ["cce_dist", "cce_dist exact", "chunks of logits", "cce_dist eps 2^-3.0"]
    assert all(row["policy_hidden_error"] < 1e-5 and row["logprob_largest_error"] < 1e-5 for row in rows.values())
    assert logprobs["shapes"]["512x300x16"]["exact_sums"]["logprob_largest_error"] < 1e-5
    in_fp32 = logprobs["shapes"]["512x300x16"]["fp32_head"]
    assert all(ratio > 0 for ratio in in_fp32["of_bf16"].values()) and len(in_fp32["methods"]) == 4
    assert in_fp32["methods"]["fp32_head exact"]["logprob_largest_error"] < 1e-5
    row = loss["shapes"]["512x300x16"]["methods"]["cce_dist unbiased"]
    assert row["launch_ms"] > 0 and {"forward_x", "both_x", "peak_mb", "least_workspace_peak_mb"} <= set(row)
    assert [row["num_tokens"] for row in scaling["tokens"]] == [512, 1024]
    assert [row["vocab_size"] for row in scaling["vocabulary"]] == [300, 512]
    assert [len(row["backward_ms"]) for row in scaling["shards"]] == [1, 2]
    assert scaling["shards"][1]["backward_imbalance"] >= 1
    shares = stages["stages"]["512x300x16"]["modes"]["unbiased"]["stages"]
    assert sum(stage["share"] for stage in shares.values()) == pytest.approx(1)
    pytest.importorskip("matplotlib").use("agg")
    import report

    sys.modules.pop("report")
    assert len(report.budget_table(budget).splitlines()) == 4
    lines = report.scaling_table(scaling).splitlines()
    assert sum(line.startswith(("| 512 |", "| 1024 |")) for line in lines) == 4
    assert [line[:5] for line in lines[-2:]] == ["| 1 |", "| 2 |"]
    assert len(report.hostile_table(hostile).splitlines()) == 2 + 4 + 1 + 2 + 28
    assert report.stages_table(stages).splitlines()[2].startswith("| 512x300x16 | unbiased | ")
    report.plot_scaling(scaling, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
@pytest.mark.parametrize("method", ["fsdp2-stock", "fsdp2-exact", "zero3-exact"])
def test_a_training_step_is_timed_and_makes_nothing_as_large_as_the_classifier(method: str, tmp_path: Path) -> None:
    for name in ("deepspeed", "transformers"):
        pytest.importorskip(name)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 5000, 20_000))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    shape = [
        "--vocab",
        "5000",
        "--layers",
        "1",
        "--hidden",
        "128",
        "--length",
        "32",
        "--sequences",
        "1",
        "--steps",
        "6",
    ]
    options = ["--method", method, "--device", "cpu", "--tokens", str(tmp_path / "tokens.npy"), "--out", str(tmp_path)]
    subprocess.run([*command, str(ROOT / "benchmarks/train.py"), *shape, *options], check=True, timeout=200)
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("train-*.json"))
    row = result["methods"][method]["sequences"]["1"]
    assert row["tokens_per_s"] > 0 and row["first_step_ms"] > 0
    assert row["first_loss"] == pytest.approx(np.log(5000), rel=0.1)


def test_what_collectives_take_is_exposed_where_nothing_computes(benchmarks: Any) -> None:
    kernels = [("gemm", 0, 10), ("ncclKernel", 5, 25), ("add", 8, 12), ("gemm", 20, 30), ("ncclKernel", 31, 33)]
    found = benchmarks.overlap.overlap_ms(kernels)
    assert {name: round(ms * 1e3, 6) for name, ms in found.items()} == {
        "busy_ms": 22,
        "collectives_ms": 22,
        "exposed_ms": 8 + 2,
        "span_ms": 33,
    }


@pytest.mark.full
def test_methods_train_from_the_same_start_and_a_second_call_goes_on(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).zipf(1.3, 6000) % 300)
    monkeypatch.setitem(benchmarks.methods.RIVALS, "Apple cut-cross-entropy", lambda: 1 / 0)
    shape = "--vocab 300 --hidden 16 --layers 1 --length 20 --batch 4 --steps 10 --looks 2 --device cpu"
    command = f"convergence --tokens {tmp_path / 'ids.npy'} {shape} --out {tmp_path} --cache {tmp_path}".split()

    def call(*options: str) -> Any:
        monkeypatch.setattr(sys, "argv", [*command, *options])
        benchmarks.convergence.main()
        (path,) = tmp_path.glob("convergence-*.json")
        return json.loads(path.read_text())

    first = call("--seeds", "1", "--settings", "scratch", "--methods", "exact", "Apple")
    assert set(first["runs"]) == {"scratch/exact/0", "scratch/Apple/0"}
    assert "ZeroDivisionError" in first["runs"]["scratch/Apple/0"]["failed"]
    assert call("--seeds", "2", "--seconds", "1") == first, "no time for another run"
    runs = call("--seeds", "2")["runs"]
    assert runs["scratch/exact/0"] == first["runs"]["scratch/exact/0"], "it was not run again"
    for setting in ("scratch", "finetune"):
        exact = runs[f"{setting}/exact/0"]
        for name in ("exact", "unbiased", "cce_dist exact", "filtered", "filtered, tail=False"):
            row = runs[f"{setting}/{name}/0"]
            assert (f"{setting}/{name}/1" in runs) == (name in ("exact", "unbiased"))
            assert row["held_out_curve"][0] == exact["held_out_curve"][0], "the same weights"
            assert row["held_out_curve"][-1] == [10 if setting == "scratch" else 4, row["held_out"]]
            assert row["held_out"] < row["held_out_curve"][0][1], "it learns"
            assert row["train_curve"][0][1] == pytest.approx(exact["train_curve"][0][1], rel=1e-5), "the same batch"
            assert np.mean(row["held_out_tenths"]) == pytest.approx(row["held_out"], abs=0.02)
        for look in runs[f"{setting}/cce_dist exact/0"]["gradients"]:
            assert [value for key, value in look.items() if key != "step"] == [pytest.approx(1, abs=1e-5)] * 4
    assert runs["scratch/exact/0"]["held_out_curve"][0] != runs["scratch/exact/1"]["held_out_curve"][0]
    assert runs["finetune/exact/0"]["held_out_curve"][0] == runs["finetune/exact/1"]["held_out_curve"][0]


def test_ignored_labels_are_the_first_of_a_sequence_and_the_rarest_tenth_is_first(benchmarks: Any) -> None:
    convergence = benchmarks.convergence
    data = convergence.split(torch.arange(4001) % 7, 10, 7)
    assert [len(x) for x in (data["scratch"].train_SL, data["scratch"].held_out_SL)] == [263, 37]
    assert data["scratch"].counts_V.sum() == 2630 and data["finetune"].counts_V is data["scratch"].counts_V
    assert all(torch.equal(x[:, 1:], (x[:, :-1] + 1) % 7) for part in data.values() for x in part[:2]), "neighbours"
    labels_SL = convergence.labels_of(data["finetune"].train_SL, 0.7).view(-1, 10)
    assert bool((labels_SL[:, :7] == -100).all()) and bool((labels_SL[:, 7:] != -100).all())
    losses_N = torch.arange(20.0)
    assert convergence.by_tenths(losses_N, 100 - losses_N) == [18.5 - 2 * i for i in range(10)]


def test_a_difference_is_judged_by_its_interval(report: Any) -> None:
    assert report.interval([0.01, 0.02, 0.03]) == pytest.approx((0.02, 0.02 - 0.02484, 0.02 + 0.02484), abs=1e-5)
    assert report.verdict(*report.interval([0.01])[1:]) == "open: more seeds"
    words = {(-0.01, 0.012): "equal within ±0.015", (-0.001, 0.02): "within ±0.03", (0.01, 0.04): "worse"}
    words |= {(-0.02, 0.04): "open: more seeds", (-0.2, -0.1): "better"}
    assert {bounds: report.verdict(*bounds) for bounds in words} == words


def test_runs_of_training_are_compared_by_seed(report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(held_out: float) -> dict[str, Any]:
        look = {"step": 5, "hidden_cosine": 0.999, "hidden_ratio": 1.01, "weight_cosine": 0.99, "weight_ratio": 0.98}
        row = {"held_out": held_out, "held_out_tenths": [held_out] * 10, "gradients": [look]}
        row |= {"held_out_curve": [[0, 12.0], [10, held_out]], "train_curve": [[1, 5.0], [2, 4.0]]}
        return {**row, "head_ms": 3.0, "head_peak_mb": 10.0}

    runs: dict[str, Any] = {f"scratch/exact/{seed}": run(2.0 + seed) for seed in range(3)}
    runs |= {f"scratch/unbiased/{seed}": run(2.0 + seed + 0.001 * seed) for seed in range(3)}
    runs["scratch/Apple/0"] = {"failed": "ModuleNotFoundError: none"}
    lines = report.convergence_table({"runs": runs}).splitlines()
    found = "| scratch | unbiased | 3 | 3.0010 | +0.0000, +0.0010, +0.0020 | +0.0010 [-0.0015, +0.0035] | equal within"
    assert lines[3].startswith(found) and "ModuleNotFoundError" in lines[4]
    assert {line.count("|") for line in lines} == {13}
    report.plot_convergence({"runs": runs}, tmp_path / "convergence.png")
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")
    page, result = tmp_path / "page.md", tmp_path / "convergence-cpu.json"
    page.write_text("# Head\n<!-- report: convergence -->\nold\n<!-- end of report -->\ntail\n")
    result.write_text(json.dumps({"command": "benchmarks/convergence.py", "runs": runs}))
    monkeypatch.setattr(sys, "argv", ["report", str(result), "--plot", str(tmp_path / "p.png"), "--page", str(page)])
    report.main()
    written = page.read_text()
    assert written.startswith("# Head\n<!-- report: convergence -->\n\n| setting |") and written.endswith("-->\ntail\n")
    assert "old" not in written and "results/p.png)" in written and lines[3] in written
    with pytest.raises(ValueError, match="has no lines <!-- report: hostile -->"):
        report.write_into(page, "hostile", "")
    runs["scratch/unbiased/1"]["held_out_curve"][0][1] = 12.1
    with pytest.raises(ValueError, match="start at held-out losses"):
        report.convergence_table({"runs": runs})
