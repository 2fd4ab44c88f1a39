"""Inputs that may be put at one end of their interval, because the derivative of the value by them
keeps its sign on the box: the least value is reached there. What is left of the box is smaller, so
that more derivatives keep their sign, and the linear bounds are tighter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from assay.bounds.engine import Late, never, tighten
from assay.bounds.levels import arithmetic
from assay.bounds.rounding import Array, Interval
from assay.bounds.search.reach import Mask
from assay.bounds.search.sweep import sweep
from assay.bounds.trace.derivative import Derived, derive
from assay.bounds.trace.traced import Traced
from assay.errors import AssayError, InputError


@dataclass(frozen=True)
class Split:
    """One half of a box: an entry of an input is at most (side 0) or at least (side 1) `value`."""

    which: int
    place: int
    value: float
    side: int


@dataclass(frozen=True)
class Pinned:
    """The face of a box where entries are at their low (side 0) or high end (side 1), given as
    (input, flat place, side); the least value on the box is reached on it.
    """

    ends: tuple[tuple[int, int, int], ...]


class Derivatives:
    """The derivatives of `row . function` by its inputs over boxes, at a level.

    There are none for level float32, since what is executed there has no derivative, and for
    operations that have no rule."""

    def __init__(self, traced: Traced, row: Array, level: str) -> None:
        self.traced, self.row, self.level = traced, row, level

    @cached_property
    def derived(self) -> Derived | None:
        """The graph of the derivatives, made when first asked for."""
        if self.level == "float32":
            return None
        return derive(self.traced.at(self.level), self.row)

    def pins(self, lows: list[Array], highs: list[Array], late: Late = never) -> list[Pinned]:
        """Return what may be pinned on boxes (samples, *shape), one entry per sample; once it is
        late, no interval is tightened for it any more.
        """
        samples = len(lows[0])
        nothing = [Pinned(())] * samples
        if self.derived is None:
            return nothing
        free = [
            np.flatnonzero((low < high).reshape(samples, -1).any(0))
            for low, high in zip(lows, highs, strict=True)
        ]
        with np.errstate(all="ignore"):
            try:
                ranges = self._ranges(lows, highs, free, late)
            except (AssayError, InputError):  # a value overflows, or leaves a domain
                return nothing
        found = []
        for sample in range(samples):
            ends = []
            for which, (low, high) in enumerate(zip(lows, highs, strict=True)):
                moves = (low[sample] < high[sample]).reshape(-1)[free[which]]
                down, up = (side[sample] & moves for side in ranges[which])
                ends += [(which, int(place), 0) for place in free[which][down]]
                ends += [(which, int(place), 1) for place in free[which][up & ~down]]
            found.append(Pinned(tuple(ends)))
        return found

    def _ranges(
        self, lows: list[Array], highs: list[Array], free: list[NDArray[np.intp]], late: Late
    ) -> list[tuple[Array, Array]]:
        """Return where the derivatives are nowhere negative, and nowhere positive: (samples, free)
        for every input.
        """
        assert self.derived is not None
        at, ar, of = self.derived.at, arithmetic(self.level), self.derived.of
        boxes = [Interval(low, high) for low, high in zip(lows, highs, strict=True)]
        ends: dict[int, Mask] = {}
        for ref, places in zip(at.graph.inputs, free, strict=True):
            if ref in of and len(places):
                mask = np.zeros(at.graph.nodes[of[ref]].shape, bool)
                mask.reshape(-1)[places] = True
                ends[of[ref]] = ends[of[ref]] | mask if of[ref] in ends else mask
        if not ends:
            return [(np.ones((len(lows[0]), len(p)), bool),) * 2 for p in free]
        known, flat = sweep(at, boxes, ends=ends, late=late), dict[int, tuple[Array, Array]]()
        for ref, mask in ends.items():
            value = known.values[ref]
            open_ = (value.lo < 0) & (value.hi > 0) & mask
            units = np.flatnonzero(open_.reshape(len(open_), -1).any(0))
            if len(units):
                value = tighten(at.graph, known, ref, units, ar, late)
            flat[ref] = (value.lo.reshape(len(value.lo), -1), value.hi.reshape(len(value.hi), -1))
        found = []
        for ref, places in zip(at.graph.inputs, free, strict=True):
            if ref not in of or not len(places):  # the value does not depend on this input
                none = np.full((len(lows[0]), len(places)), ref not in of)
                found.append((none, none))
                continue
            lo, hi = (
                np.broadcast_to(end[:, places], (len(lows[0]), len(places)))
                for end in flat[of[ref]]
            )
            found.append((lo >= 0, hi <= 0))
        return found


def pinned(lows: list[Array], highs: list[Array], pins: Pinned) -> tuple[list[Array], list[Array]]:
    """Return the ends of the face of a box."""
    lows, highs = [low.copy() for low in lows], [high.copy() for high in highs]
    for which, place, side in pins.ends:
        if side == 0:
            highs[which].flat[place] = lows[which].flat[place]
        else:
            lows[which].flat[place] = highs[which].flat[place]
    return lows, highs
