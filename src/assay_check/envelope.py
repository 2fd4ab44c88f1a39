"""The envelope of every certificate: what each claim says of itself, whatever the claim.

A task adds fields of its own and says how its claims are checked (`assay_check.tasks`); nothing
here knows any task."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from assay_check.reading import InputError, need, parse

FORMAT = "assay-certificate/1"
FIELDS = {
    *("format", "task", "model", "strategy", "rule"),
    *("level", "options", "assumptions", "claim", "advice"),
}
LEVELS = {
    "real": "the weights as rational numbers, in real arithmetic",
    "float32": "the network as executed in float32, in any order of summation",
    "float64": "a search in unproved arithmetic",
}


@dataclass(frozen=True)
class Envelope:
    """A certificate with the fields that all have; `own` holds those of its task alone."""

    task: str
    model: Any
    rule: str
    level: str
    options: Any
    assumptions: dict[str, Any]
    claim: dict[str, Any]
    stored: Any
    own: dict[str, Any]
    folder: Path

    def advice(self) -> tuple[str, bytes]:
        """Return the name and the bytes of the advice file beside the certificate; InputError
        unless it is the file that the certificate was written with.
        """
        name = self.stored.get("file") if isinstance(self.stored, dict) else None
        need(
            isinstance(name, str) and re.fullmatch(r"[^/\\\0\ud800-\udfff]+", name),
            f"advice.file must be a file beside the certificate, got {name!r}",
        )
        data = (self.folder / str(name)).read_bytes()
        need(
            hashlib.sha256(data).hexdigest() == self.stored.get("sha256"),
            f"{name} is not the advice of this certificate",
        )
        return str(name), data

    def needs(self, weights: bytes | None) -> bytes:
        """Return the weights, without which the task cannot be checked; InputError for none."""
        if weights is None:
            raise InputError(
                f"a certificate of {self.task} is checked with its weights: give --weights"
            )
        return weights

    def without_advice(self) -> None:
        """Raise InputError unless the certificate says that it has no advice."""
        none = {"file": None, "sha256": None}
        need(self.stored == none, f"the rule {self.rule!r} takes no advice, got {self.stored!r}")


@dataclass(frozen=True)
class Verdict:
    """Whether a claim is supported, and what it is about.

    `measure` says which inputs count and how much, `level` in which arithmetic the claim holds,
    `assumptions` what it takes for granted; `bound` is what was recomputed (none where nothing
    was), `cell` the first claimed (q, m, c) that fails."""

    accepted: bool
    reason: str
    measure: str
    level: str
    assumptions: tuple[str, ...] = ()
    bound: Fraction | None = None
    cell: tuple[int, ...] | None = None

    def plain(self) -> dict[str, Any]:
        """Return the verdict as plain values for JSON."""
        bound = None if self.bound is None else str(self.bound)
        return {**vars(self), "assumptions": list(self.assumptions), "bound": bound}

    def lines(self) -> list[str]:
        """Return the verdict in words: itself, its measure, its level and its assumptions."""
        return [
            f"{'accepted' if self.accepted else 'rejected'}: {self.reason}",
            f"measure: {self.measure}",
            f"level: {self.level}, {LEVELS[self.level]}",
            f"assumptions: {'; '.join(self.assumptions) or 'none'}",
        ]


@dataclass(frozen=True)
class Task:
    """How the claims of a task are checked: its own fields, and a function of the envelope and the
    bytes of the weights file, none where no file was given.
    """

    fields: frozenset[str]
    check: Callable[[Envelope, bytes | None], Verdict]


def read(certificate: Path, tasks: dict[str, Task]) -> Envelope:
    """Read a certificate of a known task; InputError for any other file."""
    entry = parse(certificate.read_bytes(), "the certificate")
    need(isinstance(entry, dict), "a certificate is an object")
    name, format_ = entry.get("task"), entry.get("format")
    known = isinstance(name, str) and name in tasks and format_ == FORMAT
    need(
        known,
        f"unknown format or task: got {format_!r} and {name!r}, known are {FORMAT!r} and"
        f" {sorted(tasks)}",
    )
    fields = FIELDS | tasks[name].fields
    need(entry.keys() == fields, f"a certificate of {name} has the fields {sorted(fields)}")
    level, claim, assumptions = entry["level"], entry["claim"], entry["assumptions"]
    need(isinstance(entry["rule"], str), f"the rule must be a name, got {entry['rule']!r}")
    need(
        isinstance(level, str) and level in LEVELS,
        f"unknown level {level!r}; known: {sorted(LEVELS)}",
    )
    need(
        isinstance(claim, dict) and isinstance(assumptions, dict),
        "claim and assumptions must be objects",
    )
    return Envelope(
        task=name,
        model=entry["model"],
        rule=entry["rule"],
        level=level,
        options=entry["options"],
        assumptions=assumptions,
        claim=claim,
        stored=entry["advice"],
        own={field: entry[field] for field in tasks[name].fields},
        folder=certificate.parent,
    )
