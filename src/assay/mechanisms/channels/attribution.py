"""First order: what a channel is worth by the gradient, how far its ablation steps, and how
sparse the scores are.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from assay.mechanisms.channels.clean import Clean


def attribute_channels(clean: Clean) -> Float[Tensor, "examples blocks hidden"]:
    """Return `attr_k = (g . D[:,k]) h_k`, the first-order estimate of `F - F(channel k ablated)`.

    A channel is switched off at all positions together. See "Attribution patching" (arXiv
    2310.10348) and, for when it lies, arXiv 2606.09899."""
    layers = clean.weights.layers
    return torch.stack(
        [
            clean.pool((g @ layer.down) * h)
            for g, layer, h in zip(clean.gradients, layers, clean.hidden, strict=True)
        ],
        1,
    )


def measure_steps(clean: Clean) -> Float[Tensor, "examples blocks hidden"]:
    """Return `delta_k = ||D[:,k]|| |h_k|`, the size of the step that ablating a channel takes; over
    positions, the largest.

    Only this product has a meaning: `(D_k, L_k) -> (c D_k, L_k / c)` leaves the network and delta
    as they are."""
    steps = step_rows(clean)
    if clean.positions > 1:
        steps = [step.reshape(-1, clean.positions, step.shape[-1]).amax(1) for step in steps]
    return torch.stack(steps, 1)


def step_rows(clean: Clean) -> list[Float[Tensor, "rows hidden"]]:
    """Return delta of every block at every position."""
    return [
        layer.down.norm(dim=0) * h.abs()
        for layer, h in zip(clean.weights.layers, clean.hidden, strict=True)
    ]


def hoyer(scores: Float[Tensor, "*rows channels"]) -> tuple[Float[Tensor, "*rows"], Tensor]:
    """Return `(sqrt n - ||a||_1 / ||a||_2) / (sqrt n - 1)` of every row, in [0, 1], and which rows
    it is defined for.

    A zero row has no sparsity: its value is 0 and its mask False, to be left out of means (arXiv
    1908.09979)."""
    count = scores.shape[-1]
    defined = (scores != 0).any(-1)
    # The inner where keeps the gradient of the norm finite at masked rows.
    safe = torch.where(defined.unsqueeze(-1), scores, torch.ones_like(scores))
    safe = safe / safe.detach().abs().amax(-1, keepdim=True)
    ratio = safe.abs().sum(-1) / safe.norm(dim=-1)
    value = (count**0.5 - ratio) / max(count**0.5 - 1, torch.finfo(scores.dtype).tiny)
    return torch.where(defined, value, torch.zeros_like(value)), defined


def alignments(clean: Clean) -> Float[Tensor, "examples blocks hidden"]:
    """Return `|attr_k| / (||g|| delta_k) = |cos(g, D[:,k])|`, how well a channel's direction is
    aligned with the gradient; over positions, the share that their sum keeps of its largest value.

    It is zero where the channel is off. The relative error of an attribution is `C delta / (||g||
    |cos|)`: small steps and good alignment both make it small."""
    reach = torch.stack(
        [
            clean.pool(g.norm(dim=-1, keepdim=True) * step)
            for g, step in zip(clean.gradients, step_rows(clean), strict=True)
        ],
        1,
    )
    size = attribute_channels(clean).abs()
    return torch.where(reach > 0, size / reach.clamp_min(torch.finfo(reach.dtype).tiny), 0.0)
