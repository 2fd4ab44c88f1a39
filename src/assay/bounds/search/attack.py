"""Points where a goal is small, from many starts at once (projected sign descent, arXiv
1706.06083): what a proof would look for in vain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from assay.bounds.search.goal import Goal

STARTS, STEPS = 128, 40


def attack(
    function: Callable[[Tensor], Tensor],
    goal: Goal,
    low: Tensor,
    high: Tensor,
    *,
    starts: int = STARTS,
    steps: int = STEPS,
    seed: int = 0,
) -> tuple[Tensor, float]:
    """Return the point of the box with the least goal that a descent finds, and the goal there.

    It starts from the middle, from random corners and from random points, a quarter of the width a
    step at first, and stops at the first goal that is not positive. The search runs in the box's
    precision; the value counts as evaluated there."""
    generator = torch.Generator().manual_seed(seed)
    width = high - low
    share = torch.rand(starts, *low.shape, generator=generator, dtype=low.dtype)
    share[: starts // 4] = share[: starts // 4].round()
    share[0] = 0.5
    points = torch.clamp(low + share * width, low, high)
    several = torch.func.vmap(function)
    best, value = points[0], float("inf")
    for step in range(steps + 1):
        points.requires_grad_(True)
        found = goal.of(several(points).flatten(1))
        least, place = found.detach().nan_to_num(torch.inf).min(0)
        if float(least) < value:
            best, value = points[place].detach().clone(), float(least)
        if value <= 0 or step == steps or not found.requires_grad:
            break
        (slope,) = torch.autograd.grad(found.sum(), points)
        rate = 0.25 * (1 - step / steps)
        with torch.no_grad():
            points = torch.clamp(points - rate * width * slope.sign(), low, high)
    return best, value
