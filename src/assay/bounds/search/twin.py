"""The same bounds in torch at level float64, differentiable in the slopes and in the ends of the
boxes: what the search for tight bounds descends on. Nothing here is a proof.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as f

from assay.bounds import nonlinear, relaxations
from assay.bounds import operations as ops
from assay.bounds.graph import Ref
from assay.bounds.levels import arithmetic
from assay.bounds.operations import Operation
from assay.bounds.rounding import Interval
from assay.bounds.rules import Contract, Divide, Enclosed, Pick, Product, Shift, Smooth, Total
from assay.bounds.search.sweep import NARROW, readers
from assay.bounds.trace.traced import LevelGraph
from assay.errors import AssayError

Ends = tuple[Tensor, Tensor]
Parameters = dict[Ref, tuple[Tensor, ...]]
Relaxed = Any

_VALUES = {
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


def _tensor(x: Any) -> Tensor:
    return torch.from_numpy(np.array(x, dtype=np.float64))


@dataclass
class State:
    """Ends of every node, and the relaxations that were worked out from them."""

    values: list[Ends]
    relaxed: dict[Ref, Relaxed]


class Twin:
    """A graph at level float64 in torch.

    Parameters are unit-free: 0 is the default relaxation, and -1 to 1 reaches the ends."""

    def __init__(self, at: LevelGraph) -> None:
        if at.level != "float64":
            raise AssayError(f"the search needs a graph at level float64, got {at.level!r}")
        self.at, self.graph = at, at.graph
        self.wanted = readers(at.graph)
        self.last = len(at.graph.nodes) - 1
        self._constants: dict[Ref, tuple[Tensor, ...]] = {}

    def parameters(self, samples: int) -> Parameters:
        """Return parameters of zero for every relaxation that has slopes to choose."""
        found: Parameters = {}
        for ref, node in enumerate(self.graph.nodes):
            shapes = [self.graph.nodes[p].shape for p in node.parents]
            match node.operation:
                case Product() | Contract():
                    x, y = shapes[:2]
                    sizes = [node.shape] * 4 if isinstance(node.operation, Product) else [y, x] * 2
                case nonlinear.Relu() | nonlinear.Square() | nonlinear.InverseRoot():
                    sizes = [node.shape]
                case Smooth():
                    sizes = [node.shape] * 2
                case _:
                    continue
            found[ref] = tuple(
                torch.zeros(samples, *size, dtype=torch.float64) for size in sizes
            )
        return found

    def sweep(
        self,
        boxes: Sequence[Ends],
        parameters: Parameters,
        *,
        before: Sequence[Ends] | None = None,
        refine: bool = True,
    ) -> State:
        """Enclose every node over boxes, (samples, *shape) each."""
        state, given = State([], {}), dict(zip(self.graph.inputs, boxes, strict=True))
        for ref, node in enumerate(self.graph.nodes):
            if node.operation is None:
                value = given[ref]
            else:
                value = self._interval(ref, [state.values[p] for p in node.parents])
            if ref in self.at.limits:
                limit = self.at.limits[ref]
                value = _meet(value, (_tensor(limit.lo), _tensor(limit.hi)))
            if before is not None:
                value = _meet(value, before[ref])
            if not (value[0].isfinite().all() and value[1].isfinite().all()):
                raise AssayError("a value overflows in float64")
            state.values.append(value)
            if refine and ref in self.wanted:
                units = _worth(value, self.wanted[ref])
                if len(units):
                    state.values[ref] = self._tightened(state, parameters, ref, units)
        return state

    def bound(self, state: State, parameters: Parameters, rows: Tensor) -> Tensor:
        """Bound `rows . output` from below: (samples, rows)."""
        return self.carry(state, parameters, {self.last: rows})[0]

    def carry(
        self, state: State, parameters: Parameters, rows: Mapping[Ref, Tensor]
    ) -> tuple[Tensor, dict[Ref, Tensor]]:
        """Carry rows (samples or 1, rows, *shape) of nodes to the inputs; return the bounds and
        the rows that reached each node.
        """
        pending, passed = dict(rows), dict[Ref, Tensor]()
        total: Any = 0.0
        for ref in range(max(pending), -1, -1):
            if ref not in pending:
                continue
            mine, node = pending.pop(ref), self.graph.nodes[ref]
            passed[ref] = mine
            if node.operation is None:
                total = total + _least(mine, *state.values[ref])
                continue
            xs = [state.values[p] for p in node.parents]
            if ref not in state.relaxed:
                state.relaxed[ref] = self._relax(ref, xs, parameters)
            parts, constant = self._backward(ref, mine, xs, state.relaxed[ref])
            total = total + constant
            for parent, part in zip(node.parents, parts, strict=True):
                if part is not None:
                    pending[parent] = pending[parent] + part if parent in pending else part
        return total, passed

    def _tightened(
        self, state: State, parameters: Parameters, ref: Ref, units: Tensor
    ) -> Ends:
        lo, hi = state.values[ref]
        shape = self.graph.nodes[ref].shape
        count = len(units)
        rows = torch.zeros(1, 2 * count, lo[0].numel(), dtype=torch.float64)
        rows[0, torch.arange(count), units] = 1.0
        rows[0, torch.arange(count) + count, units] = -1.0
        both = self.carry(state, parameters, {ref: rows.reshape(1, 2 * count, *shape)})[0]
        samples = max(len(lo), len(both))
        flat_lo = lo.expand(samples, *shape).reshape(samples, -1)
        flat_hi = hi.expand(samples, *shape).reshape(samples, -1)
        low = torch.full_like(flat_lo, -torch.inf).index_copy(
            1, units, both[:, :count].expand(samples, count)
        )
        high = torch.full_like(flat_hi, torch.inf).index_copy(
            1, units, -both[:, count:].expand(samples, count)
        )
        found = _meet((flat_lo, flat_hi), (low, high))
        return found[0].reshape(samples, *shape), found[1].reshape(samples, *shape)

    def _constant(self, ref: Ref, *names: str) -> tuple[Tensor, ...]:
        if ref not in self._constants:
            operation = self.graph.nodes[ref].operation
            self._constants[ref] = tuple(_tensor(getattr(operation, name)) for name in names)
        return self._constants[ref]

    def _moves(self, ref: Ref) -> list[tuple[Tensor, Tensor]]:
        operation = self.graph.nodes[ref].operation
        assert isinstance(operation, Pick)
        if ref not in self._constants:
            flat = [torch.from_numpy(np.array(i)) for pair in operation.sources for i in pair]
            self._constants[ref] = tuple(flat)
        held = self._constants[ref]
        return list(zip(held[::2], held[1::2], strict=True))

    def _interval(self, ref: Ref, xs: list[Ends]) -> Ends:
        operation = self.graph.nodes[ref].operation
        match operation:
            case Total():
                return xs[0][0].sum(-1, keepdim=True), xs[0][1].sum(-1, keepdim=True)
            case ops.Affine():
                weight, bias = self._constant(ref, "weight", "bias")
                middle, radius = (xs[0][0] + xs[0][1]) / 2, (xs[0][1] - xs[0][0]) / 2
                centre, spread = middle @ weight.T + bias, radius @ weight.abs().T
                return centre - spread, centre + spread
            case ops.Scale():
                weight, bias = self._constant(ref, "weight", "bias")
                return _ordered(xs[0][0] * weight + bias, xs[0][1] * weight + bias)
            case Shift():
                (bias,) = self._constant(ref, "bias")
                return xs[0][0] + bias, xs[0][1] + bias
            case Divide():
                (divisor,) = self._constant(ref, "divisor")
                return _ordered(xs[0][0] / divisor, xs[0][1] / divisor)
            case ops.Add():
                if operation.sign > 0:
                    return xs[0][0] + xs[1][0], xs[0][1] + xs[1][1]
                return xs[0][0] - xs[1][1], xs[0][1] - xs[1][0]
            case Enclosed():
                lo, hi = self._constant(ref, "lo", "hi")
                return lo[None], hi[None]
            case Pick():
                return self._picked(ref, [x[0] for x in xs]), self._picked(ref, [x[1] for x in xs])
            case Product():
                found = _product(xs[0], xs[1])
                if len(xs) == 4:
                    plus, minus = _square(xs[2]), _square(xs[3])
                    found = _meet(found, ((plus[0] - minus[1]) / 4, (plus[1] - minus[0]) / 4))
                return found
            case Contract():
                (a, b), (c, d) = xs
                middle = ((a + b) / 2) @ ((c + d) / 2)
                spread = torch.maximum(a.abs(), b.abs()) @ ((d - c) / 2)
                spread = spread + ((b - a) / 2) @ ((c + d) / 2).abs()
                return middle - spread, middle + spread
            case nonlinear.Relu():
                return xs[0][0].clamp_min(0), xs[0][1].clamp_min(0)
            case nonlinear.Square():
                return _square(xs[0])
            case nonlinear.InverseRoot():
                lo, hi = (self._root(operation, x) for x in (xs[0][1], xs[0][0]))
                return lo, hi
            case Smooth():
                return _smooth_range(operation, xs[0])
            case _:
                return self._by_numpy(operation, xs)

    def _by_numpy(self, operation: Operation | None, xs: list[Ends]) -> Ends:
        assert operation is not None
        found = operation.interval([_interval(x) for x in xs], arithmetic("float64"))
        return _tensor(found.lo), _tensor(found.hi)

    def _root(self, operation: nonlinear.InverseRoot, x: Tensor) -> Tensor:
        inside = x * float(operation.scale.midpoint()) + float(operation.shift.midpoint())
        if not bool((inside > 0).all()):
            raise AssayError("a norm may be zero inside the region")
        return torch.rsqrt(inside)

    def _picked(self, ref: Ref, xs: list[Tensor]) -> Tensor:
        operation = self.graph.nodes[ref].operation
        assert isinstance(operation, Pick)
        shape = operation.fill.shape
        if operation.plain:
            return xs[0].reshape(len(xs[0]), *shape)
        samples = max(len(x) for x in xs)
        out = _tensor(operation.fill).reshape(1, -1).expand(samples, -1)
        for (to, start), x in zip(self._moves(ref), xs, strict=True):
            part = x.reshape(len(x), -1)[:, start].expand(samples, -1)
            out = out.index_copy(1, to, part)
        return out.reshape(samples, *shape)

    def _relax(self, ref: Ref, xs: list[Ends], parameters: Parameters) -> Relaxed:
        operation = self.graph.nodes[ref].operation
        mine = parameters.get(ref)
        match operation:
            case Product():
                assert mine is not None
                below, above = (_plane(xs, mine[i], mine[i + 1]) for i in (0, 2))
                return below[0], below[1], above[0], above[1], below[2], above[3]
            case Contract():
                assert mine is not None
                below, above = (_planes_of_sums(xs, mine[i], mine[i + 1]) for i in (0, 2))
                return below[0], below[1], above[0], above[1], below[2], above[3]
            case nonlinear.Relu():
                assert mine is not None
                return _relu_lines(xs[0], mine[0])
            case nonlinear.Square():
                assert mine is not None
                lo, hi = xs[0]
                t = (lo + hi) / 2 + mine[0].clamp(-1, 1) * (hi - lo) / 2
                return 2 * t, -t * t, lo + hi, -lo * hi
            case nonlinear.InverseRoot():
                assert mine is not None
                return self._root_lines(operation, xs[0], mine[0])
            case Smooth():
                assert mine is not None
                return _smooth_lines(operation, xs[0], mine)
            case nonlinear.Softmax():
                x = _interval(xs[0])
                mask = np.broadcast_to(operation.mask, x.shape)
                p, kept, rest = relaxations.softmax_rest(x, mask, arithmetic("float64"))
                return _tensor(p), _tensor(kept), _tensor(rest.lo), _tensor(rest.hi)
            case _:
                return None

    def _root_lines(self, operation: nonlinear.InverseRoot, x: Ends, mine: Tensor) -> Relaxed:
        lo, hi = x
        scale = float(operation.scale.midpoint())
        t = (lo + hi) / 2 + mine.clamp(-1, 1) * (hi - lo) / 2
        at, left, right = (self._root(operation, p) for p in (t, lo, hi))
        slope = -0.5 * scale * at**3
        chord = -scale * (left * right) ** 2 / (left + right)
        return slope, at - slope * t, chord, left - chord * lo

    def _backward(
        self, ref: Ref, rows: Tensor, xs: list[Ends], relaxed: Relaxed
    ) -> tuple[list[Tensor | None], Tensor | float]:
        node = self.graph.nodes[ref]
        operation = node.operation
        match operation:
            case ops.Affine():
                weight, bias = self._constant(ref, "weight", "bias")
                constant = (rows @ bias).flatten(2).sum(-1) if operation.bias.any() else 0.0
                return [rows @ weight], constant
            case ops.Scale():
                weight, bias = self._constant(ref, "weight", "bias")
                constant = (rows * bias).flatten(2).sum(-1) if operation.bias.any() else 0.0
                return [rows * weight], constant
            case Shift():
                (bias,) = self._constant(ref, "bias")
                return [rows], (rows * bias).flatten(2).sum(-1)
            case Divide():
                (divisor,) = self._constant(ref, "divisor")
                return [rows / divisor], 0.0
            case ops.Add():
                return [rows, operation.sign * rows], 0.0
            case Enclosed():
                lo, hi = self._constant(ref, "lo", "hi")
                return [], _least(rows, lo[None], hi[None])
            case Pick():
                return self._unpicked(ref, rows, xs)
            case Product():
                p, q, p_above, q_above, low, high = relaxed
                of_x = _split(rows, p, p_above)
                of_y = _split(rows, q, q_above)
                if xs[1][0].shape[1:] != xs[0][0].shape[1:]:
                    of_y = of_y.sum(-1, keepdim=True)
                return [of_x, of_y, *[None] * (len(xs) - 2)], _least(rows, low, high)
            case Contract():
                p, q, p_above, q_above, low, high = relaxed
                plus, minus = rows.clamp_min(0), rows.clamp_max(0)
                of_x = plus @ p.mT[:, None] + minus @ p_above.mT[:, None]
                of_y = q.mT[:, None] @ plus + q_above.mT[:, None] @ minus
                return [of_x, of_y], _least(rows, low, high)
            case nonlinear.Softmax():
                p, kept, low, high = relaxed
                chosen = rows * kept[:, None]
                part = p[:, None] * (chosen - (chosen * p[:, None]).sum(-1, keepdim=True))
                return [part], _least(rows, low, high)
            case ops.Rearrange():
                sizes = [xs[0][0].shape[1:][a] for a in operation.axes]
                back = np.argsort(operation.axes)
                turned = rows.reshape(*rows.shape[:2], *sizes).permute(0, 1, *(back + 2))
                return [turned], 0.0
            case _:
                below_slope, below, above_slope, above = relaxed
                return [_split(rows, below_slope, above_slope)], _least(rows, below, above)

    def _unpicked(
        self, ref: Ref, rows: Tensor, xs: list[Ends]
    ) -> tuple[list[Tensor | None], Tensor | float]:
        operation = self.graph.nodes[ref].operation
        assert isinstance(operation, Pick)
        if operation.plain:
            return [rows.reshape(*rows.shape[:2], *xs[0][0].shape[1:])], 0.0
        flat, parts = rows.flatten(2), list[Tensor | None]()
        for (to, start), x in zip(self._moves(ref), xs, strict=True):
            part = flat.new_zeros(*flat.shape[:2], x[0][0].numel())
            part = part.index_add(2, start, flat[..., to])
            parts.append(part.reshape(*rows.shape[:2], *x[0].shape[1:]))
        if not operation.fill.any():
            return parts, 0.0
        return parts, flat @ _tensor(operation.fill).reshape(-1)

    def slopes(self, state: State, parameters: Parameters) -> dict[Ref, tuple[np.ndarray, ...]]:
        """Return the slopes that the parameters stand for, as `relax` takes them."""
        found = {}
        for ref in parameters:
            node = self.graph.nodes[ref]
            xs = [state.values[p] for p in node.parents]
            with torch.no_grad():
                relaxed = state.relaxed.get(ref)
                relaxed = self._relax(ref, xs, parameters) if relaxed is None else relaxed
            match node.operation:
                case Product() | Contract():
                    chosen = relaxed[:4]
                case Smooth():
                    chosen = (relaxed[0], relaxed[2])
                case nonlinear.InverseRoot():
                    lo, hi = xs[0]
                    mine = parameters[ref][0]
                    chosen = ((lo + hi) / 2 + mine.clamp(-1, 1) * (hi - lo) / 2,)
                case _:
                    chosen = (relaxed[0],)
            found[ref] = tuple(entry.detach().numpy() for entry in chosen)
        return found


def _least(rows: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Bound `rows . t` from below over t in [lo, hi]: (samples, rows)."""
    flat = rows.flatten(2)
    below, above = lo.reshape(len(lo), -1, 1), hi.reshape(len(hi), -1, 1)
    if lo is hi:
        return (flat @ below)[..., 0]
    return (flat.clamp_min(0) @ below + flat.clamp_max(0) @ above)[..., 0]


def _split(rows: Tensor, below: Tensor, above: Tensor) -> Tensor:
    return torch.where(rows > 0, rows * below[:, None], rows * above[:, None])


def _interval(x: Ends) -> Interval:
    return Interval(x[0].detach().numpy(), x[1].detach().numpy())


def _ordered(a: Tensor, b: Tensor) -> Ends:
    return torch.minimum(a, b), torch.maximum(a, b)


def _meet(x: Ends, y: Ends) -> Ends:
    lo, hi = torch.maximum(x[0], y[0]), torch.minimum(x[1], y[1])
    return _ordered(lo, hi)


def _product(x: Ends, y: Ends) -> Ends:
    ends = [a * b for a in x for b in y]
    lo = torch.minimum(torch.minimum(ends[0], ends[1]), torch.minimum(ends[2], ends[3]))
    hi = torch.maximum(torch.maximum(ends[0], ends[1]), torch.maximum(ends[2], ends[3]))
    return lo, hi


def _square(x: Ends) -> Ends:
    lo, hi = x
    crosses = (lo <= 0) & (hi >= 0)
    ends = _ordered(lo * lo, hi * hi)
    return torch.where(crosses, torch.zeros_like(ends[0]), ends[0]), ends[1]


def _plane(xs: list[Ends], alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return p, q and the ends of `x y - p x - q y`, with p and q in units of the radii around the
    middles.
    """
    (a, b), (c, d) = xs[:2]
    p = (c + d) / 2 + alpha.clamp(-1, 1) * (d - c) / 2
    q = (a + b) / 2 + beta.clamp(-1, 1) * (b - a) / 2
    low, high = _product((a - q, b - q), (c - p, d - p))
    if len(xs) == 4:
        plus, minus = (
            _square((x[0] - shift, x[1] - shift))
            for x, shift in ((xs[2], p + q), (xs[3], q - p))
        )
        low = torch.maximum(low, (plus[0] - minus[1]) / 4)
        high = torch.minimum(high, (plus[1] - minus[0]) / 4)
    return p, q, low - p * q, high - p * q


def _planes_of_sums(
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


def _relu_lines(x: Ends, mine: Tensor) -> Relaxed:
    lo, hi = x
    unstable = (lo < 0) & (hi > 0)
    chord = torch.where(unstable, hi / (hi - lo).clamp_min(1e-300), (lo >= 0).double())
    start = (hi > -lo).double()
    # 0 keeps the usual slope; 1 reaches the other one.
    slope = (start + mine.clamp(-1, 1).abs() * (1 - 2 * start)).clamp(0, 1)
    below = torch.where(unstable, slope, chord)
    zero = torch.zeros_like(chord)
    return below, zero, chord, torch.where(unstable, -chord * lo, zero)


def _smooth_range(operation: Smooth, x: Ends) -> Ends:
    value, function = _VALUES[operation.name], operation.function
    operation.require_domain(_interval(x))
    left, right = value(x[0]), value(x[1])
    if function.turn is not None:
        inside = (x[0] < function.turn[1]) & (x[1] > function.turn[0])
        lo = torch.minimum(left, right)
        return torch.where(inside, torch.full_like(lo, function.turn[2]), lo), torch.maximum(
            left, right
        )
    return (left, right) if function.rises else (right, left)


def _smooth_lines(operation: Smooth, x: Ends, mine: tuple[Tensor, ...]) -> Relaxed:
    """Return lines whose slopes move within the slopes that the function has on the interval; the
    intercept is that of the nearest point, which moves with no first-order effect.
    """
    ends, function = _interval(x), operation.function
    start = operation.slopes(ends)
    share = np.linspace(0, 1, 9).reshape(-1, *[1] * ends.lo.ndim)
    seen = function.slope(ends.lo + share * (ends.hi - ends.lo))
    least, most = _tensor(seen.min(0)), _tensor(seen.max(0))
    slopes = [
        torch.minimum(torch.maximum(_tensor(s) + m.clamp(-1, 1) * (most - least), least), most)
        for s, m in zip(start, mine, strict=True)
    ]
    below, above = _intercepts(operation, ends, *(s.detach().numpy() for s in slopes))
    lines = []
    for slope, (point, value) in zip(slopes, (below, above), strict=True):
        lines += [slope, _tensor(value) - slope * _tensor(point)]
    return tuple(lines)


def _intercepts(
    operation: Smooth, x: Interval, below: np.ndarray, above: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return where `f(x) - s x` is least, and largest, with f there."""
    function = operation.function
    points = [[x.lo, x.hi], [x.lo, x.hi]]
    convex = function.convex
    for low, high in operation._stretches():
        if ((x.hi > low[0]) & (x.lo < high[1])).any():
            slope = below if convex else above
            t = operation._touch(x, slope, low[1], high[0], convex)
            points[0 if convex else 1].append(np.clip(t, x.lo, x.hi))
        convex = not convex
    found = []
    for slope, candidates, best in zip(
        (below, above), points, (np.argmin, np.argmax), strict=True
    ):
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


def _worth(value: Ends, operations: Sequence[Any]) -> Tensor:
    lo, hi = value[0].detach(), value[1].detach()
    wide = hi - lo > NARROW * (1 + torch.maximum(lo.abs(), hi.abs()))
    if all(isinstance(operation, nonlinear.Relu) for operation in operations):
        wide &= (lo < 0) & (hi > 0)
    return wide.reshape(len(wide), -1).any(0).nonzero().flatten()
