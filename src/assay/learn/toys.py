"""Training of the toy networks, in seconds on one core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from assay.io.runs import Run
from assay.learn.loop import cosine, fit
from assay.targets.residual import ResidualMLP
from assay.targets.toys import MLP, Autoencoder, Bottleneck, Toy, draw_sparse, load_autoencoder


def tms(
    features: int = 5,
    hidden: int = 2,
    *,
    seed: int = 0,
    steps: int = 2000,
    probability: float | Tensor = 0.05,
    correlation: float = 0.0,
    samples: int = 1000,
    copies: int = 8,
    weights: Path | str | None = None,
    run: Run | None = None,
) -> Toy:
    """Train features in superposition, or load `W (hidden, features)`, `b (features,)` from
    safetensors with `weights`.

    Inputs are those of `draw_sparse`. Circuit `j` is `W[:, j], b[j]`. Training can end
    with a feature left out, so the best of `copies` networks is kept."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return draw_sparse(count, features, probability, generator, correlation=correlation)

    if weights is not None:
        model, loss = load_autoencoder(weights), float("nan")
        features = model.W.shape[1]
    else:
        several = Autoencoder(features, hidden, generator, (copies,))
        _train(
            several,
            lambda: _same(draw(1024)),
            steps,
            1e-2,
            generator,
            run,
            "tms",
        )
        model, loss = _best(several, draw(4096))
    inputs = draw(samples)
    index = torch.arange(features)
    circuits = {"W": index.expand(model.W.shape), "b": index}
    return Toy(
        f"TMS {features}-{model.W.shape[0]}", model, inputs, inputs, "mse", circuits, loss=loss
    )


def superposed_circuits(
    features: int = 10,
    hidden: int = 5,
    *,
    seed: int = 0,
    steps: int = 2000,
    probability: float | Tensor = 0.05,
    correlation: float = 0.0,
    samples: int = 1000,
    group: int = 1,
    run: Run | None = None,
) -> Toy:
    """Train `y = A x`, `A ~ U(0, 3)`, through a bottleneck (circuits in superposition, arXiv
    2504.00194).

    Circuit `j` is `W_in[:, j]`; the output weights are shared. With `group` above one, features are
    active together in groups and each group is one circuit of higher rank."""
    generator = torch.Generator().manual_seed(seed)
    coefficients = 3 * torch.rand(features, features, generator=generator)
    model = Bottleneck(features, hidden, features, generator)

    def draw(count: int = 1024) -> tuple[Tensor, Tensor]:
        x = draw_sparse(
            count, features, probability, generator, group=group, correlation=correlation
        )
        return x, x @ coefficients.T

    loss = _train(model, draw, steps, 1e-2, generator, run, "superposed")
    inputs, labels = draw(samples)
    circuits = {
        "W_in": (torch.arange(features) // group).expand(model.W_in.shape),
        "W_out": torch.full(model.W_out.shape, -1),
        "b": torch.full(model.b.shape, -1),
    }
    name = (
        f"{'groups' if group > 1 else 'circuits'} in superposition {features}-{hidden}-{features}"
    )
    return Toy(name, model, inputs, labels, "mse", circuits, coefficients, loss)


def residual_mlp(
    features: int = 100,
    width: int = 512,
    hidden: int = 50,
    layers: int = 1,
    *,
    seed: int = 0,
    steps: int = 2000,
    probability: float = 0.01,
    orthonormal: bool = False,
    samples: int = 1000,
    run: Run | None = None,
) -> Toy:
    """Train a residual MLP for `y = x + relu(x)` on sparse inputs in (-1, 1), more features than
    neurons (arXiv 2501.14926); `loss` is the squared error as a share of relu(x)'s square.
    """
    generator = torch.Generator().manual_seed(seed)
    model = ResidualMLP(features, width, hidden, layers, generator, orthonormal=orthonormal)

    def draw(count: int = 1024) -> tuple[Tensor, Tensor]:
        x = draw_sparse(count, features, probability, generator)
        x = x * (2 * torch.randint(2, x.shape, generator=generator) - 1)
        return x, x + x.relu()

    _train(model, draw, steps, 3e-3, generator, run, "residual")
    inputs, labels = draw(samples)
    with torch.no_grad():
        loss = float((model(inputs) - labels).square().mean() / inputs.relu().square().mean())
    return Toy(
        f"residual MLP {features}-{width}-{hidden} x {layers}",
        model,
        inputs,
        labels,
        "mse",
        {},
        loss=loss,
    )


def squares(
    features: int = 5,
    width: int = 10,
    depth: int = 5,
    *,
    seed: int = 0,
    steps: int = 2000,
    probability: float = 0.1,
    samples: int = 1000,
    run: Run | None = None,
) -> Toy:
    """Train an MLP of `depth` hidden layers to square each of its sparse inputs in (-1, 1)."""
    generator = torch.Generator().manual_seed(seed)
    model = MLP([features, *[width] * depth, features], generator)

    def draw(count: int = 1024) -> tuple[Tensor, Tensor]:
        x = draw_sparse(count, features, probability, generator)
        x = x * (2 * torch.randint(2, x.shape, generator=generator) - 1)
        return x, x.square()

    loss = _train(model, draw, steps, 3e-3, generator, run, "squares")
    inputs, labels = draw(samples)
    return Toy(f"x -> x^2 of {features}", model, inputs, labels, "mse", {}, loss=loss)


def xor(*, seed: int = 0, steps: int = 500, run: Run | None = None) -> Toy:
    """Train XOR of two bits with two GELU units and two logits; the inputs are the four cases."""
    inputs = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 0])
    generator = torch.Generator().manual_seed(seed)
    model = MLP([2, 2, 2], generator, nn.functional.gelu)
    _minimise(
        model,
        lambda: nn.functional.cross_entropy(model(inputs), labels),
        steps,
        2e-2,
        generator,
        run,
        "xor",
    )
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(inputs), labels))
    return Toy("XOR 2-2", model, inputs, labels, "kl", {}, loss=loss)


def digits(
    *, hidden: int = 16, seed: int = 0, steps: int = 600, samples: int = 256, run: Run | None = None
) -> Toy:
    """Train an MLP on scikit-learn's 8 x 8 digits; the inputs are held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    held, train = order[:samples], order[samples:]
    model = MLP([64, hidden, 10], generator)

    def loss() -> Tensor:
        rows = train[torch.randint(len(train), (128,), generator=generator)]
        return nn.functional.cross_entropy(model(images[rows]), labels[rows])

    _minimise(model, loss, steps, 1e-2, generator, run, "digits")
    with torch.no_grad():
        final = float(nn.functional.cross_entropy(model(images[held]), labels[held]))
    return Toy(f"digits 64-{hidden}-10", model, images[held], labels[held], "kl", {}, loss=final)


def _train(
    model: nn.Module,
    draw: Callable[[], tuple[Tensor, Tensor]],
    steps: int,
    rate: float,
    generator: torch.Generator,
    run: Run | None,
    name: str,
) -> float:
    """Minimise the squared error on drawn batches; return it as a share of the labels' square."""

    def loss() -> Tensor:
        x, y = draw()
        return (model(x) - y).square().mean()

    _minimise(model, loss, steps, rate, generator, run, name)
    with torch.no_grad():
        x, y = draw()
        return float((model(x) - y).square().mean() / y.square().mean())


def _minimise(
    model: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    rate: float,
    generator: torch.Generator,
    run: Run | None,
    name: str,
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    fit(
        model,
        lambda step: (loss(), {}),
        optimizer,
        steps=steps,
        generator=generator,
        schedule=cosine,
        run=run,
        name=name,
    )


def _best(several: Autoencoder, x: Tensor) -> tuple[Autoencoder, float]:
    with torch.no_grad():
        losses = (several(x) - x).square().mean((1, 2)) / x.square().mean()
        chosen = int(losses.argmin())
        model = Autoencoder(
            several.W.shape[2], several.W.shape[1], torch.Generator().manual_seed(0)
        )
        model.load_state_dict({"W": several.W[chosen], "b": several.b[chosen]})
    return model, float(losses[chosen])


def _same(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x
