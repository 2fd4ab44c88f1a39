"""Whatever could overflow in float32 is refused at level float32; what is not refused holds, up to
the largest numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import networks
import pytest
import torch
from torch import Tensor, nn

from assay.bounds import Graph, ball, bound, graph_of
from assay.errors import AssayError
from assay.targets.bilinear import BilinearNetwork

WIDTH = 8
Network = tuple[Graph, Callable[[Tensor], Tensor]]


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def module(model: nn.Module) -> Network:
    model = model.requires_grad_(False)
    return graph_of(model, (WIDTH,)), model


def built(build: Callable[[Graph, int], int], forward: Callable[[Tensor], Tensor]) -> Network:
    graph = Graph()
    build(graph, graph.input(WIDTH))
    return graph, forward


def patches(norm: bool) -> Network:
    model = BilinearNetwork(
        WIDTH,
        3,
        width=2,
        hidden=2,
        blocks=1,
        image=(2, 4),
        patch=1,
        norm=norm,
        generator=networks.generator(0),
    )
    with torch.no_grad():
        for layer in ("left", "right", "down"):  # the products themselves must not overflow
            getattr(model.blocks[0], layer).weight.zero_()
        model.embed.weight.fill_(1.0)
    return module(model)


def attention_scores(graph: Graph, x: int) -> int:
    rows = graph.rearrange(x, (2, 4))
    return graph.matmul(rows, graph.rearrange(rows, (4, 2), (1, 0)))


ONES = torch.ones(WIDTH, WIDTH)
TINY = 2.0**-60
NETWORKS: dict[str, Callable[[], Network]] = {
    "rms norm": lambda: module(nn.RMSNorm(WIDTH, eps=1e-6)),
    "rms norm with a gain": lambda: module(
        nn.Sequential(nn.RMSNorm(WIDTH, eps=1e-6), linear(ONES * 1e30), nn.RMSNorm(WIDTH, eps=1e-6))
    ),
    "a large gain": lambda: module(large_gain(1e38)),
    "linear": lambda: module(linear(ONES)),
    "cancelling": lambda: module(linear(torch.tensor([[1.0, -1.0] * 4]))),
    "bias": lambda: module(linear(ONES * TINY, torch.full((WIDTH,), 3e38))),
    "relu": lambda: module(nn.Sequential(linear(ONES), nn.ReLU(), linear(ONES * TINY))),
    "relu alone": lambda: module(nn.ReLU()),
    "gelu": lambda: module(nn.GELU()),
    "softmax": lambda: module(nn.Softmax(-1)),
    "softmax of sums": lambda: module(nn.Sequential(linear(ONES), nn.Softmax(-1))),
    "layer norm": lambda: module(nn.LayerNorm(WIDTH)),
    "product": lambda: built(lambda g, x: g.multiply(x, x), lambda x: x * x),
    "sum": lambda: built(lambda g, x: g.add(x, x), lambda x: x + x),
    "difference": lambda: built(lambda g, x: g.subtract(x, x), lambda x: x - x),
    "scale": lambda: built(lambda g, x: g.scale(x, 3.0, 1.0), lambda x: 3 * x + 1),
    "shift": lambda: built(lambda g, x: g.scale(x, bias=3e38), lambda x: x + 3e38),
    "matmul": lambda: built(
        attention_scores, lambda x: x.reshape(-1, 2, 4) @ x.reshape(-1, 2, 4).mT
    ),
    "mean over positions": lambda: patches(norm=False),
    "mean over positions of norms": lambda: patches(norm=True),
}


def large_gain(size: float) -> nn.RMSNorm:
    norm = nn.RMSNorm(WIDTH, eps=1e-6)
    with torch.no_grad():
        norm.weight.fill_(size)
    return norm


# What level float32 refuses at every size: a norm of sums of 1e30, a bias near the largest number,
# and LayerNorm, whose variance torch does not sum in one fixed way.
NEVER = {"rms norm with a gain", "bias", "shift", "layer norm"}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["interval", "crown"])
def test_nothing_overflows_behind_a_bound(name: str, method: str) -> None:
    graph, forward = NETWORKS[name]()
    gen = networks.generator(1)
    accepted = refused = 0
    for power in [*range(-20, 56, 19), *range(56, 128, 2), 127.9]:
        x = (torch.rand(4, WIDTH, generator=gen) * 0.5 + 0.5) * 2.0**power
        x = x * (2 * (torch.rand(4, WIDTH, generator=gen) > 0.3).float() - 1)
        x[3] = x[3].abs()
        x[2] = x[2].abs().max()
        for sample in x:
            value = forward(sample[None])
            try:
                found = bound(graph, ball(sample[None], 0.0), level="float32", method=method)
            except AssayError:
                refused += 1
                continue
            accepted += 1
            assert torch.isfinite(value).all(), f"{value} at 2^{power}, bounded by {found}"
            assert found.contain(value), f"{value} at 2^{power}, bounded by {found}"
    assert (accepted == 0) == (name in NEVER)
    assert refused or name in ("softmax", "relu alone", "difference")


def test_a_norm_that_returns_zero_is_not_bounded_by_one() -> None:
    graph, forward = NETWORKS["rms norm"]()
    x = torch.full((1, WIDTH), 1.85e19)
    assert torch.all(forward(x) == 0)
    with pytest.raises(AssayError, match="may exceed float32"):
        bound(graph, ball(x, 0.0), level="float32")
    assert bound(graph, ball(x, 0.0), level="real").contain(torch.ones(1, WIDTH))


def test_a_mean_is_executed_as_a_sum_first() -> None:
    graph, forward = NETWORKS["mean over positions"]()
    x = torch.full((1, WIDTH), 2.0**125.5)
    assert torch.all(~torch.isfinite(forward(x)))
    with pytest.raises(AssayError, match="may exceed float32"):
        bound(graph, ball(x, 0.0), level="float32")


def test_subnormal_numbers_may_be_flushed() -> None:
    small = torch.full((1, WIDTH), 2.0**-130)
    graph, forward = NETWORKS["relu alone"]()
    scaled, times = built(lambda g, x: g.scale(g.relu(x), 2.0**20), lambda x: x.relu() * 2.0**20)
    flushed = torch.set_flush_denormal(True)
    try:
        values = forward(small), times(small)
    finally:
        torch.set_flush_denormal(False)
    for network, value in zip((graph, scaled), values, strict=True):
        found = bound(network, ball(small, 0.0), level="float32")
        assert found.contain(value)
        assert found.contain(torch.zeros(1, WIDTH)) or not flushed
