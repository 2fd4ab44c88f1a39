"""The derivative of a graph by its inputs, as nodes of the same graph, by the chain rule backward.

Every rule is made of operations that have bounds, so that the derivative over a box is bounded like
any other value. A derivative that keeps its sign on a box says at which end of its input the value
is least there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from assay.bounds import nonlinear
from assay.bounds import operations as ops
from assay.bounds.graph import Graph, Ref
from assay.bounds.operations import Operation
from assay.bounds.rounding import Array
from assay.bounds.rules import (
    Choice,
    Contract,
    Decision,
    Divide,
    Enclosed,
    Pick,
    Product,
    Shift,
    Slope,
    Smooth,
)
from assay.bounds.trace.traced import LevelGraph

FEW = 8
"""Entries that are summed at once where some entries went to many places and most to few."""


@dataclass
class Derived:
    """A graph with its derivatives: `of[i]` is the node of the derivative by input i, absent where
    the value does not depend on it."""

    at: LevelGraph
    of: dict[Ref, Ref]


def derive(at: LevelGraph, row: Array) -> Derived | None:
    """Return the graph with the derivatives of `row . value` by its inputs, or None where an
    operation has no rule for it; all rows share what is made of the graph.
    """
    made: Derived | None = at.once("derivatives", lambda: _of_any_row(at))
    if made is None:
        return None
    graph, seed = Graph(), len(at.graph.nodes)
    graph.nodes = list(made.at.graph.nodes)
    graph.nodes[seed] = replace(graph.nodes[seed], operation=Enclosed(row, row))
    return Derived(LevelGraph(graph, at.limits, at.level), made.of)


def _of_any_row(at: LevelGraph) -> Derived | None:
    """Return the derivatives of a row of zeros, which is the first node that is added."""
    try:
        return _Chain(at).run()
    except _NoRuleError:
        return None


def _same(x: Array) -> Any:
    """Tell views of the same numbers apart, such as a matrix and its transpose."""
    return x.ctypes.data, x.shape, x.strides


class _NoRuleError(Exception):
    pass


@dataclass
class _Chain:
    at: LevelGraph
    graph: Graph = field(default_factory=Graph)
    same: dict[Any, Ref] = field(default_factory=dict)
    factors: dict[Ref, tuple[Ref, Ref]] = field(default_factory=dict)

    def run(self) -> Derived:
        source = self.at.graph
        self.graph.nodes = list(source.nodes)
        moves = [node.operation is None for node in source.nodes]
        for ref, node in enumerate(source.nodes):
            moves[ref] = moves[ref] or any(moves[p] for p in node.parents)
        row = np.zeros(source.nodes[-1].shape)
        pending = {len(source.nodes) - 1: [self.graph.add_node(Enclosed(row, row))]}
        found: dict[Ref, Ref] = {}
        for ref in range(len(source.nodes) - 1, -1, -1):
            if ref not in pending or not moves[ref]:
                continue
            mine = self.sum(pending.pop(ref))
            node = source.nodes[ref]
            if node.operation is None:
                found[ref] = mine
                continue
            for parent, part in zip(
                node.parents, self.parts(node.operation, ref, mine), strict=False
            ):
                if part is not None and moves[parent]:
                    pending.setdefault(parent, []).append(part())
        return Derived(LevelGraph(self.graph, self.at.limits, self.at.level), found)

    def add(self, operation: Operation, *parents: Ref, key: Any) -> Ref:
        """Add a node once: the same operation on the same nodes is the same node."""
        full = (type(operation).__name__, key, parents)
        if full not in self.same:
            self.same[full] = self.graph.add_node(operation, *parents)
        return self.same[full]

    def sum(self, terms: list[Ref]) -> Ref:
        """Add up, and `b + u b` as `(1 + u) b`."""
        total = terms[0]
        for term in terms[1:]:
            for one, other in ((total, term), (term, total)):
                by, base = self.factors.get(other, (-1, -1))
                if base == one:
                    more = self.add(Shift(np.ones(())), by, key="1+")
                    total = self.product(one, more)
                    break
            else:
                total = self.add(ops.Add(), total, term, key=1)
        return total

    def product(self, x: Ref, y: Ref) -> Ref:
        found = self.add(Product(), x, y, key="")
        self.factors[found] = (y, x)
        return found

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self.graph.nodes[ref].shape

    def parts(self, operation: Operation, ref: Ref, mine: Ref) -> list[Callable[[], Ref] | None]:
        """Return, for every parent, what makes the node of its part of the derivative."""
        parents = self.graph.nodes[ref].parents
        x = parents[0] if parents else -1
        match operation:
            case ops.Affine():
                turned = ops.Affine(operation.weight.T, np.zeros(operation.weight.shape[1]))
                return [lambda: self.add(turned, mine, key=_same(operation.weight))]
            case ops.Scale():
                weight = operation.weight
                return [lambda: self.add(ops.Scale(weight, np.zeros(())), mine, key=_same(weight))]
            case Shift():
                return [lambda: mine]
            case Divide():
                by = operation.divisor
                return [lambda: self.add(Divide(by), mine, key=_same(by))]
            case ops.Add():
                minus = ops.Scale(-np.ones(()), np.zeros(()))
                last = (
                    (lambda: mine)
                    if operation.sign > 0
                    else (lambda: self.add(minus, mine, key="-"))
                )
                return [lambda: mine, last]
            case Pick():
                return [
                    partial(self.gathered, operation, index, mine, self.shape(p))
                    for index, p in enumerate(parents)
                ]
            case Product():
                y = parents[1]
                return [lambda: self.product(mine, y), lambda: self.narrow(mine, x, y)]
            case Contract():
                y = parents[1]
                return [
                    lambda: self.add(Contract(), mine, self.turned(y), key=""),
                    lambda: self.add(Contract(), self.turned(x), mine, key=""),
                ]
            case nonlinear.Square():
                twice = ops.Scale(2 * np.ones(()), np.zeros(()))
                return [lambda: self.product(mine, self.add(twice, x, key="2"))]
            case nonlinear.InverseRoot():
                return [lambda: self.product(mine, self.root_slope(operation, ref))]
            case nonlinear.Relu():
                return [lambda: self.product(mine, self.add(Slope("relu"), x, key="relu"))]
            case Smooth():
                name = operation.name
                return [lambda: self.product(mine, self.add(Slope(name), x, key=name))]
            case Choice():
                decided = Decision(operation)
                return [lambda: self.product(mine, self.add(decided, *parents, key=ref))]
            case nonlinear.Softmax():
                return [lambda: self.of_softmax(mine, ref)]
            case _:
                raise _NoRuleError

    def narrow(self, mine: Ref, x: Ref, y: Ref) -> Ref:
        """Return the part of a second factor, summed where it stands for a whole last axis."""
        full = self.product(mine, x)
        if self.shape(y) == self.shape(full):
            return full
        ones = ops.Affine(np.ones((1, self.shape(full)[-1])), np.zeros(1))
        return self.add(ones, full, key="total")

    def root_slope(self, operation: nonlinear.InverseRoot, root: Ref) -> Ref:
        """Return `-scale/2 r^3`, the derivative of `r = (scale x + shift)^(-1/2)`."""
        squared = self.add(nonlinear.Square(), root, key="")
        cube = self.product(squared, root)
        ends = operation.scale * -0.5
        shape = self.shape(root)
        half = Enclosed(np.broadcast_to(ends.lo, shape), np.broadcast_to(ends.hi, shape))
        return self.product(cube, self.graph.add_node(half))

    def of_softmax(self, mine: Ref, shares: Ref) -> Ref:
        """Return `p (a - p . a)`."""
        weighted = self.product(mine, shares)
        count = self.shape(mine)[-1]
        mean = self.add(ops.Affine(np.ones((1, count)), np.zeros(1)), weighted, key="total")
        shape = self.shape(mine)
        places = np.arange(int(np.prod(shape)))
        wide = Pick(np.zeros(shape), ((places, places // count),), (len(places) // count,))
        mean = self.add(wide, mean, key="wide")
        return self.product(self.add(ops.Add(-1.0), mine, mean, key=-1), shares)

    def turned(self, x: Ref) -> Ref:
        shape = self.shape(x)
        places = np.arange(int(np.prod(shape))).reshape(shape).swapaxes(-1, -2)
        fill = np.zeros(places.shape)
        pick = Pick(fill, ((np.arange(places.size), places.reshape(-1)),), (places.size,))
        return self.add(pick, x, key="turned")

    def gathered(self, pick: Pick, index: int, mine: Ref, shape: tuple[int, ...]) -> Ref:
        """Return, for every entry of a parent, the sum of what the places that it went to have."""
        to, start = pick.sources[index]
        size, total, stage = int(np.prod(shape)), mine, 0
        order = np.argsort(start, kind="stable")
        to, start = to[order], start[order]
        while True:
            begins = np.flatnonzero(np.r_[True, start[1:] != start[:-1]][: len(start)])
            counts = np.diff(np.r_[begins, len(start)])
            rank = np.arange(len(start)) - np.repeat(begins, counts)
            most, last = int(counts.max(initial=1)), True
            into, rows = start, size
            if size * most > 4 * (size + len(start)):  # a table with few entries: a few at a time
                most, last = FEW, False
                fresh = rank % FEW == 0
                into, rank = np.cumsum(fresh) - 1, rank % FEW
                rows, start = int(fresh.sum()), start[fresh]
            count = int(np.prod(self.shape(total)))
            full = shape if last and most == 1 else (rows, most)
            table = Pick(np.zeros(full), ((into * most + rank, to),), (count,))
            total = self.add(table, total, key=(id(pick), index, stage))
            if full == shape:
                return total
            if most > 1:
                ones = ops.Affine(np.ones((1, most)), np.zeros(1))
                total = self.add(ones, total, key="total")
            if last:
                break
            to, stage = np.arange(rows), stage + 1
        places = np.arange(size)
        return self.add(Pick(np.zeros(shape), ((places, places),), (size,)), total, key="view")
