"""The data of a channels study, and the networks that are trained on them."""

from __future__ import annotations

import torch

from assay.io.runs import Run
from assay.learn import cosine, fit
from assay.mechanisms.channels.objective import Training, make_objective, make_optimizer
from assay.studies.channels.config import Config
from assay.targets.bilinear import BilinearNetwork
from assay.targets.data import Data, load_arrays, load_digits


def read_data(config: Config) -> Data:
    """Return the study's data; with `data.choosing`, its training part split again."""
    chosen = config.data
    data = (
        load_digits()
        if chosen.path is None
        else load_arrays(chosen.path, train=chosen.train, layout=chosen.layout)
    )
    return data.without_test() if chosen.choosing else data


def build_network(config: Config, data: Data) -> BilinearNetwork:
    """Return the network before training, drawn from the seed."""
    generator = torch.Generator().manual_seed(config.seed)
    image = data.image if config.model.patch is not None else None
    return BilinearNetwork(
        data.inputs, data.classes, **config.model.model_dump(), image=image, generator=generator
    )


def train_network(config: Config, data: Data, run: Run) -> BilinearNetwork:
    """Train a network on the training part, and save it in the run."""
    model = build_network(config, data)
    training = Training(**config.training.model_dump())
    generator = torch.Generator().manual_seed(config.seed + 1)
    objective = make_objective(model, data, training, generator)
    optimizer = make_optimizer(model, training)
    fit(
        model,
        objective,
        optimizer,
        steps=training.steps,
        generator=generator,
        schedule=cosine,
        run=run,
        log_every=training.log_every,
    )
    run.save_tensors("model.safetensors", model.state_dict())
    return model
