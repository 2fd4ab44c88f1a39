"""Features and errors bound to a batch: gates between what is there now and a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from assay.core.mechanisms import Change, Mechanisms
from assay.core.parts import Atoms, Group, Parts, Whole
from assay.core.sites import Edit, Seen, read_sites
from assay.core.target import Batch
from assay.core.values import DENSE, compact, dense
from assay.core.versions import Held
from assay.dictionaries import Dictionary, DictionarySet
from assay.mechanisms.features.codes import SparseAtoms, sparse_codes
from assay.mechanisms.features.slopes import slopes_in_read
from assay.targets.reading import stretched
from assay.targets.suffix import Jobs, Suffix, pick
from assay.targets.suffix_plan import plan

CONVENTIONS = ("pass_through", "detached_error")


@dataclass(frozen=True)
class Spot:
    """Where a dictionary stands: the resolved sites that it reads and writes, its number of
    features and the width of each site that it writes.

    `rests` says that a part of what it rebuilds depends on what it reads and passes through no
    feature."""

    reads: str
    writes: tuple[str, ...]
    size: int
    width: int
    rests: bool

    @property
    def apart(self) -> bool:
        """Whether it reads elsewhere than it writes, as a transcoder does."""
        return self.writes != (self.reads,)

    def columns(self, site: str) -> slice:
        """Return the columns of the decoder that write at a site."""
        first = self.writes.index(site) * self.width
        return slice(first, first + self.width)


@dataclass(frozen=True)
class Base:
    """What a gate of zero puts at a site: `value` broadcasts to the site's value, None for the
    rebuilt zero; `active` (examples, *positions) is false at padding and where nothing differs.
    """

    value: Tensor | None
    active: Tensor

    def take(self, index: Tensor | slice) -> Base:
        """Return the base of some of the examples."""
        value = self.value
        if value is not None and len(value) == len(self.active) and len(value) > 1:
            value = value[index]
        return Base(value, self.active[index])

    def stretch(self, length: int, active: bool) -> Base:
        """Return the base at another number of positions, active at new ones or not."""
        value = None if self.value is None else stretched(self.value, length, 0)
        return Base(value, stretched(self.active, length, active))


@dataclass(frozen=True)
class FeatureParts(Mechanisms):
    """Dictionary features and error nodes of one target on one batch (arXiv 2403.19647).

    At a site with value x, a dictionary's features f = enc(x) and what is left, r = x - xhat:
    part = (f_k - f'_k) W_dec[k] of every (example, position, feature), and r - r' of every
    (example, position); f' and r' are those of the reference. A transcoder reads elsewhere than it
    writes, a cross-layer transcoder writes at several sites. What a skip connection or the norm of
    a normalised dictionary carries is a group of its own, "NAME rest". Written sites have one error
    each, whichever dictionaries write there.

    Parts are computed from the current activations and dictionaries are read one site at a time:
    `dictionaries` may be any mapping, also one that loads from files. `convention` says how
    gradients pass a site: "pass_through" as in the network, "detached_error" through encoder and
    decoder only, with r held constant; it changes no value. Sheet: features."""

    dictionaries: DictionarySet
    spots: Mapping[str, Spot]
    errors: Mapping[str, str]
    bases: Mapping[str, Base]
    means: Mapping[str, Tensor]
    reference: str = "counterfactual"
    convention: str = "pass_through"
    fast: bool = True
    chosen: tuple[str, ...] | None = None

    kind = "features"

    def held(self) -> Mapping[str, Held]:
        known = getattr(self.dictionaries, "inner", self.dictionaries)
        if not isinstance(known, dict):
            return {}  # read anew every time it is asked
        return {f"the dictionary {name!r}": one.dictionary for name, one in known.items()}

    @cached_property
    def groups(self) -> Mapping[str, Group]:
        found: dict[str, Group] = {}
        for site, error in self.errors.items():
            here = {name: spot for name, spot in self.spots.items() if site in spot.writes}
            places = tuple(self.bases[site].active.shape)
            for name, spot in here.items():
                reads: tuple[str, ...] = (spot.reads,) if spot.apart else ()
                if name not in found:
                    shape = (*self.bases[spot.reads].active.shape, spot.size)
                    found[name] = Group(name, spot.writes, shape, reads=reads)
                    if spot.rests:
                        rest = f"{name} rest"
                        found[rest] = Group(rest, spot.writes, shape[:-1], reads=reads)
            reads = tuple(dict.fromkeys(spot.reads for spot in here.values() if spot.apart))
            found[error] = Group(error, (site,), places, reads=reads)
        return {name: found[name] for name in found if self.chosen is None or name in self.chosen}

    def only(self, names: Iterable[str]) -> FeatureParts:
        """Return the same parts with gates for some of the groups alone; InputError for others."""
        chosen = tuple(names)
        for name in chosen:
            self.group(name)
        return replace(self, chosen=chosen)

    @cached_property
    def sites(self) -> dict[str, list[str]]:
        return super().sites

    def parts(self, site: str, seen: Seen) -> Mapping[str, Parts]:
        wide = torch.promote_types(seen.value.dtype, torch.float32)
        base = self.bases[site]
        rest = seen.value.to(wide)
        if base.value is not None:
            rest = rest - base.value.to(wide)
        found: dict[str, Parts] = {}
        for name, spot in self.spots.items():
            if site in spot.writes:
                dictionary = self.dictionaries[name].dictionary
                parts, rebuilt = self._features(name, site, seen, dictionary, wide)
                found |= parts
                rest = rest - rebuilt
        error = rest * base.active.unsqueeze(-1)
        found[self.errors[site]] = Whole(error, tuple(base.active.shape), tuple(error.shape))
        return {name: found[name] for name in self.sites[site]}

    def _features(
        self, name: str, site: str, seen: Seen, dictionary: Dictionary, wide: torch.dtype
    ) -> tuple[dict[str, Parts], Tensor]:
        """Return the parts of one dictionary at a site, and what they and its bias add up to."""
        spot, read = self.spots[name], self.bases[self.spots[name].reads]
        now = (seen.read(spot.reads) if spot.apart else seen).value.to(wide)
        columns = spot.columns(site)
        atoms = dictionary.W_dec[:, columns]
        shape = (*read.active.shape, spot.size)

        def codes(some: slice) -> Tensor:
            active = read.active[some]
            held = dictionary.encode(now[some])
            if read.value is not None and name in self.means:
                held = held - self.means[name].to_dense().to(wide)
            elif read.value is not None:
                base = read.value[some] if len(read.value) == len(now) else read.value
                held = held - dictionary.encode(base.to(wide))
            return held * active.unsqueeze(-1)

        large = torch.Size(shape).numel() > DENSE and not torch.is_grad_enabled() and _is_plain(now)
        parts: Parts
        if large:
            parts = sparse_codes(codes, atoms, shape)
            rebuilt = parts.add(torch.ones((), dtype=wide, device=now.device))
        else:
            held = codes(slice(None))
            parts, rebuilt = Atoms(held, atoms, shape), held @ atoms
        found: dict[str, Parts] = {name: parts}
        if read.value is None:
            rebuilt = rebuilt + dictionary.b_dec[columns]
        if spot.rests:
            carried = dictionary.rest(now)[..., columns]
            if read.value is None:
                carried = carried - dictionary.b_dec[columns]
            else:
                carried = carried - dictionary.rest(read.value.to(wide))[..., columns]
            carried = carried * read.active.unsqueeze(-1)
            found[f"{name} rest"] = Whole(carried, shape[:-1], tuple(carried.shape))
            rebuilt = rebuilt + carried
        return found, rebuilt

    @property
    def feature_groups(self) -> tuple[str, ...]:
        return tuple(name for name in self.spots if name in self.groups)

    def activations(self, name: str, site: str, seen: Seen, which: Tensor) -> tuple[Tensor, Tensor]:
        spot, dictionary = self.spots[name], self.dictionaries[name].dictionary
        value = (seen.read(spot.reads) if spot.apart else seen).value
        now = value.to(torch.promote_types(value.dtype, torch.float32))
        held = [dictionary.encode(one)[..., which] for one in now.split(1)]
        return torch.cat(held), dictionary.W_dec[which][:, spot.columns(site)]

    def edits_of(self, names: Iterable[str], change: Change) -> dict[str, Edit]:
        if self.convention == "pass_through":
            return super().edits_of(names, change)

        def spliced(site: str, seen: Seen) -> Tensor:
            return change(site, replace(seen, written=self._splice(site, seen)))

        return super().edits_of(names, spliced)

    def _splice(self, site: str, seen: Seen) -> Tensor:
        """Return what is written at a site, with the gradient of what dictionaries rebuild."""
        wide = torch.promote_types(seen.value.dtype, torch.float32)
        total = -seen.value.to(wide)
        for name, spot in self.spots.items():
            if site in spot.writes:
                now = (seen.read(spot.reads) if spot.apart else seen).value.to(wide)
                total = total + self.dictionaries[name].dictionary(now)[..., spot.columns(site)]
        shift = total - total.detach()  # zero in value
        return seen.written + shift.to(seen.written.dtype)

    def describe(self, group: str, index: tuple[int, ...]) -> str:
        positions = index[:-1] if group in self.spots else index
        words = [f"pos {entry}" for entry in positions]
        words += [f"feature {index[-1]}"] if group in self.spots else []
        return f"{group}[{', '.join(words)}]" if words else group

    @property
    def patching(self) -> str:
        """How single parts are patched: "suffix only" (for which sites), or "general" and why."""
        if isinstance(self._suffix, str):
            return f"general: {self._suffix}"
        fast = self._suffix.sites
        others = [name for name, group in self.groups.items() if set(group.sites) - set(fast)]
        others += [name for name, group in self.groups.items() if len(group.sites) > 1]
        others = list(dict.fromkeys(others))
        return "suffix only" + (f"; general for {', '.join(others)}" if others else "")

    def ablate_rule(self, name: str, index: Tensor, budget: int | None = None) -> Tensor | None:
        return self._changed(name, index, lambda suffix, jobs: suffix.effects(jobs, budget))

    def slope_rule(
        self, name: str, index: Tensor, gate: float, budget: int | None = None
    ) -> Tensor | None:
        return self._changed(name, index, lambda suffix, jobs: suffix.slopes(jobs, gate, budget))

    def slope_in_read(
        self,
        name: str,
        index: Tensor,
        gradients: Mapping[str, Tensor],
        clean: Mapping[str, Seen],
        switches: str = "local",
    ) -> Mapping[str, Tensor] | None:
        return slopes_in_read(self, name, index, gradients, clean, switches)

    @torch.no_grad()
    def _changed(
        self, name: str, index: Tensor, measure: Callable[[Suffix, Jobs], Tensor]
    ) -> Tensor | None:
        """Return what is measured of runs x := x - delta W_dec[k] with one changed part each,
        (rows, examples), None where they cannot start at the site.
        """
        sites, suffix = self.group(name).sites, self._suffix
        if isinstance(suffix, str) or len(sites) > 1 or sites[0] not in suffix.sites:
            return None
        (site,) = sites
        parts = self.parts(site, replace(self._clean[site], earlier=self._clean))[name]
        who = torch.arange(len(self.batch), device=index.device).expand(index.shape[:2])
        positions, dtype = index[..., 0], suffix.values[site].dtype
        if isinstance(parts, Whole):
            vectors = parts.vectors.to(dtype)
            alive = (vectors != 0).any(-1)[who, positions]
            chosen = who[alive], positions[alive]

            def part(jobs: Tensor) -> Tensor:
                return pick(vectors, chosen[0][jobs], chosen[1][jobs])

        else:
            assert isinstance(parts, Atoms | SparseAtoms)
            if isinstance(parts, Atoms):
                held = parts.coefficients[who, positions, index[..., 1]]
            else:
                held = parts.coefficients(index)
            alive = held != 0
            held, which, atoms = held[alive][:, None], index[..., 1][alive], parts.atoms
            chosen = who[alive], positions[alive]

            def part(jobs: Tensor) -> Tensor:
                return (held[jobs] * atoms[which[jobs]]).to(dtype)

        found = torch.zeros(alive.shape, dtype=torch.float64, device=index.device)
        found[alive] = measure(suffix, Jobs(site, part, *chosen))
        return found

    @cached_property
    def _clean(self) -> Mapping[str, Seen]:
        """What every site sees in the untouched network."""
        return read_sites(self.target.model, self.batch.inputs, self.touched(self.groups))

    @cached_property
    def _suffix(self) -> Suffix | str:
        if not self.fast:
            return "fast=False"
        flat = [site for site in self.sites if self.bases[site].active.ndim == 2]
        if not flat:
            return "no site has one vector a position"
        with torch.no_grad():
            return plan(self.target, self.batch, flat)

    def follow(self, batch: Batch) -> FeatureParts:
        """Return the parts on a text of another length; at new tokens there are parts where the
        reference is zero.
        """
        length, zero = int(batch.inputs["input_ids"].shape[1]), self.reference == "zero"
        bases = {site: base.stretch(length, zero) for site, base in self.bases.items()}
        means = {
            name: compact(stretched(dense(mean), length, 0)) for name, mean in self.means.items()
        }
        return replace(self, batch=batch, bases=bases, means=means)

    def in_memory(self) -> FeatureParts:
        return replace(self, dictionaries=dict(self.dictionaries))

    def take(self, index: Tensor | slice) -> FeatureParts:
        """Return the parts of some of the examples, with the references that were read for all."""
        bases = {site: base.take(index) for site, base in self.bases.items()}
        return replace(self, batch=self.batch.take(index), bases=bases)


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor is outside functional transforms, whose values no size may depend on."""
    return not torch._C._functorch.is_functorch_wrapped_tensor(value)
