"""The generalised power method: many fits at once on one set of factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.mechanisms.directions.factors import Factors
from assay.progress import progress


@dataclass(frozen=True)
class Ascent:
    """Where the fits ended: `directions (fits, k, size)`, and the objective of every step
    `history (steps, fits)`.
    """

    directions: Tensor
    history: Tensor


def ascend(
    factors: Factors,
    k: int,
    weights: Tensor,
    *,
    generator: torch.Generator,
    steps: int,
    turn: float = 0.0,
    gain: float = 0.0,
) -> Ascent:
    """Maximise `sum_sk w_s d_sk^2`, `d_sk = ||G_s u_k||^2`, over orthonormal directions, from a
    random start for each row of `weights (fits, samples)`.

    Each step is `U <- polar(sum_s w_s sum_o d_sk T_sko G_so)` with `T = G U^T`. The objective is
    convex in `U`, so the step is a monotone ascent on the Stiefel manifold without a learning rate
    (arXiv 0811.4724). It ends after `steps`, or when no direction of any fit turns by more than
    `1 - |<u, u'>| = turn`, or when no objective grows by more than the share `gain`."""
    fits = len(weights)
    start = torch.randn(fits, k, factors.size, generator=generator, dtype=weights.dtype)
    directions = polar(start.to(weights.device))
    history: list[Tensor] = []
    for _ in progress(range(steps), "power iteration"):
        tangents = factors.dot(directions.flatten(0, 1)).unflatten(2, (fits, k))
        shares = tangents.square().sum(1)
        history.append(torch.einsum("fs,sfk->f", weights, shares.square()))
        if len(history) > 1 and bool((history[-1] <= history[-2] * (1 + gain)).all()) and gain:
            break
        pulls = tangents * (shares * weights.T[:, :, None])[:, None]
        moved = polar(factors.add(pulls.flatten(2)).unflatten(0, (fits, k)))
        turned = float((1 - (moved * directions).sum(2).abs()).max())
        directions = moved
        if turned < turn:
            break
    return Ascent(directions, torch.stack(history))


def polar(rows: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal rows, the polar factor `(X X^T)^{-1/2} X` of
    `(..., k, size)`.
    """
    basis, triangle = torch.linalg.qr(rows.mT)
    left, _, right = torch.linalg.svd(triangle)
    return (basis @ (left @ right)).mT
