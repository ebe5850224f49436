"""The package: what a wheel holds, what an import brings in, and the scripts."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cce_dist

ROOT = Path(__file__).parent.parent
SCRIPTS = [ROOT / ".ci/run", *sorted((ROOT / "launch").glob("*.sh"))]


def _python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd="/", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, built = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", built, source]
    subprocess.run(pip, check=True, timeout=200)
    (found,) = built.glob("cce_dist-*.whl")
    return found


def test_the_wheel_holds_every_module_and_nothing_beside_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    expected = {f"cce_dist/{path.relative_to(ROOT / 'cce_dist')}" for path in (ROOT / "cce_dist").rglob("*.py")} | {
        f"cce_dist/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == expected
    assert {"cce_dist/py.typed", "cce_dist/kernels/tuning.json"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"cce_dist"}


@pytest.mark.full
def test_the_installed_wheel_computes_a_loss(wheel: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, wheel]
    subprocess.run(install, check=True, timeout=120)
    code = (
        "import cce_dist, torch; e, c, y = torch.randn(4, 8), torch.randn(9, 8), torch.arange(4);"
        "ours, stock = cce_dist.linear_cross_entropy(e, c, y), torch.nn.functional.cross_entropy(e @ c.T, y);"
        "torch.testing.assert_close(ours, stock);"
        "from cce_dist.tools.plan.calibration import MEASURED; assert list(MEASURED.glob('*.json')), 'no measurements';"
        "print(cce_dist.__file__)"
    )
    assert _python(code, PYTHONPATH=str(tmp_path)).startswith(str(tmp_path))


def test_the_import_brings_in_no_optional_framework() -> None:
    optional = "{'deepspeed', 'transformers', 'accelerate', 'yaml', 'rich', 'tokenizers'}"
    code = f"import sys, cce_dist; print(sorted({optional} & set(sys.modules)))"
    assert _python(code, PYTHONPATH=str(ROOT)) == "[]"


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


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="the scripts install into a virtual environment")
def test_quickstart_compares_five_runs_and_fails_where_they_disagree(tmp_path: Path) -> None:
    environment = {**os.environ, "VENV": sys.prefix, "OUTPUT": str(tmp_path)}
    quickstart = ["bash", ROOT / "launch/quickstart.sh", "steps=3", "eval_batches=1", "data.vocab_size=512"]
    done = subprocess.run(quickstart, cwd="/", env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for run in ("deepspeed plain", "deepspeed cce exact", "fsdp2 plain", "fsdp2 cce exact", "fsdp2 cce unbiased"):
        assert run in done.stdout
    metrics = tmp_path / "fsdp2-exact/metrics.jsonl"
    *first, last = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*first, json.dumps({**json.loads(last), "loss": 0.0})]))
    runs = [tmp_path / name for name in ("fsdp2-plain", "fsdp2-exact")]
    assert subprocess.run([sys.executable, "-m", "cce_dist.cli", "compare", *runs], cwd=ROOT).returncode == 1
