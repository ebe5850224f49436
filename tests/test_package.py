"""The package: what a wheel holds, what an import brings in, and the scripts."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import cce_dist

ROOT = Path(__file__).parent.parent
SCRIPTS = [ROOT / ".ci/run", *sorted((ROOT / "launch").glob("*.sh"))]


# All that is tracked; beside it may lie what commands, builds and people have left.
SOURCES = (
    *(".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "benchmarks", "cce_dist"),
    *("configs", "docs", "kernels", "launch", "pyproject.toml", "tests"),
)


def _copy_sources(to: Path) -> None:
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, to)


def _python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd="/", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    _copy_sources(source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", built, source]
    subprocess.run(pip, check=True, timeout=200)
    (found,) = built.glob("cce_dist-*.whl")
    return found


def test_the_wheel_holds_every_module_and_nothing_beside_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    expected = {f"cce_dist/{path.relative_to(ROOT / 'cce_dist')}" for path in (ROOT / "cce_dist").rglob("*.py")} | {
        f"cce_dist/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == expected
    assert {"cce_dist/py.typed", "cce_dist/kernels/triton/tuning.json"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"cce_dist"}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process says that has the wheel alone: where the package is, what its import brought in, a loss."""
    site = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True, timeout=120)
    code = (
        "import json, sys, cce_dist; brought = sorted(set(sys.modules)); import torch;"
        "e, c, y = torch.randn(4, 8), torch.randn(9, 8), torch.arange(4);"
        "ours, stock = cce_dist.linear_cross_entropy(e, c, y), torch.nn.functional.cross_entropy(e @ c.T, y);"
        "from cce_dist.tools.plan.calibration import MEASURED;"
        "measured = [file.name for file in MEASURED.glob('*.json')];"
        "said = dict(file=cce_dist.__file__, brought=brought, loss=ours.item(), stock=stock.item(), measured=measured);"
        "print(json.dumps(said))"
    )
    return {**json.loads(_python(code, PYTHONPATH=str(site))), "site": str(site)}


def test_the_installed_wheel_computes_a_loss_and_has_the_measurements(installed: dict[str, Any]) -> None:
    assert installed["file"].startswith(installed["site"])
    assert installed["loss"] == pytest.approx(installed["stock"], rel=1e-5)
    assert installed["measured"], "the planner needs them"


def test_the_import_brings_in_no_optional_framework(installed: dict[str, Any]) -> None:
    optional = {"deepspeed", "transformers", "accelerate", "yaml", "rich", "tokenizers"}
    assert optional & set(installed["brought"]) == set()


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("deepspeed", "deepspeed", "deepspeed"),
        pytest.param("trainer_callback", "transformers", "train", marks=pytest.mark.full),
    ],
)
def test_an_import_without_its_package_says_what_to_install(module: str, package: str, extra: str) -> None:
    code = f"""
import sys
sys.modules["{package}"] = None  # as if it were not installed
try:
    import cce_dist.{module}
except ModuleNotFoundError as error:
    print(error.name, error)
"""
    said = f"{package} cce_dist.{module} needs the package {package}: pip install 'cce_dist[{extra}]'"
    assert _python(code) == said


TYPED = """from typing import Any

from cce_dist import CCEConfig, VocabShard, linear_cross_entropy

config: CCEConfig = CCEConfig(gradient="exact")
shard: VocabShard = VocabShard.whole(9)


def loss(hidden: Any, weight: Any, labels: Any) -> Any:
    return linear_cross_entropy(hidden, weight, labels, shard=SHARD)
"""


@pytest.mark.full
def test_mypy_of_who_uses_the_wheel_sees_its_types(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=60)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    said = []
    for given in ("shard", "'all of it'"):
        (tmp_path / "consumer.py").write_text(TYPED.replace("SHARD", given))
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", "--python-executable",
             tmp_path / "venv/bin/python", "consumer.py"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        said.append(done.stdout)
    assert "Success" in said[0], said[0]
    assert 'No overload variant of "linear_cross_entropy"' in said[1], said[1]


STAND_IN = """#!/bin/bash
# Instead of a program of this name: leaves its arguments in a file.
printf '%s\\n' "$@" >"$OUTPUT/${0##*/}$(find "$OUTPUT" | wc -l)"
"""
CHECKS = """#!/bin/bash
exec python -m cce_dist.cli "$@"
"""

FAILS = """#!/bin/bash
# Instead of torchrun: two ranks with one error, and torchrun's own lines about it.
for rank in 0 1; do
    printf "[rank$rank]: %s\\n" 'Traceback (most recent call last):' "  frame of $rank" 'ValueError: the reason' >&2
done
echo 'E1127 torch/distributed/elastic/multiprocessing/api.py:984] failed (exitcode: 1) local_rank: 0 (pid: 7)' >&2
for line in {1..50}; do echo "  torchrun $line" >&2; done
exit 1
"""


def _quickstart(tmp_path: Path, programs: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Its end with these programs in place of those that it installs; the output folder is ``tmp_path``/out."""
    folder, project = tmp_path / "venv/bin", (ROOT / "pyproject.toml").read_text()
    folder.mkdir(parents=True)
    checksum = subprocess.run(["cksum"], input=project, capture_output=True, text=True, check=True).stdout
    (tmp_path / "venv/.cce_dist_installed").write_text(f"{ROOT} deepspeed,train {checksum}")  # up to date
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    command = ["bash", ROOT / "launch/quickstart.sh", *words]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "VENV": str(tmp_path / "venv"), "OUTPUT": str(tmp_path / "out"), "PATH": path}
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.full
def test_quickstart_says_what_is_wrong_with_its_settings_and_keeps_earlier_runs(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    earlier = tmp_path / "out/deepspeed-plain/metrics.jsonl"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    done = _quickstart(tmp_path, {"torchrun": FAILS, "cce-dist": CHECKS}, "stps=3")
    assert done.returncode == 2
    assert done.stderr.startswith("cce-dist train: the command line is not valid")
    assert "stps: unknown key" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert earlier.exists()


def test_quickstart_shows_the_ranks_errors_first_and_nothing_of_torchruns_own(tmp_path: Path) -> None:
    done = _quickstart(tmp_path, {"torchrun": FAILS, "cce-dist": STAND_IN})
    assert done.returncode == 1
    first, second, *rest = done.stderr.splitlines()
    assert first == "ValueError: the reason"
    assert second.startswith(f"== the end of {tmp_path}/out/deepspeed-plain.log")
    assert rest[:2] == ["[rank0]: Traceback (most recent call last):", "[rank0]:   frame of 0"]
    assert "torchrun 1" not in done.stderr


def test_quickstart_makes_five_runs_of_valid_settings_and_compares_them(tmp_path: Path) -> None:
    """What they give is for `.ci/run`, which makes them."""
    pytest.importorskip("yaml")
    from cce_dist.train import settings

    output = tmp_path / "out"
    done = _quickstart(tmp_path, {"torchrun": STAND_IN, "cce-dist": STAND_IN}, "steps=3")
    assert done.returncode == 0, done.stderr
    asked = [file.read_text().splitlines() for file in output.glob("torchrun*")]
    words = [[word for word in run[run.index("--config") + 2 :] if "=" in word] for run in asked]
    runs = [settings.load(ROOT / "configs/train/tiny-cpu.yaml", run) for run in words]
    assert {run.steps for run in runs} == {3}
    assert {(run.output.name, run.engine, run.head, run.cce.gradient == "exact") for run in runs} == {
        ("deepspeed-plain", "deepspeed", "plain", False),
        ("deepspeed-exact", "deepspeed", "cce", True),
        ("fsdp2-plain", "fsdp2", "plain", False),
        ("fsdp2-exact", "fsdp2", "cce", True),
        ("fsdp2-default", "fsdp2", "cce", False),
    }
    given = [file.read_text().splitlines() for file in output.glob("cce-dist*")]
    checks = [words for words in given if words[:2] == ["train", "--check"]]
    assert len(checks) == 2
    assert all("steps=3" in words for words in checks)
    (compared,) = [words for words in given if words not in checks]
    assert sorted(compared) == sorted(["compare", *(str(run.output) for run in runs)])


def test_the_version_is_that_of_the_project_file() -> None:
    installed = f'version = "{cce_dist.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert installed or cce_dist.__version__ == "0.0.0"
    assert cce_dist.__version__ in ("0.0.0", *(ROOT / "CHANGELOG.md").read_text().split())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_clean_and_say_what_they_do(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def _checks() -> list[list[str]]:
    """Those of launch/test.sh before the tests, as it calls them."""
    lines = (ROOT / "launch/test.sh").read_text().splitlines()
    return [line.split() for line in lines if line.startswith(("ruff ", "mypy "))]


def _check(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


UNTIDY = "import sys,os\nfrom ranks import nothing\nx: int = 'text'\n"


@pytest.fixture
def strewn(tmp_path: Path) -> Path:
    """The sources, and beside them files that no check would let pass."""
    _copy_sources(tmp_path)
    for folder in ("runs/quickstart", "ranks", "launched", "outputs", "build/lib/cce_dist", ".venv/lib", "."):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "untidy.py").write_text(UNTIDY)
    return tmp_path


def test_the_checks_look_at_the_sources_and_not_at_what_lies_beside_them(strewn: Path) -> None:
    *of_style, of_types = _checks()
    assert [command[0] for command in (*of_style, of_types)] == ["ruff", "ruff", "mypy"]
    for command in of_style:
        done = _check(command, strewn)
        assert done.returncode == 0, done.stdout + done.stderr
    for place in ("tests/test_new.py", "benchmarks/new.py", "cce_dist/train/new.py", "kernels/new.py"):
        (strewn / place).write_text(UNTIDY)
        for command in of_style:
            assert _check(command, strewn).returncode == 1, command
        (strewn / place).unlink()
    # mypy takes its time for the types of torch: here it looks at modules that import nothing.
    for module in (*(strewn / "cce_dist").rglob("*.py"), *(strewn / "kernels").rglob("*.py")):
        module.write_text("")
    done = _check(of_types, strewn)
    assert done.returncode == 0, done.stdout + done.stderr
    for place in ("cce_dist/train/new.py", "kernels/new.py"):
        (strewn / place).write_text(UNTIDY)
        done = _check(of_types, strewn)
        assert done.returncode == 1 and "new.py:3: error: Incompatible types" in done.stdout, done.stdout + done.stderr
        (strewn / place).unlink()
