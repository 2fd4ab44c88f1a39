"""Decompose factors into directions, and say how many of them to believe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.directions.counting import count_directions
from assay.mechanisms.directions.factors import DenseFactors, Factors
from assay.mechanisms.directions.span import span
from assay.mechanisms.directions.token_factors import TokenFactors


@dataclass(frozen=True)
class Decomposition:
    """Directions sorted by score.

    `directions (k, size)` have unit norm; `activity (samples, k)` is each one's share of the
    curvature of each kept sample; `scores (k,)` is the mean squared activity (or what the method
    says); `clear (k,)` marks the directions that stand out from gradients without structure and
    come back on resampled inputs, `count` is their number and `interval` the 95 % range of the
    number in the data, whose upper end is None when it exceeds k (see `count_directions`); `kept`
    are the samples' indices; `history` is the method's objective by step; `encoder (k, size)` reads
    a coefficient off a gradient where it is not the direction itself."""

    directions: Tensor
    scores: Tensor
    activity: Tensor
    kept: Tensor
    clear: Tensor
    interval: tuple[int, int | None]
    method: str
    history: tuple[float, ...] = ()
    encoder: Tensor | None = None

    @property
    def count(self) -> int:
        """The number of clear directions."""
        return int(self.clear.sum())

    @property
    def answer(self) -> str:
        """How many directions there are, in words: "none", "5", "between 4 and 6" or "at least
        7".
        """
        low, high = self.interval
        if high is None:
            return f"at least {low}" if low else f"unknown: none of {len(self.clear)} is clear"
        if self.count == 0:
            return f"none is clear, at most {high}" if high else "none"
        return str(low) if low == high else f"between {low} and {high}"

    def top(self, count: int | None = None) -> Decomposition:
        """Return the first `count` directions, by default those that are clear."""
        chosen = self.clear.nonzero()[:, 0] if count is None else torch.arange(count)
        return replace(
            self,
            directions=self.directions[chosen],
            scores=self.scores[chosen],
            activity=self.activity[:, chosen],
            clear=self.clear[chosen],
            encoder=None if self.encoder is None else self.encoder[chosen],
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
    counted = count_directions(factors, directions, generator=generator)
    encoder = None if encoder is None else encoder[order]
    return Decomposition(
        directions,
        activity.square().mean(0),
        activity,
        kept,
        counted.clear,
        counted.interval,
        method,
        history,
        encoder,
    )


def check_count(k: int, factors: Factors) -> None:
    """Raise InputError when more directions are asked for than there are parameters, or none."""
    if not 1 <= k <= factors.size:
        raise InputError(
            f"k = {k} directions in {factors.size} parameters; k must lie between 1 and"
            f" {factors.size}"
        )


def decompose(
    factors: Factors,
    method: Decomposer,
    *,
    generator: torch.Generator | None = None,
    against: TokenFactors | None = None,
    ridge: float = 0.1,
) -> Decomposition:
    """Decompose factors by any method; per-token gradients go through the span of their rows. The
    default generator has seed 0.

    With `against`, factors of outputs that should stay as they are, a direction's length is `u^T (A
    + ridge |A| I) u`, where `A = mean_s G_s^T G_s` of those factors and `|A|` is its largest
    eigenvalue: directions then compete at equal disturbance (the natural gradient's metric), and
    one that spills over into other outputs pays for it. They are orthogonal in that metric and
    returned with unit Euclidean norm. Raises InputError when `against` does not go with the
    factors, or the ridge is not positive."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    if not isinstance(factors, TokenFactors):
        if against is not None:
            raise InputError(
                "against is for per-token gradients (token_gradients); these factors are dense"
            )
        return method(factors, generator=generator)
    if not ridge > 0:
        raise InputError(f"ridge must be positive, got {ridge}")
    inner = span(factors if against is None else factors.joined(against))
    if against is None:
        found, back = method(inner.factors, generator=generator), inner.lift
    else:
        coordinates = inner.factors.values
        metric = _inverse_root(coordinates[factors.samples :], ridge)
        found = method(DenseFactors(coordinates[: factors.samples] @ metric), generator=generator)

        def back(directions: Tensor) -> Tensor:
            return inner.lift(directions @ metric)

    encoder = None if found.encoder is None else back(found.encoder)
    return replace(found, directions=back(found.directions), encoder=encoder)


def _inverse_root(coordinates: Tensor, ridge: float) -> Tensor:
    """Return `(A + ridge |A| I)^{-1/2}` of the mean `A` of the samples' Gram matrices."""
    rows = coordinates.flatten(0, 1)
    values, vectors = torch.linalg.eigh(rows.T @ rows / coordinates.shape[0])
    return (vectors * (values.clamp_min(0) + ridge * values[-1]).rsqrt()) @ vectors.T
