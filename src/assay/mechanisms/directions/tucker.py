"""Directions of low rank: one Tucker factorisation per parameter tensor and direction."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from assay.errors import InputError
from assay.mechanisms.directions.space import Space


class Tucker(nn.Module):
    """`k` directions whose part in every parameter is a core of `rank` per mode times one factor
    matrix per mode.

    A vector's part is free. Starts at the truncated higher-order SVD of given directions `(k,
    size)`."""

    def __init__(self, space: Space, directions: Tensor, rank: int):
        super().__init__()
        if rank < 1:
            raise InputError(f"rank must be at least 1, got {rank}")
        self.space = space
        self.cores = nn.ParameterList()
        self.factors = nn.ModuleList()
        for part in space.split(directions).values():
            bases = (
                []
                if part.ndim < 3
                else [_leading(part, mode, rank) for mode in range(1, part.ndim)]
            )
            core = part
            for mode, basis in enumerate(bases, start=1):
                core = _multiply(core, basis.mT, mode)
            self.cores.append(nn.Parameter(core.clone()))
            self.factors.append(nn.ParameterList(nn.Parameter(basis.clone()) for basis in bases))

    def forward(self) -> Tensor:
        """Return the directions, `(k, size)`."""
        parts = {}
        for name, core, bases in zip(self.space.names, self.cores, self.factors, strict=True):
            whole: Tensor = core
            for mode, basis in enumerate(cast(nn.ParameterList, bases), start=1):
                whole = _multiply(whole, basis, mode)
            parts[name] = whole
        return self.space.join(parts)

    @torch.no_grad()
    def rescale(self) -> None:
        """Scale every direction to unit norm, in its cores."""
        norms = self().norm(dim=1).clamp_min(1e-12)
        for core in self.cores:
            core.div_(norms.reshape(-1, *[1] * (core.ndim - 1)))


def _leading(part: Tensor, mode: int, rank: int) -> Tensor:
    """Return the leading left singular vectors of a mode's unfolding, `(k, n, r)`."""
    unfolded = part.movedim(mode, 1).flatten(2)
    left = torch.linalg.svd(unfolded, full_matrices=False)[0]
    return left[:, :, :rank]


def _multiply(core: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiply mode `mode` of `(k, ...)` by `(k, new, old)`."""
    moved = core.movedim(mode, 1)
    shape = moved.shape
    return (
        (matrix @ moved.flatten(2)).reshape(shape[0], matrix.shape[1], *shape[2:]).movedim(1, mode)
    )
