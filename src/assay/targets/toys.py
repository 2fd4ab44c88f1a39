"""Small networks with known circuits, trained here in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from assay.errors import InputError
from assay.io.files import load_tensors
from assay.io.runs import Run


@dataclass(frozen=True)
class Toy:
    """A trained network, inputs to study it on, the labels there, and what is known about its circuits.

    `circuits` maps a parameter's name to the circuit that each of its entries belongs to (-1: shared by all); `coefficients`
    is the matrix `A` of a network that computes `y = A x`; `divergence` suits the outputs.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor
    divergence: str
    circuits: dict[str, Tensor]
    coefficients: Tensor | None = None
    loss: float = 0.0

    @property
    def count(self) -> int:
        """Return the number of circuits."""
        return 1 + max((int(entry.max()) for entry in self.circuits.values()), default=-1)


class Autoencoder(nn.Module):
    """Features in superposition with tied weights, `relu(W^T W x + b)` (arXiv 2209.10652).

    With `copies` it is that many independent networks, trained side by side: W `(copies, hidden, features)`.
    """

    def __init__(self, features: int, hidden: int, generator: torch.Generator, copies: tuple[int, ...] = ()):
        super().__init__()
        self.W = nn.Parameter(torch.randn(*copies, hidden, features, generator=generator) / hidden**0.5)
        self.b = nn.Parameter(torch.zeros(*copies, features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W.mT @ self.W + self.b.unsqueeze(-2))


class Bottleneck(nn.Module):
    """A linear map through few hidden units, `relu(W_out W_in x + b)`."""

    def __init__(self, inputs: int, hidden: int, outputs: int, generator: torch.Generator):
        super().__init__()
        self.W_in = nn.Parameter(torch.randn(hidden, inputs, generator=generator) / hidden**0.5)
        self.W_out = nn.Parameter(torch.randn(outputs, hidden, generator=generator) / hidden**0.5)
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_in.T @ self.W_out.T + self.b)


class MLP(nn.Module):
    """A multilayer perceptron; the widths include input and output."""

    def __init__(self, widths: list[int], generator: torch.Generator, activation: Callable[[Tensor], Tensor] = torch.relu):
        super().__init__()
        self.layers = nn.ModuleList(draw_linear(i, o, generator) for i, o in pairwise(widths))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def draw_linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Make a linear layer with an explicit generator: normal weights of variance 2 / inputs, zero bias."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) * (2 / inputs) ** 0.5)
        layer.bias.zero_()
    return layer


def draw_sparse(samples: int, features: int, probability: float, generator: torch.Generator, *, group: int = 1) -> Tensor:
    """Draw inputs whose features (or whole groups) are active with `probability`, uniform on [0, 1) when active; none all zero."""
    kept = torch.zeros(0, features)
    while kept.shape[0] < samples:
        active = (torch.rand(samples, features // group, generator=generator) < probability).repeat_interleave(group, 1)
        drawn = torch.rand(samples, features, generator=generator) * active
        kept = torch.cat([kept, drawn[active.any(1)]])
    return kept[:samples]


def tms(
    features: int = 5,
    hidden: int = 2,
    *,
    seed: int = 0,
    steps: int = 2000,
    probability: float = 0.05,
    samples: int = 1000,
    copies: int = 8,
    weights: Path | str | None = None,
    run: Run | None = None,
) -> Toy:
    """Train features in superposition, or load `W (hidden, features)`, `b (features,)` from safetensors with `weights`.

    Circuit `j` is `W[:, j], b[j]`. Training can end with a feature left out, so the best of `copies` networks is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    if weights is not None:
        model, loss = _load_autoencoder(weights), float("nan")
        features = model.W.shape[1]
    else:
        several = Autoencoder(features, hidden, generator, (copies,))
        _train(several, lambda: _same(draw_sparse(1024, features, probability, generator)), steps, 1e-2, generator, run, "tms")
        model, loss = _best(several, draw_sparse(4096, features, probability, generator))
    inputs = draw_sparse(samples, features, probability, generator)
    index = torch.arange(features)
    circuits = {"W": index.expand(model.W.shape), "b": index}
    return Toy(f"TMS {features}-{model.W.shape[0]}", model, inputs, inputs, "mse", circuits, loss=loss)


def superposed_circuits(
    features: int = 10,
    hidden: int = 5,
    *,
    seed: int = 0,
    steps: int = 2000,
    probability: float = 0.05,
    samples: int = 1000,
    group: int = 1,
    run: Run | None = None,
) -> Toy:
    """Train `y = A x`, `A ~ U(0, 3)`, through a bottleneck (circuits in superposition, arXiv 2504.00194).

    Circuit `j` is `W_in[:, j]`; the output weights are shared. With `group` above one, features are active together in groups
    and each group is one circuit of higher rank.
    """
    generator = torch.Generator().manual_seed(seed)
    coefficients = 3 * torch.rand(features, features, generator=generator)
    model = Bottleneck(features, hidden, features, generator)

    def draw() -> tuple[Tensor, Tensor]:
        x = draw_sparse(1024, features, probability, generator, group=group)
        return x, x @ coefficients.T

    loss = _train(model, draw, steps, 1e-2, generator, run, "superposed")
    inputs = draw_sparse(samples, features, probability, generator, group=group)
    circuits = {
        "W_in": (torch.arange(features) // group).expand(model.W_in.shape),
        "W_out": torch.full(model.W_out.shape, -1),
        "b": torch.full(model.b.shape, -1),
    }
    name = f"{'groups' if group > 1 else 'circuits'} in superposition {features}-{hidden}-{features}"
    return Toy(name, model, inputs, inputs @ coefficients.T, "mse", circuits, coefficients, loss)


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
    _minimise(model, lambda: nn.functional.cross_entropy(model(inputs), labels), steps, 2e-2, generator, run, "xor")
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(inputs), labels))
    return Toy("XOR 2-2", model, inputs, labels, "kl", {}, loss=loss)


def digits(*, hidden: int = 16, seed: int = 0, steps: int = 600, samples: int = 256, run: Run | None = None) -> Toy:
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
    from assay.learn.loop import cosine, fit  # training stands above the targets

    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    fit(model, lambda step: (loss(), {}), optimizer, steps=steps, generator=generator, schedule=cosine, run=run, name=name)


def _best(several: Autoencoder, x: Tensor) -> tuple[Autoencoder, float]:
    with torch.no_grad():
        losses = (several(x) - x).square().mean((1, 2)) / x.square().mean()
        chosen = int(losses.argmin())
        model = Autoencoder(several.W.shape[2], several.W.shape[1], torch.Generator().manual_seed(0))
        model.load_state_dict({"W": several.W[chosen], "b": several.b[chosen]})
    return model, float(losses[chosen])


def _same(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x


def _load_autoencoder(path: Path | str) -> Autoencoder:
    tensors = load_tensors(path)
    missing = [name for name in ("W", "b") if name not in tensors]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; a tied autoencoder needs W (hidden, features) and b (features,)")
    w, b = tensors["W"], tensors["b"]
    if w.ndim != 2 or b.shape != (w.shape[1],):
        raise InputError(f"{path}: W must be (hidden, features) and b (features,), got {tuple(w.shape)} and {tuple(b.shape)}")
    model = Autoencoder(w.shape[1], w.shape[0], torch.Generator().manual_seed(0))
    model.load_state_dict({"W": w.float(), "b": b.float()})
    return model
