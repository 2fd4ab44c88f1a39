"""The splits of a region: a binary tree whose leaves cover it by construction.

A tree is written in preorder: (input, place) and a value for a split into [low, value] and [value,
high] of one entry, (-1, -1) for a leaf. Nothing is left out: a node without its two halves is no
tree."""

from collections.abc import Iterator, Sequence

import numpy as np

from assay_check.gates.arithmetic import Array, Box
from assay_check.reading import need


def leaves(region: Sequence[Box], places: Array, values: Array) -> Iterator[list[Box]]:
    """Yield the boxes of the leaves of a tree, in preorder; InputError for what is no tree of
    splits inside its boxes.
    """
    shape_fits = places.ndim == 2 and places.shape[1:] == (2,) and values.shape == places.shape[:1]
    need(
        shape_fits and places.dtype.kind == "i" and values.dtype == np.float64 and len(places),
        "a tree is a list of (input, place) with a value each",
    )
    waiting = [list(region)]
    for (which, place), value in zip(places.tolist(), values.tolist(), strict=True):
        need(waiting, "the tree of splits goes on after its last leaf")
        box = waiting.pop()
        if which == -1:
            yield box
            continue
        need(0 <= which < len(box), f"a split names input {which}; there are {len(box)}")
        need(0 <= place < box[which].lo.size, f"a split names entry {place} of input {which}")
        lo, hi = box[which].lo.reshape(-1)[place], box[which].hi.reshape(-1)[place]
        need(lo <= value <= hi, f"a split at {value} lies outside its box [{lo}, {hi}]")
        waiting.append(_moved(box, which, place, value, lower=True))
        waiting.append(_moved(box, which, place, value, lower=False))
    need(not waiting, "the tree of splits lacks a leaf: its boxes do not cover the region")


def _moved(box: list[Box], which: int, place: int, value: float, *, lower: bool) -> list[Box]:
    end = (box[which].lo if lower else box[which].hi).copy()
    end.reshape(-1)[place] = value
    found = list(box)
    found[which] = Box(end, box[which].hi) if lower else Box(box[which].lo, end)
    return found
