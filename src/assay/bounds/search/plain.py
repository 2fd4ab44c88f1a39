"""Bounds of many boxes at once with the usual slopes: without a descent and gradients a box costs
little, and splits make up for the slopes where few inputs move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from assay.bounds.rounding import Array
from assay.bounds.search.goal import Goal
from assay.bounds.search.leaves import Leaf, ends_of
from assay.bounds.search.twin import Twin

UNEVEN = 256.0
"""Times that an entry may be wider than another one that is split, both as shares of the region."""


@torch.no_grad()
def bound_plainly(
    twin: Twin, leaves: list[Leaf], goal: Goal, region: Sequence[Array]
) -> list[Array]:
    """Raise the bounds of leaves, and return the corner of each at which the line below the
    deciding row is least, (leaves, *shape) by input. Choose where each is split: at the entry whose
    effect, its largest coefficient in the lines below and above any row times its width, is
    largest.

    The deciding line alone would not do: a slope of zero in a relaxation can hide an entry. It can
    hide one from all lines, too, so that none stays much wider than others: `region` holds the
    widths of the whole region by input."""
    boxes = ends_of(leaves)
    parameters = twin.rules.parameters(len(leaves))
    state = twin.sweep(boxes, parameters)
    rows = torch.from_numpy(goal.rows[None])
    each, passed = twin.carry(state, parameters, {twin.last: torch.cat([rows, -rows], 1)})
    each = torch.maximum(each[:, : len(goal.rows)], goal.least(*state.values[-1]))
    bounds, deciding = goal.of(each.nan_to_num(-torch.inf)), goal.decisive(each)
    scores, corners = list[Tensor](), list[Array]()
    shares = [
        ((high - low) / torch.from_numpy(whole)).nan_to_num(0.0).flatten(1)
        for (low, high), whole in zip(boxes, region, strict=True)
    ]
    widest = torch.cat(shares, 1).amax(1, keepdim=True)
    for ref, (low, high), share in zip(twin.graph.inputs, boxes, shares, strict=True):
        width = (high - low).flatten(1)
        score = 1e-12 * width
        if ref in passed:
            lines = passed[ref].flatten(2).expand(len(leaves), -1, -1)
            score = score + lines.abs().amax(1) * width
            mine = lines[torch.arange(len(leaves)), deciding].reshape(low.shape)
            low = torch.where(mine > 0, low, high)
        corners.append(low.numpy())
        scores.append(torch.where(share * UNEVEN >= widest, score, 0.0))
    best = [score.max(-1) for score in scores]
    which = torch.stack([value for value, _ in best], -1).argmax(-1)
    for index, leaf in enumerate(leaves):
        leaf.bound = max(leaf.bound, float(bounds[index]))
        chosen = int(which[index])
        value, place = best[chosen]
        leaf.split = (chosen, int(place[index])) if value[index] > 0 else None
    return corners
