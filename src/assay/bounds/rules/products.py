"""Products of two values that both vary, under planes that may be chosen freely.

For every p and q, `x y = p x + q y + r` with `r = (x - q)(y - p) - p q`, so that the plane is sound
with the least (or the largest) r on the box. r is bilinear, so that its extremes over two intervals
lie at corners; and with s = x + y, d = x - y, `4 (x - q)(y - p) = (s - p - q)^2 - (d - q + p)^2`,
which is tighter where x and y vary together. McCormick's planes are p, q at the ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.bounds.levels import Arithmetic
from assay.bounds.nonlinear import MatMul, Multiply
from assay.bounds.operations import Carried, Shape
from assay.bounds.rounding import Array, Interval, add_up, mul_up, sub_down
from assay.errors import InputError


@dataclass(frozen=True)
class Planes:
    """Planes below and above a product: `p x + q y + rest`."""

    p: tuple[Array, Array]
    q: tuple[Array, Array]
    rest: Interval


def _square(x: Interval) -> Interval:
    """Enclose x^2."""
    far = x.magnitude()
    near = np.where((x.lo <= 0) & (x.hi >= 0), 0.0, np.minimum(np.abs(x.lo), np.abs(x.hi)))
    return Interval(
        np.maximum(np.nextafter(near * near, -np.inf), 0.0), np.nextafter(far * far, np.inf)
    )


def rest_of_plane(
    x: Interval, y: Interval, together: tuple[Interval, Interval] | None, p: Array, q: Array
) -> Interval:
    """Enclose `x y - p x - q y` on the box, given bounds of x + y and x - y where there are any."""
    exact_p, exact_q = Interval.exactly(p), Interval.exactly(q)
    ends = [
        (Interval.exactly(a) - exact_q) * (Interval.exactly(b) - exact_p)
        for a in (x.lo, x.hi)
        for b in (y.lo, y.hi)
    ]
    lo = np.minimum.reduce([end.lo for end in ends])
    hi = np.maximum.reduce([end.hi for end in ends])
    if together is not None:
        plus, minus = together
        both = (_square(plus - (exact_p + q)) - _square(minus - (exact_q - p))) * 0.25
        lo, hi = np.maximum(lo, both.lo), np.minimum(hi, both.hi)
    return Interval(lo, hi) - exact_p * q


@dataclass(frozen=True)
class Product(Multiply):
    """`x y` elementwise (y may have last axis 1); further parents x + y and x - y, where given,
    tighten the bound. An end of zero stays exact.
    """

    def interval(self, xs: list[Interval], ar: Arithmetic) -> Interval:
        x, y = xs[:2]
        value = x * y
        nought = ((x.lo == 0) & (x.hi == 0)) | ((y.lo == 0) & (y.hi == 0))
        if len(xs) == 4:
            value = value.meet((_square(xs[2]) - _square(xs[3])) * 0.25)
        return Interval(np.where(nought, 0.0, value.lo), np.where(nought, 0.0, value.hi))

    def relax(self, xs: list[Interval], ar: Arithmetic) -> Any:
        p, q = xs[1].midpoint(), xs[0].midpoint()
        return self.relax_at(xs, (p, q, p, q), ar)

    def relax_at(self, xs: list[Interval], slopes: tuple[Array, ...], ar: Arithmetic) -> Planes:
        """Return sound planes with slopes (p, q) below and (p, q) above."""
        x, y = xs[:2]
        together = (xs[2], xs[3]) if len(xs) == 4 else None
        below = rest_of_plane(x, y, together, slopes[0], slopes[1])
        same = slopes[0] is slopes[2] and slopes[1] is slopes[3]
        above = below if same else rest_of_plane(x, y, together, slopes[2], slopes[3])
        return Planes((slopes[0], slopes[2]), (slopes[1], slopes[3]), Interval(below.lo, above.hi))

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        x, y = xs[:2]
        of_x, of_y = _split(rows, *relaxed.p), _split(rows, *relaxed.q)
        if x.shape[1:] != y.shape[1:]:
            of_y = of_y.sum(-1, keepdims=True)
        p, q = (np.maximum(np.abs(low), np.abs(high)) for low, high in (relaxed.p, relaxed.q))
        grown = add_up(mul_up(p, x.magnitude()), mul_up(q, y.magnitude()))
        wobble = add_up(error, mul_up(ar.gamma(rows.shape[-1] + 1), grown))
        constant = sub_down(
            ar.lower(rows, relaxed.rest.lo, relaxed.rest.hi, wobble),
            ar.tail(rows.shape[-1], x.magnitude(), y.magnitude()),
        )
        return [of_x, of_y, *[None] * (len(xs) - 2)], constant


def _split(rows: Array, below: Array, above: Array) -> Array:
    """Return the rows times the slope that their sign asks for."""
    if below is above:
        return rows * below[:, None]
    return np.where(rows > 0, rows * below[:, None], rows * above[:, None])


@dataclass(frozen=True)
class Contract(MatMul):
    """`X Y` over the last two axes, under the planes of every product of entries with one p for
    each entry of Y and one q for each entry of X.
    """

    def shape(self, *parents: Shape) -> Shape:
        x, y = parents
        if len(x) < 2 or len(x) != len(y) or x[:-2] != y[:-2] or x[-1] != y[-2]:
            raise InputError(f"matmul: shapes {x} and {y} do not match")
        return (*x[:-1], y[-1])

    def relax(self, xs: list[Interval], ar: Arithmetic) -> Any:
        p, q = xs[1].midpoint(), xs[0].midpoint()
        return self.relax_at(xs, (p, q, p, q), ar)

    def relax_at(
        self, xs: list[Interval], slopes: tuple[Array, ...], ar: Arithmetic
    ) -> tuple[Any, ...]:
        """Return sound planes with slopes (p, q) below and (p, q) above: the slopes, the rest, and
        what a rounding of a carried coefficient costs.
        """
        x, y = xs
        rests = []
        for p, q in ((slopes[0], slopes[1]), (slopes[2], slopes[3])):
            # |(x - q)(y - p)| entry by entry: with midpoints the product of the radii.
            away_x = np.maximum((x - q).magnitude(), 0.0)
            away_y = np.maximum((y - p).magnitude(), 0.0)
            spread = ar.dot_up(away_x, away_y)
            low, high = self._one_sided(x, y, p, q, ar)
            rest = Interval(np.maximum(-spread, low), np.minimum(spread, high))
            rests.append(rest - ar.dot(q, p))
        grown = [
            add_up(ar.dot_up(x.magnitude(), np.abs(p)), ar.dot_up(np.abs(q), y.magnitude()))
            for p, q in ((slopes[0], slopes[1]), (slopes[2], slopes[3]))
        ]
        rest = Interval(rests[0].lo, rests[1].hi)
        return slopes, rest, np.maximum(grown[0], grown[1])

    def _one_sided(
        self, x: Interval, y: Interval, p: Array, q: Array, ar: Arithmetic
    ) -> tuple[Array, Array]:
        """Bound `sum_k (x_k - q_k)(y_k - p_k)` by the signs that the factors can have."""
        a, b = x - q, y - p
        up_a, down_a = np.maximum(a.hi, 0.0), np.maximum(-a.lo, 0.0)
        up_b, down_b = np.maximum(b.hi, 0.0), np.maximum(-b.lo, 0.0)
        low = -add_up(ar.dot_up(up_a, down_b), ar.dot_up(down_a, up_b))
        high = add_up(ar.dot_up(up_a, up_b), ar.dot_up(down_a, down_b))
        return low, high

    def backward(
        self, rows: Array, xs: list[Interval], relaxed: Any, error: Array | float, ar: Arithmetic
    ) -> Carried:
        (p, q, p_above, q_above), rest, grown = relaxed
        if p is p_above and q is q_above:
            of_x = rows @ np.swapaxes(p, -1, -2)[:, None]
            of_y = np.swapaxes(q, -1, -2)[:, None] @ rows
            terms = max(rows.shape[-2:])
        else:
            plus, minus = np.maximum(rows, 0.0), np.minimum(rows, 0.0)
            of_x = plus @ np.swapaxes(p, -1, -2)[:, None]
            of_x = of_x + minus @ np.swapaxes(p_above, -1, -2)[:, None]
            of_y = np.swapaxes(q, -1, -2)[:, None] @ plus
            of_y = of_y + np.swapaxes(q_above, -1, -2)[:, None] @ minus
            terms = 2 * max(rows.shape[-2:]) + 1
        wobble = add_up(error, mul_up(ar.gamma(terms), grown))
        tail = ar.tail(terms, xs[0].magnitude(), xs[1].magnitude())
        return [of_x, of_y], sub_down(ar.lower(rows, rest.lo, rest.hi, wobble), tail)
