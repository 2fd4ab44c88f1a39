"""Nodes: neurons, heads, MLPs and residual streams of any network, gated between what is there
now and a reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from assay.core.mechanisms import Mechanisms, Projection
from assay.core.parts import Gates, Group, Parts, Whole
from assay.core.sites import Record, Seen, read_sites, resolve_site
from assay.core.target import Batch, Target
from assay.errors import InputError, unknown
from assay.io.files import require_finite
from assay.mechanisms.nodes.parts import Columns
from assay.mechanisms.nodes.suffix import Suffix, plan
from assay.targets import names

Reference = Literal["counterfactual", "zero", "mean"]


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
        found = names.layout(self.target.model)
        if found is None:
            return {}
        attention = found.attention_projection.rsplit(".", 1)[0]
        return {
            name: Projection(
                "q" if name.endswith("_q") else "k",
                f"{found.blocks}.{spot.ref.layer}.{attention}",
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
        found = torch.zeros(alive.shape, dtype=torch.float64, device=index.device)
        found[alive] = suffix.effects(
            spot.ref.site, difference, who[alive], positions[alive], columns, budget
        )
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

    def take(self, index: Tensor | slice) -> Nodes:
        """Return the nodes of some of the examples, with the reference values that were read for
        all of them.
        """
        spots = {name: spot.take(index) for name, spot in self.spots.items()}
        return replace(self, batch=self.batch.take(index), spots=spots)


def nodes(
    target: Target,
    clean: Batch,
    patch: Batch | None = None,
    sites: Sequence[str] = (),
    reference: Reference = "counterfactual",
    *,
    neurons: Iterable[str] = (),
) -> Nodes:
    """Bind the nodes at named sites to a batch; one group of gates a site, named as it was asked
    for.

    `sites` are TransformerLens names or module paths. Names of heads (`attn.hook_q|k|v|z`) get
    gates (examples, positions, heads), names of neurons (`mlp.hook_pre|post`) and sites listed in
    `neurons` one gate a column, all others one gate a vector. A gate of zero puts there the value
    of the patch run ("counterfactual", at the same position), the mean of the patch run (or,
    without one, of the clean run) over the examples at the same position ("mean"), or zero
    ("zero"). All are read once, here. Padding (attention mask 0) and positions where clean and
    reference agree have zero parts.

    Raises InputError for unknown sites (with the nearest names), for two names of the same value,
    for a patch batch of another shape or padding, and for activations that are NaN or infinite."""
    if reference not in get_args(Reference):
        raise unknown("reference", str(reference), get_args(Reference))
    if reference == "counterfactual" and patch is None:
        raise InputError(
            "reference 'counterfactual' needs a patch batch; give patch=, or use reference='zero'"
            " or 'mean'"
        )
    if isinstance(sites, str) or not sites:
        raise InputError(f"sites must be a list of at least one site name, got {sites!r}")
    refs = {name: names.resolve(target.model, name) for name in sites}
    if len(refs) < len(sites):
        raise InputError(
            "sites are named twice:"
            f" {', '.join(sorted({name for name in sites if list(sites).count(name) > 1}))}"
        )
    for ref in refs.values():
        if ref.kind == "module" and resolve_site(target.model, ref.site)[0].kind == "parameter":
            raise InputError(f"{ref.site!r} is a parameter; nodes are activations: name a module")
    for name in neurons:
        if name not in refs:
            raise unknown("site in neurons", name, refs)
        if refs[name].kind == "head":
            raise InputError(
                f"{name!r} names heads; for its single columns name the module instead,"
                f" {refs[name].site!r}"
            )
    # A sum of two sites is written at the first of them and must see that one's own edit: it is
    # read, and later gated, after it.
    wanted = sorted({ref.site for ref in refs.values()}, key=lambda site: "+" in site)
    values = _values(target, clean, wanted, "the clean run's")
    mask = _mask(clean)
    others = values if patch is None else _patched(target, clean, patch, values)
    split = set(neurons)
    found = {}
    for site, value in values.items():  # in the order in which the network reaches them
        base = _base(others[site], mask, reference)
        for name, ref in refs.items():
            if ref.site == site:
                found[name] = _spot(
                    name, ref, value, base, mask, neuron=name in split or ref.kind == "neurons"
                )
    _refuse_overlap(found)
    return Nodes(target, clean, found, reference)


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


def _base(value: Tensor, mask: Tensor | None, reference: Reference) -> Tensor:
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
