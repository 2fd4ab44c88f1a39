"""Small networks with known circuits; `assay.learn.toys` trains them in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from assay.errors import InputError
from assay.io.files import load_tensors


@dataclass(frozen=True)
class Toy:
    """A trained network, inputs to study it on, the labels there, and what is known about its
    circuits.

    `circuits` maps a parameter's name to the circuit that each of its entries belongs to (-1:
    shared by all); `coefficients` is the matrix `A` of a network that computes `y = A x`;
    `divergence` suits the outputs."""

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

    With `copies` it is that many independent networks, trained side by side: W `(copies, hidden,
    features)`."""

    def __init__(
        self, features: int, hidden: int, generator: torch.Generator, copies: tuple[int, ...] = ()
    ):
        super().__init__()
        self.W = nn.Parameter(
            torch.randn(*copies, hidden, features, generator=generator) / hidden**0.5
        )
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

    def __init__(
        self,
        widths: list[int],
        generator: torch.Generator,
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ):
        super().__init__()
        self.layers = nn.ModuleList(draw_linear(i, o, generator) for i, o in pairwise(widths))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def draw_linear(
    inputs: int, outputs: int, generator: torch.Generator, *, bias: bool = True
) -> nn.Linear:
    """Make a linear layer with an explicit generator: normal weights of variance 2 / inputs, and a
    bias of zero or none.
    """
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) * (2 / inputs) ** 0.5)
        if bias:
            layer.bias.zero_()
    return layer


def draw_sparse(
    samples: int,
    features: int,
    probability: float | Tensor,
    generator: torch.Generator,
    *,
    group: int = 1,
    correlation: float = 0.0,
) -> Tensor:
    """Draw inputs whose features (or whole groups) are active with `probability`, one for all or
    one each, uniform on [0, 1) when active; none all zero.

    An active feature (or group) makes the next one active too with probability `correlation`."""
    kept = torch.zeros(0, features)
    while kept.shape[0] < samples:
        active = torch.rand(samples, features // group, generator=generator) < probability
        if correlation:
            follows = torch.rand(active.shape, generator=generator) < correlation
            active = active | (active & follows).roll(1, dims=1)
        active = active.repeat_interleave(group, 1)
        drawn = torch.rand(samples, features, generator=generator) * active
        kept = torch.cat([kept, drawn[active.any(1)]])
    return kept[:samples]


def load_autoencoder(path: Path | str) -> Autoencoder:
    """Read a tied autoencoder, `W (hidden, features)` and `b (features,)`, from safetensors;
    InputError for missing tensors and other shapes.
    """
    tensors = load_tensors(path)
    missing = [name for name in ("W", "b") if name not in tensors]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)}; a tied autoencoder needs W (hidden, features) and"
            " b (features,)"
        )
    w, b = tensors["W"], tensors["b"]
    if w.ndim != 2 or b.shape != (w.shape[1],):
        raise InputError(
            f"{path}: W must be (hidden, features) and b (features,), got {tuple(w.shape)} and"
            f" {tuple(b.shape)}"
        )
    model = Autoencoder(w.shape[1], w.shape[0], torch.Generator().manual_seed(0))
    model.load_state_dict({"W": w.float(), "b": b.float()})
    return model
