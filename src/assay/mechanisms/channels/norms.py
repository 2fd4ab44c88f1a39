"""Norms, from above, of the matrices that certificates are made of."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from assay.mechanisms.channels.clean import Clean, last_gradient
from assay.mechanisms.channels.forms import interaction_forms, jacobians, norm_jacobian

# Relative slack on every norm: far above the rounding of float64 singular values, far below
# anything reported.
SLACK = 1e-10

Norms = Literal["spectral", "frobenius"]


class Sizes:
    """Norms, from above, of everything that the recursions need, shared by the channels of a
    block.
    """

    def __init__(self, clean: Clean, norms: Norms):
        blocks = range(1, len(clean.weights.layers))
        self.jacobian, self.form = jacobians(clean, blocks), interaction_forms(clean, blocks)
        self.state = {m: _norm(jacobian, norms) for m, jacobian in self.jacobian.items()}
        self.bend = {m: _symmetric_norm(form, norms) for m, form in self.form.items()}
        self.through = dict(self.state)
        self.norm: dict[int, Tensor] = {}
        self.product: dict[int, Tensor] = {m: _product_bound(clean, m, norms) for m in blocks}
        for m in range(len(clean.weights.layers)):
            scale = clean.scale(m)
            if scale is None:
                continue
            derivative = norm_jacobian(clean, m)
            assert derivative is not None
            self.norm[m] = (
                scale.abs().amax(-1, keepdim=True) * (1 + SLACK)
                if clean.frozen
                else _norm(derivative, norms)
            )
            if m:
                self.through[m] = _norm(derivative @ self.jacobian[m], norms)
        head = clean.weights.head
        self.spread = float(
            torch.cdist(head, head, compute_mode="donot_use_mm_for_euclid_dist").max()
        ) * (1 + SLACK)

    def behind(self, clean: Clean, block: int) -> Tensor:
        """Return the norm of the gradient behind the block's norm, (rows, 1)."""
        if block == len(clean.weights.layers) - 1:
            gradient = last_gradient(clean)
        else:
            gradient = (
                clean.gradients[block + 1].unsqueeze(-2) @ self.jacobian[block + 1]
            ).squeeze(-2)
        return gradient.norm(dim=-1, keepdim=True) * (1 + SLACK)


def norm_length(clean: Clean, block: int) -> tuple[Tensor, float]:
    """Return the length (rows, 1) of what a block's norm divides by, times the root of the width,
    and the largest length of what it returns.
    """
    layer, sums = clean.weights.layers[block], clean.sums[block]
    assert layer.gain is not None
    width = sums.shape[-1]
    # An epsilon acts like one more, constant, entry of the state; so it lengthens y.
    length = (sums.square().sum(-1, keepdim=True) + width * layer.epsilon).sqrt()
    return length, math.sqrt(width) * float(layer.gain.abs().max())


def _product_bound(clean: Clean, block: int, norms: Norms) -> Tensor:
    layer = clean.weights.layers[block]
    rows = [
        matrix.norm(dim=1).max() * _norm(other, norms)
        for matrix, other in ((layer.left, layer.right), (layer.right, layer.left))
    ]
    return (_norm(layer.down, norms) * torch.minimum(*rows)).squeeze() * (1 + SLACK)


def _norm(matrix: Tensor, norms: Norms) -> Tensor:
    """Return an upper bound of the spectral norm with a trailing axis of one; infinite where the
    matrix overflowed.
    """
    finite = torch.isfinite(matrix).all(-1).all(-1)
    safe = torch.where(finite[..., None, None], matrix, torch.zeros_like(matrix))
    size = (
        torch.linalg.svdvals(safe)[..., 0]
        if norms == "spectral"
        else torch.linalg.matrix_norm(safe)
    )
    return torch.where(finite, size * (1 + SLACK), torch.full_like(size, math.inf)).unsqueeze(-1)


def _symmetric_norm(matrix: Tensor, norms: Norms) -> Tensor:
    if norms == "frobenius":
        return _norm(matrix, norms)
    finite = torch.isfinite(matrix).all(-1).all(-1)
    safe = torch.where(finite[..., None, None], matrix, torch.zeros_like(matrix))
    size = torch.linalg.eigvalsh(safe).abs().amax(-1)
    return torch.where(finite, size * (1 + SLACK), torch.full_like(size, math.inf)).unsqueeze(-1)
