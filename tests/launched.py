"""Commands as a person or a scheduler starts them: each with all its processes, which end with the test."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from runs import ROOT

# The environment of a command: this interpreter and this source, and a shell without the settings of others.
ENVIRONMENT = {
    **{name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ},
    "PYTHON": sys.executable,
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
}


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Command:
    """A running command and all processes that stem from it: they inherit a mark in their environment.

    Within ``with``; at its end all of them are killed.
    """

    def __init__(self, arguments: Sequence[str | Path], log: Path, **environment: str) -> None:
        self._mark = uuid.uuid4().hex
        self._log = log
        # A shell starts what it does not wait for with SIGINT ignored, and that is inherited; a handler is not.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [str(argument) for argument in arguments],
                cwd=ROOT,
                env={**ENVIRONMENT, **environment, "CCE_DIST_TEST": self._mark},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        signal.signal(signal.SIGINT, before)

    def __enter__(self) -> "Command":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def said(self) -> str:
        """Its stdout and stderr so far."""
        return self._log.read_text(errors="replace")

    def alive(self, **environment: str) -> list[int]:
        """Processes of the command, zombies apart; with ``environment``, those that have these variables."""
        wanted = {f"{name}={value}".encode() for name, value in {"CCE_DIST_TEST": self._mark, **environment}.items()}
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                    found.append(int(folder.name))
            except OSError:  # it is gone, or it is a zombie
                continue
        return found

    def wait(self, seconds: float) -> int:
        """Its exit code, once it has ended.

        Raises:
            TimeoutError: with what it said.
        """
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"it did not end within {seconds:g} s:\n{self.said}") from None

    def until(self, happened: Callable[[], bool], seconds: float) -> None:
        """Waits for something while the command runs.

        Raises:
            TimeoutError, ChildProcessError: it did not come; with what the command said.
        """
        deadline = time.monotonic() + seconds
        while not happened():
            if self.process.poll() is not None:
                raise ChildProcessError(f"it ended with {self.process.returncode}:\n{self.said}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"it did not come within {seconds:g} s:\n{self.said}")
            time.sleep(0.02)
