"""What a bound covers: float64 search, the real-number model, or the network as executed in
float32.

* `float64`: ordinary float64 products and functions; rounding errors are not covered. For search
  and ranking.
* `real`: rigorous for the network in real-number arithmetic with the given float weights. Matrix
  products carry their forward-error bound, elementwise operations round outward, exp and erf are
  balls.
* `float32`: rigorous for the network executed in float32: round to nearest, sums in any order, with
  or without fused multiply-add, gradual underflow or flush to zero, no reduced-precision products
  (TF32, bfloat16), on the inputs of the region rounded to float32. It is `real` plus the forward
  error of every operation; that exp, erf and the reciprocal root are accurate to `ULPS` units in
  the last place is an assumption, recorded in the result. A network that could overflow anywhere
  is refused.

Every linear bound is the lower bound of a row `A.x + c`, kept valid in real arithmetic: a rounding
error in A is paid for in c, as `|error in A| . |x|`, where |x| is bounded by the interval that is
known for x."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from assay.bounds.rounding import (
    TINY,
    Array,
    Interval,
    add_up,
    check_arithmetic,
    dot_interval,
    dot_up,
    gamma,
    mul_up,
    sub_down,
    sum_up,
)
from assay.errors import AssayError, unknown

LEVELS = ("float64", "real", "float32")
UNIT32 = 2.0**-24
SMALL32 = 2.0**-126  # smallest normal float32: the error of an underflow, flushed or not
ULPS = 4  # assumed accuracy of exp, erf and the reciprocal square root in float32
LARGEST32 = 2.0**127
FLOOR = 2.0**-900


@dataclass(frozen=True)
class Arithmetic:
    """The operations of one level."""

    level: str

    @property
    def rigorous(self) -> bool:
        """Whether float64 rounding is covered."""
        return self.level != "float64"

    @property
    def executed(self) -> bool:
        """Whether float32 execution is covered."""
        return self.level == "float32"

    def dot(self, a: Array, b: Array) -> Interval:
        """Enclose `a @ b`."""
        if self.rigorous:
            return dot_interval(a, b)
        return Interval.exactly(a @ b)

    def dot_up(self, a: Array, b: Array) -> Array:
        """Bound `a @ b` from above, for non-negative a and b."""
        return dot_up(a, b) if self.rigorous else a @ b

    def gamma(self, terms: int) -> float:
        """Return the relative error of a float64 sum of n products, zero where rounding is not
        covered.
        """
        return gamma(terms) if self.rigorous else 0.0

    def tail(self, terms: int, *magnitudes: Array) -> Array:
        """Bound what underflow of coefficients costs: terms * TINY * sum |x| per sample, shape
        (samples, 1).
        """
        if not self.rigorous:
            return np.zeros((1, 1))
        total = sum((sum_up(m.reshape(len(m), -1)) for m in magnitudes), np.ones(1))
        return mul_up(2 * terms * TINY, total)[:, None]

    def lower(self, rows: Array, lo: Array, hi: Array, wobble: Array | float = 0.0) -> Array:
        """Bound `rows . t` from below over all t in [lo - wobble, hi + wobble]: shape (samples,
        rows).

        rows: (samples or 1, rows, *shape); lo, hi, wobble: (samples or 1, *shape). The value is
        `rows^+ . lo + rows^- . hi`; at the rigorous levels lo and hi are first moved outward by 2
        gamma |.|, which exceeds the rounding error of the two products. Numbers below `FLOOR` are
        moved outward to it: products with subnormal numbers are a hundred times slower."""
        flat, terms = rows.reshape(*rows.shape[:2], -1), math.prod(rows.shape[2:])
        if self.rigorous:
            slack = 2 * gamma(terms + 2)
            lo, hi = sub_down(lo, wobble), add_up(hi, wobble)
            lo, hi = sub_down(lo, mul_up(slack, np.abs(lo))), add_up(hi, mul_up(slack, np.abs(hi)))
            lo = np.where(np.abs(lo) < FLOOR, np.where(lo < 0, -FLOOR, 0.0), lo)
            hi = np.where(np.abs(hi) < FLOOR, np.where(hi > 0, FLOOR, 0.0), hi)
        below, above = lo.reshape(len(lo), terms), hi.reshape(len(hi), terms)
        used = np.flatnonzero(((below != 0) | (above != 0)).any(0))
        if len(used) < terms // 2:
            flat, below, above = flat[..., used], below[:, used], above[:, used]
        if lo is hi:
            value: Array = (flat @ below[..., None])[..., 0]
        else:
            value = (
                np.maximum(flat, 0) @ below[..., None] + np.minimum(flat, 0) @ above[..., None]
            )[..., 0]
        # An overflow is undefined, not a bound: rounding down would make a number of infinity.
        return np.where(
            np.isfinite(value),
            sub_down(value, 4 * terms * TINY) if self.rigorous else value,
            np.nan,
        )


def arithmetic(level: str) -> Arithmetic:
    """Return the operations of a level; raises `InputError` on an unknown name, `AssayError`
    where float64 does not round to nearest.
    """
    if level not in LEVELS:
        raise unknown("level", level, LEVELS)
    if level != "float64":
        check_arithmetic()
    return Arithmetic(level)


def executed_sum(terms: int, absolute: Array, largest: float) -> Array:
    """Bound the float32 error of sums of n products in any order: gamma_n sum |a||b|, plus
    underflow and flushing to zero.

    absolute: the real sums of |a||b|; largest: the largest |a| or |b|. Raises `AssayError` where a
    partial sum may overflow float32."""
    check_range(absolute)
    flushed = 2 * terms * SMALL32 * (1 + largest)
    return add_up(mul_up(gamma(terms, UNIT32), absolute), flushed)


def check_range(magnitude: Array) -> None:
    """Raise `AssayError` unless float32 can form numbers of this magnitude, with room for their
    rounding errors.
    """
    if not np.all(magnitude < LARGEST32):
        raise AssayError(
            "level float32: a number or a partial sum may exceed float32; scale the weights or the"
            " inputs down"
        )
