"""Ranges and relaxations of single operations in torch, differentiable in slopes and ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as f

from assay.bounds.levels import arithmetic
from assay.bounds.rounding import Interval
from assay.bounds.rules import Choice, Smooth

Ends = tuple[Tensor, Tensor]
Relaxed = Any

VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "silu": f.silu,
    "gelu": f.gelu,
    "gelu_tanh": lambda x: f.gelu(x, approximate="tanh"),
    "softplus": f.softplus,
    "cube": lambda x: x**3,
}

HALVINGS = 16
"""Of an interval, to where a line touches: the value there moves with no first-order effect."""


def tensor(x: Any) -> Tensor:
    return torch.from_numpy(np.array(x, dtype=np.float64))


def least_product(rows: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Bound `rows . t` from below over t in [lo, hi]: (samples, rows)."""
    flat = rows.flatten(2)
    below, above = lo.reshape(len(lo), -1, 1), hi.reshape(len(hi), -1, 1)
    if lo is hi:
        return (flat @ below)[..., 0]
    return (flat.clamp_min(0) @ below + flat.clamp_max(0) @ above)[..., 0]


def by_sign(rows: Tensor, below: Tensor, above: Tensor) -> Tensor:
    return torch.where(rows > 0, rows * below[:, None], rows * above[:, None])


def as_interval(x: Ends) -> Interval:
    return Interval(x[0].detach().numpy(), x[1].detach().numpy())


def in_order(a: Tensor, b: Tensor) -> Ends:
    return torch.minimum(a, b), torch.maximum(a, b)


def meet(x: Ends, y: Ends) -> Ends:
    lo, hi = torch.maximum(x[0], y[0]), torch.minimum(x[1], y[1])
    return in_order(lo, hi)


def product_range(x: Ends, y: Ends) -> Ends:
    ends = [a * b for a in x for b in y]
    lo = torch.minimum(torch.minimum(ends[0], ends[1]), torch.minimum(ends[2], ends[3]))
    hi = torch.maximum(torch.maximum(ends[0], ends[1]), torch.maximum(ends[2], ends[3]))
    return lo, hi


def square_range(x: Ends) -> Ends:
    lo, hi = x
    crosses = (lo <= 0) & (hi >= 0)
    ends = in_order(lo * lo, hi * hi)
    return torch.where(crosses, torch.zeros_like(ends[0]), ends[0]), ends[1]


def plane_of_product(
    xs: list[Ends], alpha: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return p, q and the ends of `x y - p x - q y`, with p and q in units of the radii around the
    middles.
    """
    (a, b), (c, d) = xs[:2]
    p = (c + d) / 2 + alpha.clamp(-1, 1) * (d - c) / 2
    q = (a + b) / 2 + beta.clamp(-1, 1) * (b - a) / 2
    low, high = product_range((a - q, b - q), (c - p, d - p))
    if len(xs) == 4:
        plus, minus = (
            square_range((x[0] - shift, x[1] - shift))
            for x, shift in ((xs[2], p + q), (xs[3], q - p))
        )
        low = torch.maximum(low, (plus[0] - minus[1]) / 4)
        high = torch.minimum(high, (plus[1] - minus[0]) / 4)
    return p, q, low - p * q, high - p * q


def planes_of_sums(
    xs: list[Ends], alpha: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (a, b), (c, d) = xs
    p = (c + d) / 2 + alpha.clamp(-1, 1) * (d - c) / 2
    q = (a + b) / 2 + beta.clamp(-1, 1) * (b - a) / 2
    up_x, down_x = (b - q).clamp_min(0), (q - a).clamp_min(0)
    up_y, down_y = (d - p).clamp_min(0), (p - c).clamp_min(0)
    spread = torch.maximum(up_x, down_x) @ torch.maximum(up_y, down_y)
    low = torch.maximum(-spread, -(up_x @ down_y + down_x @ up_y))
    high = torch.minimum(spread, up_x @ up_y + down_x @ down_y)
    return p, q, low - q @ p, high - q @ p


def usual_slope(x: Ends) -> Tensor:
    """Return the slope of the line below ReLU that cuts off less."""
    return (x[1] > -x[0]).double()


def relu_lines(x: Ends, mine: Tensor) -> Relaxed:
    lo, hi = x
    unstable = (lo < 0) & (hi > 0)
    chord = torch.where(unstable, hi / (hi - lo).clamp_min(1e-300), (lo >= 0).double())
    slope = torch.where(mine == 0, usual_slope(x), (1 + mine.clamp(-1, 1)) / 2)
    below = torch.where(unstable, slope, chord)
    zero = torch.zeros_like(chord)
    return below, zero, chord, torch.where(unstable, -chord * lo, zero)


def smooth_range(operation: Smooth, x: Ends) -> Ends:
    value, function = VALUES[operation.name], operation.function
    operation.require_domain(as_interval(x))
    left, right = value(x[0]), value(x[1])
    if function.turn is not None:
        inside = (x[0] < function.turn[1]) & (x[1] > function.turn[0])
        lo = torch.minimum(left, right)
        return torch.where(inside, torch.full_like(lo, function.turn[2]), lo), torch.maximum(
            left, right
        )
    return (left, right) if function.rises else (right, left)


def smooth_lines(operation: Smooth, x: Ends, mine: tuple[Tensor, ...]) -> Relaxed:
    """Return lines whose slopes move within the slopes that the function has on the interval; the
    intercept is that of the nearest point, which moves with no first-order effect.
    """
    ends, function = as_interval(x), operation.function
    start = operation.slopes(ends)
    share = np.linspace(0, 1, 9).reshape(-1, *[1] * ends.lo.ndim)
    seen = function.slope(ends.lo + share * (ends.hi - ends.lo))
    least, most = tensor(seen.min(0)), tensor(seen.max(0))
    slopes = [
        torch.minimum(torch.maximum(tensor(s) + m.clamp(-1, 1) * (most - least), least), most)
        for s, m in zip(start, mine, strict=True)
    ]
    below, above = intercepts(operation, ends, *(s.detach().numpy() for s in slopes))
    lines = []
    for slope, (point, value) in zip(slopes, (below, above), strict=True):
        lines += [slope, tensor(value) - slope * tensor(point)]
    return tuple(lines)


def intercepts(
    operation: Smooth, x: Interval, below: np.ndarray, above: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return where `f(x) - s x` is least, and largest, with f there."""
    function = operation.function
    points = [[x.lo, x.hi], [x.lo, x.hi]]
    convex = function.convex
    for low, high in operation._stretches():
        if ((x.hi > low[0]) & (x.lo < high[1])).any():
            slope = below if convex else above
            t = operation._touch(x, slope, low[1], high[0], convex, HALVINGS)
            points[0 if convex else 1].append(np.clip(t, x.lo, x.hi))
        convex = not convex
    found = []
    for slope, candidates, best in zip((below, above), points, (np.argmin, np.argmax), strict=True):
        stacked = np.stack(np.broadcast_arrays(*candidates))
        values = function.value(stacked)
        chosen = best(values - slope * stacked, axis=0)[None]
        found.append(
            (
                np.take_along_axis(stacked, chosen, 0)[0],
                np.take_along_axis(values, chosen, 0)[0],
            )
        )
    return found


def _choice(operation: Choice, xs: list[Ends]) -> tuple[Ends, Tensor, Tensor]:
    """Return the ends of the threshold, and where x may be kept, and zeroed."""
    t = operation.threshold([as_interval(x) for x in xs], arithmetic("float64"))
    lo, hi = tensor(t.lo), tensor(t.hi)
    return (lo, hi), xs[0][1] >= lo, xs[0][0] <= hi


def choice_range(operation: Choice, xs: list[Ends]) -> Ends:
    (t, _), some, none = _choice(operation, xs)
    zero = torch.zeros_like(t)
    lo = torch.where(some, torch.maximum(xs[0][0], t), zero)
    hi = torch.where(some, xs[0][1], zero)
    return torch.where(none, lo.clamp_max(0), lo), torch.where(none, hi.clamp_min(0), hi)


def choice_lines(operation: Choice, xs: list[Ends], mine: tuple[Tensor, ...]) -> Relaxed:
    """Return lines whose slopes move between zero, or that of the usual line above, and the
    steepest.
    """
    (t_lo, t_hi), some, none = _choice(operation, xs)
    x, both = xs[0], some & none
    usual = operation.slopes(as_interval(x), Interval(t_lo.numpy(), t_hi.numpy()))
    below, above, below_most, above_most = (tensor(s) for s in usual)
    down = torch.minimum((below + mine[0].clamp(-1, 1) * below_most).clamp_min(0), below_most)
    up = above + mine[1].clamp(0, 1) * (above_most - above)
    zero = torch.zeros_like(down)
    ends = [x[0], torch.minimum(x[1], t_hi), torch.maximum(x[0], t_lo), x[1]]
    ends = [torch.where(both, end, zero) for end in ends]
    rests = [[-s * ends[0], -s * ends[1], (1 - s) * ends[2], (1 - s) * ends[3]] for s in (down, up)]
    low, high = torch.stack(rests[0]).amin(0), torch.stack(rests[1]).amax(0)
    fixed = some.double()
    return (
        torch.where(both, down, fixed),
        torch.where(both, low, zero),
        torch.where(both, up, fixed),
        torch.where(both, high, zero),
    )
