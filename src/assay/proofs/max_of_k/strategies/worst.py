"""Worst case for the unknown: one named part of the network is replaced by the worst value that it
takes anywhere.

What the bound loses against `box_exact` is what understanding that part buys. The part is replaced
in the tables, so that the exact worst case over boxes of tokens does the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from assay.bounds import rounding
from assay.bounds.rounding import Interval
from assay.errors import unknown
from assay.proofs.max_of_k.cells import CertifiedSets
from assay.proofs.max_of_k.strategies import low_rank
from assay.proofs.max_of_k.strategies.base import Advice, Described, Problem
from assay.proofs.max_of_k.strategies.exact import exact_seconds, search_sets, verify_sets
from assay.proofs.max_of_k.tables import FoldedTables
from assay.targets.max_of_k import Weights

PARTS = ("direct", "positions_ov", "positions_qk", "qk_residual")


@dataclass(frozen=True)
class Worst(Described):
    """`part` is one of `direct` (the direct path: its worst query token), `positions_ov` and
    `positions_qk` (what positions write, and how they are attended to: the worst position),
    `qk_residual` (scores beyond rank one: their largest row difference)."""

    part: str = "direct"

    def seconds(self, weights: Weights) -> float:
        return exact_seconds(weights)

    def search(self, problem: Problem) -> Advice:
        advice = {}
        if self.part == "qk_residual":
            advice = low_rank.find_advice(
                problem.floating().factors, qk="range", direct="exact", rank=1
            )
        return advice | {"sets": search_sets(without(problem, self.part, advice), "box")}

    def verify(self, problem: Problem, advice: Advice) -> CertifiedSets:
        return CertifiedSets(verify_sets(without(problem, self.part, advice), advice["sets"]))

    def unexplained(self, weights: Weights) -> int:
        V, K = weights.vocabulary, weights.positions
        left = {"direct": V * V, "positions_ov": K * V, "positions_qk": K * V, "qk_residual": V * V}
        kept = {"direct": V * V, "positions_ov": V, "positions_qk": 2 * V, "qk_residual": 3 * V}
        return 3 * V * V + 2 * K * V - left[self.part] + kept[self.part]


def without(problem: Problem, part: str, advice: Advice) -> FoldedTables:
    """Return the tables with a part replaced by its worst value; InputError for an unknown part."""
    tables = problem.tables
    if part in ("direct", "positions_ov"):
        values = tables.D if part == "direct" else tables.PV
        worst = [
            tables.up(values.hi - values.lo[:, m : m + 1]).max(0) for m in range(tables.vocabulary)
        ]
        return replace(tables, replaced={part: np.stack(worst)})
    if part == "positions_qk":
        low, high = (
            np.broadcast_to(end[:, None], tables.eb.lo.shape)
            for end in (tables.eb.lo.min(1), tables.eb.hi.max(1))
        )
        return replace(tables, eb=Interval(low, high))
    if part == "qk_residual":
        scores = low_rank.scores(problem.factors, advice, "range")
        return replace(tables, ea=_attended(problem, scores))
    raise unknown("part", part, PARTS)


def _attended(problem: Problem, scores: low_rank.ExplainedScores) -> Interval:
    """Return e^S of the explained scores, each widened by the error: only ratios within a row
    matter.
    """
    explained = problem.factors.algebra.exp(scores.content)
    growth = problem.factors.algebra.growth(scores.error)[:, None]
    low = explained.lo / growth
    return Interval(
        low if problem.level == "float64" else np.maximum(rounding.down(low), 0.0), explained.hi
    )
