"""What is lost downstream, exactly, when something that a node writes is removed: along every way,
and along the direct way alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from assay.core.sites import Edit, Seen, read_sites, record_outputs, run_edited
from assay.core.target import Batch, Target
from assay.memory import require_memory, rows_within
from assay.progress import progress

Carried = tuple[str, Callable[[Tensor], Tensor]]
"""A site that is read, and what is carried from there, without passing a node, to another one."""


@dataclass(frozen=True)
class Piece:
    """What one node writes: vectors (width,) in the values at some sites, at one position."""

    position: int
    vectors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Reading:
    """What one node reads: the product of a vector (width,) with the value at a site and a
    position.
    """

    site: str
    position: int
    vector: Tensor


@dataclass(frozen=True)
class Removed:
    """What outputs and readings lose without each piece, in float64: `total` (pieces, outputs) with
    everything downstream recomputed, `direct` (pieces, readings) and `straight` (pieces, outputs)
    with every held site at its clean value.
    """

    total: Float[Tensor, "pieces outputs"]
    direct: Float[Tensor, "pieces readings"]
    straight: Float[Tensor, "pieces outputs"]


@torch.no_grad()
def remove_pieces(
    target: Target,
    batch: Batch,
    pieces: Sequence[Piece],
    readings: Sequence[Reading],
    held: Mapping[str, Sequence[Carried]],
    outputs: Callable[[Any], Tensor],
    *,
    budget: int | None = None,
) -> Removed:
    """Remove one piece at a time from the run of one example, many side by side under a memory
    budget in bytes.

    total = outputs(clean) - outputs(value := value - piece). On the direct way the sites in `held`,
    those where nodes write, keep their clean values less the piece, so that it reaches outputs and
    readings through attention, norms and residual stream alone, none of them frozen; what a skip
    connection carries to a held site follows what it reads. `outputs` maps the network's output to
    (rows, outputs). Every run has a first row without any removal: batched rows differ from a
    single run by rounding. Raises InputError where what is found does not fit the memory."""
    model, inputs = target.model, batch.inputs
    require_memory(
        16 * len(pieces) * len(readings),
        f"effects of {len(pieces):,} nodes on {len(readings):,} readings",
    )
    sources = {site for piece in pieces for site in piece.vectors}
    carriers = {site for carried in held.values() for site, _ in carried}
    clean = {
        site: seen.value
        for site, seen in read_sites(model, inputs, sorted({*held, *carriers, *sources})).items()
    }
    size = record_outputs(model, inputs).size_from(model, ())
    chunk = rows_within(4 * size, budget, device=target.device)
    places = _by_site(readings)
    total, direct, straight = [], [], []
    for start in progress(range(0, len(pieces), chunk), "removing nodes"):
        some = pieces[start : start + chunk]
        count = len(some) + 1
        rows = tree_map(
            lambda leaf: leaf.repeat(count, *[1] * (leaf.ndim - 1)),
            inputs,
        )
        removals = {site: _removal(some, site, value) for site, value in clean.items()}
        live: dict[str, Edit] = {site: _remove(removals[site]) for site in sources}
        found = outputs(run_edited(model, rows, live)).double()
        total.append(found[0] - found[1:])
        run = _DirectRun(clean, removals, held, places, len(readings), count)
        found = outputs(run_edited(model, rows, run.edits(sources | carriers))).double()
        straight.append(found[0] - found[1:])
        direct.append(run.read[0] - run.read[1:])
    return Removed(*(torch.cat(found) for found in (total, direct, straight)))


class _DirectRun:
    """One pass with every held site at its clean value less what is removed there."""

    def __init__(
        self,
        clean: Mapping[str, Tensor],
        removals: Mapping[str, Tensor],
        held: Mapping[str, Sequence[Carried]],
        places: Mapping[str, Mapping[int, tuple[Tensor, Tensor]]],
        readings: int,
        rows: int,
    ):
        self.clean, self.removals, self.held, self.places = clean, removals, held, places
        some = next(iter(clean.values()))
        self.read = torch.zeros(rows, readings, dtype=torch.float64, device=some.device)
        self.now: dict[str, Tensor] = {}

    def edits(self, others: set[str]) -> dict[str, Edit]:
        sites = dict.fromkeys([*self.places, *sorted(others), *self.held])
        # A sum of two sites is seen after its first summand, whose own edit comes first.
        return {site: self._edit(site) for site in sorted(sites, key=lambda site: "+" in site)}

    def _edit(self, site: str) -> Edit:
        def act(seen: Seen) -> Tensor:
            self.now[site] = seen.value
            if site in self.places:
                for position, (which, vectors) in self.places[site].items():
                    self.read[:, which] = seen.value[:, position].double() @ vectors.T
            if site not in self.held:
                return _remove(self.removals.get(site))(seen)
            value = self.clean[site] - self.removals[site]
            for reads, carry in self.held[site]:
                value = value + carry(self.now[reads]) - carry(self.clean[reads])
            return value.to(seen.written.dtype)

        return act


def _remove(removal: Tensor | None) -> Edit:
    def act(seen: Seen) -> Tensor:
        return seen.written if removal is None else seen.written - removal.to(seen.written.dtype)

    return act


def _removal(pieces: Sequence[Piece], site: str, value: Tensor) -> Tensor:
    """Return what each row loses at a site, the first row nothing."""
    found = value.new_zeros(len(pieces) + 1, *value.shape[1:])
    for row, piece in enumerate(pieces, 1):
        if site in piece.vectors:
            found[row, piece.position] = piece.vectors[site].to(value)
    return found


def _by_site(readings: Sequence[Reading]) -> dict[str, dict[int, tuple[Tensor, Tensor]]]:
    """Return by site and position the numbers of the readings there, and their vectors."""
    found: dict[str, dict[int, list[int]]] = {}
    for number, reading in enumerate(readings):
        found.setdefault(reading.site, {}).setdefault(reading.position, []).append(number)
    return {
        site: {
            position: (
                torch.tensor(which),
                torch.stack([readings[number].vector for number in which]).double(),
            )
            for position, which in by_position.items()
        }
        for site, by_position in found.items()
    }
