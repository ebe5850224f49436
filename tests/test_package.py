"""The package: what a wheel holds, what an import brings in, and the scripts."""

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
        "from cce_dist.plan import MEASURED; assert list(MEASURED.glob('*.json')), 'no measurements';"
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


def _checks() -> list[list[str]]:
    """Those of launch/test.sh before the tests, as it calls them."""
    lines = (ROOT / "launch/test.sh").read_text().splitlines()
    return [line.split() for line in lines if line.startswith(("ruff ", "mypy "))]


def _check(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def test_the_checks_look_at_the_sources_and_not_at_what_lies_beside_them(tmp_path: Path) -> None:
    _copy_sources(tmp_path)
    untidy = "import sys,os\nfrom ranks import nothing\nx: int = 'text'\n"
    for folder in ("runs/quickstart", "ranks", "launched", "outputs", "build/lib/cce_dist", ".venv/lib"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "untidy.py").write_text(untidy)
    (tmp_path / "scratch.py").write_text(untidy)
    assert len(_checks()) == 3
    for command in _checks():
        done = _check(command, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    for place in ("tests/test_new.py", "benchmarks/new.py", "cce_dist/train/new.py", "kernels/new.py"):
        (tmp_path / place).write_text(untidy)
        for command in _checks()[:2]:
            assert _check(command, tmp_path).returncode == 1, command
        (tmp_path / place).unlink()
