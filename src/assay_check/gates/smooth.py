"""Smooth functions of one number, under lines of any slope, in ball arithmetic.

Nothing is known of a function but its first two derivatives in balls. On a piece of an interval
whose second derivative has one sign in balls, `f(x) - s x` is above a tangent (convex) or least at
an end (concave); other pieces are halved, and at last bounded by
`min at the ends - width^2 / 8 sup |f''|`."""

import math
from collections.abc import Callable

import numpy as np
from flint import arb, ctx

from assay_check.gates.arithmetic import Array, Box, down, up

Triple = tuple[arb, arb, arb]
BITS = 96
DEPTH = 7
ROOT = 0.7978845608028654  # sqrt(2 / pi) as implementations of GELU hold it
CUBIC = 0.044715


def _sigmoid(x: arb) -> Triple:
    s = 1 / (1 + (-x).exp())
    rest = 1 / (1 + x.exp())
    return s, s * rest, s * rest * (rest - s)


def _tanh(x: arb) -> Triple:
    t = x.tanh()
    d = 1 - t * t
    return t, d, -2 * t * d


def _exp(x: arb) -> Triple:
    e = x.exp()
    return e, e, e


def _log(x: arb) -> Triple:
    return x.log(), 1 / x, -1 / (x * x)


def _sqrt(x: arb) -> Triple:
    r = x.sqrt()
    return r, 1 / (2 * r), -1 / (4 * r * x)


def _rsqrt(x: arb) -> Triple:
    r = x.rsqrt()
    return r, -r / (2 * x), 3 * r / (4 * x * x)


def _reciprocal(x: arb) -> Triple:
    r = 1 / x
    return r, -r * r, 2 * r * r * r


def _erf(x: arb) -> Triple:
    d = 2 / arb.pi().sqrt() * (-x * x).exp()
    return x.erf(), d, -2 * x * d


def _silu(x: arb) -> Triple:
    s, first, second = _sigmoid(x)
    return x * s, s + x * first, 2 * first + x * second


def _gelu(x: arb) -> Triple:
    share = (-x / arb(2).sqrt()).erfc() / 2
    density = (-x * x / 2).exp() / (2 * arb.pi()).sqrt()
    return x * share, share + x * density, (2 - x * x) * density


def _gelu_tanh(x: arb) -> Triple:
    k, c = arb(ROOT), arb(CUBIC)
    u, first, second = k * (x + c * x * x * x), k * (1 + 3 * c * x * x), 6 * k * c * x
    s, a, b = _sigmoid(2 * u)
    once = 2 * first * a
    twice = 2 * second * a + 4 * first * first * b
    return x * s, s + x * once, 2 * once + x * twice


def _softplus(x: arb) -> Triple:
    s, first, _ = _sigmoid(x)
    return (1 + x.exp()).log(), s, first


def _cube(x: arb) -> Triple:
    return x * x * x, 3 * x * x, 6 * x


FUNCTIONS: dict[str, Callable[[arb], Triple]] = {
    "exp": _exp,
    "log": _log,
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "reciprocal": _reciprocal,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "erf": _erf,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "softplus": _softplus,
    "cube": _cube,
}
RISING = {"exp", "log", "sqrt", "tanh", "sigmoid", "erf", "softplus", "cube"}
FALLING = {"rsqrt", "reciprocal"}
POSITIVE = {"log", "sqrt", "rsqrt", "reciprocal"}  # defined above zero


def floor(x: arb) -> float:
    """Return a float64 at or below a ball; minus infinity where it is not finite."""
    return float(down(float(x.lower()))) if x.is_finite() else -math.inf


def ceiling(x: arb) -> float:
    """Return a float64 at or above a ball."""
    return -floor(-x)


def least_of_rest(function: Callable[[arb], Triple], lo: float, hi: float, slope: float) -> float:
    """Bound `f(x) - slope x` from below over [lo, hi]."""
    with ctx.workprec(BITS):
        return _least(function, lo, hi, arb(slope), 0)


def _least(function: Callable[[arb], Triple], lo: float, hi: float, s: arb, depth: int) -> float:
    a, b = arb(lo), arb(hi)
    ends = min(floor(function(x)[0] - s * x) for x in (a, b))
    if lo == hi:
        return ends
    second = function(a.union(b))[2]
    if second <= 0:
        return ends
    if second >= 0:
        t = _touch(function, lo, hi, float(s.mid()))
        value, first, _ = function(arb(t))
        return min(floor(value + first * (x - t) - s * x) for x in (a, b))
    middle = 0.5 * lo + 0.5 * hi
    if depth < DEPTH and lo < middle < hi:
        return min(
            _least(function, lo, middle, s, depth + 1), _least(function, middle, hi, s, depth + 1)
        )
    bend = (b - a) ** 2 * second.abs_upper() / 8
    return floor(arb(ends) - bend) if math.isfinite(ends) else -math.inf


def _touch(function: Callable[[arb], Triple], lo: float, hi: float, slope: float) -> float:
    """Return a point where the derivative is near a slope; any point gives a sound tangent."""
    t = 0.5 * lo + 0.5 * hi
    for _ in range(5):
        _, first, second = (float(x.mid()) for x in function(arb(t)))
        if not second > 0:
            break
        moved = min(max(t - (first - slope) / second, lo), hi)
        if not math.isfinite(moved) or moved == t:
            break
        t = moved
    return t


def _negative(function: Callable[[arb], Triple]) -> Callable[[arb], Triple]:
    def negated(x: arb) -> Triple:
        value, first, second = function(x)
        return -value, -first, -second

    return negated


def _each(function: Callable[..., float], *xs: Array) -> Array:
    """Apply a function of numbers to entries, each distinct combination once."""
    flat = np.stack([x.reshape(-1) for x in xs], -1)
    distinct, where = np.unique(flat, axis=0, return_inverse=True)
    found = np.array([function(*map(float, row)) for row in distinct])
    return found[where.reshape(-1)].reshape(xs[0].shape)


def outside(name: str, x: Box) -> Array:
    """Return where a function may be undefined, or an end is not finite."""
    bad = ~(np.isfinite(x.lo) & np.isfinite(x.hi) & (x.lo <= x.hi))
    return bad | (x.lo <= 0) if name in POSITIVE else bad


def values(name: str, x: Box) -> Box:
    """Enclose a function over boxes."""
    function, bad = FUNCTIONS[name], outside(name, x)
    lo, hi = np.where(bad, 1.0, x.lo), np.where(bad, 1.0, x.hi)
    zero = np.zeros_like(lo)
    if name in RISING | FALLING:
        first, last = (lo, hi) if name in RISING else (hi, lo)

        def at(y: float) -> arb:
            return function(arb(y))[0]

        with ctx.workprec(BITS):
            below = _each(lambda y: floor(at(y)), first)
            above = _each(lambda y: ceiling(at(y)), last)
    else:
        below = _each(lambda *e: least_of_rest(function, *e), lo, hi, zero)
        above = -_each(lambda *e: least_of_rest(_negative(function), *e), lo, hi, zero)
    return Box(np.where(bad, -np.inf, below), np.where(bad, np.inf, above))


def slopes(name: str, x: Box) -> Box:
    """Enclose the derivative of a function over boxes."""
    function, bad = FUNCTIONS[name], outside(name, x)
    lo, hi = np.where(bad, 1.0, x.lo), np.where(bad, 1.0, x.hi)

    def ends(sign: int) -> Array:
        def one(a: float, b: float) -> float:
            with ctx.workprec(BITS):
                return _least_slope(function, a, b, sign, 0)

        return _each(one, lo, hi)

    return Box(np.where(bad, -np.inf, ends(1)), np.where(bad, np.inf, -ends(-1)))


def _least_slope(
    function: Callable[[arb], Triple], lo: float, hi: float, sign: int, depth: int
) -> float:
    """Bound `sign f'` from below: at an end where f'' has one sign in balls, else by halves."""
    a, b = arb(lo), arb(hi)
    _, first, second = function(a.union(b))
    if second >= 0 or second <= 0:
        return min(floor(sign * function(x)[1]) for x in (a, b))
    middle = 0.5 * lo + 0.5 * hi
    if depth < DEPTH and lo < middle < hi:
        halves = ((lo, middle), (middle, hi))
        return min(_least_slope(function, *half, sign, depth + 1) for half in halves)
    return floor(sign * first)


def lines(name: str, x: Box, below: Array, above: Array) -> tuple[Array, Array]:
    """Return the intercepts of sound lines with the given slopes below and above."""
    function, bad = FUNCTIONS[name], outside(name, x)
    lo, hi = np.where(bad, 1.0, x.lo), np.where(bad, 1.0, x.hi)
    under = _each(lambda *e: least_of_rest(function, *e), lo, hi, below)
    over = -_each(lambda *e: least_of_rest(_negative(function), *e), lo, hi, -above)
    return np.where(bad, -np.inf, under), np.where(bad, np.inf, over)


def chord(name: str, x: Box) -> Array:
    """Return fair slopes where a certificate gives none."""

    def slope(lo: float, hi: float) -> float:
        with ctx.workprec(BITS):
            a, b = FUNCTIONS[name](arb(lo)), FUNCTIONS[name](arb(hi))
            found = float(((b[0] - a[0]) / (arb(hi) - lo)).mid() if hi > lo else a[1].mid())
        return found if math.isfinite(found) else 0.0

    bad = outside(name, x)
    return _each(slope, np.where(bad, 1.0, x.lo), np.where(bad, 1.0, x.hi))


def exponentials(x: Array) -> Box:
    """Enclose exp of numbers at most zero, of which those far below give [0, tiny]."""
    near = np.maximum(x, -700.0)
    with ctx.workprec(BITS):
        lo = _each(lambda y: floor(arb(y).exp()), near)
        hi = _each(lambda y: ceiling(arb(y).exp()), near)
    return Box(np.where(x < -700.0, 0.0, np.maximum(lo, 0.0)), up(hi))
