"""Derivatives of a row of a graph's value by its inputs, as further nodes of the graph, and their
boxes.

The chain rule backward: what a node passes to a parent is its own derivative times that of the
operation. `slope` is the derivative of a function of one number, of which the range alone is known;
`span` is a constant known up to a box."""

from collections.abc import Callable, Sequence
from math import prod

import numpy as np

from assay_check.gates.arithmetic import Array, Box, exactly, times
from assay_check.gates.graph import Graph, Node
from assay_check.gates.rules import NoBoundError
from assay_check.gates.sweep import Sweep

Make = Callable[["Extension", Node, int, int], list[int | None]]


class Extension:
    """A graph that grows by the nodes of derivatives; equal nodes are made once."""

    def __init__(self, graph: Graph, row: Array) -> None:
        self.nodes = list(graph.nodes)
        self._known: dict[object, int] = {}
        self._factors: dict[int, tuple[int, int]] = {}
        last = len(graph.nodes) - 1
        terms: dict[int, list[int]] = {last: [self.make("constant", (), row.shape, (row,))]}
        self.of: dict[int, int] = {}
        for place in range(last, -1, -1):
            node = graph.nodes[place]
            if place not in terms or node.fixed:
                continue
            mine = self.sum(terms[place])
            if node.op == "input":
                self.of[place] = mine
                continue
            for parent, part in zip(
                node.parents, PARTS[node.op](self, node, place, mine), strict=False
            ):
                if part is not None:
                    terms.setdefault(parent, []).append(part)

    def make(
        self,
        op: str,
        parents: tuple[int, ...],
        shape: tuple[int, ...],
        constants: tuple[Array, ...] = (),
        name: str = "",
    ) -> int:
        key = (op, parents, shape, name, tuple((c.shape, c.dtype, c.tobytes()) for c in constants))
        if key not in self._known:
            fixed = all(self.nodes[p].fixed for p in parents)
            self.nodes.append(Node(op, parents, shape, constants, name, fixed))
            self._known[key] = len(self.nodes) - 1
        return self._known[key]

    def shape(self, place: int) -> tuple[int, ...]:
        return self.nodes[place].shape

    def sum(self, terms: list[int]) -> int:
        """Add terms up; `b + b u` is written as `b (1 + u)`, whose box is tighter."""
        found = terms[0]
        for term in terms[1:]:
            base, by = self._factors.get(term, (-1, -1))
            other, also = self._factors.get(found, (-1, -1))
            if base == found:
                found = self.product(found, self.one_more(by))
            elif other == term:
                found = self.product(term, self.one_more(also))
            else:
                found = self.make("add", (found, term), self.shape(found))
        return found

    def one_more(self, place: int) -> int:
        return self.make("shift", (place,), self.shape(place), (np.ones(()),))

    def product(self, x: int, y: int) -> int:
        found = self.make("product", (x, y), self.shape(x))
        self._factors[found] = (x, y)
        return found

    def scaled(self, x: int, by: Array) -> int:
        return self.make("scale", (x,), self.shape(x), (by, np.zeros(())))

    def linear(self, x: int, weight: Array) -> int:
        shape = (*self.shape(x)[:-1], len(weight))
        return self.make("affine", (x,), shape, (weight, np.zeros(len(weight))))

    def moved(self, x: int, shape: tuple[int, ...], to: Array, start: Array) -> int:
        return self.make("move", (x,), shape, (np.zeros(shape), to, start))


def _affine(more: Extension, node: Node, place: int, mine: int) -> list[int | None]:
    return [more.linear(mine, np.ascontiguousarray(node.constants[0].T))]


def _total(more: Extension, node: Node, place: int, mine: int) -> list[int | None]:
    return [more.linear(mine, np.ones((more.shape(node.parents[0])[-1], 1)))]


def _divide(more: Extension, node: Node, place: int, mine: int) -> list[int | None]:
    return [more.make("divide", (mine,), more.shape(mine), node.constants)]


def _subtract(more: Extension, node: Node, place: int, mine: int) -> list[int | None]:
    return [mine, more.scaled(mine, -np.ones(()))]


def _view(more: Extension, node: Node, place: int, mine: int) -> list[int | None]:
    return [more.make("view", (mine,), more.shape(node.parents[0]))]


def _move(more: Extension, node: Node, place: int, mine: int) -> list[int | None]:
    """Every entry of a parent gets the sum over the entries that it went to."""
    found = list[int | None]()
    pairs = zip(node.constants[1::2], node.constants[2::2], strict=True)
    for parent, (to, start) in zip(node.parents, pairs, strict=True):
        shape = more.shape(parent)
        counts, seats = np.zeros(prod(shape), np.int64), np.zeros(len(start), np.int64)
        for index, entry in enumerate(start.tolist()):
            seats[index] = counts[entry]
            counts[entry] += 1
        most = int(counts.max(initial=1)) or 1
        goal = start.astype(np.int64) * most + seats
        part = more.moved(mine, (prod(shape), most), goal, to.astype(np.int64))
        if most > 1:
            part = more.linear(part, np.ones((1, most)))
        found.append(more.make("view", (part,), shape))
    return found


def _product(more: Extension, node: Node, place: int, mine: int) -> list[int | None]:
    x, y = node.parents[:2]
    of_y = more.product(mine, x)
    if more.shape(y) != more.shape(x):
        of_y = more.linear(of_y, np.ones((1, more.shape(x)[-1])))
    return [more.product(mine, y), of_y]


def _contract(more: Extension, node: Node, place: int, mine: int) -> list[int | None]:
    x, y = node.parents
    other, one = _turned(more, y), _turned(more, x)
    return [
        more.make("contract", (mine, other), more.shape(x)),
        more.make("contract", (one, mine), more.shape(y)),
    ]


def _turned(more: Extension, x: int) -> int:
    shape = more.shape(x)
    start = np.arange(prod(shape)).reshape(shape).swapaxes(-1, -2)
    return more.moved(x, start.shape, np.arange(start.size), start.reshape(-1).copy())


def _square(more: Extension, node: Node, place: int, mine: int) -> list[int | None]:
    return [more.product(mine, more.scaled(node.parents[0], 2 * np.ones(())))]


def _inverse_root(more: Extension, node: Node, place: int, mine: int) -> list[int | None]:
    """r = (s x + t)^(-1/2) has the derivative -s/2 r^3."""
    squared = more.make("square", (place,), node.shape)
    half = times(Box(*node.constants[:2]), exactly(np.asarray(-0.5)))
    ends = tuple(np.broadcast_to(end, node.shape).copy() for end in (half.lo, half.hi))
    rate = more.product(more.product(squared, place), more.make("span", (), node.shape, ends))
    return [more.product(mine, rate)]


def _bent(more: Extension, node: Node, place: int, mine: int) -> list[int | None]:
    name = node.name or node.op
    return [more.product(mine, more.make("slope", node.parents, node.shape, (), name))]


def _choice(more: Extension, node: Node, place: int, mine: int) -> list[int | None]:
    decided = more.make("decided", node.parents, node.shape, node.constants, node.op)
    return [more.product(mine, decided), *[None] * (len(node.parents) - 1)]


def _softmax(more: Extension, node: Node, place: int, mine: int) -> list[int | None]:
    """p = softmax(x) passes on p (a - p . a)."""
    weighted = more.product(mine, place)
    terms = node.shape[-1]
    mean = more.linear(weighted, np.ones((terms, terms)))
    rest = more.make("subtract", (mine, mean), node.shape)
    return [more.product(rest, place)]


PARTS: dict[str, Make] = {
    "affine": _affine,
    "scale": lambda more, node, _, mine: [more.scaled(mine, node.constants[0])],
    "shift": lambda _, __, ___, mine: [mine],
    "divide": _divide,
    "add": lambda _, __, ___, mine: [mine, mine],
    "subtract": _subtract,
    "view": _view,
    "move": _move,
    "product": _product,
    "contract": _contract,
    "relu": _bent,
    "smooth": _bent,
    "square": _square,
    "inverse root": _inverse_root,
    "softmax": _softmax,
    "jump": _choice,
    "largest": _choice,
    "open": _choice,
    "total": _total,
}


class Derivatives:
    """The derivatives of `row . value` by every input over boxes."""

    def __init__(self, graph: Graph, row: Array) -> None:
        self._inputs = graph.inputs
        extension = Extension(graph, row)
        self._graph, self._of = Graph(tuple(extension.nodes)), extension.of

    def boxes(self, box: Sequence[Box]) -> list[Box] | None:
        """Return boxes of the derivatives by the inputs, or None where they have no bound."""
        ends = dict[int, Array]()
        for place, given in zip(self._inputs, box, strict=True):
            if place in self._of:
                of, free = self._of[place], given.lo < given.hi
                ends[of] = ends[of] | free if of in ends else free
        try:
            sweep = Sweep(self._graph, box, {}, ends=ends)
        except NoBoundError:
            return None
        found = []
        for place, given in zip(self._inputs, box, strict=True):
            if place in self._of:
                found.append(sweep.entries(self._of[place], given.lo < given.hi))
            else:
                found.append(exactly(np.zeros(given.shape)))
        return found
