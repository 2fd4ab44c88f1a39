"""The result of a decomposition, and how many of its directions to believe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.directions.factors import Factors


@dataclass(frozen=True)
class Decomposition:
    """Directions sorted by score.

    `directions (k, size)` have unit norm; `activity (samples, k)` is each one's share of the
    curvature of each kept sample; `scores (k,)` is the mean squared activity (or what the method
    says); `count` is where the scores fall off, with the 95 % bootstrap interval `interval` over
    samples; `kept` are the samples' indices; `history` is the method's objective by step; `encoder
    (k, size)` reads a coefficient off a gradient where it is not the direction itself."""

    directions: Tensor
    scores: Tensor
    activity: Tensor
    kept: Tensor
    count: int
    interval: tuple[int, int]
    method: str
    history: tuple[float, ...] = ()
    encoder: Tensor | None = None

    def top(self, count: int | None = None) -> Decomposition:
        """Return the first `count` directions (by default those above the gap)."""
        count = self.count if count is None else count
        return replace(
            self,
            directions=self.directions[:count],
            scores=self.scores[:count],
            activity=self.activity[:, :count],
            count=count,
            encoder=None if self.encoder is None else self.encoder[:count],
        )


class Decomposer(Protocol):
    """A method that turns factors into directions."""

    def __call__(self, factors: Factors, *, generator: torch.Generator) -> Decomposition: ...


def activities(factors: Factors, directions: Tensor) -> Tensor:
    """Return `d_sk = ||G_s u_k||^2`, `(samples, k)`: for trace-normalised factors the share of
    the curvature along `u_k`.
    """
    return factors.dot(directions).square().sum(1)


def finish(
    factors: Factors,
    kept: Tensor,
    directions: Tensor,
    method: str,
    *,
    generator: torch.Generator,
    history: tuple[float, ...] = (),
    encoder: Tensor | None = None,
) -> Decomposition:
    """Score and sort directions on trace-normalised factors: `score_k = mean_s d_sk^2`."""
    activity = activities(factors, directions if encoder is None else encoder)
    order = activity.square().mean(0).argsort(descending=True)
    activity, directions = activity[:, order], directions[order]
    count, interval = count_components(activity, generator=generator)
    encoder = None if encoder is None else encoder[order]
    return Decomposition(
        directions,
        activity.square().mean(0),
        activity,
        kept,
        count,
        interval,
        method,
        history,
        encoder,
    )


def count_components(
    activity: Tensor, *, generator: torch.Generator, resamples: int = 200, level: float = 0.95
) -> tuple[int, tuple[int, int]]:
    """Return the number of directions before the largest gap in the scores, and its bootstrap
    interval over samples.

    The gap is the largest ratio of neighbouring scores. It needs directions past the last true one
    (k above the true number, below the parameter count): with none it falls between true ones."""
    squares = activity.square()
    count = int(_gap(squares.mean(0)[None])[0])
    draws = torch.randint(squares.shape[0], (resamples, squares.shape[0]), generator=generator).to(
        squares.device
    )
    weights = torch.zeros(resamples, squares.shape[0], dtype=squares.dtype, device=squares.device)
    weights.scatter_add_(1, draws, torch.ones_like(draws, dtype=squares.dtype))
    counts = _gap(
        (weights @ squares / squares.shape[0]).sort(dim=1, descending=True).values
    ).double()
    tail = (1 - level) / 2
    low, high = (
        int(value)
        for value in counts.quantile(
            torch.tensor([tail, 1 - tail], dtype=torch.float64, device=counts.device)
        )
    )
    return count, (low, high)


def check_count(k: int, factors: Factors) -> None:
    """Raise InputError when more directions are asked for than there are parameters, or none."""
    if not 1 <= k <= factors.size:
        raise InputError(
            f"k = {k} directions in {factors.size} parameters; k must lie between 1 and"
            f" {factors.size}"
        )


def _gap(scores: Tensor) -> Tensor:
    if scores.shape[1] < 2:
        return torch.ones(scores.shape[0], dtype=torch.long, device=scores.device)
    floor = torch.finfo(scores.dtype).eps * scores[:, :1]
    logs = scores.clamp_min(floor).log()
    return (logs[:, :-1] - logs[:, 1:]).argmax(1) + 1
