"""Errors that name the argument, what came, and what would do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AssayError(Exception):
    """A run failed; the command exits with `exit_code`."""

    exit_code = 1


class InputError(AssayError, ValueError):
    """Bad input, refused before any work starts; the command exits with 2."""

    exit_code = 2


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error for an unknown name, with the nearest known ones."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    tail = (
        f"; did you mean {', '.join(near)}?"
        if near
        else f"; known: {', '.join(known[:12])}"
        if known
        else ""
    )
    return InputError(f"unknown {what} {name!r}{tail}")
