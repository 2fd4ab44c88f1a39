"""Gates at any value, and activations that features are set to, on one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.core.mechanisms import Mechanisms
from assay.core.parts import Group, mix
from assay.core.sites import Edit, Record, Seen, read_sites
from assay.errors import InputError

Place = tuple[str, tuple[int | None, ...]]
"""A group and an index in it; None stands for every position (or head, or feature)."""


@dataclass(frozen=True)
class Goal:
    """Activations that some features of a group are set to; NaN where one is left as it is."""

    which: Int[Tensor, " which"]
    values: Float[Tensor, "*positions which"]


@dataclass(frozen=True)
class Setting:
    """Full gates by group, and goals by group, of mechanisms on one batch."""

    mechanisms: Mechanisms
    gates: Mapping[str, Tensor]
    goals: Mapping[str, Goal]

    def edits(self, step: Tensor | None = None) -> dict[str, Edit]:
        """Return the edits that put the share `step` of the setting in place, all of it by default:
        gates of 1 + step (g - 1), and at features with a goal

            x + step (v - f) W_dec

        with f the activation there in the same forward pass, whether the feature is active or not.
        """
        gates = self.gates
        if step is not None:
            gates = {name: 1 + step * (gate - 1) for name, gate in gates.items()}

        def change(site: str, seen: Seen) -> Tensor:
            here = self.mechanisms.sites[site]
            value = seen.written
            if any(name in gates for name in here):
                value = mix(seen, self.mechanisms.parts(site, seen), gates)
            for name in here:
                if name in self.goals:
                    shift = self._shift(name, site, seen)
                    shift = shift if step is None else step * shift
                    value = (value + shift).to(seen.written.dtype)
            return value

        return self.mechanisms.edits_of([*gates, *self.goals], change)

    def values(self, record: Record | None = None, step: Tensor | None = None) -> Tensor:
        """Return the metric of every example under the setting."""
        edits, mechanisms = self.edits(step), self.mechanisms
        return mechanisms.target.values(mechanisms.batch, edits, record=record, resume=tuple(edits))

    def _shift(self, name: str, site: str, seen: Seen) -> Tensor:
        goal = self.goals[name]
        now, vectors = self.mechanisms.activations(name, site, seen, goal.which)
        free = goal.values.isnan()
        missing = torch.where(free, torch.zeros_like(now), goal.values.to(now) - now)
        return missing @ vectors.to(now)

    @torch.no_grad()
    def found(self, which: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the activations of some features of feature groups, and the norms of their parts,
        on the untouched network: (examples, *positions, which) each.
        """
        own = self.mechanisms
        seen = read_sites(own.target.model, own.batch.inputs, own.touched(which))
        result = {}
        for name, some in which.items():
            now, squares = torch.zeros(()), torch.zeros(())
            for site in own.group(name).sites:
                at = replace(seen[site], earlier=seen)
                now = own.activations(name, site, at, some)[0]
                norms = own.parts(site, at)[name].norm().index_select(-1, some)
                squares = squares + (norms.to_dense() if norms.is_sparse else norms).square()
            result[name] = now, squares.sqrt()
        return result


def setting_of(
    mechanisms: Mechanisms,
    gates: Mapping[Place, float],
    to: Mapping[Place, float],
    shorter: bool = False,
) -> Setting:
    """Return the setting of gates and activations at some places, one or free everywhere else; with
    `shorter` places behind the last position are left out.

    Raises InputError for no places, places that are not there or have both, numbers that are not
    finite, and activations of parts that have none."""
    if not gates and not to:
        raise InputError("no gate was given; name a part and the value of its gate")
    found: dict[str, Tensor] = {}
    for (name, index), value in gates.items():
        group = mechanisms.group(name)
        _require_size(f"the gate of {name!r} is", value, mechanisms.ones([name])[name].dtype)
        at = _slices(group, index, shorter)
        if at is not None:
            full = found.setdefault(name, mechanisms.ones([name])[name])
            full[(slice(None), *at) if group.per_example else at] = value
    goals: dict[str, Goal] = {}
    for name in dict.fromkeys(name for name, _ in to):
        own = {index: value for (group, index), value in to.items() if group == name}
        goal = _goal(mechanisms, name, own, shorter)
        if goal is not None:
            goals[name] = goal
    for name, goal in goals.items():
        given = found[name].index_select(-1, goal.which) != 1 if name in found else None
        if given is not None and bool((given & ~goal.values.isnan()).any()):
            raise InputError(f"a part of {name!r} has both a gate and a value; give one of them")
    return Setting(mechanisms, found, goals)


def _goal(
    mechanisms: Mechanisms,
    name: str,
    places: Mapping[tuple[int | None, ...], float],
    shorter: bool,
) -> Goal | None:
    group, device = mechanisms.group(name), mechanisms.target.device
    dtype = mechanisms.ones([name])[name].dtype
    if name not in mechanisms.feature_groups:
        raise InputError(
            f"the parts of {name!r} have no activation that could be set to a value; give a gate,"
            " a multiple of what is there"
        )
    inside = []
    for index, value in places.items():
        _require_size(f"the activation of {name!r} is set to", value, dtype)
        at = _slices(group, index, shorter)
        if at is not None:
            inside.append((at, index[-1], value))
    if not inside:
        return None
    features = [feature for _, feature, _ in inside]
    every = range(group.axes[-1])
    which = (
        list(every)
        if None in features
        else sorted({int(one) for one in features if one is not None})
    )
    row = {feature: column for column, feature in enumerate(which)}
    values = torch.full(
        (*group.axes[:-1], len(which)), math.nan, dtype=torch.float64, device=device
    )
    for at, feature, value in inside:
        values[(*at[:-1], slice(None) if feature is None else row[feature])] = value
    return Goal(torch.tensor(which, device=device), values)


def _require_size(what: str, value: float, dtype: torch.dtype) -> None:
    if not math.isfinite(value):
        raise InputError(f"{what} {value}; give a finite number")
    if abs(value) > torch.finfo(dtype).max:
        raise InputError(f"{what} {value:g}, too large for the network's {dtype}")


def _slices(group: Group, index: tuple[int | None, ...], shorter: bool) -> tuple[Any, ...] | None:
    """Return an index with a slice for every None; None where it is left out."""
    sizes = group.axes
    if len(index) == len(sizes):
        inside = all(
            place is None or 0 <= place < size for place, size in zip(index, sizes, strict=True)
        )
        if inside:
            return tuple(slice(None) if place is None else place for place in index)
        if shorter:
            return None
    raise InputError(
        f"{group.name!r} has parts within {sizes}, and {index} is none of them; None stands for all"
        " of an axis"
    )
