"""Exact worst cases over product sets of tokens: `box_exact`, `set_exact`, their best and their
union.

In a cell (q, m, c) with tokens from S, the margin against one competitor x is a sum of one term per
position, so its largest value is exact: every non-query position holds m, `N_i = g_i(m)`, except
the c positions where replacing it by the worst token of S, `M_i = max_{k in S} g_i(k)`, costs most:

    max = sum_i N_i + g_{K-1}(q) + (the c largest of M_i - N_i).

A box takes S = {0..j} with the largest j that stays negative for every x; a set takes the longest
prefix in the order of the tokens' own worst case. Cost O(V^4 K log K), independent of V^K."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from assay.bounds.rounding import Array
from assay.progress import progress
from assay.proofs.max_of_k import cells
from assay.proofs.max_of_k.cells import CertifiedSets, Sets
from assay.proofs.max_of_k.strategies.base import Advice, Described, Problem
from assay.proofs.max_of_k.strategies.cubic import whole_tables
from assay.proofs.max_of_k.tables import FoldedTables
from assay.proofs.max_of_k.terms import position_terms, query_slices
from assay.targets.max_of_k import Weights


@dataclass(frozen=True)
class ExactSets(Described):
    """Exact worst cases over sets chosen by `choice`: `box`, `set`, `best` (the larger of the
    two per cell) or `union` (both).
    """

    choice: str = "box"

    def seconds(self, weights: Weights) -> float:
        return exact_seconds(weights, each_count=self.choice != "box")

    def search(self, problem: Problem) -> Advice:
        tables = problem.tables
        if self.choice in ("box", "set"):
            return {"sets": search_sets(tables, self.choice)}
        box, chosen = (search_sets(tables, order) for order in ("box", "set"))
        if self.choice == "union":
            return {"sets": np.concatenate([box, chosen])}
        return {
            "sets": np.where(
                box.sum(-1, keepdims=True) >= chosen.sum(-1, keepdims=True), box, chosen
            )
        }

    def verify(self, problem: Problem, advice: Advice) -> CertifiedSets:
        return CertifiedSets(verify_sets(problem.tables, advice["sets"]))

    def unexplained(self, weights: Weights) -> int:
        return whole_tables(weights)


@dataclass(frozen=True)
class _Terms:
    """The terms of the cells with largest token m and some query tokens, ready to be maximised."""

    tables: FoldedTables
    m: int
    terms: Array  # (K - 1, m + 1, Q, V)
    all_max: Array  # (Q, V): every non-query position holds m

    def worst(self, largest: Array, c: int) -> Array:
        """Return the largest margin over competitors, given the worst terms of S: (K - 1, ...,
        V) to (...).
        """
        up = self.tables.up
        excess = up(largest - self.terms[:, self.m].reshape(self._like(largest)))
        margin = self.all_max
        with np.errstate(over="ignore", invalid="ignore"):
            for part in np.sort(excess, axis=0)[::-1][:c]:
                margin = up(margin + part)
        return self.over_competitors(margin)

    def over_competitors(self, margin: Array) -> Array:
        margin[..., self.m] = -np.inf
        return margin.max(-1)

    def _like(self, largest: Array) -> tuple[int, ...]:
        own = self.terms[:, self.m].shape
        return own if largest.ndim == 3 else (own[0], 1, *own[1:])


def _terms(tables: FoldedTables, m: int, queries: slice) -> _Terms:
    terms, own = position_terms(tables, m, queries)
    margin = own
    for part in terms[:, m]:
        margin = tables.up(margin + part)
    return _Terms(tables, m, terms, margin)


def verify_sets(tables: FoldedTables, sets: Sets) -> Sets:
    """Return the sets whose cells hold correct sequences only; the others are emptied."""
    checked = np.zeros_like(sets)
    for m in progress(range(tables.vocabulary), "largest tokens"):
        for queries in query_slices(tables, m):
            part = _terms(tables, m, queries)
            no_others = part.over_competitors(part.all_max.copy()) < 0
            for family, certified in zip(sets, checked, strict=True):
                certified[queries, m, 0, 0] = family[queries, m, 0, 0] & no_others
                for c in range(1, tables.positions):
                    claimed = family[queries, m, c, :m]
                    if not claimed.any():
                        continue
                    mask = np.where(claimed, 0.0, -np.inf).T[:, :, None]
                    largest = np.stack([(terms[:m] + mask).max(0) for terms in part.terms])
                    certified[queries, m, c, :m] = claimed & (part.worst(largest, c) < 0)[:, None]
    return cells.normal(checked)


def search_sets(tables: FoldedTables, order: str) -> Sets:
    """Return, for every cell, the longest prefix of tokens that stays correct, in order `box`
    (by size) or `set` (by own worst case).
    """
    V, K = tables.vocabulary, tables.positions
    sets = np.zeros((1, V, V, K, V), bool)
    for m in progress(range(V), "largest tokens"):
        for queries in query_slices(tables, m):
            part = _terms(tables, m, queries)
            sets[0, queries, m, 0, 0] = part.over_competitors(part.all_max.copy()) < 0
            if m == 0:
                continue
            prefixes = _running(part.terms[:, :m])
            for c in range(1, K):
                if order == "set":
                    ranks = np.argsort(_own_worst(part, c), axis=0, kind="stable")
                    prefixes = _running(
                        np.take_along_axis(part.terms[:, :m], ranks[None, :, :, None], 1)
                    )
                else:
                    ranks = np.broadcast_to(np.arange(m)[:, None], (m, part.terms.shape[2]))
                lengths = _longest(part, prefixes, c)
                inside = np.zeros_like(ranks, bool)
                np.put_along_axis(inside, ranks, np.arange(m)[:, None] < lengths, 0)
                sets[0, queries, m, c, :m] = inside.T
    return cells.normal(sets)


def exact_seconds(weights: Weights, *, each_count: bool = False) -> float:
    """Return about how many CPU seconds exact worst cases take; `each_count`: tokens are ordered
    anew for each count c.
    """
    V, others = weights.vocabulary, weights.positions - 1
    return V**4 * others * (1.6e-8 * others if each_count else 2.5e-8)


def _own_worst(part: _Terms, c: int) -> Array:
    return part.worst(part.terms[:, : part.m], c)


def _running(terms: Array) -> Array:
    """Return running maxima over tokens (axis 1)."""
    running = terms.copy()
    for k in range(1, terms.shape[1]):
        np.maximum(running[:, k - 1], running[:, k], out=running[:, k])
    return running


def _longest(part: _Terms, prefixes: Array, c: int) -> Array:
    """Return the largest n, per query, such that the first n tokens stay correct (bisection:
    prefixes are monotone).
    """
    count, queries = prefixes.shape[1], np.arange(prefixes.shape[2])
    low, high = np.zeros(len(queries), int), np.full(len(queries), count)
    while (low < high).any():
        middle = (low + high + 1) // 2
        good = part.worst(prefixes[:, np.maximum(middle, 1) - 1, queries], c) < 0
        low, high = (
            np.where(good & (low < high), middle, low),
            np.where(good | (low >= high), high, middle - 1),
        )
    return low
