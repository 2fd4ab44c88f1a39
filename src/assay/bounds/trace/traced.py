"""A function as a graph that can be bounded, with what is known of it at every level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.bounds.graph import Graph, Node, Ref
from assay.bounds.levels import Arithmetic, arithmetic
from assay.bounds.operations import Affine, Operation, Scale
from assay.bounds.rounding import Array, Interval, add_up, sub_down
from assay.bounds.rules import Divide, Enclosed, Shift
from assay.bounds.trace.constants import fold
from assay.bounds.trace.handlers import HANDLERS
from assay.bounds.trace.lower import Lowering, RefusedError, lower
from assay.bounds.trace.record import Program, check, record, refusal, require_value
from assay.errors import AssayError


@dataclass(frozen=True)
class LevelGraph:
    """A graph at one level: what depends on no input is enclosed in the level's arithmetic.

    limits: intervals of nodes that hold for every input. place: where the nodes of the recorded
    graph went. The graph is complete: what follows from it alone is worked out `once`."""

    graph: Graph
    limits: dict[Ref, Interval]
    level: str
    place: dict[Ref, Ref] = field(default_factory=dict)
    _made: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what `make` gives, made when first asked for under this name."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


@dataclass(frozen=True)
class Traced:
    """A function's graph: `at(level)` gives it in the arithmetic of a level.

    `program` runs the recorded operations themselves."""

    program: Program
    lowering: Lowering
    output: Ref
    _levels: dict[str, LevelGraph] = field(default_factory=dict, repr=False, compare=False)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the inputs."""
        return [tuple(example.shape) for example in self.program.examples]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the value of the function itself, not of the trace."""
        with torch.no_grad():
            return self.program.function(*inputs)

    def at(self, level: str) -> LevelGraph:
        """Return the graph at a level.

        Raises `InputError` on an unknown level, and `AssayError` where level float32 does not cover
        how the function is executed."""
        if level not in self._levels:
            ar = arithmetic(level)
            if ar.executed and self.lowering.dtypes - {torch.float32}:
                others = sorted(map(str, self.lowering.dtypes - {torch.float32}))
                raise AssayError(
                    f"level float32: the function computes in {', '.join(others)} too; use level"
                    " real"
                )
            with np.errstate(all="ignore"):
                self._levels[level] = _fold(self.lowering, self.output, ar)
        return self._levels[level]


def trace(
    function: Callable[..., Tensor],
    *examples: Tensor,
    regions: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> Traced:
    """Return the graph of a plain function of tensors, from one run of it on the examples.

    Every ATen operation must have a rule, or be independent of the inputs. Constants are copied.
    The recorded operations are compared with the function, bit for bit, at points of the regions
    (by default at the examples alone), and the bounds at the examples with the value there.

    Raises `InputError` naming the operation, and the module it is in, that has no rule or that
    differs at another point."""
    program = record(function, *examples)
    check(program, regions or [(e, e) for e in program.examples])
    try:
        lowering, output = lower(program.module, program.examples, HANDLERS, fold)
    except RefusedError as error:
        raise refusal(function, program.examples, error.target, _advised(error)) from error
    _drop_unused(lowering, output.ref)
    found = Traced(program, lowering, output.ref)
    at = found.at("float64")
    with np.errstate(all="ignore"):
        value = evaluate(at, [Interval.exactly(e.double().numpy()[None]) for e in program.examples])
    require_value(value.midpoint(), program(*program.examples), lowering.dtypes)
    return found


def _advised(error: RefusedError) -> str:
    if "attention" in str(error.target):
        return f"{error.reason}; load the model with attn_implementation='eager'"
    return error.reason


def evaluate(at: LevelGraph, boxes: Sequence[Interval]) -> Interval:
    """Return the interval of the output over boxes (samples, *shape), one per input."""
    ar, values = arithmetic(at.level), list[Interval]()
    given = dict(zip(at.graph.inputs, boxes, strict=True))
    for ref, node in enumerate(at.graph.nodes):
        values.append(given[ref] if node.operation is None else _step(node, values, ar))
        if ref in at.limits:
            values[ref] = values[ref].meet(at.limits[ref])
    return values[-1]


def _step(node: Node, values: list[Any], ar: Arithmetic) -> Interval:
    assert node.operation is not None
    xs = [values[p] for p in node.parents]
    value = node.operation.interval(xs, ar)
    if ar.executed and not node.virtual:
        error = node.operation.error(xs, value)
        value = Interval(sub_down(value.lo, error), add_up(value.hi, error))
    return value


def _drop_unused(lowering: Lowering, output: Ref) -> None:
    """Forget the limits of nodes that the output does not need."""
    used, stack = set[Ref](), [output]
    while stack:
        ref = stack.pop()
        if ref not in used:
            used.add(ref)
            stack += lowering.graph.nodes[ref].parents
    lowering.fixed -= {ref for ref in lowering.fixed if ref not in used}
    lowering.limits = {ref: limit for ref, limit in lowering.limits.items() if ref in used}


def _fold(lowering: Lowering, output: Ref, ar: Arithmetic) -> LevelGraph:
    """Return the nodes that the output needs, with those that depend on no input as enclosures."""
    source = lowering.graph
    needed, stack = set[Ref](), [output]
    while stack:
        ref = stack.pop()
        if ref not in needed:
            needed.add(ref)
            stack += source.nodes[ref].parents
    values = dict[Ref, Interval]()
    for ref in sorted(needed & lowering.fixed):
        node = source.nodes[ref]
        if ar.executed and node.operation is not None:
            node = replace(node, operation=_as_executed(node.operation))
        values[ref] = _step(node, values, ar)  # type: ignore[arg-type]
        if ref in lowering.limits and not ar.executed:
            values[ref] = values[ref].meet(lowering.limits[ref])
    graph, place, limits = Graph(), dict[Ref, Ref](), dict[Ref, Interval]()
    # Inputs come first: the engine reads the number of samples off the first node.
    for ref in source.inputs:
        place[ref] = graph.input(*source.nodes[ref].shape)
    read = {p for ref in needed - lowering.fixed for p in source.nodes[ref].parents}
    joined = {} if ar.executed else _joined(lowering, needed)
    inner = {source.nodes[ref].parents[0] for ref in joined}
    for ref in sorted(needed):
        node = source.nodes[ref]
        if node.operation is None or ref in inner or (ref in lowering.fixed and ref not in read):
            continue
        if ref in lowering.fixed:
            place[ref] = graph.add_node(_enclosed(values[ref]))
            continue
        operation = _as_executed(node.operation) if ar.executed else node.operation
        parents = [place[p] for p in node.parents if p in place]
        if ref in joined:
            operation = joined[ref]
            parents = [place[p] for p in source.nodes[node.parents[0]].parents]
        place[ref] = graph.add_node(operation, *parents, virtual=node.virtual)
        if ref in lowering.limits and not ar.executed:  # rounding may pass a limit
            old = lowering.limits[ref]
            limits[place[ref]] = Interval(old.lo[None], old.hi[None])
    return LevelGraph(graph, limits, ar.level, place)


def _joined(lowering: Lowering, needed: set[Ref]) -> dict[Ref, Affine]:
    """Return the shifts that are the bias of an affine map without one, which nothing else reads,
    as that map with its bias: in real arithmetic both are one operation.
    """
    nodes, readers = lowering.graph.nodes, dict[Ref, list[Ref]]()
    for ref in needed:
        for parent in nodes[ref].parents:
            readers.setdefault(parent, []).append(ref)
    found = {}
    for ref in needed - lowering.fixed:
        node = nodes[ref]
        if not isinstance(node.operation, Shift):
            continue
        (inner,) = node.parents
        operation, bias = nodes[inner].operation, node.operation.bias
        along = bias.ndim and bias.size == bias.shape[-1] == node.shape[-1]
        if not (isinstance(operation, Affine) and along) or operation.bias.any():
            continue
        if readers[inner] == [ref] and not {ref, inner} & lowering.limits.keys():
            found[ref] = replace(operation, bias=bias.reshape(-1))
    return found


def _as_executed(operation: Operation) -> Operation:
    """Return an operation with its scalars rounded to float32, as float32 executes them."""

    def near(x: Array) -> Array:
        return x.astype(np.float32).astype(np.float64)

    match operation:
        case Shift():
            return Shift(near(operation.bias))
        case Divide():
            return Divide(near(operation.divisor))
        case Scale():
            return replace(operation, weight=near(operation.weight), bias=near(operation.bias))
        case _:
            return operation


def _enclosed(x: Interval) -> Enclosed:
    lo: Array = x.lo[0]
    hi: Array = x.hi[0]
    return Enclosed(lo, hi)
