"""``cce-dist doctor``: is everything in place for a run? Asked on every rank, before it starts.

    cce-dist doctor                                      one process per GPU, or two on the CPU
    torchrun ... -m cce_dist.doctor --config run.yaml    on the ranks of the run itself

Three stages: each rank looks at its machine and at the config; the ranks form their process groups and time them; a
small sharded loss is compared with fp64 logits. After each stage every rank reports to rank 0, over a connection apart
from what is being tested, and rank 0's verdict goes back, so all ranks end alike. A rank that does not answer in time
is named. Nothing waits without a limit.

Shapes: n tokens of this rank, N of the token group, D hidden, V vocabulary.
"""

import argparse
import hashlib
import json
import os
import platform
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed import ProcessGroup

import cce_dist
from cce_dist.config import CCEConfig
from cce_dist.loss import linear_cross_entropy
from cce_dist.shard import VocabShard
from cce_dist.train.place import local_device

SECONDS = 180
"""What a stage may take, unless --seconds says otherwise: on a GPU the kernels of the small loss are compiled first."""

_PACKAGES = ("triton", "deepspeed", "transformers", "accelerate", "pydantic")
_GRACE = 10.0
"""Seconds that answers may be later than a stage's end."""

Faults = list[tuple[str, str]]
"""(check, what is wrong and what to do) pairs."""


class Report(NamedTuple):
    """What one rank found in a stage."""

    facts: dict[str, Any]
    faults: Faults
    warnings: Faults


class Stage(NamedTuple):
    """``examine`` runs on every rank; ``compare`` on rank 0, with the reports by rank, and finds what is wrong between
    them; ``describe`` makes the rows (check, result) of the table."""

    name: str
    examine: Callable[[], Report]
    compare: Callable[[Mapping[int, Report]], tuple[Faults, Faults]]
    describe: Callable[[Mapping[int, Report]], list[tuple[str, str]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 when nothing is wrong on any rank, 1 for any fault, 2 for wrong arguments."""
    parser = argparse.ArgumentParser("cce-dist doctor", description="Check every rank before a run.")
    parser.add_argument("--config", type=Path, help="the trainer's YAML, or a DeepSpeed JSON")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"limit of each of 3 stages (default {SECONDS})")
    parsed = parser.parse_args(arguments)
    if not parsed.seconds > 0:
        parser.error(f"--seconds must be above 0, got {parsed.seconds:g}")
    if "RANK" not in os.environ:
        return alone(parsed.config, parsed.seconds)
    try:
        rank, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        address = os.environ["MASTER_ADDR"]
    except (KeyError, ValueError) as error:
        print(
            f"cce-dist doctor: RANK is set, but not all of WORLD_SIZE, MASTER_ADDR and MASTER_PORT ({error!r}); start "
            "it with torchrun or another launcher that sets them, or unset RANK.",
            file=sys.stderr,
        )
        return 2
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun is the server
    return on_rank(rank, world, address, port, hosts, parsed.config, parsed.seconds)


def alone(config: Path | None, seconds: float) -> int:
    """Starts the ranks of this machine, and is where they meet."""
    world = torch.cuda.device_count() or 2
    limit = timedelta(seconds=seconds + _GRACE)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
    context = mp.get_context("spawn")
    ranks = [
        context.Process(target=_started, args=(rank, world, server.port, config, seconds), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 4 * (seconds + 2 * _GRACE)
    waiting = {process.sentinel: rank for rank, process in enumerate(ranks)}
    died = False
    while waiting and time.monotonic() < deadline:
        for sentinel in connection.wait(list(waiting), timeout=max(deadline - time.monotonic(), 0)):
            assert isinstance(sentinel, int)
            rank = waiting.pop(sentinel)
            ranks[rank].join()
            code = ranks[rank].exitcode
            if code not in (0, 1):
                died = True
                how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
                print(f"cce-dist doctor: the process of rank {rank} died ({how}).", file=sys.stderr)
    for rank in waiting.values():
        print(f"cce-dist doctor: rank {rank} did not end in time and was killed.", file=sys.stderr)
        ranks[rank].kill()
        ranks[rank].join()
    return int(died or bool(waiting) or any(process.exitcode != 0 for process in ranks))


def _started(rank: int, world: int, port: int, config: Path | None, seconds: float) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    sys.exit(on_rank(rank, world, "127.0.0.1", port, False, config, seconds))


def on_rank(rank: int, world: int, address: str, port: int, hosts: bool, config: Path | None, seconds: float) -> int:
    """All stages on one rank; rank 0 prints. Returns the exit code, the same on every rank that still answers.

    Args:
        address, port: of the TCPStore where the ranks meet; ``hosts``: this rank serves it.
        config: to be checked, or None.
        seconds: limit of each stage.
    """
    limit = timedelta(seconds=seconds + _GRACE)
    try:
        # Two connections: a client that waits lets no other thread through, and a hanging group must be reported.
        reports, groups = (
            dist.TCPStore(address, port, world, hosts and first, timeout=limit, wait_for_workers=False)
            for first in (True, False)
        )
    except (dist.DistError, RuntimeError) as error:
        print(
            f"cce-dist doctor: rank {rank} on {socket.gethostname()} cannot reach rank 0's store at {address}:{port}: "
            f"{_first_line(error)}. Check MASTER_ADDR, the port and the firewall between the nodes.",
            file=sys.stderr,
        )
        return 1
    attempt = f"cce_dist.doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    council = _Council(dist.PrefixStore(attempt, reports), rank, world, seconds)
    device, backend = local_device()
    stages = [
        Stage("machine", lambda: _machine(config, world, device), _compare_machines, _describe_machines),
        Stage(
            "groups",
            lambda: _groups(dist.PrefixStore(f"{attempt}/groups", groups), rank, world, device, backend, seconds),
            _compare_speeds,
            _describe_groups,
        ),
        Stage("loss", lambda: _losses(_group_size(config, world), device), _compare_nothing, _describe_losses),
    ]
    try:
        with council:
            sound = all(council.hold(stage) for stage in stages)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0 if sound else 1


class _Council:
    """The ranks' reports, and rank 0's verdict on them, stage by stage."""

    def __init__(self, store: dist.Store, rank: int, world: int, seconds: float) -> None:
        self._store, self._rank, self._world, self._seconds = store, rank, world, seconds
        self._lock = threading.Lock()
        self._stage: Stage | None = None
        self._rows: list[tuple[str, str]] = []
        self._faults: Faults = []
        self._warnings: Faults = []
        self._hurry = float("inf")

    def __enter__(self) -> "_Council":
        # A handler of Python's would wait for the main thread, which may be inside a collective: the pipe does not.
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        self._before = signal.signal(signal.SIGTERM, lambda *_: None)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, *error: Any) -> None:
        signal.set_wakeup_fd(self._fd_before)
        signal.signal(signal.SIGTERM, self._before)
        os.close(self._write)
        self._end()

    def _listen(self, read: int) -> None:
        """torchrun ends the ranks with SIGTERM when one died, and with SIGKILL half a minute later."""
        while numbers := os.read(read, 64):
            if signal.SIGTERM in numbers:
                self._hurry = time.monotonic() + 2
                stage = self._stage
                if stage is not None:  # else on the way to the end: `_hear` is told to hurry
                    self._give_up(stage, "was ended by the launcher")
        os.close(read)

    def hold(self, stage: Stage) -> bool:
        """Runs a stage here and hears what the others found; True where no rank has a fault."""
        self._stage = stage
        timer = threading.Timer(self._seconds, self._give_up, (stage, f"was not done in {self._seconds:g} s"))
        timer.daemon = True
        timer.start()
        try:
            report = stage.examine()
        except Exception as error:  # whatever it is, it is what this rank has to report
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            report = Report({}, [(stage.name, f"{type(error).__name__} at {place}: {_first_line(error)}")], [])
        if not self._claim(stage):
            threading.Event().wait()  # the other thread reports, and ends this process
        timer.cancel()
        return self._settle(stage, report, self._seconds + _GRACE)

    def _claim(self, stage: Stage) -> bool:
        """True for the first thread that wants to report on the stage."""
        with self._lock:
            mine = self._stage is stage
            self._stage = None
            return mine

    def _give_up(self, stage: Stage, why: str) -> None:
        """In a thread of its own: the stage hangs. Reports that, and ends the process."""
        if not self._claim(stage):
            return
        remedy = "a rank died, or the network between the ranks does not pass the traffic of their process group"
        self._settle(stage, Report({}, [(stage.name, f"{why}: {remedy}")], []), _GRACE)
        self._end()
        os._exit(1)

    def _settle(self, stage: Stage, report: Report, seconds: float) -> bool:
        verdict = f"{stage.name}/verdict"
        deadline = time.monotonic() + seconds
        if self._rank != 0:
            with suppress(dist.DistError, RuntimeError):  # where the store's server died, `_hear` ends at once
                self._store.set(f"{stage.name}/{self._rank}", json.dumps(report))
            said = self._hear(verdict, deadline + _GRACE)
            if said is None:
                print(
                    f"cce-dist doctor: rank {self._rank} on {socket.gethostname()} heard nothing from rank 0 after "
                    f'stage "{stage.name}": it died or cannot be reached. Found here: {report.faults or "nothing"}.',
                    file=sys.stderr,
                )
            return said == b"sound"
        reports = {0: report, **self._collect(stage, deadline)}
        missing = [rank for rank in range(self._world) if rank not in reports]
        faults: Faults = []
        if missing:
            faults.append(
                (
                    stage.name,
                    f"{_ranks(missing)}: no answer. The process died, hangs, or cannot reach rank 0; look at its log, "
                    "and for the kernel's out-of-memory killer in dmesg.",
                )
            )
        faults += _by_text({rank: r.faults for rank, r in reports.items()})
        complete = {rank: r for rank, r in reports.items() if r.facts}
        between, doubts = stage.compare(complete) if len(complete) > 1 else ([], [])
        self._faults += faults + between
        self._warnings += _by_text({rank: r.warnings for rank, r in reports.items()}) + doubts
        self._rows += stage.describe(complete) if complete else []
        sound = not self._faults
        self._store.set(verdict, "sound" if sound else "faults")
        return sound

    def _collect(self, stage: Stage, deadline: float) -> dict[int, Report]:
        found = {}
        for rank in range(1, self._world):
            said = self._hear(f"{stage.name}/{rank}", deadline)
            if said is not None:
                facts, *lists = json.loads(said)
                faults, warnings = ([(check, text) for check, text in entries] for entries in lists)
                found[rank] = Report(facts, faults, warnings)
        return found

    def _hear(self, key: str, deadline: float) -> bytes | None:
        """What a rank left in the store, or None. Short waits: a signal is handled between them."""
        try:
            while not self._store.check([key]):
                if time.monotonic() > min(deadline, self._hurry):
                    return None
                time.sleep(0.05)
            return self._store.get(key)
        except (dist.DistError, RuntimeError):  # the store's server is gone
            return None

    def _end(self) -> None:
        """Rank 0 prints, and stays while the others, whose store it may be, hear the last verdict."""
        if self._rank != 0:
            with suppress(dist.DistError, RuntimeError):
                self._store.add("heard", 1)
            return
        self._print()
        until = time.monotonic() + 3
        while self._store.add("heard", 0) < self._world - 1 and time.monotonic() < until:
            time.sleep(0.05)

    def _print(self) -> None:
        console = Console(highlight=False)
        console.width = max(console.width, 100)
        table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
        for column in ("check", "result", ""):
            table.add_column(column, overflow="fold")
        states = {check: "WARNING" for check, _ in self._warnings} | {check: "FAULT" for check, _ in self._faults}
        checks = [check for check, _ in self._rows]
        for check, result in self._rows:
            table.add_row(check, _plain(result), states.get(check, "ok"))
        for check in dict.fromkeys(check for check, _ in self._faults if check not in checks):
            table.add_row(check, "", "FAULT")
        console.print(table)
        for kind, found in (("WARNING", self._warnings), ("FAULT", self._faults)):
            for check, text in found:
                console.print(f"{kind} {check}: {text}", markup=False, soft_wrap=True)
        count = len(self._faults)
        console.print(f"{count or 'No'} fault{'' if count == 1 else 's'} on {self._world} rank(s).")
        console.file.flush()


# ---------------------------------------------------------------------------------------------------------- machine


def versions() -> dict[str, str]:
    """What must be the same on all ranks."""
    found = {"cce_dist": cce_dist.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available() and dist.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _machine(config: Path | None, world: int, device: torch.device) -> Report:
    faults: Faults = []
    warnings: Faults = []
    facts: dict[str, Any] = {"host": socket.gethostname(), "versions": versions(), "device": "cpu", "place": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        facts |= {"device": properties.name, "place": str(getattr(properties, "uuid", device)), "free": free / total}
        facts["memory"] = total
        if free < 0.9 * total:
            used = f"{(total - free) / 1e9:.1f} of {total / 1e9:.0f} GB are in use before the run"
            warnings.append(("device", f"{used}; nvidia-smi shows by whom."))
        if not dist.is_nccl_available():
            faults.append(("device", f"this build of torch {torch.__version__} has no NCCL; install a CUDA build."))
        if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
            faults.append(("device", "TRITON_INTERPRET is set: kernels would be interpreted on the CPU. Unset it."))
    names = ("NCCL_", "GLOO_", "TORCH_NCCL_", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    facts["environment"] = {key: value for key, value in sorted(os.environ.items()) if key.startswith(names)}
    if config is not None:
        checked = check_config(config, world, device)
        facts["config"], facts["digest"] = checked.summary, checked.digest
        faults += [("config", text) for text in checked.faults]
        warnings += [("config", text) for text in checked.warnings]
    return Report(facts, faults, warnings)


def _compare_machines(reports: Mapping[int, Report]) -> tuple[Faults, Faults]:
    faults: Faults = []
    warnings: Faults = []
    for name in sorted({name for report in reports.values() for name in report.facts["versions"]}):
        said = {rank: report.facts["versions"].get(name, "none") for rank, report in reports.items()}
        odd = _minority(said)
        if odd:
            faults.append(("versions", f"{name}: {odd}; install the same on every rank."))
    devices = _minority({rank: report.facts["device"] for rank, report in reports.items()})
    if devices:
        warnings.append(("device", f"{devices}; the slowest sets the pace."))
    digests = _minority({rank: report.facts.get("digest", "") for rank, report in reports.items()})
    if digests:
        faults.append(("config", f"{digests}, checksums of different files; copy one file to all nodes."))
    shared = defaultdict(list)
    for rank, report in reports.items():
        if report.facts["place"]:
            shared[report.facts["host"], report.facts["place"]].append(rank)
    for (host, _), ranks in shared.items():
        if len(ranks) > 1:
            text = f"{_ranks(ranks)} share one GPU of {host}, over gloo: right for a trial, slow for a run."
            warnings.append(("device", f"{text} Start one rank per GPU."))
    return faults, warnings


def _describe_machines(reports: Mapping[int, Report]) -> list[tuple[str, str]]:
    hosts = defaultdict(list)
    for rank, report in reports.items():
        hosts[report.facts["host"]].append(rank)
    first = next(iter(reports.values())).facts
    layout = "; ".join(f"{host}: {_ranks(ranks)}" for host, ranks in list(hosts.items())[:8])
    more = "" if len(hosts) <= 8 else f"; and {len(hosts) - 8} more hosts"
    devices = Counter(report.facts["device"] for report in reports.values())
    memory = f", {first['memory'] / 1e9:.0f} GB" if "memory" in first else ""
    rows = [
        ("ranks", f"{len(reports)} on {len(hosts)} host(s): {layout}{more}"),
        ("versions", ", ".join(f"{name} {value}" for name, value in first["versions"].items())),
        ("device", ", ".join(f"{count} x {name}" for name, count in devices.items()) + memory),
    ]
    if first["environment"]:
        rows.append(("environment", " ".join(f"{key}={value}" for key, value in first["environment"].items())))
    if first.get("config"):
        rows.append(("config", first["config"]))
    return rows


# ----------------------------------------------------------------------------------------------------------- config


class Checked(NamedTuple):
    """A config file, judged. ``vocab_parallel_size``: ranks that share the classifier's rows, None for all."""

    summary: str
    digest: str
    faults: list[str]
    warnings: list[str]
    vocab_parallel_size: int | None = None


def check_config(file: Path, world: int, device: torch.device) -> Checked:
    """A DeepSpeed JSON (by its suffix), or else the trainer's YAML, for ``world`` ranks."""
    try:
        content = file.read_bytes()
    except OSError as error:
        return Checked("", "", [f"cannot read {file}: {error.strerror or error}."], [])
    digest = hashlib.sha256(content).hexdigest()[:12]
    checked = _check_deepspeed(file, world) if file.suffix == ".json" else _check_trainer(file, world, device)
    return checked._replace(digest=digest)


def _check_deepspeed(file: Path, world: int) -> Checked:
    try:
        config = json.loads(file.read_text())
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not a JSON object")
    except ValueError as error:
        return Checked("", "", [f"{file} is no DeepSpeed config: {error}."], [])
    faults: list[str] = []
    warnings: list[str] = []
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if find_spec("deepspeed") is None:
        faults.append("deepspeed is not installed: pip install 'cce_dist[deepspeed]'.")
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    sizes = [config[key] for key in keys if isinstance(config.get(key), int)]
    total, micro, accumulation = sizes if len(sizes) == len(keys) else (0, 0, 0)
    if total != micro * accumulation * world:
        faults.append(
            f"train_batch_size {total} is not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
            f"{accumulation} x {world} ranks = {micro * accumulation * world}. Correct one of them, or leave "
            "train_batch_size out."
        )
    if "cce_dist" not in config:
        meant = get_close_matches("cce_dist", [key for key in config if isinstance(key, str)], cutoff=0.7)
        if meant:
            faults.append(f'{file} has no section "cce_dist", but "{meant[0]}", which nothing reads: rename it.')
        return Checked(f"{file}: ZeRO stage {stage}, the stock head", "", faults, warnings)
    try:
        settings = CCEConfig.from_mapping(config["cce_dist"], f'the section "cce_dist" of {file}')
    except ValueError as error:
        return Checked(f"{file}: ZeRO stage {stage}", "", [*faults, str(error)], warnings)
    size = settings.vocab_parallel_size
    if size is not None and world % size:
        faults.append(f"vocab_parallel_size {size} does not divide the {world} ranks; choose a divisor.")
    if settings.enabled and not faults:
        from torch import nn

        from cce_dist.deepspeed.guard import check_version, refuse_untested

        try:
            check_version()
            known = {key: value for key, value in config.items() if key != "sequence_parallel_size"}
            refuse_untested(known, {"model": nn.Module()}, nn.Linear(1, 1), settings)
        except (NotImplementedError, RuntimeError) as error:
            faults.append(str(error))
    if settings.enabled and "sequence_parallel_size" in config:
        warnings.append(f"sequence_parallel_size in {file} needs an mpu: pass it to cce_dist.deepspeed.initialize.")
    if settings.enabled:
        warnings.append(
            f'DeepSpeed\'s own initialize ignores the section "cce_dist" of {file} and trains the plain head, without '
            "a word where cce_dist.deepspeed was never imported. Call cce_dist.deepspeed.initialize in its place, or "
            "cce_dist.deepspeed.install() before it, for accelerate and the Hugging Face Trainer too (installed() "
            "tells whether that was done). cce_dist.train needs nothing."
        )
    return Checked(f"{file}: ZeRO stage {stage}, {_summary(settings)}", "", faults, warnings, size)


def _check_trainer(file: Path, world: int, device: torch.device) -> Checked:
    from cce_dist.train.engines import head_settings
    from cce_dist.train.settings import load

    try:
        settings = load(file)
        head = head_settings(settings)
    except ValueError as error:
        return Checked("", "", [str(error)], [])
    faults: list[str] = []
    size = head.vocab_parallel_size
    if settings.deepspeed is not None:
        stock = _check_deepspeed(settings.deepspeed, world)
        faults += stock.faults
    if settings.engine == "none" and world > 1:
        faults.append(f"engine: none is for a single process, got {world} ranks; use fsdp2 or deepspeed.")
    if size is not None and world % size:
        faults.append(f"cce.vocab_parallel_size {size} does not divide the {world} ranks; choose a divisor.")
    if settings.dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        faults.append(f"dtype: bf16 is not supported by {torch.cuda.get_device_name(device)}; use fp32.")
    plain = settings.head == "plain"
    summary = f"{file}: engine {settings.engine}, {'the plain head' if plain else _summary(head)}"
    return Checked(summary, "", list(dict.fromkeys(faults)), [], size)


def _summary(settings: CCEConfig) -> str:
    if not settings.enabled:
        return "cce_dist switched off"
    size = settings.vocab_parallel_size
    return f"gradient {settings.gradient}" + (f", {size} rank(s) share the vocabulary" if size else "")


def _group_size(config: Path | None, world: int) -> int:
    """How many ranks share the vocabulary in the run that the config describes; a sound one, by now."""
    size = None if config is None else check_config(config, world, torch.device("cpu")).vocab_parallel_size
    return size or world


# ----------------------------------------------------------------------------------------------------------- groups


def _groups(store: dist.Store, rank: int, world: int, device: torch.device, backend: str, seconds: float) -> Report:
    # Longer than the stage: its own clock ends a hang with a report, before NCCL ends it without.
    limit = timedelta(seconds=2 * seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    faults: Faults = []
    total = torch.full((4,), float(rank + 1), device=device)
    dist.all_reduce(total)
    expected = world * (world + 1) / 2
    if total.tolist() != [expected] * 4:
        text = f"an all-reduce of rank numbers gave {total.tolist()}, not {expected}; check the links and the driver."
        faults.append(("all-reduce", text))
    size = 64 << 20 if device.type == "cuda" else 4 << 20
    small, large = (torch.zeros(count // 4, device=device) for count in (8, size))
    latency = _seconds(lambda: dist.all_reduce(small), device, 20)
    took = _seconds(lambda: dist.all_reduce(large), device, 5)
    side = 4096 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = _seconds(lambda: a @ b, device, 10)
    facts = {
        "backend": backend,
        "latency": latency,
        "bytes": size,
        "bandwidth": 2 * (world - 1) / world * size / took,
        "took": took,
        "flops": 2 * side**3 / product,
        "gemm": f"{side} x {side} {str(dtype).removeprefix('torch.')}",
    }
    return Report(facts, faults, [])


def _seconds(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The median of single rounds after one of warm-up."""
    times = []
    for _ in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _compare_speeds(reports: Mapping[int, Report]) -> tuple[Faults, Faults]:
    flops = {rank: report.facts["flops"] for rank, report in reports.items()}
    middle = statistics.median(flops.values())
    slow = [rank for rank, value in flops.items() if value < 0.75 * middle]
    if not slow:
        return [], []
    named = f"{_ranks(slow)}: under 75 % of the median {middle / 1e12:.3g} TFLOP/s"
    return [], [("GEMM", f"{named}. Every step waits for the slowest: look for other jobs, heat, and clock limits.")]


def _describe_groups(reports: Mapping[int, Report]) -> list[tuple[str, str]]:
    first = next(iter(reports.values())).facts
    slowest = max(reports, key=lambda rank: reports[rank].facts["took"])
    took = reports[slowest].facts
    flops = {rank: report.facts["flops"] / 1e12 for rank, report in reports.items()}
    weakest = min(flops, key=lambda rank: flops[rank])
    timed = f"8 B in {1e3 * took['latency']:.3g} ms; {took['bytes'] >> 20} MiB in {1e3 * took['took']:.3g} ms"
    return [
        ("groups", f"{first['backend']}, {len(reports)} rank(s)"),
        ("all-reduce", f"{timed}, {took['bandwidth'] / 1e9:.3g} GB/s of bus (rank {slowest})"),
        ("GEMM", f"{first['gemm']}: {flops[weakest]:.3g} (rank {weakest}) to {max(flops.values()):.3g} TFLOP/s"),
    ]


# ------------------------------------------------------------------------------------------------------------- loss


class Case(NamedTuple):
    """A loss to be compared. ``sharded``: each rank brings its own tokens, else all bring the same."""

    sharded: bool
    dtype: torch.dtype
    gradient: str

    def __str__(self) -> str:
        tokens = "own tokens" if self.sharded else "same tokens"
        return f"{tokens}, {str(self.dtype).removeprefix('torch.')}, {self.gradient}"


_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Relative norms of errors: far above rounding, far below any fault."""


def _losses(size: int, device: torch.device) -> Report:
    world = dist.get_world_size()
    group = dist.group.WORLD if size == world else dist.new_subgroups(size)[0]
    assert isinstance(group, ProcessGroup)
    dtypes = [torch.float32]
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        dtypes.append(torch.bfloat16)
    cases = [Case(s, dtype, g) for s in (False, True) for dtype in dtypes for g in ("exact", "unbiased")]
    faults: Faults = []
    worst = 0.0
    for case in cases:
        errors = loss_errors(case, group, device)
        worst = max(worst, *(error / _ALLOWED[case.dtype] for error in errors.values()))
        wrong = {name: error for name, error in errors.items() if not error <= _ALLOWED[case.dtype]}
        if wrong:
            listed = ", ".join(f"{name} by {error:.2g}" for name, error in wrong.items())
            faults.append(
                (
                    "loss",
                    f"({case}) differs from fp64 logits: {listed}, allowed {_ALLOWED[case.dtype]:g}. Run it on this "
                    "machine alone (cce-dist doctor): a fault there too is of its GPU, driver or versions; else of the "
                    "links to the other ranks.",
                )
            )
    return Report({"cases": len(cases), "worst": worst, "size": size, "world": world}, faults, [])


def loss_errors(case: Case, group: ProcessGroup, device: torch.device) -> dict[str, float]:
    """Relative errors of this rank's loss, dE and dC against all logits in fp64. All ranks draw the same problem."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    draw = torch.Generator().manual_seed(7)
    per_rank = max(64 // world, 1)
    counts = [per_rank + r % 2 for r in range(world)] if case.sharded else [per_rank * world]
    vocab, hidden_size = max(600, 2 * world + 3), 32
    # So flat a softmax that nothing is sampled: "unbiased" is exact here, by its own path.
    hidden_ND, weight_VD = (
        (scale * torch.randn(rows, hidden_size, generator=draw)).to(case.dtype).double()
        for rows, scale in ((sum(counts), 1.0), (vocab, hidden_size**-0.5))
    )
    labels_N = torch.randint(vocab, (sum(counts),), generator=draw)
    labels_N[::7] = -100
    truth_ND, truth_VD = hidden_ND.requires_grad_(), weight_VD.requires_grad_()
    truth_N = torch.nn.functional.cross_entropy(truth_ND @ truth_VD.T, labels_N, reduction="none")
    truth_N.sum().backward()

    shard = VocabShard.even(vocab, group, group if case.sharded else None)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1])) if case.sharded else slice(None)
    rows = slice(shard.start, shard.stop)
    hidden_nD, rows_VD = (x.detach().to(device, case.dtype).requires_grad_() for x in (hidden_ND[own], weight_VD[rows]))
    loss_n = linear_cross_entropy(
        hidden_nD, rows_VD, labels_N[own].to(device), shard=shard, reduction="none", gradient=case.gradient
    )  # type: ignore[call-overload]
    loss_n.sum().backward()
    return {
        "loss": _error(loss_n, truth_N[own]),
        "d hidden": _error(hidden_nD.grad, _grad(truth_ND)[own]),
        "d weight": _error(rows_VD.grad, _grad(truth_VD)[rows]),
    }


def _error(x: Tensor | None, truth: Tensor) -> float:
    if x is None:
        return float("inf")
    difference = (x.detach().double().cpu() - truth.detach()).norm()
    return float(difference / truth.detach().norm().clamp_min(1e-30))


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def _compare_nothing(reports: Mapping[int, Report]) -> tuple[Faults, Faults]:
    return [], []  # each rank has compared with the same reference


def _describe_losses(reports: Mapping[int, Report]) -> list[tuple[str, str]]:
    first = next(iter(reports.values())).facts
    worst = max(report.facts["worst"] for report in reports.values())
    groups = f"{first['world'] // first['size']} group(s) of {first['size']}"
    return [("loss", f"{first['cases']} cases over {groups}; largest error {worst:.2g} of what is allowed")]


# ------------------------------------------------------------------------------------------------------------- text


def _by_text(found: Mapping[int, Faults]) -> Faults:
    """One fault for all ranks that say the same."""
    ranks = defaultdict(list)
    for rank, faults in sorted(found.items()):
        for fault in faults:
            ranks[tuple(fault)].append(rank)
    return [(check, f"{_ranks(who)}: {text}") for (check, text), who in ranks.items()]


def _minority(said: Mapping[int, str]) -> str:
    """Who differs from what most ranks say; empty where all agree."""
    (most, _), *others = Counter(said.values()).most_common()
    if not others:
        return ""
    odd = "; ".join(f"{_ranks([r for r, v in said.items() if v == value])}: {value}" for value, _ in others)
    return f"{odd}, where the others have {most}"


def _ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0-7, 9``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'' if len(ranks) == 1 else 's'} {text}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _plain(text: str) -> str:
    """Text for a table of rich, which would take brackets as markup."""
    return text.replace("[", r"\[")


if __name__ == "__main__":
    sys.exit(main())
