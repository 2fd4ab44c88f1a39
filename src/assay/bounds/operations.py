"""The operations of a graph: real range, one backward step of a linear bound, and the float32 error of executing it.

`backward(rows, xs, relaxed, error, ar)` takes rows A (samples or 1, rows, *output shape) and intervals xs of the parents. It returns
the coefficients of the parents and a constant c with `A.(op(x) + e) >= sum_p A_p.x_p + c` in real arithmetic, for all x in xs
and |e| <= error. A rounding error of a coefficient costs |error| |x|, which is charged to c through `wobble`, an uncertainty of
each output unit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.bounds import relaxations
from assay.bounds.levels import SMALL32, ULPS, UNIT32, Arithmetic, executed_sum
from assay.bounds.rounding import Array, Interval, add_up, mul_up, sub_down, sub_up, sum_up
from assay.errors import AssayError, InputError

Shape = tuple[int, ...]
Carried = tuple[list[Array | None], Array]  # coefficients per parent (none where it has no part) and the constant


class Operation(ABC):
    """One operation; `nonlinear` ones are bounded better when the intervals of their parents are tight."""

    nonlinear = False

    @abstractmethod
    def shape(self, *parents: Shape) -> Shape:
        """Return the output shape of one sample; raises `InputError` when the parents do not fit."""

    @abstractmethod
    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        """Enclose the real result."""

    def relax(self, xs: list[Interval], ar: Arithmetic) -> Any:
        """Return what `backward` needs to know of the operation on these intervals, worked out once for all rows."""
        return None

    @abstractmethod
    def backward(self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic) -> Carried:
        """Carry a lower bound of `rows . output` to the parents."""

    @abstractmethod
    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        """Bound the float32 error of executing the operation on numbers in xs."""

    def undecided(self, x: Interval) -> NDArray[np.bool_]:
        """Return where a tighter interval of the input may tighten the result."""
        return x.hi > x.lo

    def select(
        self, units: NDArray[np.intp], signs: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        """Carry the bounds of single output units, `sign * output[unit]`, to the parents."""
        shape = self.shape(*(x.shape[1:] for x in xs))
        rows = np.zeros((1, len(units), math.prod(shape)))
        rows[0, np.arange(len(units)), units] = signs
        return self.backward(rows.reshape(1, len(units), *shape), xs, relaxed, error, ar)


@dataclass(frozen=True)
class Affine(Operation):
    """`x W^T + b` along the last axis."""

    weight: Array
    bias: Array

    @cached_property
    def absolute(self) -> Array:
        """The entrywise absolute weight."""
        return np.abs(self.weight)

    def shape(self, *parents: Shape) -> Shape:
        if parents[0][-1] != self.weight.shape[1]:
            raise InputError(f"linear: weight {self.weight.shape} does not fit an input of shape {parents[0]}")
        return (*parents[0][:-1], self.weight.shape[0])

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        spread = ar.dot_up(xs[0].radius(), self.absolute.T)
        return ar.dot(xs[0].midpoint(), self.weight.T) + Interval(-spread, spread) + self.bias

    def _wobble(self, xs: list[Interval], error: Array | float, ar: Arithmetic) -> Array | float:
        if not ar.rigorous:
            return error
        total = ar.dot_up(xs[0].magnitude(), self.absolute.T)
        return add_up(error, mul_up(ar.gamma(len(self.weight) + 1), total))

    def backward(self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic) -> Carried:
        shape = (*rows.shape[:-1], self.weight.shape[1])
        carried = (rows.reshape(-1, rows.shape[-1]) @ self.weight).reshape(shape)
        bias = np.broadcast_to(self.bias, (1, *rows.shape[2:]))
        constant = ar.lower(rows, bias, bias, self._wobble(xs, error, ar))
        return [carried], sub_down(constant, ar.tail(len(self.weight), xs[0].magnitude()))

    def select(
        self, units: NDArray[np.intp], signs: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        if len(xs[0].shape) > 2:
            return super().select(units, signs, xs, relaxed, error, ar)
        constant = (signs * self.bias[units])[None]
        if not isinstance(error, float):
            constant = sub_down(constant, error[:, units])
        return [(signs[:, None] * self.weight[units])[None]], constant

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        _check_float32(self.weight, self.bias)
        x = xs[0].magnitude()
        absolute = add_up(Arithmetic("real").dot_up(x, self.absolute.T), np.abs(self.bias))
        return executed_sum(self.weight.shape[1] + 1, absolute, max(_largest(x), _largest(self.weight)))


@dataclass(frozen=True)
class Scale(Operation):
    """`w x + b`, elementwise; `terms` roundings at level float32, or none that can be bounded, for the given reason."""

    weight: Array
    bias: Array
    terms: int = 2
    unbounded: str = ""

    def shape(self, *parents: Shape) -> Shape:
        if not (_fits(self.weight, parents[0]) and _fits(self.bias, parents[0])):
            raise InputError(f"scale: weight {self.weight.shape} and bias {self.bias.shape} do not fit shape {parents[0]}")
        return parents[0]

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return xs[0] * self.weight + self.bias

    def backward(self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic) -> Carried:
        magnitude = xs[0].magnitude()
        wobble = add_up(error, mul_up(ar.gamma(1), mul_up(np.abs(self.weight), magnitude)))
        bias = np.broadcast_to(self.bias, (1, *rows.shape[2:]))
        return [rows * self.weight], sub_down(ar.lower(rows, bias, bias, wobble), ar.tail(1, magnitude))

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        if self.unbounded:
            raise AssayError(self.unbounded)
        _check_float32(self.weight, self.bias)
        x = xs[0].magnitude()
        absolute = add_up(mul_up(np.abs(self.weight), x), np.abs(self.bias))
        # 2^30 covers what an underflow before a division by a norm, at least 2^-30, can grow to.
        return executed_sum(self.terms, absolute, max(_largest(x), _largest(self.weight), 2.0**30 if self.terms > 2 else 0.0))


@dataclass(frozen=True)
class Add(Operation):
    """`x + sign y`."""

    sign: float = 1.0

    def shape(self, *parents: Shape) -> Shape:
        if parents[0] != parents[1]:
            raise InputError(f"add: shapes {parents[0]} and {parents[1]} differ")
        return parents[0]

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return xs[0] + xs[1] if self.sign > 0 else xs[0] - xs[1]

    def backward(self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic) -> Carried:
        zero = np.zeros((1, *rows.shape[2:]))
        constant = np.zeros((1, 1)) if isinstance(error, float) and error == 0 else ar.lower(rows, zero, zero, error)
        return [rows, self.sign * rows], constant

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        return executed_sum(1, value.magnitude(), 0.0)


@dataclass(frozen=True)
class Multiply(Operation):
    """`x y` elementwise (y may have last axis 1); further parents x + y and x - y, where given, tighten the bound."""

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

    def backward(self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic) -> Carried:
        x, y = xs[:2]
        m_x, m_y, rest = relaxed
        of_x, of_y = rows * m_y[:, None], rows * m_x[:, None]
        if x.shape != y.shape:
            of_y = of_y.sum(-1, keepdims=True)
        grown = add_up(mul_up(np.abs(m_y), x.magnitude()), mul_up(np.abs(m_x), y.magnitude()))
        wobble = add_up(error, mul_up(ar.gamma(rows.shape[-1] + 1), grown))
        constant = sub_down(ar.lower(rows, rest.lo, rest.hi, wobble), ar.tail(rows.shape[-1], x.magnitude(), y.magnitude()))
        return [of_x, of_y, *[None] * (len(xs) - 2)], constant

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        return executed_sum(1, value.magnitude(), max(_largest(xs[0].magnitude()), _largest(xs[1].magnitude())))


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
        spread = add_up(ar.dot_up(x.magnitude(), y.radius()), ar.dot_up(x.radius(), np.abs(y.midpoint())))
        return ar.dot(x.midpoint(), y.midpoint()) + Interval(-spread, spread)

    def relax(self, xs: list[Interval], ar: Arithmetic) -> tuple[Array, Array, Interval, Array]:
        x, y = xs
        m_x, m_y = x.midpoint(), y.midpoint()
        spread = ar.dot_up(x.radius(), y.radius())
        grown = add_up(ar.dot_up(x.magnitude(), np.abs(m_y)), ar.dot_up(np.abs(m_x), y.magnitude()))
        return m_x, m_y, Interval(-spread, spread) - ar.dot(m_x, m_y), grown

    def backward(self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic) -> Carried:
        m_x, m_y, rest, grown = relaxed
        of_x = rows @ np.swapaxes(m_y, -1, -2)[:, None]
        of_y = np.swapaxes(m_x, -1, -2)[:, None] @ rows
        terms = max(rows.shape[-2:])
        wobble = add_up(error, mul_up(ar.gamma(terms), grown))
        tail = ar.tail(terms, xs[0].magnitude(), xs[1].magnitude())
        return [of_x, of_y], sub_down(ar.lower(rows, rest.lo, rest.hi, wobble), tail)

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        x, y = (v.magnitude() for v in xs)
        return executed_sum(x.shape[-1], Arithmetic("real").dot_up(x, y), max(_largest(x), _largest(y)))


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

    def backward(self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic) -> Carried:
        lines, magnitude = relaxed, xs[0].magnitude()
        carried = rows * lines.above_slope[:, None]
        bent = np.flatnonzero((lines.below_slope != lines.above_slope).reshape(len(magnitude), -1).any(0))
        if len(bent):  # only where the slopes differ does the sign of the coefficient matter
            some, flat = rows.reshape(*rows.shape[:2], -1)[..., bent], carried.reshape(*carried.shape[:2], -1)
            steeper, flatter = (s.reshape(len(s), 1, -1)[..., bent] for s in (lines.below_slope, lines.above_slope))
            flat[..., bent] = np.where(some > 0, steeper, flatter) * some
        steepest = np.maximum(np.abs(lines.below_slope), np.abs(lines.above_slope))
        wobble = add_up(error, mul_up(ar.gamma(1), mul_up(steepest, magnitude))) if ar.rigorous else error
        return [carried], sub_down(ar.lower(rows, lines.below, lines.above, wobble), ar.tail(1, magnitude))


@dataclass(frozen=True)
class Relu(Elementwise):
    """`max(x, 0)`."""

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return Interval(np.maximum(xs[0].lo, 0.0), np.maximum(xs[0].hi, 0.0))

    def lines(self, x: Interval, ar: Arithmetic) -> relaxations.Lines:
        return relaxations.relu_lines(x)

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        return 0.0

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
        # |x|/2 (erf: ULPS units in the last place of 1, its argument and 1 + erf: 3 roundings) and the product.
        return executed_sum(2 * ULPS + 5, mul_up(0.5, xs[0].magnitude()), _largest(xs[0].magnitude()))


@dataclass(frozen=True)
class Square(Elementwise):
    """`x^2`."""

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        x = xs[0]
        nearest = np.where((x.lo <= 0) & (x.hi >= 0), 0.0, np.minimum(np.abs(x.lo), np.abs(x.hi)))
        farthest = x.magnitude()
        return Interval(np.maximum(np.nextafter(nearest * nearest, -1.0), 0.0), mul_up(farthest, farthest))

    def lines(self, x: Interval, ar: Arithmetic) -> relaxations.Lines:
        return relaxations.square_lines(x)

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        return executed_sum(1, value.magnitude(), _largest(xs[0].magnitude()))


@dataclass(frozen=True)
class InverseRoot(Elementwise):
    """`(scale x + shift)^(-1/2)` with real constants given as intervals; part of a norm, never executed alone."""

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
        raise AssayError("level float32: a reciprocal root alone has no execution model; use rms_norm, or level real")


@dataclass(frozen=True)
class Softmax(Operation):
    """Softmax along the last axis over the entries where mask is one; the others get no weight."""

    mask: Array
    nonlinear = True

    def shape(self, *parents: Shape) -> Shape:
        if not _fits(self.mask, parents[0]):
            raise InputError(f"softmax: mask {self.mask.shape} does not fit shape {parents[0]}")
        return parents[0]

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return relaxations.softmax(xs[0], np.broadcast_to(self.mask, xs[0].shape), ar)

    def relax(self, xs: list[Interval], ar: Arithmetic) -> tuple[Array, Array, Interval]:
        return relaxations.softmax_rest(xs[0], np.broadcast_to(self.mask, xs[0].shape), ar)

    def backward(self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic) -> Carried:
        p, kept, rest = relaxed
        chosen = rows * kept[:, None]
        carried = p[:, None] * (chosen - (chosen * p[:, None]).sum(-1, keepdims=True))
        magnitude = xs[0].magnitude()
        mean = sum_up(mul_up(p, magnitude))[..., None]
        wobble = add_up(error, mul_up(ar.gamma(rows.shape[-1] + 3), mul_up(p, add_up(magnitude, mean))))
        return [carried], sub_down(ar.lower(rows, rest.lo, rest.hi, wobble), ar.tail(rows.shape[-1] + 3, magnitude))

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        # exp(x - max) / sum: the rounded difference and exp are relative errors of numerator and denominator alike.
        mask, terms = np.broadcast_to(self.mask, xs[0].shape), xs[0].shape[-1]
        above, below = np.where(mask > 0, xs[0].hi, -np.inf).max(-1), np.where(mask > 0, xs[0].lo, np.inf).min(-1)
        gap = mul_up(UNIT32, np.maximum(sub_up(above, below), 0.0))
        relative = add_up(mul_up(2.05, add_up(gap, 2 * ULPS * UNIT32)), 1.05 * (terms + 2) * UNIT32)[..., None]
        error = add_up(mul_up(relative, value.hi), 4 * (terms + 1) * SMALL32)
        return np.where(gap[..., None] < 0.01, error, 1.01)  # a computed probability lies in [0, 1] up to rounding


@dataclass(frozen=True)
class Rearrange(Operation):
    """A permutation of the axes of one sample (none: keep them), then a new shape."""

    axes: tuple[int, ...]
    target: Shape

    def shape(self, *parents: Shape) -> Shape:
        if sorted(self.axes) != list(range(len(parents[0]))) or math.prod(self.target) != math.prod(parents[0]):
            raise InputError(f"rearrange: axes {self.axes} and shape {self.target} do not fit {parents[0]}")
        return self.target

    def _apply(self, x: Array) -> Array:
        return x.transpose(0, *(a + 1 for a in self.axes)).reshape(len(x), *self.target)

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return Interval(self._apply(xs[0].lo), self._apply(xs[0].hi))

    def backward(self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic) -> Carried:
        permuted = [xs[0].shape[1:][a] for a in self.axes]
        back = np.argsort(self.axes)
        return [rows.reshape(*rows.shape[:2], *permuted).transpose(0, 1, *(back + 2))], np.zeros((1, 1))

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        return 0.0


def _largest(x: Array) -> float:
    return float(np.max(np.abs(x), initial=0.0))


def _fits(constant: Array, shape: Shape) -> bool:
    """Return whether a constant broadcasts to a shape."""
    pairs = zip(constant.shape[::-1], shape[::-1], strict=False)
    return constant.ndim <= len(shape) and all(a in (1, b) for a, b in pairs)


def _check_float32(*constants: Array) -> None:
    for constant in constants:
        with np.errstate(over="ignore", under="ignore"):
            same = np.array_equal(constant.astype(np.float32).astype(np.float64), constant)
        if not same:
            raise AssayError(
                "level float32: a weight is not a float32 number, so that a float32 network cannot hold it; round the weights first"
            )
