"""Slopes of relaxations as numbers that a search may choose: any of them is sound.

A slope array is what an operation's `relax_at` takes: slopes of lines below and above for functions
of one number, slopes (p, q) of planes below and above for products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from assay.bounds.graph import Ref
from assay.bounds.levels import Arithmetic
from assay.bounds.nonlinear import InverseRoot, Relu, Square
from assay.bounds.operations import Operation
from assay.bounds.relaxations import Lines, inverse_root, relu_lines, tangent_offset
from assay.bounds.rounding import Array, Interval
from assay.bounds.rules import Choice, Contract, Product, Smooth

Slopes = Mapping[Ref, tuple[Array, ...]]


def relax(
    operation: Operation, xs: list[Interval], slopes: tuple[Array, ...] | None, ar: Arithmetic
) -> Any:
    """Return the relaxation of an operation at the given slopes, or its own."""
    if slopes is None:
        return operation.relax(xs, ar)
    match operation:
        case Product() | Contract() | Smooth() | Choice():
            return operation.relax_at(xs, slopes, ar)
        case Relu():
            return relu_at(xs[0], slopes[0])
        case Square():
            return square_at(xs[0], slopes[0])
        case InverseRoot():
            return inverse_root_at(xs[0], operation, slopes[0])
        case _:
            return operation.relax(xs, ar)


def relu_at(x: Interval, below: Array) -> Lines:
    """Bound ReLU: the chord above; below, a line through zero of any slope in [0, 1]."""
    usual = relu_lines(x)
    unstable = (x.lo < 0) & (x.hi > 0)
    slope = np.where(unstable, np.clip(below, 0.0, 1.0), usual.below_slope)
    return Lines(slope, usual.below, usual.above_slope, usual.above)


def square_at(x: Interval, slope: Array) -> Lines:
    """Bound x^2: a tangent below, `x^2 >= s x - s^2 / 4` for every s; the chord above."""
    half = Interval.exactly(0.5 * slope)
    chord = x.lo + x.hi
    ends = [Interval.exactly(end) * end - Interval.exactly(chord) * end for end in (x.lo, x.hi)]
    return Lines(slope, -(half * half).hi, chord, np.maximum(ends[0].hi, ends[1].hi))


def inverse_root_at(x: Interval, operation: InverseRoot, point: Array) -> Lines:
    """Bound the convex `(scale x + shift)^(-1/2)`: the tangent at a point below, the chord
    above.
    """
    usual = operation.lines(x, None)  # type: ignore[arg-type]
    t = np.clip(point, x.lo, x.hi)
    at = inverse_root(Interval.exactly(t), operation.scale, operation.shift)
    derivative = at * at * at * operation.scale * -0.5
    slope = derivative.midpoint()
    below = tangent_offset(x, t, at, derivative, slope).lo
    return Lines(slope, below, usual.above_slope, usual.above)
