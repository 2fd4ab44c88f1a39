"""Regions of inputs: boxes, and boxes cut by a Euclidean ball."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from assay.bounds.graph import Graph, as_array
from assay.bounds.levels import Arithmetic
from assay.bounds.rounding import TINY, Array, Interval, add_up, gamma, mul_up, sqrt_up, sub_down
from assay.errors import InputError


@dataclass(frozen=True)
class Ball(Interval):
    """A box, of which only the points within a Euclidean distance of the centre count.

    centre: (samples, *shape); radius: (samples,).
    """

    centre: Array
    radii: Array

    def __getitem__(self, index: Any) -> Ball:
        return Ball(self.lo[index], self.hi[index], self.centre[index], self.radii[index])


def ball(
    centre: Any,
    radius: ArrayLike,
    domain: tuple[float, float] | None = None,
    norm: float = math.inf,
) -> Interval:
    """Return the region |x - centre| <= radius, rounded outward and cut to the domain.

    centre: (samples, *shape); radius: a number, or one per sample; norm: infinity (a box) or 2,
    which linear bounds use and interval bounds replace by the box around it. Raises `InputError` on
    negative or non-finite radii and on other norms."""
    x, r = as_array("centre", centre), np.asarray(radius, np.float64)
    if x.ndim == 0 or r.shape not in ((), x.shape[:1]):
        raise InputError(
            f"radius: one number, or one per sample, is needed, got shape {r.shape} for centres of"
            f" shape {x.shape}"
        )
    if not np.all(np.isfinite(r) & (r >= 0)):
        raise InputError(f"radius: finite numbers >= 0 are needed, got {r}")
    if norm not in (2, math.inf):
        raise InputError(f"norm: 2 or infinity is needed, got {norm}")
    r = np.broadcast_to(r, x.shape[:1])
    reach = r.reshape(-1, *(1,) * (x.ndim - 1))
    lo, hi = np.where(reach > 0, sub_down(x, reach), x), np.where(reach > 0, add_up(x, reach), x)
    if domain is not None:
        if np.any(x < domain[0]) or np.any(x > domain[1]):
            raise InputError(f"centre has entries outside the domain [{domain[0]}, {domain[1]}]")
        lo, hi = np.maximum(lo, domain[0]), np.minimum(hi, domain[1])
    return Ball(lo, hi, x, r) if norm == 2 else Interval(lo, hi)


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


def check_boxes(graph: Graph, boxes: Interval | Sequence[Interval]) -> list[Interval]:
    """Return one box per input with a shared sample axis; raises `InputError` otherwise."""
    boxes = [boxes] if isinstance(boxes, Interval) else list(boxes)
    inputs = graph.inputs
    if not inputs or len(graph.nodes) == len(inputs):
        raise InputError("the graph needs an input and at least one operation")
    if len(boxes) != len(inputs):
        raise InputError(f"boxes: {len(inputs)} are needed, one per input, got {len(boxes)}")
    for ref, box in zip(inputs, boxes, strict=True):
        lo, hi = as_array("box", box.lo), as_array("box", box.hi)
        if (
            lo.shape != hi.shape
            or lo.shape[1:] != graph.nodes[ref].shape
            or lo.shape[:1] != boxes[0].lo.shape[:1]
            or len(lo) == 0
        ):
            raise InputError(
                f"box: shape (samples, {graph.nodes[ref].shape}) is needed, got {lo.shape} and"
                f" {hi.shape}"
            )
        if np.any(lo > hi):
            raise InputError("box: a lower end exceeds its upper end")
    return boxes
