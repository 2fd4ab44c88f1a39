"""Integrated gradients in the gates, refined until the scores of a path add up to the change
along it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from assay.attribution.gradient import gate_gradient
from assay.attribution.method import Estimate, Method
from assay.attribution.scores import Gap
from assay.core.mechanisms import Mechanisms
from assay.core.values import add, totals
from assay.errors import InputError
from assay.progress import counted, progress


@dataclass(frozen=True)
class IntegratedGradients(Method):
    """score_k = int_0^1 dF/dgate_k(a) da along gates moving together from one (a = 1) to zero
    (arXiv 1703.01365).

    `scope` says which gates move together: those of one group ("group": the scores of a group add
    up to the effect of removing the whole group), those of all groups that act at a site, or at
    sites that share one ("site"), or all of them ("joint"). Simpson panels are split
    where the panel's sum is furthest from the change of the metric across it, which the nodes
    already measure, until the gap is below `tolerance` of the total change or `max_nodes` are
    spent; the gap that was reached is part of the result."""

    scope: Literal["group", "site", "joint"] = "group"
    tolerance: float = 0.01
    max_nodes: int = 65

    name = "integrated gradients"
    estimand = "share of joint removal"

    def estimate(self, mechanisms: Mechanisms) -> Estimate:
        if self.scope not in ("group", "site", "joint"):
            raise InputError(f"scope must be 'group', 'site' or 'joint', got {self.scope!r}")
        if self.max_nodes < 3 or not self.tolerance > 0:
            raise InputError(
                f"max_nodes must be at least 3 and tolerance positive, got {self.max_nodes} and"
                f" {self.tolerance}"
            )
        paths = self._paths(mechanisms)
        found: dict[str, Tensor] = {}
        gaps: dict[str, Gap] = {}
        baseline = torch.empty(0)
        for path in progress(paths, "integrated gradients"):
            baseline, scores, gap = self._integrate(mechanisms, path)
            found.update(scores)
            gaps["all" if self.scope == "joint" else path[0]] = gap
        return Estimate(baseline, {name: found[name] for name in mechanisms.groups}, gaps)

    def _paths(self, mechanisms: Mechanisms) -> list[list[str]]:
        """Return the groups that move together, path by path."""
        paths = [[name] for name in mechanisms.groups]
        if self.scope == "joint":
            return [list(mechanisms.groups)]
        for here in mechanisms.sites.values() if self.scope == "site" else ():
            joined = [path for path in paths if set(path) & set(here)]
            paths = [path for path in paths if path not in joined]
            paths.append([name for path in joined for name in path])
        return paths

    def _integrate(
        self, mechanisms: Mechanisms, names: list[str]
    ) -> tuple[Tensor, dict[str, Tensor], Gap]:
        def node(place: float) -> _Node:
            gates = mechanisms.full(place, names, broadcast=True)
            metric, gradients = gate_gradient(mechanisms, gates, names)
            slope = sum(map(totals, gradients.values()), torch.zeros(()))
            bar.update()
            return _Node(place, metric, gradients, slope)

        with counted(self.max_nodes, f"path of {names[0]}, nodes at most") as bar:
            return self._refine(node, names)

    def _refine(
        self, node: Callable[[float], _Node], names: list[str]
    ) -> tuple[Tensor, dict[str, Tensor], Gap]:
        panels = [_Panel(node(0.0), node(0.5), node(1.0))]
        nodes = 3
        change = panels[0].right.metric - panels[0].left.metric
        scale = float(change.abs().mean())
        while True:
            worst = max(panels, key=lambda panel: panel.error)
            if (
                sum(panel.error for panel in panels) <= self.tolerance * scale
                or nodes + 2 > self.max_nodes
                or worst.width < 1e-6
            ):
                break
            panels.remove(worst)
            panels += worst.split(node)
            nodes += 2
        scores = {name: reduce(add, (panel.integral(name) for panel in panels)) for name in names}
        gap = float(sum((panel.gap for panel in panels), torch.zeros(())).abs().mean())
        relative = gap / scale if scale > 0 else (0.0 if gap == 0 else float("inf"))
        one = max((panel.right for panel in panels), key=lambda edge: edge.place)
        return one.metric, scores, Gap(relative, gap, nodes)


@dataclass(frozen=True)
class _Node:
    place: float
    metric: Tensor
    gradients: dict[str, Tensor]
    slope: Tensor


@dataclass(frozen=True, eq=False)
class _Panel:
    left: _Node
    middle: _Node
    right: _Node

    @property
    def width(self) -> float:
        return self.right.place - self.left.place

    @property
    def gap(self) -> Tensor:
        total = (self.left.slope + 4 * self.middle.slope + self.right.slope) * self.width / 6
        return total - (self.right.metric - self.left.metric)

    @property
    def error(self) -> float:
        return float(self.gap.abs().mean())

    def integral(self, name: str) -> Tensor:
        ends = add(self.left.gradients[name], self.right.gradients[name])
        return add(ends, 4 * self.middle.gradients[name]) * (self.width / 6)

    def split(self, node) -> list[_Panel]:  # type: ignore[no-untyped-def]
        low = replace(
            self, middle=node((self.left.place + self.middle.place) / 2), right=self.middle
        )
        high = replace(
            self, left=self.middle, middle=node((self.middle.place + self.right.place) / 2)
        )
        return [low, high]
