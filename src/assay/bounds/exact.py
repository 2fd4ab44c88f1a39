"""Exact dyadic matrices, and functions enclosed by balls.

Matrix products of floats are formed exactly: every float64 is an integer times a power of two."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from flint import arb, ctx, fmpz_mat
from numpy.typing import ArrayLike

from assay.bounds.numbers import as_array, exactly, outward
from assay.bounds.rounding import LARGEST, TINY, Interval
from assay.errors import InputError


def _outward(mantissa: int, exponent: int) -> tuple[float, float]:
    """Return the float64 neighbours (equal when exact) of mantissa * 2**exponent."""
    if mantissa == 0:
        return 0.0, 0.0
    if mantissa < 0:
        low, high = _outward(-mantissa, exponent)
        return -high, -low
    top = mantissa.bit_length() + exponent
    if top > 1024:
        return LARGEST, math.inf
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
