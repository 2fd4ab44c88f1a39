"""Boxes that cover a region, with the bounds and slopes found on them, and how they are halved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from assay.bounds.engine import Late, never
from assay.bounds.rounding import Array
from assay.bounds.search.node_rules import Parameters
from assay.bounds.search.pins import Pinned, Split
from assay.bounds.search.ranges import Ends
from assay.bounds.search.slopes import Slopes
from assay.bounds.search.twin import State, Twin
from assay.errors import InputError


@dataclass(frozen=True)
class Budget:
    """When the search stops: CPU seconds, boxes, or a relative gap between the ends.

    steps: of the descent on the slopes of the last rows, for the whole region and for each later
    box. whole: of the descent through the sweep of the whole region. On the whole region each of
    the two takes a sixth of the seconds at most. pins: how often the derivatives on the whole
    region may be bounded, to pin the inputs by which they keep their sign; 0 pins nothing, on no
    box. memory: bytes that the boxes worked on at once may take, and all boxes together; by default
    a quarter of what is available."""

    seconds: float = 10.0
    boxes: int = 1 << 20
    gap: float = 1e-6
    steps: tuple[int, int] = (40, 20)
    whole: int = 30
    pins: int = 12
    memory: int | None = None

    def __post_init__(self) -> None:
        numbers = (self.seconds, self.gap, *self.steps, self.whole, self.pins)
        if not (all(number >= 0 for number in numbers) and self.boxes >= 1):  # false for NaN too
            raise InputError(
                f"budget: seconds, boxes, gap, steps and pins must not be negative: {self}"
            )
        if not all(float(n).is_integer() for n in (*self.steps, self.whole, self.pins)):
            raise InputError(f"budget: steps, whole and pins must be whole numbers: {self}")


@dataclass
class Leaf:
    """A box with the bound found on it, and the slopes: of the sweep, and of the last rows.

    path: the splits and faces that lead to it."""

    lows: list[Array]
    highs: list[Array]
    bound: float
    before: Parameters
    after: Parameters
    split: tuple[int, int] | None = None
    path: tuple[Split | Pinned, ...] = ()


@dataclass(frozen=True)
class Found:
    """The least value of `row . function` over a box lies in [bound, value].

    value: at `point`, evaluated by the function itself; bound: at `level`. leaves cover the box.
    closed: whether the gap or the threshold of the claim was reached within the budget."""

    bound: float
    value: float
    point: tuple[Tensor, ...]
    level: str
    boxes: int
    closed: bool
    seconds: float
    root: float
    leaves: list[Leaf] = field(default_factory=list, repr=False)


@torch.no_grad()
def ends_of(leaves: Sequence[Leaf]) -> list[Ends]:
    """Return the ends of boxes beside one another, (leaves, *shape) by input."""
    lows, highs = (
        [torch.from_numpy(np.stack(x)) for x in zip(*ends, strict=True)]
        for ends in ([leaf.lows for leaf in leaves], [leaf.highs for leaf in leaves])
    )
    return list(zip(lows, highs, strict=True))


def slopes_of(twin: Twin, leaves: list[Leaf], late: Late = never) -> tuple[Slopes, Slopes]:
    """Return the slopes at which a level bounds leaves, (leaves, *shape) by node: those of the
    sweep, and those of the last rows; once it is late, no interval is tightened for them any more.
    """
    before, after = (
        stacked([getattr(leaf, name) for leaf in leaves]) for name in ("before", "after")
    )
    state = twin.sweep(ends_of(leaves), before, late=late)
    return twin.slopes(state, before), twin.slopes(State(state.values, {}), after)


def stacked(each: list[Parameters]) -> Parameters:
    if not each or not each[0]:
        return {}
    return {
        ref: tuple(torch.stack([mine[ref][i] for mine in each]) for i in range(len(each[0][ref])))
        for ref in each[0]
    }


def halves(leaf: Leaf) -> list[Leaf]:
    """Return the two halves of a box along the place chosen for it."""
    if leaf.split is None:
        return []
    which, place = leaf.split
    low, high = leaf.lows[which].flat[place], leaf.highs[which].flat[place]
    middle = 0.5 * (low + high)
    if not low < middle < high:
        return []
    found = []
    for side in (0, 1):
        split = Split(which, place, float(middle), side)
        lows, highs = half(leaf.lows, leaf.highs, split)
        path = (*leaf.path, split)
        found.append(Leaf(lows, highs, leaf.bound, leaf.before, leaf.after, None, path))
    return found


def half(lows: list[Array], highs: list[Array], split: Split) -> tuple[list[Array], list[Array]]:
    """Return the ends of one half of a box."""
    lows, highs = [low.copy() for low in lows], [high.copy() for high in highs]
    (highs if split.side == 0 else lows)[split.which].flat[split.place] = split.value
    return lows, highs


def choose(leaf: Leaf, slopes: list[Array | None]) -> tuple[int, int] | None:
    """Return the place whose halving promises most for the worse of the two halves.

    A half moves one end of the box to its middle; the slope of the bound in that end says, to first
    order, by how much the bound then rises."""
    count, best, chosen = len(leaf.lows), 0.0, None
    for which in range(count):
        width = leaf.highs[which] - leaf.lows[which]
        of_low, of_high = slopes[which], slopes[count + which]
        rise_low = 0.0 * width if of_low is None else np.maximum(of_low, 0.0) * width / 2
        rise_high = 0.0 * width if of_high is None else np.maximum(-of_high, 0.0) * width / 2
        score = np.minimum(rise_low, rise_high) + 1e-3 * np.maximum(rise_low, rise_high)
        score = np.where(width > 0, score + 1e-12 * width, -1.0)
        place = int(score.argmax()) if score.size else 0
        if score.size and score.flat[place] > best:
            best, chosen = float(score.flat[place]), (which, place)
    return chosen
