"""Outward rounding: float64 pairs that contain real numbers.

IEEE 754 rounds `+ - * / sqrt` to the nearest float64, so one step of `nextafter` outward after each
operation encloses the real result; overflow gives an infinite end, which is still an enclosure
(`finite` refuses it). Sums are folded pairwise with the same operations. `bounds.exact` holds exact
products and balls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from assay.bounds.numbers import Array, exactly, is_float64, outward
from assay.errors import AssayError, InputError

UNIT = 2.0**-53  # unit roundoff of float64
TINY = 2.0**-1074  # smallest positive float64
LARGEST = float(np.finfo(np.float64).max)
_quiet = np.errstate(over="ignore", invalid="ignore", under="ignore", divide="ignore")


def check_arithmetic() -> None:
    """Raise `AssayError` unless float64 rounds to nearest and keeps subnormal numbers, on which
    every enclosure here rests.
    """
    one = np.ones(16)
    nearest = np.all(one + 0.75 * 2.0**-52 == 1 + 2.0**-52) and np.all(one + 0.25 * 2.0**-52 == 1.0)
    nearest = (
        nearest
        and np.all(-one - 0.75 * 2.0**-52 == -1 - 2.0**-52)
        and np.all(-one - 0.25 * 2.0**-52 == -1.0)
    )
    if not nearest:
        raise AssayError(
            "float64 does not round to nearest in this process: restore the default rounding mode"
        )
    if np.any(one * 2.0**-1022 * 0.5 == 0) or np.any(one * 2.0**-1074 + 0.0 == 0):
        raise AssayError(
            "subnormal numbers are flushed to zero in this process: call"
            " torch.set_flush_denormal(False)"
        )


def _above(x: Array) -> Array:
    return cast(Array, np.nextafter(x, np.inf))


def _below(x: Array) -> Array:
    return cast(Array, np.nextafter(x, -np.inf))


@_quiet
def up(x: ArrayLike) -> Array:
    """Return the next float64 above each entry."""
    return _above(exactly(x))


@_quiet
def down(x: ArrayLike) -> Array:
    """Return the next float64 below each entry."""
    return _below(exactly(x))


@_quiet
def add_up(a: ArrayLike, b: ArrayLike) -> Array:
    """Return an upper bound of a + b."""
    return _above(np.add(exactly(a), exactly(b)))


@_quiet
def add_down(a: ArrayLike, b: ArrayLike) -> Array:
    """Return a lower bound of a + b."""
    return _below(np.add(exactly(a), exactly(b)))


@_quiet
def sub_up(a: ArrayLike, b: ArrayLike) -> Array:
    """Return an upper bound of a - b."""
    return _above(np.subtract(exactly(a), exactly(b)))


@_quiet
def sub_down(a: ArrayLike, b: ArrayLike) -> Array:
    """Return a lower bound of a - b."""
    return _below(np.subtract(exactly(a), exactly(b)))


@_quiet
def mul_up(a: ArrayLike, b: ArrayLike) -> Array:
    """Return an upper bound of a * b."""
    return _above(np.multiply(exactly(a), exactly(b)))


@_quiet
def mul_down(a: ArrayLike, b: ArrayLike) -> Array:
    """Return a lower bound of a * b."""
    return _below(np.multiply(exactly(a), exactly(b)))


@_quiet
def div_up(a: ArrayLike, b: ArrayLike) -> Array:
    """Return an upper bound of a / b; a zero in b gives an infinity or NaN, which `finite`
    refuses.
    """
    return _above(np.divide(exactly(a), exactly(b)))


@_quiet
def div_down(a: ArrayLike, b: ArrayLike) -> Array:
    """Return a lower bound of a / b; a zero in b gives an infinity or NaN, which `finite`
    refuses.
    """
    return _below(np.divide(exactly(a), exactly(b)))


@_quiet
def sqrt_up(a: ArrayLike) -> Array:
    """Return an upper bound of the square root of a >= 0."""
    return _above(np.sqrt(exactly(a)))


@_quiet
def sqrt_down(a: ArrayLike) -> Array:
    """Return a lower bound of the square root of a >= 0, never negative."""
    return cast(Array, np.maximum(_below(np.sqrt(exactly(a))), 0.0))


def _fold(x: ArrayLike, axis: int, add: Callable[[ArrayLike, ArrayLike], Array]) -> Array:
    x = np.moveaxis(exactly(x), axis, 0)
    if len(x) == 0:
        return np.zeros(x.shape[1:])
    while len(x) > 1:
        half = len(x) // 2
        folded = add(x[:half], x[half : 2 * half])
        x = np.concatenate([folded, x[2 * half :]]) if len(x) % 2 else folded
    return cast(Array, x[0])


def sum_up(x: ArrayLike, axis: int = -1) -> Array:
    """Return an upper bound of the sum along an axis (pairwise, log2 n roundings)."""
    return _fold(x, axis, add_up)


def sum_down(x: ArrayLike, axis: int = -1) -> Array:
    """Return a lower bound of the sum along an axis (pairwise, log2 n roundings)."""
    return _fold(x, axis, add_down)


@dataclass(frozen=True)
class Interval:
    """Arrays `lo <= hi` of one shape that contain a real array; the operators round outward.

    Ends of any other precision than float64 are converted, outward where they must be rounded, so
    that every operation is float64's own. Raises `InputError` for ends that are no real numbers."""

    lo: Array
    hi: Array

    def __post_init__(self) -> None:
        if not (is_float64(self.lo) and is_float64(self.hi)):
            object.__setattr__(self, "lo", outward(self.lo, -np.inf))
            object.__setattr__(self, "hi", outward(self.hi, np.inf))

    @staticmethod
    def exactly(x: Any) -> Interval:
        """Return the degenerate interval of the given numbers, or the narrowest one around those
        that float64 cannot hold.
        """
        return Interval(x, x)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of both ends."""
        return tuple(np.broadcast_shapes(np.shape(self.lo), np.shape(self.hi)))

    def __getitem__(self, index: Any) -> Interval:
        return Interval(self.lo[index], self.hi[index])

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo)

    def __add__(self, other: Interval | ArrayLike) -> Interval:
        other = _interval(other)
        return Interval(add_down(self.lo, other.lo), add_up(self.hi, other.hi))

    def __sub__(self, other: Interval | ArrayLike) -> Interval:
        other = _interval(other)
        return Interval(sub_down(self.lo, other.hi), sub_up(self.hi, other.lo))

    @_quiet
    def __mul__(self, other: Interval | ArrayLike) -> Interval:
        other = _interval(other)
        products = np.stack(
            np.broadcast_arrays(
                self.lo * other.lo, self.lo * other.hi, self.hi * other.lo, self.hi * other.hi
            )
        )
        return Interval(down(products.min(0)), up(products.max(0)))

    @_quiet
    def __truediv__(self, other: Interval | ArrayLike) -> Interval:
        other = _interval(other)
        if np.any((other.lo <= 0) & (other.hi >= 0)):
            raise InputError("interval division: the divisor contains zero")
        ratios = np.stack(
            np.broadcast_arrays(
                self.lo / other.lo, self.lo / other.hi, self.hi / other.lo, self.hi / other.hi
            )
        )
        return Interval(down(ratios.min(0)), up(ratios.max(0)))

    def sum(self, axis: int = -1) -> Interval:
        """Return the sum along an axis."""
        return Interval(sum_down(self.lo, axis), sum_up(self.hi, axis))

    def magnitude(self) -> Array:
        """Return the largest absolute value (exact)."""
        return cast(Array, np.maximum(np.abs(self.lo), np.abs(self.hi)))

    def midpoint(self) -> Array:
        """Return a float64 inside the interval, near its middle."""
        return cast(Array, np.clip(0.5 * self.lo + 0.5 * self.hi, self.lo, self.hi))

    def radius(self) -> Array:
        """Return an upper bound of the distance from `midpoint()` to either end."""
        middle = self.midpoint()
        return cast(Array, np.maximum(sub_up(self.hi, middle), sub_up(middle, self.lo)))

    def meet(self, other: Interval) -> Interval:
        """Return the intersection of two enclosures of the same numbers."""
        return Interval(np.maximum(self.lo, other.lo), np.minimum(self.hi, other.hi))


def _interval(x: Interval | ArrayLike) -> Interval:
    return x if isinstance(x, Interval) else Interval.exactly(x)


def finite(what: str, x: Interval) -> Interval:
    """Return x, or raise `AssayError` naming what has an infinite or undefined end."""
    if not (np.all(np.isfinite(x.lo)) and np.all(np.isfinite(x.hi))):
        raise AssayError(
            f"{what} has no finite bound in float64: the values overflow; scale the weights or the"
            " inputs down"
        )
    return x


# A conventional sum of n products (any order, with or without fused multiply-add, no Strassen)
# satisfies |fl(a.b) - a.b| <= gamma_n |a|.|b| + n TINY, gamma_n = n u / (1 - n u): Higham, Accuracy
# and Stability of Numerical Algorithms, 3.1.


def gamma(terms: int, unit: float = UNIT) -> float:
    """Return an upper bound of n u / (1 - n u), the relative error of a sum of n products in any
    order.
    """
    if terms * unit > 0.01:
        raise InputError(
            f"a sum of {terms} terms is too long for an error bound at unit roundoff {unit:.1e}"
        )
    return math.nextafter(terms * unit / (1 - terms * unit), math.inf) * (1 + 4 * UNIT)


@_quiet
def dot_up(a: Array, b: Array) -> Array:
    """Return an upper bound of `a @ b` for entrywise non-negative a and b, from one float
    product.
    """
    a, b, terms = exactly(a), exactly(b), a.shape[-1]
    value = a @ b
    return add_up(mul_up(value, 1 + 2 * gamma(terms)), 2 * terms * TINY)


@_quiet
def dot_interval(a: Array, b: Array) -> Interval:
    """Return an enclosure of the real product `a @ b` of float64 arrays, from one float product
    and its error bound.
    """
    a, b, terms = exactly(a), exactly(b), a.shape[-1]
    value = a @ b
    error = add_up(mul_up(gamma(terms), dot_up(np.abs(a), np.abs(b))), terms * TINY)
    return Interval(sub_down(value, error), add_up(value, error))
