"""Nodes: neurons, heads, MLPs and residual streams of any network, gated between what is there
now and a reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from assay.core.mechanisms import Mechanisms, Projection
from assay.core.parts import Gates, Group, Parts, Whole
from assay.core.sites import Record, Seen
from assay.core.target import Batch
from assay.errors import InputError
from assay.mechanisms.nodes.parts import Columns
from assay.targets import families, names
from assay.targets.reading import stretched
from assay.targets.suffix import Jobs, Suffix, pick
from assay.targets.suffix_plan import plan


@dataclass(frozen=True)
class Spot:
    """One site of a `Nodes` object: where it is, what a gate of zero puts there, and where that is
    another value.

    `base` broadcasts to the site's value (examples, *positions, width); `active` (examples,
    *positions) is false at padding and where the reference is the clean value. `columns` (heads,
    columns a head) or (neurons, 1) says what the last gate axis means, None for whole vectors."""

    ref: names.SiteRef
    base: Tensor
    active: Tensor
    width: int
    unit: Literal["vector", "head", "neuron"]
    columns: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the gates."""
        return (*self.active.shape, *([] if self.columns is None else [len(self.columns)]))

    def difference(self, value: Tensor) -> Tensor:
        """Return value - reference where the spot is active, zero elsewhere: (examples,
        *positions, width).
        """
        return (value - self.base.to(value.dtype)) * self.active.unsqueeze(-1)

    def parts(self, value: Tensor) -> Parts:
        """Return the parts of the site's current value."""
        difference = self.difference(value)
        if self.columns is None:
            return Whole(difference, self.shape, tuple(difference.shape))
        if (
            self.columns.numel() == self.width
        ):  # heads and neurons own consecutive columns wherever they own all of them
            vectors = (
                difference
                if self.unit == "neuron"
                else difference.unflatten(-1, tuple(self.columns.shape))
            )
            return Whole(vectors, self.shape, tuple(difference.shape))
        return Columns(difference[..., self.columns], self.shape, self.columns, self.width)

    def hull(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends of the reference values over the examples, and of one more; padding and
        values that are the clean ones do not count.
        """
        shape = (*self.active.shape, self.width)
        base, active = self.base.expand(shape), self.active.unsqueeze(-1)
        least = base.where(active, torch.inf).amin(0, keepdim=True)
        most = base.where(active, -torch.inf).amax(0, keepdim=True)
        mine = own.to(base).expand(len(own) if own.ndim == len(shape) else 1, *shape[1:])
        return torch.minimum(least, mine), torch.maximum(most, mine)

    def take(self, index: Tensor | slice) -> Spot:
        """Return the spot of some of the examples."""
        base = (
            self.base
            if self.base.shape[:1] != self.active.shape[:1] or len(self.base) == 1
            else self.base[index]
        )
        return replace(self, base=base, active=self.active[index])


@dataclass(frozen=True)
class Nodes(Mechanisms):
    """Nodes of one target on one batch; a gate of zero replaces a node's current value by its
    reference value.

    part = current value - reference value, one for every (example, position), (example, position,
    head) or (example, position, neuron) of a site. F(ones) - F(gate at 0) is the *negative* of the
    indirect effect m(clean, do(a := reference)) - m(clean): see `Scores.indirect_effect`.

    Single nodes of causal language models are patched by computing again only what changes;
    `patching` says whether that applies, and `fast=False` keeps to the general rule, which needs
    nothing but the model."""

    spots: Mapping[str, Spot]
    reference: str = "counterfactual"
    fast: bool = True

    kind = "nodes"

    @cached_property
    def groups(self) -> Mapping[str, Group]:
        return {
            name: Group(name, (spot.ref.site,), spot.shape) for name, spot in self.spots.items()
        }

    @cached_property
    def sites(self) -> dict[str, list[str]]:
        return super().sites

    def parts(self, site: str, seen: Seen) -> Mapping[str, Parts]:
        return {name: self.spots[name].parts(seen.value) for name in self.sites[site]}

    def describe(self, group: str, index: tuple[int, ...]) -> str:
        spot = self.spots[group]
        places = spot.active.ndim - 1
        labels = ["pos"] if places == 1 else [f"axis {axis}" for axis in range(1, places + 1)]
        labels += [] if spot.columns is None else [spot.unit]
        inside = ", ".join(f"{label} {entry}" for label, entry in zip(labels, index, strict=True))
        return f"{group}[{inside}]" if inside else group

    def query_key_groups(self) -> dict[str, Projection]:
        found = families.find_family(self.target.model)
        if found is None:
            return {}
        return {
            name: Projection(
                "q" if name.endswith("_q") else "k",
                f"{found.blocks}.{spot.ref.layer}.{found.attention_module}",
                spot.ref.site,
            )
            for name, spot in self.spots.items()
            if name.endswith(("attn.hook_q", "attn.hook_k")) and spot.unit == "head"
        }

    @property
    def patching(self) -> str:
        """How single nodes are patched: "suffix only" (for which sites), or "general" and why."""
        if isinstance(self._suffix, str):
            return f"general: {self._suffix}"
        others = [
            name for name, spot in self.spots.items() if spot.ref.site not in self._suffix.sites
        ]
        return "suffix only" + (f"; general for {', '.join(others)}" if others else "")

    def ablate_rule(self, name: str, index: Tensor, budget: int | None = None) -> Tensor | None:
        return self._changed(name, index, lambda suffix, jobs: suffix.effects(jobs, budget))

    def slope_rule(
        self, name: str, index: Tensor, gate: float, budget: int | None = None
    ) -> Tensor | None:
        return self._changed(name, index, lambda suffix, jobs: suffix.slopes(jobs, gate, budget))

    def _changed(
        self, name: str, index: Tensor, measure: Callable[[Suffix, Jobs], Tensor]
    ) -> Tensor | None:
        """Return what is measured of runs with one changed part each, (rows, examples), None where
        they cannot start at the site.
        """
        spot, suffix = self.spots[name], self._suffix
        if isinstance(suffix, str) or spot.ref.site not in suffix.sites:
            return None
        difference = spot.difference(suffix.values[spot.ref.site])
        who, positions = (
            torch.arange(len(self.batch), device=index.device).expand(index.shape[:2]),
            index[..., 0],
        )
        if spot.columns is None:
            alive, columns = (difference != 0).any(-1)[who, positions], None
        else:
            alive = (difference[..., spot.columns] != 0).any(-1)[who, positions, index[..., 1]]
            columns = spot.columns[index[..., 1][alive]]
        who, positions = who[alive], positions[alive]

        def part(jobs: Tensor) -> Tensor:
            whole = pick(difference, who[jobs], positions[jobs])
            if columns is None:
                return whole
            return whole * torch.zeros_like(whole).scatter(1, columns[jobs], 1.0)

        found = torch.zeros(alive.shape, dtype=torch.float64, device=index.device)
        found[alive] = measure(suffix, Jobs(spot.ref.site, part, who, positions, columns))
        return found

    def values(self, gates: Gates | None = None, *, record: Record | None = None) -> Tensor:
        if not gates and isinstance(self.__dict__.get("_suffix"), Suffix):
            return self.__dict__[
                "_suffix"
            ].baseline.clone()  # the model's own run, which patching has made already
        return super().values(gates, record=record)

    @cached_property
    def _suffix(self) -> Suffix | str:
        if not self.fast:
            return "fast=False"
        with torch.no_grad():
            return plan(self.target, self.batch, list(self.sites))

    def references(self, data: Mechanisms) -> tuple[Nodes, dict[str, tuple[Tensor, Tensor]]]:
        spots, ends = dict[str, Spot](), dict[str, tuple[Tensor, Tensor]]()
        for name, spot in self.spots.items():
            other = data.spots.get(name) if isinstance(data, Nodes) else None
            if other is None or other.active.shape[1:] != spot.active.shape[1:]:
                raise InputError(
                    "references: nodes at the same sites and positions are needed; those of"
                    f" {name!r} differ"
                )
            ends[name] = other.hull(spot.base)
            active = spot.active | other.active.any(0)
            spots[name] = replace(spot, active=active)
        return replace(self, spots=spots), ends

    def with_references(self, values: Mapping[str, Tensor]) -> Nodes:
        spots = {
            name: replace(spot, base=values.get(name, spot.base))
            for name, spot in self.spots.items()
        }
        return replace(self, spots=spots)

    def follow(self, batch: Batch) -> Nodes:
        """Return the nodes on a text of another length; at new tokens there are nodes where the
        reference is zero.
        """
        length, zero = int(batch.inputs["input_ids"].shape[1]), self.reference == "zero"
        spots = {
            name: replace(
                spot,
                base=stretched(spot.base, length, 0),
                active=stretched(spot.active, length, zero),
            )
            for name, spot in self.spots.items()
        }
        return replace(self, batch=batch, spots=spots)

    def take(self, index: Tensor | slice) -> Nodes:
        """Return the nodes of some of the examples, with the reference values that were read for
        all of them.
        """
        spots = {name: spot.take(index) for name, spot in self.spots.items()}
        return replace(self, batch=self.batch.take(index), spots=spots)
