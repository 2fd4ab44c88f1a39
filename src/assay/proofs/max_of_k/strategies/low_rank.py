"""Low-rank explanations of the QK circuit and of the direct path, with bounds of what they leave
out.

For any vectors w, z the product of A and B splits exactly as `A B = (A w)(z B) + A (I - w z) B`, so
the residual of a low-rank explanation stays a product of thin factors, and nothing is dropped. A
row of a product differs between two columns by at most

    max_{i,j} (A B)_ri - (A B)_rj <= sum_k |A_rk| (max_i B_ki - min_i B_ki).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flint import arb, arb_mat, ctx

from assay.bounds import exact, rounding
from assay.bounds.rounding import Array, Interval
from assay.errors import InputError, unknown
from assay.proofs.max_of_k.strategies.base import Advice
from assay.proofs.max_of_k.tables import Algebra, TableFactors
from assay.targets.max_of_k import Weights

QK = ("exact", "range", "svd", "max_diff", "subproduct", "recursive")
DIRECT = ("exact", "max_diff", "direction", "global")


@dataclass(frozen=True)
class ExplainedScores:
    """Position-independent scores S (query by key) as explained, a bound per query of what two
    keys' residuals differ by, and the positional scores (query by position)."""

    content: Interval
    error: Array
    position: Interval


@dataclass(frozen=True)
class Direct:
    """The direct path as `shared_x + along_q * direction_x + own`, and bounds of what remains.

    Upper bounds: `shared` (m, x) of the differences shared_x - shared_m, and `own` (q, m) of the
    largest difference to m that the rest of row q has over all x."""

    shared: Array
    own: Array


def scores(f: TableFactors, advice: Advice, how: str) -> ExplainedScores:
    """Return the scores as explained under option `how`; `advice` holds `key_center` (d) and, for
    low rank, `query_directions` and `key_directions` (h, r).

    What all keys share changes no attention, so that the centre is free; it makes residuals small.
    """
    algebra, V = f.algebra, _rows(f.query)
    tokens = (f.E - algebra.ones(V) @ algebra.lift(advice["key_center"])).T
    position = algebra.divide_by_root(algebra.enclose(f.query @ f.keys @ f.P.T), f.head)
    if how == "exact":
        content = algebra.divide_by_root(algebra.enclose(f.query @ f.keys @ tokens), f.head)
        return ExplainedScores(content, np.zeros(V), position)
    W, Z = algebra.lift(advice["query_directions"]), algebra.lift(advice["key_directions"]).T
    rest = algebra.lift(np.eye(_columns(f.query))) - W @ Z
    explained = (f.query @ W) @ (Z @ (f.keys @ tokens))
    error = _row_error(algebra, how, [f.query, rest, f.keys, tokens])
    scaled = algebra.divide_by_root(Interval(error, error), f.head).hi
    return ExplainedScores(
        algebra.divide_by_root(algebra.enclose(explained), f.head), scaled, position
    )


def _row_error(algebra: Algebra, how: str, chain: Sequence[Any]) -> Array:
    """Return upper bounds of how far two entries of a row of a product can be apart."""
    if how == "range":
        return _ranges(algebra, _product(chain))
    if how == "svd":
        return np.full(
            _rows(chain[0]), np.sqrt(2.0) * (1 + 2.0**-50) * _largest_singular_value(algebra, chain)
        )
    if how == "recursive":
        spread = _ranges(algebra, chain[-1])
        for matrix in (chain[2], _product(chain[:2])):
            spread = _weighted(algebra, matrix, spread)
        return spread
    splits = range(1, len(chain)) if how == "subproduct" else [2]
    bounds = [
        _weighted(algebra, _product(chain[:at]), _ranges(algebra, _product(chain[at:])))
        for at in splits
    ]
    smallest = bounds[0]
    for other in bounds[1:]:
        smallest = np.minimum(smallest, other)
    return smallest


def direct_path(f: TableFactors, advice: Advice, how: str, *, anchored: bool) -> Direct:
    """Return the direct path as explained under option `how`; `advice` holds `query_center` (d)
    and, for `direction`, `direct_direction` (d).

    With `anchored`, differences are taken to the logit of m itself and not to any other one.
    """
    algebra, V = f.algebra, _rows(f.Eq)
    center = algebra.lift(advice["query_center"])
    shared = algebra.enclose(center @ f.U + f.bias)
    rest = f.Eq - algebra.ones(V) @ center
    between = _differences(algebra, shared)
    if how == "exact":
        rows = algebra.enclose(rest @ f.U)
        if anchored:
            return Direct(between, _up(algebra, largest_elsewhere(rows.hi) - rows.lo))
        return Direct(between, _spread(algebra, _ranges(algebra, rest @ f.U)))
    if how == "direction":
        w = algebra.lift(advice["direct_direction"])
        along, unit = algebra.enclose(rest @ w.T), algebra.enclose(w @ f.U)
        error = _weighted(algebra, rest - (rest @ w.T) @ w, _ranges(algebra, f.U))
        return Direct(
            between, _up(algebra, error[:, None] + _along(algebra, along, unit, anchored=anchored))
        )
    error = _weighted(algebra, rest, _ranges(algebra, f.U))
    if how == "global":
        error = np.broadcast_to(error.max(), error.shape)
    elif how != "max_diff":
        raise unknown("direct-path option", how, DIRECT)
    return Direct(between, _spread(algebra, error))


def find_advice(f: TableFactors, *, qk: str, direct: str, rank: int) -> dict[str, np.ndarray]:
    """Return float32 directions for low-rank explanations: singular directions of the scores,
    centred over keys.

    `f` holds float64 factors. Raises InputError for unknown options or a rank that the head cannot
    have."""
    if qk not in QK:
        raise unknown("QK option", qk, QK)
    if direct not in DIRECT:
        raise unknown("direct-path option", direct, DIRECT)
    if not 1 <= rank <= _columns(f.query):
        raise InputError(
            f"rank must be between 1 and {_columns(f.query)} (the head's width), got {rank}"
        )
    advice = {"key_center": _narrow(f.E.mean(0)), "query_center": _narrow(f.Eq.mean(0))}
    with np.errstate(all="ignore"):
        if qk != "exact":
            right = f.keys @ (f.E - advice["key_center"]).T
            left, values, keys = np.linalg.svd(f.query @ right, full_matrices=False)
            scale = np.sqrt(values[:rank])
            # (A w)(z B) is the leading part of the product A B for w = B v / sqrt(sigma), z = u A /
            # sqrt(sigma).
            advice["query_directions"] = _narrow(right @ keys[:rank].T / scale)
            advice["key_directions"] = _narrow(f.query.T @ left[:, :rank] / scale)
        if direct == "direction":
            rest = f.Eq - f.Eq.mean(0)
            main = np.linalg.svd(rest @ f.U, full_matrices=False)[0][:, 0] @ rest
            advice["direct_direction"] = _narrow(main / np.linalg.norm(main))
    return advice


def _narrow(x: Array) -> np.ndarray:
    """Return float32 entries, zero where float32 has none: advice only has to be finite."""
    with np.errstate(all="ignore"):
        narrow = x.astype(np.float32)
    return np.where(np.isfinite(narrow), narrow, np.float32(0.0))


def unexplained(weights: Weights, qk: str, direct: str, rank: int) -> int:
    """Return the unexplained dimensions of a sub-cubic proof: V^2 + V for the OV circuit, and those
    of both explanations.

    The counts are those of arXiv 2406.11779 for rank one; further ranks explain more with the same
    residual bound."""
    V, d = weights.vocabulary, weights.width
    scores = {"exact": V * V, "range": 4 * V, "svd": 2 * V, "max_diff": 2 * V + 2 * d}
    path = {"global": 2, "exact": 2 * V}
    return V * V + V + scores.get(qk, 2 * V + 2 * d) + path.get(direct, V * d + V + 2)


def largest_elsewhere(rows: Array) -> Array:
    """Return the largest entry of each row outside each column (minus infinity in a single
    column).
    """
    if rows.shape[1] == 1:
        return np.full_like(rows, -np.inf)
    pair = np.sort(rows, axis=1)[:, -2:]
    return np.where(rows == pair[:, 1:], pair[:, :1], pair[:, 1:])


def _along(algebra: Algebra, along: Interval, unit: Interval, *, anchored: bool) -> Array:
    """Return upper bounds of the largest along_q (unit_x - unit_m) over x: (q, m) if anchored,
    (q, 1) over all m otherwise.
    """
    top = _up(algebra, unit.hi.max() - (unit.lo if anchored else unit.lo.min(keepdims=True)))
    bottom = -_up(algebra, (unit.hi if anchored else unit.hi.max(keepdims=True)) - unit.lo.min())
    sides = [end * side for end in (along.lo, along.hi) for side in (top, bottom)]
    return _up(algebra, np.maximum(np.maximum(sides[0], sides[1]), np.maximum(sides[2], sides[3])))


def _weighted(algebra: Algebra, matrix: Any, spread: Array) -> Array:
    """Return upper bounds of sum_k |A_rk| spread_k."""
    ends = algebra.enclose(matrix)
    sizes = np.maximum(np.abs(ends.lo), np.abs(ends.hi)) if algebra.rigorous else np.abs(ends.lo)
    return rounding.dot_up(sizes, spread) if algebra.rigorous else sizes @ spread


def _ranges(algebra: Algebra, matrix: Any) -> Array:
    ends = algebra.enclose(matrix)
    return _up(algebra, ends.hi.max(1) - ends.lo.min(1))


def _differences(algebra: Algebra, row: Interval) -> Array:
    """Return upper bounds of row_x - row_m, shape (m, x)."""
    return _up(algebra, row.hi.reshape(1, -1) - row.lo.reshape(-1, 1))


def _spread(algebra: Algebra, error: Array) -> Array:
    return error[:, None]


def _largest_singular_value(algebra: Algebra, chain: Sequence[Any]) -> float:
    """Return an upper bound of the spectral norm of a product of thin factors.

    The squared singular values of A B are the eigenvalues of (A^T A)(B B^T); the trace of a high
    power exceeds that power of the largest one."""
    left, right = _product(chain[:2]), _product(chain[2:])
    if not algebra.rigorous:
        return float(np.linalg.svd(left @ right, compute_uv=False)[0])
    gram, doublings = (left.T @ left) @ (right @ right.T), 10
    with ctx.workprec(512):
        power = arb_mat(gram.integers)
        for _ in range(doublings):
            power = power * power
        trace = sum((power[i, i] for i in range(power.nrows())), arb(0))
        # sigma^2 = (trace of the 2^doublings-th power)^(1 / 2^doublings), times the exponent of the
        # dyadic matrix
        value = (abs(trace).root(2**doublings) * arb(2) ** gram.exponent).sqrt()
        return exact.ball_interval(value)[1]


def _product(chain: Sequence[Any]) -> Any:
    value = chain[0]
    for factor in chain[1:]:
        value = value @ factor
    return value


def _rows(x: Any) -> int:
    return int(x.shape[0])


def _columns(x: Any) -> int:
    return int(x.shape[1])


def _up(algebra: Algebra, x: Array) -> Array:
    return rounding.up(x) if algebra.rigorous else x
