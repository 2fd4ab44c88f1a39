"""Where features interact: neurons, and pairs of features by what they cost in margin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float

from assay.proofs.crosscoder.arithmetic import Array
from assay.proofs.crosscoder.certificates import Sides, interactions, rivals
from assay.proofs.crosscoder.problem import Problem
from assay.proofs.crosscoder.sides import strongest

_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Independence:
    """How far features pass a block one at a time; measured in float64, not proved.

    free_share: the share of pairs (point, neuron) with interaction `min(P, N) ||W_out||` of at most
    1e-6 of what the neuron writes at most. silent: neurons without interaction at any point.
    strengths (hidden,): the mean of `min(P, N) ||W_out||` over points. pairs: strongest feature,
    other feature, points, and the mean cost in margin of the other's share of S_n."""

    free_share: float
    silent: int
    strengths: Float[Array, " hidden"]
    pairs: pl.DataFrame


def independence(problem: Problem, sides: Sides, top: int = 40) -> Independence:
    """Return the independence report of a certificate with chosen sides; `top` pairs at most."""
    problem = problem.at("float64")
    shared = interactions(problem) * np.linalg.norm(problem.network.W_out, axis=0)
    size = shared.max(0) + 1e-30
    free = shared <= _NEGLIGIBLE * max(float(size.max()), 1e-30)
    return Independence(
        float(free.mean()),
        int(free.all(0).sum()),
        shared.mean(0),
        _pairs(problem, sides).head(top),
    )


def _pairs(problem: Problem, sides: Sides) -> pl.DataFrame:
    """Return the pairs (strongest, other) by mean cost: `z_f sum_n (away W_out)_n^+ c_{g,f,n}`
    against the rival that is nearest in the linear bound.
    """
    tables, labels = problem.tables, problem.points.labels
    codes, first = problem.features.codes, strongest(problem, 1)[:, 0]
    costs = np.zeros_like(codes)
    for row, label in enumerate(labels.tolist()):
        away = np.maximum(rivals(tables.inner, label), 0)
        sign = np.where(sides.negative[sides.group[row]], -1.0, 1.0)
        single = codes[row][:, None] * np.maximum(tables.pre * sign, 0) @ away.T
        costs[row] = single[:, single.sum(0).argmax()]
    schema = {
        "strongest": pl.Int64,
        "other": pl.Int64,
        "points": pl.Int64,
        "cost in margin": pl.Float64,
    }
    rows = []
    for g in np.unique(first).tolist():
        here = np.flatnonzero(first == g)
        mean = costs[here].sum(0) / len(labels)
        rows += [
            (g, f, int((codes[here][:, f] > 0).sum()), float(mean[f]))
            for f in np.flatnonzero(mean > 0).tolist()
        ]
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame.sort("cost in margin", descending=True)
