"""The search for sides: any choice is sound, and this one tries to certify many points."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from assay.proofs.crosscoder.arithmetic import Array
from assay.proofs.crosscoder.certificates import (
    Sides,
    by_label,
    error_of,
    lead_of,
    least,
    sides_of,
)
from assay.proofs.crosscoder.problem import Problem

_ROUNDS = 40
_MEMORY = 0.9
_BORDER = 0.1  # of the median size of a bound: how near to zero a point counts most


def one_side(problem: Problem, *, compact: bool = False) -> Sides:
    """Return one group, with a side for every neuron; see `strongest_sides`."""
    return _searched(problem, np.zeros(len(problem.points), dtype=np.int64), 1, compact)


def strongest_sides(problem: Problem, *, compact: bool = False) -> Sides:
    """Return groups by the strongest feature, the largest `z_f ||W_in d_{f,0}||`, with a side for
    every neuron: where no neuron interacts with the strongest feature, that side costs nothing.

    The search begins with the side that is smaller on average in the group. Then every neuron takes
    the side that costs less towards the nearest rivals of the points whose bounds lie close to
    zero, and so on for some rounds; what certifies most in a group is kept. `compact` says which
    bound is meant, as for `linear_margins`."""
    return _searched(problem, strongest(problem, 1)[:, 0], len(problem.features.decoder), compact)


def strongest(problem: Problem, count: int) -> Int[Array, "points count"]:
    """Return the features of every point with the largest `z_f ||W_in d_{f,0}||`, largest first."""
    decoder, W_in = np.asarray(problem.features.decoder[:, 0]), np.asarray(problem.network.W_in)
    sizes = np.asarray(problem.features.codes) * np.linalg.norm(decoder @ W_in.T, axis=1)
    return np.argsort(-sizes, axis=1, kind="stable")[:, :count]


def _searched(problem: Problem, group: Array, groups: int, compact: bool) -> Sides:
    problem = problem.at("float64")
    P, N = sides_of(problem, np.arange(len(group)))
    bound = _bounds(problem, P, N, compact)

    def summed(values: Array) -> Array:
        total = np.zeros((groups, *values.shape[1:]))
        np.add.at(total, group, values)
        return total

    best = negative = summed(P - N) > 0
    most, gathered, border = np.full(groups, -np.inf), np.zeros(best.shape), 0.0
    for _ in range(_ROUNDS):
        margins, costs = bound(negative[group])
        border = border or _BORDER * float(np.median(np.abs(margins))) or 1.0
        score = summed((margins > 0) + 1e-6 * np.minimum(margins / border, 0))
        better = score > most
        best, most = np.where(better[:, None], negative, best), np.maximum(score, most)
        weights = 1 / (1 + (margins / border) ** 2) + 1e-3
        gathered = _MEMORY * gathered + summed(weights[:, None] * costs * (P - N))
        negative = gathered > 0
    return Sides(group, best)


def _bounds(
    problem: Problem, P: Array, N: Array, compact: bool
) -> Callable[[Array], tuple[Array, Array]]:
    """Return what turns sides (points, hidden) into the bound of every margin, (points,), and what
    a neuron's side costs there towards the rival that is nearest, (points, hidden).
    """
    every, count = np.arange(len(problem.features.decoder)), len(problem.points)
    parts = [
        (rows, label, costs, lead_of(problem, rows, label, every)
         + error_of(problem, rows, label, compact))
        for label, costs, rows in by_label(problem, np.zeros(count, dtype=np.int64))
    ]  # fmt: skip

    def bound(negative: Array) -> tuple[Array, Array]:
        margins, found = np.empty(count), np.empty(P.shape)
        for rows, label, costs, fixed in parts:
            chosen = np.where(negative[rows], N[rows], P[rows])
            bounds = fixed - chosen @ costs.T
            margins[rows] = least(bounds, label)
            bounds[:, label] = np.inf
            found[rows] = costs[bounds.argmin(1)]
        return margins, found

    return bound
