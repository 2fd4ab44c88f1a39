"""The folded tables of a max-of-K transformer, at three levels of rigour.

With `Eq = E + P[K-1]`, query token q in the last position and token k at position p, the score is
`a[q,k] + b[q,p]`, what the head writes is `EV[k] + PV[p]` and the direct path is `D[q]`; biases
fold in exactly. Every proof rests on one fact: attention weights are positive and share a
denominator, so for any competitor x of the largest token m

    sign(logit_x - logit_m) = sign(sum_p g_p(t_p)),
    g_p(k) = exp(a[q,k] + b[q,p]) (EV[k,x] - EV[k,m] + PV[p,x] - PV[p,m] + D[q,x] - D[q,m]),

a sum over positions that can be bounded term by term (compare arXiv 2406.11779, where the same
cases need convexity)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from assay.bounds import exact, rounding
from assay.bounds.rounding import Array, Interval
from assay.errors import InputError, unknown
from assay.proofs.max_of_k.execution import logit_error
from assay.targets.max_of_k import Weights

LEVELS = ("float64", "real", "float32")


@dataclass(frozen=True)
class Outputs:
    """Enclosures of what tokens and positions write through the head: EV (V, V) key by output and
    PV (K, V).

    `slack` (V,) per query is added to every margin: twice the rounding error of the executed
    network at level float32, else 0. `replaced` holds upper bounds (m, x) of logit_x - logit_m that
    stand for a whole part: `direct` for every query token, `positions_ov` for every position."""

    level: str
    EV: Interval
    PV: Interval
    slack: Array
    replaced: Mapping[str, Array]

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

    @property
    def down(self) -> Callable[[Array], Array]:
        """Round down after an operation (the identity at level float64)."""
        return _same if self.level == "float64" else rounding.down

    def times(self, weight: Interval, value: Array) -> Array:
        """Return an upper bound of weight * value for non-negative weights."""
        high = weight.hi * value
        return self.up(high if weight.lo is weight.hi else np.maximum(high, weight.lo * value))

    def product(self, left: Interval, right: Interval) -> Interval:
        """Return an enclosure of the product of two non-negative intervals."""
        high = left.hi * right.hi
        low = high if left.lo is left.hi and right.lo is right.hi else left.lo * right.lo
        return (
            Interval(low, high)
            if self.level == "float64"
            else Interval(np.maximum(rounding.down(low), 0.0), self.up(high))
        )

    def ov(self, m: int, tokens: slice | Array = slice(None)) -> Array:
        """Return upper bounds of EV[k,x] - EV[k,m], shape (tokens, V)."""
        return self.up(self.EV.hi[tokens] - self.EV.lo[tokens, m : m + 1])

    def position_ov(self, m: int) -> Array:
        """Return upper bounds of PV[p,x] - PV[p,m], shape (K, V)."""
        if "positions_ov" in self.replaced:
            return _repeat(self.replaced["positions_ov"][m], self.positions)
        return self.up(self.PV.hi - self.PV.lo[:, m : m + 1])


@dataclass(frozen=True)
class FoldedTables(Outputs):
    """All folded tables, with V tokens and K positions: a (V, V) query by key; b (V, K); D (V, V)
    query by output.

    `ea` and `eb` are exp(a - max a) and exp(b - max b), maxima per query: a positive factor per
    query changes no sign. At level float64 both ends of an enclosure are one array of unproved
    numbers."""

    a: Interval
    b: Interval
    D: Interval
    ea: Interval
    eb: Interval

    def direct(self, m: int) -> Array:
        """Return upper bounds of D[q,x] - D[q,m] plus the slack, shape (V, V)."""
        if "direct" in self.replaced:
            return self.up(
                _repeat(self.replaced["direct"][m], self.vocabulary) + self.slack[:, None]
            )
        return self.up(self.up(self.D.hi - self.D.lo[:, m : m + 1]) + self.slack[:, None])


def over(x: Interval, change: Callable[[Array], Array]) -> Interval:
    """Apply a change of shape to both ends; ends that are one array stay one."""
    low = change(x.lo)
    return Interval(low, low if x.lo is x.hi else change(x.hi))


@dataclass(frozen=True)
class Algebra:
    """Matrix products at a level: float64 arrays (which may count operations), or exact dyadic
    matrices.
    """

    rigorous: bool

    def lift(self, x: ArrayLike) -> Any:
        """Return a matrix (a vector as one row) to which `@`, `+`, `-` and `.T` apply."""
        if self.rigorous:
            return exact.dyadic(x)
        x = np.asanyarray(x).astype(np.float64)
        return x if x.ndim == 2 else x[None]

    def ones(self, count: int) -> Any:
        """Return a column of ones: `ones(n) @ row` repeats a row."""
        return self.lift(np.ones((count, 1)))

    def enclose(self, x: Any) -> Interval:
        """Return the float64 enclosure of a product."""
        return x.interval() if self.rigorous else Interval(x, x)

    def divide_by_root(self, x: Interval, n: int) -> Interval:
        """Return an enclosure of x / sqrt(n)."""
        if not self.rigorous:
            value = x.lo / np.sqrt(float(n))
            return Interval(value, value)
        if math.isqrt(n) ** 2 == n:
            return x / float(math.isqrt(n))
        return x / Interval(rounding.sqrt_down(float(n)), rounding.sqrt_up(float(n)))

    def exp(self, x: Interval) -> Interval:
        """Return an enclosure of exp(x - max of each row's upper ends)."""
        if not self.rigorous:
            value = np.exp(x.lo - x.lo.max(1, keepdims=True))
            return Interval(value, value)
        shifted = x - x.hi.max(1, keepdims=True)
        return exact.exp_interval(shifted.lo, np.minimum(shifted.hi, 0.0))

    def growth(self, error: Array) -> Array:
        """Return upper bounds of exp(error), infinite where they overflow."""
        if self.rigorous:
            error = np.where(np.isnan(error), np.inf, error)
            return exact.exp_interval(error, error).hi
        with np.errstate(over="ignore"):
            return np.exp(error)


@dataclass(frozen=True)
class TableFactors:
    """The lifted factors of the tables: Eq and query with one row per token, keys = K^T, values
    = V O U, and the direct bias as one row.
    """

    level: str
    algebra: Algebra
    head: int
    E: Any
    P: Any
    Eq: Any
    query: Any
    keys: Any
    values: Any
    U: Any
    bias: Any


def factor(w: Weights, level: str) -> TableFactors:
    """Return the factors of the tables at a level; the arrays of `w` may be counting arrays.

    The levels are `float64` (search: nothing is proved), `real` (rigorous for the network in real
    arithmetic) and `float32` (rigorous for the network as executed in float32). Raises InputError
    for an unknown level."""
    if level not in LEVELS:
        raise unknown("level", level, LEVELS)
    algebra = Algebra(level != "float64")
    if algebra.rigorous:
        rounding.check_arithmetic()
    E, P, Q, K, V, O, U = (algebra.lift(x) for x in (w.E, w.P, w.Q, w.K, w.V, w.O, w.U))
    rows = algebra.ones(w.vocabulary)
    Eq = E + rows @ algebra.lift(w.P[-1])
    query = Eq @ Q + rows @ algebra.lift(w.q_bias)
    bias = (algebra.lift(w.v_bias) @ O + algebra.lift(w.o_bias)) @ U + algebra.lift(w.u_bias)
    return TableFactors(level, algebra, w.head, E, P, Eq, query, K.T, V @ O @ U, U, bias)


def fold(f: TableFactors, weights: Weights, *, exp_ulp: float = 2.0) -> FoldedTables:
    """Fold the factors into tables; `exp_ulp` is the assumed accuracy, in units in the last place,
    of the executed exponential.

    Raises InputError when the tables overflow float64.
    """
    out = outputs(f, weights, exp_ulp=exp_ulp)
    enclose = f.algebra.enclose
    with np.errstate(over="ignore", invalid="ignore"):
        a, b = (
            f.algebra.divide_by_root(enclose(f.query @ f.keys @ tokens.T), f.head)
            for tokens in (f.E, f.P)
        )
        direct = enclose(f.Eq @ f.U + f.algebra.ones(weights.vocabulary) @ f.bias)
    for name, table in {"a": a, "b": b, "D": direct}.items():
        _require_finite(name, table)
    return FoldedTables(
        out.level,
        out.EV,
        out.PV,
        out.slack,
        out.replaced,
        a,
        b,
        direct,
        f.algebra.exp(a),
        f.algebra.exp(b),
    )


def outputs(f: TableFactors, weights: Weights, *, exp_ulp: float = 2.0) -> Outputs:
    """Return the tables of what is written through the head, alone; as `fold` otherwise."""
    with np.errstate(over="ignore", invalid="ignore"):
        ev, pv = f.algebra.enclose(f.E @ f.values), f.algebra.enclose(f.P @ f.values)
    _require_finite("EV", ev)
    _require_finite("PV", pv)
    executed = f.level == "float32"
    slack = (
        2.0 * logit_error(weights, exp_ulp=exp_ulp).max(1)
        if executed
        else np.zeros(weights.vocabulary)
    )
    return Outputs(f.level, ev, pv, slack, {})


def _require_finite(name: str, table: Interval) -> None:
    if not (np.isfinite(table.lo).all() and np.isfinite(table.hi).all()):
        raise InputError(
            f"the table {name} overflows float64; no bound can be given for these weights"
        )


def _same(x: Array) -> Array:
    return x


def _repeat(row: Array, count: int) -> Array:
    return np.broadcast_to(row, (count, *row.shape), subok=True)
