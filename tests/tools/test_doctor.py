"""The doctor: healthy ranks pass, and every kind of sick one is named, with an end in time on all ranks."""

import contextlib
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launched import free_port
from ranks import RankPool, starter
from readme import missing, shown

from cce_dist.cli import main
from cce_dist.tools.doctor import loss, machine
from cce_dist.tools.doctor.command import on_rank
from cce_dist.tools.doctor.config import Checked, check_config

ROOT = Path(__file__).parents[2]
ZERO3 = ROOT / "configs/deepspeed/zero3.json"
CPU = torch.device("cpu")


def _scaled_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
    from cce_dist import linear_cross_entropy

    return linear_cross_entropy(*args, **kwargs) * 1.01


_versions = machine.versions
_SICK: dict[str, tuple[Any, str, Any]] = {
    "version": (machine, "versions", lambda: {**_versions(), "torch": "2.0.0"}),
    "result": (loss, "linear_cross_entropy", _scaled_loss),
    "raises": (loss, "loss_errors", lambda *_: torch.zeros(2) @ torch.zeros(3)),
}


_CASES = 8 if torch.cuda.is_available() else 4
"""Of the loss; bf16 beside fp32 on a GPU."""


def _compiled() -> bool:
    """As on GPUs: each rank computes some of the cases alone, before all of them are looked at."""
    group, cpu = dist.group.WORLD, torch.device("cpu")
    cases = [
        loss.Case(sharded, torch.float32, gradient) for sharded in (False, True) for gradient in ("exact", "unbiased")
    ]
    computed = []
    with pytest.MonkeyPatch.context() as patch:
        errors = loss.loss_errors
        patch.setattr(loss, "loss_errors", lambda *args: computed.append(errors(*args)))
        loss._compile(cases, group, cpu)
    assert len(computed) == len(cases) // dist.get_world_size()
    return all(error < 1e-4 for found in computed for error in found.values())


def test_every_rank_of_a_node_compiles_some_of_the_kernels(ranks: RankPool) -> None:
    assert all(ranks.run(2, _compiled))


def _visit(port: int, configs: list[Path | None], sickness: str | None) -> tuple[int, str]:
    """A case of the pool: the doctor on every rank; the last has the sickness. (exit code, what was printed)"""
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()  # the doctor makes its own
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        if sickness is not None and rank == world - 1:
            patch.setattr(*_SICK[sickness])
        code = on_rank(rank, world, "127.0.0.1", port, False, configs[rank], 40.0)
    return code, said.getvalue()


def visit(ranks: RankPool, world: int, configs: list[Path | None], sickness: str | None = None) -> str:
    """What rank 0 printed; all ranks end alike, and the others print nothing."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (code, said), *others = ranks.run(world, _visit, server.port, configs, sickness, timeout=120)
    assert others == [(code, "")] * (world - 1)
    assert (code == 0) == (f"No faults on {world} rank(s)." in said)
    assert code in (0, 1)
    return said


def flat(text: str) -> str:
    return " ".join(text.split())


class TestRanks:
    def test_healthy_ranks_pass_every_check(self, ranks: RankPool) -> None:
        said = visit(ranks, 2, [None, None])
        for check in ("ranks", "versions", "device", "groups", "all-reduce", "GEMM", "loss"):
            assert f"\n {check} " in said
        assert "FAULT" not in said
        assert f"torch {torch.__version__}" in said
        assert f"{_CASES} cases over 1 group(s) of 2" in said

    def test_a_rank_with_other_versions_is_named_before_any_group_is_made(self, ranks: RankPool) -> None:
        said = visit(ranks, 3, [None] * 3, "version")
        others = f"the others have {torch.__version__}"
        assert f"FAULT versions: torch: rank 2: 2.0.0, where {others}; install the same" in said
        assert "all-reduce" not in said

    def test_a_rank_whose_loss_is_wrong_is_named_with_what_differs(self, ranks: RankPool) -> None:
        said = visit(ranks, 2, [None, None], "result")
        assert "FAULT loss: rank 1: (same tokens, float32, exact) differs from fp64 logits: loss by 0.01" in said
        assert "rank 0: (same tokens, float32, exact) differs from fp64 logits: loss" not in said

    def test_an_exception_is_the_report_of_its_rank(self, ranks: RankPool) -> None:
        said = visit(ranks, 1, [None], "raises")
        assert "FAULT loss: rank 0: RuntimeError at test_doctor.py" in said

    @pytest.mark.full
    def test_the_groups_are_those_of_the_config(self, ranks: RankPool, tmp_path: Path) -> None:
        config = tmp_path / "ds.json"
        section = {"vocab_parallel_size": 2}
        config.write_text(json.dumps({"zero_optimization": {"stage": 3}, "cce_dist": section}))
        said = flat(visit(ranks, 4, [config] * 4))
        assert f"{_CASES} cases over 2 group(s) of 2" in said
        assert "NOTE config: ranks 0-3: DeepSpeed's own initialize ignores the section" in said
        assert "WARNING config" not in said  # a right config cannot mend it

    def test_a_bad_config_is_a_fault_on_the_ranks_that_read_it(self, ranks: RankPool, tmp_path: Path) -> None:
        good, bad = tmp_path / "good.json", tmp_path / "bad.json"
        good.write_text('{"cce_dist": {}}')
        bad.write_text('{"cce_dist": {"gradiant": "exact"}}')
        said = visit(ranks, 2, [good, bad])
        assert "FAULT config: rank 1: the section" in said
        assert "gradiant: unknown key" in said
        assert "checksums of different files" in said


class TestConfig:
    def check(self, tmp_path: Path, content: Any, world: int = 4) -> Checked:
        file = tmp_path / "ds.json"
        file.write_text(json.dumps(content))
        return check_config(file, world, CPU)

    def test_the_shipped_files_have_no_fault(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)
        for file in [*ROOT.glob("configs/deepspeed/*.json"), *ROOT.glob("configs/train/*.yaml")]:
            assert check_config(file, 2, CPU).faults == []

    def test_a_section_that_stock_deepspeed_would_ignore_is_said_with_the_remedy(self) -> None:
        (note,) = check_config(ZERO3, 2, CPU).notes
        assert "without a word" in note
        assert "cce_dist.deepspeed.install()" in note

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ({"cce-dist": {}}, 'has no section "cce_dist", but "cce-dist", which nothing reads'),
            ({"cce_dist": {"vocab_parallel_size": 3}}, "3 does not divide the 4 ranks"),
            ({"cce_dist": {"gradient": "best"}}, "gradient = 'best'"),
            ({"cce_dist": {}, "zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights"),
            ([], "holds a list, not a JSON object"),
            (
                {"train_batch_size": 9, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1},
                "2 x gradient_accumulation_steps 1 x 4 ranks = 8",
            ),
        ],
    )  # fmt: skip
    def test_what_is_wrong_in_a_deepspeed_json_is_named(self, tmp_path: Path, content: Any, said: str) -> None:
        (fault,) = self.check(tmp_path, content).faults
        assert said in fault

    def test_without_a_section_the_stock_head_is_no_fault(self, tmp_path: Path) -> None:
        checked = self.check(tmp_path, {"zero_optimization": {"stage": 3}})
        assert (checked.faults, checked.notes) == ([], [])
        assert "the stock head" in checked.summary

    def test_what_is_wrong_in_the_trainers_yaml_is_named(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        model = "output: out\nmodel: {config: {model_type: llama}}\n"
        file.write_text(f"{model}engine: none\nstepz: 3\n")
        assert "stepz: unknown key" in check_config(file, 2, CPU).faults[0]
        file.write_text(f"{model}engine: none\n")
        assert "engine: none is for a single process, got 2 ranks" in check_config(file, 2, CPU).faults[0]
        assert check_config(file, 1, CPU).faults == []
        file.write_text(f"{model}engine: fsdp2\ncce: {{vocab_parallel_size: 3}}\n")
        assert "does not divide the 4 ranks" in check_config(file, 4, CPU).faults[0]
        file.write_text("output: out\nmodel: {config: {model_type: llama, hiden_size: 3}}\nengine: fsdp2\n")
        assert "model.config.hiden_size (close to it: hidden_size" in check_config(file, 4, CPU).faults[0]

    def test_a_file_that_is_not_there_is_named(self) -> None:
        assert check_config(Path("/nowhere.yaml"), 2, CPU).faults == [
            "cannot read /nowhere.yaml: No such file or directory."
        ]


_SICK_GROUPS = """
import os, signal, sys, time
from cce_dist.doctor import main
from cce_dist.tools.doctor import council, groups

stock = groups.examine

def sick(*args):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ["RANK"] == "2":
        time.sleep(1000)
    return stock(*args)

groups.examine, council.GRACE = sick, 2.0
if __name__ == "__main__":
    sys.exit(main(["--seconds", "{seconds}"]))
"""

_START = """
import os

os.environ.update({environment})
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT)
os.dup2(log, 1)
os.dup2(log, 2)
"""


def _environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path, **more}


def _without_measurements(line: str) -> str:
    """A line of the doctor's table without times, errors and the name of the machine, its gaps closed."""
    of_any_machine = line.replace(f": {socket.gethostname()}: ", ": vm: ")
    return " ".join(re.sub(r"\b[\d.e+-]+(?= (ms|GB/s|TFLOP/s|of what is allowed))", "#", of_any_machine).split())


class TestProcesses:
    def test_a_rank_that_dies_and_one_that_hangs_are_named_and_no_rank_waits_for_them(self, tmp_path: Path) -> None:
        port, world, seconds = free_port(), 3, 5
        code = _SICK_GROUPS.format(seconds=seconds)
        started = time.monotonic()
        processes = []
        for rank in range(world):
            where = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            prologue = _START.format(environment=_environment(**where), log=str(tmp_path / str(rank)))
            process = starter().Process(target=exec, args=(prologue + code, {"__name__": "__main__"}))
            process.start()
            processes.append(process)
        try:
            for process in processes:
                process.join(100)
        finally:
            for process in processes:
                process.kill()
        assert time.monotonic() - started < 100
        said = (tmp_path / "0").read_text()
        assert [process.exitcode for process in processes] == [1, -signal.SIGKILL, 1], said
        assert "rank 1: no answer. The process died, hangs, or cannot reach rank 0" in said
        assert f"FAULT groups: ranks 0, 2: was not done in {seconds} s" in said

    @pytest.mark.full
    def test_under_torchrun_a_dead_rank_ends_the_visit_with_a_table(self, tmp_path: Path) -> None:
        script = tmp_path / "sick.py"
        script.write_text(_SICK_GROUPS.format(seconds=40))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
        where = ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(script)]
        environment = {**os.environ, **_environment()}
        done = subprocess.run([*torchrun, *where], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        assert "rank 1: no answer" in done.stdout
        assert "FAULT groups" in done.stdout

    @pytest.mark.full
    @pytest.mark.parametrize("config", [None, "/nowhere.json"])
    def test_the_command_alone_starts_two_ranks_on_a_cpu_and_hands_on_their_faults(
        self, config: str | None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in _environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("RANK", raising=False)
        code = main(["doctor", *(["--config", config] if config else [])])
        said = capfd.readouterr().out
        if config is None:
            documented = [_without_measurements(line) for line in shown("cce-dist doctor")]
            assert missing(documented, "\n".join(map(_without_measurements, said.splitlines()))) == []
            assert code == 0
        else:
            assert "FAULT config: ranks 0-1: cannot read /nowhere.json" in said
            assert code == 1

    def test_half_an_environment_of_a_launcher_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert main(["doctor"]) == 2
        assert "not all of WORLD_SIZE, MASTER_ADDR and MASTER_PORT" in capsys.readouterr().err
        monkeypatch.setattr(sys, "argv", ["doctor"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("cce_dist.doctor", run_name="__main__")  # the entry for torchrun
        assert ended.value.code == 2
        assert "not all of WORLD_SIZE, MASTER_ADDR and MASTER_PORT" in capsys.readouterr().err
