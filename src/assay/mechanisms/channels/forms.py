"""The matrices of one block at one input: its Jacobian, its quadratic form in a direction, and
the Hessian behind it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from assay.mechanisms.channels.clean import Clean
from assay.mechanisms.channels.weights import Layer


def jacobians(clean: Clean, blocks: Iterable[int]) -> dict[int, Float[Tensor, "rows width width"]]:
    """Return `J_m = I + D_m (diag(L_m x) R_m + diag(R_m x) L_m)` of each of the blocks, before its
    norm.

    Raises InputError when the network has a gate nonlinearity.
    """
    clean.weights.require_polynomial("the Jacobian in closed form")
    found = {}
    for block in blocks:
        layer, a, r = clean.weights.layers[block], clean.left[block], clean.right[block]
        jacobian = (layer.down * a.unsqueeze(1)) @ layer.right + (
            layer.down * r.unsqueeze(1)
        ) @ layer.left
        jacobian.diagonal(dim1=-2, dim2=-1).add_(1)
        found[block] = jacobian
    return found


def interaction_forms(
    clean: Clean, blocks: Iterable[int]
) -> dict[int, Float[Tensor, "rows width width"]]:
    """Return `Q_m = 1/2 sum_j (D_m^T g_m)_j (L_mj R_mj^T + R_mj L_mj^T)` for each of the blocks.

    Raises InputError when the network has a gate nonlinearity.
    """
    clean.weights.require_polynomial("the interaction matrix of a block")
    return {
        block: quadratic_form(clean.weights.layers[block], clean.gradients[block])
        for block in blocks
    }


def quadratic_form(
    layer: Layer, direction: Float[Tensor, "*rows width"]
) -> Float[Tensor, "*rows width width"]:
    """Return the symmetric Q with `x^T Q x = direction . D (L x * R x)`."""
    weight = direction @ layer.down
    half = (layer.left.T * weight.unsqueeze(-2)) @ layer.right
    return 0.5 * (half + half.mT)


def norm_jacobian(clean: Clean, block: int) -> Float[Tensor, "rows width width"] | None:
    """Return DN, the derivative of the block's norm (of a frozen one: its scale on the
    diagonal); None without a norm.
    """
    scale = clean.scale(block)
    if scale is None:
        return None
    if clean.frozen:
        return torch.diag_embed(scale)
    sums, epsilon = clean.sums[block], clean.weights.layers[block].epsilon
    square = sums.square().mean(-1, keepdim=True) + epsilon
    outer = (scale * sums).unsqueeze(-1) * sums.unsqueeze(-2)
    return torch.diag_embed(scale) - outer / (sums.shape[-1] * square.unsqueeze(-1))


def norm_form(
    clean: Clean, block: int, gradient: Float[Tensor, "rows width"]
) -> Float[Tensor, "rows width width"] | None:
    """Return the symmetric H with `u^T H u = g . 1/2 D^2 N[u, u]` of a live norm, `g` the
    gradient behind it; None without one.
    """
    scale = clean.scale(block)
    if scale is None or clean.frozen:
        return None
    sums, epsilon = clean.sums[block], clean.weights.layers[block].epsilon
    width = sums.shape[-1]
    square = (sums.square().mean(-1, keepdim=True) + epsilon).unsqueeze(-1)
    scaled = scale * gradient
    inner = (sums * scaled).sum(-1, keepdim=True).unsqueeze(-1)
    outer = sums.unsqueeze(-1) * sums.unsqueeze(-2) / (width * square)
    cross = scaled.unsqueeze(-1) * sums.unsqueeze(-2)
    eye = torch.eye(width, dtype=sums.dtype, device=sums.device)
    return (inner * (1.5 * outer - 0.5 * eye) - 0.5 * (cross + cross.mT)) / (width * square)
