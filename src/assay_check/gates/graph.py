"""Reading the graph of a certificate: operations on earlier nodes, with their constants."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from assay_check.gates.arithmetic import Array
from assay_check.reading import InputError, need

Shape = tuple[int, ...]
MOST = 1 << 24
"""Entries that one node may have."""


@dataclass(frozen=True)
class Node:
    """An operation (`input` for an input) on earlier nodes; `fixed`: it depends on no input."""

    op: str
    parents: tuple[int, ...]
    shape: Shape
    constants: tuple[Array, ...] = ()
    name: str = ""
    fixed: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """The nodes of a function; the last one is its value."""

    nodes: tuple[Node, ...]

    @property
    def inputs(self) -> list[int]:
        """The input nodes, in order."""
        return [ref for ref, node in enumerate(self.nodes) if node.op == "input"]

    def unknown(self, known: set[str]) -> dict[str, int]:
        """Return the operations that are not known, with how many nodes each has."""
        names = [node.name or node.op for node in self.nodes if node.op not in known]
        return {name: names.count(name) for name in sorted(set(names))}


def read_graph(entry: Any, held: dict[str, Array]) -> Graph:
    """Read a graph whose constants are tensors of the advice; InputError for any other."""
    need(isinstance(entry, list) and entry, "a graph is a list of operations")
    nodes: list[Node] = []
    for place, given in enumerate(entry):
        need(
            isinstance(given, dict) and given.keys() == {"op", "name", "parents", "shape", "holds"},
            f"operation {place} must have op, name, parents, shape and holds",
        )
        op, name, parents, shape = (given[key] for key in ("op", "name", "parents", "shape"))
        need(
            isinstance(op, str) and isinstance(name, str) and max(len(op), len(name)) < 60,
            f"operation {place}: op and name must be short texts",
        )
        need(
            _naturals(parents) and all(p < place for p in parents),
            f"operation {place} must read earlier ones, got {parents!r}",
        )
        need(
            _naturals(shape) and len(shape) < 9 and 0 < math.prod(shape) <= MOST,
            f"operation {place} has no possible shape: {shape!r}",
        )
        holds = given["holds"]
        need(
            isinstance(holds, list) and all(isinstance(h, str) and h in held for h in holds),
            f"operation {place} names constants that the advice does not hold",
        )
        constants = tuple(held[h] for h in holds)
        fixed = op != "input" and all(nodes[p].fixed for p in parents)
        node = Node(op, tuple(parents), tuple(shape), constants, name, fixed)
        _check(place, node, nodes)
        nodes.append(node)
    need(any(node.op == "input" for node in nodes), "the graph has no input")
    need(not nodes[-1].fixed, "the graph's value depends on no input")
    return Graph(tuple(nodes))


def _naturals(x: Any) -> bool:
    return isinstance(x, list) and all(type(n) is int and n >= 0 for n in x)


FLOATS = {
    "input": 0,
    "constant": 1,
    "affine": 2,
    "scale": 2,
    "shift": 1,
    "divide": 1,
    "add": 0,
    "subtract": 0,
    "view": 0,
    "product": 0,
    "contract": 0,
    "relu": 0,
    "square": 0,
    "inverse root": 4,
    "softmax": 1,
    "total": 0,
    "smooth": 0,
    "jump": 1,
    "largest": 1,
    "open": 0,
}
"""Operations with a fixed number of constants; `move` has one and two for every parent."""


def _check(place: int, node: Node, nodes: list[Node]) -> None:
    """Raise InputError unless constants and shapes fit; operations without a rule pass, and are
    named in the verdict.
    """

    def require(condition: Any) -> None:
        need(condition, f"operation {place} ({node.op}) does not fit what it reads")

    shapes = [nodes[p].shape for p in node.parents]
    if node.op == "move":
        _check_move(node, shapes, require)
        return
    if node.op not in FLOATS:
        return
    constants = node.constants
    require(len(constants) == FLOATS[node.op])
    require(all(c.dtype == np.float64 and np.isfinite(c).all() for c in constants))
    one = len(shapes) == 1
    match node.op:
        case "input":
            require(not shapes)
        case "constant":
            require(not shapes and constants[0].shape == node.shape)
        case "affine":
            weight, bias = constants
            require(one and weight.ndim == 2 and bias.shape == weight.shape[:1])
            require(shapes[0] and shapes[0][-1] == weight.shape[1])
            require(node.shape == (*shapes[0][:-1], len(weight)))
        case "scale" | "shift" | "divide":
            require(one and node.shape == shapes[0])
            require(all(_broadcasts(c.shape, node.shape) for c in constants))
            require(node.op != "divide" or (constants[0] != 0).all())
        case "add" | "subtract":
            require(len(shapes) == 2 and shapes[0] == shapes[1] == node.shape)
        case "view":
            require(one and math.prod(shapes[0]) == math.prod(node.shape))
        case "product":
            require(len(shapes) in (2, 4) and node.shape == shapes[0])
            require(shapes[1] in (shapes[0], (*shapes[0][:-1], 1)))
            if (
                len(shapes) == 4
            ):  # the last two parents must be x + y and x - y, or they say nothing
                both = node.parents[:2]
                for parent, op in zip(node.parents[2:], ("add", "subtract"), strict=True):
                    require(nodes[parent].op == op and nodes[parent].parents == both)
        case "contract":
            require(len(shapes) == 2 and len(shapes[0]) == len(shapes[1]) >= 2)
            x, y = shapes
            require(x[:-2] == y[:-2] and x[-1] == y[-2] and node.shape == (*x[:-1], y[-1]))
        case "jump" | "largest" | "open":
            counts = (2,) if node.op == "open" else (1, 2)
            require(len(shapes) in counts and all(shape == node.shape for shape in shapes))
            if node.op == "jump":
                require(_broadcasts(constants[0].shape, node.shape) and (constants[0] >= 0).all())
            elif node.op == "largest":
                count = constants[0]
                require(shapes[0] and count.shape == () and count >= 1 and count == int(count))
        case "inverse root":
            require(one and node.shape == shapes[0] and all(c.shape == () for c in constants))
            require(0 <= constants[0] <= constants[1] and constants[2] <= constants[3])
        case "softmax":
            require(one and node.shape == shapes[0] and shapes[0])
            mask = constants[0]
            require(_broadcasts(mask.shape, node.shape) and np.isin(mask, (0.0, 1.0)).all())
            require(np.broadcast_to(mask, node.shape).max(-1).min() > 0)
        case "total":
            require(one and shapes[0] and node.shape == (*shapes[0][:-1], 1))
        case _:
            require(one and node.shape == shapes[0])


def _broadcasts(given: Shape, shape: Shape) -> bool:
    pairs = zip(given[::-1], shape[::-1], strict=False)
    return len(given) <= len(shape) and all(a in (1, b) for a, b in pairs)


def _check_move(node: Node, shapes: list[Shape], require: Any) -> None:
    """Every entry of the output is a constant, or one entry of one parent."""
    constants = node.constants
    require(shapes and len(constants) == 1 + 2 * len(shapes))
    fill, *places = constants
    require(fill.dtype == np.float64 and fill.shape == node.shape and np.isfinite(fill).all())
    require(all(p.dtype.kind == "i" and p.ndim == 1 for p in places))
    taken = np.concatenate([to.astype(np.int64) for to in places[::2]])
    require(len(np.unique(taken)) == len(taken))
    require(((taken >= 0) & (taken < fill.size)).all() and not fill.reshape(-1)[taken].any())
    for to, start, shape in zip(places[::2], places[1::2], shapes, strict=True):
        require(len(to) == len(start))
        require(((start >= 0) & (start < math.prod(shape))).all())


def read_names(entry: Any, what: str) -> list[str]:
    """Read a list of distinct names."""
    if not (isinstance(entry, list) and all(isinstance(n, str) for n in entry)):
        raise InputError(f"{what} must be a list of names")
    need(len(set(entry)) == len(entry), f"{what} names one thing twice")
    return list(entry)
