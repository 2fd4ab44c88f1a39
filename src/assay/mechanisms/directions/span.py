"""Decompose in the span of the gradients: directions outside it have no curvature on any sample."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.directions.decomposition import Decomposer, Decomposition
from assay.mechanisms.directions.factors import DenseFactors, Factors
from assay.mechanisms.directions.token_factors import TokenFactors


@dataclass(frozen=True)
class Span:
    """Coordinates of all factor rows in an orthonormal basis of their span, and the way back.

    `factors` are the rows in `(samples, rows, rank)`; `weights (rank, samples, rows)` write the
    basis as sums of rows."""

    factors: DenseFactors
    weights: Tensor
    rows: TokenFactors

    def lift(self, directions: Tensor) -> Tensor:
        """Turn directions in coordinates, `(k, rank)`, into directions in parameters, `(k,
        size)`, of unit norm.
        """
        mixed = torch.einsum("kc,csr->srk", directions, self.weights)
        lifted = self.rows.add(mixed.to(self.rows.dtype)).to(directions.dtype)
        return lifted / lifted.norm(dim=1, keepdim=True)


def span(factors: TokenFactors, *, tolerance: float = 1e-6, budget: int = 2**28) -> Span:
    """Return the span of the rows, from their Gram matrix: with `n` rows the work after this is in
    `n` dimensions, not in `size`.

    Rows are formed a chunk at a time, within `budget` bytes. Basis directions below `tolerance` of
    the largest eigenvalue are left out."""
    samples, draws = (factors.samples, factors.draws)
    many = max(1, budget // (4 * draws * factors.size * factors.dtype.itemsize))
    chunks = list(torch.arange(samples).split(many))
    count = samples * draws
    gram = torch.zeros(count, count, dtype=torch.float64)
    for index, left in enumerate(chunks):
        first = _dense(factors, left)
        for right in chunks[index:]:
            block = (first @ (first if right is left else _dense(factors, right)).T).double()
            rows, columns = _rows(left, draws), _rows(right, draws)
            gram[rows[:, None], columns] = block
            gram[columns[:, None], rows] = block.T
    values, vectors = torch.linalg.eigh(gram)
    kept = values > tolerance * values[-1]
    if not bool(torch.isfinite(values).all()) or float(values[-1]) <= 0:
        raise InputError(
            "no sample has curvature above the tolerance: the outputs do not depend on the chosen"
            " parameters there"
        )
    values, vectors = values[kept], vectors[:, kept]
    coordinates = (vectors * values.sqrt()).reshape(samples, draws, -1)
    return Span(
        DenseFactors(coordinates), (vectors * values.rsqrt()).T.reshape(-1, samples, draws), factors
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


def _dense(factors: TokenFactors, chosen: Tensor) -> Tensor:
    part = factors.scaled(chosen, torch.ones(len(chosen), dtype=factors.dtype))
    return part.dense().flatten(0, 1)


def _rows(chosen: Tensor, draws: int) -> Tensor:
    return (chosen[:, None] * draws + torch.arange(draws)).flatten()
