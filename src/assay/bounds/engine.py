"""The two passes over a graph: intervals forward, and lower bounds of rows `A . node` carried
backward to the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.bounds.graph import Graph, Node, Ref
from assay.bounds.levels import Arithmetic, check_range
from assay.bounds.regions import Ball, least
from assay.bounds.rounding import Array, Interval, add_down, add_up, mul_up, sub_down
from assay.errors import AssayError
from assay.progress import progress

ROWS = 2**23  # numbers in the rows that are carried at once: 64 MB
Late = Callable[[], bool]
"""Whether the time for linear bounds is over; the intervals that were reached stand."""
OVERFLOW = (
    "{} has no finite bound in float64: the values overflow; scale the weights or the inputs down"
)


@dataclass(frozen=True)
class Known:
    """What is known of each node: an enclosure of its (executed) value, its execution error, its
    relaxation.
    """

    values: list[Interval]
    errors: list[Array | float]
    relaxed: dict[Ref, Any]

    def relaxation(self, graph: Graph, ref: Ref, ar: Arithmetic) -> Any:
        """Return the relaxation of a node, worked out once: the intervals of its parents are
        final when it is first asked for.
        """
        if ref not in self.relaxed:
            node = graph.nodes[ref]
            assert node.operation is not None
            self.relaxed[ref] = node.operation.relax([self.values[p] for p in node.parents], ar)
        return self.relaxed[ref]


def propagate(graph: Graph, boxes: Sequence[Interval], ar: Arithmetic, *, refine: bool) -> Known:
    """Enclose every node by intervals; with refine, tighten by linear bounds those which a
    nonlinear operation reads.

    Raises `AssayError` where a value overflows.
    """
    given = dict(zip(graph.inputs, boxes, strict=True))
    wanted = _undecided(graph, given) if refine else {}
    known = Known([], [], {})
    for ref, node in enumerate(progress(graph.nodes, "operations")):
        value, error = (
            (given[ref], 0.0) if node.operation is None else enclose(node, known.values, ar)
        )
        require_range(ref, node, value, ar)
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


def enclose(
    node: Node, values: Sequence[Interval], ar: Arithmetic
) -> tuple[Interval, Array | float]:
    """Enclose the (executed) value of an operation, given those of its parents, and its execution
    error.
    """
    assert node.operation is not None
    xs = [values[p] for p in node.parents]
    value = node.operation.interval(xs, ar)
    if not ar.executed or node.virtual:
        return value, 0.0
    error = node.operation.error(xs, value)
    if not np.any(error):
        return value, error
    return Interval(sub_down(value.lo, error), add_up(value.hi, error)), error


def require_range(ref: Ref, node: Node, value: Interval, ar: Arithmetic) -> None:
    """Raise `AssayError` where the value of a node overflows."""
    if not (np.all(np.isfinite(value.lo)) and np.all(np.isfinite(value.hi))):
        raise AssayError(OVERFLOW.format(f"node {ref} ({type(node.operation).__name__})"))
    if ar.executed and node.limited:
        check_range(value.magnitude())


def _undecided(graph: Graph, boxes: Mapping[Ref, Interval]) -> dict[Ref, list[Ref]]:
    """Return the nodes that nonlinear operations read, except where the interval is exact
    already.
    """
    readers: dict[Ref, list[Ref]] = {}
    for ref, node in enumerate(graph.nodes):
        if node.operation is not None and node.operation.nonlinear:
            for parent in node.parents:
                above = graph.nodes[parent]
                # One operation on a box: its interval is already the exact range.
                exact = (
                    len(above.parents) == 1
                    and above.parents[0] in boxes
                    and not isinstance(boxes[above.parents[0]], Ball)
                )
                if above.operation is not None and not exact:
                    readers.setdefault(parent, []).append(ref)
    return readers


def never() -> bool:
    return False


def tighten(
    graph: Graph,
    known: Known,
    ref: Ref,
    units: NDArray[np.intp],
    ar: Arithmetic,
    late: Late = never,
) -> Interval:
    """Return the interval of a node with the given units met with their linear bounds, of as many
    units as it is not late for.
    """
    value = known.values[ref]
    lo, hi = value.lo.reshape(len(value.lo), -1).copy(), value.hi.reshape(len(value.hi), -1).copy()
    widest = max(math.prod(node.shape) for node in graph.nodes[: ref + 1])
    step = max(1, ROWS // (2 * widest * len(lo)))
    for some in (units[start : start + step] for start in range(0, len(units), step)):
        if late():
            break
        both = _both(graph, known, ref, some, ar)
        # An overflowed linear bound is NaN or infinite: the interval stands.
        lo[:, some] = np.fmax(lo[:, some], both[:, : len(some)])
        hi[:, some] = np.fmin(hi[:, some], -both[:, len(some) :])
    return ordered(Interval(lo.reshape(value.lo.shape), hi.reshape(value.hi.shape)), ar)


def _both(graph: Graph, known: Known, ref: Ref, units: NDArray[np.intp], ar: Arithmetic) -> Array:
    """Bound the units of a node, then their negatives, from below."""
    operation, parents = graph.nodes[ref].operation, graph.nodes[ref].parents
    assert operation is not None
    signs = np.repeat([1.0, -1.0], len(units))
    xs, relaxed = [known.values[p] for p in parents], known.relaxation(graph, ref, ar)
    start, constant = operation.select(
        np.concatenate([units, units]), signs, xs, relaxed, known.errors[ref], ar
    )
    pending: dict[Ref, Array] = {}
    for parent, rows in zip(parents, start, strict=True):
        if rows is not None:
            constant = sub_down(constant, _merge(pending, parent, rows, known, ar))
    return add_down(constant, lower(graph, known, pending, ar))


def ordered(x: Interval, ar: Arithmetic) -> Interval:
    """Return x; at level float64 rounding may cross the ends by a few units in the last place,
    which are put in order.
    """
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
    """Bound `sum_node rows . node` from below: linear bounds carried back to the inputs, shape
    (samples, rows).
    """
    coefficients, constant = carry(graph, known, rows, ar)
    for ref, mine in coefficients.items():
        box = known.values[ref]
        constant = add_down(constant, least(mine, box, ar))
    return np.broadcast_to(constant, (len(known.values[0].lo), constant.shape[1]))


def carry(
    graph: Graph, known: Known, rows: Mapping[Ref, Array], ar: Arithmetic
) -> tuple[dict[Ref, Array], Array]:
    """Return coefficients of the inputs and a constant: `sum_node rows . node >= sum_input A .
    input + c` on the boxes.

    rows: (samples or 1, rows, *node shape) per node; coefficients (samples or 1, rows, *input
    shape), constant (samples or 1, rows)."""
    pending = dict(rows)
    constant = np.zeros((1, 1))
    for ref in range(max(pending, default=-1), -1, -1):
        node = graph.nodes[ref]
        if node.operation is None or ref not in pending:
            continue
        mine = pending.pop(ref)
        xs = [known.values[p] for p in node.parents]
        parts, cost = node.operation.backward(
            mine, xs, known.relaxation(graph, ref, ar), known.errors[ref], ar
        )
        constant = add_down(constant, cost)
        for parent, part in zip(node.parents, parts, strict=True):
            if part is not None:
                constant = sub_down(constant, _merge(pending, parent, part, known, ar))
    for part in (
        pending.values()
    ):  # an overflowed coefficient stays infinite or NaN down to the inputs, and bounds nothing
        finite = np.isfinite(part).reshape(*part.shape[:2], -1).all(-1)
        constant = constant if finite.all() else np.where(finite, constant, np.nan)
    return pending, constant
