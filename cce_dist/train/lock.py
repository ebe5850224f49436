"""Locks that a process holds on a file, and that the kernel lets go of when the process ends, however it ends."""

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# File systems without locks: NFS without its lock daemon, Lustre without the option flock, and the like.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def locked(file: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Holds the lock of ``file``, which is made where it is missing and stays; it says which process holds it.

    Over NFS the lock counts on all hosts. Where the file system has none, this is said on stderr and nothing is held.

    Args:
        what: it protects, for the errors.
        wait: for the process that holds it, in place of an error.

    Raises:
        ValueError: another process holds it; names its pid and host.
    """
    # Opened for writing, as NFS wants it. Not inherited by programs that this process starts.
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(
                f"{what} is in use by {_holder(descriptor)}: wait for it or end it, or choose another folder. (It "
                f"holds the lock of {file}, which goes with the process.)"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"{file}: this file system has no locks ({error.strerror}); nothing keeps a second run out of {what}.",
                file=sys.stderr,
                flush=True,
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, LookupError, TypeError):  # it has not written its name yet
        return "another process"
