"""Orthogonal power iteration: directions that each hold much of the curvature of a few samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.mechanisms.directions.ascent import ascend, polar
from assay.mechanisms.directions.decomposition import Decomposition, check_count, finish
from assay.mechanisms.directions.factors import Factors, normalise
from assay.progress import progress

__all__ = ["PowerIteration", "polar"]


@dataclass(frozen=True)
class PowerIteration:
    """Maximise `sum_sk d_sk^2`, `d_sk = ||G_s u_k||^2`, over orthonormal directions, on
    trace-normalised factors (see `ascend`).

    Ask for more directions than there are circuits, fewer than parameters. Without `normalised` the
    curvatures keep their size, and samples with several active circuits dominate (a fourth moment).
    Raises InputError when `k` is larger than the parameter count, or no sample has a trace above
    `tolerance`."""

    k: int
    steps: int = 1000
    converged: float = 1e-7
    tolerance: float = 1e-6
    restarts: int = 1
    normalised: bool = True

    def __call__(self, factors: Factors, *, generator: torch.Generator) -> Decomposition:
        unit, kept = self.check(factors)
        climbed = unit if self.normalised else factors
        best, history = self.climb(climbed, generator)
        for _ in progress(range(1, self.restarts), "restarts of the power iteration"):
            other, climb = self.climb(climbed, generator)
            if climb[-1] > history[-1]:
                best, history = other, climb
        return finish(unit, kept, best, "power iteration", generator=generator, history=history)

    def check(self, factors: Factors) -> tuple[Factors, Tensor]:
        """Return the trace-normalised factors and the indices of the samples that are kept."""
        check_count(self.k, factors)
        return normalise(factors, self.tolerance)

    def climb(
        self, factors: Factors, generator: torch.Generator
    ) -> tuple[Tensor, tuple[float, ...]]:
        """Return directions `(k, size)` and the objective by step, from one random start."""
        like = factors.traces()
        found = ascend(
            factors,
            self.k,
            torch.full_like(like, 1 / len(like))[None],
            generator=generator,
            steps=self.steps,
            turn=self.converged,
        )
        return found.directions[0], tuple(found.history[:, 0].tolist())
