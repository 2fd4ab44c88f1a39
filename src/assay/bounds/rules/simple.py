"""Sums and quotients with constants, and constants that are known up to an interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.bounds.levels import Arithmetic, executed_sum
from assay.bounds.numbers import constant
from assay.bounds.operations import Affine, Carried, Operation, Shape, check_float32, fits, largest
from assay.bounds.rounding import (
    Array,
    Interval,
    add_down,
    add_up,
    div_up,
    mul_up,
    sub_down,
    sum_down,
    sum_up,
)
from assay.errors import InputError


@dataclass(frozen=True, eq=False)
class Enclosed(Operation):
    """A constant, known up to the interval [lo, hi] of its own shape; it has no parents."""

    lo: Array
    hi: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "lo", constant("constant", self.lo))
        object.__setattr__(self, "hi", constant("constant", self.hi))
        if self.lo.shape != self.hi.shape or np.any(self.lo > self.hi):
            raise InputError("a constant's lower end exceeds its upper end, or has another shape")

    def shape(self, *parents: Shape) -> Shape:
        return self.lo.shape

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return Interval(self.lo[None], self.hi[None])

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        return [], ar.lower(rows, self.lo[None], self.hi[None], error)

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        return 0.0


@dataclass(frozen=True, eq=False)
class Shift(Operation):
    """`x + b`, elementwise, b broadcast to the shape of x; the ends stay exact where the sums
    are.
    """

    bias: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "bias", constant("shift", self.bias))

    def shape(self, *parents: Shape) -> Shape:
        if not fits(self.bias, parents[0]):
            raise InputError(f"shift: {self.bias.shape} does not fit shape {parents[0]}")
        return parents[0]

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        lo, hi = xs[0].lo + self.bias, xs[0].hi + self.bias
        if not ar.rigorous:
            return Interval(lo, hi)
        return Interval(
            np.where(_exact(xs[0].lo, self.bias, lo), lo, add_down(xs[0].lo, self.bias)),
            np.where(_exact(xs[0].hi, self.bias, hi), hi, add_up(xs[0].hi, self.bias)),
        )

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        bias = np.broadcast_to(self.bias, (1, *rows.shape[2:]))
        return [rows], ar.lower(rows, bias, bias, error)

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        check_float32(self.bias)
        return executed_sum(1, value.magnitude(), 0.0)


def _exact(a: Array, b: Array, total: Array) -> Array:
    """Return where `a + b` is `total` without rounding: the error of a sum is itself a float64
    (Knuth's TwoSum).
    """
    with np.errstate(all="ignore"):
        part = total - a
        return ((a - (total - part)) + (b - part) == 0) & np.isfinite(total)


@dataclass(frozen=True, eq=False)
class Divide(Operation):
    """`x / c`, elementwise, c broadcast to the shape of x and never zero."""

    divisor: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "divisor", constant("divisor", self.divisor))
        if np.any(self.divisor == 0):
            raise InputError("division by a constant of zero has no bound")

    def shape(self, *parents: Shape) -> Shape:
        if not fits(self.divisor, parents[0]):
            raise InputError(f"divide: {self.divisor.shape} does not fit shape {parents[0]}")
        return parents[0]

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return xs[0] / self.divisor

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        magnitude = xs[0].magnitude()
        wobble = add_up(error, mul_up(ar.gamma(1), div_up(magnitude, np.abs(self.divisor))))
        zero = np.zeros((1, *rows.shape[2:]))
        return [rows / self.divisor], sub_down(
            ar.lower(rows, zero, zero, wobble), ar.tail(1, magnitude)
        )

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        check_float32(self.divisor)
        # Division, or multiplication with a rounded reciprocal.
        return executed_sum(3, value.magnitude(), largest(value.magnitude()))


class Total(Affine):
    """The sum along the last axis, which stays; its ends are the sums of the ends, so that a sum of
    positive numbers stays positive.
    """

    def __init__(self, count: int) -> None:
        super().__init__(np.ones((1, count)), np.zeros(1))

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        lo, hi = xs[0].lo, xs[0].hi
        if not ar.rigorous:
            return Interval(lo.sum(-1, keepdims=True), hi.sum(-1, keepdims=True))
        return Interval(sum_down(lo)[..., None], sum_up(hi)[..., None])
