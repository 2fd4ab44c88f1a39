"""Co-training: a network and its crosscoder, together, so that what the features prove of the
network is much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from assay.core.sites import Edit, Seen, run_edited
from assay.errors import InputError
from assay.io.files import hash_of
from assay.io.runs import Run
from assay.learn.loop import cosine, fit
from assay.mechanisms.crosscoder.coder import Crosscoder
from assay.mechanisms.crosscoder.objective import Term
from assay.mechanisms.crosscoder.states import residual_states
from assay.mechanisms.crosscoder.training import (
    Threshold,
    Training,
    equal_norm_scales,
    fold,
    losses_of,
)


@dataclass(frozen=True)
class Cotraining:
    """`decay` is the weight decay of the network, `batch` the points of a step."""

    decay: float = 0.01
    batch: int = 512

    def __post_init__(self) -> None:
        if self.batch < 1 or not self.decay >= 0:
            raise InputError(
                f"batch must be at least 1 and decay at least 0, got {self.batch} and {self.decay}"
            )


def cotrain(
    model: nn.Module,
    found: Crosscoder,
    inputs: Float[Tensor, "points inputs"],
    labels: Int[Tensor, " points"],
    training: Training,
    *,
    terms: Callable[[], Sequence[Term]],
    generator: torch.Generator,
    cotraining: Cotraining | None = None,
    run: Run | None = None,
    name: str = "cotraining",
) -> None:
    """Train a network and its crosscoder in place, both at once: the cross-entropy of the network,
    plus the crosscoder's loss (see `train`) with gradients into the network.

    `terms` makes the further terms of one step from the network's weights as they are then. The
    scales of the layers are those before the first step. Afterwards the crosscoder carries the
    digest of the network that training ended with: it is about that network, and no other. With
    `run`, training is resumed from its checkpoint and ends with the same bits."""
    cotraining = Cotraining() if cotraining is None else cotraining
    scales = equal_norm_scales(residual_states(model, inputs, found.sites))
    tracker = Threshold(found)

    def objective(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.randint(len(labels), (cotraining.batch,), generator=generator)
        states, output = _states_and_output(model, inputs[rows], found.sites)
        total, losses, codes = losses_of(
            found, states, rows, scales, training, terms(), step / training.steps
        )
        tracker.see(codes)
        losses["losses/network"] = nn.functional.cross_entropy(output, labels[rows])
        return total + losses["losses/network"], losses

    groups = [
        {"params": list(found.parameters()), "weight_decay": 0.0},
        {"params": list(model.parameters()), "weight_decay": cotraining.decay},
    ]
    fit(
        nn.ModuleDict({"network": model, "crosscoder": found}),
        objective,
        torch.optim.AdamW(groups, lr=training.rate),
        steps=training.steps,
        generator=generator,
        schedule=partial(cosine, floor=training.floor),
        run=run,
        name=name,
        log_every=training.log_every,
        save_every=training.save_every,
    )
    fold(found, scales)
    found.model_hash = hash_of(model)


def _states_and_output(
    model: nn.Module, inputs: Any, sites: Sequence[str]
) -> tuple[Float[Tensor, "rows layers width"], Tensor]:
    """Return the values at the sites side by side, and the output, with gradients."""
    values: dict[str, Tensor] = {}

    def keep(site: str) -> Edit:
        def edit(seen: Seen) -> Tensor:
            values[site] = seen.value
            return seen.written

        return edit

    output = run_edited(model, inputs, {site: keep(site) for site in sites})
    return torch.stack([values[site] for site in sites], -2), output
