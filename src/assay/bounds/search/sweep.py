"""A sweep over a graph at a level: intervals forward, tightened by linear bounds where a nonlinear
operation reads them, under slopes that a search has chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from assay.bounds.engine import Known, enclose, lower, ordered, require_range, tighten
from assay.bounds.graph import Graph, Ref
from assay.bounds.levels import Arithmetic, arithmetic
from assay.bounds.nonlinear import Relu, Square
from assay.bounds.rounding import Array, Interval
from assay.bounds.rules import Pick, Slope, Smooth
from assay.bounds.search.reach import Mask, needed
from assay.bounds.search.slopes import Slopes, relax
from assay.bounds.trace.traced import LevelGraph

NARROW = 1e-7
"""An interval narrower than this, relative to its size, is not worth a linear bound."""


@dataclass(frozen=True)
class SlopedKnown(Known):
    """What is known of each node, with the slopes to relax the nonlinear ones at."""

    slopes: Slopes = field(default_factory=dict)

    def relaxation(self, graph: Graph, ref: Ref, ar: Arithmetic) -> Any:
        if ref not in self.relaxed:
            node = graph.nodes[ref]
            assert node.operation is not None
            xs = [self.values[p] for p in node.parents]
            self.relaxed[ref] = relax(node.operation, xs, self.slopes.get(ref), ar)
        return self.relaxed[ref]


def sweep(
    at: LevelGraph,
    boxes: Sequence[Interval],
    *,
    slopes: Slopes | None = None,
    before: Mapping[Ref, Interval] | None = None,
    refine: bool = True,
    ends: Mapping[Ref, Mask] | None = None,
) -> SlopedKnown:
    """Enclose every node over boxes (samples, *shape), one per input.

    slopes: where the search relaxes nonlinear nodes; others take the default. before: intervals
    known to hold, those of boxes around these. ends: the entries that are asked for, by default the
    value's; intervals that these do not depend on are not tightened. Raises `AssayError` where
    a value overflows, and `InputError` where a norm may vanish."""
    ar, graph = arithmetic(at.level), at.graph
    wanted = readers(graph, ends) if refine else {}
    known = SlopedKnown([], [], {}, slopes or {})
    given = dict(zip(graph.inputs, boxes, strict=True))
    for ref, node in enumerate(graph.nodes):
        value, error = (
            (given[ref], 0.0) if node.operation is None else enclose(node, known.values, ar)
        )
        if ref in at.limits:
            value = _meet(value, at.limits[ref])
        if before is not None and ref in before:
            value = _meet(value, before[ref])
        require_range(ref, node, value, ar)
        known.values.append(value)
        known.errors.append(error)
        if ref in wanted:
            operations, mask = wanted[ref]
            units = worth(value, operations, mask)
            if len(units):
                tight = tighten(graph, known, ref, units, ar)
                known.values[ref] = ordered(tight, ar)
    return known


def bound_rows(at: LevelGraph, known: SlopedKnown, rows: Array) -> Array:
    """Bound `rows . output` from below, (samples, rows); rows are (samples or 1, rows, *shape)."""
    ar, last = arithmetic(at.level), len(at.graph.nodes) - 1
    value = known.values[last]
    return np.fmax(lower(at.graph, known, {last: rows}, ar), ar.lower(rows, value.lo, value.hi))


def readers(
    graph: Graph, ends: Mapping[Ref, Mask] | None = None
) -> dict[Ref, tuple[list[Any], Mask]]:
    """Return the nodes that nonlinear operations read, behind moved entries, each with its readers
    and the entries that the ends depend on; inputs aside.
    """
    masks = needed(graph, ends)
    found: dict[Ref, list[Any]] = {}
    for node in graph.nodes:
        if node.operation is None or not node.operation.nonlinear:
            continue
        for parent in node.parents:
            for source in _sources(graph, parent):
                operation = graph.nodes[source].operation
                if operation is not None and graph.nodes[source].parents:
                    found.setdefault(source, []).append(node.operation)
    return {
        ref: (ops, masks[ref])
        for ref, ops in found.items()
        if ref in masks and not _exact(graph, ref)
    }


def _sources(graph: Graph, ref: Ref) -> list[Ref]:
    node = graph.nodes[ref]
    if not isinstance(node.operation, Pick):
        return [ref]
    return [source for parent in node.parents for source in _sources(graph, parent)]


def _exact(graph: Graph, ref: Ref) -> bool:
    """Return whether the interval of a node is exact: one step after the inputs alone, or a
    function that keeps an interval's ends.
    """
    node = graph.nodes[ref]
    if isinstance(node.operation, Smooth | Slope | Relu | Square):
        return True
    return len(node.parents) == 1 and all(
        graph.nodes[p].operation is None for p in _sources(graph, node.parents[0])
    )


def worth(value: Interval, operations: Sequence[Any], mask: Mask) -> np.ndarray:
    """Return the units whose interval a linear bound may usefully narrow."""
    wide = value.hi - value.lo > NARROW * (1 + value.magnitude())
    if all(isinstance(operation, Relu) for operation in operations):
        wide &= (value.lo < 0) & (value.hi > 0)
    return np.flatnonzero(wide.reshape(len(wide), -1).any(0) & mask.reshape(-1))


def _meet(value: Interval, other: Interval) -> Interval:
    """Return the intersection; rounding may cross ends at level float64, which are put in order."""
    lo, hi = np.maximum(value.lo, other.lo), np.minimum(value.hi, other.hi)
    return Interval(np.minimum(lo, hi), np.maximum(lo, hi))
