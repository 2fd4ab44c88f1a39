"""The toy-components study: train networks with known mechanisms, split their matrices into
rank-one components, and count the mechanisms recovered."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from assay.core.target import Batch, target
from assay.io.runs import Run
from assay.learn import toys
from assay.mechanisms.components import (
    ComponentMechanisms,
    Decomposition,
    Objective,
    Recon,
    Rows,
    Stochastic,
    Training,
    decomposition,
    skip_zeros,
    start_at_data,
    train,
    zeros_are_inert,
)
from assay.mechanisms.components import components as bind
from assay.studies import runner
from assay.studies.component_penalty import make_penalty
from assay.studies.toy_components import evaluation
from assay.studies.toy_components.config import Config
from assay.studies.toy_components.page import headline, sections
from assay.targets.residual import ResidualMLP
from assay.targets.tms import TMS, load_tms, untie
from assay.targets.toys import load_autoencoder

__all__ = ["Config", "check", "contexts", "headline", "load", "run", "sections"]

START = 4096
"""Rows among which the components' first directions are looked for, if a batch has fewer."""


@dataclass(frozen=True)
class Found:
    """One network, its decomposition, and the CPU seconds that both took."""

    model: nn.Module
    decomposition: Decomposition
    loss: float
    seconds: float


def check(config: Config) -> None:
    """Refuse weights that cannot be read."""
    if config.target.weights is not None:
        load_autoencoder(config.target.weights)


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train and decompose every network, evaluate each, and compare the decompositions of the
    first; the first one is kept whole.
    """
    networks = 1 if config.target.weights else config.target.networks
    jobs = [
        *((network, 0) for network in range(networks)),
        *((0, again) for again in range(1, config.components.decompositions)),
    ]
    found, rows = [], []
    for network, again in jobs:
        name = f"network-{network}" + (f"-again-{again}" if again else "")
        found.append(_decompose(config, network, again, run.child(name)))
        one = found[-1]
        about = {"network": network, "again": again, "loss": one.loss, "seconds": one.seconds}
        rows += [
            {**about, **row} for row in evaluation.measure(config, one.model, one.decomposition)
        ]
    table = pl.DataFrame(rows, infer_schema_length=None)
    run.save_table("runs.parquet", table)
    others = [one.decomposition for one in found[networks:]]
    evaluation.keep(config, run, found[0].model, found[0].decomposition, others)
    return evaluation.summarise(config, run, table)


def load(run: Run) -> ComponentMechanisms:
    """Bind the components of the first network to its inputs; the metric is each input's largest
    output.
    """
    config = runner.config_of(run)
    tensors = run.tensors("model.safetensors")
    model = _untrained(config, tensors)
    model.load_state_dict(tensors)
    found = _undecomposed(config, model, torch.Generator().manual_seed(0))
    found.load_state_dict(run.tensors("decomposition.safetensors"))
    inputs = run.tensors("inputs.safetensors")["inputs"]
    with torch.no_grad():
        labels = model(inputs).argmax(-1)
    whole = target(
        model,
        lambda output, batch: output.gather(-1, batch.labels[:, None])[:, 0],
        config.target.kind,
    )
    return bind(whole, Batch(inputs, labels), found)


def contexts(run: Run) -> pl.DataFrame:
    """Describe the inputs that the run's components were bound to: which entries are active."""
    inputs = run.tensors("inputs.safetensors")["inputs"]
    active = [
        ", ".join(f"{index}: {float(row[index]):.2f}" for index in row.nonzero()[:8, 0].tolist())
        for row in inputs
    ]
    return pl.DataFrame({"example": range(len(active)), "active entries": active})


def _decompose(config: Config, network: int, again: int, run: Run) -> Found:
    began = time.process_time()
    model, loss = _target(config, network, run)
    seed = config.seed + network + 1000 * again
    generator = torch.Generator().manual_seed(seed)
    found = _undecomposed(config, model, generator)
    features = evaluation.count_features(model)
    inert = zeros_are_inert(model, found, features)

    def draw(generator: torch.Generator) -> Rows:
        x = evaluation.draw_inputs(config, features, config.training.batch, generator)
        return skip_zeros(x) if inert else Rows(x)

    if config.components.start == "data":
        rows = max(config.training.batch, START)
        start_at_data(
            model, found, evaluation.draw_inputs(config, features, rows, generator), generator
        )
    training = config.training
    penalty = make_penalty(config.penalty, training.batch)
    source = Stochastic(training.sources)
    train(
        model,
        found,
        Objective((Recon(source), Recon(source, "layerwise")), penalty),
        draw,
        Training(
            steps=training.steps,
            rate=training.rate,
            importance_rate=training.importance_rate,
            warmup_steps=training.warmup_steps,
            save_every=200,
        ),
        generator=generator,
        run=run,
    )
    return Found(model, found, loss, time.process_time() - began)


def _target(config: Config, network: int, run: Run) -> tuple[nn.Module, float]:
    chosen, seed = config.target, config.seed + network
    if chosen.kind == "residual":
        toy = toys.residual_mlp(
            chosen.features,
            chosen.width,
            chosen.hidden,
            chosen.layers,
            seed=seed,
            steps=chosen.steps,
            probability=chosen.probability,
            orthonormal=chosen.orthonormal,
            run=run,
        )
        return toy.model, toy.loss
    if chosen.weights is not None:
        return load_tms(chosen.weights, chosen.identities), float("nan")
    toy = toys.tms(
        chosen.features,
        chosen.hidden,
        seed=seed,
        steps=chosen.steps,
        probability=chosen.probability,
        copies=8 if chosen.features * chosen.hidden <= 64 else 1,
        run=run,
    )
    return untie(toy.model, chosen.identities), toy.loss  # type: ignore[arg-type]


def _untrained(config: Config, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a network of the shapes of saved tensors."""
    chosen = config.target
    if chosen.kind == "residual":
        features, width = tensors["embed"].shape
        return ResidualMLP(features, width, chosen.hidden, chosen.layers)
    hidden, features = tensors["linear1.weight"].shape
    return TMS(features, hidden, chosen.identities)


def _undecomposed(config: Config, model: nn.Module, generator: torch.Generator) -> Decomposition:
    return decomposition(
        model,
        "*",
        config.components.per_site,
        importance=config.components.importance,
        generator=generator,
        hidden=config.components.hidden,
    )
