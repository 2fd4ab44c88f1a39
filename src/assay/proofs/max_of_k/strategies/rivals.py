"""Named rivals: the cubic strategy with the two competitors that matter kept apart from the pool.

A smaller token k promotes itself and the query token q promotes itself; the other competitors gain
little from either. Pooling them all, as `cubic` does, adds the push of k towards k to the direct
path's push towards some other token. Here a token k of the cell (q, m, c) is pure if three
inequalities hold at both ends of the positional weight s: those of the competitors x = k and x = q,
with their own entries EV[., x] and D[q, x] throughout, and the pooled one over the rest, where

    W[k] = max_{x != m, k} (EV[k,x] - EV[k,m] + p_x),   W_q[m] and Dm[q] leave out x = m and x = q.

For each single competitor the margin of a mixture is a convex combination of those of its tokens,
as in the cubic proof, so purity for all x implies it for mixtures. Cost O(V^3 K), about twice that
of `cubic`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assay.bounds.rounding import Array
from assay.progress import progress
from assay.proofs.max_of_k import cells
from assay.proofs.max_of_k.cells import CertifiedSets, Sets
from assay.proofs.max_of_k.strategies.base import Advice, Described, Problem
from assay.proofs.max_of_k.strategies.cubic import one_sequence, pure_only, shares, whole_tables
from assay.proofs.max_of_k.strategies.low_rank import largest_elsewhere
from assay.proofs.max_of_k.tables import FoldedTables, over
from assay.targets.max_of_k import Weights


@dataclass(frozen=True)
class NamedRivals(Described):
    """Pure tokens of every cell, with the competitors k and q apart from the pool."""

    def search(self, problem: Problem) -> Advice:
        return {"sets": certify(problem.tables)}

    def verify(self, problem: Problem, advice: Advice) -> CertifiedSets:
        return CertifiedSets(pure_only(advice["sets"], certify(problem.tables)))

    def unexplained(self, weights: Weights) -> int:
        return whole_tables(weights)


@np.errstate(
    over="ignore", invalid="ignore"
)  # competitors left out are minus infinity; what is undefined is not certified
def certify(tables: FoldedTables) -> Sets:
    """Return the pure tokens of every cell: the same numbers serve search and verification."""
    V, K = tables.vocabulary, tables.positions
    sets = np.zeros((1, V, V, K, V), bool)
    own = tables.product(
        over(tables.ea, lambda end: np.diagonal(end)), over(tables.eb, lambda end: end[:, -1])
    )
    for m in progress(range(V), "largest tokens"):
        queries, rows = slice(m + 1), np.arange(m + 1)
        sets[0, queries, m, 0, 0] = one_sequence(tables, m) < 0
        at_max = over(tables.ea, lambda end: end[queries, m][:, None])
        at_own = over(own, lambda end: end[queries][:, None])
        at_key = over(tables.ea, lambda end: end[queries, :m])
        sums = []
        for rival in _competitors(tables, m):
            parts = [
                tables.times(at_max, rival.at_max),
                tables.times(at_own, rival.at_own),
                tables.times(at_key, rival.at_key),
            ]
            sums.append((parts, rival.absent))
        for c in range(1, K):
            good = np.ones((m + 1, m), bool)
            for copies, rest in shares(tables, c, queries):
                many, few = (over(share, lambda end: end[:, None]) for share in (copies, rest))
                for (of_max, of_own, of_key), absent in sums:
                    fixed = tables.up(tables.times(many, of_max) + of_own)
                    good &= (tables.up(tables.times(few, of_key) + fixed) < 0) | absent
            sets[0, rows, m, c, :m] = good
    return cells.normal(sets)


@dataclass(frozen=True)
class _Rival:
    """Upper bounds of the margin's brackets at the token m, at the query's own and at k, each (Q, 1
    or k).

    `absent` (Q, 1) says where there is no such competitor.
    """

    at_max: Array
    at_own: Array
    at_key: Array
    absent: NDArray[np.bool_]


def _competitors(tables: FoldedTables, m: int) -> list[_Rival]:
    """Return the three kinds of competitors: x = k, x = q (absent where q = m), and the pool of
    the others.
    """
    up, rows, keys = tables.up, np.arange(m + 1), np.arange(m)
    written = up(tables.ov(m, slice(m + 1)) + tables.position_ov(m).max(0))
    direct = tables.direct(m)[: m + 1]
    same, across = direct[:, :m], direct[rows, rows][:, None]
    key = _Rival(
        up(written[m, :m] + same),
        up(written[:, :m] + same),
        up(written[keys, keys] + same),
        np.zeros((m + 1, 1), np.bool_),
    )
    query = _Rival(
        up(written[m, rows][:, None] + across),
        up(written[rows, rows][:, None] + across),
        up(written[:m].T[rows] + across),
        (rows == m)[:, None],
    )
    others, rest = (
        np.where(np.arange(tables.vocabulary) == m, -np.inf, values) for values in (written, direct)
    )
    least, pool = largest_elsewhere(others), largest_elsewhere(rest)[rows, rows][:, None]
    pooled = [up(least[index][:, None] + pool) for index in ((m, rows), (rows, rows))]
    return [
        key,
        query,
        _Rival(pooled[0], pooled[1], up(least[keys, keys] + pool), np.isneginf(pool)),
    ]
