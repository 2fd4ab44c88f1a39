"""Comparisons, and choices of the largest: where they keep numbers or put them to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from assay.bounds import nonlinear
from assay.bounds.rules import Jump, Largest, Open, Pick, Product, Smooth
from assay.bounds.trace.arithmetic import multiply, subtract
from assay.bounds.trace.lower import (
    Constant,
    Lowering,
    Node,
    Undecided,
    UnsupportedError,
    Value,
    real,
)
from assay.bounds.trace.moves import moved
from assay.bounds.trace.record import NO_RULE
from assay.bounds.trace.registry import as_value, rule, together


@dataclass(frozen=True)
class Above(Undecided):
    """Whether x > y; on the threshold itself either may hold."""

    x: Value
    y: Value


@dataclass(frozen=True)
class Ranking(Undecided):
    """Which entries of a number of sizes are the `count` largest along the last axis."""

    sizes: Node
    count: int


@dataclass(frozen=True)
class Taken(Undecided):
    """The numbers at the places of a ranking."""

    x: Node
    by: Ranking


@rule("gt", "ge")
def _above(low: Lowering, op: Any, x: Any, y: Any) -> Constant | Above:
    if isinstance(x, Node) and y == 0 and op._schema.name == "aten::gt" and _positive(low, x):
        low.dtypes |= {torch.float64}  # float32 may round such a number to zero
        return Constant(torch.ones(low.shape(x), dtype=torch.bool))
    return Above(as_value(x), as_value(y))


@rule("lt", "le")
def _below(low: Lowering, op: Any, x: Any, y: Any) -> Above:
    return Above(as_value(y), as_value(x))


def _positive(low: Lowering, x: Node) -> bool:
    node = low.graph.nodes[x.ref]
    while isinstance(node.operation, Pick) and node.operation.plain:
        node = low.graph.nodes[node.parents[0]]
    operation = node.operation
    return (isinstance(operation, nonlinear.Softmax) and bool(np.all(operation.mask))) or (
        isinstance(operation, Smooth) and operation.function.range[0] == 0
    )


@rule("mul")
def _mul(low: Lowering, op: Any, x: Any, y: Any) -> Node:
    if isinstance(x, Above):
        x, y = y, x
    if isinstance(y, Above) and isinstance(x, Node):
        return _stepped(low, op, x, y)
    return multiply(low, as_value(x), as_value(y))


def _stepped(low: Lowering, op: Any, x: Node, step: Above) -> Node:
    """Add x where a comparison holds, else zero: of `relu(p) (n p > theta)` with constants n and
    theta as a function of p alone.
    """
    p = _before_relu(low, x)
    of, limit = step.x, step.y
    if p is not None and isinstance(of, Node) and isinstance(limit, Constant):
        norms = _norms_of(low, of, p)
        if norms is not None and together(low, of, limit) == low.shape(p):
            return low.add(Jump(np.maximum(real(limit), 0.0)), p, *norms)
    gap = subtract(low, op, of, limit)
    shape = together(low, x, gap)
    return low.add(Open(), low.expand(x, shape), low.expand(gap, shape))


def _before_relu(low: Lowering, x: Node) -> Node | None:
    node = low.graph.nodes[x.ref]
    return Node(node.parents[0], x.dtype) if isinstance(node.operation, nonlinear.Relu) else None


def _norms_of(low: Lowering, sizes: Node, x: Node) -> tuple[Node, ...] | None:
    """Return (n,) where sizes are `n x` with constants n that are not negative, () where they are
    x itself; None for others.
    """
    if sizes.ref == x.ref:
        return ()
    node = low.graph.nodes[sizes.ref]
    if isinstance(node.operation, Product) and x.ref in node.parents[:2]:
        (other,) = [ref for ref in node.parents[:2] if ref != x.ref] or [x.ref]
        root = low.graph.nodes[other]
        while isinstance(root.operation, Pick) and len(root.parents) == 1:
            root = low.graph.nodes[root.parents[0]]
        positive = isinstance(root.operation, Smooth) and root.operation.function.range[0] >= 0
        if other in low.fixed and positive:
            return (Node(other, x.dtype),)
    return None


@rule("topk")
def _largest(
    low: Lowering, op: Any, x: Node, k: int, dim: int = -1, largest: bool = True, *args: Any
) -> tuple[Taken, Ranking]:
    if not largest or dim % len(low.shape(x)) != len(low.shape(x)) - 1:
        raise UnsupportedError("chooses the smallest, or along another axis than the last")
    ranking = Ranking(x, k)
    return Taken(x, ranking), ranking


@rule("gather")
def _gather(low: Lowering, op: Any, x: Value, dim: int, index: Any, *args: Any) -> Any:
    if not isinstance(index, Ranking):
        return moved(low, op, x, dim, index, *args)
    if not isinstance(x, Node):
        raise UnsupportedError("gathers constants by a choice that depends on the region")
    return Taken(x, index)


@rule("scatter")
def _scatter(low: Lowering, op: Any, x: Value, dim: int, index: Any, taken: Any) -> Node:
    """Add the numbers that a ranking chose in their places, and zeros elsewhere."""
    if not (isinstance(x, Constant) and isinstance(index, Ranking) and isinstance(taken, Taken)):
        raise UnsupportedError(NO_RULE)
    same = taken.by is index and tuple(x.tensor.shape) == low.shape(taken.x)
    if not same or bool(x.tensor.any()):
        raise UnsupportedError("puts a choice that depends on the region in other places")
    p, norms = _before_relu(low, taken.x), _norms_of(low, index.sizes, taken.x)
    if p is None or norms is None:
        raise UnsupportedError(
            "keeps the largest of numbers that are no ReLU, or by other sizes than their own times"
            " norms"
        )
    return low.add(Largest(index.count), p, *norms)
