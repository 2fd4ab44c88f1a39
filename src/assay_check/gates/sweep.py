"""Bounds of a graph on one box: boxes forward, tightened by linear bounds carried back to the
inputs, and the bound of a row of the value.

Where a nonlinear operation reads a node, each of its entries is bounded by lines as well. The
slopes come from the certificate; wrong ones give weak bounds, never false ones."""

from collections.abc import Mapping, Sequence

import numpy as np

from assay_check.gates.arithmetic import Array, Box, cost, down, least, up
from assay_check.gates.graph import Graph, Node
from assay_check.gates.rules import BENT, NONLINEAR, NoBoundError, Slopes, enclose, relax, step

ROWS = 1 << 22
"""Numbers in the rows that are carried at once."""


class Sweep:
    """What is known of every node of a graph on a box."""

    def __init__(
        self,
        graph: Graph,
        box: Sequence[Box],
        slopes: Mapping[int, Slopes],
        *,
        tight: bool = True,
        ends: Mapping[int, Array] | None = None,
    ) -> None:
        self.graph, self.slopes = graph, slopes
        self.values: list[Box] = []
        self._relaxed: dict[int, object] = {}
        given = dict(zip(graph.inputs, box, strict=True))
        wanted = _wanted(graph, ends) if tight else {}
        for ref, node in enumerate(graph.nodes):
            xs = [self.values[p] for p in node.parents]
            value = given[ref] if node.op == "input" else enclose(node, xs)
            limit = _limit(graph, ref)
            if limit is not None:
                value = value.meet(np.asarray(-limit), np.asarray(limit))
            if not (np.isfinite(value.lo).all() and np.isfinite(value.hi).all()):
                raise NoBoundError(f"operation {ref} ({node.op}) is not bounded on a box")
            self.values.append(value)
            if ref in wanted:
                self._tighten(ref, *wanted[ref])

    def bound(self, row: Array, slopes: Mapping[int, Slopes]) -> float:
        """Bound `row . value` from below, with slopes of its own."""
        last = len(self.graph.nodes) - 1
        self.slopes, self._relaxed = slopes, {}
        value = self.values[last]
        plain = least(row[None], value.lo, value.hi)[0]
        return float(np.fmax(plain, self._carry(last, row[None])[0]))

    def _tighten(self, ref: int, readers: set[str], used: Array) -> None:
        value = self.values[ref]
        wide = used & (value.hi - value.lo > 1e-7 * (1 + value.size()))
        if readers == {"relu"}:
            wide &= (value.lo < 0) & (value.hi > 0)
        self.values[ref] = self._narrowed(ref, np.flatnonzero(wide))

    def entries(self, ref: int, some: Array) -> Box:
        """Return the box of a node, with lines for some of its entries."""
        return self._narrowed(ref, np.flatnonzero(some))

    def _narrowed(self, ref: int, units: Array) -> Box:
        value = self.values[ref]
        lo, hi = value.lo.reshape(-1).copy(), value.hi.reshape(-1).copy()
        many = max(1, ROWS // (2 * max(x.lo.size for x in self.values)))
        for start in range(0, len(units), many):
            some = units[start : start + many]
            rows = np.zeros((2 * len(some), value.lo.size))
            rows[np.arange(len(some)), some] = 1.0
            rows[np.arange(len(some)) + len(some), some] = -1.0
            found = self._carry(ref, rows.reshape(-1, *value.shape))
            lo[some] = np.fmax(lo[some], found[: len(some)])
            hi[some] = np.fmin(hi[some], -found[len(some) :])
        return Box(lo.reshape(value.shape), hi.reshape(value.shape))

    def _carry(self, ref: int, rows: Array) -> Array:
        """Bound rows of a node from below, (rows,)."""
        nodes, pending = self.graph.nodes, {ref: rows}
        bound = np.zeros(len(rows))
        for place in range(ref, -1, -1):
            if place not in pending:
                continue
            mine, node = pending.pop(place), nodes[place]
            if node.op == "input" or node.fixed:
                bound = down(bound + least(mine, self.values[place].lo, self.values[place].hi))
                continue
            xs = [self.values[p] for p in node.parents]
            if node.op in NONLINEAR and place not in self._relaxed:
                self._relaxed[place] = relax(node, xs, self.slopes.get(place))
            parts, constant = step(node, mine, xs, self._relaxed.get(place))
            bound = down(bound + constant)
            for parent, part in zip(node.parents, parts, strict=True):
                if part is None:
                    continue
                coefficients, error = part
                size = self.values[parent].size()
                if error is not None:
                    bound = down(bound - cost(np.broadcast_to(error, coefficients.shape), size))
                if parent in pending:
                    coefficients = pending[parent] + coefficients
                    rounding = up(2.0**-53 * np.abs(coefficients))
                    bound = down(bound - cost(rounding, size))
                pending[parent] = coefficients
        return np.where(np.isnan(bound), -np.inf, bound)


def _wanted(graph: Graph, ends: Mapping[int, Array] | None) -> dict[int, tuple[set[str], Array]]:
    """Return the nodes that nonlinear operations read, behind moved entries, whose boxes lines may
    tighten, with the operations that read them and the entries that the ends (by default the
    value) depend on.
    """
    used = _used(graph, ends)
    sources = list[set[int]]()
    for ref, node in enumerate(graph.nodes):
        moved = node.op in ("view", "move")
        sources.append(set[int]().union(*(sources[p] for p in node.parents)) if moved else {ref})
    found: dict[int, set[str]] = {}
    for node in graph.nodes:
        if node.op in NONLINEAR and not node.fixed:
            for source in set[int]().union(*(sources[p] for p in node.parents)):
                found.setdefault(source, set()).add(node.op)
    return {
        ref: (ops, used[ref])
        for ref, ops in found.items()
        if ref in used and not _is_exact(graph, ref, sources)
    }


def _used(graph: Graph, ends: Mapping[int, Array] | None) -> dict[int, Array]:
    """Return the entries of nodes that the ends depend on, and perhaps some more."""
    last = len(graph.nodes) - 1
    present = _present(graph)
    used = dict(ends) if ends else {last: np.ones(graph.nodes[last].shape, bool)}
    for ref in range(last, -1, -1):
        if ref not in used:
            continue
        node, mine = graph.nodes[ref], used[ref]
        for index, parent in enumerate(node.parents):
            shape = graph.nodes[parent].shape
            if node.op == "move":
                to, start = node.constants[1 + 2 * index], node.constants[2 + 2 * index]
                flat = np.zeros(int(np.prod(shape)), bool)
                flat[start[mine.reshape(-1)[to]]] = True
                part = flat.reshape(shape)
            elif node.op == "view":
                part = mine.reshape(shape)
            elif node.op == "contract":
                part = np.broadcast_to(mine.any(-1 - index, keepdims=True), shape)
            elif shape == node.shape and node.op not in ("affine", "softmax", "largest"):
                part = mine
                if node.op == "product" and index < 2:  # a factor of zero uses nothing
                    part = mine & present[node.parents[1 - index]]
            elif node.op == "product":
                part = (mine & present[node.parents[0]]).any(-1, keepdims=True)
            else:  # along the last axis
                part = np.broadcast_to(mine.any(-1, keepdims=True), shape)
            used[parent] = used[parent] | part if parent in used else part
    return used


def _present(graph: Graph) -> list[Array]:
    """Return which entries of nodes may differ from zero; all, where it is not known."""
    found: list[Array] = []
    for node in graph.nodes:
        xs = [found[p] for p in node.parents]
        held = node.constants
        mine = np.ones(node.shape, bool)
        match node.op:
            case "constant":
                mine = held[0] != 0
            case "affine" if not held[1].any():
                mine = np.broadcast_to(xs[0].any(-1, keepdims=True), node.shape)
            case "scale" if not held[1].any():
                mine = xs[0]
            case "divide" | "square" | "relu":
                mine = xs[0]
            case "view":
                mine = xs[0].reshape(node.shape)
            case "add" | "subtract":
                mine = xs[0] | xs[1]
            case "product":
                mine = xs[0] & xs[1]
            case "contract":
                mine = xs[0] @ xs[1]
            case "move":
                flat = held[0].reshape(-1) != 0
                for to, start, x in zip(held[1::2], held[2::2], xs, strict=True):
                    flat[to] = x.reshape(-1)[start]
                mine = flat.reshape(node.shape)
        found.append(mine)
    return found


def _is_exact(graph: Graph, ref: int, sources: list[set[int]]) -> bool:
    """Return whether a box forward is as good as lines: inputs, constants, one step from an input,
    and functions of one number.
    """
    node = graph.nodes[ref]
    if node.op == "input" or node.fixed or node.op in BENT:
        return True
    return len(node.parents) == 1 and all(
        graph.nodes[p].op == "input" for p in sources[node.parents[0]]
    )


def _limit(graph: Graph, ref: int) -> float | None:
    """Return what the entries of a normalised vector cannot exceed, whatever the vector is.

    `x (s sum x^2 + t)^(-1/2)` with t >= 0 is at most `s^(-1/2)`, and where the entries of x sum to
    zero `((1 - 1/d) / s)^(1/2)`, d their number: then `x_i^2 <= (1 - 1/d) sum x^2`."""
    node = graph.nodes[ref]
    if node.op != "product" or len(node.parents) != 2:
        return None
    root = graph.nodes[node.parents[1]]
    if root.op != "inverse root" or root.constants[2] < 0 or root.constants[0] <= 0:
        return None
    sums = graph.nodes[root.parents[0]]
    squares = graph.nodes[sums.parents[0]] if sums.op == "total" else None
    if squares is None or squares.op != "square" or squares.parents[0] != node.parents[0]:
        return None
    share = 1.0
    if _sums_to_zero(graph.nodes[node.parents[0]]):
        share = float(up(1 - down(1.0 / node.shape[-1])))
    return float(up(np.sqrt(up(share / root.constants[0]))))


def _sums_to_zero(node: Node) -> bool:
    """Return whether an affine map's values sum to zero for every input, exactly: by weights that
    are whole numbers.
    """
    if node.op != "affine":
        return False
    weight, bias = node.constants
    whole = bool((weight == np.floor(weight)).all()) and float(np.abs(weight).sum()) < 2.0**53
    return whole and not weight.sum(0).any() and not bias.any()
