"""Searches that go on where they were stopped: their open boxes, or what they found, on disk.

A box is kept as the splits and faces that lead to it, and is taken again from the region, so that a
file can lose time but no part of the region. Numbers are kept bit for bit: a search whose budget is
counted in boxes finds the same as one that was never stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from assay.bounds.rounding import Array
from assay.bounds.search.leaves import Found, Leaf, half, stacked
from assay.bounds.search.node_rules import Parameters
from assay.bounds.search.pins import Pinned, Split, pinned
from assay.errors import InputError

NAMES = ("bound", "value", "level", "boxes", "closed", "seconds", "root")
"""The plain values of what a search found."""


class Files(Protocol):
    """A folder that keeps dictionaries of tensors and plain values, as a run's does."""

    def has(self, name: str) -> bool: ...

    def state(self, name: str) -> dict[str, Any]: ...

    def save_state(self, name: str, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Store:
    """Where one search keeps its state: a file that is good for one key, of what is searched and
    within which budget.

    leaves: whether those of a finished search are wanted too, as a certificate needs them."""

    files: Files
    name: str
    key: str
    leaves: bool = False

    def read(self) -> dict[str, Any] | None:
        """Return the state that was written under this key; None where there is none or it is gone.

        Raises InputError for a file that is damaged."""
        try:
            if not self.files.has(self.name):
                return None
        except InputError:  # it was deleted: what it held is searched again
            return None
        held = self.files.state(self.name)
        return held["search"] if held["key"] == self.key else None

    def write(self, state: Mapping[str, Any]) -> None:
        self.files.save_state(self.name, {"key": self.key, "search": dict(state)})


@dataclass
class Work:
    """What a search has done so far: the leaves that cover the region, the number of boxes, the
    bounds at the level of the whole region and of the first box, and CPU seconds for each leaf that
    the recomputation takes. proved: leaves that are closed at the level; the others may be open.
    """

    leaves: list[Leaf]
    boxes: int
    whole: float
    first: float
    rigorous: float
    proved: list[Leaf] = field(default_factory=list)


def packed(leaves: Sequence[Leaf]) -> dict[str, Any]:
    """Return the leaves of one search as tensors and plain values; they share the slopes of the
    sweep.
    """
    known: dict[int, Any] = {}  # faces that many leaves share are written once

    def plain(step: Split | Pinned) -> Any:
        if isinstance(step, Split):
            return step.which, step.place, step.value, step.side
        return known.setdefault(id(step), step.ends)

    after = stacked([leaf.after for leaf in leaves])
    return {
        "paths": [[plain(step) for step in leaf.path] for leaf in leaves],
        "bounds": [leaf.bound for leaf in leaves],
        "splits": [leaf.split for leaf in leaves],
        "before": {ref: list(p) for ref, p in leaves[0].before.items()} if leaves else {},
        "after": {ref: list(p) for ref, p in after.items()},
    }


def unpacked(held: Mapping[str, Any], lows: Sequence[Array], highs: Sequence[Array]) -> list[Leaf]:
    """Return the leaves of a region from what `packed` returned."""
    before: Parameters = {ref: tuple(p) for ref, p in held["before"].items()}
    after: Mapping[int, list[Tensor]] = held["after"]
    found = []
    for index, (steps, bound, split) in enumerate(
        zip(held["paths"], held["bounds"], held["splits"], strict=True)
    ):
        low, high, path = list(lows), list(highs), list[Split | Pinned]()
        for step in steps:
            if step and isinstance(step[0], tuple):
                face = Pinned(step)
                path.append(face)
                low, high = pinned(low, high, face)
            else:
                part = Split(*step)
                path.append(part)
                low, high = half(low, high, part)
        mine = {ref: tuple(p[index] for p in ps) for ref, ps in after.items()}
        found.append(Leaf(low, high, bound, before, mine, split, tuple(path)))
    return found


def plain_found(found: Found, *, leaves: bool) -> dict[str, Any]:
    """Return what a search found as tensors and plain values."""
    kept = {name: getattr(found, name) for name in NAMES}
    return kept | {
        "finished": True,
        "point": list(found.point),
        "leaves": packed(found.leaves if leaves else []),
    }


def found_again(held: Mapping[str, Any], lows: Sequence[Array], highs: Sequence[Array]) -> Found:
    """Return what `plain_found` was given."""
    kept = {name: held[name] for name in NAMES}
    return Found(**kept, point=tuple(held["point"]), leaves=unpacked(held["leaves"], lows, highs))
