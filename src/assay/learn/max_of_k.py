"""Training of max-of-K transformers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from assay.errors import InputError
from assay.io.runs import Run
from assay.learn.loop import fit
from assay.targets.max_of_k import MaxOfK


def train_max_of_k(
    vocabulary: int = 64,
    positions: int = 4,
    width: int = 32,
    *,
    seed: int = 0,
    steps: int = 3000,
    batch: int = 128,
    rate: float = 1e-3,
    decay: float = 0.01,
    run: Run | None = None,
) -> MaxOfK:
    """Train on fresh uniform sequences with AdamW (.9, .999) and cross-entropy at the last
    position; about 10 s on one thread.
    """
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    generator = torch.Generator().manual_seed(seed)
    model = MaxOfK(vocabulary, positions, width, generator=generator)

    def objective(step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        tokens = torch.randint(vocabulary, (batch, positions), generator=generator)
        largest = tokens.amax(-1)
        logits = model(tokens)
        return nn.functional.cross_entropy(logits, largest), {
            "metrics/accuracy": (logits.argmax(-1) == largest).float().mean()
        }

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=decay
    )
    fit(model, objective, optimizer, steps=steps, generator=generator, run=run, name="max-of-k")
    return model
