"""What a search bounds from below: one linear function of the value, or how far the value stays
from an unsafe set of linear constraints."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from assay.bounds.rounding import Array
from assay.errors import AssayError


@dataclass(frozen=True)
class Goal:
    """`min over groups of max over rows of (row . value)`; rows (n, *shape of the value).

    With the constraints `row . value <= 0` of a conjunction as a group, and the conjunctions of an
    unsafe set as the groups, it is positive exactly where the value is not in the set. Groups may
    share rows."""

    rows: Array
    groups: tuple[tuple[int, ...], ...] = ((0,),)

    def __post_init__(self) -> None:
        if {i for group in self.groups for i in group} != set(range(len(self.rows))):
            raise AssayError("every row belongs to a group")

    @cached_property
    def _places(self) -> Tensor:
        """The rows of every group, the first repeated where others have more: (groups, most)."""
        most = max(map(len, self.groups))
        return torch.tensor([[*g, *g[:1] * (most - len(g))] for g in self.groups])

    @property
    def single(self) -> bool:
        """Whether it is one row."""
        return len(self.rows) == 1

    def of(self, bounds: Tensor) -> Tensor:
        """Return the goal's number from those of its rows, (..., n): where these are bounds from
        below, so is it.
        """
        return bounds[..., self._places].amax(-1).amin(-1)

    def least(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the least of every row over boxes of the value: (samples, n)."""
        flat = torch.from_numpy(self.rows).reshape(1, len(self.rows), -1)
        lo, hi = (end.reshape(len(end), -1, 1) for end in (low, high))
        return (flat.clamp_min(0) @ lo + flat.clamp_max(0) @ hi)[..., 0]

    def at(self, value: Array) -> float:
        """Return the goal's number at a value of the function."""
        numbers = self.rows.reshape(len(self.rows), -1) @ value.reshape(-1)
        return float(self.of(torch.from_numpy(numbers)))

    def decisive(self, bounds: Tensor) -> Tensor:
        """Return which row decides, from the bounds of all (samples, n): (samples,)."""
        best, place = bounds[:, self._places].max(-1)
        chosen = best.argmin(-1)
        return self._places[chosen, place.gather(-1, chosen[:, None])[:, 0]]


def goal_of(row: Array | Goal) -> Goal:
    """Return a row as a goal."""
    return row if isinstance(row, Goal) else Goal(np.asarray(row, dtype=np.float64)[None])
