"""Numbers that are kept or put to zero, as other numbers decide: steps, and choices of the largest.

Every entry is `y = x` or `y = 0`. Where x may be zeroed it lies in an interval Z, where it may be
kept in an interval K. So a line `s x + c` is below y where `c <= -s z` and `c <= (1 - s) k` at the
ends of Z and K, and above with the signs turned, whatever the slope s is. On a threshold itself
either of the two may hold."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.bounds.levels import SMALL32, Arithmetic
from assay.bounds.nonlinear import Elementwise
from assay.bounds.numbers import constant
from assay.bounds.operations import Carried, Operation, Shape, fits
from assay.bounds.relaxations import Lines
from assay.bounds.rounding import Array, Interval, div_down, div_up
from assay.errors import AssayError, InputError

STEEPEST = 64.0
"""The largest slope that a search tries; a steeper one only cuts off a sliver of a box."""

Mask = NDArray[np.bool_]


def zeroed(x: Interval, threshold: Interval) -> Mask:
    """Return where x may be at or below its threshold."""
    return np.asarray(x.lo <= threshold.hi)


def kept(x: Interval, threshold: Interval) -> Mask:
    """Return where x may be at or above its threshold."""
    return np.asarray(x.hi >= threshold.lo)


class Choice(Elementwise):
    """`y = x` where x is above a threshold that may vary, else 0.

    The first parent is x; the others decide, and carry no rows."""

    @abstractmethod
    def threshold(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        """Return what x is compared with, of the shape of x; ends may be infinite."""

    def lines(self, x: Interval, ar: Arithmetic) -> Lines:
        raise NotImplementedError("a choice needs all that it reads: use relax")

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        x, t = xs[0], self.threshold(xs, ar)
        some, none = kept(x, t), zeroed(x, t)
        lo, hi = np.where(some, np.maximum(x.lo, t.lo), 0.0), np.where(some, x.hi, 0.0)
        return Interval(
            np.where(none, np.minimum(lo, 0), lo), np.where(none, np.maximum(hi, 0), hi)
        )

    def undecided(self, x: Interval) -> Mask:
        return x.hi > x.lo

    def matters(self, xs: list[Interval], ar: Arithmetic) -> Mask:
        """Return where a narrower x may narrow what is made of it, or decide an entry."""
        t = self.threshold(xs, ar)
        return kept(xs[0], t) & zeroed(xs[0], t)

    @np.errstate(all="ignore")
    def slopes(self, x: Interval, t: Interval) -> tuple[Array, Array, Array, Array]:
        """Return slopes of a fair line below and of one above, and the steepest worth a try."""
        some, none = kept(x, t), zeroed(x, t)
        width = np.where(x.hi > x.lo, x.hi - x.lo, 1.0)
        last, first = np.minimum(x.hi, t.hi), np.maximum(x.lo, t.lo)
        sure, never = some & ~none, none & ~some
        chord = (np.maximum(x.hi, 0) - np.maximum(x.lo, 0)) / width
        falls = (np.minimum(x.hi, 0) - np.minimum(x.lo, 0)) / width
        room = x.hi - last
        wide = room > 0
        steep = np.where(wide, x.hi / np.where(wide, room, 1.0), falls)
        below = np.where(first >= 0, np.where(room > last - x.lo, steep, 0.0), falls)
        below_most = np.maximum(below, np.clip(steep, 0.0, STEEPEST))
        rise = (x.lo > 0) & (first > x.lo)
        above_most = np.where(rise, first / np.where(rise, first - x.lo, 1.0), chord)
        above_most = np.maximum(chord, np.minimum(above_most, STEEPEST))

        def settled(slope: Array) -> Array:
            return np.where(sure, 1.0, np.where(never, 0.0, slope))

        return settled(below), settled(chord), settled(below_most), settled(above_most)

    def relax(self, xs: list[Interval], ar: Arithmetic) -> Lines:
        return self.relax_at(xs, self.slopes(xs[0], self.threshold(xs, ar))[:2], ar)

    @np.errstate(all="ignore")
    def relax_at(self, xs: list[Interval], slopes: tuple[Array, ...], ar: Arithmetic) -> Lines:
        """Return sound lines with the slopes below and above; a decided entry is its own line."""
        x, t = xs[0], self.threshold(xs, ar)
        some, none = kept(x, t), zeroed(x, t)
        zero = x.lo, np.minimum(x.hi, t.hi)
        keep = np.maximum(x.lo, t.lo), x.hi
        both = some & none
        rests = []
        for slope in slopes:
            s = Interval.exactly(np.where(both, slope, 0.0))
            gone = [-(s * np.where(both, z, 0.0)) for z in zero]
            stays = [Interval.exactly(k) - s * k for k in (np.where(both, k, 0.0) for k in keep)]
            rests.append([*gone, *stays])
        below = np.minimum.reduce([rest.lo for rest in rests[0]])
        above = np.maximum.reduce([rest.hi for rest in rests[1]])
        fixed = some.astype(np.float64)  # one line for what is certainly kept or zeroed
        return Lines(
            np.where(both, slopes[0], fixed),
            np.where(both, below, 0.0),
            np.where(both, slopes[1], fixed),
            np.where(both, above, 0.0),
        )

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        (part,), cost = super().backward(rows, xs, relaxed, error, ar)
        return [part, *[None] * (len(xs) - 1)], cost

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        if len(xs) > 1 and not isinstance(self, Open):
            raise AssayError(
                "level float32: features that are chosen by their norms have no execution model;"
                " use level real"
            )
        return np.full(value.shape, SMALL32)  # a subnormal number may be flushed


@dataclass(frozen=True, eq=False)
class Jump(Choice):
    """`p` where `n p > theta`, else 0, with theta >= 0 (JumpReLU, arXiv 2407.14435); n >= 0, a
    second parent, is one where it is absent.
    """

    theta: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "theta", constant("jump", self.theta))
        if np.any(self.theta < 0):
            raise InputError("jump: a threshold below zero is that of ReLU, zero")

    def shape(self, *parents: Shape) -> Shape:
        if not fits(self.theta, parents[0]) or any(p != parents[0] for p in parents):
            raise InputError(f"jump: {self.theta.shape} does not fit shape {parents[0]}")
        return parents[0]

    def threshold(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        theta = np.broadcast_to(self.theta, xs[0].shape)
        return _in_units(Interval(theta, theta), xs)


@dataclass(frozen=True)
class Largest(Choice):
    """`p` where `n relu(p)` is above zero and one of the `count` largest along the last axis, else
    0 (TopK, arXiv 2406.04093); n >= 0, a second parent, is one where it is absent.

    An entry is chosen above the count-th largest of the others, and not below it."""

    count: int

    def shape(self, *parents: Shape) -> Shape:
        if self.count < 1 or any(p != parents[0] for p in parents):
            raise InputError(f"largest: {self.count} of entries of the shapes {parents}")
        return parents[0]

    def threshold(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        sizes = Interval(np.maximum(xs[0].lo, 0.0), np.maximum(xs[0].hi, 0.0))
        if len(xs) > 1:
            sizes = sizes * xs[1]
        lo, hi = (np.maximum(_of_others(end, self.count), 0.0) for end in (sizes.lo, sizes.hi))
        return _in_units(Interval(lo, hi), xs)

    def matters(self, xs: list[Interval], ar: Arithmetic) -> Mask:
        # What is surely chosen says how large the others must be; what surely is not says nothing.
        return kept(xs[0], self.threshold(xs, ar))


@dataclass(frozen=True)
class Open(Choice):
    """`x` where `d > 0`, d the second parent, else 0: of x and d nothing is known together."""

    def shape(self, *parents: Shape) -> Shape:
        if len(parents) != 2 or parents[0] != parents[1]:
            raise InputError(f"open: shapes {parents} do not match")
        return parents[0]

    def threshold(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        d = xs[1]
        lo, hi = np.where(d.hi < 0, np.inf, -np.inf), np.where(d.lo > 0, -np.inf, np.inf)
        return Interval(np.broadcast_to(lo, xs[0].shape), np.broadcast_to(hi, xs[0].shape))


def _of_others(x: Array, count: int) -> Array:
    """Return, for every entry, the count-th largest of the others along the last axis; minus
    infinity where there are fewer.
    """
    size = x.shape[-1]
    if size <= count:
        return np.full(x.shape, -np.inf)
    ordered = np.sort(x, axis=-1)
    own, other = ordered[..., size - count, None], ordered[..., size - count - 1, None]
    return np.where(x >= own, other, own)


def _in_units(threshold: Interval, xs: list[Interval]) -> Interval:
    """Return a threshold of n p as one of p."""
    if len(xs) == 1:
        return threshold
    low, high = np.maximum(xs[1].lo, 0.0), np.maximum(xs[1].hi, 0.0)
    with np.errstate(all="ignore"):
        lo = np.where(high > 0, div_down(threshold.lo, high), 0.0)
        hi = np.where(low > 0, div_up(threshold.hi, low), np.inf)
    return Interval(np.maximum(lo, 0.0), hi)


@dataclass(frozen=True, eq=False)
class Decision(Operation):
    """The derivative of a choice by x, 1 or 0, where it is decided on the whole box."""

    choice: Choice
    nonlinear = True

    def shape(self, *parents: Shape) -> Shape:
        return parents[0]

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        t = self.choice.threshold(xs, ar)
        some = kept(xs[0], t)
        if np.any(some & zeroed(xs[0], t)):
            raise AssayError("a choice has no derivative where it is undecided")
        return Interval.exactly(some.astype(np.float64))

    def relax(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return self.interval(xs, ar)

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        return [None] * len(xs), ar.lower(rows, relaxed.lo, relaxed.hi, error)

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        raise AssayError("level float32: a derivative is not executed; use level real")
