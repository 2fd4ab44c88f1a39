"""The least value of a function that is found on a region, by evaluating the function itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from assay.bounds.rounding import Array
from assay.bounds.search.goal import Goal
from assay.bounds.search.leaves import Leaf, ends_of
from assay.bounds.search.twin import Twin
from assay.bounds.trace.traced import Traced

TRIED = 8
"""Boxes whose worst corner is evaluated, of those that are bounded at once without a descent."""

Probe = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""A search for a small value from points of boxes and their widths, (n, *shape) by input: it
returns a point."""


class Least:
    """The least `value` of a goal so far, and the `point` of the region where it was found.

    probe: what looks for small values in the worst boxes, where no descent on slopes does."""

    def __init__(
        self,
        traced: Traced,
        goal: Goal,
        lows: Sequence[Array],
        highs: Sequence[Array],
        probe: Probe | None,
    ) -> None:
        self.traced, self.goal, self.probe = traced, goal, probe
        self.lows, self.highs = lows, highs
        self.dtypes = [example.dtype for example in traced.program.examples]
        self.value, self.point = np.inf, tuple(traced.program.examples)

    def offer(self, point: Sequence[Array]) -> None:
        """Evaluate the function itself at a point of the region, and keep it where it is least."""
        inputs = tuple(
            torch.from_numpy(np.asarray(np.clip(x, lo, hi))).to(dtype)
            for x, lo, hi, dtype in zip(point, self.lows, self.highs, self.dtypes, strict=True)
        )
        value = self.goal.at(self.traced(*inputs).double().numpy())
        if value < self.value:
            self.value, self.point = value, inputs

    def look(self, leaves: list[Leaf], corners: list[Array]) -> None:
        """Evaluate the function in the worst of some boxes: at the corners where their lines are
        least, or where a probe gets from there and from the middles.
        """
        worst = sorted(range(len(leaves)), key=lambda index: leaves[index].bound)[:TRIED]
        if self.probe is None:
            for index in worst:
                self.offer([corner[index] for corner in corners])
            return
        boxes = ends_of([leaves[index] for index in worst])
        points = [
            torch.cat([torch.from_numpy(corner[worst]), (low + high) / 2])
            for corner, (low, high) in zip(corners, boxes, strict=True)
        ]
        widths = [torch.cat([high - low, high - low]) for low, high in boxes]
        self.offer([x.numpy() for x in self.probe(points, widths)])

    def explore(self, twin: Twin, leaf: Leaf) -> None:
        """Evaluate the function where the linear bound of a box is least."""
        boxes = ends_of([leaf])
        after = {ref: tuple(p[None] for p in ps) for ref, ps in leaf.after.items()}
        rows = torch.from_numpy(self.goal.rows[None])
        with torch.no_grad():
            after = after or twin.rules.parameters(1)
            state = twin.sweep(boxes, after, refine=False)
            each, passed = twin.carry(state, after, {twin.last: rows})
        row = int(self.goal.decisive(each)[0])
        point = [
            np.where(passed[ref][0, row].numpy() > 0, lo, hi) if ref in passed else lo
            for ref, lo, hi in zip(twin.graph.inputs, leaf.lows, leaf.highs, strict=True)
        ]
        self.offer(point)
