"""Bounds of boxes at the level of a claim, with the slopes that a search found for them."""

from __future__ import annotations

import numpy as np
import torch

from assay.bounds.engine import Late, never
from assay.bounds.rounding import Array, Interval
from assay.bounds.search.goal import Goal
from assay.bounds.search.leaves import Leaf, ends_of, slopes_of
from assay.bounds.search.ranges import as_interval
from assay.bounds.search.sweep import bound_rows, sweep
from assay.bounds.search.twin import Twin
from assay.bounds.trace.traced import Traced
from assay.errors import AssayError, InputError


class LevelBounds:
    """Bounds a goal from below on boxes, `at_once` of them at a time."""

    def __init__(self, traced: Traced, twin: Twin, goal: Goal, level: str, at_once: int) -> None:
        self.at, self.twin, self.goal, self.at_once = traced.at(level), twin, goal, at_once

    def least(self, leaves: list[Leaf], late: Late = never) -> float:
        """Return the least bound of boxes; once it is late, no interval is tightened for it any
        more.
        """
        return min(self.each(leaves, late))

    def each(self, leaves: list[Leaf], late: Late = never) -> list[float]:
        """Return the bound of each box, minus infinity where there is none."""
        found = list[float]()
        for start in range(0, len(leaves), self.at_once):
            part = leaves[start : start + self.at_once]
            boxes = [as_interval(ends) for ends in ends_of(part)]
            try:
                with np.errstate(all="ignore"):
                    found += self._bounds(part, boxes, late)
            except (AssayError, InputError):
                found += [-np.inf] * len(part)
        return found

    def by_intervals(self, leaf: Leaf) -> float:
        """Return the bound of a box by intervals alone; minus infinity where there is none."""
        boxes = [as_interval(ends) for ends in ends_of([leaf])]
        with np.errstate(all="ignore"):
            try:
                known = sweep(self.at, boxes, refine=False)
                bound = self._goals(bound_rows(self.at, known, self.goal.rows[None]))[0]
            except (AssayError, InputError):
                bound = -np.inf
        return bound if np.isfinite(bound) else -np.inf

    def _bounds(self, part: list[Leaf], boxes: list[Interval], late: Late) -> list[float]:
        rows = self.goal.rows[None]
        if not part[0].after:
            return self._goals(bound_rows(self.at, sweep(self.at, boxes, late=late), rows))
        of_sweep, of_rows = slopes_of(self.twin, part, late)
        known = sweep(self.at, boxes, slopes=of_sweep, late=late)
        last = type(known)(known.values, known.errors, {}, of_rows)
        return self._goals(bound_rows(self.at, last, rows))

    def _goals(self, bounds: Array) -> list[float]:
        """Return the goal's bounds from those of its rows, (samples, n); none is minus infinity."""
        known = torch.from_numpy(np.where(np.isnan(bounds), -np.inf, bounds))
        return [float(bound) for bound in self.goal.of(known)]
