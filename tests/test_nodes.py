"""Many nodes for real, on one machine: two network namespaces joined by a cable, a launcher in each.

The cable is a veth pair, so that the network can be cut as well. Needs root and iproute2; skipped elsewhere.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from launched import Command
from ranks import RankPool
from runs import ENGINES, ROOT, TINY, losses, overrides, rows, train

pytestmark = pytest.mark.full

TIMEOUT = 6
LAUNCHERS = {"fsdp2": "torchrun.sh", "deepspeed": "deepspeed.sh"}
BOTH = pytest.mark.parametrize("engine", list(LAUNCHERS))


class Nodes:
    """Two nodes: namespaces with the addresses 10.207.0.1 and .2 on their interface net0."""

    addresses = ("10.207.0.1", "10.207.0.2")

    def __init__(self) -> None:
        self.names = tuple(f"cce-dist-{os.getpid()}-{node}" for node in range(2))
        for name in self.names:
            self._ip("netns", "add", name)
        here, there = self.names
        self._ip("link", "add", "net0", "netns", here, "type", "veth", "peer", "name", "net0", "netns", there)
        for name, address in zip(self.names, self.addresses, strict=True):
            self._ip("-n", name, "address", "add", f"{address}/24", "dev", "net0")
            self._ip("-n", name, "link", "set", "net0", "up")
            self._ip("-n", name, "link", "set", "lo", "up")
            # launch/README.md tells of it: torchrun's own wait for a node that is cut off ends when TCP gives up.
            self._ip("netns", "exec", name, "sh", "-c", "echo 5 >/proc/sys/net/ipv4/tcp_retries2")

    def start(self, engine: str, node: int, words: list[str], folder: Path) -> Command:
        """The engine's launcher, on a node, with one rank."""
        (folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in self.addresses))
        deepspeed = {"HOSTFILE": str(folder / "hosts")}
        torchrun = {
            "NNODES": "2",
            "LOCAL_ADDR": self.addresses[node],
            "MAX_RESTARTS": "0",
            "RDZV_TIMEOUT": str(TIMEOUT),
        }
        return Command(
            ["ip", "netns", "exec", self.names[node], "bash", ROOT / "launch" / LAUNCHERS[engine]]
            + ["--config", TINY, *words],
            folder / f"node{node}.txt",
            NPROC="1",
            NODE_RANK=str(node),
            MASTER_ADDR=self.addresses[0],
            GLOO_SOCKET_IFNAME="net0",
            **(deepspeed if engine == "deepspeed" else torchrun),
        )

    def cut(self) -> None:
        """Pulls the cable."""
        self._ip("-n", self.names[0], "link", "set", "net0", "down")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=60)

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, timeout=60)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command ip (iproute2)")
    probe = f"cce-dist-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, timeout=60)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, timeout=60)
    if made.returncode:
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
    both = Nodes()
    yield both
    both.close()


@BOTH
def test_two_nodes_train_like_one_process(ranks: RankPool, tmp_path: Path, nodes: Nodes, engine: str) -> None:
    none = {"engine": "none", "deepspeed": "null", "model.config.attention_dropout": "0"}
    assert ranks.run(1, train, overrides(tmp_path / "one", **{**none, "batch.micro": "4"}), timeout=120) == [True]
    words = overrides(tmp_path / "two", **{**none, **ENGINES[engine]})
    with nodes.start(engine, 0, words, tmp_path) as first, nodes.start(engine, 1, words, tmp_path) as second:
        for node in (first, second):
            assert node.wait(240) == 0, node.said
            assert node.alive() == []
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@BOTH
def test_a_cut_network_is_an_error_on_every_rank_within_the_timeout(tmp_path: Path, nodes: Nodes, engine: str) -> None:
    words = overrides(tmp_path / "run", **ENGINES[engine], steps="100000", timeout=str(TIMEOUT))
    with ExitStack() as stack:
        both = [stack.enter_context(nodes.start(engine, node, words, tmp_path)) for node in range(2)]
        both[0].until(lambda: rows(tmp_path / "run") >= 3, 240)
        nodes.cut()
        for rank, node in enumerate(both):
            node.until(lambda node=node: "heard nothing from another rank" in node.said, 4 * TIMEOUT)  # type: ignore[misc]
            assert f"rank {rank} of 2 on" in node.said
            assert f"(timeout={TIMEOUT})" in node.said
        for node in both:
            assert node.wait(120) != 0
            assert node.alive() == []
