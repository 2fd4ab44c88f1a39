"""Components bound to a batch: gates on weight sites, with boxes [importance, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from assay.core.mechanisms import Mechanisms
from assay.core.parts import Atoms, Group, Parts, Whole
from assay.core.sites import Seen
from assay.core.target import Batch, Target
from assay.core.versions import Held
from assay.errors import InputError
from assay.io.files import require_finite
from assay.mechanisms.components.decomposition import Decomposition, require_importances
from assay.mechanisms.components.sites import (
    Use,
    WeightSite,
    matrix_of,
    read_inner,
    read_uses,
    written_by,
)

DELTA = ".delta"


@dataclass(frozen=True)
class ComponentMechanisms(Mechanisms):
    """Rank-one components and delta parts of weight matrices on a batch.

    A site has two groups of gates: under its name one gate per example, position and component,
    `part_c = (x V_c) U_c`, and under `NAME.delta` one per example and position, `x (W - V U)`.
    Tied matrices are one site whose gates act at all its uses. Biases are not parts. Positions that
    are not `routed` have zero parts: nothing moves them. An adversary may set a component anywhere
    between its importance and one, and the delta part anywhere."""

    found: Decomposition
    importance: Mapping[str, Float[Tensor, "examples ..."]]
    routed: Bool[Tensor, "examples ..."] | None = None

    kind = "components"

    def held(self) -> Mapping[str, Held]:
        return {"the decomposition": self.found}

    @cached_property
    def groups(self) -> Mapping[str, Group]:
        groups = {}
        for site in self.found.sites:
            paths = tuple(use.path for use in site.uses)
            shape = tuple(self.importance[site.name].shape)
            groups[site.name] = Group(site.name, paths, shape)
            groups[site.name + DELTA] = Group(site.name + DELTA, paths, shape[:-1])
        return groups

    def parts(self, site: str, seen: Seen) -> Mapping[str, Parts]:
        owner, use = self._uses[site]
        module = self.target.model.get_submodule(site)
        v, u = (entry.detach() for entry in self.found.factors(owner.name))
        v, u = (u.T, v.T) if use.transposed else (v, u)
        inner = read_inner(use, seen, v)
        rest = written_by(module, seen) - inner @ u.to(inner.dtype)
        if self.routed is not None:
            inner, rest = inner * self.routed.unsqueeze(-1), rest * self.routed.unsqueeze(-1)
        gates, delta = self.groups[owner.name], self.groups[owner.name + DELTA]
        return {
            owner.name: Atoms(inner, u, gates.shape),
            owner.name + DELTA: Whole(rest, delta.shape, tuple(rest.shape)),
        }

    def box(self, name: str) -> tuple[Tensor, Tensor]:
        ones = self.ones([name])[name]
        site = name.removesuffix(DELTA)
        low = torch.zeros_like(ones) if site != name else self.importance[site].to(ones)
        if self.routed is not None:
            routed = self.routed if site != name else self.routed.unsqueeze(-1)
            low = torch.where(routed, low, ones)
        return low, ones

    def take(self, index: Tensor | slice) -> ComponentMechanisms:
        return replace(
            self,
            batch=self.batch.take(index),
            importance={name: entry[index] for name, entry in self.importance.items()},
            routed=None if self.routed is None else self.routed[index],
        )

    def describe(self, group: str, index: tuple[int, ...]) -> str:
        component = [] if group.endswith(DELTA) else [f"component {index[-1]}"]
        places = index if group.endswith(DELTA) else index[:-1]
        inside = ", ".join([*(f"pos {place}" for place in places), *component])
        return f"{group}[{inside}]"

    @property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """The sites whose matrix further modules share, with their paths."""
        return {site.name: site.tied for site in self.found.sites if site.tied}

    @cached_property
    def _uses(self) -> dict[str, tuple[WeightSite, Use]]:
        return {use.path: (site, use) for site in self.found.sites for use in site.uses}


def components(
    target: Target,
    batch: Batch,
    found: Decomposition,
    *,
    routed: Bool[Tensor, "examples ..."] | None = None,
) -> ComponentMechanisms:
    """Bind a decomposition to a batch; the importances are read there, once.

    `routed` says at which positions the components are gated, by default at all that the batch's
    attention mask keeps. Raises InputError when a matrix has another shape than its factors, when
    uses of a tied matrix see different positions, for importances or factors that are NaN or have
    another shape, and for a mask of another shape."""
    _check_shapes(target, found)
    for name, entry in found.state_dict().items():
        require_finite(entry, f"{name} of the decomposition")
    seen = read_uses(target.model, batch.inputs, found.sites)
    importance = found.importances(target.model, batch.inputs)
    require_importances(found.sites, importance, {name: seen[name].input for name in importance})
    for site in found.sites:
        shape = importance[site.name].shape[:-1]
        for use in site.uses:
            other = seen[use.path].written.shape[:-1]
            if other != shape:
                raise InputError(
                    f"{site.name!r} and {use.path!r} share one matrix but see positions"
                    f" {tuple(shape)} and {tuple(other)}; gates could not act at both"
                )
        if routed is not None and (routed.shape != shape or routed.dtype != torch.bool):
            raise InputError(
                f"routed has shape {tuple(routed.shape)} and type {routed.dtype}; {site.name!r} has"
                f" positions {tuple(shape)}, each of which is routed or not (torch.bool)"
            )
    if routed is None:
        routed = _kept(batch, [entry.shape[:-1] for entry in importance.values()])
    return ComponentMechanisms(target, batch, found, importance, routed)


def _check_shapes(target: Target, found: Decomposition) -> None:
    modules = dict(target.model.named_modules(remove_duplicate=False))
    for site in found.sites:
        module = modules.get(site.name)
        if module is None or not hasattr(module, "weight"):
            raise InputError(f"the model has no layer {site.name!r}, which was taken apart")
        shape = tuple(matrix_of(module).shape)
        if shape != (site.inputs, site.outputs):
            raise InputError(
                f"the matrix of {site.name!r} is {shape} in the model and"
                f" {(site.inputs, site.outputs)} in the decomposition"
            )


def _kept(batch: Batch, shapes: list[torch.Size]) -> Tensor | None:
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
    if isinstance(mask, Tensor) and all(mask.shape == shape for shape in shapes):
        return None if bool(mask.all()) else mask.bool()
    return None
