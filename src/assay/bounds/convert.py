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
from assay.targets.bilinear import BilinearBlock, BilinearNetwork

_PRECISIONS = (torch.float32, torch.float64)


def graph_of(model: nn.Module, shape: tuple[int, ...]) -> Graph:
    """Return the graph of a module whose input has the given shape per sample; weights are copied.

    Known: nn.Sequential (nested) of Linear, ReLU, GELU (exact form), Softmax, LayerNorm and RMSNorm
    over the last axis, Flatten, Identity, Dropout in evaluation mode; `BilinearNetwork`. Raises
    `InputError` naming any other module: subclasses too, which may compute something else."""
    _check(model)
    graph = Graph()
    x = graph.input(*shape)
    if type(model) is BilinearNetwork:
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
    """Refuse what a graph cannot see: low precision, hooks, and methods put on one object."""
    for name, tensor in model.named_parameters():
        if tensor.dtype not in _PRECISIONS:
            raise InputError(
                f"parameter {name}: float32 or float64 is needed, got {tensor.dtype}; bounds"
                " cover no lower precision"
            )
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        raise InputError("global forward hooks are set, which bounds cannot see; remove them first")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise InputError(
                f"module {name or 'model'} has forward hooks, which bounds cannot see; remove them"
                " first"
            )
        own = sorted(key for key in vars(module) if callable(getattr(type(module), key, None)))
        if own:
            raise InputError(
                f"module {name or 'model'} has a {own[0]} of its own, which bounds cannot see"
            )


def _add(graph: Graph, x: Ref, module: nn.Module | None, name: str) -> Ref:
    if type(module) is nn.Sequential:
        for child_name, child in module._modules.items():  # named_children() drops repeated ones
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
    return graph.linear(x, _weight(module.weight, name), _weight(module.bias, name))


def _weight(tensor: Any, name: str) -> Any:
    """Return a weight, or none; InputError where it is no float32 or float64 tensor, as one that is
    no parameter may be.
    """
    if tensor is not None and getattr(tensor, "dtype", None) not in _PRECISIONS:
        raise InputError(
            f"module {name}: a weight must be a float32 or float64 tensor, got"
            f" {getattr(tensor, 'dtype', type(tensor).__name__)}"
        )
    return tensor


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
    weight, bias = _weight(module.weight, name), _weight(module.bias, name)
    return graph.layer_norm(x, weight, bias, module.eps)


def _rms_norm(graph: Graph, x: Ref, module: Any, name: str) -> Ref:
    _check_last(graph, x, module, name)
    weight = _weight(module.weight, name)
    if module.eps is not None:
        return graph.rms_norm(x, weight, module.eps)
    if weight is None:
        raise InputError(
            f"module {name}: without eps and weight, the eps of RMSNorm depends on the precision of"
            " its input; set eps"
        )
    reason = (
        ""
        if weight.dtype == torch.float32
        else "level float32: the default eps of RMSNorm is another one in float32; set eps"
    )
    return graph.rms_norm(x, weight, torch.finfo(weight.dtype).eps, unexecuted=reason)


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
    """Add the network as its forward runs it, from the modules that it holds."""
    if math.prod(graph.nodes[x].shape) != model.inputs:
        raise InputError(
            f"shape {graph.nodes[x].shape} does not hold the {model.inputs} entries of the"
            " network's input"
        )
    x = _add_one_of(graph, _cut(graph, x, model), model.embed, "embed", nn.Linear)
    if model.position is not None:
        x = graph.scale(x, bias=_weight(model.position, "position"))
    for number, block in enumerate(model.blocks):
        name = f"blocks.{number}"
        if type(block) is not BilinearBlock:
            raise InputError(
                f"module {name} ({type(block).__name__}) has no bound; BilinearBlock has"
            )
        x = _add_block(graph, x, block, name)
    if model.positions > 1:
        x = _mean_over_positions(graph, x)
    _add_one_of(graph, x, model.head, "head", nn.Linear)


def _add_block(graph: Graph, x: Ref, block: BilinearBlock, name: str) -> Ref:
    if block.gate not in (None, "relu", "gelu"):
        raise InputError(
            f"gate {block.gate!r} of the bilinear network has no bound; known: none, relu, gelu"
        )
    left = _add_one_of(graph, x, block.left, f"{name}.left", nn.Linear)
    if block.gate is not None:
        left = graph.relu(left) if block.gate == "relu" else graph.gelu(left)
    right = _add_one_of(graph, x, block.right, f"{name}.right", nn.Linear)
    product = graph.multiply(left, right)
    down = _add_one_of(graph, product, block.down, f"{name}.down", nn.Linear)
    norms = (nn.Identity, nn.RMSNorm, nn.LayerNorm)
    return _add_one_of(graph, graph.add(x, down), block.norm, f"{name}.norm", *norms)


def _add_one_of(graph: Graph, x: Ref, module: Any, name: str, *kinds: type) -> Ref:
    """Add a part of a known network that is exactly of a kind that may stand there."""
    if type(module) not in kinds:
        known = ", ".join(kind.__name__ for kind in kinds)
        raise InputError(f"module {name} ({type(module).__name__}) has no bound; {known} has")
    return _HANDLERS[type(module)](graph, x, module, name)


def _mean_over_positions(graph: Graph, x: Ref) -> Ref:
    shape = graph.nodes[x].shape
    if len(shape) != 2 or shape[0] & (shape[0] - 1):
        raise InputError(
            f"a mean over the first axis of {shape} is no sum times an exact binary fraction;"
            " bounds need a number of positions that is a power of two"
        )
    # The sum is executed before its division, so that it is what must not overflow.
    total = graph.linear(graph.rearrange(x, shape[::-1], (1, 0)), np.ones((1, shape[0])))
    return graph.scale(graph.rearrange(total, shape[1:]), 1.0 / shape[0])


def _cut(graph: Graph, x: Ref, model: BilinearNetwork) -> Ref:
    """Add what `cut` does to an input, up to the shape of a single position."""
    x = graph.rearrange(x, (model.inputs,)) if len(graph.nodes[x].shape) != 1 else x
    if model.image is None or model.patch is None:
        return x
    channels, height, across = model.image
    rows, columns, side = height // model.patch, across // model.patch, model.patch
    tiles = graph.rearrange(x, (channels, rows, side, columns, side))
    shape = (rows * columns, channels * side * side)
    return graph.rearrange(tiles, shape if rows * columns > 1 else shape[1:], (1, 3, 0, 2, 4))
