"""Graphs of torch modules: sequential networks of known layers, and residual bilinear networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from assay.bounds.graph import Graph, Ref
from assay.errors import InputError
from assay.targets.bilinear import BilinearNetwork


def graph_of(model: nn.Module, shape: tuple[int, ...]) -> Graph:
    """Return the graph of a module whose input has the given shape per sample.

    Known: nn.Sequential (nested) of Linear, ReLU, GELU (exact form), Softmax, LayerNorm and RMSNorm
    over the last axis, Flatten, Identity, Dropout in evaluation mode; `BilinearNetwork`. Raises
    `InputError` naming any other module."""
    _check(model)
    graph = Graph()
    x = graph.input(*shape)
    if isinstance(model, BilinearNetwork):
        _add_bilinear(graph, x, model)
    else:
        _add(graph, x, model, "model")
    return graph


def bilinear_graph(embed: Any, blocks: list[tuple[Any, Any, Any]], head: Any) -> Graph:
    """Return the graph of `x_l = x_{l-1} + D (L x_{l-1} * R x_{l-1})` from weights: blocks of
    (L, R, D), linear embedding and head.
    """
    graph = Graph()
    x = graph.linear(graph.input(np.shape(embed)[1]), embed)
    for left, right, down in blocks:
        x = graph.add(
            x, graph.linear(graph.multiply(graph.linear(x, left), graph.linear(x, right)), down)
        )
    graph.linear(x, head)
    return graph


def _check(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"parameter {name}: float32 or float64 is needed, got {parameter.dtype}; bounds"
                " cover no lower precision"
            )
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise InputError(
                f"module {name or 'model'} has forward hooks, which bounds cannot see; remove them"
                " first"
            )


def _add(graph: Graph, x: Ref, module: nn.Module, name: str) -> Ref:
    if type(module) is nn.Sequential:
        for child_name, child in module.named_children():
            x = _add(graph, x, child, f"{name}.{child_name}")
        return x
    handler = _HANDLERS.get(type(module))
    if handler is None:
        known = ", ".join(sorted(t.__name__ for t in _HANDLERS))
        raise InputError(
            f"module {name} ({type(module).__name__}) has no bound; known: {known}, Sequential,"
            " BilinearNetwork"
        )
    return handler(graph, x, module, name)


def _linear(graph: Graph, x: Ref, module: Any, name: str) -> Ref:
    return graph.linear(x, module.weight, module.bias)


def _relu(graph: Graph, x: Ref, module: Any, name: str) -> Ref:
    return graph.relu(x)


def _gelu(graph: Graph, x: Ref, module: Any, name: str) -> Ref:
    if module.approximate != "none":
        raise InputError(
            f"module {name}: GELU approximate={module.approximate!r} has no bound; only the exact"
            " form has"
        )
    return graph.gelu(x)


def _softmax(graph: Graph, x: Ref, module: Any, name: str) -> Ref:
    axes = len(graph.nodes[x].shape) + 1
    if module.dim not in (-1, axes - 1):
        raise InputError(
            f"module {name}: softmax along axis {module.dim} has no bound; only along the last axis"
        )
    return graph.softmax(x)


def _layer_norm(graph: Graph, x: Ref, module: Any, name: str) -> Ref:
    _check_last(graph, x, module, name)
    return graph.layer_norm(x, module.weight, module.bias, module.eps)


def _rms_norm(graph: Graph, x: Ref, module: Any, name: str) -> Ref:
    _check_last(graph, x, module, name)
    dtype = torch.float32 if module.weight is None else module.weight.dtype
    return graph.rms_norm(
        x, module.weight, torch.finfo(dtype).eps if module.eps is None else module.eps
    )


def _check_last(graph: Graph, x: Ref, module: Any, name: str) -> None:
    if tuple(module.normalized_shape) != graph.nodes[x].shape[-1:]:
        raise InputError(
            f"module {name}: a norm over {tuple(module.normalized_shape)} has no bound on"
            f" {graph.nodes[x].shape}; only the last axis"
        )


def _flatten(graph: Graph, x: Ref, module: Any, name: str) -> Ref:
    if module.start_dim != 1 or module.end_dim != -1:
        raise InputError(
            f"module {name}: Flatten({module.start_dim}, {module.end_dim}) has no bound; only"
            " Flatten(1, -1)"
        )
    return graph.rearrange(x, (math.prod(graph.nodes[x].shape),))


def _same(graph: Graph, x: Ref, module: Any, name: str) -> Ref:
    if isinstance(module, nn.Dropout) and module.training and module.p > 0:
        raise InputError(f"module {name}: Dropout is in training mode; call model.eval() first")
    return x


_HANDLERS: dict[type, Callable[[Graph, Ref, Any, str], Ref]] = {
    nn.Linear: _linear,
    nn.ReLU: _relu,
    nn.GELU: _gelu,
    nn.Softmax: _softmax,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.Flatten: _flatten,
    nn.Identity: _same,
    nn.Dropout: _same,
}


def _add_bilinear(graph: Graph, x: Ref, model: BilinearNetwork) -> None:
    if model.gate not in (None, "relu", "gelu"):
        raise InputError(
            f"gate {model.gate!r} of the bilinear network has no bound; known: none, relu, gelu"
        )
    if model.positions & (model.positions - 1):
        raise InputError(
            f"a mean over {model.positions} positions is no exact binary fraction; bounds need a"
            " power of two"
        )
    if math.prod(graph.nodes[x].shape) != model.inputs:
        raise InputError(
            f"shape {graph.nodes[x].shape} does not hold the {model.inputs} entries of the"
            " network's input"
        )
    x = graph.linear(_cut(graph, x, model), model.embed.weight)
    if model.position is not None:
        x = graph.scale(x, bias=model.position)
    for block in model.blocks:
        left = graph.linear(x, block.left.weight)  # type: ignore[union-attr]
        if model.gate is not None:
            left = graph.relu(left) if model.gate == "relu" else graph.gelu(left)
        product = graph.multiply(left, graph.linear(x, block.right.weight))  # type: ignore[union-attr]
        x = graph.add(x, graph.linear(product, block.down.weight))  # type: ignore[union-attr]
        if model.normed:
            x = _rms_norm(graph, x, block.norm, "norm")
    if model.positions > 1:
        flipped = graph.rearrange(x, (model.width, model.positions), (1, 0))
        mean = graph.linear(flipped, np.full((1, model.positions), 1.0 / model.positions))
        x = graph.rearrange(mean, (model.width,))
    graph.linear(x, model.head.weight)


def _cut(graph: Graph, x: Ref, model: BilinearNetwork) -> Ref:
    x = graph.rearrange(x, (model.inputs,)) if len(graph.nodes[x].shape) != 1 else x
    if model.positions == 1 or model.image is None or model.patch is None:
        return x
    channels, height, across = model.image
    rows, columns, side = height // model.patch, across // model.patch, model.patch
    tiles = graph.rearrange(x, (channels, rows, side, columns, side))
    return graph.rearrange(tiles, (rows * columns, channels * side * side), (1, 3, 0, 2, 4))
