"""The same bounds in torch at level float64, differentiable in the slopes and in the ends of the
boxes: what the search for tight bounds descends on. Nothing here is a proof.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from assay.bounds import nonlinear
from assay.bounds.engine import ROWS, Late, never
from assay.bounds.graph import Ref
from assay.bounds.search.node_rules import NodeRules, Parameters
from assay.bounds.search.ranges import (
    Ends,
    Relaxed,
    as_interval,
    least_product,
    meet,
    tensor,
    usual_slope,
)
from assay.bounds.search.sweep import readers, worth
from assay.bounds.trace.traced import LevelGraph
from assay.errors import AssayError
from assay.memory import available

SAVED = 4
"""Tensors that a gradient keeps of every node, for each row that is carried through it."""

ROOM = 1 << 30
"""Bytes that what gradients keep of a sweep's rows may take; more is worked out twice."""


@dataclass
class State:
    """Ends of every node, and the relaxations that were worked out from them."""

    values: list[Ends]
    relaxed: dict[Ref, Relaxed]
    saved: int = 0  # bytes that gradients keep of its rows


class Twin:
    """A graph at level float64 in torch."""

    def __init__(self, at: LevelGraph, memory: int | None = None) -> None:
        if at.level != "float64":
            raise AssayError(f"the search needs a graph at level float64, got {at.level!r}")
        self.at, self.graph = at, at.graph
        self.wanted = readers(at.graph)
        self.room = min(available() // 4 if memory is None else memory, ROOM)
        self.last = len(at.graph.nodes) - 1
        self.rules = NodeRules(at.graph)
        self._behind: dict[Ref, list[Ref]] = {}

    def settled(self, boxes: Sequence[Ends], parameters: Parameters) -> Parameters:
        """Return the parameters with the usual slopes of ReLU on these boxes instead of zeros: a
        descent moves them, and parts of the boxes, which start from them, have no weaker bounds.
        """
        found = dict(parameters)
        refs = [r for r in found if isinstance(self.graph.nodes[r].operation, nonlinear.Relu)]
        if refs:
            with torch.no_grad():
                values = self.sweep(boxes, parameters).values
            for ref in refs:
                (mine,) = found[ref]
                usual = 2 * usual_slope(values[self.graph.nodes[ref].parents[0]]) - 1
                found[ref] = (torch.where(mine == 0, usual, mine),)
        return found

    def sweep(
        self,
        boxes: Sequence[Ends],
        parameters: Parameters,
        *,
        before: Sequence[Ends] | None = None,
        refine: bool = True,
        late: Late = never,
    ) -> State:
        """Enclose every node over boxes, (samples, *shape) each; once it is late, no interval is
        tightened any more.
        """
        state, given = State([], {}), dict(zip(self.graph.inputs, boxes, strict=True))
        for ref, node in enumerate(self.graph.nodes):
            if node.operation is None:
                value = given[ref]
            else:
                value = self.rules.interval(ref, [state.values[p] for p in node.parents])
            if ref in self.at.limits:
                limit = self.at.limits[ref]
                value = meet(value, (tensor(limit.lo), tensor(limit.hi)))
            if before is not None:
                value = meet(value, before[ref])
            if not (value[0].isfinite().all() and value[1].isfinite().all()):
                raise AssayError("a value overflows in float64")
            state.values.append(value)
            if refine and ref in self.wanted and not late():
                asked = torch.from_numpy(worth(as_interval(value), *self.wanted[ref]))
                units = asked.any(0).nonzero()[:, 0]
                if len(units):
                    tight = self._tightened(state, parameters, ref, units, late)
                    mine = asked.reshape(value[0].shape)
                    lo, hi = (torch.where(mine, *ends) for ends in zip(tight, value, strict=True))
                    state.values[ref] = lo, hi
        return state

    def bound(self, state: State, parameters: Parameters, rows: Tensor) -> Tensor:
        """Bound `rows . output` from below: (samples, rows)."""
        return self.carry(state, parameters, {self.last: rows})[0]

    def carry(
        self, state: State, parameters: Parameters, rows: Mapping[Ref, Tensor]
    ) -> tuple[Tensor, dict[Ref, Tensor]]:
        """Carry rows (samples or 1, rows, *shape) of nodes to the inputs; return the bounds and
        the rows that reached each input.
        """
        pending, passed = dict(rows), dict[Ref, Tensor]()
        total: Any = 0.0
        for ref in range(max(pending), -1, -1):
            if ref not in pending:
                continue
            mine, node = pending.pop(ref), self.graph.nodes[ref]
            if node.operation is None:
                passed[ref] = mine
                total = total + least_product(mine, *state.values[ref])
                continue
            xs = [state.values[p] for p in node.parents]
            relaxed = self._relaxed(state, parameters, ref)
            parts, constant = self.rules.backward(ref, mine, xs, relaxed)
            total = total + constant
            for parent, part in zip(node.parents, parts, strict=True):
                if part is not None:
                    pending[parent] = pending[parent] + part if parent in pending else part
        return total, passed

    def _relaxed(self, state: State, parameters: Parameters, ref: Ref) -> Relaxed:
        if ref not in state.relaxed:
            xs = [state.values[p] for p in self.graph.nodes[ref].parents]
            state.relaxed[ref] = self.rules.relax(ref, xs, parameters)
        return state.relaxed[ref]

    def _tightened(
        self, state: State, parameters: Parameters, ref: Ref, units: Tensor, late: Late
    ) -> Ends:
        lo, hi = state.values[ref]
        shape = self.graph.nodes[ref].shape
        behind, samples = self.behind(ref), max(len(lo) for lo, _ in state.values)
        sizes = [math.prod(self.graph.nodes[r].shape) for r in behind]
        both = partial(self._both, state, parameters, ref)
        many = max(1, min(ROWS, self.room // 8) // (2 * samples * max(sizes)))
        moving = [lo for lo, _ in state.values] + [p for ps in parameters.values() for p in ps]
        if torch.is_grad_enabled() and any(x.requires_grad for x in moving):
            each = 8 * SAVED * 2 * samples * sum(sizes)
            if state.saved + each * len(units) <= self.room // 2:
                state.saved += each * len(units)
            else:  # the gradient works the rows out again, and must find the same relaxations
                for r in behind:
                    self._relaxed(state, parameters, r)
                many = max(1, self.room // 2 // each)
                both = partial(checkpoint, both, use_reentrant=False, preserve_rng_state=False)
        parts = []
        for some in units.split(many):
            if late():
                break
            parts.append(both(some))
        if not parts:
            return lo, hi
        found = torch.cat(parts, -1)
        units = units[: found.shape[-1]]
        samples = max(len(lo), found.shape[1])
        flat_lo = lo.expand(samples, *shape).reshape(samples, -1)
        flat_hi = hi.expand(samples, *shape).reshape(samples, -1)
        low = torch.full_like(flat_lo, -torch.inf).index_copy(
            1, units, found[0].expand(samples, -1)
        )
        high = torch.full_like(flat_hi, torch.inf).index_copy(
            1, units, -found[1].expand(samples, -1)
        )
        ends = meet((flat_lo, flat_hi), (low, high))
        return ends[0].reshape(samples, *shape), ends[1].reshape(samples, *shape)

    def _both(self, state: State, parameters: Parameters, ref: Ref, units: Tensor) -> Tensor:
        """Bound units of a node, and their negatives, from below: (2, samples, units)."""
        count, node = len(units), self.graph.nodes[ref]
        rows = torch.zeros(1, 2 * count, math.prod(node.shape), dtype=torch.float64)
        rows[0, torch.arange(count), units] = 1.0
        rows[0, torch.arange(count) + count, units] = -1.0
        rows = rows.reshape(1, 2 * count, *node.shape)

        both = self.carry(state, parameters, {ref: rows})[0]
        return both.unflatten(-1, (2, count)).transpose(0, 1)

    def behind(self, ref: Ref) -> list[Ref]:
        """Return a node and those that it follows from."""
        if ref not in self._behind:
            found, stack = set[Ref](), [ref]
            while stack:
                one = stack.pop()
                if one not in found:
                    found.add(one)
                    stack += self.graph.nodes[one].parents
            self._behind[ref] = sorted(found)
        return self._behind[ref]

    def slopes(self, state: State, parameters: Parameters) -> dict[Ref, tuple[np.ndarray, ...]]:
        """Return the slopes that the parameters stand for, as `relax` takes them."""
        found = {}
        for ref in parameters:
            xs = [state.values[p] for p in self.graph.nodes[ref].parents]
            with torch.no_grad():
                relaxed = state.relaxed.get(ref)
                if relaxed is None:
                    relaxed = self.rules.relax(ref, xs, parameters)
                chosen = self.rules.chosen(ref, xs, relaxed, parameters)
            found[ref] = tuple(entry.detach().numpy() for entry in chosen)
        return found
