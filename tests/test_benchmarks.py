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
    "budget",
    "distillation",
    "first_pass",
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
        splits = tuning.tuning_for(tried).splits
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
    assert rows[1] == Row("interpreter", 4, None, 1024, tuning.tuning_for(torch.empty(1, 16)))


def test_a_shape_is_a_name_or_three_numbers(benchmarks: Any) -> None:
    assert benchmarks.loss.shape_of("gemma") == (8192, 262144, 2304)
    assert benchmarks.loss.shape_of("512x1000x64") == (512, 1000, 64)
    for wrong in ("512x1000", "500x1000x64", "gema", "512x0x64"):
        with pytest.raises(ValueError, match="shape must be one of gemma, llama3"):
            benchmarks.loss.shape_of(wrong)


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
        "first_pass": "--shapes 512x200x16 --noise 512x200x16 --only 0.05",
        "budget": "--shapes 512x300x16 --budgets 256 logits",
    }.items():
        monkeypatch.setattr(sys, "argv", [name, *common, *options.split(), "--out", "results"])
        getattr(benchmarks, name).main()
    assert len(list(Path("cache").iterdir())) == 3, "stages takes the inputs that loss has trained"
    budget, distillation, first_pass, logprobs, loss, scaling, stages = (
        json.loads(path.read_text()) for path in sorted(Path("results").iterdir())
    )
    rows = budget["shapes"]["512x300x16"]["budgets"]
    assert list(rows) == ["256 MB", "logits"]
    assert all(min(row["both_x"], row["forward_x"]) > 0 and row["weight_error"] < 1e-5 for row in rows.values())
    assert {len(case["errors"]) for case in first_pass["cases"].values()} == {3}
    assert first_pass["times"]["512x200x16"]["forward, fp8"] > 0
    rows = distillation["shapes"]["512x300x16"]["methods"]
    assert all(row["both_x"] > 0 for row in rows.values()) and len(rows) == 11
    errors = [x for name, row in rows.items() for key, x in row.items() if "error" in key and name.startswith("cce")]
    assert len(errors) == 9 and max(errors) < 1e-4
    rows = logprobs["shapes"]["512x300x16"]["methods"]
    assert list(rows) == ["cce_dist", "cce_dist exact", "chunks of logits", "cce_dist eps 2^-3.0"]
    assert all(row["policy_hidden_error"] < 1e-5 and row["logprob_largest_error"] < 1e-5 for row in rows.values())
    assert logprobs["shapes"]["512x300x16"]["exact_sums"]["logprob_largest_error"] < 1e-5
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
