"""Numbers that are kept, or put to zero, as a comparison decides: with a constant (`jump`), with
the others along the last axis (`largest`), or of another number with zero (`open`).

A bound of the number x that decides, lo <= t <= hi, is enough: below lo the value is 0, above hi it
is x, and between them it may be either. So `v - s x` is one of `-s x` for an x up to hi, and of
`(1 - s) x` for an x from lo on."""

import numpy as np

from assay_check.gates.arithmetic import Array, Box, down, exactly, minus, times, up
from assay_check.gates.graph import Node

CHOICES = {"jump", "largest", "open"}


def limits(node: Node, xs: list[Box]) -> Box:
    """Return the least and the largest number that x may have to exceed; minus or plus infinity
    where it is always, or never, kept.
    """
    if node.op == "open":
        always, never = xs[1].lo > 0, xs[1].hi < 0
        return Box(np.where(never, np.inf, -np.inf), np.where(always, -np.inf, np.inf))
    if node.op == "jump":
        theta = np.maximum(np.broadcast_to(node.constants[0], node.shape), 0.0)
        sizes = Box(theta, theta)
    else:
        count = int(node.constants[0])
        positive = Box(np.maximum(xs[0].lo, 0.0), np.maximum(xs[0].hi, 0.0))
        positive = positive if len(xs) == 1 else times(positive, xs[1])
        sizes = Box(_rival(positive.lo, count), _rival(positive.hi, count))
    if len(xs) == 1:
        return sizes
    norms = xs[1]
    with np.errstate(all="ignore"):
        lo = np.where(norms.hi > 0, down(sizes.lo / norms.hi), 0.0)
        hi = np.where(norms.lo > 0, up(sizes.hi / norms.lo), np.inf)
    return Box(np.maximum(lo, 0.0), hi)


def _rival(x: Array, count: int) -> Array:
    """Return what an entry must exceed to be one of the `count` largest: the count-th largest of
    the others, and at least zero.
    """
    terms = x.shape[-1]
    if count >= terms:
        return np.zeros(x.shape)
    order = np.argsort(-x, axis=-1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(terms), x.shape).copy(), -1)
    falling = np.take_along_axis(x, order, -1)
    inside = ranks < count
    found = np.where(inside, falling[..., count : count + 1], falling[..., count - 1 : count])
    return np.maximum(found, 0.0)


def values(node: Node, xs: list[Box]) -> Box:
    """Enclose a choice."""
    x, t = xs[0], limits(node, xs)
    stays, goes = x.hi >= t.lo, x.lo <= t.hi
    lo = np.where(stays, np.maximum(x.lo, t.lo), 0.0)
    hi = np.where(stays, x.hi, 0.0)
    return Box(np.where(goes, np.minimum(lo, 0.0), lo), np.where(goes, np.maximum(hi, 0.0), hi))


def decided(node: Node, xs: list[Box]) -> Box | None:
    """Return the derivative by x, 1 or 0, or None where it is open for some entry."""
    x, t = xs[0], limits(node, xs)
    stays, goes = x.hi >= t.lo, x.lo <= t.hi
    return None if (stays & goes).any() else exactly(stays.astype(np.float64))


def lines(
    node: Node, xs: list[Box], slopes: tuple[Array, ...] | None
) -> tuple[Array, Array, Array, Array]:
    """Return slope and intercept of a line below and of one above, sound for any slopes."""
    x, t = xs[0], limits(node, xs)
    stays, goes = x.hi >= t.lo, x.lo <= t.hi
    both = stays & goes
    if slopes is None:
        width = np.where(x.hi > x.lo, x.hi - x.lo, 1.0)
        chord = (np.maximum(x.hi, 0.0) - np.maximum(x.lo, 0.0)) / width
        falls = (np.minimum(x.hi, 0.0) - np.minimum(x.lo, 0.0)) / width
        slopes = falls, chord
    whole = stays.astype(np.float64)
    found = []
    for slope, below in zip(slopes, (True, False), strict=True):
        s = np.where(both, slope, whole)
        left = [np.where(both, end, 0.0) for end in (x.lo, np.minimum(x.hi, t.hi))]
        kept = [np.where(both, end, 0.0) for end in (np.maximum(x.lo, t.lo), x.hi)]
        rests = [minus(exactly(np.zeros(s.shape)), times(exactly(s), exactly(z))) for z in left]
        rests += [minus(exactly(k), times(exactly(s), exactly(k))) for k in kept]
        ends = [rest.lo if below else rest.hi for rest in rests]
        offset = np.minimum.reduce(ends) if below else np.maximum.reduce(ends)
        found += [s, np.where(both, offset, 0.0)]
    return found[0], found[1], found[2], found[3]
