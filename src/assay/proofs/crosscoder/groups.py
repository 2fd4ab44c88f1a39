"""Grouped linear bounds: one linear function of (z, eps_0) for all points of a group, and groups
that fail are split.

A group holds points of one label. Over the box of its codes and errors every neuron has a linear
bound (arXiv 1811.00866), so that each margin is at least a linear function of (z, eps_0); a point
costs a dot product. A group of one point has an exact bound, up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from assay.errors import InputError
from assay.proofs.crosscoder.arithmetic import Array
from assay.proofs.crosscoder.certificates import Sides, least, rivals
from assay.proofs.crosscoder.problem import Problem
from assay.proofs.crosscoder.relaxation import relax
from assay.proofs.crosscoder.sides import strongest


@dataclass(frozen=True)
class Round:
    """One partition of the points: group of every point, and the lower bounds of the margins."""

    about: str
    group: Int[Array, " points"]
    margins: Float[Array, " points"]
    bounded: int
    """The groups whose bound was computed in this round."""

    @property
    def groups(self) -> int:
        """How many groups the whole proof has, those of earlier rounds included."""
        return len(np.unique(self.group))


def group_margins(problem: Problem, rows: Int[Array, " rows"]) -> Float[Array, " rows"]:
    """Return lower bounds of the margins of points of one label, from one linear function of (z,
    eps_0) over the box that holds them: O(hidden outputs (L0 + width)) a group, O(outputs (L0 +
    width)) a point.
    """
    ar, n, tables = problem.ar, problem.network, problem.tables
    label = int(problem.points.labels[rows[0]])
    all_codes = problem.features.codes[rows]
    used = np.flatnonzero(all_codes.any(0))
    codes, error = all_codes[:, used], problem.error[rows]
    pre, bias = tables.pre[used], tables.pre_bias
    W_in, W_in_T = ar.exact(n.W_in), ar.exact(n.W_in.T)
    smallest, largest = ar.low(error).min(0), ar.high(error).max(0)
    rising, falling = ar.relu(pre), ar.relu(-pre)
    up, down = ar.relu(W_in_T), ar.relu(-W_in_T)
    ends = [
        ar.matmul(ar.exact(a[None]), rising)
        - ar.matmul(ar.exact(b[None]), falling)
        + ar.matmul(ar.exact(c[None]), up)
        - ar.matmul(ar.exact(d[None]), down)
        + bias[None]
        for a, b, c, d in (
            (codes.min(0), codes.max(0), smallest, largest),
            (codes.max(0), codes.min(0), largest, smallest),
        )
    ]
    low, high = ar.low(ends[0])[0], ar.high(ends[1])[0]
    inner = rivals(tables.inner, label)
    away = rivals(ar.exact(n.U), label)
    slope, offset = relax(ar, inner, low, high)
    decoder = problem.features.decoder[used, 0]
    of_codes = ar.matmul(away, ar.exact(decoder.T)) + ar.matmul(slope, ar.transpose(pre))
    of_error = away + ar.matmul(slope, W_in)
    beside = ar.exact(problem.features.bias[0][None]) + ar.exact(n.b_out[None])
    fixed = ar.matmul(beside, ar.transpose(away)) + ar.matmul(bias[None], ar.transpose(slope))
    fixed = fixed + offset[None] + (ar.exact(n.b_u[label : label + 1]) - ar.exact(n.b_u))[None]
    found = ar.combine(codes, ar.transpose(of_codes))
    found = found + ar.matmul(error, ar.transpose(of_error)) + fixed
    return least(ar.low(found), label)


def grouped_margins(problem: Problem, group: Int[Array, " points"]) -> Float[Array, " points"]:
    """Return lower bounds of all margins, one linear function per group.

    Raises InputError for a group that holds points of several labels."""
    found = np.empty(len(group))
    for one in np.unique(group).tolist():
        rows = np.flatnonzero(group == one)
        if len(np.unique(problem.points.labels[rows])) > 1:
            raise InputError(f"group {one} holds points of several labels; split it by label")
        found[rows] = group_margins(problem, rows)
    return found


def split_groups(problem: Problem) -> Sides:
    """Return the groups with which the splits of `refine` end, found at level float64; a bound of a
    group needs no sides.
    """
    *_, last = refine(problem.at("float64"))
    _, group = np.unique(last.group, return_inverse=True)
    return Sides(group.astype(np.int64), np.zeros((last.groups, 0), dtype=bool))


def refine(problem: Problem, depth: int = 1) -> Iterator[Round]:
    """Yield bounds of finer and finer groups: points of one label, split by the strongest feature,
    by the strongest two, and so on to `depth`; then groups that fail are halved along the
    direction in which they differ most, down to single points. What is certified stays.
    """
    labels = problem.points.labels
    ranks = strongest(problem, depth)
    group = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    margins = np.full(len(labels), -np.inf)
    failing = np.ones(len(labels), dtype=bool)
    about = "label"
    for level in range(64):
        chosen = np.unique(group[failing])
        for one in chosen.tolist():
            rows = np.flatnonzero(group == one)
            margins[rows] = np.maximum(margins[rows], group_margins(problem, rows))
        yield Round(about, group.copy(), margins.copy(), len(chosen))
        failing = np.zeros(len(labels), dtype=bool)
        for one in chosen.tolist():
            rows = np.flatnonzero(group == one)
            failing[rows] = len(rows) > 1 and bool((margins[rows] <= 0).any())
        if not failing.any():
            return
        if level < depth:
            keys = ranks[:, level]
            about = f"label and strongest {level + 1}"
        else:
            keys = _halves(problem, group, failing)
            about = f"halved {level - depth + 1} times"
        pairs = np.stack([group, np.where(failing, keys + 1, 0)], 1)
        group = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _halves(problem: Problem, group: Array, failing: Array) -> Array:
    """Return which half of its group each point is in: groups are cut in the middle along the
    direction in which what the features write at layer 0 differs most.
    """
    f = problem.features
    # Any split is sound, so that finding one is no operation of the verifier.
    written = np.asarray(f.codes) @ np.asarray(f.decoder[:, 0])
    keys = np.zeros(len(group), dtype=np.int64)
    for one in np.unique(group[failing]).tolist():
        rows = np.flatnonzero(group == one)
        centred = written[rows] - written[rows].mean(0)
        along = np.linalg.svd(centred, full_matrices=False)[0][:, 0]
        order = np.argsort(along, kind="stable")
        keys[rows[order[len(rows) // 2 :]]] = 1
    return keys
