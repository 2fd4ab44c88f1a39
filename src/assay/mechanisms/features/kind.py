"""Dictionaries before they are bound to a batch: sites found by name, references read once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay.core.kind import Kind, Reference, ReferenceName
from assay.core.sites import resolve_site
from assay.core.target import Batch, Target
from assay.core.values import compact
from assay.dictionaries import Dictionary, DictionarySet, Placed
from assay.dictionaries.identity import Identity
from assay.dictionaries.objects import as_dictionaries
from assay.errors import InputError, unknown
from assay.io.files import require_finite
from assay.mechanisms.features.bound import CONVENTIONS, Base, FeatureParts, Spot
from assay.targets import names
from assay.targets.reading import (
    agrees,
    read_patched,
    read_values,
    real_positions,
    reference_value,
)

Convention = Literal["pass_through", "detached_error"]


@dataclass(frozen=True)
class Features(Kind):
    """Dictionaries that no batch is bound to, by a name of their own."""

    dictionaries: DictionarySet
    convention: Convention = "pass_through"

    name = "features"

    def bind(
        self, target: Target, batch: Batch, reference: Reference | None = None
    ) -> FeatureParts:
        """Return features and errors as gates on a batch; see `features`. Without a reference it is
        zero.
        """
        reference = reference or Reference("zero")
        self._require()
        dtype = torch.promote_types(next(target.model.parameters()).dtype, torch.float32)
        dictionaries = _Cast(self.dictionaries, dtype, target.device)
        resolved: dict[str, str] = {}
        spots = {
            name: _spot(target.model, self.dictionaries[name], resolved)
            for name in self.dictionaries
        }
        _refuse_overlap(spots)
        # A sum of two sites is read, and later gated, after its first summand.
        wanted = sorted(dict.fromkeys(resolved.values()), key=lambda site: "+" in site)
        values = read_values(target, batch, wanted, "the clean run's")
        for name, spot in spots.items():
            spots[name] = _checked(name, dictionaries[name], spot, values, dtype)
        patch = reference.batch
        others = values if patch is None else read_patched(target, batch, patch, values)
        mask = real_positions(batch if patch is None else patch)
        bases = {
            site: _base(value, others[site], mask, reference.name) for site, value in values.items()
        }
        means = {}
        if reference.name == "mean":
            for name, spot in spots.items():
                dictionary = dictionaries[name].dictionary
                means[name] = _mean_codes(dictionary, others[spot.reads].to(dtype), mask)
        names_of = {site: name for name, site in resolved.items()}
        written = {site for spot in spots.values() for site in spot.writes}
        errors = {site: f"{names_of[site]} error" for site in values if site in written}
        return FeatureParts(
            target,
            batch,
            dictionaries,
            spots,
            errors,
            bases,
            means,
            reference.name,
            self.convention,
        )

    def _require(self) -> None:
        if not isinstance(self.dictionaries, Mapping) or not self.dictionaries:
            raise InputError(
                "dictionaries must map names to placed dictionaries (assay.dictionaries.Placed), at"
                f" least one; got {type(self.dictionaries).__name__}"
            )
        if self.convention not in CONVENTIONS:
            raise unknown("convention", str(self.convention), CONVENTIONS)
        for name in self.dictionaries:
            if name.endswith((" error", " rest")):
                raise InputError(
                    f"dictionary {name!r}: names that end in ' error' or ' rest' are those of what"
                    " dictionaries leave"
                )


def features(
    target: Target,
    dictionaries: DictionarySet | Any,
    clean: Batch,
    patch: Batch | None = None,
    reference: ReferenceName = "counterfactual",
    *,
    convention: Convention = "pass_through",
) -> FeatureParts:
    """Bind the features of dictionaries, and the errors they leave, to a batch; an `SAE` object of
    SAELens, or several, may stand for the set.

    A dictionary named N has a group N of gates (examples, positions, features), and every site that
    dictionaries write has a group "SITE error" of gates (examples, positions). A gate of zero puts
    there the feature or error of the patch run at the same position ("counterfactual"), its mean
    over the examples of the patch run, or without one of the clean run ("mean"), or zero ("zero").
    Left out are padding, positions where clean and reference agree, and a first position that is
    the same in all examples.

    Raises InputError for unknown sites, for a dictionary of another width than its site, for two
    autoencoders at one site, and for a patch batch of another shape or padding."""
    known = as_dictionaries(dictionaries)
    return Features(known, convention).bind(target, clean, Reference(reference, patch))


def identities(target: Target, batch: Batch, sites: Sequence[str]) -> dict[str, Placed]:
    """Return identity dictionaries at sites, so that features are neurons and errors zero."""
    refs = {name: names.resolve(target.model, name).site for name in sites}
    values = read_values(target, batch.take(slice(0, 1)), list(dict.fromkeys(refs.values())), "the")
    return {
        name: Placed(Identity(values[site].shape[-1]), name, (name,)) for name, site in refs.items()
    }


class _Cast(Mapping[str, Placed]):
    """Dictionaries in the numbers of the network and on its device. Those that are so already stay
    as they are; of others a copy is made when they are asked for, and kept if the set itself holds
    its dictionaries.
    """

    def __init__(self, inner: DictionarySet, dtype: torch.dtype, device: torch.device):
        # A set in memory may get other dictionaries later; those that are bound stay.
        self.inner = dict(inner) if isinstance(inner, dict) else inner
        self.dtype, self.device = dtype, device
        self.copies: dict[str, Placed] = {}

    def __getitem__(self, name: str) -> Placed:
        if name in self.copies:
            return self.copies[name]
        placed = self.inner[name]
        weight = placed.dictionary.W_dec
        if weight.dtype == self.dtype and weight.device == self.device:
            return placed
        moved = copy.deepcopy(placed.dictionary).to(device=self.device, dtype=self.dtype)
        found = replace(placed, dictionary=moved)
        if isinstance(self.inner, dict):
            self.copies[name] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


def _spot(model: nn.Module, placed: Placed, resolved: dict[str, str]) -> Spot:
    for name in (placed.reads, *placed.writes):
        ref = names.resolve(model, name)
        if resolve_site(model, ref.site)[0].kind == "parameter":
            raise InputError(f"{ref.site!r} is a parameter; dictionaries stand at activations")
        if ref.kind == "head" and not name.endswith("hook_z"):
            raise InputError(
                f"{name!r} names the heads of a projection; a dictionary stands at a whole value,"
                f" such as the module {ref.site!r}"
            )
        resolved.setdefault(name, ref.site)
    dictionary = placed.dictionary
    return Spot(
        resolved[placed.reads],
        tuple(resolved[name] for name in placed.writes),
        dictionary.size,
        placed.width,
        rests=False,
    )


def _refuse_overlap(spots: Mapping[str, Spot]) -> None:
    owners: dict[str, str] = {}
    for name, spot in spots.items():
        if not spot.apart:
            other = owners.setdefault(spot.reads, name)
            if other != name:
                raise InputError(
                    f"{other!r} and {name!r} both rebuild the value at {spot.reads!r}; bind one of"
                    " them"
                )
    for name, spot in spots.items():
        for other, beside in spots.items():
            if spot.apart and spot.reads in beside.writes:
                raise InputError(
                    f"{name!r} reads at {spot.reads!r}, where {other!r} writes: gates there would"
                    " not reach what it reads; bind them apart"
                )


@torch.no_grad()
def _checked(
    name: str, placed: Placed, spot: Spot, values: Mapping[str, Tensor], dtype: torch.dtype
) -> Spot:
    """Return the spot with what only the dictionary says; InputError where it does not fit."""
    _require_widths(name, placed, spot, values)
    for key, tensor in placed.dictionary.state_dict().items():
        require_finite(tensor, f"{key} of the dictionary {name!r}")
    some = values[spot.reads][:1].to(dtype)
    # A rest with positions depends on what is read.
    return replace(spot, rests=placed.dictionary.rest(some).ndim > 1)


def _require_widths(name: str, placed: Placed, spot: Spot, values: Mapping[str, Tensor]) -> None:
    wanted = [(spot.reads, placed.dictionary.d_in), *((site, spot.width) for site in spot.writes)]
    for site, width in wanted:
        if values[site].shape[-1] != width:
            raise InputError(
                f"dictionary {name!r} is for vectors of width {width}, and the value at {site!r}"
                f" has width {values[site].shape[-1]}: it belongs to another site or model"
            )
    places = {tuple(values[site].shape[:-1]) for site in (spot.reads, *spot.writes)}
    if len(places) > 1:
        raise InputError(
            f"dictionary {name!r} reads and writes values with other positions: {sorted(places)}"
        )


def _base(value: Tensor, other: Tensor, mask: Tensor | None, reference: ReferenceName) -> Base:
    if reference == "zero":
        base, active = None, torch.ones(value.shape[:-1], dtype=torch.bool, device=value.device)
    else:
        base = reference_value(other, mask, reference)
        active = ~agrees(value, base)
    if mask is not None and mask.shape == value.shape[:2]:
        active &= mask.reshape(*mask.shape, *[1] * (active.ndim - 2))
    if active.ndim > 1 and len(value) > 1 and bool(agrees(value[:, 0], value[:1, 0]).all()):
        active[:, 0] = False  # a constant, such as that of the first token of every text
    return Base(base, active)


@torch.no_grad()
def _mean_codes(dictionary: Dictionary, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean features over examples at every position, (1, *positions, features)."""
    total = torch.zeros(*values.shape[1:-1], dictionary.size, dtype=torch.float64)
    total = total.to(values.device)
    known = mask is not None and mask.shape == values.shape[:2]
    for example in range(len(values)):
        codes = dictionary.encode(values[example]).double()
        if known:
            assert mask is not None
            codes = codes * mask[example].reshape(-1, *[1] * (codes.ndim - 1))
        total += codes
    if known:
        assert mask is not None
        count = mask.sum(0).clamp_min(1).reshape(-1, *[1] * (total.ndim - 1))
    return compact((total / (count if known else len(values)))[None].to(values.dtype))
