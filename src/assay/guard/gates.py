"""Interventions through gates: what a network does when one feature is that of another input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from assay.core.mechanisms import Mechanisms
from assay.core.parts import Gates
from assay.errors import InputError
from assay.guard.observed import Observed
from assay.guard.proposals import Swap, Swapped
from assay.guard.quantise import Quantiser
from assay.guard.reading import Reading


def swaps(
    mechanisms: Mechanisms,
    reading: Reading,
    quantiser: Quantiser,
    reference: Observed,
    off: Callable[[Mechanisms, str], Gates],
) -> Swap:
    """Return the interventions of bound mechanisms whose reference is a paired batch: a gate of
    zero puts there the value of another input.

    `reference` is what the network did on the paired inputs, `off(mechanisms, feature)` the gates
    that are zero for that feature alone. Raises InputError for mechanisms of another reference."""
    if mechanisms.reference != "counterfactual":
        raise InputError(
            "swapping values needs mechanisms with a counterfactual reference, got"
            f" {mechanisms.reference!r}"
        )
    brought = quantiser(reference.values) >= quantiser.fires

    def swap(feature: str) -> Swapped:
        edits = mechanisms.edits(off(mechanisms, feature))
        after, _ = reading.run(mechanisms.target.model, mechanisms.batch.inputs, edits)
        place = reading.names.index(feature)
        return Swapped(brought[:, place], quantiser(after.values) >= quantiser.fires)

    return swap


def joined(parts: list[Swap]) -> Swap:
    """Return the runs of several batches as one."""

    def swap(feature: str) -> Swapped:
        found = [part(feature) for part in parts]
        return Swapped(
            torch.cat([one.brought for one in found]), torch.cat([one.fires for one in found])
        )

    return swap


def last_column_off(reading: Reading, positions: Tensor | None) -> Callable[..., Gates]:
    """Return `off` for mechanisms with one gate per column of a site, (inputs, columns), or per
    position and column; `positions` are those that the reading reads, the last ones by default.
    """

    def off(mechanisms: Mechanisms, feature: str) -> Gates:
        site, column = reading.places[feature]
        gates = mechanisms.ones([site])
        gate = gates[site]
        if gate.ndim == 2:
            gate[:, column] = 0
        else:
            rows = torch.arange(len(gate))
            gate[rows, -1 if positions is None else positions, column] = 0
        return gates

    return off
