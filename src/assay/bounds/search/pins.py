"""Inputs that may be put at one end of their interval, because the derivative of the value by them
keeps its sign on the box: the least value is reached there. What is left of the box is smaller, so
that more derivatives keep their sign, and the linear bounds are tighter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assay.bounds.engine import lower
from assay.bounds.levels import arithmetic
from assay.bounds.rounding import Array, Interval
from assay.bounds.search.reach import Mask
from assay.bounds.search.sweep import SlopedKnown, sweep
from assay.bounds.trace.derivative import derive
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
        self.level = level
        self.derived = None if level == "float32" else derive(traced.at(level), row)

    def pins(self, lows: list[Array], highs: list[Array]) -> list[Pinned]:
        """Return what may be pinned on boxes (samples, *shape), one entry per sample."""
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
                ranges = self._ranges(lows, highs, free)
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
        self, lows: list[Array], highs: list[Array], free: list[NDArray[np.intp]]
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
        known = sweep(at, boxes, ends=ends)
        count, start = sum(map(len, free)), 0
        rows: dict[int, Array] = {}
        for ref, places in zip(at.graph.inputs, free, strict=True):
            if ref in of and len(places):
                shape = at.graph.nodes[of[ref]].shape
                mine = np.zeros((2 * count, int(np.prod(shape))))
                order = np.arange(start, start + len(places))
                mine[order, places], mine[order + count, places] = 1.0, -1.0
                wide = mine.reshape(1, 2 * count, *shape)
                rows[of[ref]] = rows[of[ref]] + wide if of[ref] in rows else wide
            start += len(places)
        last = SlopedKnown(known.values, known.errors, known.relaxed, {})
        both = lower(at.graph, last, rows, ar)
        both = np.broadcast_to(both, (len(lows[0]), both.shape[1]))
        found, start = [], 0
        for ref, places in zip(at.graph.inputs, free, strict=True):
            if ref not in of or not len(places):  # the value does not depend on this input
                none = np.full((len(lows[0]), len(places)), ref not in of)
                found.append((none, none))
            else:
                value = known.values[of[ref]]
                flat = [end.reshape(len(end), -1)[:, places] for end in (value.lo, value.hi)]
                here = slice(start, start + len(places))
                least = np.fmax(both[:, here], flat[0])
                most = np.fmin(-both[:, count + start : count + start + len(places)], flat[1])
                found.append((least >= 0, most <= 0))
            start += len(places)
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
