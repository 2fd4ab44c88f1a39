"""Converted networks compute the same function; certified accuracy never exceeds what an attack
leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import networks
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from assay.bounds import Graph, ball, bilinear_graph, bound, certified_accuracy, graph_of
from assay.errors import InputError
from assay.targets.bilinear import BilinearNetwork


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=networks.generator(0))
    return torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.1)
    gen = networks.generator(1)
    for _ in range(steps):
        batch = torch.randint(0, 1297, (128,), generator=gen)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimiser.step()
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def classifiers(digits: tuple[Tensor, Tensor]) -> dict[str, nn.Module]:
    bilinear = BilinearNetwork(
        64, 10, width=24, hidden=32, blocks=2, generator=networks.generator(2)
    )
    return {
        "dense": train(networks.mlp([64, 64, 10]), *digits, 300),
        "bilinear": train(bilinear, *digits, 300),
    }


def attacked(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Which samples survive ten projected gradient steps and random corners."""
    survives = model(x).argmax(1) == y
    point = x.clone()
    gen = networks.generator(3)
    for _ in range(10):
        point.requires_grad_(True)
        gradient = torch.autograd.grad(
            nn.functional.cross_entropy(model(point), y, reduction="sum"), point
        )[0]
        point = (
            (point.detach() + 0.3 * radius * gradient.sign())
            .clamp(x - radius, x + radius)
            .clamp(0, 1)
        )
        corner = (x + radius * (2 * (torch.rand(x.shape, generator=gen) > 0.5).float() - 1)).clamp(
            0, 1
        )
        survives &= (model(point).argmax(1) == y) & (model(corner).argmax(1) == y)
    return survives


@pytest.mark.parametrize("name", ["dense", "bilinear"])
@pytest.mark.parametrize("level", ["float64", "real", "float32"])
def test_certified_digits_survive_attacks(
    name: str, level: str, classifiers: dict[str, nn.Module], digits: tuple[Tensor, Tensor]
) -> None:
    model, x, y = classifiers[name], digits[0][-100:], digits[1][-100:]
    found = certified_accuracy(model, x, y, 0.01, domain=(0, 1), level=level)
    survives = attacked(model, x, y, 0.01).numpy()
    assert not np.any(found.certified & ~survives)
    assert found.accuracy == Fraction(int(found.certified.sum()), 100)
    assert 0.8 < found.accuracy <= survives.mean()
    assert found.level == level
    assert np.mean(model(x).argmax(1).numpy() == y.numpy()) > 0.9


def test_certified_accuracy_shrinks_with_the_radius_and_margins_at_zero_are_true(
    classifiers: dict[str, nn.Module], digits: tuple[Tensor, Tensor]
) -> None:
    model, x, y = classifiers["dense"], digits[0][-100:], digits[1][-100:]
    shares = [certified_accuracy(model, x, y, radius).accuracy for radius in (0.0, 0.01, 0.03, 0.3)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == Fraction(int((model(x).argmax(1) == y).sum()), 100)
    assert shares[-1] == 0
    logits = model.double()(x.double())
    model.float()
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    margins = (logits.gather(1, y[:, None])[:, 0] - others).numpy()
    found = certified_accuracy(model, x, y, 0.0).margins
    assert np.all(found <= margins + 1e-12)
    assert np.allclose(found, margins, rtol=0, atol=1e-10)


def test_linear_margins_beat_intervals_and_bounds_per_logit(
    classifiers: dict[str, nn.Module], digits: tuple[Tensor, Tensor]
) -> None:
    model, x, y = classifiers["dense"], digits[0][-50:], digits[1][-50:]
    margins = certified_accuracy(model, x, y, 0.02).margins
    logits = bound(graph_of(model, (64,)), ball(x, 0.02))
    rivals = np.where(np.eye(10)[y.numpy()] > 0, -np.inf, logits.upper).max(1)
    assert np.all(margins >= logits.lower[np.arange(50), y.numpy()] - rivals - 1e-9)
    assert (
        margins.mean() > certified_accuracy(model, x, y, 0.02, method="interval").margins.mean() + 1
    )


@pytest.mark.parametrize("level", ["float64", "real", "float32"])
@pytest.mark.parametrize("method", ["interval", "crown"])
def test_a_tie_is_not_certified(level: str, method: str) -> None:
    graph = Graph()
    graph.linear(graph.input(1), [[1.0], [1.0], [0.5]])
    found = certified_accuracy(graph, [[1.0], [2.0]], [0, 1], 0.0, level=level, method=method)
    assert found.accuracy == 0
    tied = replace(found, margins=np.array([0.0, -0.0, 5e-324, -5e-324]))
    assert tied.certified.tolist() == [False, False, True, False]
    assert tied.accuracy == Fraction(1, 4)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "sequential": (
        lambda: nn.Sequential(
            nn.Flatten(),
            networks.mlp([6, 5, 4]),
            nn.Identity(),
            nn.Sequential(nn.GELU(), nn.Dropout(0.5)),
            nn.LayerNorm(4),
            nn.Softmax(1),
        ).eval(),
        (2, 3),
    ),
    "tokens": (lambda: nn.Sequential(networks.mlp([3, 4, 4]), nn.RMSNorm(4), nn.ReLU()), (2, 3)),
    "bilinear": (
        lambda: BilinearNetwork(
            6, 3, width=4, hidden=5, blocks=2, norm=True, generator=networks.generator(0)
        ),
        (2, 3),
    ),
    "gated": (
        lambda: BilinearNetwork(
            6, 3, width=4, hidden=5, blocks=2, gate="relu", generator=networks.generator(0)
        ),
        (6,),
    ),
    "gelu gate": (
        lambda: BilinearNetwork(
            6, 3, width=4, hidden=5, blocks=1, gate="gelu", generator=networks.generator(0)
        ),
        (6,),
    ),
    "patches": (
        lambda: BilinearNetwork(
            32,
            3,
            width=4,
            hidden=5,
            blocks=2,
            image=(2, 4, 4),
            patch=2,
            generator=networks.generator(0),
        ),
        (32,),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_network_computes_the_same_function(name: str) -> None:
    build, shape = MODELS[name]
    model = build().requires_grad_(False)
    if isinstance(model, BilinearNetwork) and model.position is not None:
        model.position.copy_(networks.normal(9, *model.position.shape))
    graph = graph_of(model.double(), shape)  # the default eps of RMSNorm depends on the precision
    x = torch.randn(5, *shape, generator=networks.generator(4))
    values = model(x.double()).numpy()
    point = bound(graph, ball(x, 0.0))
    assert np.all(point.lower - 1e-12 <= values)
    assert np.all(values <= point.upper + 1e-12)
    assert np.max(point.width) < 1e-9
    box = ball(x, 0.05)
    sampled = model(networks.points(box.lo, box.hi, 400, 5).flatten(0, 1)).unflatten(0, (400, 5))
    assert bound(graph, box).contain(sampled)


def test_weights_alone_give_the_same_bilinear_graph() -> None:
    model = BilinearNetwork(6, 3, width=4, hidden=5, blocks=2, generator=networks.generator(0))
    blocks = [(b.left.weight, b.right.weight, b.down.weight) for b in model.blocks]  # type: ignore[union-attr]
    box = ball(torch.randn(2, 6, generator=networks.generator(1)), 0.1)
    one, two = (
        bound(bilinear_graph(model.embed.weight, blocks, model.head.weight), box),
        bound(graph_of(model, (6,)), box),
    )  # type: ignore[arg-type]
    assert np.array_equal(one.lower, two.lower)


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def hooked() -> nn.Module:
    model = networks.mlp([3, 2])
    model[0].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.Sequential(nn.Tanh())), r"model\.0\.0 \(Tanh\) has no bound"),
        (lambda: nn.Sequential(Doubling()), r"Doubling"),
        (lambda: nn.Sequential(nn.GELU("tanh")), "approximate='tanh'"),
        (lambda: nn.Sequential(nn.Dropout(0.5)), "eval"),
        (lambda: nn.Sequential(nn.Softmax(0)), "last axis"),
        (lambda: nn.Sequential(nn.Flatten(0)), r"Flatten\(1, -1\)"),
        (lambda: nn.Sequential(nn.LayerNorm((2, 3))), "last axis"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "ParametrizedLinear"),
        (lambda: networks.mlp([3, 2]).bfloat16(), "bfloat16"),
        (hooked, "hooks"),
        (lambda: networks.mlp([4, 2]), "does not fit"),
        (lambda: BilinearNetwork(3, 2, gate="silu"), "gate 'silu'"),
        (lambda: BilinearNetwork(3, 2, image=(1, 3), patch=1), "power of two"),
        (lambda: BilinearNetwork(4, 2), "4 entries"),
    ],
)
def test_networks_without_a_bound_are_refused_by_name(
    build: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        graph_of(build(), (3,))


def test_bad_labels_are_refused() -> None:
    model, x = networks.mlp([3, 2]), np.zeros((4, 3))
    for labels in ([0, 1], [0, 1, 2, 0], [0, -1, 0, 0], [0.5, 0, 0, 0], [[0], [1], [0], [1]]):
        with pytest.raises(InputError, match="labels"):
            certified_accuracy(model, x, labels, 0.1)
    with pytest.raises(InputError, match="two logits"):
        certified_accuracy(networks.mlp([3, 1]), x, [0] * 4, 0.1)
    with pytest.raises(InputError, match="NaN"):
        certified_accuracy(model, x * np.nan, [0] * 4, 0.1)
