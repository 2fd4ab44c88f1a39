"""Training of small residual networks on all points at once: the largest of two tokens, digits."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from assay.io.runs import Run
from assay.learn.loop import cosine, fit
from assay.targets.residual_relu import ResidualReLU, pairs_of_tokens

Network = TypeVar("Network", bound=nn.Module)


def train_max_of_two(
    vocabulary: int = 24,
    width: int = 32,
    hidden: int = 128,
    *,
    seed: int = 0,
    steps: int = 1500,
    rate: float = 3e-3,
    decay: float = 0.3,
    run: Run | None = None,
) -> ResidualReLU:
    """Train one block to name the larger of two tokens, on all pairs at every step (AdamW, cosine).

    The weight decay is that of the network alone and makes its neurons few and large."""
    generator = torch.Generator().manual_seed(seed)
    model = ResidualReLU(2 * vocabulary, width, hidden, vocabulary, 1, generator)
    inputs, labels = pairs_of_tokens(vocabulary)
    return train_classifier(
        model, inputs, labels, generator=generator, steps=steps, rate=rate, decay=decay, run=run
    )


def train_classifier(
    model: Network,
    inputs: Float[Tensor, "points inputs"],
    labels: Int[Tensor, " points"],
    *,
    generator: torch.Generator,
    steps: int = 1500,
    rate: float = 3e-3,
    decay: float = 0.3,
    run: Run | None = None,
) -> Network:
    """Train a network in place by cross-entropy on all points at every step (AdamW, cosine), and
    return it.
    """

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return nn.functional.cross_entropy(model(inputs), labels), {}

    fit(
        model,
        loss,
        torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay),
        steps=steps,
        generator=generator,
        schedule=partial(cosine, floor=0.01),
        run=run,
        name="network",
        save_every=steps,
    )
    return model.eval()
