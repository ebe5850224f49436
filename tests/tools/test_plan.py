"""The planner: its figures against measurements and real allocations, how they move, and what it refuses."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankPool

from cce_dist import VocabShard, linear_cross_entropy
from cce_dist.cli import main
from cce_dist.kernels.problem import TILE
from cce_dist.tools.plan import spread
from cce_dist.tools.plan.calibration import STOCK, calibrate, compute_ms
from cce_dist.tools.plan.job import ELEMENT, GPUS, Job, group_sizes
from cce_dist.tools.plan.memory import OPTIMIZER, budget_of, loss_bytes
from cce_dist.tools.plan.spread import Setting

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks/results").glob("loss-*-trained-*.json"))
OF_RANKS = sorted((ROOT / "benchmarks/results").glob("ranks-*-trained-*.json"))
GPU = "h100"  # the one that was measured
CALIBRATION = calibrate([*FILES, *OF_RANKS], GPU)
GEMMA = Job(vocab=262144, hidden=2304, tokens=8192, gpus=64, gpu="h100")
WORDS = ["--vocab", "262144", "--hidden", "2304", "--tokens", "8192", "--gpus", "64"]


def measurements() -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """(shape's name, method, shape, row) of every method that the planner knows; the last file's of a shape."""
    shapes: dict[str, Any] = {}
    for file in FILES:
        content = json.loads(file.read_text())
        shapes |= content["shapes"] if GPU in content["gpu"].lower() else {}
    methods = (STOCK, "cce_dist unbiased", "cce_dist filtered", "cce_dist exact")
    rows = [(shape, method, r, r["methods"].get(method, {})) for shape, r in shapes.items() for method in methods]
    return [row for row in rows if "both_ms" in row[3]]


MEASURED = measurements()
jobs = st.builds(
    Job,
    vocab=st.integers(4096, 300_000),
    hidden=st.integers(64, 16384),
    tokens=st.integers(1, 1 << 18),
    gpus=st.sampled_from([1, 2, 4, 8, 16, 64, 256, 4096]),
    gpu=st.sampled_from(sorted(GPUS)),
    gpus_per_node=st.just(8),
    gradient=st.sampled_from(["unbiased", "filtered", "exact"]),
    workspace_mb=st.none(),
    network=st.none(),
)


def by_name(job: Job) -> dict[str, Setting]:
    return {setting.name.split()[0]: setting for setting in spread.settings(job, CALIBRATION)}


class TestAgainstMeasurements:
    @pytest.mark.parametrize(("shape", "method", "result", "row"), MEASURED, ids=[f"{m[0]} {m[1]}" for m in MEASURED])
    def test_one_gpus_time_and_memory_are_those_measured(
        self, shape: str, method: str, result: dict[str, Any], row: dict[str, Any]
    ) -> None:
        tokens, vocab, hidden = result["num_tokens"], result["vocab_size"], result["hidden_size"]
        ms = compute_ms(CALIBRATION, method, GPU, tokens, vocab, hidden)
        assert ms == pytest.approx(row["both_ms"], rel=0.25)
        if method == STOCK:
            peak = CALIBRATION.logit_bytes[method] * tokens * vocab
        else:
            returned = ELEMENT * tokens * hidden  # the benchmark leaves out the gradients that are returned
            peak = sum(loss_bytes(tokens, vocab, hidden, method.split()[1], None, 1)) - returned
        assert peak == pytest.approx(row["peak_mb"] * 1e6, rel=0.15)

    def test_the_error_that_is_printed_is_the_largest_of_the_fit(self) -> None:
        assert 0 < CALIBRATION.error < 0.25
        fits = [
            compute_ms(CALIBRATION, m, GPU, r["num_tokens"], r["vocab_size"], r["hidden_size"]) / row["both_ms"]
            for _, m, r, row in MEASURED
        ]
        assert max(abs(fit - 1) for fit in fits) <= CALIBRATION.error + 1e-9

    @pytest.mark.parametrize("shape", ["gemma", "llama3"])
    def test_several_gpus_take_what_was_measured(self, shape: str) -> None:
        for result in (json.loads(file.read_text()) for file in OF_RANKS):
            of = result["shapes"][shape]
            job = Job(of["vocab_size"], of["hidden_size"], of["num_tokens"], result["ranks"], GPU)
            planned = {setting.name: setting.step for setting in spread.settings(job, CALIBRATION)}
            seen = of["layouts"]["own tokens"]
            assert planned[f"cce_dist {result['ranks']}"] == pytest.approx(seen["cce_dist"]["both_ms"], rel=0.15)
            assert planned["FSDP gather"] == pytest.approx(seen["classifier gathered"]["both_ms"], rel=0.15)

    def test_measurements_of_an_untrained_model_do_not_count(self, tmp_path: Path) -> None:
        content = json.loads(FILES[-1].read_text())
        (tmp_path / "initial.json").write_text(json.dumps({**content, "steps": 0}))
        with pytest.raises(ValueError, match="no measurement of a GPU among a100, h100"):
            calibrate([tmp_path / "initial.json"], GPU)

    @pytest.mark.parametrize(("name", "key"), [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100")])
    def test_the_gpu_of_a_file_is_known_by_its_name(self, tmp_path: Path, name: str, key: str) -> None:
        content = json.loads(FILES[-1].read_text())
        (tmp_path / "other.json").write_text(json.dumps({**content, "gpu": name}))
        assert calibrate([tmp_path / "other.json", *FILES], key).gpu == key
        (tmp_path / "other.json").write_text(json.dumps({**content, "gpu": "NVIDIA GH200 480GB"}))
        got, expected = (calibrate(files, "b200") for files in ([tmp_path / "other.json", *FILES], FILES))
        assert (got.gpu, got.shapes) == (expected.gpu, expected.shapes)
        for name, coefficients in expected.forward.items():
            assert got.forward[name] == pytest.approx(coefficients)

    def test_new_measurements_change_the_plan(self, tmp_path: Path) -> None:
        content = json.loads(FILES[-1].read_text())
        for result in content["shapes"].values():
            for row in result["methods"].values():
                row.update({key: 3 * row[key] for key in ("forward_ms", "both_ms") if key in row})
        (tmp_path / "slow.json").write_text(json.dumps(content))
        slow = calibrate([tmp_path / "slow.json"], GPU)
        fast = calibrate(FILES[-1:], GPU)
        ms = [spread.vocabulary_parallel(GEMMA, c, 1).compute for c in (fast, slow)]
        assert ms[1] == pytest.approx(3 * ms[0])


def _saved_by_the_loss(tokens: int, hidden_size: int, vocab: int, gradient: str) -> list[tuple[bool, bool, int]]:
    """On a rank, of every tensor that the loss keeps for backward, but its rows of the classifier: whether it is one of
    16 bits, whether it has a row for each token, its bytes."""
    world = dist.group.WORLD
    shard = VocabShard.even(vocab, world, world)
    hidden = torch.randn(tokens, hidden_size, dtype=torch.float16, requires_grad=True)
    rows = torch.randn(shard.num_rows, hidden_size, dtype=torch.float16, requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    loss = linear_cross_entropy(
        hidden, rows, labels, shard=shard, reduction="none", gradient=gradient, backend="triton"
    )
    node: Any = loss.grad_fn
    while "LinearCrossEntropy" not in node.name():
        node = node.next_functions[0][0]
    kept = [x for x in node.saved_tensors if x is not None and x.data_ptr() != rows.data_ptr()]
    return [(x.dtype == torch.float16, x.shape[-1] == hidden_size, x.nbytes) for x in kept]


def _assembled_rows(vocab: int, hidden_size: int, group: int) -> int:
    from cce_dist.deepspeed.slices import RowsFromSlices

    world = dist.group.WORLD
    assert world is not None
    own = torch.zeros(vocab * hidden_size // dist.get_world_size(), dtype=torch.bfloat16)
    return RowsFromSlices(vocab, hidden_size, world, group).assemble(own).nbytes


class TestAgainstAllocations:
    @pytest.mark.parametrize("gradient", ["unbiased", "exact"])
    def test_what_the_sharded_loss_keeps_for_backward(self, ranks: RankPool, gradient: str) -> None:
        tokens, hidden_size, vocab, world = 48, 32, 4 * TILE, 2
        planned, summaries, _ = loss_bytes(world * tokens, vocab // world, hidden_size, gradient, None, world)
        states = planned * ELEMENT / (ELEMENT + 4)  # the rest is dE, in backward
        for kept in ranks.run(world, _saved_by_the_loss, tokens, hidden_size, vocab, gradient):
            assert sum(size for half, of_tokens, size in kept if half and of_tokens) == states
            assert sum(size for half, of_tokens, size in kept if half and not of_tokens) == summaries
            assert sum(size for half, _, size in kept if not half) <= 64 * world * tokens  # a few numbers a token

    def test_the_rows_that_a_group_smaller_than_the_ranks_gathers(self, ranks: RankPool) -> None:
        job = Job(vocab=64, hidden=8, tokens=4, gpus=4, gpu="h200", gpus_per_node=4)
        planned = spread.vocabulary_parallel(job, CALIBRATION, 2).bytes.rows / 2  # and as much for their gradient
        assert ranks.run(4, _assembled_rows, 64, 8, 2) == [planned] * 4


class TestHowFiguresMove:
    @settings(derandomize=True, deadline=None, database=None)
    @given(job=jobs, factor=st.integers(2, 5))
    def test_more_tokens_or_a_larger_head_never_cost_less(self, job: Job, factor: int) -> None:
        for key in ("tokens", "vocab", "hidden"):
            larger = job._replace(**{key: factor * getattr(job, key)})
            for before, after in zip(
                spread.settings(job, CALIBRATION), spread.settings(larger, CALIBRATION), strict=True
            ):
                assert after.step >= before.step
                assert after.bytes.total >= before.bytes.total

    @settings(derandomize=True, deadline=None, database=None)
    @given(job=jobs)
    def test_a_faster_network_never_costs_more(self, job: Job) -> None:
        faster = job._replace(network=4 * GPUS[job.gpu].network)
        for before, after in zip(spread.settings(job, CALIBRATION), spread.settings(faster, CALIBRATION), strict=True):
            assert after.links <= before.links
            assert after.compute == before.compute

    @settings(derandomize=True, deadline=None, database=None)
    @given(job=jobs)
    def test_a_larger_group_holds_fewer_rows_and_more_hidden_states(self, job: Job) -> None:
        sizes = [spread.vocabulary_parallel(job, CALIBRATION, size).bytes for size in group_sizes(job)]
        for smaller, larger in itertools.pairwise(sizes):
            assert larger.rows < smaller.rows
            assert larger.hidden > smaller.hidden
            assert larger[:3] == smaller[:3]

    @settings(derandomize=True, deadline=None, database=None)
    @given(job=jobs)
    def test_the_stored_bytes_of_all_ranks_are_those_of_one_classifier(self, job: Job) -> None:
        whole = job.vocab * job.hidden * (2 * ELEMENT + OPTIMIZER)
        for name, setting in by_name(job).items():
            copies = {"plain": job.gpus, "tensor": job.gpus / min(job.gpus, 8)}.get(name, 1)
            assert sum(setting.bytes[:3]) * job.gpus == pytest.approx(copies * whole)

    @settings(derandomize=True, deadline=None, database=None)
    @given(job=jobs, memory=st.floats(1e6, 1e12))
    def test_what_is_recommended_fits_and_nothing_that_fits_is_much_faster(self, job: Job, memory: float) -> None:
        found = spread.settings(job, CALIBRATION)
        best = spread.recommend(found, memory)
        fitting = [setting for setting in found if setting.bytes.total <= memory]
        assert (best is None) == (not fitting)
        if best is not None:
            assert best in fitting
            assert best.step <= 1.05 * min(setting.step for setting in fitting)

    def test_hand_made_figures_of_a_node(self) -> None:
        """V = 262144, D = 2304 on 8 GPUs: the gather of FSDP moves 7/8 of 1.208 GB three times at what links reach."""
        job = GEMMA._replace(gpus=8)
        found = by_name(job)
        size = 2 * 262144 * 2304
        links = CALIBRATION.links
        assert 0.3 < links.share < 1 and 0 < links.latency_ms < 1
        latency = 3 * links.latency_ms * 3
        assert found["FSDP"].links == pytest.approx(3 * 1e3 * size * 7 / 8 / (links.share * 450e9) + latency)
        assumed = {s.name: s for s in spread.settings(job, calibrate(FILES, GPU))}
        assert assumed["FSDP gather"].links == pytest.approx(3 * 1e3 * size * 7 / 8 / 450e9 + 3 * 0.01 * 3)
        assert found["FSDP"].bytes.rows == 2 * size
        assert found["cce_dist"].bytes.rows == 0  # vocab_parallel_size 8: each holds its own
        assert found["plain"].bytes[:3] == (size, size, 6 * size)


class TestCommand:
    def test_the_table_marks_the_recommendation_and_says_what_it_rests_on(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert main(["plan", *WORDS, "--gpu", "h200", "--plot", str(tmp_path / "plan.png")]) == 0
        said = capsys.readouterr().out
        job = GEMMA._replace(gpu="h200")
        best = spread.recommend(spread.settings(job, CALIBRATION), GPUS["h200"].memory)
        assert best is not None
        (marked,) = [line for line in said.splitlines() if line.rstrip().endswith("<--")]
        assert marked.strip().startswith(f"{best.name} ")
        assert f"Recommended: {best.name}," in said
        assert "Links as measured on 2 h100, networks by datasheets" in said
        assert "scaled by datasheets" in said
        assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")

    def test_a_model_folder_and_a_deepspeed_json_say_the_same_as_numbers(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 262144, "hidden_size": 2304}}))
        section = {"gradient": "exact", "workspace_mb": 512}
        config = tmp_path / "ds.json"
        config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "cce_dist": section}))
        files = ["--model", str(tmp_path), "--config", str(config), "--sequence-length", "4096", "--gpus", "64"]
        assert main(["plan", *files]) == 0
        from_files = capsys.readouterr().out
        config.write_text(json.dumps({"cce_dist": {"workspace_mb": 512}}))
        assert main(["plan", *WORDS, "--config", str(config), "--gradient", "exact"]) == 0
        assert capsys.readouterr().out == from_files
        assert "Gradient: exact" in from_files

    def test_exact_shows_what_memory_buys(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["plan", *WORDS, "--gradient", "exact"])
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Exact by workspace_mb")]
        budgets = re.findall(r"(\d+|logits): (\d+) MB kept, ([\d.]+) ms", line)
        assert [name for name, *_ in budgets] == ["256", "1024", "2048", "4096"]  # which is all, as "logits" would be
        kept, ms = ([float(row[column]) for row in budgets] for column in (1, 2))
        assert kept == sorted(kept) and ms == sorted(ms, reverse=True)
        assert (kept[0], kept[-1]) == (0, round(2 * GEMMA.tokens * GEMMA.vocab / 1e6))
        assert ms[-1] < 0.85 * ms[0]

    @pytest.mark.parametrize("budget", [256, 300, 1024, 2048, 5000, "logits"])
    @pytest.mark.parametrize("group", [1, 8])
    def test_what_is_kept_and_the_workspace_fit_the_budget(self, budget: Any, group: int) -> None:
        job = GEMMA._replace(gradient="exact", workspace_mb=budget)
        if group not in group_sizes(job):
            pytest.skip("one tile of all tokens is more")
        of = spread.vocabulary_parallel(job, CALIBRATION, group).bytes
        everything = 2 * job.tokens * job.vocab
        split = budget_of(group * job.tokens, job.vocab // group, "exact", budget)
        assert of.logits == 2 * group * job.tokens * split.columns <= everything
        assert (of.logits == everything) == (budget in (5000, "logits"))
        assert budget == "logits" or of.logits + split.workspace <= budget << 20

    def test_a_workspace_that_large_groups_would_refuse_leaves_them_out(self) -> None:
        assert group_sizes(GEMMA._replace(workspace_mb=64)) == [1, 2, 4, 8, 16, 32]

    def test_a_head_that_fits_nowhere_is_said_with_exit_code_1(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", *WORDS, "--head-gb", "0.5"]) == 1
        said = capsys.readouterr().out
        assert "Nothing fits 0.5 GB" in said
        assert "too big" in said

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--gpus", "8"], "give --vocab or --model"),
            (["--gpus", "8", "--vocab", "100", "--hidden", "8"], "give --tokens, or --sequence-length"),
            ([*WORDS, "--gpu", "tpu"], "--gpu must be one of a100, b200, h100, h200, got 'tpu'"),
            ([*WORDS, "--gpus", "12"], "must be a multiple of --gpus-per-node 8"),
            ([*WORDS, "--vocab", "32"], "32 rows are fewer than the 64 GPUs"),
            ([*WORDS, "--head-gb", "500"], "--head-gb must be above 0 and at most 80"),
            ([*WORDS, "--model", "/nowhere"], "cannot read /nowhere"),
            ([*WORDS, "--measured", "pyproject.toml"], "is not a result of benchmarks/loss.py"),
        ],
    )
    def test_bad_arguments_are_named(
        self, words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(ROOT)
        assert main(["plan", *words]) == 2
        assert said in capsys.readouterr().err

    @pytest.mark.parametrize("word", ["0", "-3", "many"])
    def test_numbers_that_are_none_end_with_exit_code_2(self, word: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["plan", *WORDS, "--tokens", word])
        assert ended.value.code == 2
        assert "argument --tokens" in capsys.readouterr().err

    def test_files_that_do_not_say_what_is_needed_are_named(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text('{"vocab_size": true}')
        assert main(["plan", "--model", str(tmp_path), "--gpus", "8"]) == 2
        assert "config.json has no vocab_size (got True)" in capsys.readouterr().err
        (tmp_path / "ds.json").write_text('{"cce_dist": {"gradiant": "exact"}}')
        assert main(["plan", *WORDS, "--config", str(tmp_path / "ds.json")]) == 2
        assert "gradiant: unknown key" in capsys.readouterr().err

    def test_without_a_measurement_of_a_method_there_is_no_figure_for_it(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        shutil.copy(FILES[0], tmp_path / "results.json")
        content = json.loads((tmp_path / "results.json").read_text())
        for result in content["shapes"].values():
            result["methods"]["cce_dist exact"] = {"failed": "out of memory"}
        (tmp_path / "results.json").write_text(json.dumps(content))
        words = [*WORDS, "--gradient", "exact", "--measured", str(tmp_path / "results.json")]
        assert main(["plan", *words]) == 2
        assert "'cce_dist exact' was not measured" in capsys.readouterr().err
