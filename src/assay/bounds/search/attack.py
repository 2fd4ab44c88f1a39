"""Points where a goal is small, from many starts at once (projected sign descent, arXiv
1706.06083): what a proof would look for in vain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.bounds.engine import Late, never
from assay.bounds.search.goal import Goal

DRAWN = 4096
"""Points of the whole box that are evaluated; descents start from the best of them."""

STARTS, STEPS, RATE = 128, 40, 0.05
"""Descents in the whole box, their steps, and the first step as a share of the width."""

NEAR, FAR = 4, 0.25
"""Steps of the descents from points of small boxes, and the first as a share of the width."""


@dataclass(frozen=True)
class Attack:
    """A search of one box for points where the goal of a function is not positive.

    at_once: points whose gradients fit the memory together. The search runs in the box's
    precision; values count as evaluated there."""

    function: Callable[[Tensor], Tensor]
    goal: Goal
    low: Tensor
    high: Tensor
    at_once: int = STARTS

    def whole(self, *, seed: int = 0, late: Late = never) -> tuple[Tensor, float]:
        """Return the point of the box with the least goal that is found, and the goal there.

        Points are drawn inside and on faces of every dimension, the middle among them, as many as
        there is time for; descents from the best stop at the first goal that is not positive."""
        generator = torch.Generator().manual_seed(seed)
        best: list[tuple[Tensor, Tensor]] = []
        for start in range(0, DRAWN, self.at_once):
            count = min(self.at_once, DRAWN - start)
            points = self._drawn(count, generator)
            if start == 0:
                points[0] = (self.low + self.high) / 2
            with torch.no_grad():
                best.append((points, self._goals(points)))
            if late() or best[-1][1].min() <= 0:
                break
        points, goals = (torch.cat(parts) for parts in zip(*best, strict=True))
        order = goals.argsort(stable=True)[: min(STARTS, self.at_once)]
        return self._descend(points[order], self.high - self.low, STEPS, RATE, late)

    def near(self, points: Tensor, width: Tensor) -> Tensor:
        """Return the point with the least goal that short descents find from points of boxes of
        some width, (n, *shape) each.
        """
        parts = zip(points.split(self.at_once), width.split(self.at_once), strict=True)
        found = [self._descend(one, wide, NEAR, FAR) for one, wide in parts]
        return min(found, key=lambda entry: entry[1])[0]

    def _drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """Return points of the box; a share of their entries, another for each, is at an end."""

        def draw(*shape: int) -> Tensor:
            return torch.rand(count, *shape, generator=generator, dtype=self.low.dtype)

        share, ended = draw(*self.low.shape), draw(*[1] * self.low.ndim)
        at_end = draw(*self.low.shape) < ended
        share = torch.where(at_end, share.round(), share)
        return torch.clamp(self.low + share * (self.high - self.low), self.low, self.high)

    def _goals(self, points: Tensor) -> Tensor:
        found = self.goal.of(torch.func.vmap(self.function)(points).flatten(1))
        return found.nan_to_num(torch.inf)

    def _descend(
        self, points: Tensor, width: Tensor, steps: int, rate: float, late: Late = never
    ) -> tuple[Tensor, float]:
        best, value = points[0], float("inf")
        for step in range(steps + 1):
            points.requires_grad_(True)
            found = self._goals(points)
            least, place = found.detach().min(0)
            if float(least) < value:
                best, value = points[place].detach().clone(), float(least)
            if value <= 0 or step == steps or not found.requires_grad or late():
                break
            (slope,) = torch.autograd.grad(found.sum(), points)
            with torch.no_grad():
                move = rate * (1 - step / steps) * width * slope.sign()
                points = torch.clamp(points - move, self.low, self.high)
        return best, value
