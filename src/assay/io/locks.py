"""An exclusive lock on a file: the system drops it with the process, so that none is ever stale."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from pathlib import Path

from assay.errors import InputError
from assay.io.files import cannot_write

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}


def acquire(path: Path, patience: float = 0.0) -> int:
    """Open a file, made if it is absent, lock it, and return its descriptor; closing that releases
    the lock.

    Waits up to `patience` seconds. Raises InputError when another process holds the lock,
    AssayError when the file cannot be opened for writing."""
    deadline = time.monotonic() + patience
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _no_follow(), 0o644)
        except OSError as error:
            raise cannot_write(path, error) from error
        if not _lock(handle, path):
            os.close(handle)
            if time.monotonic() >= deadline:
                raise InputError(
                    f"{path.parent} is in use by another process; wait for it to end, or use"
                    " another folder with -o"
                )
            time.sleep(0.05)
        elif _is_at(handle, path):
            return handle
        else:  # replaced or removed between opening and locking
            os.close(handle)


def _lock(handle: int, path: Path) -> bool:
    if fcntl is None:
        _say_unlocked(path)
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            os.close(handle)
            raise cannot_write(path, error) from error
        _say_unlocked(path)
    return True


def _is_at(handle: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        there, here = path.stat(follow_symlinks=False), os.fstat(handle)
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
    return False


def _no_follow() -> int:
    return getattr(os, "O_NOFOLLOW", 0)


def _say_unlocked(path: Path) -> None:
    print(
        f"assay: no locks are available for {path.parent}: do not start two runs in it at once",
        file=sys.stderr,
    )
