"""The inequality behind every claim, first in float64 with error bounds, then in balls.

The answer m beats x on tokens t with the query q last iff sum_p g_p(t_p) < 0 (the attention weights share a denominator), where

    g_p(k) = exp(a[q,k] + b[q,p]) (EV[k,x] - EV[k,m] + PV[p,x] - PV[p,m] + D[q,x] - D[q,m]).

A sum over positions is maximised term by term. In float64, with tables within one rounding, |value| <= R, a weight within 8
roundings and a value within 8 R roundings, w (value + 2**-48 R) is above the real term, and a sum of K of them errs by less
than K 2**-51 times the sum of magnitudes. What stays within these errors of zero is settled in balls of 128 and 1024 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
from flint import arb, ctx, fmpq_mat

from assay_check.model import Model, floats


class Margins:
    """Upper bounds of the terms g for a model whose logits may be off by `error` (query, token)."""

    def __init__(self, model: Model, error: np.ndarray):
        self.V, self.K, self.head = (model.sizes[name] for name in ("vocabulary", "positions", "head"))
        self.exact, self.error = [table.tolist() for table in (model.a, model.b, model.EV, model.PV, model.D)], error
        self.ea, self.eb = (_exponentials(scores, self.head) for scores in (model.a, model.b))
        self.EV, self.PV, self.D = (floats(table) for table in (model.EV, model.PV, model.D))
        R = 2 * sum(float(np.abs(table).max()) for table in (self.EV, self.PV, self.D, error))
        self.extra, self.lost = 2.0**-48 * R, 2.0**-1000 * (1 + R)  # `lost` is more than what underflow can lose
        self.refuted = 4 * self.K * (self.K + 1) * self.extra + 2 * self.lost  # an upper bound this large is of a positive margin

    def terms(self, m: int, queries: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return g of the non-query positions, (K - 1, m + 1, Q, V) over (position, token, query, x), and of the query's, (Q, V)."""
        token, place = (self.EV - self.EV[:, m : m + 1])[: m + 1], self.PV - self.PV[:, m : m + 1]
        direct = ((self.D - self.D[:, m : m + 1]) + (self.error + self.error[:, m : m + 1]) + self.extra)[queries]
        weights = self.eb[queries].T[:-1, None, :] * self.ea[queries, : m + 1].T
        g = ((token + place[:-1, None])[:, :, None] + direct) * weights[..., None]
        return g, (self.ea.diagonal()[queries] * self.eb[queries, -1])[:, None] * (token[queries] + place[-1] + direct)

    def slack(self, sizes: np.ndarray) -> np.ndarray:
        """Return the error of a sum of K terms whose magnitudes sum to `sizes`."""
        return self.K * 2.0**-51 * sizes + self.lost

    def hold(self, sets: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Return which of the wanted cells (family, q, m, c) are right with the tokens `sets` (family, q, m, c, k)."""
        holds = np.zeros_like(wanted)
        for m in range(self.V):
            step = max(1, (1 << 17) // (self.K * (m + 1) * self.V))
            for queries in (slice(start, min(start + step, m + 1)) for start in range(0, m + 1, step)):
                if wanted[:, queries, m].any():
                    with np.errstate(all="ignore"):
                        holds[:, queries, m] = self._hold(sets[:, queries, m], wanted[:, queries, m], m, queries)
        return holds

    def _hold(self, sets: np.ndarray, wanted: np.ndarray, m: int, queries: slice) -> np.ndarray:
        g, own = self.terms(m, queries)
        holds, stay, running = np.zeros_like(wanted), g[:, m], np.maximum.accumulate(g[:, :m], axis=1)
        for family, c in np.argwhere(wanted.any(1)).tolist():
            S, change = sets[family, :, c, :m], stay
            if c > 0 and (S[:, 1:] <= S[:, :-1]).all():  # boxes {0..j}
                change = running[:, np.maximum(S.sum(1), 1) - 1, np.arange(len(S))]
            elif c > 0:
                change = np.where(S.T[:, :, None], g[:, :m], -np.inf).max(1)
            margin = largest_sum(own, stay, change, c, np.maximum)
            slack = self.slack(np.abs(own) + np.maximum(np.abs(stay), np.abs(change)).sum(0))
            margin[:, m] = -np.inf
            for row in np.flatnonzero(wanted[family, :, c]).tolist():
                refuted = (margin[row] > self.refuted).any()
                doubtful = np.flatnonzero(~(margin[row] + slack[row] < 0)).tolist()
                tokens = [np.flatnonzero(S[row]).tolist()] * (self.K - 1)
                holds[family, row, c] = not refuted and all(self.settle(queries.start + row, m, x, c, tokens) for x in doubtful if x != m)
        return holds

    def settle(self, q: int, m: int, x: int, c: int, tokens: Sequence[Sequence[int]]) -> bool:
        """Return whether it is proved that m beats x while any c non-query positions p hold any of tokens[p] and the others m."""
        a, b, EV, PV, D = self.exact
        top = max(a[q][: m + 1]) + max(b[q])
        for bits in (128, 1024):
            with ctx.workprec(bits):
                root, error = arb(self.head).sqrt(), arb(float(self.error[q, x])) + arb(float(self.error[q, m]))

                def g(p: int, k: int) -> arb:
                    value = EV[k][x] - EV[k][m] + PV[p][x] - PV[p][m] + D[q][x] - D[q][m]
                    return (arb(a[q][k] + b[q][p] - top) / root).exp() * (arb(value) + error)

                stay = [g(p, m) for p in range(self.K - 1)]
                change = [reduce(arb.max, [g(p, k) for k in tokens[p]]) for p in range(self.K - 1)] if c else stay
                margin = largest_sum(g(self.K - 1, q), stay, change, c, arb.max)
                if margin < 0 or margin > 0:
                    return bool(margin < 0)
        return False


def largest_sum(own: Any, stay: Any, change: Any, c: int, larger: Callable[[Any, Any], Any]) -> Any:
    """Return the largest own + sum_p (stay_p or change_p) with exactly c changes, c <= the number of positions."""
    best = [own]
    for here, there in zip(stay, change, strict=True):
        kept, moved = [value + here for value in best], [value + there for value in best]
        best = [kept[0], *map(larger, kept[1:], moved[:-1]), moved[-1]][: c + 1]
    return best[c]


def _exponentials(scores: fmpq_mat, head: int) -> np.ndarray:
    """Return exp((s - its row's maximum) / sqrt(head)) within one rounding; NaN where that cannot be promised."""

    def exponential(score: arb) -> float:
        value = arb(0) if score < -800 else score.exp()  # below float64's range
        return float(value) if value.rel_accuracy_bits() > 60 else float("nan")

    with ctx.workprec(128):
        root = arb(head).sqrt()
        return np.array([[exponential(arb(s - max(row)) / root) for s in row] for row in scores.tolist()])
