"""Relaxations of single operations that the checker knows: lines below and above, and what is left
of a product, a sum of products or a softmax beside its planes.
"""

from dataclasses import dataclass

import numpy as np

from assay_check.gates import smooth
from assay_check.gates.arithmetic import (
    TINY,
    Array,
    Box,
    down,
    exactly,
    gamma,
    minus,
    plus,
    product,
    square,
    times,
    total,
    up,
)
from assay_check.gates.graph import Node

Slopes = tuple[Array, ...]


@dataclass(frozen=True)
class Lines:
    """`below_slope x + below <= f(x) <= above_slope x + above`."""

    below_slope: Array
    below: Array
    above_slope: Array
    above: Array


def relu_lines(x: Box, slopes: Slopes | None) -> Lines:
    """Below, a line through zero with a slope in [0, 1]; above, the chord of a convex function."""
    unstable = (x.lo < 0) & (x.hi > 0)
    active = (x.lo >= 0).astype(np.float64)
    mine = (x.hi > -x.lo).astype(np.float64) if slopes is None else np.clip(slopes[0], 0.0, 1.0)
    chord = np.where(unstable, x.hi / np.where(unstable, x.hi - x.lo, 1.0), active)
    above = np.maximum(up(-chord * x.lo), up(x.hi - down(chord * x.hi)))
    zero = np.zeros_like(chord)
    return Lines(np.where(unstable, mine, active), zero, chord, np.where(unstable, above, zero))


def square_lines(x: Box, slopes: Slopes | None) -> Lines:
    """Below, `x^2 >= s x - (s / 2)^2` for every s; above, the chord of a convex function."""
    slope = 2 * x.middle() if slopes is None else slopes[0]
    chord = x.lo + x.hi
    ends = [minus(square(exactly(e)), times(exactly(chord), exactly(e))).hi for e in (x.lo, x.hi)]
    return Lines(slope, -square(exactly(0.5 * slope)).hi, chord, np.maximum(*ends))


def root(node: Node, x: Array) -> Box:
    """Enclose `(scale x + shift)^(-1/2)` at numbers."""
    low, high, first, last = node.constants
    inside = plus(times(exactly(x), Box(low, high)), Box(first, last))
    good = inside.lo > 0
    roots = down(np.sqrt(np.where(good, inside.lo, 1.0))), up(np.sqrt(np.where(good, inside.hi, 1)))
    good &= roots[0] > 0
    below, above = down(1 / roots[1]), up(1 / np.where(good, roots[0], 1.0))
    return Box(np.where(good, below, -np.inf), np.where(good, above, np.inf))


def root_lines(node: Node, x: Box, slopes: Slopes | None) -> Lines:
    """The tangent of a convex function at a point below, its chord above."""
    t = x.middle() if slopes is None else np.clip(slopes[0], x.lo, x.hi)
    at, left, right = root(node, t), root(node, x.lo), root(node, x.hi)
    scale = Box(*node.constants[:2])
    first = times(times(times(at, at), times(at, scale)), exactly(np.asarray(-0.5)))
    slope, under = first.middle(), []
    for end in (x.lo, x.hi):
        away = minus(exactly(end), exactly(t))
        under.append(minus(plus(at, times(first, away)), times(exactly(slope), exactly(end))).lo)
    width = np.where(x.hi > x.lo, x.hi - x.lo, 1.0)
    chord = np.where(x.hi > x.lo, (right.lo - left.lo) / width, slope)
    over = [
        minus(value, times(exactly(chord), exactly(end))).hi
        for value, end in ((left, x.lo), (right, x.hi))
    ]
    return Lines(slope, np.minimum(*under), chord, np.maximum(*over))


def rest_of_product(xs: list[Box], p: Array, q: Array) -> tuple[Array, Array]:
    """Bound `x y - p x - q y = (x - q)(y - p) - p q`; where x + y and x - y are known, also by
    `4 (x - q)(y - p) = (x + y - p - q)^2 - (x - y + p - q)^2`.
    """
    x, y = xs[:2]
    of_p, of_q = exactly(p), exactly(q)
    found = times(minus(x, of_q), minus(y, of_p))
    if len(xs) == 4:
        one = square(minus(xs[2], plus(of_p, of_q)))
        other = square(minus(xs[3], minus(of_q, of_p)))
        both = times(minus(one, other), exactly(np.asarray(0.25)))
        found = found.meet(both.lo, both.hi)
    rest = minus(found, times(of_p, of_q))
    return rest.lo, rest.hi


def sum_of_products(x: Box, y: Box) -> Box:
    """Return the box of X Y over the last two axes, from the box of every product."""
    columns, lows, highs = x.shape[-1], [], []
    for k in range(columns):
        one = Box(x.lo[..., :, k : k + 1], x.hi[..., :, k : k + 1])
        other = Box(y.lo[..., k : k + 1, :], y.hi[..., k : k + 1, :])
        part = times(one, other)
        lows.append(part.lo)
        highs.append(part.hi)
    found = total(Box(np.stack(lows, -1), np.stack(highs, -1)))
    return Box(found.lo[..., 0], found.hi[..., 0])


def rest_of_sum(xs: list[Box], p: Array, q: Array) -> tuple[Array, Array]:
    """Bound `X Y - X p - q Y = (X - q)(Y - p) - q p`."""
    x, y = xs
    rest = minus(sum_of_products(minus(x, exactly(q)), minus(y, exactly(p))), product(q, p))
    return rest.lo, rest.hi


def shares(x: Box, mask: Array) -> Box:
    """Enclose softmax along the last axis: e_i / (e_i + sum of the others), with the largest
    exponent taken away.
    """
    bad = ~(np.isfinite(x.lo) & np.isfinite(x.hi)).all(-1, keepdims=True)
    high, low = np.where(bad, 0.0, x.hi), np.where(bad, 0.0, x.lo)
    shift = np.where(mask > 0, high, -np.inf).max(-1, keepdims=True)

    def exponential(y: Array) -> Box:
        return smooth.exponentials(np.where(mask > 0, np.minimum(up(y - shift), 0.0), 0.0))

    def exponential_low(y: Array) -> Array:
        return smooth.exponentials(np.where(mask > 0, np.minimum(down(y - shift), 0.0), 0.0)).lo

    most, fewest = exponential(high).hi * mask, exponential_low(low) * mask
    terms = x.shape[-1]
    slack = 1 + 4 * gamma(terms + 4)
    # The sums of the others, formed without cancellation.
    away = (1 - np.eye(terms)) * mask[..., None, :]
    others_most = up((away @ most[..., None])[..., 0] * slack + 4 * terms * TINY)
    others_least = down((away @ fewest[..., None])[..., 0] / slack)
    others_least = np.maximum(others_least, 0.0)
    least_ = down(fewest / up(fewest + others_most))
    most_ = up(most / np.maximum(down(most + others_least), TINY))
    lo, hi = np.clip(np.nan_to_num(least_), 0.0, 1.0) * mask, np.clip(most_, 0.0, 1.0) * mask
    return Box(np.where(bad, 0.0, lo), np.where(bad, 1.0, np.where(np.isnan(hi), 1.0, hi)) * mask)


def softmax_rest(x: Box, mask: Array) -> tuple[Array, Array, Array, Array]:
    """Return (p, kept, low, high) with `softmax_i = kept_i p_i (x_i - p . x) + rest_i`.

    Taylor's formula at the middle m, v = x - m: the second derivative along v is
    `s_i ((v_i - s . v)^2 - Var_s v)` with shares s between m and x. Where the plain box is
    narrower, kept_i is 0 and rest_i is that box. What p differs from the exact shares at m by is
    charged."""
    box, middle = shares(x, mask), x.middle()
    radius = x.radius() * mask
    at = shares(exactly(middle), mask)
    p = at.middle()
    terms = x.shape[-1]
    slack = 1 + 4 * gamma(terms)
    widest = radius.max(-1, keepdims=True)
    mean = np.minimum(up((box.hi * radius).sum(-1, keepdims=True) * slack + TINY), widest)
    variance = up((box.hi * up(radius * radius)).sum(-1, keepdims=True) * slack + TINY)
    variance = np.minimum(variance, up(widest * widest))
    own = up(radius + mean)
    low = -up(0.5 * up(box.hi * variance))
    high = up(0.5 * up(box.hi * up(own * own)))
    # |p_i (d_ij - p_j) - exact| <= 3 max |p - exact|, for every i and j.
    off = up(up(3 * at.radius().max(-1, keepdims=True)) * up(radius.sum(-1, keepdims=True) * slack))
    mean_at = total(times(exactly(p), exactly(middle * mask)))
    line = times(exactly(p), minus(exactly(middle), mean_at))
    rest = plus(plus(minus(at, line), Box(low, high)), Box(-off, off))
    kept = ((rest.hi - rest.lo) < (box.hi - box.lo)).astype(np.float64) * mask
    return (
        p * mask,
        kept,
        np.where(kept > 0, rest.lo, box.lo),
        np.where(kept > 0, rest.hi, box.hi),
    )
