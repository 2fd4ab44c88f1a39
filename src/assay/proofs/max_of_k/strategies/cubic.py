"""The cubic strategy: purity of a few pooled numbers per cell (the cubic proof of arXiv 2406.11779,
with sets per cell).

Pool positions and competitors: `p_x = max_i (PV[i,x] - PV[i,m])`, `W[t] = max_{x != m} (EV[t,x] -
EV[t,m] + p_x)`, `Dm[q] = max_{x != m} (D[q,x] - D[q,m])`. With s the positional weight of the
copies of m and T that of all non-query positions, a cell whose smaller tokens all equal k is
correct if

    s e^{a_qm} (W[m] + Dm) + e^{a_qq + b_q} (W[q] + Dm) + (T - s) e^{a_qk} (W[k] + Dm) < 0

for the smallest and the largest s (it is linear in s). Any mixture of such tokens is a convex
combination of these cases. With c = 0 there is one sequence, and its margin is formed exactly. Cost
O(V^3 K)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from assay.bounds.rounding import Array, Interval
from assay.progress import progress
from assay.proofs.max_of_k import cells
from assay.proofs.max_of_k.cells import CertifiedSets, Sets
from assay.proofs.max_of_k.strategies.base import Advice, Described, Problem
from assay.proofs.max_of_k.tables import FoldedTables, over
from assay.targets.max_of_k import Weights


@dataclass(frozen=True)
class Cubic(Described):
    """Pure tokens of every cell."""

    def search(self, problem: Problem) -> Advice:
        return {"sets": certify(problem.tables)}

    def verify(self, problem: Problem, advice: Advice) -> CertifiedSets:
        return CertifiedSets(pure_only(advice["sets"], certify(problem.tables)))

    def unexplained(self, weights: Weights) -> int:
        return whole_tables(weights)


def whole_tables(weights: Weights) -> int:
    """Return the size of the tables a, EV, D (V by V) and b, PV (K by V): 3 V^2 + 2 K V."""
    V, K = weights.vocabulary, weights.positions
    return 3 * V * V + 2 * K * V


def certify(tables: FoldedTables) -> Sets:
    """Return the pure tokens of every cell: the same numbers serve search and verification."""
    V, K = tables.vocabulary, tables.positions
    up = tables.up
    sets = np.zeros((1, V, V, K, V), bool)
    own = tables.product(
        over(tables.ea, lambda end: np.diagonal(end)), over(tables.eb, lambda end: end[:, -1])
    )
    for m in progress(range(V), "largest tokens"):
        queries = slice(m + 1)
        ov, places, direct = tables.ov(m), tables.position_ov(m), tables.direct(m)[queries]
        pooled = _without(up(ov + places.max(0)), m)
        gap = _without(direct.copy(), m)
        value = up(pooled[None, :] + gap[:, None])  # (Q, V): W[t] + Dm[q]
        rows = np.arange(m + 1)
        at_query = tables.times(over(own, lambda end: end[queries]), value[rows, rows])
        at_max = tables.times(over(tables.ea, lambda end: end[queries, m]), value[:, m])
        others = tables.times(over(tables.ea, lambda end: end[queries, :m]), value[:, :m])
        sets[0, queries, m, 0, 0] = one_sequence(tables, m) < 0
        for c in range(1, K):
            sets[0, queries, m, c, :m] = True
            for copies, rest in shares(tables, c, queries):
                fixed = up(tables.times(copies, at_max) + at_query)
                margin = up(
                    tables.times(over(rest, lambda end: end[:, None]), others) + fixed[:, None]
                )
                sets[0, queries, m, c, :m] &= margin < 0
    return cells.normal(sets)


def pure_only(sets: Sets, pure: Sets) -> Sets:
    """Return the claimed cells whose tokens are all pure; the others are emptied."""
    return sets & ~(sets & ~pure).any(-1, keepdims=True)


def shares(tables: FoldedTables, c: int, queries: slice) -> list[tuple[Interval, Interval]]:
    """Return enclosures of both extremes of (s, T - s) per query: s the positional weight of the K
    - 1 - c copies of m.

    What is linear or fractional in s is largest at one of the two: the smallest s leaves the c
    largest weights, and conversely."""
    n = tables.positions - 1 - c
    weights = over(tables.eb, lambda end: np.sort(end[queries, :-1], axis=1))
    falling = over(weights, lambda end: end[:, ::-1])
    return [
        (_sum(tables, weights, n), _sum(tables, falling, c)),
        (_sum(tables, falling, n), _sum(tables, weights, c)),
    ]


def _sum(tables: FoldedTables, parts: Interval, count: int) -> Interval:
    """Return an enclosure of the sum of the first columns."""

    def fold(end: Array, round_: Callable[[Array], Array]) -> Array:
        value = np.zeros_like(end, shape=end.shape[:1])
        for part in end.T[:count]:
            value = round_(value + part)
        return value

    low = fold(parts.lo, tables.down)
    if parts.lo is parts.hi and tables.level == "float64":
        return Interval(low, low)
    return Interval(np.maximum(low, 0.0), fold(parts.hi, tables.up))


def _without(margins: Array, m: int) -> Array:
    """Return the largest entry of each row outside column m."""
    margins[..., m] = -np.inf
    return margins.max(-1)


def one_sequence(tables: FoldedTables, m: int) -> Array:
    """Return the largest margin of the sequence (m, ..., m, q) for each q <= m: exact for every
    competitor.
    """
    up, K = tables.up, tables.positions
    ov, places, direct = tables.ov(m), tables.position_ov(m), tables.direct(m)[: m + 1]
    rows = np.arange(m + 1)
    margin = np.zeros_like(direct)
    for p in range(K):
        last = p == K - 1
        score = over(tables.ea, lambda end: end[rows, rows] if last else end[: m + 1, m])
        weight = tables.product(score, over(tables.eb, lambda end: end[: m + 1, p]))
        value = up(up((ov[: m + 1] if last else ov[m]) + places[p]) + direct)
        margin = up(margin + tables.times(over(weight, lambda end: end[:, None]), value))
    return _without(margin, m)
