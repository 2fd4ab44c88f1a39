"""The same bounds in torch at level float64, differentiable in the slopes and in the ends of the
boxes: what the search for tight bounds descends on. Nothing here is a proof.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from assay.bounds import nonlinear, relaxations
from assay.bounds import operations as ops
from assay.bounds.engine import ROWS, Late, never
from assay.bounds.graph import Ref
from assay.bounds.levels import arithmetic
from assay.bounds.operations import Operation
from assay.bounds.rules import (
    Choice,
    Contract,
    Divide,
    Enclosed,
    Pick,
    Product,
    Shift,
    Smooth,
    Total,
)
from assay.bounds.search.ranges import (
    Ends,
    Relaxed,
    as_interval,
    by_sign,
    choice_lines,
    choice_range,
    in_order,
    least_product,
    meet,
    plane_of_product,
    planes_of_sums,
    product_range,
    relu_lines,
    smooth_lines,
    smooth_range,
    square_range,
    tensor,
    usual_slope,
)
from assay.bounds.search.sweep import readers, worth
from assay.bounds.trace.traced import LevelGraph
from assay.errors import AssayError
from assay.memory import available

Parameters = dict[Ref, tuple[Tensor, ...]]

SAVED = 4
"""Tensors that a gradient keeps of every node, for each row that is carried through it."""

ROOM = 1 << 30
"""Bytes that what gradients keep of a sweep's rows may take; more is worked out twice."""


@dataclass
class State:
    """Ends of every node, and the relaxations that were worked out from them."""

    values: list[Ends]
    relaxed: dict[Ref, Relaxed]
    saved: int = 0  # bytes that gradients keep of its rows


class Twin:
    """A graph at level float64 in torch.

    Parameters are unit-free: 0 is the default relaxation, and -1 to 1 reaches the ends."""

    def __init__(self, at: LevelGraph, memory: int | None = None) -> None:
        if at.level != "float64":
            raise AssayError(f"the search needs a graph at level float64, got {at.level!r}")
        self.at, self.graph = at, at.graph
        self.wanted = readers(at.graph)
        self.room = min(available() // 4 if memory is None else memory, ROOM)
        self.last = len(at.graph.nodes) - 1
        self._constants: dict[Ref, tuple[Tensor, ...]] = {}
        self._behind: dict[Ref, list[Ref]] = {}

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
                case Smooth() | Choice():
                    sizes = [node.shape] * 2
                case _:
                    continue
            found[ref] = tuple(torch.zeros(samples, *size, dtype=torch.float64) for size in sizes)
        return found

    def settled(self, boxes: Sequence[Ends], parameters: Parameters) -> Parameters:
        """Return the parameters with the usual slopes of ReLU on these boxes instead of zeros: a
        descent moves them, and parts of the boxes, which start from them, have no weaker bounds.
        """
        found = dict(parameters)
        refs = [r for r in found if isinstance(self.graph.nodes[r].operation, nonlinear.Relu)]
        if refs:
            with torch.no_grad():
                values = self.sweep(boxes, parameters).values
            for ref in refs:
                (mine,) = found[ref]
                usual = 2 * usual_slope(values[self.graph.nodes[ref].parents[0]]) - 1
                found[ref] = (torch.where(mine == 0, usual, mine),)
        return found

    def sweep(
        self,
        boxes: Sequence[Ends],
        parameters: Parameters,
        *,
        before: Sequence[Ends] | None = None,
        refine: bool = True,
        late: Late = never,
    ) -> State:
        """Enclose every node over boxes, (samples, *shape) each; once it is late, no interval is
        tightened any more.
        """
        state, given = State([], {}), dict(zip(self.graph.inputs, boxes, strict=True))
        for ref, node in enumerate(self.graph.nodes):
            if node.operation is None:
                value = given[ref]
            else:
                value = self._interval(ref, [state.values[p] for p in node.parents])
            if ref in self.at.limits:
                limit = self.at.limits[ref]
                value = meet(value, (tensor(limit.lo), tensor(limit.hi)))
            if before is not None:
                value = meet(value, before[ref])
            if not (value[0].isfinite().all() and value[1].isfinite().all()):
                raise AssayError("a value overflows in float64")
            state.values.append(value)
            if refine and ref in self.wanted and not late():
                units = torch.from_numpy(worth(as_interval(value), *self.wanted[ref]))
                if len(units):
                    state.values[ref] = self._tightened(state, parameters, ref, units, late)
        return state

    def bound(self, state: State, parameters: Parameters, rows: Tensor) -> Tensor:
        """Bound `rows . output` from below: (samples, rows)."""
        return self.carry(state, parameters, {self.last: rows})[0]

    def carry(
        self, state: State, parameters: Parameters, rows: Mapping[Ref, Tensor]
    ) -> tuple[Tensor, dict[Ref, Tensor]]:
        """Carry rows (samples or 1, rows, *shape) of nodes to the inputs; return the bounds and
        the rows that reached each input.
        """
        pending, passed = dict(rows), dict[Ref, Tensor]()
        total: Any = 0.0
        for ref in range(max(pending), -1, -1):
            if ref not in pending:
                continue
            mine, node = pending.pop(ref), self.graph.nodes[ref]
            if node.operation is None:
                passed[ref] = mine
                total = total + least_product(mine, *state.values[ref])
                continue
            xs = [state.values[p] for p in node.parents]
            relaxed = self._relaxed(state, parameters, ref)
            parts, constant = self._backward(ref, mine, xs, relaxed)
            total = total + constant
            for parent, part in zip(node.parents, parts, strict=True):
                if part is not None:
                    pending[parent] = pending[parent] + part if parent in pending else part
        return total, passed

    def _relaxed(self, state: State, parameters: Parameters, ref: Ref) -> Relaxed:
        if ref not in state.relaxed:
            xs = [state.values[p] for p in self.graph.nodes[ref].parents]
            state.relaxed[ref] = self._relax(ref, xs, parameters)
        return state.relaxed[ref]

    def _tightened(
        self, state: State, parameters: Parameters, ref: Ref, units: Tensor, late: Late
    ) -> Ends:
        lo, hi = state.values[ref]
        shape = self.graph.nodes[ref].shape
        behind, samples = self.behind(ref), max(len(lo) for lo, _ in state.values)
        sizes = [math.prod(self.graph.nodes[r].shape) for r in behind]
        both = partial(self._both, state, parameters, ref)
        many = max(1, min(ROWS, self.room // 8) // (2 * samples * max(sizes)))
        moving = [lo for lo, _ in state.values] + [p for ps in parameters.values() for p in ps]
        if torch.is_grad_enabled() and any(x.requires_grad for x in moving):
            each = 8 * SAVED * 2 * samples * sum(sizes)
            if state.saved + each * len(units) <= self.room // 2:
                state.saved += each * len(units)
            else:  # the gradient works the rows out again, and must find the same relaxations
                for r in behind:
                    self._relaxed(state, parameters, r)
                many = max(1, self.room // 2 // each)
                both = partial(checkpoint, both, use_reentrant=False, preserve_rng_state=False)
        parts = []
        for some in units.split(many):
            if late():
                break
            parts.append(both(some))
        if not parts:
            return lo, hi
        found = torch.cat(parts, -1)
        units = units[: found.shape[-1]]
        samples = max(len(lo), found.shape[1])
        flat_lo = lo.expand(samples, *shape).reshape(samples, -1)
        flat_hi = hi.expand(samples, *shape).reshape(samples, -1)
        low = torch.full_like(flat_lo, -torch.inf).index_copy(
            1, units, found[0].expand(samples, -1)
        )
        high = torch.full_like(flat_hi, torch.inf).index_copy(
            1, units, -found[1].expand(samples, -1)
        )
        ends = meet((flat_lo, flat_hi), (low, high))
        return ends[0].reshape(samples, *shape), ends[1].reshape(samples, *shape)

    def _both(self, state: State, parameters: Parameters, ref: Ref, units: Tensor) -> Tensor:
        """Bound units of a node, and their negatives, from below: (2, samples, units)."""
        count, node = len(units), self.graph.nodes[ref]
        rows = torch.zeros(1, 2 * count, math.prod(node.shape), dtype=torch.float64)
        rows[0, torch.arange(count), units] = 1.0
        rows[0, torch.arange(count) + count, units] = -1.0
        rows = rows.reshape(1, 2 * count, *node.shape)

        both = self.carry(state, parameters, {ref: rows})[0]
        return both.unflatten(-1, (2, count)).transpose(0, 1)

    def behind(self, ref: Ref) -> list[Ref]:
        """Return a node and those that it follows from."""
        if ref not in self._behind:
            found, stack = set[Ref](), [ref]
            while stack:
                one = stack.pop()
                if one not in found:
                    found.add(one)
                    stack += self.graph.nodes[one].parents
            self._behind[ref] = sorted(found)
        return self._behind[ref]

    def _constant(self, ref: Ref, *names: str) -> tuple[Tensor, ...]:
        if ref not in self._constants:
            operation = self.graph.nodes[ref].operation
            self._constants[ref] = tuple(tensor(getattr(operation, name)) for name in names)
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
                return in_order(xs[0][0] * weight + bias, xs[0][1] * weight + bias)
            case Shift():
                (bias,) = self._constant(ref, "bias")
                return xs[0][0] + bias, xs[0][1] + bias
            case Divide():
                (divisor,) = self._constant(ref, "divisor")
                return in_order(xs[0][0] / divisor, xs[0][1] / divisor)
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
                found = product_range(xs[0], xs[1])
                if len(xs) == 4:
                    plus, minus = square_range(xs[2]), square_range(xs[3])
                    found = meet(found, ((plus[0] - minus[1]) / 4, (plus[1] - minus[0]) / 4))
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
                return square_range(xs[0])
            case nonlinear.InverseRoot():
                lo, hi = (self._root(operation, x) for x in (xs[0][1], xs[0][0]))
                return lo, hi
            case Smooth():
                return smooth_range(operation, xs[0])
            case Choice():
                return choice_range(operation, xs)
            case _:
                return self._by_numpy(operation, xs)

    def _by_numpy(self, operation: Operation | None, xs: list[Ends]) -> Ends:
        assert operation is not None
        found = operation.interval([as_interval(x) for x in xs], arithmetic("float64"))
        return tensor(found.lo), tensor(found.hi)

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
        out = tensor(operation.fill).reshape(1, -1).expand(samples, -1)
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
                below, above = (plane_of_product(xs, mine[i], mine[i + 1]) for i in (0, 2))
                return below[0], below[1], above[0], above[1], below[2], above[3]
            case Contract():
                assert mine is not None
                below, above = (planes_of_sums(xs, mine[i], mine[i + 1]) for i in (0, 2))
                return below[0], below[1], above[0], above[1], below[2], above[3]
            case nonlinear.Relu():
                assert mine is not None
                return relu_lines(xs[0], mine[0])
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
                return smooth_lines(operation, xs[0], mine)
            case Choice():
                assert mine is not None
                return choice_lines(operation, xs, mine)
            case nonlinear.Softmax():
                x = as_interval(xs[0])
                mask = np.broadcast_to(operation.mask, x.shape)
                p, kept, rest = relaxations.softmax_rest(x, mask, arithmetic("float64"))
                return tensor(p), tensor(kept), tensor(rest.lo), tensor(rest.hi)
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
                return [], least_product(rows, lo[None], hi[None])
            case Pick():
                return self._unpicked(ref, rows, xs)
            case Product():
                p, q, p_above, q_above, low, high = relaxed
                of_x = by_sign(rows, p, p_above)
                of_y = by_sign(rows, q, q_above)
                if xs[1][0].shape[1:] != xs[0][0].shape[1:]:
                    of_y = of_y.sum(-1, keepdim=True)
                return [of_x, of_y, *[None] * (len(xs) - 2)], least_product(rows, low, high)
            case Contract():
                p, q, p_above, q_above, low, high = relaxed
                plus, minus = rows.clamp_min(0), rows.clamp_max(0)
                of_x = plus @ p.mT[:, None] + minus @ p_above.mT[:, None]
                of_y = q.mT[:, None] @ plus + q_above.mT[:, None] @ minus
                return [of_x, of_y], least_product(rows, low, high)
            case nonlinear.Softmax():
                p, kept, low, high = relaxed
                chosen = rows * kept[:, None]
                part = p[:, None] * (chosen - (chosen * p[:, None]).sum(-1, keepdim=True))
                return [part], least_product(rows, low, high)
            case ops.Rearrange():
                sizes = [xs[0][0].shape[1:][a] for a in operation.axes]
                back = np.argsort(operation.axes)
                turned = rows.reshape(*rows.shape[:2], *sizes).permute(0, 1, *(back + 2))
                return [turned], 0.0
            case Choice():
                below_slope, below, above_slope, above = relaxed
                part = by_sign(rows, below_slope, above_slope)
                return [part, *[None] * (len(xs) - 1)], least_product(rows, below, above)
            case nonlinear.Relu():  # its lines below start at zero
                below_slope, _, above_slope, above = relaxed
                minus = rows.clamp_max(0)
                part = torch.addcmul(
                    rows * below_slope[:, None], minus, (above_slope - below_slope)[:, None]
                )
                return [part], (minus.flatten(2) @ above.flatten(1)[..., None])[..., 0]
            case _:
                below_slope, below, above_slope, above = relaxed
                return [by_sign(rows, below_slope, above_slope)], least_product(rows, below, above)

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
        return parts, flat @ tensor(operation.fill).reshape(-1)

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
                case Smooth() | Choice():
                    chosen = (relaxed[0], relaxed[2])
                case nonlinear.InverseRoot():
                    lo, hi = xs[0]
                    mine = parameters[ref][0]
                    chosen = ((lo + hi) / 2 + mine.clamp(-1, 1) * (hi - lo) / 2,)
                case _:
                    chosen = (relaxed[0],)
            found[ref] = tuple(entry.detach().numpy() for entry in chosen)
        return found
