"""The operations of a graph: real range, one backward step of a linear bound, and the float32 error
of executing it.

`backward(rows, xs, relaxed, error, ar)` takes rows A (samples or 1, rows, *output shape) and
intervals xs of the parents. It returns the coefficients of the parents and a constant c with
`A.(op(x) + e) >= sum_p A_p.x_p + c` in real arithmetic, for all x in xs and |e| <= error. A
rounding error of a coefficient costs |error| |x|, which is charged to c through `wobble`, an
uncertainty of each output unit."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.bounds.levels import Arithmetic, executed_sum
from assay.bounds.numbers import constant
from assay.bounds.rounding import Array, Interval, add_up, mul_up, sub_down
from assay.errors import AssayError, InputError

Shape = tuple[int, ...]
Carried = tuple[
    list[Array | None], Array
]  # coefficients per parent (none where it has no part) and the constant


class Operation(ABC):
    """One operation; `nonlinear` ones are bounded better when the intervals of their parents are
    tight.
    """

    nonlinear = False

    @abstractmethod
    def shape(self, *parents: Shape) -> Shape:
        """Return the output shape of one sample; raises `InputError` when the parents do not
        fit.
        """

    @abstractmethod
    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        """Enclose the real result."""

    def relax(self, xs: list[Interval], ar: Arithmetic) -> Any:
        """Return what `backward` needs to know of the operation on these intervals, worked out
        once for all rows.
        """
        return None

    @abstractmethod
    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        """Carry a lower bound of `rows . output` to the parents."""

    @abstractmethod
    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        """Bound the float32 error of executing the operation on numbers in xs."""

    def undecided(self, x: Interval) -> NDArray[np.bool_]:
        """Return where a tighter interval of the input may tighten the result."""
        return x.hi > x.lo

    def select(
        self,
        units: NDArray[np.intp],
        signs: Array,
        xs: list[Interval],
        relaxed: Any,
        error: Array | float,
        ar: Arithmetic,
    ) -> Carried:
        """Carry the bounds of single output units, `sign * output[unit]`, to the parents."""
        shape = self.shape(*(x.shape[1:] for x in xs))
        rows = np.zeros((1, len(units), math.prod(shape)))
        rows[0, np.arange(len(units)), units] = signs
        return self.backward(rows.reshape(1, len(units), *shape), xs, relaxed, error, ar)


@dataclass(frozen=True)
class Affine(Operation):
    """`x W^T + b` along the last axis; weight (out, in) and bias (out,) are copied."""

    weight: Array
    bias: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", constant("linear weight", self.weight))
        object.__setattr__(self, "bias", constant("linear bias", self.bias))

    @cached_property
    def absolute(self) -> Array:
        """The entrywise absolute weight."""
        return np.abs(self.weight)

    def shape(self, *parents: Shape) -> Shape:
        if parents[0][-1] != self.weight.shape[1]:
            raise InputError(
                f"linear: weight {self.weight.shape} does not fit an input of shape {parents[0]}"
            )
        return (*parents[0][:-1], self.weight.shape[0])

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        spread = ar.dot_up(xs[0].radius(), self.absolute.T)
        return ar.dot(xs[0].midpoint(), self.weight.T) + Interval(-spread, spread) + self.bias

    def _wobble(self, xs: list[Interval], error: Array | float, ar: Arithmetic) -> Array | float:
        if not ar.rigorous:
            return error
        total = ar.dot_up(xs[0].magnitude(), self.absolute.T)
        return add_up(error, mul_up(ar.gamma(len(self.weight) + 1), total))

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        shape = (*rows.shape[:-1], self.weight.shape[1])
        carried = (rows.reshape(-1, rows.shape[-1]) @ self.weight).reshape(shape)
        bias = np.broadcast_to(self.bias, (1, *rows.shape[2:]))
        constant = ar.lower(rows, bias, bias, self._wobble(xs, error, ar))
        return [carried], sub_down(constant, ar.tail(len(self.weight), xs[0].magnitude()))

    def select(
        self,
        units: NDArray[np.intp],
        signs: Array,
        xs: list[Interval],
        relaxed: Any,
        error: Array | float,
        ar: Arithmetic,
    ) -> Carried:
        if len(xs[0].shape) > 2:
            return super().select(units, signs, xs, relaxed, error, ar)
        constant = (signs * self.bias[units])[None]
        if not isinstance(error, float):
            constant = sub_down(constant, error[:, units])
        elif error:
            constant = sub_down(constant, error)
        return [(signs[:, None] * self.weight[units])[None]], constant

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        check_float32(self.weight, self.bias)
        x = xs[0].magnitude()
        absolute = add_up(Arithmetic("real").dot_up(x, self.absolute.T), np.abs(self.bias))
        return executed_sum(
            self.weight.shape[1] + 1, absolute, max(largest(x), largest(self.weight))
        )


@dataclass(frozen=True)
class Scale(Operation):
    """`w x + b`, elementwise, w and b copied; `terms` roundings at level float32, or none that
    can be bounded, for the given reason.
    """

    weight: Array
    bias: Array
    terms: int = 2
    unbounded: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", constant("scale weight", self.weight))
        object.__setattr__(self, "bias", constant("scale bias", self.bias))

    def shape(self, *parents: Shape) -> Shape:
        if not (fits(self.weight, parents[0]) and fits(self.bias, parents[0])):
            raise InputError(
                f"scale: weight {self.weight.shape} and bias {self.bias.shape} do not fit shape"
                f" {parents[0]}"
            )
        return parents[0]

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return xs[0] * self.weight + self.bias

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        magnitude = xs[0].magnitude()
        wobble = add_up(error, mul_up(ar.gamma(1), mul_up(np.abs(self.weight), magnitude)))
        bias = np.broadcast_to(self.bias, (1, *rows.shape[2:]))
        return [rows * self.weight], sub_down(
            ar.lower(rows, bias, bias, wobble), ar.tail(1, magnitude)
        )

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        if self.unbounded:
            raise AssayError(self.unbounded)
        check_float32(self.weight, self.bias)
        x = xs[0].magnitude()
        absolute = add_up(mul_up(np.abs(self.weight), x), np.abs(self.bias))
        # 2^30 covers what an underflow before a division by a norm, at least 2^-30, can grow to.
        return executed_sum(
            self.terms,
            absolute,
            max(largest(x), largest(self.weight), 2.0**30 if self.terms > 2 else 0.0),
        )


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

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        zero = np.zeros((1, *rows.shape[2:]))
        constant = (
            np.zeros((1, 1))
            if isinstance(error, float) and error == 0
            else ar.lower(rows, zero, zero, error)
        )
        return [rows, self.sign * rows], constant

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        return executed_sum(1, value.magnitude(), 0.0)


@dataclass(frozen=True)
class Rearrange(Operation):
    """A permutation of the axes of one sample (none: keep them), then a new shape."""

    axes: tuple[int, ...]
    target: Shape

    def shape(self, *parents: Shape) -> Shape:
        if sorted(self.axes) != list(range(len(parents[0]))) or math.prod(self.target) != math.prod(
            parents[0]
        ):
            raise InputError(
                f"rearrange: axes {self.axes} and shape {self.target} do not fit {parents[0]}"
            )
        return self.target

    def _apply(self, x: Array) -> Array:
        return x.transpose(0, *(a + 1 for a in self.axes)).reshape(len(x), *self.target)

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        return Interval(self._apply(xs[0].lo), self._apply(xs[0].hi))

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        permuted = [xs[0].shape[1:][a] for a in self.axes]
        back = np.argsort(self.axes)
        return [rows.reshape(*rows.shape[:2], *permuted).transpose(0, 1, *(back + 2))], np.zeros(
            (1, 1)
        )

    def error(self, xs: list[Interval], value: Interval) -> Array | float:
        return 0.0


def largest(x: Array) -> float:
    """Return the largest absolute entry."""
    return float(np.max(np.abs(x), initial=0.0))


def fits(constant: Array, shape: Shape) -> bool:
    """Return whether a constant broadcasts to a shape."""
    pairs = zip(constant.shape[::-1], shape[::-1], strict=False)
    return constant.ndim <= len(shape) and all(a in (1, b) for a, b in pairs)


def check_float32(*constants: Array) -> None:
    """Raise `AssayError` unless every constant is a float32 number."""
    for values in constants:
        with np.errstate(over="ignore", under="ignore"):
            same = np.array_equal(values.astype(np.float32).astype(np.float64), values)
        if not same:
            raise AssayError(
                "level float32: a weight is not a float32 number, so that a float32 network cannot"
                " hold it; round the weights first"
            )
