"""Outward rounding: float64 pairs that contain real numbers, exact dyadic products, and balls for
exp and erf.

IEEE 754 rounds `+ - * / sqrt` to the nearest float64, so one step of `nextafter` outward after each
operation encloses the real result; overflow gives an infinite end, which is still an enclosure
(`finite` refuses it). Sums are folded pairwise with the same operations. Matrix products of floats
are formed exactly: every float64 is an integer times a power of two."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import numpy as np
from flint import arb, ctx, fmpz_mat
from numpy.typing import ArrayLike

from assay.bounds.numbers import Array, as_array, exactly, is_float64, outward
from assay.errors import AssayError, InputError

UNIT = 2.0**-53  # unit roundoff of float64
TINY = 2.0**-1074  # smallest positive float64
_LARGEST = float(np.finfo(np.float64).max)
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


def _outward(mantissa: int, exponent: int) -> tuple[float, float]:
    """Return the float64 neighbours (equal when exact) of mantissa * 2**exponent."""
    if mantissa == 0:
        return 0.0, 0.0
    if mantissa < 0:
        low, high = _outward(-mantissa, exponent)
        return -high, -low
    top = mantissa.bit_length() + exponent
    if top > 1024:
        return _LARGEST, math.inf
    if top < -1074:
        return 0.0, TINY
    unit = max(top - 53, -1074)
    if unit <= exponent:
        exact = math.ldexp(mantissa << max(exponent - unit, 0), unit)
        return exact, exact
    floor = mantissa >> (unit - exponent)
    above = math.inf if (floor + 1).bit_length() + unit > 1024 else math.ldexp(floor + 1, unit)
    return math.ldexp(floor, unit), (
        math.ldexp(floor, unit) if floor << (unit - exponent) == mantissa else above
    )


@dataclass(frozen=True)
class Dyadic:
    """An exact matrix `integers * 2**exponent`."""

    integers: fmpz_mat
    exponent: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.integers.nrows(), self.integers.ncols()

    @property
    def T(self) -> Dyadic:  # noqa: N802
        """The transpose."""
        return Dyadic(self.integers.transpose(), self.exponent)

    def __matmul__(self, other: Dyadic | ArrayLike) -> Dyadic:
        other = other if isinstance(other, Dyadic) else dyadic(other)
        if self.shape[1] != other.shape[0]:
            raise InputError(f"exact product: shapes {self.shape} and {other.shape} do not match")
        return Dyadic(self.integers * other.integers, self.exponent + other.exponent)

    def __add__(self, other: Dyadic | ArrayLike) -> Dyadic:
        other = other if isinstance(other, Dyadic) else dyadic(other)
        if self.shape != other.shape:
            raise InputError(f"exact sum: shapes {self.shape} and {other.shape} differ")
        low = min(self.exponent, other.exponent)
        return Dyadic(
            self.integers * (1 << (self.exponent - low))
            + other.integers * (1 << (other.exponent - low)),
            low,
        )

    def __neg__(self) -> Dyadic:
        return Dyadic(self.integers * -1, self.exponent)

    def __sub__(self, other: Dyadic | ArrayLike) -> Dyadic:
        return self + -(other if isinstance(other, Dyadic) else dyadic(other))

    def interval(self) -> Interval:
        """Return the tightest float64 enclosure of every entry (degenerate where the entry is a
        float64).
        """
        ends = np.array([_outward(int(n), self.exponent) for n in self.integers.entries()]).reshape(
            *self.shape, 2
        )
        return Interval(ends[..., 0].copy(), ends[..., 1].copy())

    def fractions(self) -> list[list[Fraction]]:
        """Return the entries as exact fractions, row by row."""
        scale = Fraction(2) ** self.exponent
        return [[int(n) * scale for n in row] for row in self.integers.tolist()]


def dyadic(matrix: ArrayLike) -> Dyadic:
    """Return a finite float matrix (rows, columns) as an exact dyadic one; a vector becomes one
    row.
    """
    values = np.atleast_2d(as_array("dyadic: the matrix", matrix))
    if values.ndim != 2:
        raise InputError(f"dyadic: a matrix is needed, got shape {values.shape}")
    fractions, exponents = np.frexp(values)
    mantissas = (fractions * 2.0**53).astype(np.int64)
    used = mantissas != 0
    trailing = np.zeros_like(mantissas)
    trailing[used] = np.log2((mantissas[used] & -mantissas[used]).astype(np.float64)).astype(
        np.int64
    )  # exact: a power of two
    powers = exponents.astype(np.int64) - 53 + trailing
    low = int(powers[used].min()) if used.any() else 0
    shifts = np.where(used, powers - low, 0)
    integers = [
        m << s
        for m, s in zip(
            (mantissas >> trailing).ravel().tolist(), shifts.ravel().tolist(), strict=True
        )
    ]
    return Dyadic(fmpz_mat(*values.shape, integers), low)


def exact_product(*factors: Dyadic | ArrayLike) -> Dyadic:
    """Return the exact matrix product of float matrices; `.interval()` encloses it in float64
    pairs.

    Raises `InputError` on NaN, infinities and mismatched shapes.
    """
    if not factors:
        raise InputError("exact_product: at least one factor is needed")
    first = factors[0]
    product = first if isinstance(first, Dyadic) else dyadic(first)
    for factor in factors[1:]:
        product = product @ factor
    return product


def ball_interval(ball: arb) -> tuple[float, float]:
    """Return float64 ends that enclose an `arb` ball (infinite ends when it is not finite)."""
    if not ball.is_finite():
        return -math.inf, math.inf
    low, high = ball.lower().man_exp(), ball.upper().man_exp()
    return _outward(int(low[0]), int(low[1]))[0], _outward(int(high[0]), int(high[1]))[1]


def map_balls(function: Callable[[arb], arb], x: ArrayLike, bits: int = 128) -> Interval:
    """Enclose a function at given float64 numbers by balls rounded outward, each distinct number
    once.

    Raises `InputError` on NaN.
    """
    x = exactly(x)
    if np.any(np.isnan(x)):
        raise InputError("an interval has NaN ends")
    points, where = np.unique(x, return_inverse=True)
    with ctx.workprec(bits):
        ends = np.array([ball_interval(function(arb(float(point)))) for point in points]).reshape(
            -1, 2
        )
    where = where.reshape(x.shape)
    return Interval(ends[where, 0], ends[where, 1])


def exp_interval(lo: ArrayLike, hi: ArrayLike, bits: int = 128) -> Interval:
    """Enclose exp on [lo, hi] by balls rounded outward: `lo >= 0`, and `hi` is infinite where
    exp overflows float64.
    """
    lo, hi = outward(lo, -np.inf), outward(hi, np.inf)
    # exp(-746) is below the smallest float64 and exp(710) above the largest, so the balls need go
    # no further.
    low = map_balls(lambda x: x.exp(), np.clip(lo, -746.0, 710.0), bits).lo
    return Interval(
        np.where(lo < -746.0, 0.0, low),
        map_balls(lambda x: x.exp(), np.clip(hi, -746.0, 710.0), bits).hi,
    )


def erf_interval(lo: ArrayLike, hi: ArrayLike, bits: int = 128) -> Interval:
    """Enclose the error function on [lo, hi] by balls rounded outward."""
    lo, hi = outward(lo, -np.inf), outward(hi, np.inf)
    # Beyond 27 the error function differs from its limit by less than 1e-300, and rounding outward
    # already includes the limit.
    low = map_balls(lambda x: x.erf(), np.clip(lo, -27.0, 27.0), bits).lo
    high = map_balls(lambda x: x.erf(), np.clip(hi, -27.0, 27.0), bits).hi
    return Interval(np.maximum(low, -1.0), np.minimum(high, 1.0))
