"""Training of small ReLU classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from assay.errors import InputError
from assay.io.runs import Run
from assay.learn.loop import fit


def train_mlp(
    x: Float[Tensor, "examples inputs"],
    y: Int[Tensor, " examples"],
    hidden: Sequence[int],
    *,
    seed: int = 0,
    steps: int = 600,
    batch: int = 128,
    rate: float = 3e-3,
    decay: float = 1e-4,
    run: Run | None = None,
    name: str = "classifier",
) -> nn.Sequential:
    """Train linear layers with ReLUs between them by AdamW on cross-entropy.

    Raises InputError for layers without units and labels that do not fit."""
    if not hidden or min(hidden) < 1 or len(x) != len(y):
        raise InputError(
            f"a classifier needs hidden units and one label per example, got {list(hidden)},"
            f" {len(x)} examples and {len(y)} labels"
        )
    generator = torch.Generator().manual_seed(seed)
    widths = [x.shape[1], *hidden, int(y.max()) + 1]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layer = nn.Linear(before, after)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(after, before, generator=generator) / before**0.5)
            layer.bias.zero_()
        layers += [layer, nn.ReLU()]
    model = nn.Sequential(*layers[:-1])

    def objective(step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        rows = torch.randint(len(x), (batch,), generator=generator)
        logits = model(x[rows])
        right = (logits.argmax(1) == y[rows]).float().mean()
        return nn.functional.cross_entropy(logits, y[rows]), {"metrics/accuracy": right}

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    fit(model, objective, optimizer, steps=steps, generator=generator, run=run, name=name)
    return model.eval().requires_grad_(False)
