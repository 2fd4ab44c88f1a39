"""Derivatives of traced graphs: equal to those of the network at points, around them over boxes;
what they allow to pin loses nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from assay.bounds.levels import arithmetic
from assay.bounds.rounding import Interval
from assay.bounds.rules import FUNCTIONS, Slope
from assay.bounds.search.branch import least
from assay.bounds.search.leaves import Budget
from assay.bounds.search.pins import Derivatives, Pinned, pinned
from assay.bounds.search.reach import needed
from assay.bounds.search.sweep import sweep
from assay.bounds.trace import Traced, trace
from assay.bounds.trace.derivative import derive
from assay.errors import AssayError

SIZE = 4


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


A, B, C, D = draw(SIZE, 6), draw(6, 6), draw(6, SIZE), draw(SIZE, SIZE)


def attention(x: Tensor) -> Tensor:
    h = x[:, None] * D
    shares = torch.softmax(h @ h.mT * 0.3, -1)
    return (shares @ h)[-1]


FUNCTIONS_OF: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: torch.relu(torch.relu(x @ A + 0.3) @ B - 0.2) @ C,
    "gated sum": lambda x: (D[0] + (x - 1) * D[1]) @ A @ C + ((x - 1) * D[2]) @ A @ C,
    "bilinear": lambda x: ((x @ A) * (x @ A @ B)) @ C - x,
    "gelu": lambda x: nn.functional.gelu(x @ A) @ C / 1.7,
    "tanh": lambda x: (torch.tanh(x @ A) + nn.functional.silu(x @ A)) @ C,
    "gelu, tanh form": lambda x: nn.functional.gelu(x @ A, approximate="tanh") @ C,
    "layer norm": lambda x: nn.functional.layer_norm(x @ D, (SIZE,)) @ D,
    "root": lambda x: (x @ A) @ C * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.5),
    "attention": attention,
    "expanded": lambda x: (x[None, :].expand(3, SIZE) * D[:3]).sum(0),
}


def traced(name: str) -> Traced:
    return trace(lambda x: FUNCTIONS_OF[name](x), torch.ones(SIZE, dtype=torch.float64))


def gradients(name: str, points: np.ndarray, row: np.ndarray) -> np.ndarray:
    found = []
    for point in torch.from_numpy(points):
        x = point.clone().requires_grad_(True)
        (FUNCTIONS_OF[name](x) * torch.from_numpy(row)).sum().backward()
        assert x.grad is not None
        found.append(x.grad.numpy())
    return np.stack(found)


@pytest.mark.parametrize("name", FUNCTIONS_OF)
def test_derivatives_are_those_of_the_network(name: str) -> None:
    rng = np.random.default_rng(0)
    row = rng.normal(size=SIZE)
    graphs = traced(name)
    for level in ("float64", "real"):
        found = derive(graphs.at(level), row)
        assert found is not None
        (ref,) = found.of.values()
        points = rng.uniform(0.2, 1.3, (6, SIZE))
        with np.errstate(all="ignore"):
            at = sweep(found.at, [Interval.exactly(points)]).values[ref]
        truth = gradients(name, points, row)
        scale = 1e-9 * (1 + np.abs(truth).max())
        assert np.all(at.lo <= truth + scale), name
        assert np.all(at.hi >= truth - scale), name
        if "relu" not in name:  # its kinks may be hit by rounding alone
            assert np.all(at.hi - at.lo <= 1e-6 * (1 + np.abs(truth).max()))
        for width in (0.05, 0.5):
            low = rng.uniform(0.2, 1.0, SIZE)
            inside = low + width * rng.uniform(size=(24, SIZE))
            with np.errstate(all="ignore"):
                over = sweep(found.at, [Interval(low[None], low[None] + width)]).values[ref]
            truth = gradients(name, inside, row)
            assert np.all(over.lo <= truth + 1e-9), name
            assert np.all(over.hi >= truth - 1e-9), name


@pytest.mark.parametrize("name", FUNCTIONS_OF)
def test_nothing_is_lost_on_the_face_that_is_left(name: str) -> None:
    """The least value over a grid of the box is reached on the face, for boxes of any width."""
    rng, pins = np.random.default_rng(1), 0
    row = rng.normal(size=SIZE)
    derivatives = Derivatives(traced(name), row, "real")
    for width in (0.02, 0.2, 0.6):
        low = rng.uniform(0.2, 1.0, SIZE)
        lows, highs = [low], [low + width]
        found = derivatives.pins([low[None]], [low[None] + width])[0]
        pins += len(found.ends)
        face_low, face_high = pinned(lows, highs, found)

        def values(lo: np.ndarray, hi: np.ndarray) -> float:
            axes = [np.linspace(a, b, 4) if a < b else [a] for a, b in zip(lo, hi, strict=True)]
            grid = torch.tensor(list(itertools.product(*axes)), dtype=torch.float64)
            weight = torch.from_numpy(row)
            return min(float((FUNCTIONS_OF[name](x) * weight).sum()) for x in grid)

        whole, face = values(low, low + width), values(face_low[0], face_high[0])
        assert face <= whole + 1e-9 * (1 + abs(whole))
    assert pins > 0


def test_an_input_that_the_value_does_not_read_is_pinned() -> None:
    found = trace(lambda x, y: x * 2.0 + 0.0 * 3.0, torch.ones(2), torch.ones(2))
    pins = Derivatives(found, np.ones(2), "real").pins(
        [np.zeros((1, 2))] * 2, [np.ones((1, 2))] * 2
    )
    assert {end[:2] for end in pins[0].ends} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_there_are_none_for_what_is_executed() -> None:
    derivatives = Derivatives(traced("bilinear"), np.ones(SIZE), "float32")
    low = np.zeros((2, SIZE))
    assert derivatives.pins([low], [low + 1e-3]) == [Pinned(())] * 2


@pytest.mark.parametrize("name", ["relu", *FUNCTIONS])
def test_a_slope_encloses_the_derivative(name: str) -> None:
    rng = np.random.default_rng(2)
    positive = name != "relu" and FUNCTIONS[name].above == 0
    lo = rng.uniform(0.1 if positive else -4, 4, 200)
    hi = lo + rng.choice([0.0, 0.1, 3.0], 200) * rng.uniform(size=200)
    ar = arithmetic("real")
    value = Slope(name).interval([Interval(lo, hi)], ar)
    for share in np.linspace(0, 1, 9):
        x = np.clip(lo + share * (hi - lo), lo, hi)
        slope = (x > 0).astype(float) if name == "relu" else FUNCTIONS[name].slope(x)
        slack = 1e-12 * (1 + np.abs(slope))
        assert np.all(value.lo <= slope + slack)
        assert np.all(value.hi >= slope - slack)
    if positive:
        with pytest.raises(AssayError, match="derivative"):
            Slope(name).interval([Interval(np.zeros(1), np.ones(1))], ar)


def test_only_what_the_value_depends_on_is_needed() -> None:
    """Of attention read at one position, the queries of that one, and all keys and values."""
    inputs = torch.ones(3, SIZE, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        mixed = torch.softmax(x @ D @ x.mT, -1) @ x
        return nn.functional.gelu(mixed @ D)[-1]

    graph = trace(function, inputs).at("float64").graph
    masks = needed(graph)
    names = [type(node.operation).__name__ for node in graph.nodes]
    softmax, gelu = names.index("Softmax"), names.index("Smooth")
    for ref in (softmax, gelu):
        mask = masks[ref].reshape(3, -1)
        assert mask[-1].all()
        assert not mask[:-1].any()
    assert masks[graph.inputs[0]].all()


def test_the_bilinear_damage_is_exact_without_a_split() -> None:
    """Where every derivative keeps its sign, the worst corner is known."""
    found, low = traced("bilinear"), torch.full((SIZE,), 0.97, dtype=torch.float64)
    result = least(
        found, [low], [torch.ones(SIZE, dtype=torch.float64)], np.ones(SIZE), budget=Budget(boxes=1)
    )
    assert result.boxes == 1
    assert result.value - result.bound <= 1e-9 * abs(result.value)
