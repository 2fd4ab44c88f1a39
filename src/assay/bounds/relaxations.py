"""Linear bounds of single operations on intervals: each sound for every slope it is given, so that
slopes may be chosen in plain floats.

Lines satisfy `below_slope x + below <= f(x) <= above_slope x + above` for all real x in the
interval (CROWN, arXiv 1811.00866)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from flint import arb
from scipy.special import erf

from assay.bounds.exact import exp_interval, map_balls
from assay.bounds.levels import Arithmetic
from assay.bounds.rounding import (
    Array,
    Interval,
    add_up,
    mul_down,
    mul_up,
    sub_down,
    sub_up,
    sum_up,
)
from assay.errors import InputError


@dataclass(frozen=True)
class Lines:
    """Slopes and intercepts of a lower and an upper line, one pair per unit."""

    below_slope: Array
    below: Array
    above_slope: Array
    above: Array


def relu_lines(x: Interval) -> Lines:
    """Bound ReLU: the chord above; below, the identity where the positive side is the longer
    one, else zero.
    """
    active, unstable = x.lo >= 0, (x.lo < 0) & (x.hi > 0)
    width = np.where(unstable, sub_up(x.hi, x.lo), 1.0)
    chord = np.where(unstable, x.hi / width, active.astype(np.float64))
    above = np.maximum(
        mul_up(chord, -x.lo), (Interval.exactly(x.hi) - Interval.exactly(chord) * x.hi).hi
    )
    below_slope = np.where(unstable, (x.hi > -x.lo).astype(np.float64), chord)
    return Lines(below_slope, np.zeros_like(chord), chord, np.where(unstable, above, 0.0))


def square_lines(x: Interval) -> Lines:
    """Bound x^2: its tangent at the middle below (`x^2 >= a x - a^2/4`) and the chord of the
    same slope above.
    """
    slope = 2.0 * x.midpoint()
    half = Interval.exactly(0.5 * slope)
    below = -(half * half).hi
    above = np.maximum(
        _offset(x.lo, _square(x.lo), slope).hi, _offset(x.hi, _square(x.hi), slope).hi
    )
    return Lines(slope, below, slope, above)


def _square(x: Array) -> Interval:
    return Interval(np.maximum(mul_down(x, x), 0.0), mul_up(x, x))


def _offset(x: Array, value: Interval, slope: Array) -> Interval:
    """Enclose f(x) - slope x."""
    return value - Interval.exactly(slope) * x


def tangent_offset(
    ends: Interval, t: Array, value: Interval, derivative: Interval, slope: Array
) -> Interval:
    """Enclose `f(t) + f'(t) (x - t) - slope x` over x in the interval, given enclosures of f(t) and
    f'(t).

    Its lower end bounds a convex f minus the line from below, its upper end a concave one from
    above, whatever t is."""
    at = [
        value + derivative * (Interval.exactly(end) - t) - Interval.exactly(slope) * end
        for end in (ends.lo, ends.hi)
    ]
    return Interval(np.minimum(at[0].lo, at[1].lo), np.maximum(at[0].hi, at[1].hi))


def inverse_root(x: Interval, scale: Interval, shift: Interval) -> Interval:
    """Enclose `(scale x + shift)^(-1/2)`, a decreasing function; raises `InputError` where the
    root may vanish.
    """
    inside = x * scale + shift
    if not np.all(inside.lo > 0):
        raise InputError(
            "a norm may be zero inside the input box: use a smaller radius or a larger eps"
        )
    root = Interval(
        np.nextafter(np.sqrt(inside.lo), -np.inf), np.nextafter(np.sqrt(inside.hi), np.inf)
    )
    if not np.all(root.lo > 0):
        raise InputError(
            "a norm may be zero inside the input box: use a smaller radius or a larger eps"
        )
    return Interval.exactly(1.0) / root


def inverse_root_lines(x: Interval, scale: Interval, shift: Interval) -> Lines:
    """Bound the convex `(scale x + shift)^(-1/2)`: tangent at the middle below, chord above."""
    t = x.midpoint()
    at, left, right = (inverse_root(Interval.exactly(p), scale, shift) for p in (t, x.lo, x.hi))
    derivative = at * at * at * scale * -0.5
    tangent = derivative.midpoint()
    # (f(b) - f(a)) / (b - a) = -scale f(a)^2 f(b)^2 / (f(a) + f(b)), without cancellation.
    chord = -scale.lo * (left.lo * right.lo) * (left.lo * right.lo / (left.lo + right.lo))
    below = tangent_offset(x, t, at, derivative, tangent).lo
    above = np.maximum(_offset(x.lo, left, chord).hi, _offset(x.hi, right, chord).hi)
    return Lines(tangent, below, chord, above)


# GELU x Phi(x): its second derivative phi(x) (2 - x^2) changes sign at +-sqrt 2, its first once,
# between the two numbers below.
_ROOT2 = Interval(np.float64(np.nextafter(2.0**0.5, 0)), np.float64(np.nextafter(2.0**0.5, 2)))  # type: ignore[arg-type]
GELU_TURNS = (-0.751792, -0.751791)
GELU_LEAST = -0.16997121


def _gelu(x: Array, ar: Arithmetic) -> Interval:
    if not ar.rigorous:
        return Interval.exactly(0.5 * x * (1 + erf(x / np.sqrt(2.0))))
    return map_balls(lambda b: b * (-b / arb(2).sqrt()).erfc() / 2, x)


def _gelu_slope_float(x: Array) -> Array:
    value: Array = 0.5 * (1 + erf(x / np.sqrt(2.0))) + x * np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)
    return value


def _gelu_slope(x: Array, ar: Arithmetic) -> Interval:
    if not ar.rigorous:
        return Interval.exactly(_gelu_slope_float(x))
    return map_balls(
        lambda b: (-b / arb(2).sqrt()).erfc() / 2 + b * (-b * b / 2).exp() / (2 * arb.pi()).sqrt(),
        x,
    )


def gelu(x: Interval, ar: Arithmetic) -> Interval:
    """Enclose GELU (exact form), which falls, turns once between `GELU_TURNS` and rises."""
    left, right = _gelu(x.lo, ar), _gelu(x.hi, ar)
    turns = (x.lo < GELU_TURNS[1]) & (x.hi > GELU_TURNS[0])
    return Interval(
        np.where(turns, GELU_LEAST, np.minimum(left.lo, right.lo)), np.maximum(left.hi, right.hi)
    )


def _solve(slope: Array, lo: Array, hi: Array, rising: bool) -> Array:
    """Bisect `GELU'(t) = slope` on a stretch where the derivative is monotone; any answer inside
    is sound.
    """
    for _ in range(30):
        t = 0.5 * (lo + hi)
        right = (_gelu_slope_float(t) < slope) == rising
        lo, hi = np.where(right, t, lo), np.where(right, hi, t)
    return lo


def gelu_lines(x: Interval, ar: Arithmetic) -> Lines:
    """Bound GELU by parallel lines of the chord's slope; on the convex stretch the lower line is
    the tangent at the middle.

    Above, the extreme lies at an end or on a concave stretch (|x| >= sqrt 2); below, at an end or
    on the convex one."""
    left, right = _gelu(x.lo, ar), _gelu(x.hi, ar)
    width = x.hi - x.lo
    middle = _gelu_slope_float(x.midpoint())
    chord = np.where(
        width > 1e-8, (right.lo - left.lo) / np.where(width > 1e-8, width, 1.0), middle
    )
    inside = (x.lo >= -_ROOT2.lo) & (x.hi <= _ROOT2.lo)
    below_slope = np.where(inside, middle, chord)
    above = np.maximum(_offset(x.lo, left, chord).hi, _offset(x.hi, right, chord).hi)
    below = np.minimum(_offset(x.lo, left, below_slope).lo, _offset(x.hi, right, below_slope).lo)

    def bound(lo: Array, hi: Array, kept: Interval, slope: Array, rising: bool) -> Interval:
        t = _solve(slope, kept.lo, np.maximum(kept.lo, kept.hi), rising)
        return tangent_offset(Interval(lo, hi), t, _gelu(t, ar), _gelu_slope(t, ar), slope)

    # The stretch on which a tangent is evaluated contains the exact one; the tangent point lies
    # strictly inside the exact one.
    far = bound(
        x.lo,
        np.minimum(x.hi, -_ROOT2.lo),
        Interval(np.minimum(x.lo, -_ROOT2.hi), np.minimum(x.hi, -_ROOT2.hi)),
        chord,
        False,
    )
    above = np.where(x.lo < -_ROOT2.lo, np.maximum(above, far.hi), above)
    near = bound(
        np.maximum(x.lo, _ROOT2.lo),
        x.hi,
        Interval(np.maximum(x.lo, _ROOT2.hi), np.maximum(x.hi, _ROOT2.hi)),
        chord,
        False,
    )
    above = np.where(x.hi > _ROOT2.lo, np.maximum(above, near.hi), above)
    bend = Interval(np.clip(x.lo, -_ROOT2.lo, _ROOT2.lo), np.clip(x.hi, -_ROOT2.lo, _ROOT2.lo))
    convex = bound(
        np.maximum(x.lo, -_ROOT2.hi), np.minimum(x.hi, _ROOT2.hi), bend, below_slope, True
    )
    below = np.where((x.hi > -_ROOT2.hi) & (x.lo < _ROOT2.hi), np.minimum(below, convex.lo), below)
    return Lines(below_slope, below, chord, above)


def product_rest(
    x: Interval, y: Interval, plus: Interval, minus: Interval
) -> tuple[Array, Array, Interval]:
    """Return (m_x, m_y, rest) with `x y = m_y x + m_x y + rest` for elementwise products, given
    bounds of x + y and x - y as well.

    rest = (x - m_x)(y - m_y) - m_x m_y, and with s = x + y, d = x - y and their middles `4 (x -
    m_x)(y - m_y) = (s - m_s)^2 - (d - m_d)^2`, which is about half as wide as the product of the
    radii when x and y vary independently."""
    m_x, m_y = x.midpoint(), y.midpoint()
    radii = mul_up(x.radius(), y.radius())
    sum_ = (plus - (Interval.exactly(m_x) + m_y)).magnitude()
    difference = (minus - (Interval.exactly(m_x) - m_y)).magnitude()
    high = np.minimum(radii, mul_up(0.25, mul_up(sum_, sum_)))
    low = -np.minimum(radii, mul_up(0.25, mul_up(difference, difference)))
    return m_x, m_y, Interval(low, high) - Interval.exactly(m_x) * m_y


def softmax(x: Interval, mask: Array, ar: Arithmetic) -> Interval:
    """Enclose softmax along the last axis: `p_i = 1 / (1 + sum_{j != i} exp(x_j - x_i))`;
    entries where mask is 0 get no weight.
    """
    others = mask[..., None, :] * (1 - np.eye(mask.shape[-1])) > 0

    def inverse(gaps: Array) -> Interval:
        e = (
            exp_interval(gaps, gaps)
            if ar.rigorous
            else Interval.exactly(np.exp(np.minimum(gaps, 700.0)))
        )
        total = Interval(np.where(others, e.lo, 0.0), np.where(others, e.hi, 0.0)).sum() + 1.0
        return Interval.exactly(1.0) / total

    least = inverse(sub_up(x.hi[..., None, :], x.lo[..., :, None])).lo
    most = inverse(sub_down(x.lo[..., None, :], x.hi[..., :, None])).hi
    return Interval(np.maximum(least, 0.0) * mask, np.minimum(most, 1.0) * mask)


def softmax_rest(x: Interval, mask: Array, ar: Arithmetic) -> tuple[Array, Array, Interval]:
    """Return (p, kept, rest) with `softmax_i(x) = kept_i p_i (x_i - p.x) + rest_i` along the last
    axis.

    Taylor's formula at the middle: the second derivative along v = x - m is `p_i ((v_i - p.v)^2 -
    Var_p v)`, bounded over the box. Where the plain interval is narrower, kept_i = 0 and rest_i is
    that interval. The slope uses a float p; its error is part of rest."""
    middle, box = x.midpoint(), softmax(x, mask, ar)
    radius = x.radius() * mask
    exact = softmax(Interval.exactly(middle), mask, ar)
    p = exact.midpoint()
    widest = radius.max(-1, keepdims=True)
    second = np.minimum(
        sum_up(mul_up(box.hi, mul_up(radius, radius)))[..., None], mul_up(widest, widest)
    )
    away = np.minimum(sum_up(mul_up(box.hi, radius))[..., None], widest)
    own = add_up(radius, away)  # |v_i - p.v|
    remainder = Interval(
        -mul_up(0.5, mul_up(box.hi, second)), mul_up(0.5, mul_up(box.hi, mul_up(own, own)))
    )
    # |J_ij - slope_ij| <= 3 max_i |p_i - exact p_i|, for every i and j.
    error = mul_up(3.0, mul_up(exact.radius().max(-1, keepdims=True), sum_up(radius)[..., None]))
    at_middle = Interval.exactly(p) * (
        Interval.exactly(middle) - (Interval.exactly(p) * (middle * mask)).sum()[..., None]
    )
    rest = exact - at_middle + remainder + Interval(-error, error)
    kept = (sub_up(rest.hi, rest.lo) < sub_up(box.hi, box.lo)).astype(np.float64) * mask
    return (
        p,
        kept,
        Interval(np.where(kept > 0, rest.lo, box.lo), np.where(kept > 0, rest.hi, box.hi)),
    )
