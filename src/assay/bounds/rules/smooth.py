"""Smooth functions of one number, under lines of any slope.

The real line falls into stretches on which a function is convex or concave, between its
inflections. For a given slope s the least of `f(x) - s x` on an interval lies at an end of it or on
a convex stretch, where a tangent at any point is below f; the largest lies at an end or on a
concave stretch. So a line of any slope is made sound by a few values, in balls at the rigorous
levels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from flint import arb
from scipy import special

from assay.bounds.exact import map_balls
from assay.bounds.levels import ULPS, Arithmetic, check_range, executed_sum
from assay.bounds.nonlinear import Elementwise
from assay.bounds.operations import largest
from assay.bounds.relaxations import Lines, tangent_offset
from assay.bounds.rounding import Array, Interval, mul_up
from assay.errors import AssayError

Number = Callable[[Array], Array]
Ball = Callable[[arb], arb]


@dataclass(frozen=True)
class Function:
    """A function with its derivative, in float64 and in balls.

    inflections: enclosures of where the curvature changes its sign; `convex`: whether the first
    stretch is convex. turn: an enclosure of where a function that falls and then rises turns, and a
    lower bound of it there; none for a monotone one, which `rises` or falls. domain: the numbers
    that it is defined on lie above."""

    name: str
    value: Number
    slope: Number
    ball: Ball
    slope_ball: Ball
    convex: bool
    inflections: tuple[tuple[float, float], ...] = ()
    turn: tuple[float, float, float] | None = None
    rises: bool = True
    above: float = -math.inf
    range: tuple[float, float] = (-math.inf, math.inf)


def _sigmoid(x: arb) -> arb:
    return 1 / (1 + (-x).exp())


GELU_ROOT = math.sqrt(2 / math.pi)  # rounded, as every implementation holds it
GELU_CUBIC = 0.044715
GELU_TANH_BENDS = 1.4185040087908284
GELU_TANH_TURN = (-0.752462, -0.752461, -0.17004076)


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(GELU_ROOT * (x + GELU_CUBIC * x**3)))


def _gelu_tanh_slope(x: Array) -> Array:
    t = np.tanh(GELU_ROOT * (x + GELU_CUBIC * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * GELU_ROOT * (1 + 3 * GELU_CUBIC * x * x)


def _inner(x: arb) -> arb:
    return arb(GELU_ROOT) * (x + arb(GELU_CUBIC) * x * x * x)


def _gelu_tanh_ball(x: arb) -> arb:
    return x * _sigmoid(2 * _inner(x))


def _gelu_tanh_slope_ball(x: arb) -> arb:
    s = _sigmoid(2 * _inner(x))
    return s + 2 * x * s * (1 - s) * arb(GELU_ROOT) * (1 + 3 * arb(GELU_CUBIC) * x * x)


def _gelu_slope(x: Array) -> Array:
    return special.ndtr(x) + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _silu_slope(x: Array) -> Array:
    s = special.expit(x)
    return s + x * s * (1 - s)


def _near(x: float, width: float = 1e-9) -> tuple[float, float]:
    return x - width, x + width


FUNCTIONS: dict[str, Function] = {
    entry.name: entry
    for entry in (
        Function(
            "exp",
            np.exp,
            np.exp,
            lambda b: b.exp(),
            lambda b: b.exp(),
            True,
            range=(0.0, math.inf),
        ),
        Function(
            "log", np.log, lambda x: 1 / x, lambda b: b.log(), lambda b: 1 / b, False, above=0
        ),
        Function(
            "sqrt",
            np.sqrt,
            lambda x: 0.5 / np.sqrt(x),
            lambda b: b.sqrt(),
            lambda b: 1 / (2 * b.sqrt()),
            False,
            above=0,
            range=(0.0, math.inf),
        ),
        Function(
            "rsqrt",
            lambda x: 1 / np.sqrt(x),
            lambda x: -0.5 / (x * np.sqrt(x)),
            lambda b: b.rsqrt(),
            lambda b: -b.rsqrt() / (2 * b),
            True,
            rises=False,
            above=0,
            range=(0.0, math.inf),
        ),
        Function(
            "reciprocal",
            lambda x: 1 / x,
            lambda x: -1 / (x * x),
            lambda b: 1 / b,
            lambda b: -1 / (b * b),
            True,
            rises=False,
            above=0,
            range=(0.0, math.inf),
        ),
        Function(
            "tanh",
            np.tanh,
            lambda x: 1 - np.tanh(x) ** 2,
            lambda b: b.tanh(),
            lambda b: 1 - b.tanh() ** 2,
            True,
            ((0.0, 0.0),),
            range=(-1.0, 1.0),
        ),
        Function(
            "sigmoid",
            special.expit,
            lambda x: special.expit(x) * special.expit(-x),
            _sigmoid,
            lambda b: _sigmoid(b) * _sigmoid(-b),
            True,
            ((0.0, 0.0),),
            range=(0.0, 1.0),
        ),
        Function(
            "erf",
            special.erf,
            lambda x: 2 / math.sqrt(math.pi) * np.exp(-x * x),
            lambda b: b.erf(),
            lambda b: 2 / arb.pi().sqrt() * (-b * b).exp(),
            True,
            ((0.0, 0.0),),
            range=(-1.0, 1.0),
        ),
        Function(
            "silu",
            lambda x: x * special.expit(x),
            _silu_slope,
            lambda b: b * _sigmoid(b),
            lambda b: _sigmoid(b) + b * _sigmoid(b) * _sigmoid(-b),
            False,
            (_near(-2.3993572805154), _near(2.3993572805154)),
            (-1.2784646, -1.2784645, -0.27846455),
        ),
        Function(
            "gelu",
            lambda x: x * special.ndtr(x),
            _gelu_slope,
            lambda b: b * (-b / arb(2).sqrt()).erfc() / 2,
            lambda b: (
                (-b / arb(2).sqrt()).erfc() / 2 + b * (-b * b / 2).exp() / (2 * arb.pi()).sqrt()
            ),
            False,
            (_near(-math.sqrt(2)), _near(math.sqrt(2))),
            (-0.751792, -0.751791, -0.16997121),
        ),
        Function(
            "gelu_tanh",
            _gelu_tanh,
            _gelu_tanh_slope,
            _gelu_tanh_ball,
            _gelu_tanh_slope_ball,
            False,
            (_near(-GELU_TANH_BENDS), _near(GELU_TANH_BENDS)),
            GELU_TANH_TURN,
        ),
        Function(
            "softplus",
            lambda x: np.logaddexp(0, x),
            special.expit,
            lambda b: (1 + b.exp()).log(),
            _sigmoid,
            True,
            range=(0.0, math.inf),
        ),
        Function(
            "cube",
            lambda x: x**3,
            lambda x: 3 * x * x,
            lambda b: b * b * b,
            lambda b: 3 * b * b,
            False,
            ((0.0, 0.0),),
        ),
    )
}


@dataclass(frozen=True)
class Smooth(Elementwise):
    """One of `FUNCTIONS`, entry by entry."""

    name: str

    @property
    def function(self) -> Function:
        """The function."""
        return FUNCTIONS[self.name]

    def _at(self, x: Array, ar: Arithmetic) -> Interval:
        if ar.rigorous:
            return map_balls(self.function.ball, x)
        return Interval.exactly(self.function.value(x))

    def _slope_at(self, x: Array, ar: Arithmetic) -> Interval:
        if ar.rigorous:
            return map_balls(self.function.slope_ball, x)
        return Interval.exactly(self.function.slope(x))

    def require_domain(self, x: Interval) -> None:
        """Raise `AssayError` where the function may be undefined."""
        if not np.all(x.lo > self.function.above):
            raise AssayError(
                f"{self.name} of a number that may be {self.function.above} or below has no bound;"
                " use a smaller region"
            )

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        x, function = xs[0], self.function
        self.require_domain(x)
        left, right = self._at(x.lo, ar), self._at(x.hi, ar)
        if function.turn is not None:
            low, high, least = function.turn
            inside = (x.lo < high) & (x.hi > low)
            lo = np.where(inside, least, np.minimum(left.lo, right.lo))
            return Interval(lo, np.maximum(left.hi, right.hi))
        lo, hi = (left.lo, right.hi) if function.rises else (right.lo, left.hi)
        return Interval(np.maximum(lo, function.range[0]), np.minimum(hi, function.range[1]))

    def slopes(self, x: Interval) -> tuple[Array, Array]:
        """Return slopes of fair lines below and above: the chord's, and on a stretch of one
        curvature the tangent's at the middle on the side where the function bends to.
        """
        function, width = self.function, x.hi - x.lo
        middle = function.slope(x.midpoint())
        wide = width > 1e-7 * (1 + x.magnitude())
        rise = function.value(x.hi) - function.value(x.lo)
        chord = np.where(wide, rise / np.where(wide, width, 1.0), middle)
        below, above, convex = chord.copy(), chord.copy(), function.convex
        for low, high in self._stretches():
            inside = (x.lo >= low[1]) & (x.hi <= high[0])
            if convex:
                below = np.where(inside, middle, below)
            else:
                above = np.where(inside, middle, above)
            convex = not convex
        return below, above

    def _stretches(self) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        ends = [(-math.inf, -math.inf), *self.function.inflections, (math.inf, math.inf)]
        return list(itertools.pairwise(ends))

    def lines(self, x: Interval, ar: Arithmetic) -> Lines:
        return self.relax_at([x], self.slopes(x), ar)

    def relax_at(self, xs: list[Interval], slopes: tuple[Array, ...], ar: Arithmetic) -> Lines:
        """Return sound lines of the given slopes below and above."""
        x, (below_slope, above_slope) = xs[0], slopes
        self.require_domain(x)
        ends = ((x.lo, self._at(x.lo, ar)), (x.hi, self._at(x.hi, ar)))
        under = [value - Interval.exactly(below_slope) * end for end, value in ends]
        over = [value - Interval.exactly(above_slope) * end for end, value in ends]
        below, above = np.minimum(under[0].lo, under[1].lo), np.maximum(over[0].hi, over[1].hi)
        convex = self.function.convex
        for low, high in self._stretches():
            here = (x.hi > low[0]) & (x.lo < high[1])
            if here.any():
                slope = below_slope if convex else above_slope
                t = self._touch(x, slope, low[1], high[0], convex)
                part = Interval(np.maximum(x.lo, low[0]), np.minimum(x.hi, high[1]))
                part = Interval(np.where(here, part.lo, t), np.where(here, part.hi, t))
                off = tangent_offset(part, t, self._at(t, ar), self._slope_at(t, ar), slope)
                if convex:
                    below = np.where(here, np.minimum(below, off.lo), below)
                else:
                    above = np.where(here, np.maximum(above, off.hi), above)
            convex = not convex
        return Lines(below_slope, below, above_slope, above)

    def _touch(
        self, x: Interval, slope: Array, low: float, high: float, convex: bool, halvings: int = 30
    ) -> Array:
        """Return points inside a stretch where the derivative is near the slope, by bisection; any
        point of the stretch gives a sound tangent.
        """
        lo, hi = np.clip(x.lo, low, high), np.clip(x.hi, low, high)
        for _ in range(halvings):
            t = 0.5 * (lo + hi)
            right = (self.function.slope(t) < slope) == convex
            lo, hi = np.where(right, t, lo), np.where(right, hi, t)
        return lo

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        x = xs[0].magnitude()
        match self.name:
            case "gelu":
                check_range(x)
                return executed_sum(2 * ULPS + 5, mul_up(0.5, x), largest(x))
            case "gelu_tanh":
                # The argument errs by 8 roundings, of which tanh passes on less than half.
                check_range(x)
                return executed_sum(2 * ULPS + 12, x, largest(x))
            case "silu":
                return executed_sum(2 * ULPS + 5, value.magnitude(), largest(x))
            case "softplus":
                raise AssayError("level float32: softplus has no execution model; use level real")
            case _:
                return executed_sum(2 * ULPS, value.magnitude(), 1.0)
