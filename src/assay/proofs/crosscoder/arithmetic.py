"""One code for two levels: float64 (a search, nothing is proved) and real (outward rounding).

At level "float64" numbers are arrays, at level "real" they are `Interval`s that contain the real
number; the operators `+ - *` are those of either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np

from assay.bounds import exact, rounding
from assay.bounds.rounding import Interval
from assay.errors import InputError, unknown
from assay.proofs.max_of_k import operations

Array = np.ndarray[Any, Any]

Number = Any
"""An array at level float64, an `Interval` at level real."""

Level = Literal["float64", "real"]


class Arithmetic(Protocol):
    """What the two levels share; `low` and `high` are float arrays that enclose the number."""

    level: Level

    def exact(self, x: Array) -> Number: ...

    def matmul(self, a: Number, b: Number) -> Number: ...

    def combine(self, codes: Array, table: Number) -> Number:
        """Return `codes table`, a sum over the features that are active in every row."""

    def relu(self, x: Number) -> Number: ...

    def minimum(self, a: Number, b: Number) -> Number: ...

    def absolute(self, x: Number) -> Number: ...

    def norm(self, x: Number, axis: int = -1) -> Number: ...

    def exp(self, x: Number) -> Number: ...

    def low(self, x: Number) -> Array: ...

    def high(self, x: Number) -> Array: ...

    def up(self, x: Array) -> Array: ...

    def transpose(self, x: Number) -> Number: ...


class Floats:
    """Level float64."""

    level: Level = "float64"

    def exact(self, x: Array) -> Array:
        return x

    def matmul(self, a: Array, b: Array) -> Array:
        return a @ b

    def combine(self, codes: Array, table: Array) -> Array:
        if not isinstance(codes, operations.Counted):
            return codes @ table
        plain, other = np.asarray(codes), np.asarray(table)
        outputs = len(codes) * other.shape[1]
        operations.charge(max(2 * int((plain != 0).sum()) * other.shape[1] - outputs, 0))
        return operations.counting(plain @ other)

    def relu(self, x: Array) -> Array:
        return np.maximum(x, 0.0)

    def minimum(self, a: Array, b: Array) -> Array:
        return np.minimum(a, b)

    def absolute(self, x: Array) -> Array:
        return np.abs(x)

    def norm(self, x: Array, axis: int = -1) -> Array:
        return np.sqrt((x * x).sum(axis))

    def exp(self, x: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.exp(x)

    def low(self, x: Array) -> Array:
        return x

    def high(self, x: Array) -> Array:
        return x

    def up(self, x: Array) -> Array:
        return x

    def transpose(self, x: Array) -> Array:
        return x.swapaxes(-1, -2)


class Reals:
    """Level real: intervals, each operation rounded outward."""

    level: Level = "real"

    def exact(self, x: Array) -> Interval:
        return Interval.exactly(x)

    def matmul(self, a: Interval, b: Interval) -> Interval:
        """Enclose `a b`: the product of midpoints, its rounding error, and what the radii add."""
        middle, other = a.midpoint(), b.midpoint()
        r, s = a.radius(), b.radius()
        found = rounding.dot_interval(middle, other)
        reach = rounding.add_up(np.abs(other), s)
        spread = rounding.add_up(rounding.dot_up(np.abs(middle), s), rounding.dot_up(r, reach))
        return Interval(rounding.sub_down(found.lo, spread), rounding.add_up(found.hi, spread))

    def combine(self, codes: Array, table: Interval) -> Interval:
        return self.matmul(self.exact(codes), table)

    def relu(self, x: Interval) -> Interval:
        return Interval(np.maximum(x.lo, 0.0), np.maximum(x.hi, 0.0))

    def minimum(self, a: Interval, b: Interval) -> Interval:
        return Interval(np.minimum(a.lo, b.lo), np.minimum(a.hi, b.hi))

    def absolute(self, x: Interval) -> Interval:
        least = np.maximum(np.maximum(x.lo, -x.hi), 0.0)
        return Interval(least, x.magnitude())

    def norm(self, x: Interval, axis: int = -1) -> Interval:
        size = self.absolute(x)
        square = (size * size).sum(axis)
        return Interval(rounding.sqrt_down(np.maximum(square.lo, 0.0)), rounding.sqrt_up(square.hi))

    def exp(self, x: Interval) -> Interval:
        return exact.exp_interval(x.lo, x.hi)

    def low(self, x: Interval) -> Array:
        return x.lo

    def high(self, x: Interval) -> Array:
        return x.hi

    def up(self, x: Array) -> Array:
        return rounding.up(x)

    def transpose(self, x: Interval) -> Interval:
        return Interval(x.lo.swapaxes(-1, -2), x.hi.swapaxes(-1, -2))


def pairs(ar: Arithmetic, codes: Array, table: Number) -> Number:
    """Return `z^T Q z` for every row z, a sum over pairs of features that are active."""
    if not isinstance(codes, operations.Counted):
        return (ar.exact(codes) * ar.combine(codes, table)).sum(1)
    plain, entries = np.asarray(codes), np.asarray(table)
    active = (plain != 0).sum(1)
    operations.charge(int((2 * active * active + active - 1).sum()))
    return operations.counting((plain * (plain @ entries)).sum(1))


_LEVELS: dict[str, Callable[[], Arithmetic]] = {"float64": Floats, "real": Reals}


def arithmetic(level: str) -> Arithmetic:
    """Return the arithmetic of a level; InputError for another name.

    Raises AssayError where float64 does not round to nearest, on which level real rests."""
    if level == "float32":
        raise InputError("crosscoder proofs hold at level real, not float32; use level='real'")
    if level not in _LEVELS:
        raise unknown("level", level, _LEVELS)
    if level == "real":
        rounding.check_arithmetic()
    return _LEVELS[level]()
