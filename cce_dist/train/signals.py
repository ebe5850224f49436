"""SIGINT and SIGTERM: the first one lets a run end with a checkpoint, a later one ends the process."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# One request may come as several signals: of the terminal, and of each launcher on the way. Those count as one.
_SAME_REQUEST_SECONDS = 2.0


@contextmanager
def insistence() -> Iterator[None]:
    """Ends the process at the second signal, with exit code 128 + its number, whatever the process is doing.

    Python runs handlers between its own instructions only, so not while it waits in a collective or for a file; a
    thread of its own is told of signals that have a handler, by `signal.set_wakeup_fd`.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    watcher = threading.Thread(target=_watch, args=(told,), daemon=True)
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(tell)
        watcher.join()
        os.close(told)


@contextmanager
def deferral() -> Iterator[Callable[[], bool]]:
    """Notes SIGINT and SIGTERM instead of dying of them; yields whether there was one, for the ranks to agree on."""
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        noted.append(number)

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(told: int) -> None:
    first: float | None = None
    while number := os.read(told, 1):
        if number[0] not in _SIGNALS:
            continue
        who = f"cce-dist train: rank {os.environ.get('RANK', '0')}"
        if first is None:
            first = time.monotonic()
            if getattr(signal.getsignal(number[0]), "__module__", None) == __name__:  # it is deferred
                _say(f"{who} ends after this step, with a checkpoint; a second signal ends it at once")
        elif time.monotonic() - first >= _SAME_REQUEST_SECONDS:
            _say(f"{who} ends at the second signal, without a checkpoint")
            os._exit(128 + number[0])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
