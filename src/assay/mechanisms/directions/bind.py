"""Directions as gated parts: gate 1 is the network, gate 0 takes the step `-a u_k` in parameter
space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from assay.core.kind import Kind, Reference
from assay.core.mechanisms import Mechanisms
from assay.core.parts import Group, Parts, Shifts
from assay.core.sites import Seen
from assay.core.target import Batch, Target
from assay.errors import InputError
from assay.io.files import require_finite
from assay.mechanisms.directions.choice import Choice, compare_factors
from assay.mechanisms.directions.decomposition import Decomposer, Decomposition, decompose
from assay.mechanisms.directions.divergence import Divergence, divergence
from assay.mechanisms.directions.forms import quadratic_forms
from assay.mechanisms.directions.local import Local, around, logits_or_vector
from assay.mechanisms.directions.power import PowerIteration
from assay.mechanisms.directions.space import Space


@dataclass(frozen=True)
class FromStart:
    """A metric: the divergence of the outputs from those at `W0`, averaged over positions. Its
    gradient there is zero.
    """

    measure: Divergence
    reference: Tensor
    higher_is_right = False

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        values = self.measure.value(logits_or_vector(output), self.reference)
        return values if values.ndim == 1 else values.flatten(1).mean(1)


@dataclass(frozen=True)
class DirectionMechanisms(Mechanisms):
    """Displacements `a u_k` of the chosen parameters, one gate each, shared over the batch.

    `local` holds the samples and the parameters; `vectors (k, size)` the displacements. Where they
    were found here, `found` is the decomposition and `choice` says which factors it is of."""

    local: Local
    vectors: Tensor
    found: Decomposition | None = None
    choice: Choice | None = None

    kind = "directions"
    reference = "W0 - sum a u"

    @property
    def space(self) -> Space:
        return self.local.space

    @cached_property
    def groups(self) -> Mapping[str, Group]:
        return {
            "directions": Group(
                "directions", self.space.names, (self.vectors.shape[0],), per_example=False
            )
        }

    @cached_property
    def _shifts(self) -> dict[str, Tensor]:
        return self.space.split(self.vectors)

    def parts(self, site: str, seen: Seen) -> Mapping[str, Parts]:
        return {"directions": Shifts(self._shifts[site])}

    def take(self, index: Tensor | slice) -> DirectionMechanisms:
        target, metric = self.target, self.target.metric
        if isinstance(metric, FromStart):
            target = replace(target, metric=replace(metric, reference=metric.reference[index]))
        return replace(
            self, target=target, batch=self.batch.take(index), local=self.local.take(index)
        )

    def second_rule(self) -> Mapping[str, Tensor] | None:
        """Return `u^T H_x u` from one JVP per direction where the metric is a divergence from
        `W0` (exact there), else None.
        """
        if not isinstance(self.target.metric, FromStart):
            return None
        return {"directions": quadratic_forms(self.local, self.vectors, self.target.metric.measure)}


@dataclass(frozen=True)
class Directions(Kind):
    """Directions that no batch is bound to: `vectors` (k, size) in the space of the parameters that
    match the patterns. See `directions` for `amount`, `metric` and `measure`.
    """

    vectors: Tensor
    parameters: str | Sequence[str] = "*"
    amount: float = 1.0
    metric: str = "own"
    measure: str | Divergence = "kl"

    name = "directions"

    def bind(
        self, target: Target, batch: Batch, reference: Reference | None = None
    ) -> DirectionMechanisms:
        """Return the displacements as gates, shared over a batch."""
        self.refuse_reference(reference)
        return directions(
            target,
            batch,
            parameters=self.parameters,
            measure=self.measure,
            found=self.vectors,
            amount=self.amount,
            metric=self.metric,
        )


def directions(
    target: Target,
    batch: Batch,
    *,
    parameters: str | Sequence[str] = "*",
    k: int = 16,
    measure: str | Divergence = "kl",
    decomposer: Decomposer | None = None,
    found: Decomposition | Tensor | None = None,
    amount: float = 1.0,
    metric: str = "own",
    positions: Tensor | None = None,
    seed: int = 0,
) -> DirectionMechanisms:
    """Find directions in the parameters that match a pattern, or take those in `found`, and bind
    them to a batch.

    Gates scale the displacements `amount * u_k`. With `metric="divergence"` the target's metric is
    replaced by the divergence from the untouched network, whose second order in the gates is exact
    and cheap; its gradient is zero. Raises InputError for an unknown pattern, fused attention, NaN
    weights, or more directions than parameters."""
    if metric not in ("own", "divergence"):
        raise InputError(f"metric must be 'own' or 'divergence', got {metric!r}")
    measure = divergence(measure)
    local = around(target.model, batch.inputs, parameters, positions=positions)
    decomposition, choice = found if isinstance(found, Decomposition) else None, None
    if found is None:
        generator = torch.Generator().manual_seed(seed)
        factors, choice = compare_factors(local, measure, k, generator=generator)
        decomposition = decompose(
            factors, decomposer or PowerIteration(min(k, local.space.size)), generator=generator
        )
    rows = decomposition.directions if decomposition is not None else found
    if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.shape[1] != local.space.size:
        raise InputError(
            f"found must hold directions (k, {local.space.size}) for {len(local.space.names)}"
            " chosen parameters"
        )
    require_finite(rows, "found")
    if metric == "divergence":
        whole = around(target.model, batch.inputs, parameters)
        with torch.no_grad():
            target = Target(target.model, FromStart(measure, whole.output()), target.name)
        local = whole
    dtype = next(iter(local.weights.values())).dtype
    return DirectionMechanisms(
        target, batch, local, (amount * rows).to(dtype), decomposition, choice
    )
