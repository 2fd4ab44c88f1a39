"""Bounds contain what they bound: sampled, executed and exact rational values; and equal a dense
backward CROWN.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import networks
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from assay.bounds import (
    Graph,
    Interval,
    ball,
    bilinear_graph,
    bound,
    engine,
    graph_of,
    linear_lower,
)
from assay.bounds.propagate import METHODS
from assay.errors import AssayError, InputError

LEVELS = ["float64", "real", "float32"]


def centres(case: networks.Case, samples: int, seed: int = 7) -> np.ndarray:
    return torch.randn(samples, *case.shape, generator=networks.generator(seed)).double().numpy()


@torch.no_grad()
def sampled_range(case: networks.Case, box: Interval, count: int) -> tuple[np.ndarray, np.ndarray]:
    values = case.forward(networks.points(box.lo, box.hi, count, 11))
    return values.amin(0).numpy(), values.amax(0).numpy()


@pytest.mark.parametrize("name", networks.CASES)
@pytest.mark.parametrize("radius", [0.003, 0.1, 1.0])
def test_bounds_are_never_narrower_than_samples(name: str, radius: float) -> None:
    case = networks.CASES[name]()
    box = ball(centres(case, 3), radius)
    least, most = sampled_range(case, box, 2000)
    for level in LEVELS:
        for method in METHODS:
            if level == "float32" and name == "layer_norm":
                continue
            found = bound(case.graph, box, method=method, level=level)
            assert found.level == level
            # The samples themselves are rounded to float64.
            assert np.all(found.lower <= least + 1e-12)
            assert np.all(most - 1e-12 <= found.upper)


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.CASES)
@pytest.mark.parametrize("radius", [0.01, 0.3])
def test_bounds_are_never_narrower_than_a_hundred_thousand_samples(
    name: str, radius: float
) -> None:
    case = networks.CASES[name]()
    box = ball(centres(case, 2), radius)
    found = bound(case.graph, box, level="real")
    least, most = sampled_range(case, box, 100_000)
    assert np.all(found.lower <= least + 1e-12)
    assert np.all(most - 1e-12 <= found.upper)


@pytest.mark.parametrize("name", networks.CASES)
def test_linear_bounds_are_tight_at_small_radii(name: str) -> None:
    """Linear bounds lie inside intervals, and the slack over the sampled range shrinks with the
    square of the radius.
    """
    case = networks.CASES[name]()
    slack = []
    for radius in (1e-3, 1e-4):
        box = ball(centres(case, 2), radius)
        linear, interval = (
            bound(case.graph, box, level="real"),
            bound(case.graph, box, method="interval", level="real"),
        )
        assert linear.width.sum() < interval.width.sum()
        jacobian = torch.func.vmap(torch.func.jacrev(case.forward))(
            torch.as_tensor(centres(case, 2))
        )
        reach = 2 * radius * jacobian.abs().flatten(-len(case.shape)).sum(-1).numpy()
        slack.append(np.max(linear.width - reach))
    assert slack[1] < 0.05 * slack[0] + 1e-12


def dense_crown(
    model: nn.Sequential, x: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Backward CROWN of a ReLU network written plainly: every layer's bounds from all the layers
    before it.
    """
    layers = [m for m in model if isinstance(m, nn.Linear)]
    weights = [m.weight.detach().double().numpy() for m in layers]
    biases = [m.bias.detach().double().numpy() for m in layers]
    known: list[tuple[np.ndarray, np.ndarray]] = []
    for k in range(len(weights)):
        ends = []
        for sign in (1.0, -1.0):
            A = sign * np.repeat(weights[k][None], len(x), 0)
            c = np.repeat(sign * biases[k][None], len(x), 0)
            for j in range(k - 1, -1, -1):
                lo, hi = known[j]
                unstable = (lo < 0) & (hi > 0)
                chord = np.where(unstable, hi / np.where(unstable, hi - lo, 1), lo >= 0)
                below = np.where(unstable, hi > -lo, lo >= 0)
                c = c + np.einsum(
                    "bij,bj->bi", np.minimum(A, 0), np.where(unstable, -chord * lo, 0)
                )
                A = np.maximum(A, 0) * below[:, None] + np.minimum(A, 0) * chord[:, None]
                c = c + A @ biases[j]
                A = A @ weights[j]
            ends.append(np.einsum("bij,bj->bi", A, x) - radius * np.abs(A).sum(-1) + c)
        known.append((ends[0], -ends[1]))
    return known[-1]


@pytest.mark.parametrize("level", ["float64", "real"])
def test_equal_to_a_dense_backward_crown(level: str) -> None:
    model = networks.mlp([64, 256, 256, 10], seed=0)
    x = torch.randn(64, 64, generator=networks.generator(1)).double().numpy()
    lower, upper = dense_crown(model, x, 0.01)
    found = bound(graph_of(model, (64,)), ball(x, 0.01), level=level)
    assert np.abs(found.lower - lower).max() < 1e-6
    assert np.abs(found.upper - upper).max() < 1e-6
    assert 0.015 < found.width.mean() < 0.017
    interval = bound(graph_of(model, (64,)), ball(x, 0.01), method="interval", level=level)
    assert 1.2 < interval.width.mean() < 1.4


def test_chunks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    case = networks.CASES["relu"]()
    box = ball(centres(case, 5), 0.1)
    whole, single = (bound(case.graph, box, chunk=chunk) for chunk in (None, 1))
    assert np.allclose(whole.lower, single.lower, rtol=0, atol=1e-13)
    assert np.array_equal(whole.lower, bound(case.graph, box).lower)
    monkeypatch.setattr(engine, "ROWS", 100)
    assert np.allclose(whole.lower, bound(case.graph, box).lower, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", networks.CASES)
def test_margins_as_objectives_are_tighter_than_differences(name: str) -> None:
    case = networks.CASES[name]()
    box = ball(centres(case, 2), 0.05)
    shape = case.graph.nodes[-1].shape
    row = np.zeros((1, math.prod(shape)))
    row[0, :2] = 1, -1
    whole, margin = bound(case.graph, box), bound(case.graph, box, objective=row.reshape(1, *shape))
    lower, upper = whole.lower.reshape(2, -1), whole.upper.reshape(2, -1)
    assert np.all(margin.lower[:, 0] >= lower[:, 0] - upper[:, 1] - 1e-9)
    values = case.forward(networks.points(box.lo, box.hi, 500, 3)).detach().flatten(2)
    assert margin.contain((values[..., :1] - values[..., 1:2]).numpy())


def test_a_linear_lower_bound_holds_at_every_point() -> None:
    case = networks.CASES["gelu"]()
    box = ball(centres(case, 4), 0.2)
    found = linear_lower(case.graph, box, np.eye(3))
    assert found.coefficients[0].shape == (4, 3, 5)
    x = networks.points(box.lo, box.hi, 1000, 0)
    line = np.einsum("srd,psd->psr", found.coefficients[0], x.numpy()) + found.constant
    values = case.forward(x).detach().numpy()
    assert np.all(line <= values + 1e-12)
    assert np.quantile(values - line, 0.5) < 0.2


def test_several_inputs_share_one_linear_bound() -> None:
    graph = Graph()
    a, b = graph.input(3), graph.input(2)
    graph.add(graph.relu(graph.linear(a, np.ones((4, 3)))), graph.linear(b, np.ones((4, 2))))
    boxes = [ball(np.zeros((1, 3)), 1.0), ball(np.zeros((1, 2)), 0.5)]
    found = linear_lower(graph, boxes, np.eye(4))
    assert [c.shape for c in found.coefficients] == [(1, 4, 3), (1, 4, 2)]
    assert np.allclose(found.coefficients[1], 1)
    assert np.allclose(bound(graph, boxes).upper, 4.0)


@pytest.mark.parametrize("name", networks.CASES)
@pytest.mark.parametrize("level", ["float64", "real"])
def test_euclidean_balls_are_contained_and_beat_their_boxes(name: str, level: str) -> None:
    case = networks.CASES[name]()
    centre, radii = centres(case, 3), np.array([0.3, 0.05, 0.0])
    found, box = (
        bound(case.graph, ball(centre, radii, norm=norm), level=level) for norm in (2, math.inf)
    )
    steps = torch.randn(2000, *centre.shape, generator=networks.generator(2)).double().flatten(2)
    steps = steps / steps.norm(dim=-1, keepdim=True) * torch.as_tensor(radii)[:, None]
    values = (
        case.forward(torch.as_tensor(centre) + steps.reshape(2000, *centre.shape)).detach().numpy()
    )
    assert np.all(found.lower <= values + 1e-12)
    assert np.all(values <= found.upper + 1e-12)
    axes = tuple(range(1, found.width.ndim))
    assert np.all(found.width.sum(axes)[:2] < 0.8 * box.width.sum(axes)[:2])


def test_the_euclidean_bound_of_a_linear_map_is_exact() -> None:
    W = np.random.default_rng(0).normal(size=(6, 9))
    graph = Graph()
    graph.linear(graph.input(9), W)
    found = bound(graph, ball(np.zeros((1, 9)), 0.5, norm=2))
    reach = [math.sqrt(sum(Fraction(float(w)) ** 2 for w in row)) / 2 for row in W]
    assert np.allclose(found.upper[0], reach, rtol=1e-13)
    for row, end in zip(W, found.upper[0], strict=True):
        assert sum(Fraction(float(w)) ** 2 for w in row) / 4 <= Fraction(float(end)) ** 2


EXTREME = st.one_of(
    st.floats(-2, 2, width=32),
    st.sampled_from(
        [0.0, 5e-324, -5e-324, 1e-310, -1e-200, 1e-160, 1e-45, 3e38, -1e154, 1e300, -1.7e308]
    ),
)


def exact_relu_network(
    weights: list[np.ndarray], biases: list[np.ndarray], x: list[Fraction]
) -> list[Fraction]:
    for i, (W, b) in enumerate(zip(weights, biases, strict=True)):
        x = [
            sum((Fraction(float(w)) * v for w, v in zip(row, x, strict=True)), Fraction(float(o)))
            for row, o in zip(W, b, strict=True)
        ]
        x = [max(v, Fraction(0)) for v in x] if i < len(weights) - 1 else x
    return x


def check_exact(graph: Graph, box: Interval, value_at: object, data: st.DataObject) -> None:
    """Assert that the bounds of level real contain exact values at drawn points, unless they are
    refused as not finite.
    """
    shares = data.draw(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=box.lo.size, max_size=box.lo.size)
    )
    point = [
        Fraction(float(lo)) + Fraction(s) * (Fraction(float(hi)) - Fraction(float(lo)))
        for lo, hi, s in zip(box.lo[0], box.hi[0], shares, strict=True)
    ]
    values = value_at(point)  # type: ignore[operator]
    for method in METHODS:
        try:
            found = bound(graph, box, method=method, level="real")
        except AssayError as error:
            assert "overflow" in str(error)  # noqa: PT017
            continue
        assert np.all(np.isfinite(found.lower))
        assert np.all(np.isfinite(found.upper))
        for k, value in enumerate(values):
            assert Fraction(float(found.lower[0, k])) <= value <= Fraction(float(found.upper[0, k]))


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_real_bounds_contain_exact_relu_networks(data: st.DataObject) -> None:
    widths = [2, 3, 3, 2]
    weights = [
        data.draw(arrays(np.float64, (o, i), elements=EXTREME))
        for i, o in itertools.pairwise(widths)
    ]
    biases = [data.draw(arrays(np.float64, o, elements=EXTREME)) for o in widths[1:]]
    lo, gap = (
        data.draw(arrays(np.float64, (1, 2), elements=EXTREME)),
        data.draw(arrays(np.float64, (1, 2), elements=EXTREME)),
    )
    box = Interval(lo, np.maximum(lo, np.minimum(lo / 2 + np.abs(gap) / 2, 1e308)))
    graph = Graph()
    x = graph.input(2)
    for i, (W, b) in enumerate(zip(weights, biases, strict=True)):
        x = graph.linear(x, W, b)
        x = graph.relu(x) if i < 2 else x
    check_exact(graph, box, lambda p: exact_relu_network(weights, biases, p), data)


def matvec(W: np.ndarray, x: list[Fraction]) -> list[Fraction]:
    return [
        sum((Fraction(float(w)) * v for w, v in zip(row, x, strict=True)), Fraction(0)) for row in W
    ]


@pytest.mark.slow
@given(st.data())
@settings(max_examples=120, deadline=None)
def test_real_bounds_contain_exact_bilinear_networks(data: st.DataObject) -> None:
    draw = lambda *shape: data.draw(arrays(np.float64, shape, elements=EXTREME))  # noqa: E731
    embed, head = draw(2, 2), draw(2, 2)
    blocks = [(draw(3, 2), draw(3, 2), draw(2, 3)) for _ in range(2)]
    lo, gap = draw(1, 2), draw(1, 2)
    box = Interval(lo, np.maximum(lo, np.minimum(lo / 2 + np.abs(gap) / 2, 1e308)))

    def value_at(x: list[Fraction]) -> list[Fraction]:
        x = matvec(embed, x)
        for left, right, down in blocks:
            hidden = [a * b for a, b in zip(matvec(left, x), matvec(right, x), strict=True)]
            x = [a + b for a, b in zip(x, matvec(down, hidden), strict=True)]
        return matvec(head, x)

    check_exact(bilinear_graph(embed, blocks, head), box, value_at, data)


def run_float32(
    weights: list[np.ndarray], biases: list[np.ndarray], x: np.ndarray, order: np.random.Generator
) -> np.ndarray:
    """Execute a ReLU network in float32, every sum in a random order."""
    x = x.astype(np.float32)
    for i, (W, b) in enumerate(zip(weights, biases, strict=True)):
        out = []
        for row, offset in zip(W.astype(np.float32), b.astype(np.float32), strict=True):
            terms = order.permutation(np.append(row * x, offset))
            total = np.float32(0)
            for term in terms:
                total = np.float32(total + term)
            out.append(total)
        x = np.maximum(np.array(out), 0) if i < len(weights) - 1 else np.array(out)
    return x.astype(np.float64)


def test_float32_bounds_contain_every_summation_order_and_real_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    weights = [
        rng.normal(size=shape).astype(np.float32).astype(float) for shape in ((20, 30), (2, 20))
    ]
    biases = [rng.normal(size=n).astype(np.float32).astype(float) for n in (20, 2)]
    graph = Graph()
    graph.linear(
        graph.relu(graph.linear(graph.input(30), weights[0], biases[0])), weights[1], biases[1]
    )
    x = rng.normal(size=(1, 30)).astype(np.float32).astype(float)
    box = ball(x, 0.0)
    executed = np.stack([run_float32(weights, biases, x[0], rng) for _ in range(100)])
    assert len(np.unique(executed[:, 0])) > 1
    for method in METHODS:
        assert bound(graph, box, method=method, level="float32").contain(executed)
        assert not bound(graph, box, method=method, level="real").contain(executed)


def run_torch_float32(case: networks.Case, x: torch.Tensor) -> torch.Tensor:
    """Run a case in float32: modules are cast, and the plain functions, which cast float32
    weights to float64, are kept from it.
    """
    if isinstance(case.forward, nn.Module):
        return case.forward.float()(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "double", torch.Tensor.float)
        return case.forward(x)


@pytest.mark.parametrize("name", ["relu", "gelu", "bilinear", "attention", "rms_norm"])
def test_float32_bounds_contain_torch_in_float32(name: str) -> None:
    case = networks.CASES[name]()
    x = torch.randn(40, *case.shape, generator=networks.generator(5))
    found = bound(case.graph, ball(x, 0.0), level="float32")
    values = run_torch_float32(case, x)
    assert values.dtype == torch.float32
    assert found.contain(values)
    assert np.max(found.width / (1 + np.abs(values.numpy()))) < 1e-3
    for said in ("units in the last place", "not to a lower precision"):
        assert any(said in a for a in found.assumptions)


def test_what_float32_does_not_cover_is_refused_with_the_reason() -> None:
    case = networks.CASES["layer_norm"]()
    with pytest.raises(AssayError, match="how its variance is summed"):
        bound(case.graph, ball(centres(case, 1), 0.1), level="float32")
    graph = Graph()
    graph.linear(graph.input(1), [[0.1]])
    with pytest.raises(AssayError, match="not a float32 number"):
        bound(graph, ball([[1.0]], 0.1), level="float32")
    graph = Graph()
    graph.linear(graph.input(2), [[2.0**100, -(2.0**100)]])
    with pytest.raises(AssayError, match="exceed float32"):
        bound(graph, ball([[2.0**30, 2.0**30]], 0.0), level="float32")
    graph = Graph()
    graph.rms_norm(graph.input(2), eps=1e-30)
    with pytest.raises(AssayError, match="2\\^-60"):
        bound(graph, ball([[1.0, 1.0]], 0.0), level="float32")


def test_overflow_is_refused_and_named() -> None:
    graph = Graph()
    graph.relu(graph.linear(graph.linear(graph.input(1), [[1e300]]), [[1e300]]))
    for method in METHODS:
        for level in LEVELS[:2]:
            with pytest.raises(AssayError, match=r"node 2 \(Affine\) has no finite bound"):
                bound(graph, ball([[1.0]], 0.0), method=method, level=level)


def test_bad_input_is_refused() -> None:
    graph = Graph()
    x = graph.input(3)
    with pytest.raises(InputError, match="at least one operation"):
        bound(graph, ball(np.zeros((1, 3)), 0.1))
    graph.relu(x)
    with pytest.raises(InputError, match="unknown level 'exact'"):
        bound(graph, ball(np.zeros((1, 3)), 0.1), level="exact")
    with pytest.raises(InputError, match="unknown method"):
        bound(graph, ball(np.zeros((1, 3)), 0.1), method="deeppoly")
    with pytest.raises(InputError, match="shape"):
        bound(graph, ball(np.zeros((1, 4)), 0.1))
    with pytest.raises(InputError, match="exceeds"):
        bound(graph, Interval(np.ones((1, 3)), np.zeros((1, 3))))
    with pytest.raises(InputError, match="NaN"):
        bound(graph, Interval(np.full((1, 3), np.nan), np.ones((1, 3))))
    with pytest.raises(InputError, match="boxes: 1"):
        bound(graph, [ball(np.zeros((1, 3)), 0.1)] * 2)
    with pytest.raises(InputError, match="objective"):
        bound(graph, ball(np.zeros((1, 3)), 0.1), objective=np.ones((1, 4)))
    with pytest.raises(InputError, match="chunk"):
        bound(graph, ball(np.zeros((1, 3)), 0.1), chunk=0)
    for radius in (-1.0, math.nan, math.inf, [0.1, 0.1], [[0.1]]):
        with pytest.raises(InputError, match="radius"):
            ball(np.zeros((1, 3)), radius)
    with pytest.raises(InputError, match="norm"):
        ball(np.zeros((1, 3)), 0.1, norm=1)
    with pytest.raises(InputError, match="domain"):
        ball(np.full((1, 3), 2.0), 0.1, (0, 1))
    for build in (
        lambda: graph.linear(x, np.ones((2, 4))),
        lambda: graph.linear(x, np.ones(3)),
        lambda: graph.linear(x, np.ones((2, 3)), np.ones(3)),
        lambda: graph.linear(x, np.full((2, 3), np.inf)),
        lambda: graph.add(x, graph.input(2)),
        lambda: graph.multiply(x, graph.input(2)),
        lambda: graph.matmul(x, x),
        lambda: graph.softmax(x, np.zeros(3)),
        lambda: graph.scale(x, np.ones(5)),
        lambda: graph.rearrange(x, (2, 2)),
    ):
        with pytest.raises(InputError):
            build()
