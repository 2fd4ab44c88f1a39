"""What features are compared with: balls, intervals and linear bounds, propagated for every point.

All know rhat_0 and the norm of eps_0, and enclose the network over that ball."""

from __future__ import annotations

import numpy as np

from assay.proofs.crosscoder.arithmetic import Array, Number
from assay.proofs.crosscoder.certificates import least, rivals
from assay.proofs.crosscoder.problem import Problem
from assay.proofs.crosscoder.relaxation import relax


def ball_margins(problem: Problem) -> Array:
    """Return the bound of scalar balls: `eps_1 <= Lip eps_0 + ||delta||` and the margin of rhat_1,
    with `Lip = 1 + ||W_out||_F ||W_in||_F`.
    """
    ar, n, f = problem.ar, problem.network, problem.features
    rebuilt, pre = _inputs(problem)
    written = rebuilt + ar.matmul(ar.relu(pre), ar.exact(n.W_out.T)) + ar.exact(n.b_out)
    claimed = ar.combine(f.codes, ar.exact(f.decoder[:, 1])) + ar.exact(f.bias[1])
    size = ar.exact(problem.error_norm)
    steep = ar.norm(ar.exact(n.W_in.reshape(1, -1))) * ar.norm(ar.exact(n.W_out.reshape(1, -1)))
    error = size + size * steep + ar.norm(written - claimed)
    logits = ar.matmul(claimed, ar.exact(n.U.T)) + ar.exact(n.b_u)
    found = np.empty(len(problem.points))
    for label, rows in _labels(problem):
        away = ar.norm(rivals(ar.exact(n.U), label))
        lead = logits[rows][:, label : label + 1] - logits[rows]
        found[rows] = least(ar.low(lead - error[rows][:, None] * away[None]), label)
    return found


def interval_margins(problem: Problem) -> Array:
    """Return the bound of intervals: every neuron over the ball of eps_0, one by one."""
    ar, n, tables = problem.ar, problem.network, problem.tables
    rebuilt, pre = _inputs(problem)
    size = ar.exact(problem.error_norm[:, None])
    reach = size * ar.exact(tables.reach[None])
    low, high = ar.relu(pre - reach), ar.relu(pre + reach)
    found = np.empty(len(problem.points))
    for label, rows in _labels(problem):
        inner = rivals(tables.inner, label)
        away = rivals(ar.exact(n.U), label)
        written = ar.matmul(low[rows], ar.transpose(ar.relu(inner))) - ar.matmul(
            high[rows], ar.transpose(ar.relu(-inner))
        )
        direct = _straight(problem, rebuilt[rows], label) - size[rows] * ar.norm(away)[None]
        found[rows] = least(ar.low(direct + written), label)
    return found


def linear_propagation_margins(problem: Problem) -> Array:
    """Return the bound of linear relaxations of every neuron over the ball (arXiv 1811.00866)."""
    ar, n, tables = problem.ar, problem.network, problem.tables
    rebuilt, pre = _inputs(problem)
    size = problem.error_norm
    reach = ar.exact(size[:, None]) * ar.exact(tables.reach[None])
    low, high = ar.low(pre - reach), ar.high(pre + reach)
    found = np.empty(len(problem.points))
    W_in = ar.exact(n.W_in)
    for row, label in enumerate(problem.points.labels.tolist()):
        inner = rivals(tables.inner, label)
        away = rivals(ar.exact(n.U), label)
        slope, offset = relax(ar, inner, low[row], high[row])
        through = away + ar.matmul(slope, W_in)
        center = _straight(problem, rebuilt[row : row + 1], label)
        center = center + ar.matmul(pre[row : row + 1], ar.transpose(slope)) + offset[None]
        spread = ar.norm(through) * ar.exact(size[row : row + 1])
        found[row] = least(ar.low(center - spread[None]), label)[0]
    return found


def _inputs(problem: Problem) -> tuple[Number, Number]:
    """Return rhat_0 and what it puts into the neurons."""
    ar, n, f = problem.ar, problem.network, problem.features
    rebuilt = ar.combine(f.codes, ar.exact(f.decoder[:, 0])) + ar.exact(f.bias[0])
    return rebuilt, ar.matmul(rebuilt, ar.exact(n.W_in.T)) + ar.exact(n.b_in)


def _straight(problem: Problem, state: Number, label: int) -> Number:
    """Return the margins of what passes beside the neurons, biases included."""
    ar, n = problem.ar, problem.network
    away = rivals(ar.exact(n.U), label)
    bias = ar.exact(n.b_u[label] - np.zeros(len(n.b_u))) - ar.exact(n.b_u)
    return ar.matmul(state + ar.exact(n.b_out), ar.transpose(away)) + bias[None]


def _labels(problem: Problem) -> list[tuple[int, Array]]:
    labels = problem.points.labels
    return [(label, np.flatnonzero(labels == label)) for label in np.unique(labels).tolist()]
