"""The folded tables of a max-of-K transformer, at three levels of rigour.

With `Eq = E + P[K-1]`, query token q in the last position and token k at position p, the score is `a[q,k] + b[q,p]`, what the
head writes is `EV[k] + PV[p]` and the direct path is `D[q]`; biases fold in exactly. Every proof rests on one fact: attention
weights are positive and share a denominator, so for any competitor x of the largest token m

    sign(logit_x - logit_m) = sign(sum_p g_p(t_p)),
    g_p(k) = exp(a[q,k] + b[q,p]) (EV[k,x] - EV[k,m] + PV[p,x] - PV[p,m] + D[q,x] - D[q,m]),

a sum over positions that can be bounded term by term (compare arXiv 2406.11779, where the same cases need convexity).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from assay.bounds import rounding
from assay.bounds.rounding import Array, Dyadic, Interval
from assay.errors import InputError, unknown
from assay.proofs.execution import logit_error
from assay.targets.max_of_k import Weights

LEVELS = ("float64", "real", "float32")


@dataclass(frozen=True)
class Tables:
    """Enclosures of the folded tables; at level float64 both ends are one array of unproved numbers.

    Shapes with V tokens and K positions: a (V, V) query by key; b (V, K); EV (V, V) key by output; PV (K, V); D (V, V) query
    by output. `ea` and `eb` are exp(a - max a) and exp(b - max b), maxima per query: a positive factor per query changes no
    sign. `slack` (V,) is added to every margin: twice the rounding error of the executed network at level float32, else 0.
    `worst` names the parts that are replaced by their worst value: `direct`, `positions_ov`.
    """

    level: str
    a: Interval
    b: Interval
    EV: Interval
    PV: Interval
    D: Interval
    ea: Interval
    eb: Interval
    slack: Array
    worst: frozenset[str] = frozenset()

    @property
    def vocabulary(self) -> int:
        return int(self.EV.lo.shape[0])

    @property
    def positions(self) -> int:
        return int(self.PV.lo.shape[0])

    @property
    def up(self) -> Callable[[Array], Array]:
        """Round up after an operation (the identity at level float64)."""
        return _same if self.level == "float64" else rounding.up

    def with_worst(self, *parts: str) -> Tables:
        """Return the tables with further parts replaced by their worst value."""
        return replace(self, worst=self.worst | frozenset(parts))

    def times(self, weight: Interval, value: Array) -> Array:
        """Return an upper bound of weight * value for non-negative weights."""
        high = weight.hi * value
        return self.up(high if weight.lo is weight.hi else np.maximum(high, weight.lo * value))

    def product(self, left: Interval, right: Interval) -> Interval:
        """Return an enclosure of the product of two non-negative intervals."""
        high = left.hi * right.hi
        low = high if left.lo is left.hi and right.lo is right.hi else left.lo * right.lo
        return Interval(low, high) if self.level == "float64" else Interval(np.maximum(rounding.down(low), 0.0), self.up(high))

    def ov(self, m: int, tokens: slice | Array = slice(None)) -> Array:
        """Return upper bounds of EV[k,x] - EV[k,m], shape (tokens, V)."""
        return self.up(self.EV.hi[tokens] - self.EV.lo[tokens, m : m + 1])

    def position_ov(self, m: int) -> Array:
        """Return upper bounds of PV[p,x] - PV[p,m], shape (K, V)."""
        value = self.up(self.PV.hi - self.PV.lo[:, m : m + 1])
        return value if "positions_ov" not in self.worst else _repeat(value.max(0), len(value))

    def direct(self, m: int) -> Array:
        """Return upper bounds of D[q,x] - D[q,m] plus the slack, shape (V, V)."""
        value = self.up(self.up(self.D.hi - self.D.lo[:, m : m + 1]) + self.slack[:, None])
        return value if "direct" not in self.worst else _repeat(value.max(0), len(value))


def over(x: Interval, change: Callable[[Array], Array]) -> Interval:
    """Apply a change of shape to both ends; ends that are one array stay one."""
    low = change(x.lo)
    return Interval(low, low if x.lo is x.hi else change(x.hi))


def fold(weights: Weights, level: str = "real", *, exp_ulp: float = 2.0) -> Tables:
    """Fold the weights into tables at a level: `float64` (search), `real` (proof about real arithmetic), `float32` (as executed).

    `exp_ulp` is the assumed accuracy, in units in the last place, of the float32 exponential that executes the network.
    Raises InputError for an unknown level, or when the tables overflow float64.
    """
    if level not in LEVELS:
        raise unknown("level", level, LEVELS)
    if level == "float64":
        with np.errstate(over="ignore", invalid="ignore"):
            tables = floating(weights)
    else:
        tables = _rigorous(weights, level)
    for name in ("a", "b", "EV", "PV", "D"):
        interval = getattr(tables, name)
        if not (np.isfinite(interval.lo).all() and np.isfinite(interval.hi).all()):
            raise InputError(f"the table {name} overflows float64; no bound can be given for these weights")
    if level == "float32":
        tables = replace(tables, slack=2.0 * logit_error(weights, exp_ulp=exp_ulp).max(1))
    return tables


def floating(w: Weights) -> Tables:
    """Return the float64 tables; the arrays of `w` may be counting arrays."""
    E, P, U = _double(w.E), _double(w.P), _double(w.U)
    query = (E + P[-1:]) @ _double(w.Q) + _double(w.q_bias)
    root = np.sqrt(float(w.head))
    keys, values = query @ _double(w.K).T / root, _double(w.V) @ _double(w.O) @ U
    bias = (_double(w.v_bias) @ _double(w.O) + _double(w.o_bias)) @ U + _double(w.u_bias)
    a, b = keys @ E.T, keys @ P.T
    ea, eb = np.exp(a - a.max(1, keepdims=True)), np.exp(b - b.max(1, keepdims=True))
    tables = [Interval(x, x) for x in (a, b, E @ values, P @ values, (E + P[-1:]) @ U + bias, ea, eb)]
    return _tables("float64", tables)


def _rigorous(w: Weights, level: str) -> Tables:
    rounding.check_arithmetic()
    exact = exact_factors(w)
    root = Interval(rounding.sqrt_down(float(w.head)), rounding.sqrt_up(float(w.head)))
    if math.isqrt(w.head) ** 2 == w.head:
        root = Interval.exactly(float(math.isqrt(w.head)))
    a, b = ((exact["query"] @ exact["keys"] @ tokens.T).interval() / root for tokens in (exact["E"], exact["P"]))
    ea, eb = (rounding.exp_interval(*_ends(score - score.hi.max(1, keepdims=True))) for score in (a, b))
    ev, pv = ((exact[name] @ exact["values"]).interval() for name in ("E", "P"))
    direct = (exact["Eq"] @ exact["U"] + _rows(exact["bias"], w.vocabulary)).interval()
    return _tables(level, [a, b, ev, pv, direct, ea, eb])


def _tables(level: str, parts: list[Interval]) -> Tables:
    a, b, ev, pv, direct, ea, eb = parts
    return Tables(level, a, b, ev, pv, direct, ea, eb, slack=np.zeros(len(a.lo)))


def exact_factors(w: Weights) -> dict[str, Dyadic]:
    """Return the exact factors of the tables: Eq, query (with its bias), keys = K^T, values = V O U, E, P, U, bias."""
    E, P, U, O = (rounding.dyadic(x) for x in (w.E, w.P, w.U, w.O))
    Eq = E + _rows(rounding.dyadic(w.P[-1]), w.vocabulary)
    query = Eq @ rounding.dyadic(w.Q) + _rows(rounding.dyadic(w.q_bias), w.vocabulary)
    bias = (rounding.dyadic(w.v_bias) @ O + rounding.dyadic(w.o_bias)) @ U + rounding.dyadic(w.u_bias)
    factors = {"Eq": Eq, "query": query, "keys": rounding.dyadic(w.K).T, "values": rounding.dyadic(w.V) @ O @ U}
    return factors | {"E": E, "P": P, "U": U, "bias": bias}


def _rows(row: Dyadic, count: int) -> Dyadic:
    return rounding.dyadic(np.ones((count, 1))) @ row


def _ends(x: Interval) -> tuple[Array, Array]:
    return x.lo, np.minimum(x.hi, 0.0)


def _double(x: Array) -> Array:
    return x.astype(np.float64)


def _same(x: Array) -> Array:
    return x


def _repeat(row: Array, count: int) -> Array:
    return np.broadcast_to(row, (count, *row.shape))
