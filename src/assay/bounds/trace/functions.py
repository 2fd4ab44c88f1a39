"""Functions of one number, and the larger and smaller of two."""

from __future__ import annotations

from typing import Any

import numpy as np

from assay.bounds import nonlinear
from assay.bounds import operations as ops
from assay.bounds.rounding import Interval
from assay.bounds.rules import Shift, Smooth
from assay.bounds.trace.arithmetic import scaled
from assay.bounds.trace.lower import Constant, Handler, Lowering, Node, UnsupportedError, Value
from assay.bounds.trace.registry import HANDLERS, as_value, rule, together


def _smooth(name: str) -> Handler:
    def handle(low: Lowering, op: Any, x: Value, *args: Any, **kwargs: Any) -> Node:
        found = low.add(Smooth(name), low.node(x))
        if name == "rsqrt":
            note_root(low, found)
        return found

    return handle


for _name in ("exp", "log", "sqrt", "reciprocal", "tanh", "sigmoid", "silu", "erf", "rsqrt"):
    HANDLERS[_name] = _smooth(_name)


def note_root(low: Lowering, root: Node) -> None:
    """Remember whose mean square is under a reciprocal root, behind an eps that is not negative."""
    ref = low.graph.nodes[root.ref].parents[0]
    while isinstance(operation := low.graph.nodes[ref].operation, Shift):
        if np.any(operation.bias < 0):
            return
        (ref,) = low.graph.nodes[ref].parents
    if ref in low.origin and low.origin[ref][0] == "mean square":
        low.origin[root.ref] = low.origin[ref]


@rule("softplus")
def _softplus(low: Lowering, op: Any, x: Node, beta: float = 1, threshold: float = 20) -> Node:
    raise UnsupportedError("has no bound (it is cut at a threshold)")


@rule("gelu")
def _gelu(low: Lowering, op: Any, x: Value, approximate: str = "none") -> Node:
    return low.add(Smooth("gelu" if approximate == "none" else "gelu_tanh"), low.node(x))


@rule("relu")
def _relu(low: Lowering, op: Any, x: Value) -> Node:
    return low.add(nonlinear.Relu(), low.node(x))


@rule("leaky_relu")
def _leaky(low: Lowering, op: Any, x: Node, slope: float = 0.01) -> Node:
    rest = low.add(nonlinear.Relu(), scaled(low, x, -1.0))  # type: ignore[arg-type]
    return low.add(
        ops.Add(-1.0),
        low.add(nonlinear.Relu(), x),
        scaled(low, rest, slope),  # type: ignore[arg-type]
    )


@rule("abs")
def _abs(low: Lowering, op: Any, x: Node) -> Node:
    negative = low.add(ops.Scale(np.asarray(-1.0), np.zeros(())), x, virtual=True)
    parts = [low.add(nonlinear.Relu(), y, virtual=True) for y in (x, negative)]
    return low.add(ops.Add(), *parts, virtual=True)


@rule("clamp", "hardtanh", "clamp_min", "clamp_max")
def _clamp(low: Lowering, op: Any, x: Node, first: Any = None, second: Any = None) -> Node:
    name = op._schema.name
    least, most = (None, first) if name.endswith("clamp_max") else (first, second)
    found = x
    if least is not None:
        found = _largest_of(low, found, as_value(least))
    if most is not None:
        found = _least_of(low, found, as_value(most))
    return found


@rule("maximum")
def _maximum(low: Lowering, op: Any, x: Value, y: Value) -> Node:
    return _largest_of(low, x, y)


@rule("minimum")
def _minimum(low: Lowering, op: Any, x: Value, y: Value) -> Node:
    return _least_of(low, x, y)


def _largest_of(low: Lowering, x: Value, y: Value) -> Node:
    """Add `y + relu(x - y)`: float32 executes a selection, so that these nodes are virtual."""
    return _extreme(low, x, y, 1.0)


def _least_of(low: Lowering, x: Value, y: Value) -> Node:
    return _extreme(low, x, y, -1.0)


def _extreme(low: Lowering, x: Value, y: Value, sign: float) -> Node:
    shape = together(low, x, y)
    first, second = low.expand(x, shape), low.expand(y, shape)
    gap = low.add(ops.Add(-1.0), first, second, virtual=True)
    if sign < 0:
        gap = low.add(ops.Scale(np.asarray(-1.0), np.zeros(())), gap, virtual=True)
    above = low.add(nonlinear.Relu(), gap, virtual=True)
    return low.add(ops.Add(sign), second, above, virtual=True)


@rule("amax")
def _amax(low: Lowering, op: Any, x: Node, dim: Any = (), keepdim: bool = False) -> Node:
    shape = low.shape(x)
    axes = [axis % len(shape) for axis in ([dim] if isinstance(dim, int) else list(dim))]
    if len(axes) != 1:
        raise UnsupportedError("takes a maximum over several axes")
    (axis,) = axes
    parts = low.move(lambda y: tuple(y.unbind(axis)), x)
    while len(parts) > 1:
        joined = [_largest_of(low, a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = (*joined, *parts[len(parts) - len(parts) % 2 :])
    return low.move(lambda y: y.unsqueeze(axis) if keepdim else y.clone(), parts[0])


@rule("max")
def _max(low: Lowering, op: Any, x: Node, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None:
        raise UnsupportedError("takes a maximum over several axes")
    return _amax(low, op, x, dim, keepdim), None


@rule("pow")
def _pow(low: Lowering, op: Any, x: Any, exponent: Any) -> Value:
    if not isinstance(exponent, int | float) or not isinstance(x, Constant | Node):
        raise UnsupportedError("has an exponent that is no number")
    base = low.node(x)
    names = {3: "cube", -0.5: "rsqrt", 0.5: "sqrt", -1: "reciprocal"}
    if exponent == 2:
        return low.add(nonlinear.Square(), base)
    if exponent == 1:
        return base
    if exponent == 4:
        return low.add(nonlinear.Square(), low.add(nonlinear.Square(), base))
    if exponent not in names:
        raise UnsupportedError(f"has the exponent {exponent}; known: 1, 2, 3, 4, {names}")
    found = low.add(Smooth(names[exponent]), base)
    if exponent == -0.5:
        note_root(low, found)
    return found


def _fixed_only(name: str) -> Handler:
    def handle(low: Lowering, op: Any, x: Value) -> Node:
        node = low.node(x)
        if node.ref not in low.fixed:
            raise UnsupportedError("has a rule for constants only")
        return low.add(Periodic(name), node)

    return handle


class Periodic(ops.Operation):
    """Sine or cosine of a constant, by a ball around its interval."""

    def __init__(self, name: str) -> None:
        self.name = name

    def shape(self, *parents: ops.Shape) -> ops.Shape:
        return parents[0]

    def interval(self, xs: list[Interval], ar: Any) -> Interval:
        from flint import arb, ctx

        from assay.bounds.exact import ball_interval

        if not ar.rigorous:
            function = np.sin if self.name == "sin" else np.cos
            return Interval.exactly(function(xs[0].midpoint()))
        middle, radius = xs[0].midpoint(), xs[0].radius()
        with ctx.workprec(128):
            balls = [arb(float(m), float(r)) for m, r in zip(middle.flat, radius.flat, strict=True)]
            ends = [ball_interval(b.sin() if self.name == "sin" else b.cos()) for b in balls]
        found = np.array(ends).reshape(*middle.shape, 2)
        return Interval(found[..., 0], found[..., 1])

    def backward(self, rows: Any, xs: Any, relaxed: Any, error: Any, ar: Any) -> ops.Carried:
        raise NotImplementedError("a constant carries no rows")

    def error(self, xs: list[Interval], value: Interval) -> Any:
        from assay.bounds.levels import ULPS, executed_sum

        return executed_sum(2 * ULPS, value.magnitude(), 1.0)


HANDLERS |= {"sin": _fixed_only("sin"), "cos": _fixed_only("cos")}
