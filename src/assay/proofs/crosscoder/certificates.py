"""Lower bounds of margins from features: linear in the codes, or with exact interactions.

With `pre_f = W_in d_{f,0}`, the biases as a feature with code one, and for every neuron `P = sum_f
z_f pre_f^+` and `N = sum_f z_f pre_f^-`, the block at rhat_0 is exactly

    F(rhat_0) = sum_f z_f F_f - W_out I,   I = min(P, N),   F_f = d_{f,0} + W_out relu(pre_f),

since `relu(P - N) = P - min(P, N)`. For r_0 = rhat_0 + eps_0 a relu moves by half of what its
input moves, up to as much again: `|relu(x + e) - relu(x) - e / 2| <= |e| / 2`. So, with
away = U_y - U_k and for any choice of sides,

    margin_k >= away (sum_f z_f F_f + G eps_0) - kappa_yk ||eps_0|| - sum_n (away W_out)_n^+ S_n,

`G = 1 + W_out W_in / 2`, `kappa = sum_n |away W_out|_n ||W_in[n]|| / 2`, S_n = P_n or N_n: both are
at least I_n. Sheet: crosscoder_and_guard, part A."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from assay.proofs.crosscoder.arithmetic import Array, Number
from assay.proofs.crosscoder.problem import Problem, half


@dataclass(frozen=True)
class Sides:
    """Untrusted advice: the group of every point, and for every group and neuron whether S_n is N
    (true) or P.
    """

    group: Int[Array, " points"]
    negative: Bool[Array, "groups hidden"]


def linear_margins(problem: Problem, sides: Sides, *, compact: bool = False) -> Array:
    """Return a lower bound of every point's margin that is linear in its codes; with `compact` it
    knows the norm of eps_0 alone.

    A table of size x outputs per label and group, then O(outputs (L0 + width)) a point."""
    ar, tables = problem.ar, problem.tables
    codes, found = problem.features.codes, np.empty(len(problem.points))
    for label, costs, rows in by_label(problem, sides.group):
        negative = sides.negative[sides.group[rows[0]]]
        used = np.flatnonzero(codes[rows].any(0))
        share = _chosen(problem, tables.pre[used], negative)
        fixed = _chosen(problem, tables.pre_bias[None], negative)
        cost_T = ar.transpose(costs)
        lost = ar.combine(codes[rows][:, used], ar.matmul(share, cost_T))
        lost = lost + ar.matmul(fixed, cost_T)
        lead = lead_of(problem, rows, label, used) + error_of(problem, rows, label, compact)
        found[rows] = least(ar.low(lead - lost), label)
    return found


def exact_margins(problem: Problem) -> Array:
    """Return the lower bound of every point's margin with the interaction I = min(P, N) itself:
    O(hidden (L0 + outputs)) a point.
    """
    ar, found = problem.ar, np.empty(len(problem.points))
    for label, _, rows in by_label(problem, np.zeros(len(problem.points), dtype=np.int64)):
        P, N = sides_of(problem, rows)
        away = rivals(problem.tables.inner, label)
        shared = ar.matmul(ar.minimum(P, N), ar.transpose(away))
        used = np.flatnonzero(problem.features.codes[rows].any(0))
        lead = lead_of(problem, rows, label, used) + error_of(problem, rows, label, False)
        found[rows] = least(ar.low(lead - shared), label)
    return found


def interactions(problem: Problem) -> Number:
    """Return I = min(P, N), (points, hidden)."""
    P, N = sides_of(problem, np.arange(len(problem.points)))
    return problem.ar.minimum(P, N)


def sides_of(problem: Problem, rows: Array) -> tuple[Number, Number]:
    """Return P and N of some points, (rows, hidden)."""
    ar, tables = problem.ar, problem.tables
    used = np.flatnonzero(problem.features.codes[rows].any(0))
    codes = problem.features.codes[rows][:, used]
    pre, bias = tables.pre[used], tables.pre_bias[None]
    positive = ar.combine(codes, ar.relu(pre)) + ar.relu(bias)
    return positive, ar.combine(codes, ar.relu(-pre)) + ar.relu(-bias)


def _chosen(problem: Problem, pre: Number, negative: Array) -> Number:
    """Return `pre^-` where the side is N, else `pre^+`."""
    sign = problem.ar.exact(np.where(negative, -1.0, 1.0))
    return problem.ar.relu(pre * sign)


def by_label(problem: Problem, group: Array) -> Iterator[tuple[int, Number, Array]]:
    """Yield the points of one label and one group: the label, `(away W_out)^+` (outputs, hidden)
    and their indices.
    """
    labels = problem.points.labels
    for label in np.unique(labels).tolist():
        costs = problem.ar.relu(rivals(problem.tables.inner, label))
        here = np.flatnonzero(labels == label)
        for one in np.unique(group[here]).tolist():
            yield label, costs, here[group[here] == one]


def rivals(table: Number, label: int) -> Number:
    """Return row `label` minus every row."""
    return table[label : label + 1] - table


def lead_of(problem: Problem, rows: Array, label: int, used: Array) -> Number:
    """Return `away sum_f z_f F_f` with the biases, (rows, outputs)."""
    ar, tables = problem.ar, problem.tables
    alone = ar.transpose(rivals(ar.transpose(tables.alone[used]), label))
    bias = tables.alone_bias[label : label + 1] - tables.alone_bias
    return ar.combine(problem.features.codes[rows][:, used], alone) + bias[None]


def error_of(problem: Problem, rows: Array, label: int, compact: bool) -> Number:
    """Return a lower bound of what eps_0 does, directly and through the block."""
    ar, tables = problem.ar, problem.tables
    away = rivals(tables.through, label)
    inner = ar.absolute(rivals(tables.inner, label))
    kappa = ar.matmul(inner, ar.exact(tables.reach[:, None]) * half(ar))  # (outputs, 1)
    size = ar.exact(problem.error_norm[rows][:, None])
    reach = size * ar.transpose(kappa)
    if compact:
        return -(size * ar.norm(away)[None]) - reach
    return ar.matmul(problem.error[rows], ar.transpose(away)) - reach


def least(bounds: Array, label: int) -> Array:
    """Return the least bound over the rivals of a label; infinite with none."""
    bounds = np.array(bounds)
    bounds[:, label] = np.inf
    return bounds.min(1)
