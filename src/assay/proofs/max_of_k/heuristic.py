"""A heuristic estimate beside the bounds of max-of-K: the other tokens as independent noise.

It is an estimate and never a bound; its type has no name in common with a proof's."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
from jaxtyping import Float
from scipy.stats import norm

from assay.bounds.rounding import Array
from assay.proofs.max_of_k.tables import factor, fold
from assay.targets.max_of_k import Weights


@dataclass(frozen=True)
class HeuristicEstimate:
    """What the accuracy would be if, beside the query and the largest token, what tokens add to a
    margin were independent noise with the mean and the variance that tokens below the largest have.
    NOT a bound: nothing is proved.

    accuracy: the estimated share of all sequences that are answered right. cells (query, largest,
    below): the same in the cell of sequences with so many tokens below the largest among the
    non-query ones, NaN where a cell is empty. weights: the share of all sequences in each cell."""

    accuracy: float
    cells: Float[Array, "query largest below"]
    weights: Float[Array, "query largest below"]


def heuristic_estimate(weights: Weights) -> HeuristicEstimate:
    """Return the heuristic estimate of a network's accuracy.

    Attention weights share a positive denominator, so the answer is right where, for every other
    output x, `sum_p g_p(t_p) < 0` (see `tables`). The query's term is known. Of the non-query
    positions c hold a token below the largest token m: their terms are averaged over which c they
    are, and have the mean and the variance of tokens drawn from those below m, independently. The
    sum is taken to be normal, and the estimate of a cell is the smallest `Phi(-mean / deviation)`
    over the rivals x. O(V^4 K) operations."""
    V, K = weights.vocabulary, weights.positions
    found = fold(factor(weights, "float64"), weights)
    cells = np.full((V, V, K), np.nan)
    counts = np.zeros((V, V, K))
    for m in range(V):
        away = found.EV.lo - found.EV.lo[:, m : m + 1]  # (token, x)
        places = found.PV.lo - found.PV.lo[:, m : m + 1]  # (position, x)
        for q in range(m + 1):
            direct = found.D.lo[q] - found.D.lo[q, m]
            attention = found.ea.lo[q][:, None] * found.eb.lo[q]  # (token, position)
            own = attention[q, K - 1] * (away[q] + places[K - 1] + direct)
            terms = attention[: m + 1, : K - 1, None] * (
                away[: m + 1, None] + places[: K - 1] + direct
            )
            for c in range((K if q == m else K - 1) if m else 1):
                counts[q, m, c] = comb(K - 1, c) * float(m) ** c
                cells[q, m, c] = _right(own, terms, c / (K - 1), m)
    shares = counts / counts.sum()
    return HeuristicEstimate(float(np.nansum(cells * shares)), cells, shares)


def _right(own: Array, terms: Array, share: float, m: int) -> float:
    """Return the estimate of a cell: `own` (x,) is the query's term, `terms` (token, position, x)
    those of tokens up to m, of which a `share` of the positions hold tokens below m.
    """
    mean, variance = own + (1 - share) * terms[m].sum(0), np.zeros_like(own)
    if share:
        mean = mean + share * terms[:m].mean(0).sum(0)
        variance = share * terms[:m].var(0).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        lead = np.where(variance > 0, -mean / np.sqrt(variance), -np.sign(mean) * np.inf)
    lead[m] = np.inf
    return float(norm.cdf(np.nan_to_num(lead, nan=0.0, posinf=np.inf, neginf=-np.inf)).min())
