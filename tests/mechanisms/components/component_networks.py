"""A network with every kind of weight site, and one pass through it written out as loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from assay.mechanisms.components import Decomposition, decomposition
from assay.mechanisms.components.masks import Mask


class Mixed(nn.Module):
    """Embedding -> Conv1D -> tanh -> Linear, on tokens (examples, positions)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.out = nn.Embedding(7, 4), Conv1D(5, 4), nn.Linear(5, 3)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.up(self.embed(tokens))))


class Tied(nn.Module):
    """An embedding whose matrix is the head's as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.embed.weight.data = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens)))


TOKENS = torch.tensor([[0, 3, 6], [5, 5, 1]])


def mixed(components: int = 3, **options: Any) -> tuple[Mixed, Decomposition]:
    """Return the network and an untrained decomposition of all of it, in float64."""
    model = Mixed().double()
    return model, decomposition(model, ["embed", "up", "out"], components, **options).double()


def tied(components: int = 3) -> tuple[Tied, Decomposition]:
    model = Tied().double()
    return model, decomposition(model, "*", components).double()


def draw_masks(found: Decomposition, *, routed: bool, seed: int = 0) -> dict[str, Mask]:
    """Return random masks of every site for `TOKENS`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*TOKENS.shape, *shape, generator=generator, dtype=torch.float64)

    return {
        site.name: Mask(draw(site.components), draw(), draw() < 0.5 if routed else None)
        for site in found.sites
    }


def plain_product(
    x: Tensor, matrix: Tensor, v: Tensor, u: Tensor, mask: Mask, place: tuple[int, int]
) -> Tensor:
    """Return one position's y: the sum over components, each a rank-one matrix, and the delta."""
    if mask.routed is not None and not mask.routed[place]:
        return x @ matrix
    total = torch.zeros(matrix.shape[1], dtype=torch.float64)
    rest = matrix.clone()
    for c in range(v.shape[1]):
        part = torch.outer(v[:, c], u[c])
        total = total + mask.components[(*place, c)] * (x @ part)
        rest = rest - part
    return total + mask.delta[place] * (x @ rest)


def run_mixed_plainly(model: Mixed, found: Decomposition, masks: Mapping[str, Mask]) -> Tensor:
    """Return the masked output of `Mixed` on `TOKENS`, one position at a time."""
    with torch.no_grad():
        rows = []
        for example, own in enumerate(TOKENS.tolist()):
            for position, token in enumerate(own):
                place = (example, position)
                x = nn.functional.one_hot(torch.tensor(token), 7).double()
                x = plain_product(
                    x, model.embed.weight, *found.factors("embed"), masks["embed"], place
                )
                x = plain_product(x, model.up.weight, *found.factors("up"), masks["up"], place)
                x = torch.tanh(x + model.up.bias)
                x = plain_product(x, model.out.weight.T, *found.factors("out"), masks["out"], place)
                rows.append(x + model.out.bias)
        return torch.stack(rows).reshape(*TOKENS.shape, -1)
