"""Boxes of numbers with outward rounding, and lower bounds of dot products.

IEEE 754 rounds one operation by at most half a unit in the last place, so one step of `nextafter`
outward encloses the real result. A conventional float64 sum of n products, in any order, errs by at
most `gamma(n)` times the sum of the absolute products, plus n times the smallest number (Higham,
Accuracy and Stability of Numerical Algorithms, 3.1). Whatever is infinite or NaN bounds nothing."""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
UNIT = 2.0**-53
TINY = 2.0**-1074


@dataclass(frozen=True)
class Box:
    """Ends of real numbers, entry by entry."""

    lo: Array
    hi: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the ends."""
        return self.lo.shape

    def size(self) -> Array:
        """Return the largest absolute value of every entry."""
        return np.maximum(np.abs(self.lo), np.abs(self.hi))

    def middle(self) -> Array:
        """Return a number near the middle of every entry, and inside."""
        return np.clip(0.5 * self.lo + 0.5 * self.hi, self.lo, self.hi)

    def radius(self) -> Array:
        """Return an upper bound of the distance from the middle to either end."""
        middle = self.middle()
        return np.maximum(up(self.hi - middle), up(middle - self.lo))

    def meet(self, lo: Array, hi: Array) -> "Box":
        """Return the intersection with other ends of the same numbers; NaN ends say nothing."""
        return Box(np.fmax(self.lo, lo), np.fmin(self.hi, hi))


def rounds_to_nearest() -> bool:
    """Return whether float64 rounds to nearest here and keeps subnormal numbers."""
    one = np.ones(8)
    near = np.all(one + 0.75 * 2.0**-52 == 1 + 2.0**-52) and np.all(one + 0.25 * 2.0**-52 == 1)
    return bool(near and np.all(one * 2.0**-1022 * 0.5 != 0) and np.all(one * TINY + 0.0 != 0))


def up(x: Array | float) -> Array:
    """Return the next float64 above each entry."""
    return np.nextafter(x, np.inf)


def down(x: Array | float) -> Array:
    """Return the next float64 below each entry."""
    return np.nextafter(x, -np.inf)


def gamma(terms: int) -> float:
    """Return an upper bound of `n u / (1 - n u)`, for n up to 2^40."""
    share = terms * UNIT
    return float(up(share / (1 - share))) * (1 + 4 * UNIT)


def exactly(x: Array) -> Box:
    """Return numbers as boxes of no width."""
    return Box(x, x)


def sum_ends(a: Array, b: Array) -> tuple[Array, Array]:
    """Return bounds of a + b below and above, equal where the sum needs no rounding."""
    total = a + b
    part = total - a
    exact = (a - (total - part)) + (b - part) == 0  # Knuth's TwoSum; false for NaN
    return np.where(exact, total, down(total)), np.where(exact, total, up(total))


def plus(x: Box, y: Box) -> Box:
    """Return x + y."""
    return Box(sum_ends(x.lo, y.lo)[0], sum_ends(x.hi, y.hi)[1])


def minus(x: Box, y: Box) -> Box:
    """Return x - y."""
    return Box(sum_ends(x.lo, -y.hi)[0], sum_ends(x.hi, -y.lo)[1])


def times(x: Box, y: Box) -> Box:
    """Return x y."""
    ends = [a * b for a in (x.lo, x.hi) for b in (y.lo, y.hi)]
    lo, hi = np.minimum.reduce(ends), np.maximum.reduce(ends)
    nought = ((x.lo == 0) & (x.hi == 0)) | ((y.lo == 0) & (y.hi == 0))
    return Box(np.where(nought, 0.0, down(lo)), np.where(nought, 0.0, up(hi)))


def square(x: Box) -> Box:
    """Return x^2."""
    far = x.size()
    near = np.where((x.lo <= 0) & (x.hi >= 0), 0.0, np.minimum(np.abs(x.lo), np.abs(x.hi)))
    return Box(np.maximum(down(near * near), 0.0), up(far * far))


def total(x: Box) -> Box:
    """Return the sums along the last axis, which stays."""
    terms = x.lo.shape[-1]
    slack = gamma(terms) * (1 + 2 * gamma(terms))
    ends = []
    for end, sign in ((x.lo, -1.0), (x.hi, 1.0)):
        value, error = end.sum(-1, keepdims=True), np.abs(end).sum(-1, keepdims=True)
        ends.append(value + sign * up(slack * error))
    # A sum of numbers that are not negative is not negative.
    low = np.where((x.lo >= 0).all(-1, keepdims=True), 0.0, -np.inf)
    return Box(np.maximum(down(ends[0]), low), up(ends[1]))


def product_up(a: Array, b: Array) -> Array:
    """Return an upper bound of `a @ b` for numbers that are not negative."""
    terms = a.shape[-1]
    return up((a @ b) * (1 + 2 * gamma(terms)) + 2 * terms * TINY)


def product(a: Array, b: Array) -> Box:
    """Return an enclosure of `a @ b`."""
    terms = a.shape[-1]
    value = a @ b
    error = up(gamma(terms) * product_up(np.abs(a), np.abs(b)) + 2 * terms * TINY)
    return Box(down(value - error), up(value + error))


def least(rows: Array, lo: Array, hi: Array) -> Array:
    """Bound `rows . t` from below over t in [lo, hi], (rows,); minus infinity for no bound."""
    flat, terms = rows.reshape(len(rows), -1), int(lo.size)
    below, above = lo.reshape(-1), hi.reshape(-1)
    positive, negative = np.maximum(flat, 0.0), np.minimum(flat, 0.0)
    value = positive @ below + negative @ above
    size = positive @ np.abs(below) + np.abs(negative) @ np.abs(above)
    error = up(2 * gamma(2 * terms + 4) * size + 4 * (terms + 1) * TINY)
    found = down(value - error)
    return np.where(np.isfinite(value) & np.isfinite(error), found, -np.inf)


def cost(errors: Array, size: Array) -> Array:
    """Return how much errors of coefficients of numbers up to `size` may take away, (rows,)."""
    return product_up(errors.reshape(len(errors), -1), size.reshape(-1))
