"""Descents on the slopes of relaxations (arXiv 2011.13824): any slope is sound, so that the best
ones may be looked for freely."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from assay.bounds.search.goal import Goal
from assay.bounds.search.node_rules import Parameters
from assay.bounds.search.ranges import Ends
from assay.bounds.search.twin import State, Twin

RATE = 0.1
"""Step of the descent, in units of half an interval."""


def descend(
    twin: Twin,
    state: State,
    start: Parameters,
    goal: Goal,
    steps: int,
    late: Callable[[], bool] = lambda: False,
) -> tuple[Parameters, Tensor]:
    """Return the parameters with the best bound of every box after a few steps, fewer where it
    gets late.
    """
    moving, rows = _copied(start), torch.from_numpy(goal.rows[None])
    flat = [p.requires_grad_(True) for ps in moving.values() for p in ps]
    samples = max(len(lo) for lo, _ in state.values)
    best = torch.full((samples,), -torch.inf, dtype=torch.float64)
    kept = _copied(moving)
    optimiser = torch.optim.Adam(flat, lr=RATE) if flat else None
    for step in range(steps + 1):
        if optimiser is not None:
            optimiser.param_groups[0]["lr"] = RATE * (1 - 0.9 * step / max(steps, 1))
        state.relaxed = {}
        bound = goal.of(twin.bound(state, moving, rows)).expand(samples)
        better = bound.detach() > best
        best = torch.where(better, bound.detach(), best)
        for ref, ps in moving.items():
            for old, new in zip(kept[ref], ps, strict=True):
                old[better] = new.detach()[better]
        if step == steps or optimiser is None or not bound.requires_grad or late():
            break
        _raise(bound[bound.isfinite()], optimiser, flat)
    return kept, best


def improve(
    twin: Twin,
    boxes: list[Ends],
    start: Parameters,
    goal: Goal,
    steps: int,
    late: Callable[[], bool],
) -> Parameters:
    """Return parameters for the whole sweep after a descent through it, the intervals of every
    node included.
    """
    moving, rows = _copied(start), torch.from_numpy(goal.rows[None])
    flat = [p.requires_grad_(True) for ps in moving.values() for p in ps]
    optimiser = torch.optim.Adam(flat, lr=RATE) if flat else None
    best, kept = -torch.inf, start
    for _ in range(steps if optimiser else 0):
        if late():
            break
        state = twin.sweep(boxes, moving)
        bound = goal.of(twin.bound(state, moving, rows))
        if float(bound.detach()) > best:
            best = float(bound.detach())
            kept = _copied(moving)
        assert optimiser is not None
        if not bound.requires_grad or not bound.isfinite().all():
            break
        _raise(bound, optimiser, flat)
    return kept


def _copied(parameters: Parameters) -> Parameters:
    return {ref: tuple(p.detach().clone() for p in ps) for ref, ps in parameters.items()}


def _raise(bound: Tensor, optimiser: torch.optim.Optimizer, flat: list[Tensor]) -> None:
    """Take one step up the sum of bounds, with slopes kept in [-1, 1]."""
    optimiser.zero_grad()
    (-bound.sum()).backward()
    optimiser.step()
    with torch.no_grad():
        for p in flat:
            p.clamp_(-1, 1)
