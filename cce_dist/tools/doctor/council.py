"""The ranks' reports become one verdict, stage by stage: no rank waits without a limit, and a silent one is named.

In: a stage to hold, and a store that every rank reaches. Out: True where no rank has a fault; at the end rank 0 prints
the table. Works beside what is being tested: a thread reports for a rank whose stage hangs or that its launcher ends.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from cce_dist.tools.doctor.reports import Faults, Report, Stage, by_text, first_line, ranks_text

GRACE = 10.0
"""Seconds that answers may be later than a stage's end."""


class Council:
    """The ranks' reports, and rank 0's verdict on them, stage by stage."""

    def __init__(self, store: dist.Store, rank: int, world: int, seconds: float) -> None:
        self._store, self._rank, self._world, self._seconds = store, rank, world, seconds
        self._lock = threading.Lock()
        self._stage: Stage | None = None
        self._rows: list[tuple[str, str]] = []
        self._faults: Faults = []
        self._warnings: Faults = []
        self._notes: Faults = []
        self._hurry = float("inf")

    def __enter__(self) -> "Council":
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
            report = Report({}, [(stage.name, f"{type(error).__name__} at {place}: {first_line(error)}")], [], [])
        if not self._claim(stage):
            threading.Event().wait()  # the other thread reports, and ends this process
        timer.cancel()
        return self._settle(stage, report, self._seconds + GRACE)

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
        self._settle(stage, Report({}, [(stage.name, f"{why}: {remedy}")], [], []), GRACE)
        self._end()
        os._exit(1)

    def _settle(self, stage: Stage, report: Report, seconds: float) -> bool:
        verdict = f"{stage.name}/verdict"
        deadline = time.monotonic() + seconds
        if self._rank != 0:
            with suppress(dist.DistError, RuntimeError):  # where the store's server died, `_hear` ends at once
                self._store.set(f"{stage.name}/{self._rank}", json.dumps(report))
            said = self._hear(verdict, deadline + GRACE)
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
                    f"{ranks_text(missing)}: no answer. The process died, hangs, or cannot reach rank 0; look at its "
                    "log, and for the kernel's out-of-memory killer in dmesg.",
                )
            )
        faults += by_text({rank: r.faults for rank, r in reports.items()})
        complete = {rank: r for rank, r in reports.items() if r.facts}
        between, doubts = stage.compare(complete) if len(complete) > 1 else ([], [])
        self._faults += faults + between
        self._warnings += by_text({rank: r.warnings for rank, r in reports.items()}) + doubts
        self._notes += by_text({rank: r.notes for rank, r in reports.items()})
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
                found[rank] = Report(facts, *([(check, text) for check, text in entries] for entries in lists))
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
        kinds = (("NOTE", self._notes), ("WARNING", self._warnings), ("FAULT", self._faults))
        states = {check: kind for kind, found in kinds for check, _ in found}
        checks = [check for check, _ in self._rows]
        for check, result in self._rows:
            table.add_row(check, _plain(result), states.get(check, "ok"))
        for check in dict.fromkeys(check for check, _ in self._faults if check not in checks):
            table.add_row(check, "", "FAULT")
        console.print(table)
        for kind, found in kinds:
            for check, text in found:
                console.print(f"{kind} {check}: {text}", markup=False, soft_wrap=True)
        count = len(self._faults)
        console.print(f"{count or 'No'} fault{'' if count == 1 else 's'} on {self._world} rank(s).")
        console.file.flush()


def _plain(text: str) -> str:
    """Text for a table of rich, which would take brackets as markup."""
    return text.replace("[", r"\[")
