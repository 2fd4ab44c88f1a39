"""Orthogonal power iteration: directions that each hold much of the curvature of a few samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.mechanisms.directions.decomposition import Decomposition, check_count, finish
from assay.mechanisms.directions.factors import Factors, normalise


@dataclass(frozen=True)
class PowerIteration:
    """Maximise `sum_sk d_sk^2`, `d_sk = ||G_s u_k||^2`, over orthonormal directions, on
    trace-normalised factors.

    Each step is `U <- polar(sum_s sum_o d_sk T_sko G_so)` with `T = G U^T`. The objective is convex
    in `U`, so the step is a monotone ascent on the Stiefel manifold without a learning rate
    (generalised power method, arXiv 0811.4724). Ask for more directions than there are circuits,
    fewer than parameters, and cut at the gap of the scores. Without `normalised` the curvatures
    keep their size, and samples with several active circuits dominate (a fourth moment). Raises
    InputError when `k` is larger than the parameter count, or no sample has a trace above
    `tolerance`."""

    k: int
    steps: int = 1000
    converged: float = 1e-7
    tolerance: float = 1e-6
    restarts: int = 1
    normalised: bool = True

    def __call__(self, factors: Factors, *, generator: torch.Generator) -> Decomposition:
        check_count(self.k, factors)
        unit, kept = normalise(factors, self.tolerance)
        climbed = unit if self.normalised else factors
        best, history = self._climb(climbed, generator)
        for _ in range(1, self.restarts):
            other, climb = self._climb(climbed, generator)
            if climb[-1] > history[-1]:
                best, history = other, climb
        return finish(unit, kept, best, "power iteration", generator=generator, history=history)

    def _climb(
        self, factors: Factors, generator: torch.Generator
    ) -> tuple[Tensor, tuple[float, ...]]:
        like = factors.traces()
        start = torch.randn(self.k, factors.size, generator=generator, dtype=like.dtype).to(
            like.device
        )
        directions, history = polar(start), []
        for _ in range(self.steps):
            tangents = factors.dot(directions)
            shares = tangents.square().sum(1)
            history.append(float(shares.square().sum(1).mean()))
            moved = polar(factors.add(shares[:, None] * tangents))
            change = float((1 - (moved * directions).sum(1).abs()).max())
            directions = moved
            if change < self.converged:
                break
        return directions, tuple(history)


def polar(rows: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal rows, the polar factor `(X X^T)^{-1/2} X` of
    `(k, size)`.
    """
    basis, triangle = torch.linalg.qr(rows.T)
    left, _, right = torch.linalg.svd(triangle)
    return (basis @ (left @ right)).T
