"""The claims of a certificate of gates: what they say, and whether the leaves prove them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from assay_check.gates.arithmetic import Array, Box, down, up
from assay_check.gates.derivative import Derivatives
from assay_check.gates.graph import FLOATS, Graph, read_graph
from assay_check.gates.rules import NONLINEAR, NoBoundError, Slopes
from assay_check.gates.smooth import FUNCTIONS
from assay_check.gates.sweep import Sweep
from assay_check.gates.tree import leaves
from assay_check.reading import need

Held = Mapping[str, Array]
OVER = "damage over inputs"
UNSAFE = "unsafe"
KINDS = ("damage", OVER, "same-answer", UNSAFE)
LOWER = ("same-answer", UNSAFE)
"""Claims whose number is a lower bound."""
KNOWN = {*FLOATS, "move"}
FIELDS = {"graph", "kinds", "low", "high", "point", "sign", "goals"}
MOVING = ("gates", "references", "inputs")
TREE = ("tree", "values", "pins")
PHASES = ("boxes", "rows")
NUMBER = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,40})?(e[+-]?[0-9]{1,3})?", re.ASCII)


@dataclass(frozen=True)
class Goal:
    """A row of the value whose least over the region is bounded: a tree of splits and faces, with
    slopes stacked over its leaves, (leaves, *shape), for the boxes of nodes and for the row.
    """

    row: Array
    places: Array
    values: Array
    pins: Array
    slopes: tuple[dict[int, Slopes], dict[int, Slopes]]


@dataclass(frozen=True)
class Example:
    """One example: its graph, the boxes of its gates, and the goals that make the claim."""

    name: str
    graph: Graph
    kinds: tuple[str, ...]
    region: tuple[Box, ...]
    point: tuple[Array, ...]
    sign: float
    goals: tuple[Goal, ...]
    groups: tuple[tuple[int, ...], ...] = ()

    def free(self, kind: str) -> tuple[int, int]:
        """How many entries of a kind move, of how many."""
        boxes = [box for box, k in zip(self.region, self.kinds, strict=True) if k == kind]
        return sum(int((b.lo < b.hi).sum()) for b in boxes), sum(b.lo.size for b in boxes)


def read_example(name: str, entry: Any, held: Held, kind: str) -> Example:
    """Read the claim about one example; InputError for anything but what the format says."""
    fields = FIELDS | ({"groups"} if kind == UNSAFE else set())
    need(
        isinstance(entry, dict) and entry.keys() == fields,
        f"example {name!r} must have the fields {sorted(fields)}",
    )
    graph = read_graph(entry["graph"], dict(held))
    shapes = [graph.nodes[ref].shape for ref in graph.inputs]
    low, high, point = (_points(entry[key], held, shapes, key) for key in ("low", "high", "point"))
    kinds = entry["kinds"]
    need(
        isinstance(kinds, list) and len(kinds) == len(shapes) and all(k in MOVING for k in kinds),
        f"example {name!r}: each of {len(shapes)} inputs must be one of {MOVING}",
    )
    need(
        all((a <= b).all() for a, b in zip(low, high, strict=True)),
        f"example {name!r}: a lower end of the region exceeds its upper end",
    )
    inside = all(((a <= p) & (p <= b)).all() for a, p, b in zip(low, point, high, strict=True))
    need(inside, f"example {name!r}: the untouched network lies outside the region")
    ones = all((p == 1).all() for p, k in zip(point, kinds, strict=True) if k == "gates")
    need(ones, f"example {name!r}: the untouched gates must be one")
    need(kind != "damage" or "inputs" not in kinds, f"example {name!r}: its inputs move")
    sign = entry["sign"]
    need(type(sign) is int and sign in (1, -1), f"example {name!r}: sign must be 1 or -1")
    need(kind != UNSAFE or set(kinds) == {"inputs"}, f"example {name!r}: inputs alone move")
    need(kind == "damage" or sign == 1, f"example {name!r}: {kind} has the sign 1")
    region = tuple(Box(a, b) for a, b in zip(low, high, strict=True))
    goals = _goals(name, entry["goals"], graph, held, kind, float(sign))
    groups = _groups(name, entry["groups"], graph) if kind == UNSAFE else ()
    return Example(name, graph, tuple(kinds), region, tuple(point), float(sign), goals, groups)


def _groups(name: str, entry: Any, graph: Graph) -> tuple[tuple[int, ...], ...]:
    """Read the conjunctions of an unsafe set: every number of the value is in one or more."""
    good = isinstance(entry, list) and entry and all(isinstance(g, list) and g for g in entry)
    places = [place for group in entry for place in group] if good else []
    size = int(np.prod(graph.nodes[-1].shape))
    need(
        good and all(type(p) is int for p in places) and set(places) == set(range(size)),
        f"example {name!r}: groups must hold each of {size} numbers",
    )
    return tuple(tuple(group) for group in entry)


def _points(entry: Any, held: Held, shapes: list[tuple[int, ...]], what: str) -> list[Array]:
    found = _named(entry, held, what)
    fits = len(found) == len(shapes) and all(
        x.dtype == np.float64 and x.shape == shape and np.isfinite(x).all()
        for x, shape in zip(found, shapes, strict=True)
    )
    need(fits, f"{what} must have finite float64 numbers of the shapes {shapes}")
    return found


def _named(entry: Any, held: Held, what: str) -> list[Array]:
    good = isinstance(entry, list) and all(isinstance(n, str) and n in held for n in entry)
    need(good, f"{what} must name tensors of the advice")
    return [held[n] for n in entry]


def _goals(
    name: str, entry: Any, graph: Graph, held: Held, kind: str, sign: float
) -> tuple[Goal, ...]:
    shape = graph.nodes[-1].shape
    size = int(np.prod(shape))
    need(kind in LOWER or size == 1, f"example {name!r}: the metric must be one number")
    count = 1 if kind == UNSAFE else size
    need(
        isinstance(entry, list) and len(entry) == count,
        f"example {name!r}: {count} goals are needed, for a value of {size} numbers",
    )
    goals = []
    for place, given in enumerate(entry):
        need(
            isinstance(given, dict) and given.keys() == {*TREE, *PHASES},
            f"example {name!r}: goal {place} must have {', '.join((*TREE, *PHASES))}",
        )
        tree, values, pins = _named([given[key] for key in TREE], held, "a tree")
        # A face is the least place of one row, and means nothing to several.
        need(kind != UNSAFE or not len(pins), f"example {name!r}: an unsafe set has no faces")
        row = np.zeros(size)
        row[place] = sign
        slopes = tuple(_slopes(given[phase], held, graph) for phase in PHASES)
        goals.append(Goal(row.reshape(shape), tree, values, pins, (slopes[0], slopes[1])))
    return tuple(goals)


def _slopes(entry: Any, held: Held, graph: Graph) -> dict[int, Slopes]:
    need(isinstance(entry, dict), "slopes are given by operation")
    found: dict[int, Slopes] = {}
    for key, names in entry.items():
        good = key.isdigit() and len(key) < 8 and int(key) < len(graph.nodes)
        need(
            good and graph.nodes[int(key)].op in NONLINEAR,
            f"slopes of operation {key!r}, which takes none",
        )
        found[int(key)] = tuple(_named(names, held, "slopes"))
    return found


def unknown_operations(examples: list[Example]) -> dict[str, int]:
    """Return the operations that the checker has no rule for, with how many nodes each has."""
    found: dict[str, int] = {}
    for example in examples:
        names = example.graph.unknown(KNOWN)
        for node in example.graph.nodes:
            if node.op == "smooth" and node.name not in FUNCTIONS:
                names[node.name] = names.get(node.name, 0) + 1
        for name, count in names.items():
            found[name] = found.get(name, 0) + count
    return dict(sorted(found.items()))


def recompute(example: Example, kind: str) -> float:
    """Return what the leaves prove: an upper bound of the damage, or a lower bound of the least
    margin; infinite where they prove nothing.
    """
    if kind == UNSAFE:
        return _apart(example)
    least = min(_least(example, goal) for goal in example.goals)
    if kind == "same-answer":
        return least
    try:
        at = Sweep(example.graph, [Box(p, p) for p in example.point], {}, tight=False)
        row = np.ones(example.graph.nodes[-1].shape)
        low, high = at.bound(row, {}), -at.bound(-row, {})
    except NoBoundError:
        return np.inf
    if kind == OVER:  # the value is a difference, and none where nothing is switched off
        near = 1e-6 * (1 + max(float(x.size().max()) for x in at.values))
        return max(-least, 0.0) if -near <= low <= high <= near else np.inf
    top = high if example.sign > 0 else -low
    return max(float(up(top - least)), 0.0) if np.isfinite(top) else np.inf


def _least(example: Example, goal: Goal) -> float:
    """Return the least bound of a row over the leaves; every leaf is read, whatever its bound."""
    found = np.inf
    for box, boxes, rows in _leaves(example, goal):
        try:
            bound = Sweep(example.graph, box, boxes).bound(goal.row, rows)
        except NoBoundError:
            bound = -np.inf
        found = min(found, bound if bound == bound else -np.inf)
    return float(found)


def _apart(example: Example) -> float:
    """Return how far the value stays from an unsafe set: on every leaf one number of each
    conjunction is at least this.
    """
    (goal,), found = example.goals, np.inf
    size = goal.row.size
    for box, boxes, rows in _leaves(example, goal):
        try:
            known = Sweep(example.graph, box, boxes)
            bounds = [known.bound(one.reshape(goal.row.shape), rows) for one in np.eye(size)]
        except NoBoundError:
            bounds = [-np.inf] * size
        bounds = [bound if bound == bound else -np.inf for bound in bounds]
        found = min(found, *(max(bounds[place] for place in group) for group in example.groups))
    return float(found)


def _leaves(
    example: Example, goal: Goal
) -> Iterator[tuple[list[Box], dict[int, Slopes], dict[int, Slopes]]]:
    count = int((goal.places[:, 0] == -1).sum()) if goal.places.ndim == 2 else 0
    for phase in goal.slopes:
        for each in phase.values():
            need(
                all(s.ndim and len(s) == count for s in each),
                f"slopes are given for each of {count} leaves",
            )
    slopes_over = _Slopes(example.graph, goal.row)
    tree = leaves(example.region, goal.places, goal.values, goal.pins, slopes_over)
    for index, box in enumerate(tree):
        one, other = (
            {ref: tuple(s[index] for s in each) for ref, each in phase.items()}
            for phase in goal.slopes
        )
        yield box, one, other


class _Slopes:
    """The derivatives of a row over boxes; the graph of derivatives is made when first asked."""

    def __init__(self, graph: Graph, row: Array) -> None:
        self._given = graph, row
        self._made: Derivatives | None = None

    def __call__(self, box: list[Box]) -> list[Box] | None:
        if self._made is None:
            self._made = Derivatives(*self._given)
        return self._made.boxes(box)


def read_number(text: Any, name: str) -> Fraction:
    """Read a claimed number, an exact decimal."""
    plain = isinstance(text, str) and NUMBER.fullmatch(text)
    need(plain, f"claim {name!r} must be a decimal number, got {ascii(text)[:60]}")
    return Fraction(text)


def supports(kind: str, found: float, claimed: Fraction) -> bool:
    """Return whether a recomputed bound supports a claimed one."""
    if not np.isfinite(found):
        return False
    return Fraction(found) >= claimed if kind in LOWER else Fraction(found) <= claimed


def rounded(kind: str, found: float) -> float:
    """Return a number that stays supported where sums are formed in another order."""
    slack = 1e-11 * (1 + abs(found))
    return float(down(found - slack)) if kind in LOWER else float(up(found + slack))
