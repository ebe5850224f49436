"""A pool of spawned ranks that runs many distributed cases, one process group per case.

Starting processes that import torch costs seconds; a case here costs milliseconds. In a test file::

    def _sum_of_ranks(scale):                       # module level; runs on every rank
        x = torch.tensor([scale * dist.get_rank()])
        dist.all_reduce(x)
        return x

    def test_all_ranks_see_the_sum(ranks):          # `ranks` is the session's pool (conftest.py)
        for x in ranks.run(3, _sum_of_ranks, 10.0):  # results by rank
            assert x == 30

What a case may rely on:
- The default process group is fresh and holds exactly the ``world`` ranks; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
  and MASTER_PORT (free) are set. Further groups are the case's own; all are destroyed afterwards.
- Groups are gloo's; where there are as many GPUs as ranks, gloo moves CPU tensors and NCCL those of a GPU of its own
  that each rank has (``cpu:gloo,cuda:nccl``). `device` says where a case that knows both is to compute.
- The random generators of torch and Python are seeded with 0, the same on every rank; torch uses one thread.
- The function and its arguments are found by the path of their file, so the importlib import mode of pytest works.
  Arguments and results are pickled by value: return plain tensors (`.to_local()`, `.detach()`), not modules or groups.
  Tensors come back on the CPU.
- An exception of a rank is raised here, its type kept, with the tracebacks of all ranks that failed. To test that every
  rank raises, catch inside the function and return the text.
- A rank that does not come back within ``timeout`` seconds is a `TimeoutError` that shows where each rank stood.

After a failure or a timeout the processes are killed, and the next case gets new ones. A case that leaves global state
behind in its process (a framework's own registries) should be followed by ``ranks.close()``, to the same end.

So do processes in which many groups are left: torch keeps some in caches, and each has a thread of gloo's that wakes up
a hundred times a second.

Without a GPU new processes are forks of a server that has done nothing but import what this session's tests import, so
that they are there at once; a fork cannot use CUDA, so that with a GPU each of them imports it all again.
"""

import faulthandler
import gc
import importlib
import importlib.util
import inspect
import os
import pickle
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import uninitialised
from torch import Tensor
from torch.utils._pytree import tree_map_only

_SECONDS_TO_START = 180.0
_SECONDS_TO_HEAR_OTHER_RANKS = 5.0
_SECONDS_TO_DUMP_STACKS = 3.0
_MOST_THREADS = 100
# What takes long to import, starts no thread, and keeps no state of what it is used for until it is used.
_SLOW_IMPORTS = (
    "pytest",
    "torch._dynamo.debug_utils",  # what the first use of a function that torch.compile must not touch imports
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "triton.runtime.interpreter",
    "transformers.models.gemma.modeling_gemma",
    "transformers.models.llama.modeling_llama",
    "deepspeed.runtime.zero.muon.original_muon",  # and torch.compile with it
)


def device() -> str:
    """In a case: "cuda" where its ranks have a GPU each. In the test's own process: "cpu"."""
    return "cuda" if dist.is_initialized() and "nccl" in str(dist.get_backend_config()) else "cpu"


class _RankTraceback(Exception):
    """Carries tracebacks of other processes as the cause of the exception raised here."""

    def __str__(self) -> str:
        return "\n" + "\n".join(self.args)


def starter() -> Any:
    """What starts processes that have torch imported already, where they can be forks."""
    context = mp.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload([name for name in _SLOW_IMPORTS if name.split(".")[0] in sys.modules])
    return context


class RankPool:
    """``size`` processes, started at first use, that wait for cases."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder = tempfile.TemporaryDirectory(prefix="cce_dist_ranks_")
        self._cases = 0

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Calls ``function(*args)`` on ranks 0 to ``world - 1`` of a new process group; returns what each returned."""
        if not 1 <= world <= self.size:
            raise ValueError(f"world must be 1 to {self.size}, the size of the pool; got {world}.")
        if torch.cuda.is_available() and torch.cuda.device_count() < world and "deepspeed" in function.__module__:
            pytest.skip(f"DeepSpeed computes on GPUs where there are any: needs {world}")
        if any(_threads(process.pid) > _MOST_THREADS for process in self._processes):
            self.close()
        self._start()
        self._cases += 1
        case = {
            "world": world,
            "store": str(Path(self._folder.name) / f"store{self._cases}"),
            "port": _free_port(),
            "timeout": timeout,
            "module": function.__module__,
            "file": inspect.getfile(function),
            "function": function.__qualname__,
        }
        arguments = pickle.dumps(args)
        for pipe in self._pipes[:world]:
            pipe.send_bytes(pickle.dumps(case))
            pipe.send_bytes(arguments)
        try:
            results = self._collect(world, timeout)
        except BaseException:
            self.close()
            raise
        for pipe in self._pipes[:world]:
            pipe.send_bytes(b"every rank is done")
        return results

    def close(self) -> None:
        """Kills the processes; the next `run` starts others."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        if self._processes:
            return
        context = starter()
        environment = dict(os.environ)  # a fork would have that of the first start
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (rank, theirs, self._stacks(rank), environment)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_SECONDS_TO_START):
                self.close()
                raise TimeoutError(f"rank {rank} did not start within {_SECONDS_TO_START:g} s.")
            pipe.recv_bytes()

    def _stacks(self, rank: int) -> str:
        return str(Path(self._folder.name) / f"stacks{rank}.txt")

    def _collect(self, world: int, timeout: float) -> list[Any]:
        results: list[Any] = [None] * world
        failures: list[tuple[BaseException, str]] = []
        waiting = dict(zip(self._pipes[:world], range(world), strict=True))
        deadline = time.monotonic() + timeout + _SECONDS_TO_DUMP_STACKS
        while waiting:
            ready = connection.wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    ok, payload, text = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._processes[rank].join()
                    ok, text = False, f"its process died, exit code {self._processes[rank].exitcode}"
                    payload = RuntimeError(f"rank {rank}: {text}.")
                if ok:
                    results[rank] = payload
                else:
                    failures.append((payload, f"--- rank {rank} of {world} ---\n{text}"))
                    deadline = min(deadline, time.monotonic() + _SECONDS_TO_HEAR_OTHER_RANKS)
        if failures:
            raise failures[0][0] from _RankTraceback(*(text for _, text in failures))
        if waiting:
            stacks = (f"--- rank {rank} of {world} ---\n{_read(self._stacks(rank))}" for rank in waiting.values())
            raise TimeoutError(
                f"ranks {sorted(waiting.values())} of {world} did not finish within {timeout:g} s."
            ) from _RankTraceback(*stacks)
        return results


def _serve(rank: int, pipe: Connection, stacks: str, environment: dict[str, str]) -> None:
    """The life of a rank: a case at a time until the pool closes the pipe."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    gc.freeze()  # the imports that it was forked with
    pipe.send_bytes(b"started")
    with Path(stacks).open("w") as stacks_file:
        while True:
            try:
                case, arguments = pickle.loads(pipe.recv_bytes()), pipe.recv_bytes()
            except EOFError:
                return
            faulthandler.dump_traceback_later(case["timeout"], file=stacks_file)
            try:
                result = _run_case(rank, case, arguments)
                reply = pickle.dumps((True, result, ""))
            except BaseException as error:  # a rank reports whatever ends its case
                pipe.send_bytes(_failure(error))
            else:
                pipe.send_bytes(reply)
                pipe.recv_bytes()  # until every rank is done: peers may still be reading from this one
            finally:
                faulthandler.cancel_dump_traceback_later()
                if dist.is_initialized():
                    dist.destroy_process_group()


def _run_case(rank: int, case: dict[str, Any], arguments: bytes) -> Any:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(case["world"]),
        LOCAL_WORLD_SIZE=str(case["world"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(case["port"]),
    )
    function: Any = _import(case["module"], case["file"])
    uninitialised.poison()
    if "triton" in sys.modules:
        import interpreter

        interpreter.quicken()
    for name in case["function"].split("."):
        function = getattr(function, name)
    args = pickle.loads(arguments)
    random.seed(0)
    torch.manual_seed(0)
    has_gpus = torch.cuda.device_count() >= case["world"]
    if has_gpus:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
        store=dist.FileStore(case["store"], case["world"]),
        rank=rank,
        world_size=case["world"],
        timeout=timedelta(seconds=case["timeout"]),
    )
    return tree_map_only(Tensor, Tensor.cpu, function(*args))


def _import(name: str, file: str) -> Any:
    """The module under the name that pytest gave it, so that pickled arguments of its classes are found too."""
    if name in sys.modules:
        return sys.modules[name]
    module = _import_anew(name, file)
    # What is imported by now stays: DeepSpeed collects garbage for each engine, and need not look at it over and over.
    gc.collect()
    gc.freeze()
    return module


def _import_anew(name: str, file: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        parents = name.split(".")[:-1]  # pickle asks for the first of them too
        for depth in range(1, len(parents) + 1):
            parent = ".".join(parents[:depth])
            sys.modules.setdefault(parent, ModuleType(parent))
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module


def _failure(error: BaseException) -> bytes:
    text = traceback.format_exc()
    try:
        reply = pickle.dumps((False, error, text))
        pickle.loads(reply)
    except Exception:  # whatever keeps it from being pickled
        reply = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}"), text))
    return reply


def _threads(pid: int) -> int:
    try:
        return len(list(Path(f"/proc/{pid}/task").iterdir()))
    except OSError:  # it has died, or this is not Linux
        return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _read(path: str) -> str:
    try:
        return Path(path).read_text() or "no stack was written"
    except FileNotFoundError:
        return "the process had not started"
