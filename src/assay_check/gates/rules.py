"""What the checker knows of each operation: its range on boxes, and one step of a lower bound back
to what it reads.

`step(rows, ...)` takes rows A (rows, *shape) of a node and returns, for every parent, coefficients
with a bound of their rounding errors, and a constant: `A . op(x) >= sum_p A_p . x_p + c` for all x
in the boxes, whatever slopes the certificate gives."""

from dataclasses import replace
from typing import Any

import numpy as np

from assay_check.gates import choices, smooth
from assay_check.gates.arithmetic import (
    TINY,
    UNIT,
    Array,
    Box,
    down,
    exactly,
    gamma,
    least,
    minus,
    plus,
    product,
    product_up,
    square,
    times,
    total,
    up,
)
from assay_check.gates.graph import Node
from assay_check.gates.lines import (
    Lines,
    Slopes,
    relu_lines,
    rest_of_product,
    rest_of_sum,
    root,
    root_lines,
    shares,
    softmax_rest,
    square_lines,
    sum_of_products,
)
from assay_check.reading import need

Part = tuple[Array, Array | None] | None  # coefficients, and a bound of their errors if any
Step = tuple[list[Part], Array]
BENT = {"relu", "square", "inverse root", "smooth", "slope", "decided"} | choices.CHOICES
NONLINEAR = BENT | {"product", "contract", "softmax"}


class NoBoundError(Exception):
    """A value is not bounded on a box."""


def enclose(node: Node, xs: list[Box]) -> Box:
    """Return a box of the values of an operation on boxes."""
    held = node.constants
    match node.op:
        case "constant":
            return exactly(held[0])
        case "affine":
            middle, radius = xs[0].middle(), xs[0].radius()
            centre, spread = product(middle, held[0].T), product_up(radius, np.abs(held[0]).T)
            return plus(plus(centre, Box(-spread, spread)), exactly(held[1]))
        case "scale":
            return plus(times(xs[0], exactly(held[0])), exactly(held[1]))
        case "shift":
            return plus(xs[0], exactly(held[0]))
        case "divide":
            ends = xs[0].lo / held[0], xs[0].hi / held[0]
            return Box(down(np.minimum(*ends)), up(np.maximum(*ends)))
        case "add":
            return plus(*xs)
        case "subtract":
            return minus(*xs)
        case "view":
            return Box(xs[0].lo.reshape(node.shape), xs[0].hi.reshape(node.shape))
        case "move":
            return Box(_moved(node, [x.lo for x in xs]), _moved(node, [x.hi for x in xs]))
        case "product":
            found = times(xs[0], xs[1])
            if len(xs) == 4:  # 4 x y = (x + y)^2 - (x - y)^2
                both = times(minus(square(xs[2]), square(xs[3])), exactly(np.asarray(0.25)))
                found = found.meet(both.lo, both.hi)
            return found
        case "contract":
            return sum_of_products(*xs)
        case "relu":
            return Box(np.maximum(xs[0].lo, 0.0), np.maximum(xs[0].hi, 0.0))
        case "square":
            return square(xs[0])
        case "inverse root":
            return Box(root(node, xs[0].hi).lo, root(node, xs[0].lo).hi)
        case "softmax":
            return shares(xs[0], np.broadcast_to(held[0], node.shape))
        case "total":
            return total(xs[0])
        case "smooth":
            return smooth.values(node.name, xs[0])
        case "jump" | "largest" | "open":
            return choices.values(node, xs)
        case "decided":
            found_ = choices.decided(replace(node, op=node.name), xs)
            if found_ is None:
                raise NoBoundError("a choice that is open on a box has no derivative")
            return found_
        case "span":
            return Box(*held)
        case "slope" if node.name == "relu":  # at the kink, any number between 0 and 1
            return Box((xs[0].lo > 0).astype(np.float64), (xs[0].hi >= 0).astype(np.float64))
        case "slope":
            return smooth.slopes(node.name, xs[0])
    raise AssertionError(node.op)


def relax(node: Node, xs: list[Box], slopes: Slopes | None) -> Any:
    """Return what a step needs to know of a nonlinear operation on boxes; InputError for slopes of
    another shape, or not finite.
    """
    x = xs[0]
    wanted = slope_shapes(node.op, x.shape, xs[-1].shape if len(xs) < 3 else xs[1].shape)
    if slopes is not None:
        fits = len(slopes) == len(wanted) and all(
            s.shape == shape and s.dtype.kind == "f" and bool(np.isfinite(s).all())
            for s, shape in zip(slopes, wanted, strict=True)
        )
        need(fits, f"slopes of a node ({node.op}) must be finite, of the shapes {wanted}")
        slopes = tuple(s.astype(np.float64) for s in slopes)
    match node.op:
        case "relu":
            return relu_lines(x, slopes)
        case "square":
            return square_lines(x, slopes)
        case "inverse root":
            return root_lines(node, x, slopes)
        case "smooth":
            if slopes is None:
                chord = smooth.chord(node.name, x)
                slopes = (chord, chord)
            below, above = smooth.lines(node.name, x, *slopes)
            return Lines(slopes[0], below, slopes[1], above)
        case "product" | "contract":
            p, q = xs[1].middle(), x.middle()
            mine = (p, q, p, q) if slopes is None else slopes
            rest = rest_of_product if node.op == "product" else rest_of_sum
            return mine, rest(xs, mine[0], mine[1])[0], rest(xs, mine[2], mine[3])[1]
        case "softmax":
            return softmax_rest(x, np.broadcast_to(node.constants[0], node.shape))
        case "jump" | "largest" | "open":
            return Lines(*choices.lines(node, xs, slopes))
        case "slope" | "decided":
            return enclose(node, xs)
    return None


def slope_shapes(op: str, x: tuple[int, ...], y: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shapes of the slopes that an operation takes."""
    match op:
        case "relu" | "square" | "inverse root":
            return [x]
        case "smooth" | "jump" | "largest" | "open":
            return [x, x]
        case "product":
            return [x] * 4
        case "contract":
            return [y, x, y, x]
    return []


def step(node: Node, rows: Array, xs: list[Box], relaxed: Any) -> Step:
    """Carry rows of a node to its parents."""
    held, none = node.constants, np.zeros(len(rows))
    match node.op:
        case "affine":
            flat = rows.reshape(-1, rows.shape[-1])
            shape = (*rows.shape[:-1], held[0].shape[1])
            terms = len(held[0])
            error = gamma(terms) * product_up(np.abs(flat), np.abs(held[0])) + 2 * terms * TINY
            part = (flat @ held[0]).reshape(shape), up(error).reshape(shape)
            bias = np.broadcast_to(held[1], node.shape)
            return [part], least(rows, bias, bias) if held[1].any() else none
        case "scale":
            bias = np.broadcast_to(held[1], node.shape)
            constant = least(rows, bias, bias) if held[1].any() else none
            return [_rounded(rows * held[0])], constant
        case "shift":
            bias = np.broadcast_to(held[0], node.shape)
            return [_exact(rows)], least(rows, bias, bias)
        case "divide":
            return [_rounded(rows / held[0])], none
        case "add":
            return [_exact(rows), _exact(rows)], none
        case "subtract":
            return [_exact(rows), _exact(-rows)], none
        case "view":
            return [_exact(rows.reshape(len(rows), *xs[0].shape))], none
        case "move":
            constant = least(rows, held[0], held[0]) if held[0].any() else none
            return _unmoved(node, rows, xs), constant
        case "total":
            shape = (len(rows), *xs[0].shape)
            return [_exact(np.broadcast_to(rows, shape))], none
        case "product":
            (p, q, p_above, q_above), low, high = relaxed
            of_y = _rounded(_by_sign(rows, q, q_above))
            if xs[1].shape != xs[0].shape:
                of_y = _summed(of_y)
            parts: list[Part] = [_rounded(_by_sign(rows, p, p_above)), of_y]
            return [*parts, *[None] * (len(xs) - 2)], least(rows, low, high)
        case "contract":
            return _step_of_sum(rows, *relaxed)
        case "softmax":
            share, kept, low, high = relaxed
            chosen = rows * kept
            inner = (chosen * share).sum(-1, keepdims=True)
            terms = rows.shape[-1]
            error = (
                gamma(terms + 4)
                * share
                * (np.abs(chosen) + (np.abs(chosen) * share).sum(-1, keepdims=True))
            )
            part = share * (chosen - inner), up(error * (1 + 2 * gamma(terms)) + 8 * terms * TINY)
            return [part], least(rows, low, high)
        case "slope" | "decided":
            return [None] * len(xs), least(rows, relaxed.lo, relaxed.hi)
    lines = relaxed
    part = _rounded(_by_sign(rows, lines.below_slope, lines.above_slope))
    return [part, *[None] * (len(xs) - 1)], least(rows, lines.below, lines.above)


def _exact(rows: Array) -> tuple[Array, Array | None]:
    return rows, None


def _rounded(rows: Array) -> tuple[Array, Array]:
    """Return coefficients that one rounding formed, with its error."""
    return rows, 2 * UNIT * np.abs(rows) + TINY


def _by_sign(rows: Array, below: Array, above: Array) -> Array:
    return np.where(rows > 0, rows * below, rows * above)


def _summed(part: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return coefficients of a number that stands for all entries of the last axis."""
    rows, error = part
    terms = rows.shape[-1]
    rounding = gamma(terms) * np.abs(rows).sum(-1, keepdims=True)
    whole = (rounding + error.sum(-1, keepdims=True)) * (1 + 4 * gamma(terms)) + TINY
    return rows.sum(-1, keepdims=True), up(whole)


def _moved(node: Node, xs: list[Array]) -> Array:
    fill, *places = node.constants
    out = fill.reshape(-1).copy()
    for to, start, x in zip(places[::2], places[1::2], xs, strict=True):
        out[to] = x.reshape(-1)[start]
    return out.reshape(node.shape)


def _unmoved(node: Node, rows: Array, xs: list[Box]) -> list[Part]:
    flat, parts = rows.reshape(len(rows), -1), list[Part]()
    places = node.constants[1:]
    for to, start, x in zip(places[::2], places[1::2], xs, strict=True):
        found, error = np.zeros((x.lo.size, len(rows))), None
        most = int(np.bincount(start, minlength=1).max()) if len(start) else 0
        taken = flat[:, to].T
        if most > 1:
            np.add.at(found, start, taken)
            sizes = np.zeros_like(found)
            np.add.at(sizes, start, np.abs(taken))
            error = up(gamma(most) * sizes * (1 + 2 * gamma(most))).T
            error = error.reshape(len(rows), *x.shape)
        else:
            found[start] = taken
        parts.append((np.ascontiguousarray(found.T).reshape(len(rows), *x.shape), error))
    return parts


def _step_of_sum(rows: Array, slopes: Slopes, low: Array, high: Array) -> Step:
    p, q, p_above, q_above = slopes
    plus_, minus_ = np.maximum(rows, 0.0), np.minimum(rows, 0.0)

    def carried(left: Array, right: Array) -> tuple[Array, Array]:
        terms = left.shape[-1]
        return left @ right, gamma(terms) * product_up(np.abs(left), np.abs(right)) + terms * TINY

    pairs = [
        [carried(plus_, np.swapaxes(p, -1, -2)), carried(minus_, np.swapaxes(p_above, -1, -2))],
        [carried(np.swapaxes(q, -1, -2), plus_), carried(np.swapaxes(q_above, -1, -2), minus_)],
    ]
    parts: list[Part] = []
    for (one, first), (other, second) in pairs:
        value = one + other
        parts.append((value, up(first + second + 2 * UNIT * np.abs(value))))
    return parts, least(rows, low, high)
