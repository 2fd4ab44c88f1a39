"""Bounds of a graph over regions of inputs: intervals (arXiv 1810.12715) and CROWN's linear
bounds (arXiv 1811.00866).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.bounds.engine import OVERFLOW, carry, lower, ordered, propagate, tighten
from assay.bounds.graph import Graph
from assay.bounds.levels import ULPS, Arithmetic, arithmetic
from assay.bounds.numbers import as_array
from assay.bounds.regions import check_boxes
from assay.bounds.rounding import Array, Interval
from assay.errors import AssayError, InputError, unknown
from assay.progress import progress

METHODS = ("interval", "crown")
CHUNK = 2**18  # numbers in one carried matrix: fits a second-level cache


@dataclass(frozen=True)
class Bounds:
    """Proved ends of a quantity, per sample: not an estimate; level says of which network,
    assumptions under what else.
    """

    lower: Array
    upper: Array
    level: str
    assumptions: tuple[str, ...] = ()

    @property
    def width(self) -> Array:
        """The difference of the ends."""
        return self.upper - self.lower

    def contain(self, values: Any) -> bool:
        """Return whether every value lies between the ends."""
        v = as_array("values", values)
        return bool(np.all(self.lower <= v) and np.all(v <= self.upper))


def bound(
    graph: Graph,
    boxes: Interval | Sequence[Interval],
    *,
    method: str = "crown",
    level: str = "real",
    objective: Any = None,
    chunk: int | None = None,
) -> Bounds:
    """Bound the output of a graph, or linear functions of it, over regions of inputs.

    boxes: one region per input, such as `ball` returns, with ends (samples, *shape). objective:
    optional (rows, *output shape), or with a leading sample axis: the bounds are those of
    `objective . output`, shape (samples, rows). chunk: samples worked on at once. Raises
    `InputError` on regions that do not fit, `AssayError` where float64 overflows or the level does
    not cover an operation."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    ar = arithmetic(level)
    checked = check_boxes(graph, boxes, ar)
    samples = len(checked[0].lo)
    rows = None if objective is None else _check_objective(graph, objective, samples)
    found = []
    with np.errstate(all="ignore"):
        for part in progress(_parts(graph, samples, chunk), "bounds"):
            mine = None if rows is None else rows if len(rows) == 1 else rows[part]
            found.append(_bound(graph, [b[part] for b in checked], method, ar, mine))
    whole = Interval(np.concatenate([f.lo for f in found]), np.concatenate([f.hi for f in found]))
    if not (np.all(np.isfinite(whole.lo)) and np.all(np.isfinite(whole.hi))):
        raise AssayError(OVERFLOW.format("the output"))
    return Bounds(whole.lo, whole.hi, level, assumptions(graph, ar))


@dataclass(frozen=True)
class LinearLower:
    """`objective . output >= sum_input coefficients[input] . input + constant` on the boxes, in
    real arithmetic of the exact floats here.

    coefficients: one array (samples, rows, *input shape) per input; constant: (samples, rows).
    """

    coefficients: tuple[Array, ...]
    constant: Array
    level: str
    assumptions: tuple[str, ...] = ()


def linear_lower(
    graph: Graph,
    boxes: Interval | Sequence[Interval],
    objective: Any,
    *,
    level: str = "real",
    chunk: int | None = None,
) -> LinearLower:
    """Return a linear function of the inputs that bounds `objective . output` from below on the
    boxes (CROWN).

    objective: (rows, *output shape), or with a leading sample axis. A dot product then bounds every
    point of a box. Raises as `bound`."""
    ar = arithmetic(level)
    checked = check_boxes(graph, boxes, ar)
    samples = len(checked[0].lo)
    rows = _check_objective(graph, objective, samples)
    found: list[list[Array]] = []
    with np.errstate(all="ignore"):
        for part in progress(_parts(graph, samples, chunk), "bounds"):
            mine = [b[part] for b in checked]
            known = propagate(graph, mine, ar, refine=True)
            start = {len(graph.nodes) - 1: rows if len(rows) == 1 else rows[part]}
            coefficients, constant = carry(graph, known, start, ar)
            count = len(mine[0].lo)
            shapes = [(count, rows.shape[1], *graph.nodes[ref].shape) for ref in graph.inputs]
            arrays = [
                coefficients.get(ref, np.zeros((1,) * len(s)))
                for ref, s in zip(graph.inputs, shapes, strict=True)
            ]
            found.append(
                [
                    np.broadcast_to(a, s)
                    for a, s in zip(
                        [*arrays, constant], [*shapes, (count, rows.shape[1])], strict=True
                    )
                ]
            )
    *coefficients_found, constant = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    if not all(np.all(np.isfinite(a)) for a in (*coefficients_found, constant)):
        raise AssayError(OVERFLOW.format("the output"))
    return LinearLower(tuple(coefficients_found), constant, level, assumptions(graph, ar))


def _check_objective(graph: Graph, objective: Any, samples: int) -> Array:
    rows, shape = as_array("objective", objective), graph.nodes[-1].shape
    rows = rows if rows.ndim == len(shape) + 2 else rows[None]
    if rows.shape[2:] != shape or rows.shape[0] not in (1, samples) or rows.shape[1] == 0:
        raise InputError(
            f"objective: shape (rows, {shape}) or ({samples}, rows, {shape}) is needed, got"
            f" {np.shape(objective)}"
        )
    return rows


def assumptions(graph: Graph, ar: Arithmetic) -> tuple[str, ...]:
    """Return what a bound of this level takes for granted, beyond IEEE 754 arithmetic."""
    if not ar.rigorous:
        return ("float64 rounding is not covered",)
    taken = [
        "matrix products sum conventionally (any order, fused multiply-add allowed, no Strassen)"
    ]
    if ar.executed:
        taken.append(
            f"exp, erf and reciprocal root in float32 are accurate to {ULPS} units in the last"
            " place"
        )
        taken.append("softmax is executed as exp(x - max x) over its sum")
        taken.append("products are rounded to float32, not to a lower precision (TF32, bfloat16)")
    return tuple(taken)


def _parts(graph: Graph, samples: int, chunk: int | None) -> list[slice]:
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk: at least one sample is needed, got {chunk}")
    widest = max(math.prod(node.shape) for node in graph.nodes)
    step = chunk or max(1, CHUNK // widest**2)
    return [slice(start, start + step) for start in range(0, samples, step)]


def _bound(
    graph: Graph, boxes: list[Interval], method: str, ar: Arithmetic, rows: Array | None
) -> Interval:
    known = propagate(graph, boxes, ar, refine=method == "crown")
    last = len(graph.nodes) - 1
    plain = known.values[last]
    if method == "interval":
        if rows is None:
            return plain
        return Interval(ar.lower(rows, plain.lo, plain.hi), -ar.lower(-rows, plain.lo, plain.hi))
    if rows is None:
        return tighten(graph, known, last, np.arange(math.prod(plain.shape[1:])), ar)
    both = lower(graph, known, {last: np.concatenate([rows, -rows], 1)}, ar)
    count = rows.shape[1]
    return ordered(Interval(both[:, :count], -both[:, count:]), ar)
