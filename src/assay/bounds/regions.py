"""Regions of inputs: boxes, and boxes cut by a Euclidean ball."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.bounds.graph import Graph
from assay.bounds.levels import UNIT32, Arithmetic
from assay.bounds.numbers import Array, as_array, exactly, outward
from assay.bounds.rounding import (
    TINY,
    Interval,
    add_up,
    gamma,
    mul_up,
    sqrt_up,
    sub_down,
    sum_up,
)
from assay.errors import AssayError, InputError

_LARGEST = float(np.finfo(np.float32).max)
_LEAST = 2.0**-149  # smallest positive float32


@dataclass(frozen=True)
class Ball(Interval):
    """A box, of which only the points within a Euclidean distance of the centre count.

    centre: (samples, *shape), inside the box; radii: (samples,). Raises `InputError` for negative
    or non-finite radii, and for a centre that does not fit the box."""

    centre: Array
    radii: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "centre", as_array("centre", self.centre))
        object.__setattr__(self, "radii", _checked_radii(self.radii))
        shape = self.centre.shape
        if self.shape != shape or not shape or self.radii.shape != shape[:1]:
            raise InputError(
                f"ball: a box of shape {self.shape}, a centre of shape {shape} and radii of shape"
                f" {self.radii.shape} do not fit; one radius per sample is needed"
            )
        if not np.all((self.lo <= self.centre) & (self.centre <= self.hi)):
            raise InputError("ball: the centre must lie inside the box")

    def __getitem__(self, index: Any) -> Ball:
        return Ball(self.lo[index], self.hi[index], self.centre[index], self.radii[index])


def ball(
    centre: Any,
    radius: Any,
    domain: tuple[float, float] | None = None,
    norm: float = math.inf,
) -> Interval:
    """Return the region |x - centre| <= radius, rounded outward and cut to the domain.

    centre: (samples, *shape), copied; radius: a number, or one per sample; norm: infinity (a box)
    or 2, which linear bounds use and interval bounds replace by the box around it. Raises
    `InputError` on negative or non-finite radii, on a centre outside the domain and on other
    norms."""
    x, r = as_array("centre", centre, copy=True), _checked_radii(radius)
    if x.ndim == 0 or r.shape not in ((), x.shape[:1]):
        raise InputError(
            f"radius: one number, or one per sample, is needed, got shape {r.shape} for centres of"
            f" shape {x.shape}"
        )
    if norm not in (2, math.inf):
        raise InputError(f"norm: 2 or infinity is needed, got {norm}")
    r = np.broadcast_to(r, x.shape[:1])
    reach = r.reshape(-1, *(1,) * (x.ndim - 1))
    lo, hi = np.where(reach > 0, sub_down(x, reach), x), np.where(reach > 0, add_up(x, reach), x)
    if domain is not None:
        low, high = _checked_domain(domain)
        if np.any(x < low) or np.any(x > high):
            raise InputError(f"centre has entries outside the domain [{low}, {high}]")
        lo, hi = np.maximum(lo, low), np.minimum(hi, high)
    return Ball(lo, hi, x, r.copy()) if norm == 2 else Interval(lo, hi)


def _checked_radii(radius: Any) -> Array:
    r = outward(radius, math.inf, "radius")
    if not np.all(np.isfinite(r) & (r >= 0)):
        raise InputError(f"radius: finite numbers >= 0 are needed, got {r}")
    return r


def _checked_domain(domain: tuple[float, float]) -> tuple[float, float]:
    ends = exactly(domain, "domain")
    if ends.shape != (2,) or not ends[0] <= ends[1]:
        raise InputError(f"domain: two ends, the lower one first, are needed, got {domain}")
    return float(ends[0]), float(ends[1])


def least(rows: Array, region: Interval, ar: Arithmetic) -> Array:
    """Bound `rows . x` from below over a region: (samples, rows). On a ball, `rows . centre -
    radius |rows|_2` where that is better.
    """
    box = ar.lower(rows, region.lo, region.hi)
    if not isinstance(region, Ball):
        return box
    flat = rows.reshape(*rows.shape[:2], -1)
    squares = np.square(flat).sum(-1)
    if ar.rigorous:  # a sum of non-negative terms, each of which may underflow
        terms = flat.shape[-1]
        squares = add_up(mul_up(squares, 1 + 2 * gamma(terms)), 2 * terms * TINY)
    cost = mul_up(region.radii[:, None], sqrt_up(squares))
    return np.fmax(box, sub_down(ar.lower(rows, region.centre, region.centre), cost))


def check_boxes(
    graph: Graph, boxes: Interval | Sequence[Interval], ar: Arithmetic
) -> list[Interval]:
    """Return one region per input with a shared sample axis, copied, as the level executes it;
    raises `InputError` otherwise.
    """
    given = [boxes] if isinstance(boxes, Interval) else list(boxes)
    inputs = graph.inputs
    if not inputs or len(graph.nodes) == len(inputs):
        raise InputError("the graph needs an input and at least one operation")
    if len(given) != len(inputs):
        raise InputError(f"boxes: {len(inputs)} are needed, one per input, got {len(given)}")
    checked = [_copied(box) for box in given]
    for ref, box in zip(inputs, checked, strict=True):
        if (
            box.lo.shape != box.hi.shape
            or box.lo.shape[1:] != graph.nodes[ref].shape
            or box.lo.shape[:1] != checked[0].lo.shape[:1]
            or len(box.lo) == 0
        ):
            raise InputError(
                f"box: shape (samples, {graph.nodes[ref].shape}) is needed, got {box.lo.shape} and"
                f" {box.hi.shape}"
            )
        if np.any(box.lo > box.hi):
            raise InputError("box: a lower end exceeds its upper end")
    return [_executed(box) for box in checked] if ar.executed else checked


def _copied(box: Interval) -> Interval:
    if not isinstance(box, Interval):
        raise InputError(
            f"box: an Interval, such as `ball` returns, is needed, got {type(box).__name__}"
        )
    lo, hi = as_array("box", box.lo, copy=True), as_array("box", box.hi, copy=True)
    if lo.ndim == 0:
        raise InputError("box: a sample axis is needed, got a single number")
    if not isinstance(box, Ball):
        return Interval(lo, hi)
    return Ball(lo, hi, box.centre.copy(), box.radii.copy())


def _executed(box: Interval) -> Interval:
    """Return the region of the inputs of a box after they are rounded to float32."""
    if np.any(box.magnitude() > _LARGEST):
        raise AssayError("level float32: the region holds numbers beyond float32")
    lo, hi = _narrow(box.lo, -np.inf), _narrow(box.hi, np.inf)
    if not isinstance(box, Ball):
        return Interval(lo, hi)
    # A coordinate moves by half a unit in the last place at most; one that cannot vary moves not.
    moved = np.where(lo < hi, add_up(mul_up(UNIT32, box.magnitude()), _LEAST), 0.0)
    squares = mul_up(moved, moved).reshape(len(lo), -1)
    grown = add_up(box.radii, sqrt_up(sum_up(squares)))
    return Ball(
        lo, hi, box.centre, np.where((lo < hi).reshape(len(lo), -1).any(1), grown, box.radii)
    )


def _narrow(x: Array, direction: float) -> Array:
    """Return the nearest float32 numbers at or beyond x in a direction, as float64."""
    near = x.astype(np.float32)
    beyond = near < x if direction > 0 else near > x
    with np.errstate(over="ignore"):
        stepped = np.nextafter(near, np.float32(direction))
    return np.where(beyond, stepped, near).astype(np.float64)
