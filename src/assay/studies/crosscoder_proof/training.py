"""The network and the crosscoder of a run: read from files, or trained, one after the other or
together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from assay.io.runs import Run
from assay.learn.residual_relu import train_classifier
from assay.mechanisms.crosscoder import (
    Block,
    Cotraining,
    Crosscoder,
    Hinge,
    Interaction,
    Training,
    cotrain,
    hash_of,
    load,
    residual_states,
    start_at_codes,
    train,
)
from assay.mechanisms.crosscoder.objective import Term
from assay.mechanisms.crosscoder.training import equal_norm_scales, rows_of
from assay.studies.crosscoder_proof.config import Config
from assay.studies.crosscoder_proof.tasks import Task
from assay.targets.residual_relu import ResidualReLU


def network_and_crosscoder(
    config: Config, run: Run, task: Task, fitted: Tensor, given: ResidualReLU | None
) -> tuple[ResidualReLU, Crosscoder]:
    """Return the network, `given` or trained, and the crosscoder that was loaded or trained on the
    points `fitted`.
    """
    model = _network(config, run, task, fitted) if given is None else given
    chosen = config.crosscoder
    if chosen.path is not None:
        found = load(chosen.path, model.sites)
        found.require_network(model, f"the crosscoder in {chosen.path}")
        return model, found
    states = residual_states(model, task.inputs, model.sites)
    generator = torch.Generator().manual_seed(config.seed)
    found = Crosscoder(
        model.sites, states.shape[2], chosen.features, model_hash=hash_of(model),
        generator=generator,
    )  # fmt: skip
    scales = equal_norm_scales(states[fitted])
    if chosen.start == "tokens" and task.proposed is not None:
        start_at_codes(found, states[fitted], task.proposed[fitted], scales)
    training = Training(chosen.steps, chosen.rate, chosen.sparsity)
    if chosen.cotrain:
        cotrain(
            model,
            found,
            task.inputs[fitted],
            task.labels[fitted],
            training,
            terms=_terms(config, model, task.labels[fitted], live=True),
            generator=generator,
            cotraining=Cotraining(config.model.decay, chosen.batch),
            run=run,
        )
    else:
        terms = _terms(config, model, task.labels, live=False)()
        draw = rows_of(states, fitted)
        train(found, draw, training, terms=terms, scales=scales, generator=generator, run=run)
    return model.eval(), found.eval()


def _network(config: Config, run: Run, task: Task, fitted: Tensor) -> ResidualReLU:
    """Train a network, on all pairs of tokens or on the digits that are not held out."""
    chosen, seen = config.model, torch.arange(len(task.labels)) if task.pairs else fitted
    generator = torch.Generator().manual_seed(config.seed)
    outputs = int(task.labels.max()) + 1
    model = ResidualReLU(task.inputs.shape[1], chosen.width, chosen.hidden, outputs, 1, generator)
    return train_classifier(
        model,
        task.inputs[seen],
        task.labels[seen],
        generator=generator,
        steps=chosen.steps,
        rate=chosen.rate,
        decay=chosen.decay,
        run=run,
    )


def _terms(
    config: Config, model: ResidualReLU, labels: Tensor, *, live: bool
) -> Callable[[], list[Term]]:
    """Return what makes the terms of a step, with gradients into the network where it is `live`."""
    chosen = config.crosscoder

    def make() -> list[Term]:
        block = Block.of(model.blocks[0], 0, live=live)
        weight, bias = model.unembed.weight, model.unembed.bias
        unembed = (weight, bias) if live else (weight.detach(), bias.detach())
        terms: list[Term] = []
        if chosen.interaction:
            terms.append(Interaction(block, chosen.interaction))
        if chosen.hinge:
            terms.append(
                Hinge(block, *unembed, labels, chosen.margin, chosen.compact, chosen.hinge)
            )
        return terms

    return make
