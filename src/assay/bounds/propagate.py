"""Bounds of a graph over boxes of inputs: intervals forward (arXiv 1810.12715), linear bounds backward (CROWN, arXiv 1811.00866)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.bounds.graph import Graph, Ref, as_array
from assay.bounds.levels import ULPS, Arithmetic, arithmetic
from assay.bounds.rounding import Array, Interval, add_down, add_up, mul_up, sub_down
from assay.errors import AssayError, InputError, unknown

METHODS = ("interval", "crown")
CHUNK = 2**18  # numbers in one carried matrix: fits a second-level cache
_OVERFLOW = "{} has no finite bound in float64: the values overflow; scale the weights or the inputs down"


@dataclass(frozen=True)
class Bounds:
    """Proved ends of a quantity, per sample: not an estimate; level says of which network, assumptions under what else."""

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


def ball(centre: Any, radius: float, domain: tuple[float, float] | None = None) -> Interval:
    """Return the box |x - centre| <= radius, rounded outward and cut to the domain; centre (samples, *shape).

    Raises `InputError` on a negative or non-finite radius.
    """
    if not (math.isfinite(radius) and radius >= 0):
        raise InputError(f"radius: a finite number >= 0 is needed, got {radius}")
    x = as_array("centre", centre)
    box = Interval(x, x) if radius == 0 else Interval(sub_down(x, radius), add_up(x, radius))
    if domain is None:
        return box
    if np.any(x < domain[0]) or np.any(x > domain[1]):
        raise InputError(f"centre has entries outside the domain [{domain[0]}, {domain[1]}]")
    return Interval(np.maximum(box.lo, domain[0]), np.minimum(box.hi, domain[1]))


def bound(
    graph: Graph,
    boxes: Interval | Sequence[Interval],
    *,
    method: str = "crown",
    level: str = "real",
    objective: Any = None,
    chunk: int | None = None,
) -> Bounds:
    """Bound the output of a graph, or linear functions of it, over boxes of inputs.

    boxes: one `Interval` per input, ends (samples, *shape). objective: optional (rows, *output shape), or with a leading sample
    axis: the bounds are those of `objective . output`, shape (samples, rows). chunk: samples worked on at once. Raises
    `InputError` on boxes that do not fit, `AssayError` where float64 overflows or the level does not cover an operation.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    ar, checked = arithmetic(level), check_boxes(graph, boxes)
    samples = len(checked[0].lo)
    rows = None if objective is None else _check_objective(graph, objective, samples)
    found = []
    with np.errstate(all="ignore"):
        for part in _parts(graph, samples, chunk):
            mine = None if rows is None else rows if len(rows) == 1 else rows[part]
            found.append(_bound(graph, [Interval(b.lo[part], b.hi[part]) for b in checked], method, ar, mine))
    whole = Interval(np.concatenate([f.lo for f in found]), np.concatenate([f.hi for f in found]))
    if not (np.all(np.isfinite(whole.lo)) and np.all(np.isfinite(whole.hi))):
        raise AssayError(_OVERFLOW.format("the output"))
    return Bounds(whole.lo, whole.hi, level, assumptions(graph, ar))


@dataclass(frozen=True)
class LinearLower:
    """`objective . output >= sum_input coefficients[input] . input + constant` on the boxes, in real arithmetic of the exact floats here.

    coefficients: one array (samples, rows, *input shape) per input; constant: (samples, rows).
    """

    coefficients: tuple[Array, ...]
    constant: Array
    level: str
    assumptions: tuple[str, ...] = ()


def linear_lower(
    graph: Graph, boxes: Interval | Sequence[Interval], objective: Any, *, level: str = "real", chunk: int | None = None
) -> LinearLower:
    """Return a linear function of the inputs that bounds `objective . output` from below on the boxes (CROWN).

    objective: (rows, *output shape), or with a leading sample axis. A dot product then bounds every point of a box. Raises as `bound`.
    """
    ar, checked = arithmetic(level), check_boxes(graph, boxes)
    samples = len(checked[0].lo)
    rows = _check_objective(graph, objective, samples)
    found: list[list[Array]] = []
    with np.errstate(all="ignore"):
        for part in _parts(graph, samples, chunk):
            mine = [Interval(b.lo[part], b.hi[part]) for b in checked]
            known = propagate(graph, mine, ar, refine=True)
            start = {len(graph.nodes) - 1: rows if len(rows) == 1 else rows[part]}
            coefficients, constant = carry(graph, known, start, ar)
            count = len(mine[0].lo)
            shapes = [(count, rows.shape[1], *graph.nodes[ref].shape) for ref in graph.inputs]
            arrays = [coefficients.get(ref, np.zeros((1,) * len(s))) for ref, s in zip(graph.inputs, shapes, strict=True)]
            found.append([np.broadcast_to(a, s) for a, s in zip([*arrays, constant], [*shapes, (count, rows.shape[1])], strict=True)])
    *coefficients_found, constant = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    if not all(np.all(np.isfinite(a)) for a in (*coefficients_found, constant)):
        raise AssayError(_OVERFLOW.format("the output"))
    return LinearLower(tuple(coefficients_found), constant, level, assumptions(graph, ar))


def _check_objective(graph: Graph, objective: Any, samples: int) -> Array:
    rows, shape = as_array("objective", objective), graph.nodes[-1].shape
    rows = rows if rows.ndim == len(shape) + 2 else rows[None]
    if rows.shape[2:] != shape or rows.shape[0] not in (1, samples) or rows.shape[1] == 0:
        raise InputError(f"objective: shape (rows, {shape}) or ({samples}, rows, {shape}) is needed, got {np.shape(objective)}")
    return rows


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
        if lo.shape != hi.shape or lo.shape[1:] != graph.nodes[ref].shape or lo.shape[:1] != boxes[0].lo.shape[:1] or len(lo) == 0:
            raise InputError(f"box: shape (samples, {graph.nodes[ref].shape}) is needed, got {lo.shape} and {hi.shape}")
        if np.any(lo > hi):
            raise InputError("box: a lower end exceeds its upper end")
    return boxes


def assumptions(graph: Graph, ar: Arithmetic) -> tuple[str, ...]:
    """Return what a bound of this level takes for granted, beyond IEEE 754 arithmetic."""
    if not ar.rigorous:
        return ("float64 rounding is not covered",)
    taken = ["matrix products sum conventionally (any order, fused multiply-add allowed, no Strassen)"]
    if ar.executed:
        taken.append(f"exp, erf and reciprocal root in float32 are accurate to {ULPS} units in the last place")
        taken.append("softmax is executed as exp(x - max x) over its sum")
    return tuple(taken)


def _parts(graph: Graph, samples: int, chunk: int | None) -> list[slice]:
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk: at least one sample is needed, got {chunk}")
    widest = max(math.prod(node.shape) for node in graph.nodes)
    step = chunk or max(1, CHUNK // widest**2)
    return [slice(start, start + step) for start in range(0, samples, step)]


def _bound(graph: Graph, boxes: list[Interval], method: str, ar: Arithmetic, rows: Array | None) -> Interval:
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
    return _ordered(Interval(both[:, :count], -both[:, count:]), ar)


@dataclass(frozen=True)
class Known:
    """What is known of each node: an enclosure of its (executed) value, its execution error, its relaxation."""

    values: list[Interval]
    errors: list[Array | float]
    relaxed: dict[Ref, Any]

    def relaxation(self, graph: Graph, ref: Ref, ar: Arithmetic) -> Any:
        """Return the relaxation of a node, worked out once: the intervals of its parents are final when it is first asked for."""
        if ref not in self.relaxed:
            node = graph.nodes[ref]
            assert node.operation is not None
            self.relaxed[ref] = node.operation.relax([self.values[p] for p in node.parents], ar)
        return self.relaxed[ref]


def propagate(graph: Graph, boxes: Sequence[Interval], ar: Arithmetic, *, refine: bool) -> Known:
    """Enclose every node by intervals; with refine, tighten by linear bounds those which a nonlinear operation reads.

    Raises `AssayError` where a value overflows.
    """
    given = dict(zip(graph.inputs, boxes, strict=True))
    wanted = _undecided(graph) if refine else {}
    known = Known([], [], {})
    for ref, node in enumerate(graph.nodes):
        error: Array | float = 0.0
        if node.operation is None:
            value = given[ref]
        else:
            xs = [known.values[p] for p in node.parents]
            value = node.operation.interval(xs, ar)
            if ar.executed and not node.virtual:
                error = node.operation.error(xs, value)
                value = Interval(sub_down(value.lo, error), add_up(value.hi, error)) if np.any(error) else value
        if not (np.all(np.isfinite(value.lo)) and np.all(np.isfinite(value.hi))):
            raise AssayError(_OVERFLOW.format(f"node {ref} ({type(node.operation).__name__})"))
        known.values.append(value)
        known.errors.append(error)
        if ref in wanted:
            mask = np.zeros(value.shape, bool)
            for reader in wanted[ref]:
                mask |= graph.nodes[reader].operation.undecided(value)  # type: ignore[union-attr]
            units = np.flatnonzero(mask.reshape(len(mask), -1).any(0))
            if len(units):
                known.values[ref] = tighten(graph, known, ref, units, ar)
    return known


def _undecided(graph: Graph) -> dict[Ref, list[Ref]]:
    """Return the nodes that nonlinear operations read, except where the interval is exact already."""
    readers: dict[Ref, list[Ref]] = {}
    for ref, node in enumerate(graph.nodes):
        if node.operation is not None and node.operation.nonlinear:
            for parent in node.parents:
                above = graph.nodes[parent]
                # One operation on an input: its interval is already the exact range.
                if above.operation is not None and not (len(above.parents) == 1 and graph.nodes[above.parents[0]].operation is None):
                    readers.setdefault(parent, []).append(ref)
    return readers


def tighten(graph: Graph, known: Known, ref: Ref, units: NDArray[np.intp], ar: Arithmetic) -> Interval:
    """Return the interval of a node with the given units met with their linear bounds."""
    node, value = graph.nodes[ref], known.values[ref]
    signs = np.concatenate([np.ones(len(units)), -np.ones(len(units))])
    assert node.operation is not None
    xs = [known.values[p] for p in node.parents]
    start, constant = node.operation.select(
        np.concatenate([units, units]), signs, xs, known.relaxation(graph, ref, ar), known.errors[ref], ar
    )
    pending: dict[Ref, Array] = {}
    for parent, rows in zip(node.parents, start, strict=True):
        if rows is not None:
            constant = sub_down(constant, _merge(pending, parent, rows, known, ar))
    both = add_down(constant, lower(graph, known, pending, ar))
    lo, hi = value.lo.reshape(len(value.lo), -1).copy(), value.hi.reshape(len(value.hi), -1).copy()
    better_lo, better_hi = both[:, : len(units)], -both[:, len(units) :]
    lo[:, units] = np.fmax(lo[:, units], better_lo)  # an overflowed linear bound is NaN or infinite: the interval stands
    hi[:, units] = np.fmin(hi[:, units], better_hi)
    return _ordered(Interval(lo.reshape(value.lo.shape), hi.reshape(value.hi.shape)), ar)


def _ordered(x: Interval, ar: Arithmetic) -> Interval:
    """Return x; at level float64 rounding may cross the ends by a few units in the last place, which are put in order."""
    return x if ar.rigorous else Interval(np.minimum(x.lo, x.hi), np.maximum(x.lo, x.hi))


def _merge(pending: dict[Ref, Array], ref: Ref, rows: Array, known: Known, ar: Arithmetic) -> Array:
    """Add rows to those pending for a node; return the cost of rounding the sum."""
    if ref not in pending:
        pending[ref] = rows
        return np.zeros((1, 1))
    pending[ref] = pending[ref] + rows
    if not ar.rigorous:
        return np.zeros((1, 1))
    magnitude = known.values[ref].magnitude()
    zero = np.zeros_like(magnitude)
    return -ar.lower(pending[ref], zero, zero, mul_up(ar.gamma(1), magnitude))


def lower(graph: Graph, known: Known, rows: Mapping[Ref, Array], ar: Arithmetic) -> Array:
    """Bound `sum_node rows . node` from below: linear bounds carried back to the inputs, shape (samples, rows)."""
    coefficients, constant = carry(graph, known, rows, ar)
    for ref, mine in coefficients.items():
        box = known.values[ref]
        constant = add_down(constant, ar.lower(mine, box.lo, box.hi))
    return np.broadcast_to(constant, (len(known.values[0].lo), constant.shape[1]))


def carry(graph: Graph, known: Known, rows: Mapping[Ref, Array], ar: Arithmetic) -> tuple[dict[Ref, Array], Array]:
    """Return coefficients of the inputs and a constant: `sum_node rows . node >= sum_input A . input + c` on the boxes.

    rows: (samples or 1, rows, *node shape) per node; coefficients (samples or 1, rows, *input shape), constant (samples or 1, rows).
    """
    pending = dict(rows)
    constant = np.zeros((1, 1))
    for ref in range(max(pending, default=-1), -1, -1):
        node = graph.nodes[ref]
        if node.operation is None or ref not in pending:
            continue
        mine = pending.pop(ref)
        xs = [known.values[p] for p in node.parents]
        parts, cost = node.operation.backward(mine, xs, known.relaxation(graph, ref, ar), known.errors[ref], ar)
        constant = add_down(constant, cost)
        for parent, part in zip(node.parents, parts, strict=True):
            if part is not None:
                constant = sub_down(constant, _merge(pending, parent, part, known, ar))
    for part in pending.values():  # an overflowed coefficient stays infinite or NaN down to the inputs, and bounds nothing
        finite = np.isfinite(part).reshape(*part.shape[:2], -1).all(-1)
        constant = constant if finite.all() else np.where(finite, constant, np.nan)
    return pending, constant
