"""An upper bound of the mean cross-entropy over all inputs, from the margins of the cubic strategy
per competitor.

In the cell (q, m, c) the margin over x of a sequence whose smaller tokens all equal k is at most

    F_x(k) = max_s (s e^{a_qm} B_m + e^{a_qq + b_q} B_q + (T - s) e^{a_qk} B_k) / (the same with B =
    1), B_t = EV[t,x] - EV[t,m] + p_x + D[q,x] - D[q,m],

s at its ends as in `assay.proofs.max_of_k.strategies.cubic`; a mixture of tokens has no larger one
than the worst of them, and no mean exceeds the largest of its values. With the tokens below m in
any order, (r^c - (r-1)^c) C(K-1, c) sequences have token number r as their last one, and each of
them loses at most log(1 + sum_x exp(max over the first r of F_x)). The order is advice: any is
sound, and the tokens that lose least come first."""

from __future__ import annotations

import time
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import ceil, comb
from typing import Any

import numpy as np
from flint import arb, ctx
from numpy.typing import NDArray

from assay.bounds import rounding
from assay.bounds.rounding import Array, Interval
from assay.errors import AssayError
from assay.proofs.max_of_k.strategies.base import Problem
from assay.proofs.max_of_k.strategies.cubic import shares
from assay.proofs.max_of_k.tables import FoldedTables, over
from assay.targets.max_of_k import Weights

STRATEGY = "cubic"
_SCALE = 40  # losses are summed as integers in units of 2^-40 nats, rounded up
_REACH = 600.0  # margins beyond lead to no bound
_GRID = 64.0
_LOST = 2.0**-900

Orders = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class LossBound:
    """A proved upper bound of the mean loss in nats (at level float64: not proved), and the CPU
    seconds it took.

    orders: (query, largest, count, rank), the tokens below the largest in the order that the proof
    takes them."""

    bound: Fraction
    level: str
    seconds: float
    orders: Orders

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
    V, K = tables.vocabulary, tables.positions
    orders, total = np.zeros((V, V, K, V), np.uint8 if V <= 256 else np.int16), 0
    for m in range(V):
        for c in range(K if m else 1):
            queries = slice(0, m + 1) if c < K - 1 else slice(m, m + 1)
            worst = _margins(tables, m, c, queries)  # c = 0: one pretended token
            order = _by_loss(worst)
            if c:
                orders[queries, m, c, :m] = order
            total += _cell_losses(tables, c, worst, order)
    bound = Fraction(total, V**K << _SCALE)
    return LossBound(bound, level, time.process_time() - began, orders)


def _by_loss(worst: Array) -> NDArray[np.intp]:
    """Return the tokens of each query by what they lose alone, (queries, rank)."""
    with np.errstate(over="ignore"):
        return np.argsort(np.exp(worst).sum(-1), axis=1, kind="stable")


def _cell_losses(tables: FoldedTables, c: int, worst: Array, order: NDArray[np.intp]) -> int:
    """Return the summed losses, in units of 2^-40, of the cells (q, m, c) for all q, from the
    margins (queries, tokens, x) and an order of the tokens.
    """
    worst = np.maximum.accumulate(np.take_along_axis(worst, order[:, :, None], 1), axis=1)
    loss = _softplus(tables, worst)
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


def _margins(tables: FoldedTables, m: int, c: int, queries: slice) -> Array:
    """Return upper bounds of F_x(k), (queries, k < m, x != m); for c = 0 of the one sequence,
    (queries, 1, x != m).
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
    largest = np.full(values[2].shape, -np.inf)
    for copies, rest in shares(tables, c, queries):
        places = [
            tables.product(over(copies, _column), at_max),
            over(own, _column),
            tables.product(over(rest, _column), others),
        ]
        ratio = _mean(
            tables, [over(place, lambda end: end[:, :, None]) for place in places], values
        )
        largest = np.maximum(largest, ratio)
    return largest


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
    return rounding.exp_interval(wholes, wholes).hi, rounding.exp_interval(parts, parts).hi


@cache
def _logarithms() -> tuple[Array, float]:
    with ctx.workprec(128):
        logs = [rounding.ball_interval((1 + arb(i) / 256).log())[1] for i in range(256)]
        return np.array(logs), rounding.ball_interval(arb(2).log())[1]
