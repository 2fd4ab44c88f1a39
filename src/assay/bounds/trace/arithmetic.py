"""Sums and products, matrix products and convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from assay.bounds import nonlinear
from assay.bounds import operations as ops
from assay.bounds.rounding import Interval, sqrt_up
from assay.bounds.rules import Contract, Divide, Pick, Product, Shift, Smooth, Total
from assay.bounds.rules.smooth import GELU_CUBIC, GELU_ROOT
from assay.bounds.trace.lower import NEVER, Constant, Lowering, Node, UnsupportedError, Value, real
from assay.bounds.trace.registry import as_value, plain, rule, shape_of, together


@rule("add")
def _add(low: Lowering, op: Any, x: Any, y: Any, alpha: float = 1.0) -> Node:
    return add_values(low, as_value(x), scaled(low, as_value(y), float(alpha)))


@rule("sub")
def subtract(low: Lowering, op: Any, x: Any, y: Any, alpha: float = 1.0) -> Node:
    first, second = as_value(x), as_value(y)
    if isinstance(second, Constant) or alpha != 1:
        return add_values(low, first, scaled(low, second, -float(alpha)))
    if isinstance(first, Constant):
        return add_values(low, scaled(low, second, -1.0), first)
    shape = together(low, first, second)
    return low.add(ops.Add(-1.0), low.expand(first, shape), low.expand(second, shape))


@rule("rsub")
def _rsub(low: Lowering, op: Any, x: Any, y: Any, alpha: float = 1.0) -> Node:
    return subtract(low, op, y, x, alpha)


def scaled(low: Lowering, x: Value, factor: float) -> Value:
    if factor == 1:
        return x
    if isinstance(x, Constant):
        if abs(factor) == 1:
            return Constant(x.tensor.double() * factor)
        x = low.node(x)
    return low.add(ops.Scale(np.asarray(factor), np.zeros(())), x)


def add_values(low: Lowering, x: Value, y: Value) -> Node:
    if isinstance(x, Constant) and isinstance(y, Node):
        x, y = y, x
    shape = together(low, x, y)
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
        before = low.never.pop(plain.ref, None)
        found = low.add(Shift(bias), plain) if bias.any() else low.move(lambda v: v.clone(), plain)
        low.never[found.ref] = never
        if before is not None:
            low.never[plain.ref] = before
        return found
    return low.add(ops.Add(), low.expand(x, shape), low.expand(y, shape))


def _compact(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a constant that broadcasts to the shape, with no more axes than it has."""
    return np.asarray(values).reshape(values.shape[-len(shape) :]) if values.ndim else values


@rule("neg")
def _neg(low: Lowering, op: Any, x: Node) -> Value:
    return scaled(low, x, -1.0)


def multiply(low: Lowering, x: Value, y: Value) -> Node:
    if isinstance(x, Constant) and isinstance(y, Node):
        x, y = y, x
    shape = together(low, x, y)
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
                isinstance(node.operation, Pick) and node.operation.plain
            ):
                return ref if seen else None
            (ref,) = node.parents

    one = base(x.ref)
    return one is not None and one == base(y.ref)


def _limit_norm(low: Lowering, x: Node, width: int) -> None:
    """Note that a vector divided by the root of its mean square lies in a ball of
    radius sqrt(d).
    """
    end = np.broadcast_to(sqrt_up(float(width)), low.shape(x))
    low.limits[x.ref] = Interval(-end, end)


@rule("div")
def _div(low: Lowering, op: Any, x: Any, y: Any, rounding_mode: Any = None) -> Node:
    if rounding_mode is not None:
        raise UnsupportedError(f"rounds ({rounding_mode})")
    first, second = as_value(x), as_value(y)
    if isinstance(second, Constant):
        divisor = real(second)
        if np.any(divisor == 0):
            raise UnsupportedError("divides by zero")
        shape = together(low, first, second)
        return low.add(Divide(divisor), low.expand(first, shape))
    return multiply(low, first, low.add(Smooth("reciprocal"), second))


@rule("sum", "mean")
def total_of(
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
        found = low.add(Divide(np.asarray(count)), found)
        origin = low.graph.nodes[x.ref]
        if isinstance(origin.operation, nonlinear.Square) and axes == [len(shape) - 1]:
            low.origin[found.ref] = ("mean square", origin.parents[0])
    return low.move(lambda y: y.reshape(target), found)


@rule("mm", "bmm", "matmul")
def matrix_product(low: Lowering, op: Any, x: Value, y: Value) -> Node:
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


@rule("mv", "dot")
def _mv(low: Lowering, op: Any, x: Value, y: Value) -> Node:
    column = low.move(lambda v: v.unsqueeze(-1), y)
    rows = low.move(lambda v: v.reshape(-1, v.shape[-1]), x)
    found = matrix_product(low, op, rows, column)
    shape = shape_of(low, x)[:-1]
    return low.move(lambda v: v.reshape(shape), found)


@rule("addmm")
def _addmm(
    low: Lowering, op: Any, b: Value, x: Value, y: Value, beta: float = 1, alpha: float = 1
) -> Node:
    if beta != 1 or alpha != 1:
        raise UnsupportedError("scales its sum (beta, alpha)")
    if isinstance(y, Constant) and isinstance(b, Constant) and b.tensor.ndim == 1:
        return low.add(ops.Affine(real(y).T, real(b)), low.node(x))
    return add_values(low, matrix_product(low, op, x, y), b)


@rule("baddbmm")
def _baddbmm(
    low: Lowering, op: Any, b: Value, x: Value, y: Value, beta: float = 1, alpha: float = 1
) -> Node:
    product = scaled(low, matrix_product(low, op, x, y), float(alpha))
    return product if beta == 0 else add_values(low, product, scaled(low, b, float(beta)))  # type: ignore[return-value]


@rule("convolution")
def _convolution(low: Lowering, op: Any, x: Node, weight: Value, bias: Any, *args: Any) -> Node:
    w, b = plain(weight).double(), None if bias is None else plain(bias).double()
    zero = op(torch.zeros(low.shape(x), dtype=torch.float64), w, b, *args)
    # Without the bias, beside which the weights would be rounded.
    return low.matrix(lambda y: op(y, w, None, *args), x, zero)
