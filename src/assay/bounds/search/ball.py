"""What the balls of norms alone allow: a bound of a row of the value that holds whatever the inputs
are. A vector divided by the root of its mean square lies in a ball of radius sqrt(d), so that a
linear function of it stays above minus sqrt(d) times the length of its coefficients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from assay.bounds.engine import Known, carry
from assay.bounds.graph import Graph, Ref
from assay.bounds.levels import Arithmetic, arithmetic
from assay.bounds.nonlinear import Multiply
from assay.bounds.rounding import Array, Interval, add_down, mul_up, sqrt_up, sum_up
from assay.bounds.trace.traced import LevelGraph
from assay.errors import AssayError


def least_anywhere(at: LevelGraph, row: Array) -> float:
    """Return a lower bound of `row . value` that holds for all inputs, by the balls of the last
    norms; minus infinity where the value does not follow from norms.
    """
    found = at.once("balls", lambda: _behind_norms(at))
    if found is None:
        return -np.inf
    graph, known = found
    ar, last = arithmetic(at.level), len(graph.nodes) - 1
    with np.errstate(all="ignore"):
        coefficients, constant = carry(graph, known, {last: row[None, None]}, ar)
        for ref, mine in coefficients.items():
            box = known.values[ref]
            plain = ar.lower(mine, box.lo, box.hi, 0.0)
            constant = add_down(constant, np.maximum(plain, -_reach(mine)))
    bound = float(constant.reshape(-1)[0])
    return bound if np.isfinite(bound) else -np.inf


def _reach(rows: Array) -> Array:
    """Return how far rows of vectors in balls of radius sqrt(d) reach, (samples, rows): d is the
    last axis, and there is a ball for each of the others.
    """
    lengths = sqrt_up(sum_up(mul_up(rows, rows)))
    whole = mul_up(lengths, sqrt_up(float(rows.shape[-1])))
    return np.asarray(sum_up(whole.reshape(*rows.shape[:2], -1)))


def _behind_norms(at: LevelGraph) -> tuple[Graph, Known] | None:
    """Return the graph with the vectors of the last norms as inputs, and the intervals that follow
    from theirs.
    """
    ar, last = arithmetic(at.level), len(at.graph.nodes) - 1
    graph = Graph()
    graph.nodes = list(at.graph.nodes)
    nothing = Interval.exactly(np.zeros((1, 1)))
    values: dict[Ref, Interval] = {}
    with np.errstate(all="ignore"):
        try:
            if not _find(at, last, values, graph, ar):
                return None
        except AssayError:
            return None
    count = len(graph.nodes)
    every = [values.get(ref, nothing) for ref in range(count)]
    errors: list[Any] = [0.0] * count
    return graph, Known(every, errors, {})


def _find(
    at: LevelGraph, ref: Ref, values: dict[Ref, Interval], graph: Graph, ar: Arithmetic
) -> bool:
    if ref in values:
        return True
    node = at.graph.nodes[ref]
    if ref in at.limits and isinstance(node.operation, Multiply):
        values[ref] = at.limits[ref]
        graph.nodes[ref] = replace(node, operation=None, parents=())
        return True
    if node.operation is None or not all(_find(at, p, values, graph, ar) for p in node.parents):
        return False
    values[ref] = node.operation.interval([values[p] for p in node.parents], ar)
    return True
