"""The digits network, its laboratory, and the families of anomalies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from assay.guard import Observed
from assay.guard.reading import Reading, read
from assay.io.runs import Run
from assay.learn.classifier import train_mlp
from assay.studies.digits_guard.config import Config
from assay.targets.data import load_digits

SITES = ("1", "3")
"""The two hidden layers, after their ReLUs."""


@dataclass(frozen=True)
class Scene:
    """A network, the digits of nine classes in their splits, and those of the tenth."""

    model: nn.Sequential
    reading: Reading
    x: dict[str, Tensor]
    y: dict[str, Tensor]
    novel: Tensor

    def observed(self, x: Tensor) -> Observed:
        return read(self.model, x, self.reading)

    def split(self, name: str) -> Observed:
        return self.observed(self.x[name])

    @property
    def accuracy(self) -> float:
        """The share of held-out digits that are classified right."""
        found = self.model(self.x["held out"]).argmax(1) == self.y["held out"]
        return float(found.double().mean())


def splits(config: Config, novel: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor],
                                                           Tensor]:  # fmt: skip
    """Return digits of nine classes and their labels by split, and those of the class left out."""
    x, y = load_digits(config.seed).both_parts()
    other, seen = x[y == novel], y != novel
    x, y = x[seen], y[seen] - (y[seen] > novel).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    chosen = config.data
    sizes = [chosen.laboratory, chosen.fresh, chosen.calibration]
    sizes.append(len(x) - sum(sizes))
    names = ("laboratory", "fresh", "calibration", "held out")
    return (
        dict(zip(names, x.split(sizes), strict=True)),
        dict(zip(names, y.split(sizes), strict=True)),
        other,
    )


def scene(config: Config, index: int, run: Run) -> Scene:
    """Train the network number `index`, which never sees one class, on the laboratory."""
    novel, seed = (config.data.novel + 3 * index) % 10, config.seed + index
    x, y, other = splits(config, novel, seed)
    model = train(config, x["laboratory"], y["laboratory"], seed, run, f"network-{index}")
    return Scene(model, reading(config), x, y, other)


def train(config: Config, x: Tensor, y: Tensor, seed: int, run: Run, name: str) -> nn.Sequential:
    """Train one network; a later call goes on from its checkpoint."""
    chosen = config.model
    return train_mlp(
        x,
        y,
        (chosen.first, chosen.second),
        seed=seed,
        steps=chosen.steps,
        rate=chosen.rate,
        decay=chosen.decay,
        run=run,
        name=name,
    )


def reading(config: Config) -> Reading:
    """Return the features: every hidden unit, with the predicted class as their latent root."""
    sizes = (config.model.first, config.model.second)
    return Reading({site: tuple(range(size)) for site, size in zip(SITES, sizes, strict=True)})


def families(config: Config, scene: Scene, seed: int) -> Iterator[tuple[str, Observed]]:
    """Yield the anomalies of every family, made of the held-out digits."""
    generator = torch.Generator().manual_seed(seed)
    x, y = scene.x["held out"], scene.y["held out"]
    yield "novel class", scene.observed(scene.novel)
    yield "permuted features", permuted(scene, generator)
    noise = config.anomalies.noise * torch.randn(x.shape, generator=generator)
    yield "noise", scene.observed((x + noise).clamp(0, 1))
    partner = torch.randperm(len(x), generator=generator)
    apart = y[partner] != y
    yield "mixture", scene.observed(((x + x[partner]) / 2)[apart])
    yield "uniform", scene.observed(torch.rand(x.shape, generator=generator))
    size = config.anomalies.fgsm
    yield "FGSM", scene.observed((x + size * _ascent(scene.model, x, y).sign()).clamp(0, 1))
    yield "PGD", scene.observed(_descend(scene.model, x, y, config.anomalies.pgd))


def permuted(scene: Scene, generator: torch.Generator) -> Observed:
    """Return held-out features, each feature's values shuffled over the inputs, with the logits
    that the last layer computes from them.
    """
    data = scene.split("held out")
    columns = [column[torch.randperm(len(column), generator=generator)] for column in data.values.T]
    values = torch.stack(columns, 1)
    width = len(scene.reading.sites[SITES[-1]])
    return Observed(values, data.names, scene.model[4:](values[:, -width:]))


def _ascent(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of the loss in the inputs."""
    leaf = x.detach().clone().requires_grad_(True)
    return torch.autograd.grad(cross_entropy(model(leaf), y), leaf)[0]


def _descend(model: nn.Module, x: Tensor, y: Tensor, size: float, steps: int = 10) -> Tensor:
    """Return inputs moved by projected gradient ascent of the loss."""
    moved = x
    for _ in range(steps):
        moved = moved + 3 * size / steps * _ascent(model, moved, y).sign()
        moved = torch.minimum(torch.maximum(moved, x - size), x + size).clamp(0, 1)
    return moved


def triggered(x: Tensor) -> Tensor:
    """Return digits with a bright square of two by two pixels in the corner."""
    found = x.clone().reshape(-1, 8, 8)
    found[:, 6:, 6:] = 1.0
    return found.reshape(x.shape)
