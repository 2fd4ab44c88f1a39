"""The process that the command runs in: its group, its folder, its streams and its memory."""

from __future__ import annotations

import ctypes
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from assay.cli.options import refusal


def settle() -> None:
    """Set what must be set before torch is imported: streams, threads and the allocator."""
    # Names of files may hold bytes that are no text.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # Spinning threads cost more than they bring on small work, and must be limited before torch is
    # imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The allocator's default gives large buffers back at every free; keeping them halves the time
    # of a training step.
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 30)
            libc.mallopt(-1, (1 << 31) - 1)
        except (OSError, AttributeError):
            pass


def is_in_a_group() -> bool:
    """Return whether torchrun started this process beside others."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def speaks() -> bool:
    """Return whether this process says what went wrong: of a group, the one that knew it first."""
    if not is_in_a_group():
        return True
    from assay.studies import runner

    return runner.speaks_first()


def require_place() -> None:
    """Refuse to work in a folder that was deleted, in which libraries cannot be loaded."""
    try:
        os.getcwd()
    except OSError as error:
        raise refusal("the working folder was deleted; change to another one") from error


def silence() -> None:
    """Send what is left in the output's buffer nowhere: the interpreter would fail on it again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, of Python or of torch, says that memory ran out."""
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


@contextmanager
def going_on(*words: str) -> Iterator[None]:
    """Say, when the user stops the command, with which one it goes on."""
    from assay.errors import StoppedError

    try:
        yield
    except KeyboardInterrupt as error:
        raise StoppedError(f"stopped; go on with: {shlex.join(['assay', *words])}") from error
