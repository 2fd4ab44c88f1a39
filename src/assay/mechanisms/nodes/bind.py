"""Nodes bound to a batch: sites found by name, reference values read once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.core.kind import Kind, Reference, ReferenceName
from assay.core.sites import read_sites, resolve_site
from assay.core.target import Batch, Target
from assay.errors import InputError, unknown
from assay.io.files import require_finite
from assay.mechanisms.nodes.kind import Nodes, Spot
from assay.targets import names


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
        values = _values(target, batch, wanted, "the clean run's")
        mask, patch = _mask(batch), reference.batch
        others = values if patch is None else _patched(target, batch, patch, values)
        found = {}
        for site, value in values.items():  # in the order in which the network reaches them
            base = _base(others[site], mask, reference.name)
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


def _values(target: Target, batch: Batch, sites: Sequence[str], what: str) -> dict[str, Tensor]:
    values, examples = {}, len(batch)
    for site, seen in read_sites(target.model, batch.inputs, sites).items():
        if (
            not seen.value.sum().isfinite()
        ):  # one cheap pass; the exact count only where something is wrong
            require_finite(seen.value, f"{what} activation at {site!r}")
        if seen.value.ndim < 2 or len(seen.value) != examples:
            raise InputError(
                f"the value at {site!r} has shape {tuple(seen.value.shape)}; a node needs"
                f" (examples, ..., width) with {examples} examples"
            )
        values[site] = seen.value
    return values


def _patched(
    target: Target, clean: Batch, patch: Batch, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    ours, theirs = _mask(clean), _mask(patch)
    if len(clean) != len(patch):
        raise InputError(
            f"clean has {len(clean)} examples and patch {len(patch)}; they must be paired"
        )
    if (
        ours is not None
        and theirs is not None
        and (ours.shape != theirs.shape or not torch.equal(ours, theirs))
    ):
        raise InputError(
            "clean and patch prompts must be of equal length, example by example: their attention"
            " masks differ"
        )
    others = _values(target, patch, list(values), "the patch run's")
    for site, value in values.items():
        if others[site].shape != value.shape:
            came, wanted = tuple(others[site].shape), tuple(value.shape)
            raise InputError(
                f"the patch run's value at {site!r} has shape {came}, the clean run's {wanted};"
                " they must be equal"
            )
    return others


def _mask(batch: Batch) -> Tensor | None:
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _base(value: Tensor, mask: Tensor | None, reference: ReferenceName) -> Tensor:
    match reference:
        case "zero":
            return torch.zeros_like(value[:1])
        case "mean":
            wide = value.double()
            if mask is None or mask.shape != value.shape[:2]:
                return wide.mean(0, keepdim=True).to(value.dtype)
            weights = mask.double().reshape(*mask.shape, *[1] * (value.ndim - 2))
            return (
                (wide * weights).sum(0, keepdim=True) / weights.sum(0, keepdim=True).clamp_min(1)
            ).to(value.dtype)
        case "counterfactual":
            return value


def _spot(
    name: str, ref: names.SiteRef, value: Tensor, base: Tensor, mask: Tensor | None, *, neuron: bool
) -> Spot:
    # Two runs agree where they differ by no more than rounding: a part of rounding errors would
    # count as an active node.
    distance, size = (value - base).abs().amax(-1), value.abs().amax(-1)
    active = distance > 8 * torch.finfo(value.dtype).eps * size
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
