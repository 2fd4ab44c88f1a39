"""Lower bounds of the margins of a one-layer attention model, in balls.

With rhat what the features write at the positions, `r_p = rhat_p + e_p`, A = Q K^T / sqrt(h), and
q and k_p the query and the keys at rhat, a score's lead over another is at most

    q . (k_i - k_p) / sqrt(h) + e_K . Q (k_i - k_p) / sqrt(h) + K q . (e_i - e_p) / sqrt(h)
    + ||A||_F ||e_K|| ||e_i - e_p||,

which bounds the attention a_p from below; and attention adds at least `min v + sum_p a_p (v_p - min
v)` to a margin, where v_p is what position p would add if it had all of it."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from flint import arb, arb_mat, ctx

from assay_check.crosscoder.margins import BITS, Rows, norm, spread
from assay_check.crosscoder.model import MOST, balls
from assay_check.max_of_k.model import Model
from assay_check.reading import need


class Attention:
    """The weights as matrices of balls without radius, a bias as one row."""

    def __init__(self, data: bytes):
        model = Model(data)
        self.positions, self.head, self.entry = model.K, model.head, model.entry
        need(
            model.K <= 32 and model.V ** (model.K + 1) <= MOST,
            "too many sequences for this checker",
        )
        self.tokens = np.indices((model.V,) * model.K).reshape(model.K, -1).T
        (self.E, self.P, self.Q, self.K, self.V, self.O, self.U,
         self.b_Q, self.b_K, self.b_V, self.b_O, self.b_U) = map(balls, model.weights)  # fmt: skip


def right_points_of_attention(
    model: Attention, rule: str, arrays: dict[str, np.ndarray]
) -> list[bool]:
    """Return which sequences provably have the logit of their largest token above every other one;
    `decoder` (size, positions, width), `bias` (positions, width), `codes` (sequences, size).
    """
    compact = rule != "attention"
    with ctx.workprec(BITS):
        count, K = len(model.tokens), model.positions
        codes = balls(arrays["codes"])
        rebuilt, errors = [], []
        E, P = model.E.tolist(), model.P.tolist()
        for p in range(K):
            written = codes * balls(np.ascontiguousarray(arrays["decoder"][:, p]))
            rebuilt.append(written + spread(balls(arrays["bias"][p]), count))
            state = arb_mat([E[token] for token in model.tokens[:, p].tolist()])
            errors.append(state + spread(arb_mat([P[p]]), count) - rebuilt[p])
        sizes = [[norm(row) for row in error.tolist()] for error in errors]
        shares = _least_shares(model, rebuilt, errors, sizes, compact)
        out = model.O * model.U
        read = [x if compact else x + e for x, e in zip(rebuilt, errors, strict=True)]
        values = [((x * model.V + spread(model.b_V, count)) * out).tolist() for x in read]
        last = (read[-1] * model.U + spread(model.b_O * model.U + model.b_U, count)).tolist()
        back, ways = (model.V * out).transpose().tolist(), model.U.transpose().tolist()
        lost = {}
        for y in range(len(ways)):
            for k in range(len(ways)):
                lost[y, k] = [
                    norm([a - b for a, b in zip(table[y], table[k], strict=True)])
                    if compact else arb(0)
                    for table in (back, ways)
                ]  # fmt: skip
        right = []
        for i, y in enumerate(model.tokens.max(1).tolist()):
            good = True
            for k in range(len(ways)):
                through, beside = lost[y, k]
                each = [
                    v[i][y] - v[i][k] - through * s[i] for v, s in zip(values, sizes, strict=True)
                ]
                smallest = reduce(arb.min, each)
                bound = last[i][y] - last[i][k] - beside * sizes[-1][i] + smallest
                for share, value in zip(shares, each, strict=True):
                    bound = bound + share[i] * (value - smallest)
                good = good and (k == y or bool(bound > 0))
            right.append(good)
        return right


def _least_shares(
    model: Attention, rebuilt: list[arb_mat], errors: list[arb_mat], sizes: Rows, compact: bool
) -> Rows:
    """Return a lower bound of the attention to every position at every sequence."""
    count, K, root = len(model.tokens), model.positions, arb(model.head).sqrt()
    query = rebuilt[-1] * model.Q + spread(model.b_Q, count)
    keys = [x * model.K + spread(model.b_K, count) for x in rebuilt]
    steep = norm([x for row in (model.Q * model.K.transpose()).tolist() for x in row])
    of_key = (query * model.K.transpose()).tolist()
    of_query = [(key * model.Q.transpose()).tolist() for key in keys]
    queries, plain = query.tolist(), [key.tolist() for key in keys]
    shares: Rows = []
    for p in range(K):
        sums = [arb(1)] * count
        for other in range(K):
            if other == p:
                continue
            apart = (errors[other] - errors[p]).tolist()
            last = errors[-1].tolist()
            for i in range(count):
                lead = _dot(queries[i], _minus(plain[other][i], plain[p][i]))
                way = _minus(of_query[other][i], of_query[p][i])
                if compact:
                    ways = {K - 1: way}
                    for place, sign in ((other, 1), (p, -1)):
                        begun = ways.get(place, [arb(0)] * len(way))
                        ways[place] = [a + sign * b for a, b in zip(begun, of_key[i], strict=True)]
                    for place, one in ways.items():
                        lead = lead + norm(one) * sizes[place][i]
                    distance = sizes[other][i] + sizes[p][i]
                else:
                    lead = lead + _dot(way, last[i]) + _dot(of_key[i], apart[i])
                    distance = norm(apart[i])
                lead = lead + steep * sizes[-1][i] * distance
                sums[i] = sums[i] + (lead / root).exp()
        shares.append([1 / x for x in sums])
    return shares


def _minus(a: Sequence[arb], b: Sequence[arb]) -> list[arb]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _dot(a: Sequence[arb], b: Sequence[arb]) -> Any:
    return sum((x * y for x, y in zip(a, b, strict=True)), arb(0))
