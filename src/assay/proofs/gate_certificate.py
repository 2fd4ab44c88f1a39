"""Certificates of what free gates can do: the traced graph, the region, the tree of splits and the
slopes of every leaf, for a checker that shares no code with the prover.

The envelope is that of `assay.proofs.certificate`, with the task "gates", and of its own

    about     claim ("damage", "damage over inputs", "same-answer" or "unsafe"), metric (a label),
              left_out (examples that have no bound, or in which nothing moves)
    examples  by number: graph (operations with the names of their constants), kinds ("gates",
              "references" or "inputs", for each input of the graph), their low and high, the point
              of the untouched network, sign (1 where a higher metric is right), goals (a tree of
              splits and faces, and the slopes over its leaves, one for each number of the value)

The claim "unsafe" (`assay.proofs.unsafe_certificate`) has `groups` beside these, and one goal,
whose tree is one for all numbers of the value.

model holds the digests of the graphs and of the constants, and which constants are weights: those
must be tensors of a file of weights that the checker is given. Slopes are stored in float32, since
any slope is sound. A claim is the bound that was proved, or the one that the checker finds, where
its rules are weaker."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from assay.bounds import nonlinear
from assay.bounds import operations as ops
from assay.bounds.graph import Node, Ref
from assay.bounds.rules import (
    Contract,
    Divide,
    Enclosed,
    Jump,
    Largest,
    Open,
    Pick,
    Product,
    Shift,
    Smooth,
    Total,
)
from assay.bounds.search.leaves import Found, Leaf, slopes_of
from assay.bounds.search.pins import Pinned
from assay.bounds.search.twin import Twin
from assay.bounds.trace import Traced
from assay.errors import AssayError, InputError
from assay.proofs.certificate import Certificate, check_destination, write
from assay.proofs.problem import Problem
from assay_check.gates import RULE, constants_digest, graphs_digest
from assay_check.gates.claims import (
    LOWER,
    UNSAFE,
    read_example,
    recompute,
    rounded,
    unknown_operations,
)

MANY = 16  # leaves whose slopes are worked out at once


@dataclass(frozen=True)
class Evidence:
    """What proves the bracket of one example: the traced function with its problem, and for each
    number of the value the leaves.

    number: of the example. proved: the bound. groups: of an unsafe set, the conjunctions."""

    number: int
    traced: Traced
    problem: Problem
    found: tuple[Found, ...]
    proved: float
    groups: tuple[tuple[int, ...], ...] = ()


def require_writable(path: Path | str, level: str) -> None:
    """Raise InputError, before any work, for another level than the checker's, and as
    `check_destination` does.
    """
    check_destination(path)
    if level != "real":
        raise InputError(f"certificate: the checker has rules for level real, got level {level!r}")


def write_gates(
    path: Path | str,
    evidence: Iterable[Evidence],
    *,
    claim: str,
    metric: str,
    model: nn.Module,
    examples: int,
    inputs: Iterable[Path | str] = (),
) -> Path:
    """Write the certificate of brackets at level real, and return its path.

    Raises InputError as `check_destination` does, and where no example has a bound or nothing moves
    in any."""
    path = check_destination(path, inputs)
    held = _Held(model)
    entries, claims = dict[str, Any](), dict[str, str]()
    for one in evidence:
        if np.isfinite(one.proved) and all(found.leaves for found in one.found):
            entries[str(one.number)] = _example(one, held, claim)
    if not entries:
        raise InputError(
            "certificate: no example has a finite bound of gates that move; give a larger budget,"
            " or free other gates"
        )
    for one in evidence:
        name = str(one.number)
        if name in entries:
            claims[name] = repr(_claimed(one, entries[name], held.tensors, claim))
    certificate = Certificate(
        task="gates",
        model={
            "graph": graphs_digest(entries),
            "constants": constants_digest(held.tensors),
            "weights": sorted(held.weights),
        },
        strategy="linear bounds with optimised slopes, boxes split worst first",
        rule=RULE,
        level="real",
        claim=claims,
        advice=held.tensors,
        own={
            "about": {"claim": claim, "metric": metric, "left_out": examples - len(entries)},
            "examples": entries,
        },
    )
    return write(path, certificate, inputs)


def _claimed(one: Evidence, entry: Any, held: Mapping[str, np.ndarray], claim: str) -> float:
    """Return what the checker supports: the proved bound, or its own where that is weaker."""
    example = read_example(str(one.number), entry, held, claim)
    if unknown_operations([example]):
        return one.proved
    with np.errstate(all="ignore"):
        found = recompute(example, claim)
    if claim == UNSAFE and not found > 0:
        raise AssayError(
            "certificate: the property holds, but the checker's rules are too weak to show it; no"
            " certificate was written"
        )
    found = rounded(claim, found)
    weaker = min if claim in LOWER else max
    found = weaker(found, one.proved)
    return found if np.isfinite(found) else one.proved


class _Held:
    """The tensors of the advice: constants by content, each once."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, np.ndarray] = {}
        self.weights: set[str] = set()
        self._names: dict[Any, str] = {}
        self._known = set()
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                plain = tensor.detach().cpu().double()
                for form in (plain, plain.permute(*range(plain.ndim - 1, -1, -1))):
                    self._known.add(_content(form.numpy()))

    def constant(self, x: np.ndarray) -> str:
        x = np.ascontiguousarray(x).reshape(np.shape(x))
        key = (x.dtype.str, x.shape, hashlib.sha256(x.tobytes()).digest())
        if key not in self._names:
            self._names[key] = f"constant.{len(self._names)}"
            self.tensors[self._names[key]] = x
            if x.dtype == np.float64 and x.size > 1 and _content(x) in self._known:
                self.weights.add(self._names[key])
        return self._names[key]

    def add(self, name: str, x: np.ndarray) -> str:
        self.tensors[name] = np.ascontiguousarray(x).reshape(np.shape(x))
        return name


def _content(x: np.ndarray) -> tuple[int, bytes]:
    return x.size, hashlib.sha256(np.ascontiguousarray(x).tobytes()).digest()


def _example(one: Evidence, held: _Held, claim: str) -> dict[str, Any]:
    source, place = one.traced.lowering.graph.nodes, one.traced.at("float64").place
    needed = _needed(source, one.traced.output) | set(one.traced.lowering.graph.inputs)
    number = {ref: index for index, ref in enumerate(sorted(needed))}
    graph = [_operation(source[ref], number, held) for ref in sorted(needed)]
    back = {new: number[old] for old, new in place.items()}
    ends = {
        key: [
            held.add(f"{one.number}.{key}.{index}", x.detach().cpu().double().numpy())
            for index, x in enumerate(points)
        ]
        for key, points in (
            ("low", one.problem.lows),
            ("high", one.problem.highs),
            ("point", one.problem.point),
        )
    }
    twin = Twin(one.traced.at("float64"))
    goals = [
        _goal(f"{one.number}.{place_}", found, twin, back, held)
        for place_, found in enumerate(one.found)
    ]
    kinds, sign = list(one.problem.kinds), int(one.problem.sign)
    groups = {"groups": [list(group) for group in one.groups]} if one.groups else {}
    return {"graph": graph, "kinds": kinds, **ends, "sign": sign, "goals": goals, **groups}


def _needed(nodes: list[Node], output: Ref) -> set[Ref]:
    needed, stack = set[Ref](), [output]
    while stack:
        ref = stack.pop()
        if ref not in needed:
            needed.add(ref)
            stack += nodes[ref].parents
    return needed


def _operation(node: Node, number: Mapping[Ref, int], held: _Held) -> dict[str, Any]:
    """Return the plain form of an operation; one that the checker does not know keeps its name."""
    op, name, constants = _described(node)
    return {
        "op": op,
        "name": name,
        "parents": [number[p] for p in node.parents],
        "shape": list(node.shape),
        "holds": [held.constant(x) for x in constants],
    }


def _described(node: Node) -> tuple[str, str, list[np.ndarray]]:
    operation: Any = node.operation
    match operation:
        case None:
            return "input", "", []
        case Total():
            return "total", "", []
        case ops.Affine():
            return "affine", "", [operation.weight, operation.bias]
        case ops.Scale():
            return "scale", "", [operation.weight, operation.bias]
        case Shift():
            return "shift", "", [operation.bias]
        case Divide():
            return "divide", "", [operation.divisor]
        case ops.Add():
            return ("add" if operation.sign > 0 else "subtract"), "", []
        case Enclosed() if np.array_equal(operation.lo, operation.hi):
            return "constant", "", [operation.lo]
        case Pick():
            if operation.plain:
                return "view", "", []
            flat = [i.astype(np.int32) for pair in operation.sources for i in pair]
            return "move", "", [operation.fill, *flat]
        case Product():
            return "product", "", []
        case Contract():
            return "contract", "", []
        case nonlinear.Relu():
            return "relu", "", []
        case nonlinear.Square():
            return "square", "", []
        case nonlinear.InverseRoot():
            ends = (operation.scale.lo, operation.scale.hi, operation.shift.lo, operation.shift.hi)
            return "inverse root", "", [np.asarray(end, np.float64).reshape(()) for end in ends]
        case nonlinear.Softmax():
            return "softmax", "", [operation.mask]
        case Smooth():
            return "smooth", operation.name, []
        case Jump():
            return "jump", "", [operation.theta]
        case Largest():
            return "largest", "", [np.asarray(float(operation.count))]
        case Open():
            return "open", "", []
        case _:
            return "other", getattr(operation, "name", type(operation).__name__.lower()), []


def _goal(
    name: str, found: Found, twin: Twin, back: Mapping[Ref, int], held: _Held
) -> dict[str, Any]:
    """Return a tree of splits and faces in preorder, and the slopes over its leaves in that
    order.
    """
    places, values, pins, order = [], [], list[tuple[int, int, int]](), list[Leaf]()

    def walk(leaves: list[Leaf], depth: int) -> None:
        if len(leaves) == 1 and len(leaves[0].path) == depth:
            places.append((-1, -1))
            values.append(0.0)
            order.append(leaves[0])
            return
        step = leaves[0].path[depth]
        if isinstance(step, Pinned):  # of all leaves below the same box
            places.append((-2, len(step.ends)))
            values.append(0.0)
            pins.extend(step.ends)
            walk(leaves, depth + 1)
            return
        places.append((step.which, step.place))
        values.append(step.value)
        for side in (0, 1):
            half = replace(step, side=side)
            walk([leaf for leaf in leaves if leaf.path[depth] == half], depth + 1)

    walk(found.leaves, 0)
    stacked: list[dict[Ref, list[list[np.ndarray]]]] = [{}, {}]
    for start in range(0, len(order), MANY):
        part = order[start : start + MANY]
        if not part[0].after:
            break
        for mine, slopes in zip(stacked, slopes_of(twin, part), strict=True):
            for ref, each in slopes.items():
                parts = mine.setdefault(ref, [[] for _ in each])
                for stack, x in zip(parts, each, strict=True):
                    full = np.broadcast_to(x, (len(part), *x.shape[1:]))
                    stack.append(full.astype(np.float32))
    entry: dict[str, Any] = {
        "tree": held.add(f"{name}.tree", np.array(places, np.int64).reshape(-1, 2)),
        "values": held.add(f"{name}.values", np.array(values, np.float64)),
        "pins": held.add(f"{name}.pins", np.array(pins, np.int64).reshape(-1, 3)),
    }
    for phase, mine in zip(("boxes", "rows"), stacked, strict=True):
        entry[phase] = {
            str(back[ref]): [
                held.add(f"{name}.{phase}.{back[ref]}.{index}", np.concatenate(parts))
                for index, parts in enumerate(each)
            ]
            for ref, each in mine.items()
        }
    return entry
