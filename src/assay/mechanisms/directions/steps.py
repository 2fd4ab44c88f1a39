"""Steps along directions, made comparable by what they do to the outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.directions.divergence import Divergence, divergence
from assay.mechanisms.directions.local import Local
from assay.mechanisms.directions.span import span
from assay.mechanisms.directions.token_factors import TokenFactors
from assay.progress import progress


def divergence_of_step(
    local: Local,
    direction: Tensor,
    amount: float,
    measure: str | Divergence = "kl",
    *,
    chunk: int | None = None,
) -> Tensor:
    """Return `D(f(x, W0 + a u), f(x, W0))`, `(samples,)` or `(samples, positions)`, in float64,
    `chunk` samples at a time.
    """
    measure, found = divergence(measure), []
    with torch.no_grad():
        for first in progress(range(0, local.samples, chunk or local.samples), "steps"):
            part = local.take(slice(first, first + (chunk or local.samples)))
            found.append(
                measure.value(part.moved(direction, amount).double(), part.output().double())
            )
    return torch.cat(found)


def step_of_divergence(
    local: Local,
    direction: Tensor,
    size: float,
    measure: str | Divergence = "kl",
    *,
    rounds: int = 25,
    largest: float = 1e4,
) -> float:
    """Return the positive step along a direction at which the mean divergence per sample (summed
    over positions) is `size`.

    Found by bisection. Raises InputError when even the largest step does not reach it.
    """

    def reached(amount: float) -> bool:
        values = divergence_of_step(local, direction, amount, measure)
        return float(values.flatten(1).sum(1).mean() if values.ndim > 1 else values.mean()) >= size

    high = 1e-2
    while not reached(high):
        high *= 2
        if high > largest:
            raise InputError(
                f"no step up to {largest:g} along this direction reaches a divergence of {size:g}"
            )
    low = 0.0
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def top_eigenvector(factors: TokenFactors) -> Tensor:
    """Return the top eigenvector of the mean of `G_s^T G_s` over samples, `(size,)`: the
    steepest single direction.
    """
    inner = span(factors)
    rows = inner.factors.values.flatten(0, 1)
    return inner.lift(torch.linalg.svd(rows, full_matrices=False)[2][:1])[0]
