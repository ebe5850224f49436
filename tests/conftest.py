"""What all tests share: the environment, and the pool of ranks."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# The helpers beside this file (`ranks`, `reference`) are imported by name; spawned ranks inherit the path.
sys.path.insert(0, str(Path(__file__).parent))

# Before anything imports triton. With a GPU the kernels are compiled; without one they are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
torch.set_num_threads(1)

from ranks import RankPool  # noqa: E402


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four processes with gloo; `ranks.run(world, function, *args)`, see ranks.py."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
