"""The splits of a region: a binary tree whose leaves cover it by construction.

A tree is written in preorder: (input, place) and a value for a split into [low, value] and [value,
high] of one entry, (-1, -1) for a leaf. Nothing is left out: a node without its two halves is no
tree. (-2, n) is a face: the next n rows of the pins, (input, place, side), put entries at their low
(0) or high (1) end. It stands for the whole box, since the value is least there: an entry is put at
an end only if the derivative by it, bounded here over the box, never leads below that end."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from assay_check.gates.arithmetic import Array, Box
from assay_check.reading import need

Slopes = Callable[[list[Box]], list[Box] | None]


def leaves(
    region: Sequence[Box], places: Array, values: Array, pins: Array, slopes: Slopes
) -> Iterator[list[Box]]:
    """Yield the boxes of the leaves of a tree, in preorder; InputError for what is no tree of
    splits and faces inside its boxes.

    slopes: gives the boxes of the derivatives by the inputs over a box, or None."""
    shape_fits = places.ndim == 2 and places.shape[1:] == (2,) and values.shape == places.shape[:1]
    need(
        shape_fits and places.dtype.kind == "i" and values.dtype == np.float64 and len(places),
        "a tree is a list of (input, place) with a value each",
    )
    pins_fit = pins.ndim == 2 and pins.shape[1:] == (3,) and pins.dtype.kind == "i"
    need(pins_fit, "pins are a list of (input, place, side)")
    used = 0
    waiting = [list(region)]
    for (which, place), value in zip(places.tolist(), values.tolist(), strict=True):
        need(waiting, "the tree of splits goes on after its last leaf")
        box = waiting.pop()
        if which == -1:
            yield box
            continue
        if which == -2:
            need(0 < place <= len(pins) - used, "a face of the tree lacks its pins")
            waiting.append(_face(box, pins[used : used + place], slopes))
            used += place
            continue
        need(0 <= which < len(box), f"a split names input {which}; there are {len(box)}")
        need(0 <= place < box[which].lo.size, f"a split names entry {place} of input {which}")
        lo, hi = box[which].lo.reshape(-1)[place], box[which].hi.reshape(-1)[place]
        need(lo <= value <= hi, f"a split at {value} lies outside its box [{lo}, {hi}]")
        waiting.append(_moved(box, which, place, value, lower=True))
        waiting.append(_moved(box, which, place, value, lower=False))
    need(not waiting, "the tree of splits lacks a leaf: its boxes do not cover the region")
    need(used == len(pins), "pins belong to no face of the tree")


def _face(box: list[Box], pins: Array, slopes: Slopes) -> list[Box]:
    """Return a box with the entries at one end whose derivative allows it."""
    found = slopes(box)
    ends = [(b.lo.copy(), b.hi.copy()) for b in box]
    for which, place, side in pins.tolist():
        need(0 <= which < len(box), f"a pin names input {which}; there are {len(box)}")
        need(0 <= place < box[which].lo.size, f"a pin names entry {place} of input {which}")
        need(side in (0, 1), f"a pin's side is 0 or 1, got {side}")
        if found is None:
            continue
        lo, hi = (end.reshape(-1) for end in ends[which])
        slope = found[which]
        if side == 0 and slope.lo.reshape(-1)[place] >= 0:  # false for NaN
            hi[place] = lo[place]
        if side == 1 and slope.hi.reshape(-1)[place] <= 0:
            lo[place] = hi[place]
    return [Box(lo, hi) for lo, hi in ends]


def _moved(box: list[Box], which: int, place: int, value: float, *, lower: bool) -> list[Box]:
    end = (box[which].lo if lower else box[which].hi).copy()
    end.reshape(-1)[place] = value
    found = list(box)
    found[which] = Box(end, box[which].hi) if lower else Box(box[which].lo, end)
    return found
