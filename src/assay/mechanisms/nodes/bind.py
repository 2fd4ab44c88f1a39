"""Nodes bound to a batch: sites found by name, reference values read once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.core.kind import Kind, Reference, ReferenceName
from assay.core.sites import resolve_site
from assay.core.target import Batch, Target
from assay.errors import InputError, unknown
from assay.mechanisms.nodes.kind import Nodes, Spot
from assay.targets import names
from assay.targets.reading import (
    agrees,
    read_patched,
    read_values,
    real_positions,
    reference_value,
)


@dataclass(frozen=True)
class NodeSites(Kind):
    """Nodes that no batch is bound to: the names of their sites, and those whose columns are gated
    one by one.
    """

    sites: Sequence[str]
    neurons: Iterable[str] = ()

    name = "nodes"

    def bind(self, target: Target, batch: Batch, reference: Reference | None = None) -> Nodes:
        """Return the nodes as gates on a batch; see `nodes`. Without a reference it is zero."""
        reference = reference or Reference("zero")
        refs = self._resolve(target)
        # A sum of two sites is written at the first of them and must see that one's own edit: it
        # is read, and later gated, after it.
        wanted = sorted({ref.site for ref in refs.values()}, key=lambda site: "+" in site)
        values = read_values(target, batch, wanted, "the clean run's")
        mask, patch = real_positions(batch), reference.batch
        others = values if patch is None else read_patched(target, batch, patch, values)
        found = {}
        for site, value in values.items():  # in the order in which the network reaches them
            base = reference_value(others[site], mask, reference.name)
            for name, ref in refs.items():
                if ref.site == site:
                    neuron = name in set(self.neurons) or ref.kind == "neurons"
                    found[name] = _spot(name, ref, value, base, mask, neuron=neuron)
        _refuse_overlap(found)
        return Nodes(target, batch, found, reference.name)

    def _resolve(self, target: Target) -> dict[str, names.SiteRef]:
        sites = self.sites
        if isinstance(sites, str) or not sites:
            raise InputError(f"sites must be a list of at least one site name, got {sites!r}")
        refs = {name: names.resolve(target.model, name) for name in sites}
        if len(refs) < len(sites):
            twice = sorted({name for name in sites if list(sites).count(name) > 1})
            raise InputError(f"sites are named twice: {', '.join(twice)}")
        for ref in refs.values():
            place = resolve_site(target.model, ref.site)[0]
            if ref.kind == "module" and place.kind == "parameter":
                raise InputError(
                    f"{ref.site!r} is a parameter; nodes are activations: name a module"
                )
        for name in self.neurons:
            if name not in refs:
                raise unknown("site in neurons", name, refs)
            if refs[name].kind == "head":
                raise InputError(
                    f"{name!r} names heads; for its single columns name the module instead,"
                    f" {refs[name].site!r}"
                )
        return refs


def nodes(
    target: Target,
    clean: Batch,
    patch: Batch | None = None,
    sites: Sequence[str] = (),
    reference: ReferenceName = "counterfactual",
    *,
    neurons: Iterable[str] = (),
) -> Nodes:
    """Bind the nodes at named sites to a batch; one group of gates a site, named as it was asked
    for.

    `sites` are TransformerLens names or module paths. Names of heads (`attn.hook_q|k|v|z`) get
    gates (examples, positions, heads), names of neurons (`mlp.hook_pre|post`) and sites listed in
    `neurons` one gate per column, all others one gate per vector. A gate of zero puts there the
    value of the patch run ("counterfactual", at the same position), the mean of the patch run (or,
    without one, of the clean run) over the examples at the same position ("mean"), or zero
    ("zero"). All are read once, here. Padding (attention mask 0) and positions where clean and
    reference agree have zero parts.

    Raises InputError for unknown sites (with the nearest names), for two names of the same value,
    for a patch batch of another shape or padding, and for activations that are NaN or infinite."""
    return NodeSites(sites, tuple(neurons)).bind(target, clean, Reference(reference, patch))


def _spot(
    name: str, ref: names.SiteRef, value: Tensor, base: Tensor, mask: Tensor | None, *, neuron: bool
) -> Spot:
    active = ~agrees(value, base)
    if mask is not None and mask.shape == value.shape[:2]:
        active &= mask.reshape(*mask.shape, *[1] * (active.ndim - 2))
    width = value.shape[-1]
    if ref.heads is not None:
        return Spot(ref, base, active, width, "head", ref.columns().to(value.device))
    if neuron:
        return Spot(
            ref, base, active, width, "neuron", torch.arange(width, device=value.device)[:, None]
        )
    return Spot(ref, base, active, width, "vector")


def _refuse_overlap(spots: Mapping[str, Spot]) -> None:
    owners: dict[tuple[str, int], str] = {}
    sites = [spot.ref.site for spot in spots.values()]
    for name, spot in spots.items():
        if sites.count(spot.ref.site) == 1:
            continue
        for column in (
            range(spot.width) if spot.columns is None else spot.columns.flatten().tolist()
        ):
            other = owners.setdefault((spot.ref.site, column), name)
            if other != name:
                raise InputError(
                    f"{other!r} and {name!r} name the same value, {spot.ref.site!r}; gates there"
                    " would be applied twice"
                )
