"""From a recorded program to the operations that have bounds.

A value of the program is a `Constant` (known exactly: weights, inputs, masks, indices), a `Node` of
the graph, or a tuple of them. Arithmetic on constants alone that is not exact becomes nodes too,
which depend on no input: they are enclosed in the arithmetic of a level when the graph is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from assay.bounds import operations as ops
from assay.bounds.graph import Graph, Ref
from assay.bounds.operations import Operation
from assay.bounds.rounding import Interval
from assay.bounds.rules import Enclosed, Pick
from assay.errors import InputError

NEVER = -1e30
"""A score at or below this gets no attention: its weight is under exp(-1e29), which outward
rounding covers."""


@dataclass(frozen=True)
class Constant:
    """A tensor whose entries are known exactly."""

    tensor: Tensor


@dataclass(frozen=True)
class Node:
    """A node of the graph; its shape is that of the program's tensor."""

    ref: Ref
    dtype: torch.dtype


Value = Constant | Node


class Undecided:
    """What depends on the region and is no number: a comparison, or which entries are the largest.

    Only the operations in `READS_CHOICES` may read it."""


READS_CHOICES = {"mul", "_to_copy", "gather", "scatter"}
Handler = Callable[..., Any]


class UnsupportedError(Exception):
    """An operation, or a use of it, has no rule; the reason in words."""


@dataclass
class Lowering:
    """The graph under construction.

    fixed: nodes that depend on no input. limits: intervals that hold for a node whatever its inputs
    are. never: where a node's entries stand for scores that get no attention. inverse: for the node
    of a reciprocal root, the node whose mean square is under it."""

    graph: Graph = field(default_factory=Graph)
    fixed: set[Ref] = field(default_factory=set)
    limits: dict[Ref, Interval] = field(default_factory=dict)
    never: dict[Ref, np.ndarray] = field(default_factory=dict)
    origin: dict[Ref, tuple[str, Ref]] = field(default_factory=dict)
    dtypes: set[torch.dtype] = field(default_factory=set)

    def shape(self, x: Node) -> tuple[int, ...]:
        return self.graph.nodes[x.ref].shape

    def input(self, example: Tensor) -> Node:
        return Node(self.graph.input(*example.shape), example.dtype)

    def add(self, operation: Operation, *parents: Node, virtual: bool = False) -> Node:
        """Add an operation on nodes; virtual: float32 executes it only inside a later one."""
        for parent in parents:
            if parent.ref in self.never:
                raise UnsupportedError(
                    f"is applied to masked scores (at or below {NEVER:.0e}), which only a softmax"
                    " may read"
                )
        ref = self.graph.add_node(operation, *(p.ref for p in parents), virtual=virtual)
        if all(p.ref in self.fixed for p in parents):
            self.fixed.add(ref)
        dtype = parents[0].dtype if parents else torch.float64
        self.dtypes |= {dtype}
        return Node(ref, dtype)

    def node(self, x: Value) -> Node:
        """Return a value as a node."""
        if isinstance(x, Node):
            return x
        values = real(x)
        ref = self.graph.add_node(Enclosed(values, values))
        self.fixed.add(ref)
        return Node(ref, x.tensor.dtype)

    def expand(self, x: Value, shape: tuple[int, ...]) -> Node:
        """Return a value as a node broadcast to a shape."""
        found = self.node(x)
        if self.shape(found) == shape:
            return found
        return self.move(lambda y: y.expand(shape), found)

    def move(self, function: Callable[..., Any], *xs: Value) -> Any:
        """Apply a function that only moves entries: it runs on the places of the entries.

        Place 0 is a constant zero, then come the entries of each argument."""
        if all(isinstance(x, Constant) for x in xs):
            return _wrap(function(*(x.tensor for x in xs)))  # type: ignore[union-attr]
        places, begin = [], 1
        for x in xs:
            shape = self.shape(x) if isinstance(x, Node) else tuple(x.tensor.shape)
            count = int(np.prod(shape, dtype=int))
            places.append(torch.arange(begin, begin + count, dtype=torch.float64).reshape(shape))
            begin += count
        found = function(*places)
        if isinstance(found, tuple | list):
            return tuple(self._picked(part, xs) for part in found)
        return self._picked(found, xs)

    def _picked(self, places: Tensor, xs: tuple[Value, ...]) -> Node:
        where = places.numpy().astype(np.intp)
        flat = where.reshape(-1)
        fill, never = np.zeros(flat.shape), np.zeros(flat.shape, bool)
        sources, sizes, parents, begin = [], [], [], 1
        for x in xs:
            shape = self.shape(x) if isinstance(x, Node) else tuple(x.tensor.shape)
            count = int(np.prod(shape, dtype=int))
            to = np.flatnonzero((flat >= begin) & (flat < begin + count))
            start = flat[to] - begin
            if isinstance(x, Node):
                if x.ref in self.never:
                    never[to] = self.never[x.ref].reshape(-1)[start]
                if len(to):
                    sources.append((to, start))
                    sizes.append(count)
                    parents.append(x)
            else:
                taken = x.tensor.detach().double().numpy().reshape(-1)[start]
                never[to] = taken <= NEVER
                fill[to] = np.where(never[to], 0.0, taken)
            begin += count
        if not parents:  # only constants were moved
            return self.node(Constant(torch.from_numpy(fill.reshape(where.shape))))
        operation = Pick(fill.reshape(where.shape), tuple(sources), tuple(sizes))
        ref = self.graph.add_node(operation, *(p.ref for p in parents))
        if all(p.ref in self.fixed for p in parents):
            self.fixed.add(ref)
        if never.any():
            self.never[ref] = never.reshape(where.shape)
        if operation.plain and parents[0].ref in self.limits:
            old = self.limits[parents[0].ref]
            self.limits[ref] = Interval(old.lo.reshape(where.shape), old.hi.reshape(where.shape))
        if len(parents) == 1 and parents[0].ref in self.origin:
            self.origin[ref] = self.origin[parents[0].ref]
        return Node(ref, parents[0].dtype)

    def matrix(self, linear: Callable[[Tensor], Tensor], x: Node, zero: Tensor) -> Node:
        """Apply a function that is linear in x, and add its value at zero: its exact coefficients
        are found by probing it with unit vectors in float64.
        """
        shape = self.shape(x)
        size = int(np.prod(shape, dtype=int))
        if size * zero.numel() > 1 << 26:
            raise UnsupportedError(
                f"is a matrix of {zero.numel()} x {size} numbers, more than bounds can hold"
            )
        columns = torch.empty(size, zero.numel(), dtype=torch.float64)
        unit = torch.zeros(size, dtype=torch.float64)
        for place in range(size):
            unit[place] = 1.0
            columns[place] = linear(unit.reshape(shape)).reshape(-1)
            unit[place] = 0.0
        flat = self.move(lambda y: y.reshape(-1), x)
        done = self.add(ops.Affine(columns.T.numpy(), zero.reshape(-1).numpy()), flat)
        return self.move(lambda y: y.reshape(zero.shape), done)


def real(x: Constant) -> np.ndarray:
    """Return a constant's entries as float64; raises UnsupportedError for those that are not
    finite.
    """
    values = x.tensor.detach().cpu().double().numpy()
    if not np.all(np.isfinite(values)):
        raise UnsupportedError("reads a constant that is NaN or infinite")
    return values


def _wrap(found: Any) -> Any:
    if isinstance(found, Tensor):
        return Constant(found)
    return tuple(_wrap(entry) for entry in found)


def lower(
    module: fx.GraphModule, examples: tuple[Tensor, ...], handlers: dict[str, Handler], exact: Any
) -> tuple[Lowering, Node]:
    """Return the graph of a recorded program, and its output node.

    Raises `_Refused` with the operation that has no rule."""
    lowering, values = Lowering(), dict[fx.Node, Any]()
    given = iter(examples)

    def argument(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return values[x]
        if isinstance(x, list | tuple):
            return type(x)(argument(entry) for entry in x)
        return x

    for node in module.graph.nodes:
        match node.op:
            case "placeholder":
                values[node] = lowering.input(next(given))
            case "get_attr":
                values[node] = Constant(getattr(module, node.target))
            case "output":
                (found,) = node.args
                value = values[found]
                if not isinstance(value, Node) or value.ref in lowering.fixed:
                    raise InputError("trace: the function depends on none of its inputs")
                if value.ref in lowering.never:
                    reason = f"gives masked scores (at or below {NEVER:.0e}) as the value"
                    raise RefusedError(found.target, reason)
                return lowering, value
            case _:
                args = [argument(entry) for entry in node.args]
                kwargs = {key: argument(entry) for key, entry in node.kwargs.items()}
                try:
                    values[node] = _apply(lowering, node, args, kwargs, handlers, exact)
                except UnsupportedError as error:
                    raise RefusedError(node.target, str(error)) from error
                seen = node.meta.get("val")
                if _holds(values[node]) and isinstance(seen, Tensor):
                    lowering.dtypes |= {seen.dtype} if seen.dtype.is_floating_point else set()
    raise InputError("trace: the program has no output")


class RefusedError(Exception):
    """An operation of the program has no rule."""

    def __init__(self, target: Any, reason: str) -> None:
        super().__init__(reason)
        self.target, self.reason = target, reason


def _apply(
    lowering: Lowering,
    node: fx.Node,
    args: list[Any],
    kwargs: dict[str, Any],
    handlers: dict[str, Handler],
    exact: Any,
) -> Any:
    import operator

    if node.target is operator.getitem:
        return args[0][args[1]]
    if not isinstance(node.target, torch._ops.OpOverload):
        raise UnsupportedError("is no ATen operation")
    if not _holds(args) and not _holds(list(kwargs.values())):
        folded = exact(node.target, args, kwargs)
        if folded is not None:
            return _wrap(folded)
        args = _first_as_node(lowering, args)
    name = node.target._schema.name.partition("::")[2]
    if name.endswith("_") and name.rstrip("_") in handlers:
        # In place, on a value that nothing else reads: the same as the plain operation.
        changed, name = node.args[0], name[:-1]
        assert isinstance(changed, fx.Node)
        if list(changed.users) != [node] or changed.op != "call_function" or _views(changed):
            raise UnsupportedError("changes a value in place that is read elsewhere")
    if name not in READS_CHOICES and _holds([*args, *kwargs.values()], Undecided):
        raise UnsupportedError(
            "reads a comparison, or a choice of the largest, of numbers that depend on the region;"
            " a rule is known where they keep numbers or put them to zero"
        )
    handler = handlers.get(name)
    if handler is None:
        raise UnsupportedError("has no bound")
    return handler(lowering, node.target, *args, **kwargs)


def _first_as_node(lowering: Lowering, args: list[Any]) -> list[Any]:
    """Return arguments that depend on no input as a rule takes them: with a node to work on."""
    for place, x in enumerate(args):
        if isinstance(x, Constant) and x.tensor.is_floating_point():
            return [*args[:place], lowering.node(x), *args[place + 1 :]]
    return args


def _views(node: fx.Node) -> bool:
    """Return whether the operation's result shares memory with what it reads."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(entry.alias_info is not None for entry in schema.returns)


def _holds(x: Any, kinds: Any = Node | Undecided) -> bool:
    if isinstance(x, kinds):
        return True
    return isinstance(x, list | tuple) and any(_holds(entry, kinds) for entry in x)
