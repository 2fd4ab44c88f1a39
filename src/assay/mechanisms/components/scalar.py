"""The small nets of all components of a site at once: z_c = w2_c . gelu(w1_c h_c + b1_c) + b2_c.

They dominate the cost of a step on toy networks, and their hidden layer its memory: 200 components
of 16 units on 4096 rows hold 52 MB. The layer is computed a few components at a time, in slices
that stay in a core's cache, and once more in the backward pass, so that nothing but h is kept."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as f

SLICE = 1 << 18
"""Hidden values in one slice."""


def scalar_nets(
    h: Float[Tensor, "*rows components"],
    w1: Float[Tensor, "components hidden"],
    b1: Float[Tensor, "components hidden"],
    w2: Float[Tensor, "components hidden"],
    b2: Float[Tensor, " components"],
) -> Float[Tensor, "*rows components"]:
    """Return the logits of all components from their inner activations h = x V."""
    values = _Nets.apply(h.reshape(-1, h.shape[-1]).T.contiguous(), w1, b1, w2)
    # One layout from here on: elementwise operations on mixed ones are not vectorised.
    return (values.T.contiguous() + b2).reshape(h.shape)


class _Nets(torch.autograd.Function):
    """z = w2 . gelu(w1 h + b1) for h (components, rows), in slices of components.

    All passes are plain tensor operations that write into nothing, so that the functional
    transforms of torch, further derivatives included, pass through them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
        return torch.cat(
            [_read(f.gelu(_hidden(*own)), read) for *own, read in _sliced(h, w1, b1, w2)]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        found = []
        for g, h, w1, b1, w2 in _sliced(gradient, *ctx.saved_tensors):
            before = _hidden(h, w1, b1)
            across = g.unsqueeze(1)
            by_read = (f.gelu(before) * across).sum(-1)
            slope = torch.ops.aten.gelu_backward(torch.ones_like(before), before)
            # Products that are summed, not matrix products: with one column those are slow.
            by_bias = w2 * (slope * across).sum(-1)
            by_weight = w2 * (slope * (g * h).unsqueeze(1)).sum(-1)
            found.append((g * _read(slope, w1 * w2), by_weight, by_bias, by_read))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    @staticmethod
    def jvp(ctx: Any, h_t: Tensor, w1_t: Tensor, b1_t: Tensor, w2_t: Tensor) -> Tensor:
        h, w1, b1, w2 = ctx.saved_tensors
        before = _hidden(h, w1, b1)
        slope = torch.ops.aten.gelu_backward(torch.ones_like(before), before)
        moved = torch.zeros_like(before)
        for tangent, other in ((w1_t, h.unsqueeze(1)), (h_t, w1.unsqueeze(-1))):
            if tangent is not None:
                moved = moved + tangent.unsqueeze(-1 if tangent is w1_t else 1) * other
        if b1_t is not None:
            moved = moved + b1_t.unsqueeze(-1)
        total = _read(slope * moved, w2)
        return total if w2_t is None else total + _read(f.gelu(before), w2_t)


def _hidden(h: Tensor, w1: Tensor, b1: Tensor) -> Float[Tensor, "components hidden rows"]:
    # A matrix product of inner size two is several times faster than a broadcast multiply-add.
    return torch.stack([w1, b1], -1) @ torch.stack([h, torch.ones_like(h)], 1)


def _read(hidden: Tensor, weights: Tensor) -> Float[Tensor, "components rows"]:
    return (weights.unsqueeze(1) @ hidden).squeeze(1)


def _sliced(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    components, hidden, rows = len(tensors[0]), tensors[-1].shape[-1], tensors[0].shape[-1]
    step = max(1, SLICE // max(1, hidden * rows))
    return [
        tuple(entry[first : first + step] for entry in tensors)
        for first in range(0, components, step)
    ]
