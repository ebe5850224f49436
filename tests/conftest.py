"""What all tests share: the environment, and the pool of ranks."""

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# The helpers beside this file (`ranks`, `reference`) are imported by name; spawned ranks inherit the path.
sys.path.insert(0, str(Path(__file__).parent))

# Before anything imports triton. With a GPU the kernels are compiled; without one they are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch.use_deterministic_algorithms asks for it
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
torch.set_num_threads(1)

import interpreter  # noqa: E402
import uninitialised  # noqa: E402
from ranks import RankPool  # noqa: E402

interpreter.quicken()
uninitialised.poison()

# What an earlier run has found does not decide what this one tries.
hypothesis.settings.register_profile("cce_dist", database=None)
hypothesis.settings.load_profile("cce_dist")

# Files that need an optional framework to be imported are left out where it is not installed.
_NEEDS = {
    "test_deepspeed_checkpoints.py": ("deepspeed", "transformers"),
    "test_deepspeed_engine.py": ("deepspeed", "transformers"),
    "tools/test_doctor.py": ("rich", "yaml"),
    "tools/test_report.py": ("matplotlib", "rich", "transformers"),
    "train/test_train.py": ("transformers", "yaml"),
    "test_transformers_patch.py": ("transformers",),
}
_ABSENT = {file: [name for name in names if importlib.util.find_spec(name) is None] for file, names in _NEEDS.items()}
collect_ignore = [file for file, names in _ABSENT.items() if names]


def pytest_report_header() -> list[str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU; Triton's kernels are interpreted"
    left_out = [f"left out: {file}, without {' and '.join(_ABSENT[file])}" for file in collect_ignore]
    return [f"device: {device}; torch {torch.__version__}", *left_out]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look at it over and over."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _in_the_repository() -> None:
    """Paths in the configs are relative to it; the pool's ranks inherit it."""
    os.chdir(Path(__file__).parent.parent)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four processes with gloo; `ranks.run(world, function, *args)`, see ranks.py."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
