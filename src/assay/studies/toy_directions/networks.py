"""The networks with known circuits that the toy-directions study takes apart."""

from __future__ import annotations

from typing import Any

import torch

from assay.io.runs import Run
from assay.learn import toys
from assay.studies.toy_directions.config import Config
from assay.targets.toys import MLP, Autoencoder, Bottleneck, Toy


def train_toy(config: Config, network: int, run: Run) -> Toy:
    """Train one of the study's networks, each from a seed of its own."""
    chosen, seed = config.target, config.seed + network
    match chosen.kind:
        case "tms":
            return toys.tms(
                chosen.features,
                chosen.hidden,
                seed=seed,
                steps=chosen.steps,
                probability=chosen.probability,
                samples=chosen.samples,
                copies=8 if chosen.features * chosen.hidden <= 64 else 1,
                weights=chosen.weights,
                run=run,
            )
        case "superposition" | "groups":
            return toys.superposed_circuits(
                chosen.features,
                chosen.hidden,
                seed=seed,
                steps=chosen.steps,
                probability=chosen.probability,
                samples=chosen.samples,
                group=chosen.group if chosen.kind == "groups" else 1,
                run=run,
            )
        case "squares":
            return toys.squares(
                chosen.features, seed=seed, steps=chosen.steps, samples=chosen.samples, run=run
            )
        case "xor":
            return toys.xor(seed=seed, run=run)
        case "digits":
            return toys.digits(
                hidden=chosen.hidden, seed=seed, samples=min(chosen.samples, 500), run=run
            )


def build_network(config: Config) -> Any:
    """Build the first network without training it; its weights come from the run."""
    chosen = config.target
    generator = torch.Generator().manual_seed(0)
    match chosen.kind:
        case "tms":
            if chosen.weights is not None:
                return toys.tms(weights=chosen.weights).model.double()
            return Autoencoder(chosen.features, chosen.hidden, generator).double()
        case "superposition" | "groups":
            return Bottleneck(chosen.features, chosen.hidden, chosen.features, generator).double()
        case "squares":
            return MLP([chosen.features, *[10] * 5, chosen.features], generator).double()
        case "xor":
            return MLP([2, 2, 2], generator, torch.nn.functional.gelu).double()
        case "digits":
            return MLP([64, chosen.hidden, 10], generator).double()
