"""The span of the gradients: directions outside it have no curvature on any sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.directions.factors import DenseFactors
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

    def place(self, directions: Tensor) -> Tensor:
        """Return the coordinates `(k, rank)` of the part of directions `(k, size)` in the span."""
        along = self.rows.dot(directions.to(self.rows.dtype)).to(self.weights.dtype)
        return torch.einsum("csr,srk->kc", self.weights, along)


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


def _dense(factors: TokenFactors, chosen: Tensor) -> Tensor:
    part = factors.scaled(chosen, torch.ones(len(chosen), dtype=factors.dtype))
    return part.dense().flatten(0, 1)


def _rows(chosen: Tensor, draws: int) -> Tensor:
    return (chosen[:, None] * draws + torch.arange(draws)).flatten()
