"""The bi-level method: steep directions that do not interfere. Kept as a reference; prefer the
power iteration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from assay.io.runs import Run
from assay.learn.loop import fit
from assay.mechanisms.directions.decomposition import Decomposition, activities, check_count, finish
from assay.mechanisms.directions.factors import Factors, normalise


@dataclass(frozen=True)
class BiLevel:
    """Alternate two steps on unit-norm directions, with Adam.

    Even steps maximise the steepness `mean_{k, x} d_k(x)^2` of `batch` of the directions; odd steps
    minimise the interference `||d_i(x) d_j(x) <u_i, u_j>||_F` over samples and pairs `i > j`, with
    `d` fixed. The steepness is a fourth moment of the gradients, dominated by samples with several
    active circuits, so it can be larger at mixtures of circuits than at the circuits themselves.
    Curvatures are not normalised per sample."""

    k: int
    steps: int = 2000
    rate: float = 0.01
    batch: int | None = None
    tolerance: float = 1e-6
    run: Run | None = None
    name: str = "bilevel"

    def __call__(self, factors: Factors, *, generator: torch.Generator) -> Decomposition:

        check_count(self.k, factors)
        unit, kept = normalise(factors, self.tolerance)
        scale = factors.traces().mean().rsqrt()
        factors = factors.scaled(torch.arange(factors.samples), scale.expand(factors.samples))
        like = factors.traces()
        start = torch.randn(self.k, factors.size, generator=generator, dtype=like.dtype).to(
            like.device
        )
        model = _Directions(start)
        history: list[float] = []

        def objective(step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
            if step % 2:
                return interference(factors, model.rows), {}
            chosen = torch.randperm(self.k, generator=generator)[: self.batch or self.k]
            value = steepness(factors, model.rows[chosen])
            if step % 50 == 0:
                history.append(float(value.detach()))
            return -value, {}

        fit(
            model,
            objective,
            torch.optim.Adam(model.parameters(), lr=self.rate),
            steps=self.steps,
            generator=generator,
            run=self.run,
            name=self.name,
            after_step=model.rescale,
        )
        return finish(
            unit, kept, model.rows.detach(), "bi-level", generator=generator, history=tuple(history)
        )


def steepness(factors: Factors, directions: Tensor) -> Tensor:
    """Return `mean_{k, x} d_k(x)^2`."""
    return activities(factors, directions).square().mean()


def interference(factors: Factors, directions: Tensor) -> Tensor:
    """Return `||d_i(x) d_j(x) <u_i, u_j>||_F` over samples and pairs `i > j`; only the Gram
    matrix takes a gradient.
    """
    shares = activities(factors, directions).detach()
    moments = shares.square().T @ shares.square()
    overlaps = (directions @ directions.T).square() * moments
    return overlaps.tril(-1).sum().clamp_min(1e-30).sqrt()


class _Directions(nn.Module):
    def __init__(self, start: Tensor):
        super().__init__()
        self.rows = nn.Parameter(start / start.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def rescale(self) -> None:
        self.rows.div_(self.rows.norm(dim=1, keepdim=True).clamp_min(1e-12))
