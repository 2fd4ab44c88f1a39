"""Hybrid: the mechanism exactly, everything else by general bound propagation.

The mechanism, that is attention to larger tokens and copying what is attended to, is treated as in
`box_exact`. The direct path is not looked at token by token: linear bounds (CROWN, arXiv
1811.00866) are propagated through it over the smallest box that holds all query embeddings, as they
would be through any network in its place."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from assay.bounds import Graph, Interval, bound
from assay.proofs.max_of_k import operations
from assay.proofs.max_of_k.cells import CertifiedSets
from assay.proofs.max_of_k.strategies.base import Advice, Described, Problem
from assay.proofs.max_of_k.strategies.exact import exact_seconds, search_sets, verify_sets
from assay.proofs.max_of_k.tables import FoldedTables
from assay.targets.max_of_k import Weights


@dataclass(frozen=True)
class Hybrid(Described):
    """The mechanism exactly, the direct path by propagated bounds."""

    def seconds(self, weights: Weights) -> float:
        return exact_seconds(weights)

    def search(self, problem: Problem) -> Advice:
        return {"sets": search_sets(propagated(problem), "box")}

    def verify(self, problem: Problem, advice: Advice) -> CertifiedSets:
        return CertifiedSets(verify_sets(propagated(problem), advice["sets"]))

    def unexplained(self, weights: Weights) -> int:
        V, K, d = weights.vocabulary, weights.positions, weights.width
        return 2 * V * V + 2 * K * V + 2 * d + d * V  # a, EV, b and PV; the box and the unembedding


def propagated(problem: Problem) -> FoldedTables:
    """Return the tables with the direct path replaced by propagated bounds; AssayError when they
    overflow.
    """
    w, tables, V = problem.weights, problem.tables, problem.weights.vocabulary
    embedding, last, unembed = (np.asarray(x, np.float64) for x in (w.E, w.P[-1], w.U))
    queries = Interval.exactly(embedding) + last
    graph = Graph()
    graph.linear(graph.input(w.width), unembed.T)
    box = Interval(queries.lo.min(0)[None], queries.hi.max(0)[None])
    differences = (np.eye(V)[None] - np.eye(V)[:, None]).reshape(
        V * V, V
    )  # row (m, x): logit_x - logit_m
    level = "float64" if problem.level == "float64" else "real"
    found = bound(graph, box, method="crown", level=level, objective=differences).upper.reshape(
        V, V
    )
    operations.charge(
        V * V * 4 * w.width
    )  # one difference of columns and one sum of signed ends per row
    bias = problem.factors.algebra.enclose(problem.factors.bias)
    shared = tables.up(bias.hi.reshape(1, -1) - bias.lo.reshape(-1, 1))
    return replace(tables, replaced={"direct": tables.up(found + shared)})
