"""Per-sample gradient factors: what every decomposer reads.

A sample's curvature is `H_s = G_s^T G_s` with factor rows `G_s (rows, size)`. Fisher factors
`M^{1/2} J` and gradients towards other outputs are two sketches of the same object: with a label
drawn from the model's own `p0`, `E[g g^T] = H_x` exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from assay.errors import InputError, unknown
from assay.mechanisms.directions.divergence import Divergence, divergence
from assay.mechanisms.directions.forms import BUDGET, jacobian
from assay.mechanisms.directions.local import Local


class Factors(Protocol):
    """A linear map `G (samples, rows, size)` used only through its action; `size` x `size`
    matrices are never formed.
    """

    @property
    def samples(self) -> int: ...

    @property
    def size(self) -> int: ...

    def dot(self, directions: Tensor) -> Tensor:
        """Return `T = G U^T`, `(samples, rows, k)`."""

    def add(self, weights: Tensor) -> Tensor:
        """Return `sum_s sum_r w_srk G_sr`, `(k, size)`: the adjoint of `dot`."""

    def traces(self) -> Tensor:
        """Return `||G_s||_F^2 = trace H_s`, `(samples,)`."""

    def scaled(self, kept: Tensor, scales: Tensor) -> Factors:
        """Return the samples `kept` (indices), each multiplied by its scale."""


@dataclass(frozen=True)
class DenseFactors:
    """Factors held as one tensor `(samples, rows, size)`; samples with fewer rows than others end
    in rows of zeros, which products leave out where they are the most.
    """

    values: Tensor

    @property
    def samples(self) -> int:
        return self.values.shape[0]

    @property
    def size(self) -> int:
        return self.values.shape[2]

    @cached_property
    def _filled(self) -> tuple[Tensor, Tensor] | None:
        """The rows that are not zero and their places among all, where they are at most half."""
        rows = self.values.flatten(0, 1)
        places = (rows != 0).any(1).nonzero().flatten()
        return (rows[places], places) if 2 * len(places) <= len(rows) else None

    def dot(self, directions: Tensor) -> Tensor:
        if self._filled is None:
            return self.values @ directions.T
        rows, places = self._filled
        found = rows.new_zeros(self.values[..., 0].numel(), len(directions))
        return found.index_copy_(0, places, rows @ directions.T).unflatten(0, self.values.shape[:2])

    def add(self, weights: Tensor) -> Tensor:
        weights = weights.flatten(0, 1)
        if self._filled is None:
            return weights.T @ self.values.flatten(0, 1)
        rows, places = self._filled
        return weights[places].T @ rows

    def traces(self) -> Tensor:
        return self.values.square().sum((1, 2))

    def scaled(self, kept: Tensor, scales: Tensor) -> DenseFactors:
        return DenseFactors(self.values[kept] * scales[:, None, None])


def fisher_factors(
    local: Local, measure: str | Divergence = "kl", *, budget: int = BUDGET
) -> DenseFactors:
    """Return the exact factors `M^{1/2} J` in float64; rows are positions x outputs, and `H` is
    averaged over positions.
    """
    measure = divergence(measure)
    output, slopes = jacobian(local, budget=budget)
    output, slopes = output.double(), slopes.double()
    roots = measure.root(slopes.movedim(-1, 0), output).movedim(0, -1)
    positions = output[0, ..., 0].numel()
    return DenseFactors(_without_empty_rows(roots.flatten(1, -2) / positions**0.5))


def pair_gradients(
    local: Local,
    measure: str | Divergence = "mse",
    *,
    references: int | str = 8,
    generator: torch.Generator | None = None,
    budget: int = BUDGET,
) -> DenseFactors:
    """Return `g(x_i, r) = grad_W D(f(x_i, W), y_r)` at `W0`, `(samples, references, size)`, in
    float64 (arXiv 2504.00194).

    `y_r` is the output on another sample, never the sample itself, `references` of them each;
    `references="zero"` takes the zero output (uniform logits) as the one reference: for regressions
    without offset, where the difference of two samples adds a direction of its own. Raises
    InputError with fewer than two samples, or a reference count below one."""
    measure = divergence(measure)
    if isinstance(references, str) and references != "zero":
        raise unknown("kind of reference", references, ["zero"])
    if not isinstance(references, str) and (local.samples < 2 or references < 1):
        raise InputError(
            f"pair gradients need two samples and one reference, got {local.samples} and"
            f" {references}"
        )
    output, slopes = jacobian(local, budget=budget)
    output, slopes = output.double(), slopes.double()
    if isinstance(references, str):
        other = torch.zeros_like(output).unsqueeze(1)
    else:
        other = output[other_samples(len(output), references, generator).to(output.device)]
    cotangents = measure.pull(output.unsqueeze(1), other) / output[0, ..., 0].numel()
    return DenseFactors(torch.einsum("srn,snp->srp", cotangents.flatten(2), slopes.flatten(1, -2)))


def other_samples(samples: int, references: int, generator: torch.Generator | None) -> Tensor:
    """Draw `references` other samples for each sample, `(samples, references)`; never itself."""
    drawn = torch.randint(1, samples, (samples, references), generator=generator)
    return (torch.arange(samples)[:, None] + drawn) % samples


def normalise(factors: Factors, tolerance: float = 1e-6) -> tuple[Factors, Tensor]:
    """Scale every sample to trace one and drop those below `tolerance` times the largest trace;
    also return the kept indices.

    Raises InputError when the factors hold NaN, or no sample has a trace above the tolerance.
    """
    traces = factors.traces()
    if not bool(torch.isfinite(traces).all()):
        raise InputError("the gradients hold NaN or infinity; look at the weights and the inputs")
    largest = float(traces.max()) if traces.numel() else 0.0
    if largest <= torch.finfo(traces.dtype).tiny:
        raise InputError(
            "no sample has curvature above the tolerance: the outputs do not depend on the chosen"
            " parameters there"
        )
    kept = (traces > tolerance * largest).nonzero()[:, 0]
    return factors.scaled(kept, traces[kept].rsqrt()), kept


def _without_empty_rows(values: Tensor) -> Tensor:
    """Move each sample's zero rows (outputs whose unit is off) to the end and cut what is zero
    everywhere.
    """
    norms, order = values.square().sum(2).sort(dim=1, descending=True)
    kept = max(1, int((norms > 0).any(0).sum()))
    return values.take_along_dim(order[:, :kept, None], dim=1)
