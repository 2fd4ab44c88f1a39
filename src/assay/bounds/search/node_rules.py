"""Bounds of the single nodes of a graph in torch at level float64: the rule of every operation,
differentiable in its slopes and in the ends of the boxes. Nothing here is a proof.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from assay.bounds import nonlinear, relaxations
from assay.bounds import operations as ops
from assay.bounds.graph import Graph, Ref
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
)
from assay.errors import AssayError

Parameters = dict[Ref, tuple[Tensor, ...]]
"""Of each node with slopes to choose, unit-free: 0 is the default relaxation, and -1 to 1 reaches
the ends."""


class NodeRules:
    """The operations of one graph, with their constants as tensors."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
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
                case Smooth() | Choice():
                    sizes = [node.shape] * 2
                case _:
                    continue
            found[ref] = tuple(torch.zeros(samples, *size, dtype=torch.float64) for size in sizes)
        return found

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

    def interval(self, ref: Ref, xs: list[Ends]) -> Ends:
        """Enclose a node over ends (samples, *shape) of its parents."""
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

    def relax(self, ref: Ref, xs: list[Ends], parameters: Parameters) -> Relaxed:
        """Return lines or planes below and above a node over ends of its parents."""
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

    def backward(
        self, ref: Ref, rows: Tensor, xs: list[Ends], relaxed: Relaxed
    ) -> tuple[list[Tensor | None], Tensor | float]:
        """Carry rows (samples or 1, rows, *shape) of a node to its parents: a part for each, None
        where a parent has none, and what is constant, (samples, rows).
        """
        operation = self.graph.nodes[ref].operation
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

    def chosen(
        self, ref: Ref, xs: list[Ends], relaxed: Relaxed, parameters: Parameters
    ) -> tuple[Tensor, ...]:
        """Return the slopes of a relaxation, as the proof's `relax` takes them."""
        match self.graph.nodes[ref].operation:
            case Product() | Contract():
                found: tuple[Tensor, ...] = relaxed[:4]
                return found
            case Smooth() | Choice():
                return relaxed[0], relaxed[2]
            case nonlinear.InverseRoot():
                lo, hi = xs[0]
                return ((lo + hi) / 2 + parameters[ref][0].clamp(-1, 1) * (hi - lo) / 2,)
            case _:
                return (relaxed[0],)
