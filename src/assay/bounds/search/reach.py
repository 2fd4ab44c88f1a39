"""Which entries of every node a value depends on: no other interval is worth a linear bound. In the
last layer of a language model, those of one position. A factor of zero depends on nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from assay.bounds import nonlinear
from assay.bounds import operations as ops
from assay.bounds.graph import Graph, Ref
from assay.bounds.operations import Operation, Shape
from assay.bounds.rules import (
    Choice,
    Contract,
    Decision,
    Divide,
    Enclosed,
    Largest,
    Pick,
    Product,
    Shift,
    Slope,
    Smooth,
)

Mask = NDArray[np.bool_]


def needed(graph: Graph, wanted: Mapping[Ref, Mask] | None = None) -> dict[Ref, Mask]:
    """Return the entries of every node that the wanted ones depend on, by default all of the
    value's; nodes left out are not needed.
    """
    last = len(graph.nodes) - 1
    found = dict(wanted or {last: np.ones(graph.nodes[last].shape, bool)})
    present = _present(graph)
    for ref in range(last, -1, -1):
        node = graph.nodes[ref]
        if ref not in found or node.operation is None:
            continue
        there = [present[p] for p in node.parents]
        for parent, mask in zip(
            node.parents, _parts(node.operation, found[ref], there), strict=True
        ):
            found[parent] = found[parent] | mask if parent in found else mask
    return found


def _parts(operation: Operation, mask: Mask, present: list[Mask]) -> list[Mask]:
    """Return the entries of the parents that some entries of an operation depend on."""
    shapes: list[Shape] = [x.shape for x in present]
    match operation:
        case ops.Scale() | Shift() | Divide() | ops.Add() | Smooth() | Slope():
            return [mask] * len(shapes)
        case nonlinear.Relu() | nonlinear.Square() | nonlinear.InverseRoot():
            return [mask]
        case Largest():
            every = np.broadcast_to(mask.any(-1, keepdims=True), mask.shape)
            return [every] * len(shapes)
        case Choice() | Decision():
            return [mask] * len(shapes)
        case ops.Affine() | nonlinear.Softmax():
            return [np.broadcast_to(mask.any(-1, keepdims=True), shapes[0])]
        case Pick():
            parts = []
            for (to, start), shape in zip(operation.sources, shapes, strict=True):
                part = np.zeros(math.prod(shape), bool)
                part[start[mask.reshape(-1)[to]]] = True
                parts.append(part.reshape(shape))
            return parts
        case Product():
            x, y = present[:2]
            of_y = mask & x
            narrow: Mask = of_y
            if y.shape != mask.shape:
                narrow = np.asarray(of_y.any(-1, keepdims=True))
            return [mask & y, narrow, *[mask & x & y] * (len(shapes) - 2)]
        case Contract():
            return [
                np.broadcast_to(mask.any(-1, keepdims=True), shapes[0]),
                np.broadcast_to(mask.any(-2, keepdims=True), shapes[1]),
            ]
        case _:
            return [np.ones(shape, bool) for shape in shapes]


def _present(graph: Graph) -> list[Mask]:
    """Return which entries of every node may be other than zero."""
    found: list[Mask] = []
    for node in graph.nodes:
        xs = [found[p] for p in node.parents]
        match node.operation:
            case Enclosed():
                mine = (node.operation.lo != 0) | (node.operation.hi != 0)
            case ops.Affine() if not node.operation.bias.any():
                mine = np.broadcast_to(xs[0].any(-1, keepdims=True), node.shape)
            case ops.Scale() if not node.operation.bias.any():
                mine = xs[0]
            case Divide() | nonlinear.Square() | nonlinear.Relu():
                mine = xs[0]
            case ops.Add():
                mine = xs[0] | xs[1]
            case Product():
                mine = xs[0] & xs[1]
            case Contract():
                mine = xs[0] @ xs[1]
            case Pick():
                flat = node.operation.fill.reshape(-1) != 0
                for (to, start), x in zip(node.operation.sources, xs, strict=True):
                    flat[to] = x.reshape(-1)[start]
                mine = flat.reshape(node.shape)
            case _:
                mine = np.ones(node.shape, bool)
        found.append(mine)
    return found
