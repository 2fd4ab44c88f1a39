"""Random uses of every rule, with the true value in exact or ball arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flint import arb, ctx

from assay.bounds import nonlinear
from assay.bounds import operations as ops
from assay.bounds.levels import arithmetic
from assay.bounds.rounding import Interval
from assay.bounds.rules import (
    FUNCTIONS,
    Contract,
    Divide,
    Enclosed,
    Jump,
    Largest,
    Open,
    Pick,
    Product,
    Shift,
    Smooth,
    Total,
)
from assay.bounds.search.slopes import relax

Rng = np.random.Generator
ROWS, POINTS = 3, 4


@dataclass(frozen=True)
class Use:
    """One use of a rule: the operation on boxes (1, *shape), slopes, and its exact value."""

    operation: Any
    boxes: list[Interval]
    slopes: tuple[np.ndarray, ...] | None
    value: Callable[[list[np.ndarray]], np.ndarray]
    run32: Callable[..., torch.Tensor] | None = None


def exact(x: np.ndarray) -> np.ndarray:
    """The entries as balls without radius, in an object array."""
    return np.array([arb(float(v)) for v in x.ravel()] + [None])[:-1].reshape(x.shape)


def box(rng: Rng, *shape: int, low: float = -np.inf) -> Interval:
    """A random box of float32 numbers: a point, a narrow one or a wide one, entry by entry."""
    centre = rng.normal(size=(1, *shape)) * 10.0 ** rng.integers(-2, 2)
    width = np.abs(rng.normal(size=(1, *shape))) * 10.0 ** rng.integers(-4, 2)
    width *= rng.integers(0, 2, size=(1, *shape)) * (rng.random() > 0.4)
    if low > -np.inf:
        centre = low + np.abs(centre) + 0.02
        width = np.minimum(width, 20.0)
    lo = centre.astype(np.float32).astype(np.float64)
    hi = (centre + np.minimum(width, 30.0)).astype(np.float32).astype(np.float64)
    return Interval(lo, np.maximum(hi, lo))


def inside(rng: Rng, x: Interval) -> np.ndarray:
    """A random point of a box, often a corner."""
    share = rng.random(x.lo.shape)
    share = np.where(rng.random(x.lo.shape) < 0.5, np.round(share), share)
    point = np.clip(x.lo + share * (x.hi - x.lo), x.lo, x.hi)
    near = point.astype(np.float32).astype(np.float64)
    return np.where((near >= x.lo) & (near <= x.hi), near, x.lo)[0]


def float32(rng: Rng, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32).astype(np.float64)


def smooth(name: str) -> Callable[[Rng], Use]:
    function = FUNCTIONS[name]
    torch_form: Any = {
        "exp": torch.exp,
        "log": torch.log,
        "sqrt": torch.sqrt,
        "rsqrt": torch.rsqrt,
        "reciprocal": torch.reciprocal,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "erf": torch.erf,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "cube": lambda x: x**3,
    }.get(name)

    def use(rng: Rng) -> Use:
        x = box(rng, 6, low=function.above)
        if name == "exp":
            x = Interval(np.clip(x.lo, -40, 40), np.clip(x.hi, -40, 40))
        operation = Smooth(name)
        below, above = operation.slopes(x)
        jitter = rng.normal(size=(2, *x.lo.shape)) * (rng.random() < 0.5)
        slopes = (below * (1 + jitter[0]) + 0.1 * jitter[0], above * (1 + jitter[1]))
        return Use(
            operation,
            [x],
            slopes,
            lambda xs: np.array([function.ball(v) for v in exact(xs[0]).ravel()]),
            torch_form,
        )

    return use


def relu(rng: Rng) -> Use:
    x = box(rng, 6)
    zero = arb(0)
    return Use(
        nonlinear.Relu(),
        [x],
        (rng.random(x.lo.shape),),
        lambda xs: np.array([v if v > 0 else zero for v in exact(xs[0])]),
        torch.relu,
    )


def square(rng: Rng) -> Use:
    x = box(rng, 6)
    return Use(
        nonlinear.Square(),
        [x],
        (2 * x.midpoint() + rng.normal(size=x.lo.shape),),
        lambda xs: exact(xs[0]) ** 2,
        lambda x: x * x,
    )


def inverse_root(rng: Rng) -> Use:
    x = box(rng, 6, low=0.0)
    operation = nonlinear.InverseRoot(Interval.exactly(0.25), Interval.exactly(0.5))
    return Use(
        operation,
        [x],
        (x.lo + rng.random(x.lo.shape) * (x.hi - x.lo),),
        lambda xs: np.array([(v / 4 + arb(0.5)).rsqrt() for v in exact(xs[0])]),
    )


def product(rng: Rng) -> Use:
    x, y = box(rng, 6), box(rng, 6)
    slopes = tuple(
        other.midpoint() + rng.normal(size=x.lo.shape) * other.radius() for other in (y, x, y, x)
    )
    return Use(
        Product(), [x, y], slopes, lambda xs: exact(xs[0]) * exact(xs[1]), lambda x, y: x * y
    )


def product_together(rng: Rng) -> Use:
    """A product whose factors share what varies, with bounds of their sum and difference."""
    t = box(rng, 6)
    y = Interval(t.lo, t.hi)
    slopes = tuple(rng.normal(size=t.lo.shape) + t.midpoint() for _ in range(4))
    double = Interval(2 * t.lo, 2 * t.hi)
    nothing = Interval(np.zeros_like(t.lo), np.zeros_like(t.lo))
    return Use(Product(), [t, y, double, nothing], slopes, lambda xs: exact(xs[0]) * exact(xs[0]))


def product_column(rng: Rng) -> Use:
    x, y = box(rng, 2, 3), box(rng, 2, 1)
    wide = np.broadcast_to
    slopes = tuple(
        wide(other.midpoint(), x.lo.shape) + rng.normal(size=x.lo.shape) for other in (y, x, y, x)
    )
    return Use(
        Product(), [x, y], slopes, lambda xs: exact(xs[0]) * exact(xs[1]), lambda x, y: x * y
    )


def contract(rng: Rng) -> Use:
    x, y = box(rng, 2, 3), box(rng, 3, 2)
    slopes = tuple(
        other.midpoint() + np.clip(rng.normal(size=other.lo.shape), -1, 1) * other.radius()
        for other in (y, x, y, x)
    )
    return Use(
        Contract(), [x, y], slopes, lambda xs: exact(xs[0]) @ exact(xs[1]), lambda x, y: x @ y
    )


def softmax(rng: Rng) -> Use:
    x = box(rng, 5)
    x = Interval(np.clip(x.lo, -30, 30), np.clip(x.hi, -30, 30))

    def value(xs: list[np.ndarray]) -> np.ndarray:
        e = np.array([v.exp() for v in exact(xs[0])])
        return e / sum(e, arb(0))

    return Use(nonlinear.Softmax(np.ones(5)), [x], None, value, lambda x: x.softmax(-1))


def affine(rng: Rng) -> Use:
    x, W, b = box(rng, 4), float32(rng, 3, 4), float32(rng, 3)
    return Use(
        ops.Affine(W, b),
        [x],
        None,
        lambda xs: exact(xs[0]) @ exact(W.T) + exact(b),
        lambda x: x @ torch.tensor(W, dtype=torch.float32).T + torch.tensor(b, dtype=torch.float32),
    )


def total(rng: Rng) -> Use:
    x = box(rng, 2, 5)
    return Use(
        Total(5),
        [x],
        None,
        lambda xs: exact(xs[0]) @ exact(np.ones((5, 1))),
        lambda x: x.sum(-1, keepdim=True),
    )


def shift(rng: Rng) -> Use:
    x, b = box(rng, 5), float32(rng, 5)
    return Use(
        Shift(b),
        [x],
        None,
        lambda xs: exact(xs[0]) + exact(b),
        lambda x: x + torch.tensor(b, dtype=torch.float32),
    )


def divide(rng: Rng) -> Use:
    x, c = box(rng, 5), float32(rng, 5) + 0.001
    c = c.astype(np.float32).astype(np.float64)
    return Use(
        Divide(c),
        [x],
        None,
        lambda xs: exact(xs[0]) / exact(c),
        lambda x: x / torch.tensor(c, dtype=torch.float32),
    )


def enclosed(rng: Rng) -> Use:
    x = box(rng, 5)
    point = inside(rng, x)
    return Use(Enclosed(x.lo[0], x.hi[0]), [], None, lambda xs: exact(point))


def pick(rng: Rng) -> Use:
    x, y = box(rng, 4), box(rng, 3)
    start = rng.integers(-1, 7, size=9)
    fill = np.where(start < 0, float32(rng, 9), 0.0)
    one, two = (
        (np.flatnonzero((start >= low) & (start < high)), low) for low, high in ((0, 4), (4, 7))
    )
    sources = tuple((to, start[to] - low) for to, low in (one, two))

    def value(xs: list[np.ndarray]) -> np.ndarray:
        joined = np.concatenate([exact(xs[0]), exact(xs[1])])
        return np.array(
            [joined[s] if s >= 0 else arb(float(f)) for s, f in zip(start, fill, strict=True)]
        )

    return Use(Pick(fill, sources, (4, 3)), [x, y], None, value)


def features(rng: Rng, *shape: int) -> Interval:
    """Numbers around zero and around each other, so that many choices are open."""
    x = box(rng, *shape)
    return Interval(np.clip(x.lo, -3, 3), np.clip(x.hi, -3, 3))


def any_slopes(rng: Rng, x: Interval) -> tuple[np.ndarray, ...]:
    return tuple(rng.normal(size=x.lo.shape) * 10.0 ** rng.integers(-1, 2) for _ in range(2))


def lengths(rng: Rng, *shape: int) -> Interval:
    """Norms, one of which may be zero."""
    n = np.abs(float32(rng, 1, *shape)) * (rng.random((1, *shape)) > 0.1)
    return Interval(n, n * (1 + 2.0**-20))


def positive(v: arb) -> arb:
    return v if v > 0 else arb(0)


def jump(norms: bool) -> Callable[[Rng], Use]:
    def use(rng: Rng) -> Use:
        x, theta = features(rng, 6), np.maximum(float32(rng, 6), 0.0)
        n = [lengths(rng, 6)] if norms else []

        def value(xs: list[np.ndarray]) -> np.ndarray:
            sizes = exact(xs[0]) * exact(xs[1] if norms else np.ones(6))
            return np.array(
                [
                    positive(v) if s > arb(t) else arb(0)
                    for v, s, t in zip(exact(xs[0]), sizes, theta.tolist(), strict=True)
                ]
            )

        limit = torch.tensor(theta, dtype=torch.float32)
        run = None if norms else lambda x: torch.relu(x) * (x > limit)
        return Use(Jump(theta), [x, *n], any_slopes(rng, x), value, run)

    return use


def largest(norms: bool) -> Callable[[Rng], Use]:
    def use(rng: Rng) -> Use:
        x, count = features(rng, 2, 5), int(rng.integers(1, 7))
        n = [lengths(rng, 2, 5)] if norms else []

        def value(xs: list[np.ndarray]) -> np.ndarray:
            found = np.array([[arb(0)] * 5] * 2)
            for row in range(2):
                v = [positive(entry) for entry in exact(xs[0][row])]
                s = [a * b for a, b in zip(v, exact(xs[1][row]), strict=True)] if norms else v
                order = sorted(range(5), key=lambda i: -float(s[i]))
                for i in order[:count]:
                    found[row, i] = v[i]
            return found

        def run(x: torch.Tensor) -> torch.Tensor:
            p = torch.relu(x)
            chosen = p.topk(min(count, 5), dim=-1).indices
            return torch.zeros_like(p).scatter(-1, chosen, p.gather(-1, chosen))

        return Use(Largest(count), [x, *n], any_slopes(rng, x), value, None if norms else run)

    return use


def opened(rng: Rng) -> Use:
    x, d = box(rng, 6), features(rng, 6)
    return Use(
        Open(),
        [x, d],
        any_slopes(rng, x),
        lambda xs: np.array(
            [v if s > 0 else arb(0) for v, s in zip(exact(xs[0]), exact(xs[1]), strict=True)]
        ),
        lambda x, d: x * (d > 0),
    )


RULES: dict[str, Callable[[Rng], Use]] = {
    **{name: smooth(name) for name in FUNCTIONS},
    "relu": relu,
    "square": square,
    "inverse root": inverse_root,
    "product": product,
    "product of what varies together": product_together,
    "product with a column": product_column,
    "contraction": contract,
    "jump": jump(norms=False),
    "jump by norm": jump(norms=True),
    "largest": largest(norms=False),
    "largest by norm": largest(norms=True),
    "open": opened,
    "softmax": softmax,
    "affine": affine,
    "total": total,
    "shift": shift,
    "divide": divide,
    "enclosed": enclosed,
    "pick": pick,
}


def violations(
    name: str, rng: Rng, level: str, cases: int, *, planted: float = 0.0
) -> tuple[int, int]:
    """Return how many of about `cases` random checks of a rule fail, and how many were made.

    A check: the interval holds the true value; the linear bound of a random row is below it; at
    level float32 the executed value lies within the error around the interval. planted: how far
    every constant is moved the wrong way, relative to what it is made of."""
    ar, failed, made = arithmetic(level), 0, 0
    with np.errstate(all="ignore"), ctx.workprec(256):
        while made < cases:
            use = RULES[name](rng)
            operation, boxes = use.operation, use.boxes
            whole = operation.interval(boxes, ar)
            rows = rng.normal(size=(1, ROWS, *whole.shape[1:]))
            relaxed = relax(operation, boxes, use.slopes, ar)
            parts, constant = operation.backward(rows, boxes, relaxed, 0.0, ar)
            constant = np.broadcast_to(constant, (1, ROWS))[0]
            error = operation.error(boxes, whole) if use.run32 and level == "float32" else None
            for _ in range(POINTS):
                xs = [inside(rng, x) for x in boxes]
                if len(boxes) == 4:
                    xs[1] = xs[0]
                    xs[2], xs[3] = 2 * xs[0], 0 * xs[0]
                true = use.value(xs).reshape(-1)
                if error is not None and use.run32 is not None:
                    run = use.run32(*(torch.tensor(x, dtype=torch.float32) for x in xs))
                    shown = run.double().numpy().reshape(-1)
                    wide = np.broadcast_to(error, whole.lo.shape)[0].reshape(-1)
                    low, high = whole.lo[0].reshape(-1) - wide, whole.hi[0].reshape(-1) + wide
                    failed += int(np.sum((shown < low) | (shown > high)))
                    made += shown.size
                slack = 0.0 if level != "float64" else 1e-9
                size = np.array([float(abs(v).upper()) for v in true])
                for v, low, high, s in zip(
                    true, whole.lo[0].reshape(-1), whole.hi[0].reshape(-1), size, strict=True
                ):
                    lift = planted * (1 + s) - slack * (1 + s)
                    failed += int(v < arb(float(low + lift)))
                    failed += int(v > arb(float(high - lift)))
                    made += 1
                for r in range(ROWS):
                    left = sum(
                        (
                            arb(float(a)) * v
                            for a, v in zip(rows[0, r].reshape(-1), true, strict=True)
                        ),
                        arb(0),
                    )
                    right, scale = (
                        arb(float(constant[r])),
                        float(np.abs(rows[0, r]).reshape(-1) @ size),
                    )
                    for part, x in zip(parts, xs, strict=True):
                        if part is None:
                            continue
                        mine = np.broadcast_to(part, (1, ROWS, *x.shape))[0, r].reshape(-1)
                        right += sum(
                            (
                                arb(float(a)) * arb(float(v))
                                for a, v in zip(mine, x.reshape(-1), strict=True)
                            ),
                            arb(0),
                        )
                        scale += float(np.abs(mine) @ np.abs(x.reshape(-1)))
                    lift = (planted - slack) * (1 + scale)
                    failed += int(right + arb(lift) > left)
                    made += 1
    return failed, made
