"""An upper bound of the mean cross-entropy over all inputs, from the margins of the cubic strategy
per competitor.

In the cell (q, m, c), with the copies of m at positional weight s out of T, the margin over x of a
sequence whose smaller tokens all equal k is at most

    F_x(k, s) = (s e^{a_qm} B_m + e^{a_qq + b_q} B_q + (T - s) e^{a_qk} B_k)
                / (the same with B = 1),
    B_t = EV[t,x] - EV[t,m] + p_x + D[q,x] - D[q,m],

with p_x as in `assay.proofs.max_of_k.strategies.cubic`. The margins of a mixture of tokens, and
those at any s, are means of these (over tokens, and over the smallest and the largest s), with
weights that are the same for all x. The loss log(1 + sum_x exp(margin_x)) is convex, so it is at
most the largest that a token of the sequence has at either end of s. With the tokens in the order
of what they lose so, (r^c - (r-1)^c) C(K-1, c) sequences have token number r as their worst."""

from __future__ import annotations

import time
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import ceil, comb
from typing import Any

import numpy as np
from flint import arb, ctx

from assay.bounds import exact, rounding
from assay.bounds.rounding import Array, Interval
from assay.errors import AssayError
from assay.progress import progress
from assay.proofs.max_of_k.strategies.base import Problem
from assay.proofs.max_of_k.strategies.cubic import shares
from assay.proofs.max_of_k.tables import FoldedTables, over
from assay.targets.max_of_k import Weights

STRATEGY = "cubic"
_SCALE = 40  # losses are summed as integers in units of 2^-40 nats, rounded up
_REACH = 600.0  # margins beyond lead to no bound
_GRID = 64.0
_LOST = 2.0**-900


@dataclass(frozen=True)
class LossBound:
    """A proved upper bound of the mean loss in nats (at level float64: not proved), and the CPU
    seconds it took.
    """

    bound: Fraction
    level: str
    seconds: float

    @property
    def claimed(self) -> Fraction:
        """What a certificate claims: the bound and a millionth of it, rounded up, so that a checker
        whose arithmetic rounds otherwise can still confirm it.
        """
        unit = 1 << _SCALE
        return Fraction(ceil(self.bound * (1 + Fraction(1, 1 << 20)) * unit), unit)

    @property
    def proved(self) -> bool:
        return self.level != "float64"

    def to_json(self) -> dict[str, Any]:
        """Return plain values: what a certificate claims, as a float that is not below it and as a
        fraction.
        """
        return {
            "quantity": "mean cross-entropy over all inputs, in nats, at most",
            "strategy": STRATEGY,
            "level": self.level,
            "bound": float(rounding.up(float(self.claimed))),
            "fraction": str(self.claimed),
            "proved": self.proved,
            "seconds": self.seconds,
        }


def bound_cross_entropy(
    weights: Weights, level: str = "real", *, exp_ulp: float = 2.0
) -> LossBound:
    """Bound the mean cross-entropy at the last position over all V^K inputs from above.

    Raises AssayError when a margin's bound is too large for a loss in float64.
    """
    began = time.process_time()
    tables = Problem(weights, level, exp_ulp).tables
    V, K, total = tables.vocabulary, tables.positions, 0
    for m in progress(range(V), "largest tokens"):
        for c in range(K if m else 1):
            queries = slice(0, m + 1) if c < K - 1 else slice(m, m + 1)
            total += _cell_losses(tables, m, c, queries)
    return LossBound(Fraction(total, V**K << _SCALE), level, time.process_time() - began)


def _cell_losses(tables: FoldedTables, m: int, c: int, queries: slice) -> int:
    """Return the summed losses, in units of 2^-40, of the cells (q, m, c) for all q."""
    ends = [_softplus(tables, margins) for margins in _margins(tables, m, c, queries)]
    loss = np.sort(np.maximum(*ends), axis=1)  # (queries, tokens); one pretended token for c = 0
    if not np.isfinite(loss).all() or loss.max() > 1e5:
        raise AssayError("the cross-entropy has no useful bound: a margin is too large")
    units = (
        np.ceil(loss * 2.0**_SCALE).astype(np.int64).astype(object)
    )  # the product is exact, so that ceil rounds up
    ranks = range(1, units.shape[1] + 1)
    ways = [1] if c == 0 else [r**c - (r - 1) ** c for r in ranks]
    return comb(tables.positions - 1, c) * sum(
        int(column.sum()) * count for column, count in zip(units.T, ways, strict=True)
    )


def _margins(tables: FoldedTables, m: int, c: int, queries: slice) -> list[Array]:
    """Return upper bounds of F_x(k, s) at both ends of s, each (queries, k < m, x != m); for c = 0
    of the one sequence, (queries, 1, x != m).
    """
    up, rows, keys = (
        tables.up,
        np.arange(tables.vocabulary)[queries],
        np.arange(m) if c else np.array([m]),
    )
    written = np.delete(up(tables.ov(m, slice(m + 1)) + tables.position_ov(m).max(0)), m, axis=1)
    direct = np.delete(tables.direct(m)[queries], m, axis=1)
    values = [
        up(written[m] + direct)[:, None],
        up(written[rows] + direct)[:, None],
        up(written[keys] + direct[:, None]),
    ]
    at_max = over(tables.ea, lambda end: end[queries, m][:, None])
    own = tables.product(
        over(tables.ea, lambda end: end[rows, rows]), over(tables.eb, lambda end: end[queries, -1])
    )
    others = over(tables.ea, lambda end: end[queries][:, keys])
    ends = []
    for copies, rest in shares(tables, c, queries):
        places = [
            tables.product(over(copies, _column), at_max),
            over(own, _column),
            tables.product(over(rest, _column), others),
        ]
        wide = [over(place, lambda end: end[:, :, None]) for place in places]
        ends.append(_mean(tables, wide, values))
    return ends


def _mean(tables: FoldedTables, weights: list[Interval], values: list[Array]) -> Array:
    """Return upper bounds of the means of values with non-negative weights: the largest value where
    the weights are lost to underflow.
    """
    top, low, high = np.zeros(()), np.zeros(()), np.zeros(())
    for weight, value in zip(weights, values, strict=True):
        top = tables.up(top + tables.times(weight, value))
        low, high = np.maximum(tables.down(low + weight.lo), 0.0), tables.up(high + weight.hi)
    largest = np.maximum(np.maximum(values[0], values[1]), values[2])
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = tables.up(np.maximum(top / low, top / high))
    return np.where((low > _LOST) & (mean < largest), mean, largest)


def _column(end: Array) -> Array:
    return end[:, None]


def _softplus(tables: FoldedTables, margins: Array) -> Array:
    """Return upper bounds of log(1 + sum_x exp(margin_x))."""
    if tables.level == "float64":
        return np.log1p(np.exp(np.minimum(margins, 700.0)).sum(-1))
    return _log_up(rounding.up(1.0 + rounding.sum_up(_exp_up(margins), axis=-1)))


def _exp_up(x: Array) -> Array:
    """Return upper bounds of exp: balls at an integer and at a 64th, times 1 + r + r^2 >= e^r
    for the rest r.
    """
    near = np.clip(x, -_REACH, _REACH)
    whole = np.floor(near)
    part = np.floor((near - whole) * _GRID).clip(0, _GRID - 1)
    rest = np.maximum(rounding.up(rounding.up(near - whole) - part / _GRID), 0.0)
    wholes, parts = _exponentials()
    value = rounding.up(wholes[(whole + _REACH).astype(int)] * parts[part.astype(int)])
    value = rounding.up(value * rounding.up(1.0 + rounding.up(rest + rounding.up(rest * rest))))
    return np.where(x <= _REACH, value, np.inf)


def _log_up(z: Array) -> Array:
    """Return upper bounds of log z for z >= 1: with z = 2^e f, the tangent of log at a 256th
    below f in [1, 2).
    """
    fraction, exponent = np.frexp(np.where(np.isfinite(z), z, 1.0))
    f, e = 2.0 * fraction, exponent - 1.0
    index = np.floor((f - 1.0) * 256.0).astype(int)
    point = 1.0 + index / 256.0
    logs, two = _logarithms()
    value = rounding.up(
        rounding.up(e * two) + rounding.up(logs[index] + rounding.up((f - point) / point))
    )
    return np.where(np.isfinite(z), value, np.inf)


@cache
def _exponentials() -> tuple[Array, Array]:
    wholes, parts = np.arange(-_REACH, _REACH + 1.0), np.arange(_GRID) / _GRID
    return exact.exp_interval(wholes, wholes).hi, exact.exp_interval(parts, parts).hi


@cache
def _logarithms() -> tuple[Array, float]:
    with ctx.workprec(128):
        logs = [exact.ball_interval((1 + arb(i) / 256).log())[1] for i in range(256)]
        return np.array(logs), exact.ball_interval(arb(2).log())[1]
