"""A sweep over a graph at a level: intervals forward, tightened by linear bounds where a nonlinear
operation reads them, under slopes that a search has chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from assay.bounds.engine import (
    Known,
    Late,
    enclose,
    lower,
    never,
    ordered,
    require_range,
    tighten,
)
from assay.bounds.graph import Graph, Node, Ref
from assay.bounds.levels import Arithmetic, arithmetic
from assay.bounds.nonlinear import Relu, Square
from assay.bounds.rounding import Array, Interval
from assay.bounds.rules import Choice, Decision, Enclosed, Pick, Slope, Smooth
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
    late: Late = never,
) -> SlopedKnown:
    """Enclose every node over boxes (samples, *shape), one per input.

    slopes: where the search relaxes nonlinear nodes; others take the default. before: intervals
    known to hold, those of boxes around these. ends: the entries that are asked for, by default the
    value's; intervals that these do not depend on are not tightened. late: once it says so,
    no interval is tightened any more. Raises `AssayError` where a value overflows, and `InputError`
    where a norm may vanish."""
    ar, graph = arithmetic(at.level), at.graph
    wanted = _wanted(at, ends) if refine else {}
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
        if ref in wanted and not late():
            asked = worth(value, *wanted[ref])
            units = np.flatnonzero(asked.any(0))
            if len(units):
                tight = ordered(tighten(graph, known, ref, units, ar, late), ar)
                mine = asked.reshape(value.lo.shape)
                lo, hi = np.where(mine, tight.lo, value.lo), np.where(mine, tight.hi, value.hi)
                known.values[ref] = Interval(lo, hi)
    return known


def bound_rows(at: LevelGraph, known: SlopedKnown, rows: Array) -> Array:
    """Bound `rows . output` from below, (samples, rows); rows are (samples or 1, rows, *shape)."""
    ar, last = arithmetic(at.level), len(at.graph.nodes) - 1
    value = known.values[last]
    return np.fmax(lower(at.graph, known, {last: rows}, ar), ar.lower(rows, value.lo, value.hi))


def _wanted(
    at: LevelGraph, ends: Mapping[Ref, Mask] | None
) -> dict[Ref, tuple[list[Reader], Mask]]:
    """Return `readers`; of the same ends, those of the last time."""
    key = None if ends is None else [(ref, mask.tobytes()) for ref, mask in ends.items()]
    kept: list[Any] = at.once("readers", list)
    if not kept or kept[0] != key:
        kept[:] = [key, readers(at.graph, ends)]
    return kept[1]


@dataclass(frozen=True)
class Reader:
    """A nonlinear operation that reads a node. choice: what decides entries by the node's numbers
    in their order and by others that are constant, if it is that; shape: of its entries."""

    operation: Any
    choice: Choice | None = None
    others: tuple[Interval, ...] = ()
    shape: tuple[int, ...] = ()

    def asks(self, value: Interval) -> Mask:
        """Return the entries of the node, flat, that a narrower interval may help it with."""
        flat = value.lo.reshape(len(value.lo), -1)
        if isinstance(self.operation, Relu):
            return np.asarray((flat < 0) & (value.hi.reshape(flat.shape) > 0))
        if self.choice is None:
            return np.ones(flat.shape, bool)
        sizes = (len(flat), *self.shape)
        x = Interval(value.lo.reshape(sizes), value.hi.reshape(sizes))
        with np.errstate(all="ignore"):
            asked = self.choice.matters([x, *self.others], arithmetic("float64"))
        return np.broadcast_to(asked, sizes).reshape(flat.shape)


def readers(
    graph: Graph, ends: Mapping[Ref, Mask] | None = None
) -> dict[Ref, tuple[list[Reader], Mask]]:
    """Return the nodes that nonlinear operations read, behind moved entries, each with its readers
    and the entries that the ends depend on; inputs aside.
    """
    masks = needed(graph, ends)
    found: dict[Ref, list[Reader]] = {}
    for node in graph.nodes:
        if node.operation is None or not node.operation.nonlinear:
            continue
        for place, parent in enumerate(node.parents):
            for source in _sources(graph, parent):
                operation = graph.nodes[source].operation
                if operation is not None and graph.nodes[source].parents:
                    reader = _reader(graph, node, source if place == 0 else None)
                    found.setdefault(source, []).append(reader)
    return {
        ref: (ops, masks[ref])
        for ref, ops in found.items()
        if ref in masks and not _exact(graph, ref)
    }


def _reader(graph: Graph, node: Node, number: Ref | None) -> Reader:
    """Return what reads a node; number: where it is the first parent."""
    operation = node.operation
    choice = operation.choice if isinstance(operation, Decision) else operation
    others = [graph.nodes[p].operation for p in node.parents[1:]]
    if not isinstance(choice, Choice) or not all(isinstance(other, Enclosed) for other in others):
        return Reader(operation)
    view = node.parents[0]
    while isinstance(move := graph.nodes[view].operation, Pick) and move.plain:
        view = graph.nodes[view].parents[0]
    if view != number:
        return Reader(operation)
    ends = tuple(Interval(other.lo[None], other.hi[None]) for other in others)  # type: ignore[union-attr]
    return Reader(operation, choice, ends, node.shape)


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
    if isinstance(node.operation, Smooth | Slope | Relu | Square | Choice):
        return True
    return len(node.parents) == 1 and all(
        graph.nodes[p].operation is None for p in _sources(graph, node.parents[0])
    )


def worth(value: Interval, asking: Sequence[Reader], mask: Mask) -> Mask:
    """Return where a linear bound may usefully narrow the interval of a unit, (samples, units).

    Other samples must not decide for a sample: a box is then bounded alike whatever boxes are
    bounded with it, as where a certificate of it is checked."""
    wide = (value.hi - value.lo > NARROW * (1 + value.magnitude())).reshape(len(value.lo), -1)
    asked = np.logical_or.reduce([reader.asks(value) for reader in asking])
    return np.asarray(wide & asked & mask.reshape(-1))


def _meet(value: Interval, other: Interval) -> Interval:
    """Return the intersection; rounding may cross ends at level float64, which are put in order."""
    lo, hi = np.maximum(value.lo, other.lo), np.minimum(value.hi, other.hi)
    return Interval(np.minimum(lo, hi), np.maximum(lo, hi))
