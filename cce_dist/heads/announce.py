"""The one line that says that cce_dist is at work, through Python's logging: logger "cce_dist", level INFO.

In goes the text of a framework's module; it comes out on one rank, and not inside of `unannounced`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed as dist

_LOGGER = logging.getLogger("cce_dist")
if _LOGGER.level == logging.NOTSET:  # the root logger's WARNING would drop it
    _LOGGER.setLevel(logging.INFO)


_SILENT: ContextVar[bool] = ContextVar("silent", default=False)


@contextmanager
def unannounced() -> Iterator[None]:
    """Inside, nothing is said: of a reference model, say, beside the one that is trained."""
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)


def announce_active(text: str, rank: int = 0) -> None:
    """Logs "cce_dist is active: ..." on one rank; to stderr where nobody has configured logging."""
    if _SILENT.get() or (dist.is_initialized() and dist.get_rank() != rank):
        return
    own = None if _LOGGER.hasHandlers() else logging.StreamHandler()
    if own is not None:
        _LOGGER.addHandler(own)
    try:
        _LOGGER.info("cce_dist is active: %s", text)
    finally:
        if own is not None:
            _LOGGER.removeHandler(own)
