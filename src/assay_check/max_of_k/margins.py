"""The inequality behind every claim of right answers, first in float64 with error bounds, then in
balls.

The answer m beats x on tokens t with the query q last iff sum_p g_p(t_p) < 0 (the attention weights
share a denominator), where

    g_p(k) = exp(a[q,k] + b[q,p]) (EV[k,x] - EV[k,m] + PV[p,x] - PV[p,m] + D[q,x] - D[q,m]).

In a cell (q, m, c) with tokens S the sum is largest when the c positions p where max_{k in S}
g_p(k) - g_p(m) is largest hold these k. In float64, u = 2**-53, with tables within 2u and values up
to R, a weight errs by less than 8u of itself, a value by 8u R and a sum of K terms by K u of their
sizes: weight * (value + 32 K u R) makes up for all. What is then not negative is settled in balls.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np
from flint import arb, ctx, fmpq_mat

from assay_check.max_of_k.measure import Measure
from assay_check.max_of_k.model import Model, floats


class Margins:
    """Upper bounds of margins for a model whose logits may be off by `error` (query, token)."""

    def __init__(self, model: Model, error: np.ndarray):
        tables = (model.a, model.b, model.EV, model.PV, model.D)
        self.exact, self.error, self.head = [table.tolist() for table in tables], error, model.head
        self.ea, self.eb = (exponentials(scores, model.head) for scores in tables[:2])
        self.EV, self.PV, self.D = map(floats, tables[2:])
        R = 2 * sum(float(np.abs(table).max()) for table in (self.EV, self.PV, self.D, error))
        self.extra, self.room, self.lost = (
            2.0**-48 * model.K * R,
            2.0**-46 * model.K**2 * R,
            2.0**-1000 * (1 + R),
        )  # lost to underflow

    @np.errstate(all="ignore")
    def hold(self, sets: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Return which of the wanted cells (family, q, m, c) are right with the tokens `sets`
        (family, q, m, c, k).
        """
        holds, K = np.zeros_like(wanted), len(self.PV)
        for q, m in np.argwhere(wanted.any((0, 3))).tolist():
            token, place, direct = (
                table - table[:, m : m + 1] for table in (self.EV, self.PV, self.D[q : q + 1])
            )
            value = (
                token[: m + 1]
                + place[:, None]
                + (direct + (self.error[q] + self.error[q, m] + self.extra))
            )
            g = (self.eb[q, :, None] * self.ea[q, : m + 1])[..., None] * value
            own, stay, g = g[-1, q], g[:-1, m], g[:-1, : max(m, 1)]
            for S, want, hold in zip(
                sets[:, q, m, :, : max(m, 1)], wanted[:, q, m], holds[:, q, m], strict=True
            ):
                boxes, last = (
                    (S[:, 1:] <= S[:, :-1]).all(),
                    np.maximum(S.sum(1), 1) - 1,
                )  # boxes are {0..last}
                change = (
                    np.maximum.accumulate(g, axis=1)[:, last]
                    if boxes
                    else np.where(S[..., None], g[:, None], -np.inf).max(2)
                )
                best = np.full(
                    (K, *change.shape[1:]), -np.inf
                )  # by how many positions so far do not hold m
                best[0], best[0, :, m] = own, -np.inf
                for here, there in zip(stay, change, strict=True):
                    best[1:], best[0] = (
                        np.maximum(best[1:] + here, best[:-1] + there),
                        best[0] + here,
                    )
                margin = best[range(K), range(K)] + self.lost
                for c in np.flatnonzero(
                    want & ~(margin > 2 * self.lost + self.room * self.ea[q, : m + 1].max()).any(1)
                ).tolist():
                    doubtful, tokens = (
                        np.flatnonzero(~(margin[c] < 0)).tolist(),
                        [np.flatnonzero(S[c]).tolist()] * (K - 1),
                    )
                    hold[c] = all(self.settle(q, m, x, c, tokens) for x in doubtful if x != m)
        return holds

    def weigh_sequences(self, measure: Measure) -> int:
        """Return the weight of the single sequences that are proved right; of those in doubt,
        some thousands are settled in balls.
        """
        (K, V), found, doubts = measure.weights.shape, 0, 10_000
        grid, lane = (
            np.indices((V,) * (K - 1)).reshape(K - 1, V ** (K - 1)),
            np.arange(V ** (K - 1)),
        )
        weights = np.prod(
            [row[tokens] for row, tokens in zip(measure.weights, grid, strict=False)], axis=0
        )
        for q in range(V):
            w = (self.eb[q, :, None] * self.ea[q])[
                :, None
            ]  # (place, x, token); the sum of weights is one more x
            g = np.concatenate(
                [
                    w
                    * (self.EV + self.PV[:, None] + (self.D[q] + self.error[q])).transpose(0, 2, 1),
                    w,
                ],
                axis=1,
            )
            m, start = grid.max(0, initial=q), g[-1][:, [q]]
            sums = reduce(
                lambda sums, part: (sums[..., None] + part[:, None]).reshape(V + 1, -1),
                g[:-1],
                start,
            )
            answer, room = (
                sums[m, lane] - 2 * self.error[q, m] * sums[V],
                self.room * sums[V] + self.lost,
            )
            sums[m, lane] = -np.inf
            right = (other := sums[:V].max(0)) < answer - room
            for n in np.flatnonzero(~right & ~(other > answer + room))[:doubts].tolist():
                doubts, tokens = doubts - 1, grid[:, [n]].tolist()
                right[n] = all(
                    self.settle(q, int(m[n]), x, K - 1, tokens) for x in range(V) if x != m[n]
                )
            found += int(
                weights[right & measure.counted[q, m, (grid < m).sum(0)]].sum()
                * measure.weights[-1][q]
            )
        return found

    def settle(self, q: int, m: int, x: int, c: int, tokens: Sequence[Sequence[int]]) -> bool:
        """Return whether it is proved that m beats x while any c non-query positions p hold any
        of tokens[p] and the others m.
        """
        (a, b, EV, PV, D), errors = self.exact, self.error[q, [x, m]].tolist()
        top = max(a[q][: m + 1]) + max(b[q])

        def g(p: int, k: int) -> arb:
            value = EV[k][x] - EV[k][m] + PV[p][x] - PV[p][m] + D[q][x] - D[q][m]
            return (arb(a[q][k] + b[q][p] - top) / arb(self.head).sqrt()).exp() * (
                arb(value) + sum(map(arb, errors))
            )

        for bits in (128, 1024):
            with ctx.workprec(bits):
                best = [g(len(tokens), q)]  # by the number of positions so far that do not hold m
                for p, choice in enumerate(tokens):
                    stay, change = g(p, m), reduce(arb.max, [g(p, k) for k in choice])
                    kept, moved = (
                        [value + stay for value in best],
                        [value + change for value in best],
                    )
                    best = [kept[0], *map(arb.max, kept[1:], moved[:-1]), moved[-1]][: c + 1]
                if best[c] < 0:
                    return True
        return False


def exponentials(scores: fmpq_mat, head: int) -> np.ndarray:
    """Return exp((s - its row's maximum) / sqrt(head)) within 2u; NaN where that cannot be
    promised.
    """
    with ctx.workprec(128):
        rows = [
            [arb(s - top) / arb(head).sqrt() for s in row]
            for row in scores.tolist()
            for top in [max(row)]
        ]
        balls = [
            [arb(0) if s < -800 else s.exp() for s in row] for row in rows
        ]  # exp(-800) is below float64's range
        return np.array(
            [
                [float(ball) if ball.rel_accuracy_bits() > 60 else np.nan for ball in row]
                for row in balls
            ]
        )
