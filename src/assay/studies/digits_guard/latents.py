"""The baseline of dictionary latents: a sparse dictionary of the features that a guard reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from assay.dictionaries.initial import initialise
from assay.dictionaries.topk import TopK
from assay.learn.loop import fit


def train_latents(
    values: Tensor, *, size: int = 256, k: int = 24, steps: int = 300, seed: int = 0
) -> TopK:
    """Train a top-k dictionary on feature values in units of their spread."""
    generator = torch.Generator().manual_seed(seed)
    found = TopK(values.shape[1], size, k=k)
    initialise(found, generator, centre=values.mean(0))
    spread = (values - values.mean(0)).square().sum(1).mean()

    def objective(step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        rows = values[torch.randint(len(values), (256,), generator=generator)]
        return (found(rows) - rows).square().sum(1).mean() / spread, {}

    optimizer = torch.optim.Adam(found.parameters(), lr=3e-3)
    fit(found, objective, optimizer, steps=steps, generator=generator, name="latents")
    return found.eval().requires_grad_(False)
