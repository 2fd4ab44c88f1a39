"""The weights of a residual bilinear network, read from a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as f

from assay.errors import InputError, unknown
from assay.io.files import require_finite
from assay.targets.bilinear import GATES, cut


@dataclass(frozen=True)
class Layer:
    """One block: `y = x + down @ (s(left x) * right x)`, `x' = y`, or RMSNorm of `y` where
    `gain` is not None.
    """

    left: Float[Tensor, "hidden width"]
    right: Float[Tensor, "hidden width"]
    down: Float[Tensor, "width hidden"]
    gain: Float[Tensor, " width"] | None = None
    epsilon: float = 0.0


@dataclass(frozen=True)
class ChannelWeights:
    """A residual bilinear network as plain tensors, in one dtype; the functions of this package
    read nothing else.
    """

    embed: Float[Tensor, "width entries"]
    layers: tuple[Layer, ...]
    head: Float[Tensor, "classes width"]
    position: Float[Tensor, "positions width"] | None = None
    gate: str | None = None
    image: tuple[int, int, int] | None = None
    patch: int | None = None

    @property
    def normed(self) -> bool:
        return self.layers[0].gain is not None

    @property
    def hidden(self) -> int:
        return self.layers[0].left.shape[0]

    @property
    def width(self) -> int:
        return self.embed.shape[0]

    @property
    def positions(self) -> int:
        return 1 if self.position is None else self.position.shape[0]

    def first(self, inputs: Tensor) -> Float[Tensor, "rows width"]:
        """Return the embedded inputs, one row per example and position."""
        entries = self.embed.shape[1]
        if self.image is not None and self.patch is not None:
            channels, height, across = self.image
            inputs = cut(inputs, channels * height * across, self.image, self.patch)
        else:
            inputs = cut(inputs, entries, None, None)
        states = f.linear(inputs.to(self.embed.dtype), self.embed)
        if self.position is not None:
            states = states + self.position
        return states.reshape(-1, self.width)

    def require_polynomial(self, what: str) -> None:
        """Raise InputError when a gate nonlinearity makes the blocks no longer quadratic."""
        if self.gate is not None:
            raise InputError(
                f"{what} needs blocks that are quadratic in their input; the gate {self.gate!r} on"
                " L x makes them another function. Use exact ablation, or the general second"
                " order, or a network without a gate"
            )


def read_weights(
    model: nn.Module, dtype: torch.dtype | None = None, *, check: bool = True
) -> ChannelWeights:
    """Return the weights of a module with `embed`, `blocks.{i}.left/right/down` (and `norm`),
    `head`; nn.Linear without biases.

    The tensors are the module's own parameters where `dtype` is theirs, so that gradients flow to
    them. With `check`, NaN and infinite weights are refused.

    Raises InputError when a layer is missing, has a bias or another shape.
    """
    embed = _weight(model, "embed", dtype)
    head = _weight(model, "head", dtype)
    blocks = list(getattr(model, "blocks", ()))
    if not blocks:
        raise InputError(
            "model has no blocks; channels need `blocks.{i}` with left, right and down projections"
        )
    layers = []
    for index, block in enumerate(blocks):
        left, right, down = (
            _weight(block, name, dtype, f"blocks.{index}.") for name in ("left", "right", "down")
        )
        if not (left.shape == right.shape == down.T.shape == (left.shape[0], embed.shape[0])):
            raise InputError(
                f"blocks.{index}: left and right must be (hidden, {embed.shape[0]}) and down"
                f" ({embed.shape[0]}, hidden); got {tuple(left.shape)}, {tuple(right.shape)},"
                f" {tuple(down.shape)}"
            )
        layers.append(Layer(left, right, down, *_norm(block, index, embed.shape[0], dtype)))
    if (
        len({layer.left.shape for layer in layers}) > 1
        or len({layer.gain is None for layer in layers}) > 1
    ):
        raise InputError("all blocks must have the same number of channels, and all or none a norm")
    if head.shape[1] != embed.shape[0]:
        raise InputError(f"head reads {head.shape[1]} entries but the states have {embed.shape[0]}")
    gates = {getattr(block, "gate", None) for block in blocks}
    gate = gates.pop()
    if gates:
        raise InputError("all blocks must have the same gate")
    if gate is not None and gate not in GATES:
        raise unknown("gate", str(gate), GATES)
    position = getattr(model, "position", None)
    weights = ChannelWeights(
        embed,
        tuple(layers),
        head,
        None if position is None else _cast(position, dtype),
        gate,
        getattr(model, "image", None),
        getattr(model, "patch", None),
    )
    if check:
        for name, parameter in model.named_parameters():
            require_finite(parameter, f"the model's parameter {name!r}")
    return weights


def _weight(module: Any, name: str, dtype: torch.dtype | None, prefix: str = "") -> Tensor:
    layer = getattr(module, name, None)
    if not isinstance(layer, nn.Linear):
        raise InputError(f"{prefix}{name} must be an nn.Linear, got {type(layer).__name__}")
    if layer.bias is not None:
        raise InputError(f"{prefix}{name} has a bias; channels need projections without biases")
    return _cast(layer.weight, dtype)


def _norm(
    block: Any, index: int, width: int, dtype: torch.dtype | None
) -> tuple[Tensor | None, float]:
    norm = getattr(block, "norm", None)
    if norm is None or isinstance(norm, nn.Identity):
        return None, 0.0
    if not isinstance(norm, nn.RMSNorm) or norm.normalized_shape != (width,):
        raise InputError(
            f"blocks.{index}.norm must be an nn.RMSNorm over the {width} entries of a state, got"
            f" {norm}"
        )
    gain = torch.ones(width) if norm.weight is None else norm.weight
    epsilon = torch.finfo(gain.dtype).eps if norm.eps is None else norm.eps
    return _cast(gain, dtype), float(epsilon)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)
