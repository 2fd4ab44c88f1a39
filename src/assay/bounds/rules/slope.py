"""The derivative of a function of one number, by its range alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from flint import arb

from assay.bounds.exact import map_balls
from assay.bounds.levels import Arithmetic
from assay.bounds.operations import Carried, Operation, Shape
from assay.bounds.rounding import Array, Interval
from assay.bounds.rules.smooth import FUNCTIONS
from assay.errors import AssayError


@dataclass(frozen=True)
class Slope(Operation):
    """`f'(x)` of one of `FUNCTIONS` or of "relu", entry by entry; at the kink of ReLU any number
    between the slopes beside it.

    Between the inflections of f its derivative is monotone, so that its ends lie at those of the
    interval and at inflections inside."""

    name: str
    nonlinear = True

    def shape(self, *parents: Shape) -> Shape:
        return parents[0]

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        x = xs[0]
        if self.name == "relu":
            return Interval((x.lo > 0).astype(np.float64), (x.hi >= 0).astype(np.float64))
        function = FUNCTIONS[self.name]
        if not np.all(x.lo > function.above):
            raise AssayError(f"{self.name} has no derivative at {function.above}")
        ends = [self._at(x.lo, ar), self._at(x.hi, ar)]
        lo, hi = np.minimum(ends[0].lo, ends[1].lo), np.maximum(ends[0].hi, ends[1].hi)
        for low, high in function.inflections:
            inside = (x.lo < high) & (x.hi > low)
            bend = self._across(low, high)
            lo = np.where(inside, np.minimum(lo, bend[0]), lo)
            hi = np.where(inside, np.maximum(hi, bend[1]), hi)
        return Interval(lo, hi)

    def _at(self, x: Array, ar: Arithmetic) -> Interval:
        function = FUNCTIONS[self.name]
        if ar.rigorous:
            return map_balls(function.slope_ball, x)
        return Interval.exactly(function.slope(x))

    def _across(self, low: float, high: float) -> tuple[float, float]:
        """Enclose the derivative on the enclosure of an inflection."""
        ball = FUNCTIONS[self.name].slope_ball(arb(low).union(arb(high)))
        return (
            float(np.nextafter(float(ball.lower()), -np.inf)),
            float(np.nextafter(float(ball.upper()), np.inf)),
        )

    def relax(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return self.interval(xs, ar)

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        return [None], ar.lower(rows, relaxed.lo, relaxed.hi, error)

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        raise AssayError("level float32: a derivative is not executed; use level real")
