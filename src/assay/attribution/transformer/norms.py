"""Layer norms taken apart: `y = gain * scale(x) * (x - mean) + offset`, for LayerNorm and every
kind of RMSNorm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.errors import InputError


@dataclass(frozen=True)
class Normed:
    """A norm at one input: `unit = scale * (x - mean)` (without the mean where `centred` is false),
    `gain` and `offset` (width,).

    Its derivative along v is `gain * scale * (v - mean(v) - unit * <unit, v> / width)`.
    """

    unit: Float[Tensor, "*rows width"]
    scale: Float[Tensor, "*rows one"]
    gain: Float[Tensor, " width"]
    offset: Float[Tensor, " width"]
    centred: bool


def is_norm(module: nn.Module) -> bool:
    """Say whether a module is a layer norm that can be taken apart."""
    return isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__


def read_norm(module: nn.Module, value: Float[Tensor, "*rows width"]) -> Normed:
    """Take a norm apart at an input; InputError for any other module."""
    width, centred = value.shape[-1], isinstance(module, nn.LayerNorm)
    if not is_norm(module):
        raise InputError(f"a LayerNorm or an RMSNorm is needed, got a {type(module).__name__}")
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    epsilon = torch.finfo(value.dtype).eps if epsilon is None else float(epsilon)
    inner = value - value.mean(-1, keepdim=True) if centred else value
    scale = torch.rsqrt(inner.square().mean(-1, keepdim=True) + epsilon)
    if isinstance(module, nn.LayerNorm):
        gain = value.new_ones(width) if module.weight is None else module.weight.detach()
        offset = value.new_zeros(width) if module.bias is None else module.bias.detach()
    else:
        # Some families store the gain less one: the norm itself says what it multiplies with.
        with torch.no_grad():
            gain = module.forward(value.new_ones(width)) * (1 + epsilon) ** 0.5
        offset = value.new_zeros(width)
    return Normed(inner * scale, scale, gain, offset, centred)
