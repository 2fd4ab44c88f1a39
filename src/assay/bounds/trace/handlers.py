"""The rule of every ATen operation, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from assay.bounds import nonlinear
from assay.bounds import operations as ops
from assay.bounds.rounding import Interval, sqrt_up
from assay.bounds.rules import Contract, Divide, Pick, Product, Shift, Smooth, Total
from assay.bounds.rules.smooth import GELU_CUBIC, GELU_ROOT
from assay.bounds.trace.lower import (
    NEVER,
    Constant,
    Handler,
    Lowering,
    Node,
    UnsupportedError,
    Value,
    real,
)

HANDLERS: dict[str, Handler] = {}
PAIRS = 32
"""Entries up to which log softmax is bounded by differences of all pairs."""


def _rule(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def _const(x: Any, like: torch.dtype = torch.float64) -> Value:
    """Return a number or a tensor as a value."""
    if isinstance(x, Constant | Node):
        return x
    if isinstance(x, bool | int | float):
        return Constant(torch.tensor(float(x), dtype=torch.float64))
    raise UnsupportedError(f"is applied to {type(x).__name__}")


def _shape(low: Lowering, x: Value) -> tuple[int, ...]:
    return low.shape(x) if isinstance(x, Node) else tuple(x.tensor.shape)


def _together(low: Lowering, *xs: Value) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(_shape(low, x) for x in xs)))


def _plain(x: Any) -> Any:
    if isinstance(x, Node):
        raise UnsupportedError("depends on the region in which entry it takes")
    if isinstance(x, Constant):
        return x.tensor
    if isinstance(x, list | tuple):
        return type(x)(_plain(entry) for entry in x)
    return x


# Moving entries.


@_rule(
    *("view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "clone", "detach"),
    *("unsqueeze", "squeeze", "split", "split_with_sizes", "select", "slice", "alias", "flip"),
    *("roll", "repeat", "unbind", "lift_fresh_copy", "diagonal", "gather", "index", "index_select"),
    *("tril", "triu", "unfold", "contiguous"),
)
def _moved(low: Lowering, op: Any, x: Value, *args: Any, **kwargs: Any) -> Any:
    rest, named = [_plain(a) for a in args], {key: _plain(a) for key, a in kwargs.items()}
    return low.move(lambda y: op(y, *rest, **named), x)


@_rule("_to_copy")
def _cast(low: Lowering, op: Any, x: Node, dtype: Any = None, **kwargs: Any) -> Value:
    if dtype is not None and not dtype.is_floating_point:
        raise UnsupportedError(f"turns numbers that depend on the region into {dtype}")
    if dtype is None or dtype == x.dtype:
        return x
    low.dtypes |= {dtype}
    return Node(x.ref, dtype)


@_rule("cat", "stack")
def _joined(low: Lowering, op: Any, xs: list[Value], *args: Any) -> Any:
    return low.move(lambda *ys: op(list(ys), *args), *xs)


@_rule("where")
def _where(low: Lowering, op: Any, mask: Value, x: Any, y: Any) -> Any:
    chosen = _plain(mask)
    return low.move(lambda a, b: torch.where(chosen, a, b), _const(x), _const(y))


@_rule("masked_fill")
def _filled(low: Lowering, op: Any, x: Value, mask: Value, value: Any) -> Any:
    chosen = _plain(mask)
    return low.move(lambda a, b: torch.where(chosen, b, a), x, _const(value))


@_rule("constant_pad_nd")
def _padded(low: Lowering, op: Any, x: Value, pad: list[int], value: float = 0.0) -> Any:
    if value:
        raise UnsupportedError(f"pads with {value}; only zeros have a rule")
    return low.move(lambda y: op(y, pad, 0.0), x)


@_rule("zeros_like", "ones_like", "new_zeros", "new_ones")
def _created(low: Lowering, op: Any, x: Value, *args: Any, **kwargs: Any) -> Constant:
    """Return a constant of which only the shape comes from x."""
    name = op._schema.name
    shape = args[0] if "new_" in name else _shape(low, x)
    return Constant(torch.full(tuple(shape), float("ones" in name), dtype=torch.float64))


@_rule("gt")
def _greater(low: Lowering, op: Any, x: Node, y: Any) -> Constant:
    node = low.graph.nodes[x.ref]
    while isinstance(node.operation, Pick) and node.operation.plain:
        node = low.graph.nodes[node.parents[0]]
    operation = node.operation
    positive = (isinstance(operation, nonlinear.Softmax) and np.all(operation.mask)) or (
        isinstance(operation, Smooth) and operation.function.range[0] == 0
    )
    if y != 0 or not positive:
        raise UnsupportedError("compares numbers that depend on the region")
    low.dtypes |= {torch.float64}  # float32 may round such a number to zero
    return Constant(torch.ones(low.shape(x), dtype=torch.bool))


# Sums, and products with constants.


@_rule("add")
def _add(low: Lowering, op: Any, x: Any, y: Any, alpha: float = 1.0) -> Node:
    return _sum(low, _const(x), _scaled(low, _const(y), float(alpha)))


@_rule("sub")
def _sub(low: Lowering, op: Any, x: Any, y: Any, alpha: float = 1.0) -> Node:
    first, second = _const(x), _const(y)
    if isinstance(second, Constant) or alpha != 1:
        return _sum(low, first, _scaled(low, second, -float(alpha)))
    if isinstance(first, Constant):
        return _sum(low, _scaled(low, second, -1.0), first)
    shape = _together(low, first, second)
    return low.add(ops.Add(-1.0), low.expand(first, shape), low.expand(second, shape))


@_rule("rsub")
def _rsub(low: Lowering, op: Any, x: Any, y: Any, alpha: float = 1.0) -> Node:
    return _sub(low, op, y, x, alpha)


def _scaled(low: Lowering, x: Value, factor: float) -> Value:
    if factor == 1:
        return x
    if isinstance(x, Constant):
        if abs(factor) == 1:
            return Constant(x.tensor.double() * factor)
        x = low.node(x)
    return low.add(ops.Scale(np.float64(factor), np.zeros(())), x)


def _sum(low: Lowering, x: Value, y: Value) -> Node:
    if isinstance(x, Constant) and isinstance(y, Node):
        x, y = y, x
    shape = _together(low, x, y)
    if isinstance(x, Node) and isinstance(y, Constant):
        bias = np.broadcast_to(y.tensor.double().numpy(), shape)
        never = bias <= NEVER
        if x.ref in low.never:
            never = never | np.broadcast_to(low.never[x.ref], shape)
        if not never.any():
            return low.add(Shift(_compact(real(y), shape)), low.expand(x, shape))
        if np.isnan(bias).any() or (bias == np.inf).any():
            raise UnsupportedError("adds NaN or infinity")
        bias, plain = np.where(never, 0.0, bias), low.expand(x, shape)
        low.never.pop(plain.ref, None)
        found = low.add(Shift(bias), plain) if bias.any() else low.move(lambda v: v.clone(), plain)
        low.never[found.ref] = never
        return found
    return low.add(ops.Add(), low.expand(x, shape), low.expand(y, shape))


def _compact(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a constant that broadcasts to the shape, with no more axes than it has."""
    return np.asarray(values).reshape(values.shape[-len(shape) :]) if values.ndim else values


@_rule("neg")
def _neg(low: Lowering, op: Any, x: Node) -> Value:
    return _scaled(low, x, -1.0)


@_rule("mul")
def _mul(low: Lowering, op: Any, x: Any, y: Any) -> Node:
    return _times(low, _const(x), _const(y))


def _times(low: Lowering, x: Value, y: Value) -> Node:
    if isinstance(x, Constant) and isinstance(y, Node):
        x, y = y, x
    shape = _together(low, x, y)
    if isinstance(x, Node) and isinstance(y, Constant):
        weight = real(y)
        if np.all(weight == 1):
            return low.expand(x, shape)
        return low.add(ops.Scale(weight, np.zeros(())), low.expand(x, shape))
    first, second = low.node(x), low.node(y)
    if first.ref == second.ref:
        return low.add(nonlinear.Square(), first)
    whole = _gelu_of(low, first, second) or _gelu_of(low, second, first)
    if whole is not None:
        return low.add(Smooth("gelu_tanh"), whole)
    wide = [low.expand(first, shape), low.expand(second, shape)]
    if _from_one(low, first, second):
        plus = low.add(ops.Add(), *wide, virtual=True)
        minus = low.add(ops.Add(-1.0), *wide, virtual=True)
        found = low.add(Product(), *wide, plus, minus)
    else:
        found = low.add(Product(), *wide)
    for one, other in ((first, second), (second, first)):
        if low.origin.get(other.ref) == ("mean square", one.ref):
            _limit_norm(low, found, shape[-1])
    return found


def _gelu_of(low: Lowering, half: Node, rest: Node) -> Node | None:
    """Return x where the factors are `x / 2` and `1 + tanh(k (x + c x^3))`: GELU written out."""

    def under(ref: int | None, kind: type, **wanted: Any) -> int | None:
        if ref is None:
            return None
        node = low.graph.nodes[ref]
        if not isinstance(node.operation, kind):
            return None
        fits = all(np.all(getattr(node.operation, key) == value) for key, value in wanted.items())
        return node.parents[0] if fits else None

    x = under(half.ref, ops.Scale, weight=0.5, bias=0.0)
    inner = under(under(rest.ref, Shift, bias=1.0), Smooth, name="tanh")
    total = under(inner, ops.Scale, weight=GELU_ROOT, bias=0.0)
    if x is None or total is None or not isinstance(low.graph.nodes[total].operation, ops.Add):
        return None
    parents = low.graph.nodes[total].parents
    cubes = [under(p, ops.Scale, weight=GELU_CUBIC, bias=0.0) for p in parents]
    fits = any(
        under(cube, Smooth, name="cube") == x and other == x
        for cube, other in zip(cubes, parents[::-1], strict=True)
    )
    plain = low.graph.nodes[total].operation.sign == 1 and fits  # type: ignore[union-attr]
    return Node(x, half.dtype) if plain else None


def _from_one(low: Lowering, x: Node, y: Node) -> bool:
    """Return whether both are affine in the same node, so that they vary together."""

    def base(ref: int) -> int | None:
        seen = False
        while True:
            node = low.graph.nodes[ref]
            if isinstance(node.operation, ops.Affine):
                seen = True
            elif not isinstance(node.operation, Shift | ops.Scale) and not (
                hasattr(node.operation, "plain") and node.operation.plain
            ):
                return ref if seen else None
            (ref,) = node.parents

    one = base(x.ref)
    return one is not None and one == base(y.ref)


def _limit_norm(low: Lowering, x: Node, width: int) -> None:
    """Note that a vector divided by the root of its mean square lies in a ball of radius sqrt(d)."""
    end = np.broadcast_to(sqrt_up(np.float64(width)), low.shape(x))
    low.limits[x.ref] = Interval(-end, end)


@_rule("div")
def _div(low: Lowering, op: Any, x: Any, y: Any, rounding_mode: Any = None) -> Node:
    if rounding_mode is not None:
        raise UnsupportedError(f"rounds ({rounding_mode})")
    first, second = _const(x), _const(y)
    if isinstance(second, Constant):
        divisor = real(second)
        if np.any(divisor == 0):
            raise UnsupportedError("divides by zero")
        shape = _together(low, first, second)
        return low.add(Divide(divisor), low.expand(first, shape))
    return _times(low, first, low.add(Smooth("reciprocal"), second))


@_rule("sum", "mean")
def _total(
    low: Lowering, op: Any, x: Node, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Node:
    shape = low.shape(x)
    axes = list(range(len(shape))) if dim in (None, []) else dim if isinstance(dim, list) else [dim]
    axes = [axis % len(shape) for axis in axes]
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    count = int(np.prod([shape[axis] for axis in axes], dtype=int))
    target = [1 if axis in axes else shape[axis] for axis in range(len(shape))]
    if not keepdim:
        target = [shape[axis] for axis in kept]
    last = low.move(
        lambda y: y.permute(*kept, *axes).reshape([shape[a] for a in kept] + [count]), x
    )
    found = low.add(Total(count), last)
    if op._schema.name == "aten::mean":
        found = low.add(Divide(np.float64(count)), found)
        origin = low.graph.nodes[x.ref]
        if isinstance(origin.operation, nonlinear.Square) and axes == [len(shape) - 1]:
            low.origin[found.ref] = ("mean square", origin.parents[0])
    return low.move(lambda y: y.reshape(target), found)


# Matrix products.


@_rule("mm", "bmm", "matmul")
def _mm(low: Lowering, op: Any, x: Value, y: Value) -> Node:
    if isinstance(y, Constant) and y.tensor.ndim == 2:
        return low.add(ops.Affine(real(y).T, np.zeros(y.tensor.shape[1])), low.node(x))
    if isinstance(x, Constant) and x.tensor.ndim == 2:
        turned = low.move(lambda v: v.transpose(-1, -2), low.node(y))
        found = low.add(ops.Affine(real(x), np.zeros(len(x.tensor))), turned)
        return low.move(lambda v: v.transpose(-1, -2), found)
    if isinstance(y, Constant) and y.tensor.ndim == 3 and len(y.tensor) == 1:
        flat = Constant(y.tensor[0])
        return low.add(ops.Affine(real(flat).T, np.zeros(flat.tensor.shape[1])), low.node(x))
    return low.add(Contract(), low.node(x), low.node(y))


@_rule("mv", "dot")
def _mv(low: Lowering, op: Any, x: Value, y: Value) -> Node:
    column = low.move(lambda v: v.unsqueeze(-1), y)
    rows = low.move(lambda v: v.reshape(-1, v.shape[-1]), x)
    found = _mm(low, op, rows, column)
    shape = _shape(low, x)[:-1]
    return low.move(lambda v: v.reshape(shape), found)


@_rule("addmm")
def _addmm(
    low: Lowering, op: Any, b: Value, x: Value, y: Value, beta: float = 1, alpha: float = 1
) -> Node:
    if beta != 1 or alpha != 1:
        raise UnsupportedError("scales its sum (beta, alpha)")
    if isinstance(y, Constant) and isinstance(b, Constant) and b.tensor.ndim == 1:
        return low.add(ops.Affine(real(y).T, real(b)), low.node(x))
    return _sum(low, _mm(low, op, x, y), b)


@_rule("baddbmm")
def _baddbmm(
    low: Lowering, op: Any, b: Value, x: Value, y: Value, beta: float = 1, alpha: float = 1
) -> Node:
    product = _scaled(low, _mm(low, op, x, y), float(alpha))
    return product if beta == 0 else _sum(low, product, _scaled(low, b, float(beta)))  # type: ignore[return-value]


@_rule("convolution")
def _convolution(low: Lowering, op: Any, x: Node, weight: Value, bias: Any, *args: Any) -> Node:
    w, b = _plain(weight).double(), None if bias is None else _plain(bias).double()
    return low.matrix(lambda y: op(y, w, b, *args), x)


# Functions of one number.


def _smooth(name: str) -> Handler:
    def handle(low: Lowering, op: Any, x: Value, *args: Any, **kwargs: Any) -> Node:
        found = low.add(Smooth(name), low.node(x))
        if name == "rsqrt":
            _note_root(low, found)
        return found

    return handle


for _name in ("exp", "log", "sqrt", "reciprocal", "tanh", "sigmoid", "silu", "erf", "rsqrt"):
    HANDLERS[_name] = _smooth(_name)


def _note_root(low: Lowering, root: Node) -> None:
    """Remember whose mean square is under a reciprocal root, behind an eps that is not negative."""
    ref = low.graph.nodes[root.ref].parents[0]
    while isinstance(operation := low.graph.nodes[ref].operation, Shift):
        if np.any(operation.bias < 0):
            return
        (ref,) = low.graph.nodes[ref].parents
    if ref in low.origin and low.origin[ref][0] == "mean square":
        low.origin[root.ref] = low.origin[ref]


@_rule("softplus")
def _softplus(low: Lowering, op: Any, x: Node, beta: float = 1, threshold: float = 20) -> Node:
    raise UnsupportedError("has no bound (it is cut at a threshold)")


@_rule("gelu")
def _gelu(low: Lowering, op: Any, x: Value, approximate: str = "none") -> Node:
    return low.add(Smooth("gelu" if approximate == "none" else "gelu_tanh"), low.node(x))


@_rule("relu")
def _relu(low: Lowering, op: Any, x: Value) -> Node:
    return low.add(nonlinear.Relu(), low.node(x))


@_rule("leaky_relu")
def _leaky(low: Lowering, op: Any, x: Node, slope: float = 0.01) -> Node:
    rest = low.add(nonlinear.Relu(), _scaled(low, x, -1.0))  # type: ignore[arg-type]
    return low.add(
        ops.Add(-1.0), low.add(nonlinear.Relu(), x), _scaled(low, rest, slope)  # type: ignore[arg-type]
    )


@_rule("abs")
def _abs(low: Lowering, op: Any, x: Node) -> Node:
    negative = low.add(ops.Scale(np.float64(-1.0), np.zeros(())), x, virtual=True)
    parts = [low.add(nonlinear.Relu(), y, virtual=True) for y in (x, negative)]
    return low.add(ops.Add(), *parts, virtual=True)


@_rule("clamp", "hardtanh", "clamp_min", "clamp_max")
def _clamp(low: Lowering, op: Any, x: Node, first: Any = None, second: Any = None) -> Node:
    name = op._schema.name
    least, most = (None, first) if name.endswith("clamp_max") else (first, second)
    found = x
    if least is not None:
        found = _largest_of(low, found, _const(least))
    if most is not None:
        found = _least_of(low, found, _const(most))
    return found


@_rule("maximum")
def _maximum(low: Lowering, op: Any, x: Value, y: Value) -> Node:
    return _largest_of(low, x, y)


@_rule("minimum")
def _minimum(low: Lowering, op: Any, x: Value, y: Value) -> Node:
    return _least_of(low, x, y)


def _largest_of(low: Lowering, x: Value, y: Value) -> Node:
    """Add `y + relu(x - y)`: float32 executes a selection, so that these nodes are virtual."""
    return _extreme(low, x, y, 1.0)


def _least_of(low: Lowering, x: Value, y: Value) -> Node:
    return _extreme(low, x, y, -1.0)


def _extreme(low: Lowering, x: Value, y: Value, sign: float) -> Node:
    shape = _together(low, x, y)
    first, second = low.expand(x, shape), low.expand(y, shape)
    gap = low.add(ops.Add(-1.0), first, second, virtual=True)
    if sign < 0:
        gap = low.add(ops.Scale(np.float64(-1.0), np.zeros(())), gap, virtual=True)
    above = low.add(nonlinear.Relu(), gap, virtual=True)
    return low.add(ops.Add(sign), second, above, virtual=True)


@_rule("amax")
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


@_rule("max")
def _max(low: Lowering, op: Any, x: Node, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None:
        raise UnsupportedError("takes a maximum over several axes")
    return _amax(low, op, x, dim, keepdim), None


@_rule("pow")
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
        _note_root(low, found)
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

        from assay.bounds.rounding import ball_interval

        if not ar.rigorous:
            function = np.sin if self.name == "sin" else np.cos
            return Interval.exactly(function(xs[0].midpoint()))
        middle, radius = xs[0].midpoint(), xs[0].radius()
        with ctx.workprec(128):
            balls = [
                arb(float(m), float(r)) for m, r in zip(middle.flat, radius.flat, strict=True)
            ]
            ends = [ball_interval(b.sin() if self.name == "sin" else b.cos()) for b in balls]
        found = np.array(ends).reshape(*middle.shape, 2)
        return Interval(found[..., 0], found[..., 1])

    def backward(self, rows: Any, xs: Any, relaxed: Any, error: Any, ar: Any) -> ops.Carried:
        raise NotImplementedError("a constant carries no rows")

    def error(self, xs: list[Interval], value: Interval) -> Any:
        from assay.bounds.levels import ULPS, executed_sum

        return executed_sum(2 * ULPS, value.magnitude(), 1.0)


HANDLERS |= {"sin": _fixed_only("sin"), "cos": _fixed_only("cos")}


# Softmax and norms.


def _last(low: Lowering, x: Node, dim: int) -> tuple[Node, Callable[[Node], Node]]:
    """Return x with an axis moved to the end, and how to move it back."""
    axis, axes = dim % len(low.shape(x)), len(low.shape(x))
    if axis == axes - 1:
        return x, lambda y: y
    moved = low.move(lambda y: y.movedim(axis, -1), x)
    return moved, lambda y: low.move(lambda z: z.movedim(-1, axis), y)


@_rule("_softmax", "softmax", "_safe_softmax")
def _softmax(low: Lowering, op: Any, x: Value, dim: int, *args: Any) -> Node:
    scores, back = _last(low, low.node(x), dim)
    never = low.never.pop(scores.ref, None)
    mask = np.ones(low.shape(scores)) if never is None else 1.0 - never
    if not np.all(mask.max(-1) > 0):
        # A row without any allowed entry is that of padding; the executed row is uniform, and no
        # later value may depend on it. It is bounded as if it saw everything.
        mask = np.where(mask.max(-1, keepdims=True) > 0, mask, 1.0)
    found = low.add(nonlinear.Softmax(mask), scores)
    if never is not None:
        low.never[scores.ref] = never
    return back(found)


@_rule("_log_softmax", "log_softmax")
def _log_softmax(low: Lowering, op: Any, x: Value, dim: int, *args: Any) -> Node:
    scores, back = _last(low, low.node(x), dim)
    shape = low.shape(scores)
    size = shape[-1]
    if size > PAIRS:
        wide = low.expand(_log_sum(low, scores), shape)
        return back(low.add(ops.Add(-1.0), scores, wide, virtual=True))
    # log p_i = -log sum_j exp(x_j - x_i), j = i included.
    eye = np.eye(size)
    differences = (eye[None, :, :] - eye[:, None, :]).reshape(size * size, size)
    gaps = low.add(ops.Affine(differences, np.zeros(size * size)), scores, virtual=True)
    gaps = low.move(lambda y: y.reshape(*shape[:-1], size, size), gaps)
    total = low.add(
        Total(size),
        low.add(Smooth("exp"), gaps, virtual=True),
        virtual=True,
    )
    logs = low.add(Smooth("log"), low.move(lambda y: y.squeeze(-1), total), virtual=True)
    found = low.add(ops.Scale(np.float64(-1.0), np.zeros(())), logs, virtual=True)
    low.dtypes |= {torch.float64}  # float32 executes another formula
    return back(found)


def _log_sum(low: Lowering, x: Node) -> Node:
    """Add the logarithm of the sum of the exponentials along the last axis, which stays."""
    size = low.shape(x)[-1]
    exponentials = low.add(Smooth("exp"), x, virtual=True)
    total = low.add(Total(size), exponentials, virtual=True)
    low.dtypes |= {torch.float64}
    return low.add(Smooth("log"), total, virtual=True)


@_rule("logsumexp")
def _logsumexp(low: Lowering, op: Any, x: Node, dim: list[int], keepdim: bool = False) -> Node:
    if len(dim) != 1:
        raise UnsupportedError("sums over several axes")
    scores, back = _last(low, x, dim[0])
    found = back(_log_sum(low, scores))
    return found if keepdim else low.move(lambda y: y.squeeze(dim[0]), found)


@_rule("nll_loss_forward")
def _nll(
    low: Lowering, op: Any, x: Node, labels: Value, weight: Any, reduction: int, ignore: int
) -> Any:
    if weight is not None or reduction != 0:
        raise UnsupportedError("weighs or averages its losses; only reduction='none' has a rule")
    chosen = _plain(labels)
    if bool((chosen == ignore).any()):
        raise UnsupportedError("ignores a label")
    found = low.move(lambda y: y.gather(1, chosen[:, None])[:, 0], x)
    return _scaled(low, found, -1.0), None


@_rule("native_layer_norm")
def _layer_norm(
    low: Lowering, op: Any, x: Value, shape: list[int], weight: Any, bias: Any, eps: float
) -> Any:
    node = low.node(x)
    size = low.shape(node)
    if tuple(shape) != size[-1:]:
        raise UnsupportedError(f"normalises over {tuple(shape)}; only the last axis has a rule")
    width = size[-1]
    centred = low.add(
        ops.Affine(width * np.eye(width) - 1.0, np.zeros(width)), node, virtual=True
    )
    # c = width (x - mean) has integer weights; norm = c / sqrt(sum c^2 / width + width^2 eps).
    scaled = _normed(low, centred, width, float(width), float(width**2) * eps, width - 1)
    gain = np.ones(width) if weight is None else real(weight)
    offset = np.zeros(width) if bias is None else real(bias)
    reason = (
        "level float32: LayerNorm is not covered, because how its variance is summed is not"
        " fixed; use level real"
    )
    return low.add(ops.Scale(gain, offset, unbounded=reason), scaled), None, None


@_rule("_fused_rms_norm", "rms_norm")
def _rms_norm(
    low: Lowering, op: Any, x: Value, shape: list[int], weight: Any = None, eps: Any = None
) -> Any:
    node = low.node(x)
    size = low.shape(node)
    if tuple(shape) != size[-1:] or eps is None:
        raise UnsupportedError("normalises over other axes than the last, or without an eps")
    scaled = _normed(low, node, size[-1], float(size[-1]), eps, size[-1])
    gain = np.ones(size[-1]) if weight is None else real(weight)
    reason = "level float32: a fused RMSNorm is not covered; use level real"
    found = low.add(ops.Scale(gain, np.zeros(()), unbounded=reason), scaled)
    return (found, None) if op._schema.name.endswith("_fused_rms_norm") else found


def _normed(
    low: Lowering, x: Node, width: int, divisor: float, eps: float, radius: int
) -> Node:
    """Add `x / sqrt(sum x^2 / divisor + eps)`, of which each entry is at most sqrt(radius)."""
    squares = low.add(nonlinear.Square(), x, virtual=True)
    total = low.add(Total(width), squares, virtual=True)
    root = low.add(
        nonlinear.InverseRoot(Interval.exactly(1.0) / divisor, Interval.exactly(eps)),
        total,
        virtual=True,
    )
    found = low.add(Product(), x, root, virtual=True)
    end = np.broadcast_to(sqrt_up(np.float64(radius)), low.shape(found))
    low.limits[found.ref] = Interval(-end, end)
    return found


@_rule("native_batch_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(low: Lowering, op: Any, x: Node, weight: Any, bias: Any, *args: Any) -> Any:
    mean, variance, *rest = args
    legit = op._schema.name.endswith("no_training")
    if not legit and rest[0]:
        raise UnsupportedError("normalises by the batch; call eval() on the model")
    eps = rest[1] if legit else rest[2]
    shape = (-1, *[1] * (len(low.shape(x)) - 2))
    wide = {
        name: None if t is None else Constant(_plain(t).double().reshape(shape))
        for name, t in (("w", weight), ("b", bias), ("m", mean), ("v", variance))
    }
    assert wide["m"] is not None
    assert wide["v"] is not None
    root = low.add(Smooth("rsqrt"), low.add(Shift(np.float64(eps)), low.node(wide["v"])))
    found = _times(low, _sub(low, op, x, wide["m"]), root)
    found = found if wide["w"] is None else _times(low, found, wide["w"])
    found = found if wide["b"] is None else _sum(low, found, wide["b"])
    return found, None, None

