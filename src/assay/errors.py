"""Errors that name the argument, what was given, and what is accepted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class AssayError(Exception):
    """A run failed; the command exits with `exit_code`."""

    exit_code = 1


class InputError(AssayError, ValueError):
    """Bad input, refused before any work starts; the command exits with 2."""

    exit_code = 2


class StoppedError(AssayError):
    """The user stopped the command; the message says how to go on."""

    exit_code = 130


def unknown(what: str, name: Any, known: Iterable[str]) -> InputError:
    """Return the error for an unknown name, with the nearest known ones."""
    known = list(known)
    near = difflib.get_close_matches(str(name)[:200], known, n=3, cutoff=0.4)
    tail = (
        f"; did you mean {', '.join(near)}?"
        if near
        else f"; known: {', '.join(known[:12])}"
        if known
        else ""
    )
    return InputError(f"unknown {what} {shown(name)}{tail}")


def shown(value: Any, most: int = 120) -> str:
    """Return the `repr` of a value that a message quotes, its middle left out when it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits has no text
        text = f"an integer of {value.bit_length()} bits"
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-most // 4 :]}"
    return text
