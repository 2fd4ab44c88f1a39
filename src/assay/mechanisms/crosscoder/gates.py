"""Crosscoder features bound to a batch: three rules of where a feature's gate acts, one type
each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from assay.core.mechanisms import Change, Mechanisms
from assay.core.parts import Atoms, Group, Parts, Whole
from assay.core.sites import Edit, Seen
from assay.core.target import Batch
from assay.core.versions import Held
from assay.mechanisms.crosscoder.coder import Crosscoder
from assay.mechanisms.crosscoder.states import read_codes, residual_states

FEATURES = "features"
ERROR = "error:"


@dataclass(frozen=True)
class CrosscoderMechanisms(Mechanisms):
    """Features of a crosscoder and one error part per layer, with the codes of the clean run.

    `codes` (examples, *positions, size) and `clean` (examples, *positions, layers, width) were read
    when the kind was bound: a feature reads all layers, so no single forward pass could read it
    before it acts. The base is the biases. The gate rule is the type: `FirstGates`,
    `EverywhereGates` or `ClampedGates`."""

    found: Crosscoder
    codes: Float[Tensor, "examples ..."]
    clean: Float[Tensor, "examples ..."]

    kind = "crosscoder"
    rule: ClassVar[str]

    @property
    @abstractmethod
    def atoms(self) -> Float[Tensor, "layers size width"]:
        """What every feature's gate adds at every layer, per unit of its code."""

    @abstractmethod
    def error(self, layer: int, seen: Seen) -> Float[Tensor, "examples ..."]:
        """Return the error part of a layer, given what is seen there now."""

    error_is_fixed: ClassVar[bool] = True

    def held(self) -> Mapping[str, Held]:
        return {"the crosscoder": self.found}

    @cached_property
    def groups(self) -> Mapping[str, Group]:
        acting = self.atoms.abs().amax((1, 2)) > 0
        sites = tuple(
            site for site, acts in zip(self.found.sites, acting.tolist(), strict=True) if acts
        )
        shape = tuple(self.codes.shape)
        groups = {FEATURES: Group(FEATURES, sites or self.found.sites[:1], shape, fixed=True)}
        for site in self.found.sites:
            name = ERROR + site
            groups[name] = Group(name, (site,), shape[:-1], fixed=self.error_is_fixed)
        return groups

    def parts(self, site: str, seen: Seen) -> Mapping[str, Parts]:
        layer = self.found.sites.index(site)
        error = self.error(layer, seen)
        name = ERROR + site
        parts: dict[str, Parts] = {}
        if site in self.groups[FEATURES].sites:
            shape = self.groups[FEATURES].shape
            parts[FEATURES] = Atoms(self.codes, self.atoms[layer], shape)
        parts[name] = Whole(error, self.groups[name].shape, tuple(error.shape))
        return parts

    @property
    def feature_groups(self) -> tuple[str, ...]:
        return (FEATURES,)

    def activations(self, name: str, site: str, seen: Seen, which: Tensor) -> tuple[Tensor, Tensor]:
        return self.codes[..., which], self.atoms[self.found.sites.index(site)][which]

    def rebuilt(self, layer: int) -> Tensor:
        """Return `rhat_l`, what the codes rebuild at a layer."""
        decoder = self.found.W_dec.detach()[:, layer].to(self.codes)
        return self.codes @ decoder + self.found.b_dec.detach()[layer].to(self.codes)

    def follow(self, batch: Batch) -> CrosscoderMechanisms:
        """Return the mechanisms on another text, whose own clean run gives states and codes."""
        states = residual_states(self.target.model, batch.inputs, self.found.sites)
        return replace(self, batch=batch, codes=read_codes(self.found, states), clean=states)

    def take(self, index: Tensor | slice) -> CrosscoderMechanisms:
        batch = self.batch.take(index)
        return replace(self, batch=batch, codes=self.codes[index], clean=self.clean[index])

    def describe(self, group: str, index: tuple[int, ...]) -> str:
        feature = [f"feature {index[-1]}"] if group == FEATURES else []
        places = index[:-1] if group == FEATURES else index
        inside = ", ".join([*(f"pos {place}" for place in places), *feature])
        return f"{group}[{inside}]" if inside else group


@dataclass(frozen=True)
class FirstGates(CrosscoderMechanisms):
    """A feature's gate acts at the first layer at which its decoder's norm reaches `share` of its
    largest; the network carries the change on.

    In the same way the error part of a layer is what is new there: `(r_l - rhat_l) - (r_{l-1} -
    rhat_{l-1})`. Acting at every layer would count what persists once per layer."""

    share: float = 0.1

    rule = "first"

    @cached_property
    def atoms(self) -> Tensor:
        decoder = self.found.W_dec.detach().transpose(0, 1).to(self.codes)
        first = self.found.first_layers(self.share)
        here = torch.arange(len(decoder), device=first.device)[:, None] == first
        return decoder * here.unsqueeze(-1)

    def error(self, layer: int, seen: Seen) -> Tensor:
        error = self.clean[..., layer, :] - self.rebuilt(layer)
        if layer:
            error = error - (self.clean[..., layer - 1, :] - self.rebuilt(layer - 1))
        return error


@dataclass(frozen=True)
class EverywhereGates(CrosscoderMechanisms):
    """A feature's gate acts at every layer, on top of what earlier layers carry on; the error part
    of a layer is the rest of its current value, so that all gates at zero leave the biases.
    """

    rule = "everywhere"
    error_is_fixed = False

    @cached_property
    def atoms(self) -> Tensor:
        return self.found.W_dec.detach().transpose(0, 1).to(self.codes)

    def error(self, layer: int, seen: Seen) -> Tensor:
        return seen.value - self.rebuilt(layer)


@dataclass(frozen=True)
class ClampedGates(CrosscoderMechanisms):
    """Every layer holds its clean state plus the gated parts, whatever earlier layers carry on: the
    rule of proofs that go layer by layer.
    """

    rule = "clamp"

    @cached_property
    def atoms(self) -> Tensor:
        return self.found.W_dec.detach().transpose(0, 1).to(self.codes)

    def error(self, layer: int, seen: Seen) -> Tensor:
        return self.clean[..., layer, :] - self.rebuilt(layer)

    def edits_of(self, names: Iterable[str], change: Change) -> dict[str, Edit]:
        def clamped(site: str, seen: Seen) -> Tensor:
            clean = self._clean_at(site)
            return change(site, replace(seen, value=clean, written=clean))

        # A layer without gates of its own is held too: changes before it end there.
        held = {site: self._hold(site) for site in self.found.sites}
        return held | super().edits_of(names, clamped)

    def _hold(self, site: str) -> Edit:
        return lambda seen: self._clean_at(site)

    def _clean_at(self, site: str) -> Tensor:
        return self.clean[..., self.found.sites.index(site), :]
