"""Small networks with their graph and a plain float64 forward, shared by the tests of bound
propagation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from assay.bounds import Graph, bilinear_graph, graph_of


@dataclass(frozen=True)
class Case:
    """A graph, the same function in plain torch, and the input shape of one sample."""

    graph: Graph
    forward: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal float32 numbers over the root of the last axis, so that they are exact in
    float64.
    """
    return torch.randn(shape, generator=generator(seed)) / shape[-1] ** 0.5


def mlp(widths: list[int], seed: int = 0, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """A dense network with torch's own initial distribution, drawn from a generator."""
    layers: list[nn.Module] = []
    gen = generator(seed)
    for i, (into, out) in enumerate(itertools.pairwise(widths)):
        layer = nn.Linear(into, out)
        with torch.no_grad():
            layer.weight.copy_((2 * torch.rand(out, into, generator=gen) - 1) / into**0.5)
            layer.bias.copy_((2 * torch.rand(out, generator=gen) - 1) / into**0.5)
        layers += [layer, activation()] if i < len(widths) - 2 else [layer]
    return nn.Sequential(*layers)


def sequential(model: nn.Module, *shape: int) -> Case:
    return Case(graph_of(model, shape), model.requires_grad_(False).double(), shape)


def bilinear() -> Case:
    embed, head = normal(0, 6, 5), normal(1, 3, 6)
    blocks = [(normal(10 + i, 8, 6), normal(20 + i, 8, 6), normal(30 + i, 6, 8)) for i in range(3)]

    def forward(x: Tensor) -> Tensor:
        x = x @ embed.double().T
        for left, right, down in blocks:
            x = x + ((x @ left.double().T) * (x @ right.double().T)) @ down.double().T
        return x @ head.double().T

    return Case(bilinear_graph(embed, list(blocks), head), forward, (5,))


def attention() -> Case:
    """Two heads, causal, between two RMS norms, with a residual stream and a GELU layer."""
    tokens, width, heads = 4, 6, 2
    q, k, v, o = (normal(40 + i, width, width) for i in range(4))
    up, down = normal(50, 9, width), normal(51, width, 9)
    gain = normal(52, width) + 1
    mask = torch.tril(torch.ones(tokens, tokens))
    graph = Graph()
    x = graph.input(tokens, width)
    normed = graph.rms_norm(x, gain, 1e-5)
    split = [
        graph.rearrange(graph.linear(normed, w), (tokens, heads, width // heads)) for w in (q, k, v)
    ]
    query, value = (
        graph.rearrange(split[i], (heads, tokens, width // heads), (1, 0, 2)) for i in (0, 2)
    )
    key = graph.rearrange(split[1], (heads, width // heads, tokens), (1, 2, 0))
    scores = graph.scale(graph.matmul(query, key), 0.5)
    mixed = graph.rearrange(
        graph.matmul(graph.softmax(scores, mask), value), (tokens, width), (1, 0, 2)
    )
    x = graph.add(x, graph.linear(mixed, o))
    graph.add(x, graph.linear(graph.gelu(graph.linear(graph.rms_norm(x, gain, 1e-5), up)), down))

    def norm(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain.double()

    def forward(x: Tensor) -> Tensor:
        parts = [
            (norm(x) @ w.double().T).unflatten(-1, (heads, -1)).transpose(-2, -3) for w in (q, k, v)
        ]
        scores = (0.5 * parts[0] @ parts[1].transpose(-1, -2)).masked_fill(mask == 0, -torch.inf)
        mixed = (scores.softmax(-1) @ parts[2]).transpose(-2, -3).flatten(-2)
        x = x + mixed @ o.double().T
        return x + nn.functional.gelu(norm(x) @ up.double().T) @ down.double().T

    return Case(graph, forward, (tokens, width))


def layer_norm() -> Case:
    model = nn.Sequential(mlp([5, 8], 3), nn.LayerNorm(8), mlp([8, 8, 4], 4), nn.Softmax(-1))
    with torch.no_grad():
        model[1].weight.copy_(normal(5, 8) + 1)
        model[1].bias.copy_(normal(6, 8))
    return sequential(model, 5)


CASES: dict[str, Callable[[], Case]] = {
    "relu": lambda: sequential(mlp([5, 12, 12, 3]), 5),
    "gelu": lambda: sequential(mlp([5, 12, 12, 3], 1, nn.GELU), 5),
    "bilinear": bilinear,
    "attention": attention,
    "layer_norm": layer_norm,
    "rms_norm": lambda: sequential(
        nn.Sequential(mlp([5, 8], 8), nn.RMSNorm(8, eps=1e-6), mlp([8, 4], 2)), 5
    ),
}


def points(box_lo: np.ndarray, box_hi: np.ndarray, count: int, seed: int) -> Tensor:
    """Points of boxes, (count, samples, *shape): half of them corners."""
    gen = generator(seed)
    lo, hi = torch.as_tensor(box_lo), torch.as_tensor(box_hi)
    share = torch.rand(count, *lo.shape, generator=gen, dtype=torch.float64)
    share[::2] = (share[::2] > 0.5).double()
    return torch.clamp(lo + share * (hi - lo), lo, hi)
