"""Trying all sequences, for models small enough."""

from __future__ import annotations

from itertools import product

import numpy as np

from assay_check.margins import Margins
from assay_check.measure import Measure

MOST_DOUBTS = 10_000  # sequences that are settled in balls; further ones count as wrong


def weigh(margins: Margins, measure: Measure) -> int:
    """Return the weight of the sequences that are proved right."""
    V, K, found, doubts = margins.V, margins.K, 0, MOST_DOUBTS
    weights = np.ones((K, V), object) if measure.weights is None else measure.weights
    weights = weights.astype(np.int64) if np.prod(weights.sum(1)) < 2**62 else weights
    for q, m in np.argwhere(measure.counted.any(-1)).tolist():
        g, own = (np.delete(part, m, -1) for part in margins.terms(m, slice(q, q + 1)))
        g, own = g[:, :, 0], own[0] + margins.slack(np.abs(own[0]) + np.abs(g[:, :, 0]).max(1, initial=0).sum(0))
        for box in _boxes(K - 1, m, q == m):
            left, right = (np.array(list(product(*part)), int).reshape(-1, len(part)).T for part in (box[: K // 2], box[K // 2 :]))
            ahead = sum((g[p, tokens].T for p, tokens in enumerate(left)), np.zeros((V - 1, left.shape[1])))
            after = sum((g[p, tokens].T for p, tokens in enumerate(right, len(left))), np.repeat(own[:, None], right.shape[1], 1))
            ways = [weights[range(p, p + len(part)), part.T].prod(1) for p, part in ((0, left), (len(left), right))]
            step = max(1, (1 << 17) // max(after.size, 1))
            for rows in (slice(start, start + step) for start in range(0, left.shape[1], step)):
                worst = (ahead[:, rows, None] + after[:, None]).max(0, initial=-np.inf)
                proved = worst < 0
                for i, j in np.argwhere(~proved & ~(worst > margins.refuted))[:doubts].tolist():
                    tokens, doubts = [[int(t)] for t in (*left[:, rows][:, i], *right[:, j])], doubts - 1
                    proved[i, j] = all(margins.settle(q, m, x, K - 1, tokens) for x in range(V) if x != m)
                below = (left[:, rows] < m).sum(0)[:, None] + (right < m).sum(0)
                found += int(ways[0][rows] @ ((proved & measure.counted[q, m][below]) @ ways[1])) * int(weights[-1][q])
    return found


def _boxes(places: int, m: int, query_is_largest: bool) -> list[list[range]]:
    """Split the tokens <= m in the places, one of them m unless the query is, into boxes by the first place that holds m."""
    if query_is_largest:
        return [[range(m + 1)] * places]
    return [[range(m)] * i + [range(m, m + 1)] + [range(m + 1)] * (places - 1 - i) for i in range(places)]
