"""Worst case over any combination of unimportant gates, searched by projected gradient ascent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.attribution.gradient import gate_gradient
from assay.audit.faithfulness import Keep, kept_gates
from assay.core.mechanisms import Mechanisms
from assay.core.values import dense
from assay.errors import InputError
from assay.progress import progress

TOGETHER = 64
"""Copies of the examples of a batch that one forward pass may hold, where corners are compared."""


@dataclass(frozen=True)
class WorstCase:
    """The largest damage found over the boxes of the unimportant gates: how far the metric falls
    from F(ones) where higher is right, or rises where lower is (`Target.higher_is_right`).

    `damage` (examples,) is a LOWER bound of the true worst case: a search found it, and
    `evaluations` forward passes were spent. `exhaustive` marks the maximum over all corners of the
    boxes."""

    damage: Tensor
    gates: Mapping[str, Tensor]
    evaluations: int
    exhaustive: bool = False

    label = "lower bound of the damage"


@torch.no_grad()
def worst_case(
    mechanisms: Mechanisms,
    keep: Keep | None = None,
    *,
    steps: int = 20,
    restarts: int = 4,
    flips: int = 32,
    seed: int = 0,
) -> WorstCase:
    """Search the gates that are not kept, in the kind's boxes, for the combination that loses most
    of the right answer, per example.

    Ascends by the sign of the gradient with a shrinking step from the all-low corner, the corner
    that the gradient points to and random corners; then flips single gates of the best corner
    (every gate when there are at most `flips` of them). Gates shared over the batch are searched
    for the mean damage."""
    if steps < 1 or restarts < 1:
        raise InputError(f"steps and restarts must be at least 1, got {steps} and {restarts}")
    search = _Search(mechanisms, keep or {})
    generator = torch.Generator().manual_seed(seed)
    for restart in progress(range(restarts), "worst case"):
        if restart == 0:
            gates = search.low
        elif restart == 1:
            gates = search.corner(search.slope(search.high))
        else:
            gates = search.random(generator)
        search.offer(gates)
        for step in range(steps):
            slope = search.slope(gates)
            size = 1 - step / steps
            gates = search.project(
                {name: gates[name] - size * slope[name].sign().to(gates[name]) for name in gates}
            )
            search.offer(gates)
            search.offer(search.corner(slope))
    search.flip(flips)
    return search.result()


@torch.no_grad()
def exhaustive(mechanisms: Mechanisms, keep: Keep | None = None, *, most: int = 12) -> WorstCase:
    """Return the maximum damage over all corners of the boxes; InputError above `most` free
    gates an example.
    """
    search = _Search(mechanisms, keep or {})
    places = search.free_places()
    if len(places) > most:
        raise InputError(
            f"{len(places)} free gates have 2**{len(places)} corners; at most {most} gates can be"
            " searched exhaustively"
        )
    codes = torch.arange(1 << len(places))
    if search.shared:
        for code in progress(codes, "corners"):
            search.offer(search.coded(places, code[None]))
        return search.result(exhaustive=True)
    best, chosen = search.best.clone(), torch.zeros(len(search.best), dtype=torch.long)
    for some in progress(codes.split(max(1, TOGETHER // len(best))), "corners"):
        damage, place = search.damages(places, some).max(0)
        better = (damage > best).cpu()
        best, chosen = torch.maximum(best, damage), torch.where(better, some[place.cpu()], chosen)
    # In a batch of another size the last bits may differ: the winners are measured by themselves.
    search.offer(search.coded(places, chosen))
    return search.result(exhaustive=True)


class _Search:
    def __init__(self, mechanisms: Mechanisms, keep: Keep):
        self.mechanisms = mechanisms
        self.high = mechanisms.ones()
        kept = kept_gates(mechanisms, keep)
        self.low = {}
        for name, ones in self.high.items():
            low, high = (bound.to(ones).expand(ones.shape) for bound in mechanisms.box(name))
            if not bool((low <= high).all()):  # false for NaN too
                raise InputError(f"the box of {name!r} has a lowest gate above its highest, or NaN")
            free = kept[name] == 0
            self.low[name] = torch.where(free, low, ones)
            self.high[name] = torch.where(free, high, ones)
        self.shared = not all(group.per_example for group in mechanisms.groups.values())
        self.full = mechanisms.values().double()
        self.best = torch.full_like(self.full, float("-inf"))
        self.gates = {name: gate.clone() for name, gate in self.high.items()}
        self.evaluations = 1
        self.offer(self.high)

    def slope(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return minus the slope of the damage, summed over examples for shared gates."""
        self.evaluations += 1
        found = {
            name: dense(slope) for name, slope in gate_gradient(self.mechanisms, gates)[1].items()
        }
        groups = self.mechanisms.groups
        sign = 1.0 if self.mechanisms.target.higher_is_right else -1.0
        return {
            name: sign * (slope if groups[name].per_example else slope.sum(0))
            for name, slope in found.items()
        }

    def corner(self, slope: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.where(slope[name] > 0, self.low[name], self.high[name])
            for name in self.high
        }

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        coins = {
            name: torch.rand(high.shape, generator=generator).to(high) < 0.5
            for name, high in self.high.items()
        }
        return {
            name: torch.where(coins[name], self.low[name], self.high[name]) for name in self.high
        }

    def project(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.minimum(torch.maximum(gate, self.low[name]), self.high[name])
            for name, gate in gates.items()
        }

    def offer(self, gates: Mapping[str, Tensor]) -> None:
        """Keep the gates where they beat the best so far."""
        self.evaluations += 1
        damage = self.mechanisms.target.damage(self.full, self.mechanisms.values(gates).double())
        better = damage > self.best
        if self.shared:
            better = (damage.mean() > self.best.mean()).expand_as(damage)
        if not better.any():
            return
        self.best = torch.where(better, damage, self.best)
        for name, group in self.mechanisms.groups.items():
            mask = better.reshape(-1, *[1] * len(group.axes)) if group.per_example else better.all()
            self.gates[name] = torch.where(mask, gates[name], self.gates[name])

    def coded(self, places: list[tuple[str, tuple[Any, ...]]], codes: Tensor) -> dict[str, Tensor]:
        """Return the corner of every example: bit i of its code puts place i to its lowest value.

        codes: one of every example, for any number of copies of the batch; where gates are shared
        over the batch, a single one."""
        copies = max(1, len(codes) // len(self.full))
        low, gates = dict[str, Tensor](), dict[str, Tensor]()
        for name, high in self.high.items():
            times = [copies, *[1] * (high.ndim - 1)]
            low[name], gates[name] = self.low[name].repeat(times), high.repeat(times)
        for bit, (name, place) in enumerate(places):
            here = (codes.to(gates[name].device) >> bit & 1).bool()
            here = here if self.mechanisms.group(name).per_example else here[0]
            gates[name][place] = torch.where(here, low[name][place], gates[name][place])
        return gates

    def damages(self, places: list[tuple[str, tuple[Any, ...]]], codes: Tensor) -> Tensor:
        """Return the damage at some corners, (codes, examples), in one forward pass."""
        count, size = len(codes), len(self.full)
        self.evaluations += count
        copies = torch.arange(size, device=self.full.device).repeat(count)
        gates = self.coded(places, codes.repeat_interleave(size))
        values = self.mechanisms.take(copies).values(gates).double().reshape(count, size)
        return self.mechanisms.target.damage(self.full, values)

    def free_places(self) -> list[tuple[str, tuple[Any, ...]]]:
        places: list[tuple[str, tuple[Any, ...]]] = []
        for name, group in self.mechanisms.groups.items():
            free = self.low[name] < self.high[name]
            free = free.any(0) if group.per_example else free
            places += [(name, (..., *place)) for place in free.nonzero().tolist()]
        return places

    def flip(self, most: int) -> None:
        places = self.free_places()
        if len(places) > most:
            return
        for _ in range(2):
            before = self.best.clone()
            for name, place in places:
                gates = {key: gate.clone() for key, gate in self.gates.items()}
                here, low, high = gates[name][place], self.low[name][place], self.high[name][place]
                gates[name][place] = torch.where(here > (low + high) / 2, low, high)
                self.offer(gates)
            if torch.equal(before, self.best):
                return

    def result(self, *, exhaustive: bool = False) -> WorstCase:
        return WorstCase(self.best, self.gates, self.evaluations, exhaustive)
