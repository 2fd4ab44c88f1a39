"""Norms as plain tensor operations, for second derivatives.

The forward derivative of a fused norm reads the mean and scale that the norm saved, and a second
forward derivative takes these for constants: in torch 2 it is silently wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class PlainNorms(TorchFunctionMode):
    """While it is active, layer, group and RMS norms are computed by plain operations."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    return _scaled(centred / (centred.square().mean(axes, keepdim=True) + eps).sqrt(), weight, bias)


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    least = torch.finfo(input.dtype).eps if eps is None else eps
    return _scaled(input / (input.square().mean(axes, keepdim=True) + least).sqrt(), weight, None)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    rows = input.unflatten(1, (num_groups, -1)).flatten(2)
    normed = _layer_norm(rows, rows.shape[-1:], eps=eps).reshape(input.shape)
    shape = (1, -1, *[1] * (input.ndim - 2))
    some = [None if entry is None else entry.reshape(shape) for entry in (weight, bias)]
    return _scaled(normed, *some)


def _scaled(value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    value = value if weight is None else value * weight
    return value if bias is None else value + bias


_PLAIN: dict[Any, Callable[..., Any]] = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    functional.group_norm: _group_norm,
    torch.group_norm: _group_norm,
}
