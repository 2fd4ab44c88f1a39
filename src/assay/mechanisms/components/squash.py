"""From a logit z to a causal importance, twice: `lower` feeds the masks, `upper` the sparsity
penalty (arXiv 2506.20790).

`upper` is plain tensor operations. The backward pass of `lower` depends on the sign of the
gradient, which no composition of plain operations does (their backward passes are linear). It has
one of its own, made of plain operations, in the form of autograd function that gradients, JVPs and
vmap of torch.func accept."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LEAK = 0.01


def lower(z: Float[Tensor, "*any"], leak: float = LEAK) -> Float[Tensor, "*any"]:
    """Return clamp(z, 0, 1); backwards, g on 0 < z <= 1, `leak` g where z <= 0 and g < 0, nothing
    elsewhere.

    A negative gradient asks for more importance: it alone may wake a dead component. In forward
    mode the slope at z <= 0 is `leak` for either sign."""
    return _Lower.apply(z, leak)


def upper(z: Float[Tensor, "*any"], leak: float = LEAK) -> Float[Tensor, "*any"]:
    """Return max(z, 0) up to one and 1 + `leak` (z - 1) above it: no importance is ever out of the
    penalty's reach.
    """
    return torch.sub(z.clamp(min=0), torch.relu(z - 1), alpha=1 - leak)


class _Lower(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, leak: float) -> Tensor:
        return z.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        z, ctx.leak = inputs
        ctx.save_for_backward(z)
        ctx.save_for_forward(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        inside = torch.where(z <= 1, gradient, 0.0)
        return torch.where(z > 0, inside, ctx.leak * gradient.clamp(max=0)), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, leak: None) -> Tensor:
        (z,) = ctx.saved_tensors
        inside = torch.where(z <= 1, tangent, 0.0)
        return torch.where(z > 0, inside, ctx.leak * tangent)
