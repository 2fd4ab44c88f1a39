"""Small laboratories for the tests of the guard."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from assay.guard import Observed


def chain(inputs: int, features: int = 5, *, seed: int = 0, copies: float = 0.9) -> Observed:
    """Return features of which each copies the one before with a probability, with logits that say
    the first one's sign."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randn(inputs, generator=generator)]
    for _ in range(features - 1):
        fresh = torch.randn(inputs, generator=generator)
        keep = torch.rand(inputs, generator=generator) < copies
        columns.append(torch.where(keep, columns[-1], fresh))
    values = torch.stack(columns, 1)
    logits = torch.stack([values[:, 0], -values[:, 0]], 1)
    return Observed(values, tuple(f"f[{place}]" for place in range(features)), logits)


def three(sizes: tuple[int, int, int] = (400, 200, 200), *, seed: int = 0) -> list[Observed]:
    """Return training, fresh and calibration splits of one laboratory."""
    whole = chain(sum(sizes), seed=seed)
    ends = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    return [whole.take(slice(a, b)) for a, b in pairwise(ends)]


def small_network(seed: int = 0, widths: tuple[int, ...] = (4, 6, 5, 3)) -> nn.Sequential:
    """Return a ReLU network with drawn weights, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layer = nn.Linear(before, after)
        layer.weight.data = torch.randn(after, before, generator=generator) / before**0.5
        layer.bias.data = 0.3 * torch.randn(after, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False).eval()


def drawn(inputs: int, width: int = 4, seed: int = 1) -> Tensor:
    return torch.rand(inputs, width, generator=torch.Generator().manual_seed(seed))
