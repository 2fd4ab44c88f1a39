"""The nonlinear operations of a graph: products, elementwise functions and softmax, each with
its relaxation.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.bounds import relaxations
from assay.bounds.levels import (
    SMALL32,
    ULPS,
    UNIT32,
    Arithmetic,
    check_range,
    executed_sum,
)
from assay.bounds.numbers import constant
from assay.bounds.operations import Carried, Operation, Shape, fits, largest
from assay.bounds.rounding import Array, Interval, add_up, mul_up, sub_down, sub_up, sum_up
from assay.errors import AssayError, InputError


@dataclass(frozen=True)
class Multiply(Operation):
    """`x y` elementwise (y may have last axis 1); further parents x + y and x - y, where given,
    tighten the bound.
    """

    nonlinear = True

    def shape(self, *parents: Shape) -> Shape:
        x, y = parents[:2]
        if x != y and y != (*x[:-1], 1):
            raise InputError(f"multiply: shapes {x} and {y} do not match")
        return x

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return xs[0] * xs[1]

    def relax(self, xs: list[Interval], ar: Arithmetic) -> tuple[Array, Array, Interval]:
        plus, minus = xs[2:] if len(xs) == 4 else (xs[0] + xs[1], xs[0] - xs[1])
        return relaxations.product_rest(xs[0], xs[1], plus, minus)

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        x, y = xs[:2]
        m_x, m_y, rest = relaxed
        of_x, of_y = rows * m_y[:, None], rows * m_x[:, None]
        if x.shape != y.shape:
            of_y = of_y.sum(-1, keepdims=True)
        grown = add_up(mul_up(np.abs(m_y), x.magnitude()), mul_up(np.abs(m_x), y.magnitude()))
        wobble = add_up(error, mul_up(ar.gamma(rows.shape[-1] + 1), grown))
        constant = sub_down(
            ar.lower(rows, rest.lo, rest.hi, wobble),
            ar.tail(rows.shape[-1], x.magnitude(), y.magnitude()),
        )
        return [of_x, of_y, *[None] * (len(xs) - 2)], constant

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        return executed_sum(
            1, value.magnitude(), max(largest(xs[0].magnitude()), largest(xs[1].magnitude()))
        )


@dataclass(frozen=True)
class MatMul(Operation):
    """`X Y` over the last two axes: attention scores and the mixing of values."""

    nonlinear = True

    def shape(self, *parents: Shape) -> Shape:
        x, y = parents
        if len(x) < 2 or len(y) < 2 or x[:-2] != y[:-2] or x[-1] != y[-2]:
            raise InputError(f"matmul: shapes {x} and {y} do not match")
        return (*x[:-1], y[-1])

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        x, y = xs
        spread = add_up(
            ar.dot_up(x.magnitude(), y.radius()), ar.dot_up(x.radius(), np.abs(y.midpoint()))
        )
        return ar.dot(x.midpoint(), y.midpoint()) + Interval(-spread, spread)

    def relax(self, xs: list[Interval], ar: Arithmetic) -> tuple[Array, Array, Interval, Array]:
        x, y = xs
        m_x, m_y = x.midpoint(), y.midpoint()
        spread = ar.dot_up(x.radius(), y.radius())
        grown = add_up(ar.dot_up(x.magnitude(), np.abs(m_y)), ar.dot_up(np.abs(m_x), y.magnitude()))
        return m_x, m_y, Interval(-spread, spread) - ar.dot(m_x, m_y), grown

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        m_x, m_y, rest, grown = relaxed
        of_x = rows @ np.swapaxes(m_y, -1, -2)[:, None]
        of_y = np.swapaxes(m_x, -1, -2)[:, None] @ rows
        terms = max(rows.shape[-2:])
        wobble = add_up(error, mul_up(ar.gamma(terms), grown))
        tail = ar.tail(terms, xs[0].magnitude(), xs[1].magnitude())
        return [of_x, of_y], sub_down(ar.lower(rows, rest.lo, rest.hi, wobble), tail)

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        x, y = (v.magnitude() for v in xs)
        return executed_sum(
            x.shape[-1], Arithmetic("real").dot_up(x, y), max(largest(x), largest(y))
        )


class Elementwise(Operation):
    """A function of each unit, bounded by lines."""

    nonlinear = True

    def shape(self, *parents: Shape) -> Shape:
        return parents[0]

    @abstractmethod
    def lines(self, x: Interval, ar: Arithmetic) -> relaxations.Lines:
        """Return lines that bound the function on x."""

    def relax(self, xs: list[Interval], ar: Arithmetic) -> relaxations.Lines:
        return self.lines(xs[0], ar)

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        lines, magnitude = relaxed, xs[0].magnitude()
        carried = np.ascontiguousarray(rows * lines.above_slope[:, None])
        bent = np.flatnonzero(
            (lines.below_slope != lines.above_slope).reshape(len(magnitude), -1).any(0)
        )
        if len(bent):  # only where the slopes differ does the sign of the coefficient matter
            some, flat = (
                rows.reshape(*rows.shape[:2], -1)[..., bent],
                carried.reshape(*carried.shape[:2], -1),  # a view: what is written to it counts
            )
            steeper, flatter = (
                s.reshape(len(s), 1, -1)[..., bent] for s in (lines.below_slope, lines.above_slope)
            )
            flat[..., bent] = np.where(some > 0, steeper, flatter) * some
        steepest = np.maximum(np.abs(lines.below_slope), np.abs(lines.above_slope))
        wobble = (
            add_up(error, mul_up(ar.gamma(1), mul_up(steepest, magnitude)))
            if ar.rigorous
            else error
        )
        return [carried], sub_down(
            ar.lower(rows, lines.below, lines.above, wobble), ar.tail(1, magnitude)
        )


@dataclass(frozen=True)
class Relu(Elementwise):
    """`max(x, 0)`."""

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return Interval(np.maximum(xs[0].lo, 0.0), np.maximum(xs[0].hi, 0.0))

    def lines(self, x: Interval, ar: Arithmetic) -> relaxations.Lines:
        return relaxations.relu_lines(x)

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        return np.full(value.shape, SMALL32)  # a subnormal number may be flushed

    def undecided(self, x: Interval) -> NDArray[np.bool_]:
        return (x.lo < 0) & (x.hi > 0)


@dataclass(frozen=True)
class Gelu(Elementwise):
    """`x Phi(x)`, the exact form."""

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return relaxations.gelu(xs[0], ar)

    def lines(self, x: Interval, ar: Arithmetic) -> relaxations.Lines:
        return relaxations.gelu_lines(x, ar)

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        # |x|/2 (erf: ULPS units in the last place of 1, its argument and 1 + erf: 3 roundings) and
        # the product, in any order: x (1 + erf) may be formed before it is halved.
        x = xs[0].magnitude()
        check_range(x)
        return executed_sum(2 * ULPS + 5, mul_up(0.5, x), largest(x))


@dataclass(frozen=True)
class Square(Elementwise):
    """`x^2`."""

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        x = xs[0]
        nearest = np.where((x.lo <= 0) & (x.hi >= 0), 0.0, np.minimum(np.abs(x.lo), np.abs(x.hi)))
        farthest = x.magnitude()
        return Interval(
            np.maximum(np.nextafter(nearest * nearest, -1.0), 0.0), mul_up(farthest, farthest)
        )

    def lines(self, x: Interval, ar: Arithmetic) -> relaxations.Lines:
        return relaxations.square_lines(x)

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        return executed_sum(1, value.magnitude(), largest(xs[0].magnitude()))


@dataclass(frozen=True)
class InverseRoot(Elementwise):
    """`(scale x + shift)^(-1/2)` with real constants given as intervals; part of a norm, never
    executed alone.
    """

    scale: Interval = field(default_factory=lambda: Interval.exactly(1.0))
    shift: Interval = field(default_factory=lambda: Interval.exactly(0.0))

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return Interval(
            relaxations.inverse_root(Interval.exactly(xs[0].hi), self.scale, self.shift).lo,
            relaxations.inverse_root(Interval.exactly(xs[0].lo), self.scale, self.shift).hi,
        )

    def lines(self, x: Interval, ar: Arithmetic) -> relaxations.Lines:
        return relaxations.inverse_root_lines(x, self.scale, self.shift)

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        raise AssayError(
            "level float32: a reciprocal root alone has no execution model; use rms_norm, or level"
            " real"
        )


@dataclass(frozen=True)
class Softmax(Operation):
    """Softmax along the last axis over the entries where mask is one; the others get no weight."""

    mask: Array
    nonlinear = True

    def __post_init__(self) -> None:
        allowed = constant("softmax mask", self.mask) != 0
        object.__setattr__(self, "mask", allowed.astype(np.float64))

    def shape(self, *parents: Shape) -> Shape:
        if not fits(self.mask, parents[0]):
            raise InputError(f"softmax: mask {self.mask.shape} does not fit shape {parents[0]}")
        return parents[0]

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return relaxations.softmax(xs[0], np.broadcast_to(self.mask, xs[0].shape), ar)

    def relax(self, xs: list[Interval], ar: Arithmetic) -> tuple[Array, Array, Interval]:
        return relaxations.softmax_rest(xs[0], np.broadcast_to(self.mask, xs[0].shape), ar)

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        p, kept, rest = relaxed
        chosen = rows * kept[:, None]
        carried = p[:, None] * (chosen - (chosen * p[:, None]).sum(-1, keepdims=True))
        magnitude = xs[0].magnitude()
        mean = sum_up(mul_up(p, magnitude))[..., None]
        wobble = add_up(
            error, mul_up(ar.gamma(rows.shape[-1] + 3), mul_up(p, add_up(magnitude, mean)))
        )
        return [carried], sub_down(
            ar.lower(rows, rest.lo, rest.hi, wobble), ar.tail(rows.shape[-1] + 3, magnitude)
        )

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        # exp(x - max) / sum: the rounded difference and exp are relative errors of numerator and
        # denominator alike.
        mask, terms = np.broadcast_to(self.mask, xs[0].shape), xs[0].shape[-1]
        above, below = (
            np.where(mask > 0, xs[0].hi, -np.inf).max(-1),
            np.where(mask > 0, xs[0].lo, np.inf).min(-1),
        )
        gap = mul_up(UNIT32, np.maximum(sub_up(above, below), 0.0))
        relative = add_up(
            mul_up(2.05, add_up(gap, 2 * ULPS * UNIT32)), 1.05 * (terms + 2) * UNIT32
        )[..., None]
        error = add_up(mul_up(relative, value.hi), 4 * (terms + 1) * SMALL32)
        return np.where(
            gap[..., None] < 0.01, error, 1.01
        )  # a computed probability lies in [0, 1] up to rounding
