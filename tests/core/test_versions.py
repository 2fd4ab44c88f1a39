"""What is bound holds for the weights of the time: later ones are refused, not mixed with it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping

import cases
import pytest
import torch
from torch import nn

import assay
from assay.attribution.exact import every
from assay.core.versions import Unchanged, versions
from assay.errors import InputError

BOUND = {
    "nodes": cases.bound_nodes,
    "directions": cases.bound_directions,
    "components": cases.bound_components,
    "features": cases.bound_features,
    "crosscoder": cases.bound_crosscoder,
}
OWN = {
    "components": lambda m: m.found,
    "features": lambda m: m.dictionaries["blocks.1"].dictionary,
    "crosscoder": lambda m: m.found,
}
OPERATIONS: Mapping[str, Callable] = {
    "values": lambda m: m.values(m.ones()),
    "attribute": lambda m: assay.attribute(m),
    "ablate": lambda m: assay.ablate(m, next(iter(m.groups)), every(m, next(iter(m.groups)))[:1]),
    "norms": lambda m: m.norms(),
    "a part": lambda m: m.take(slice(0, 1)).values(m.ones([])),
    "a copy": lambda m: copy.deepcopy(m.bound).require("parts") or m.values(),
}


def step(module: nn.Module) -> None:
    """Take a step of training, as an optimizer does."""
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.1).step()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", BOUND)
def test_training_after_binding_is_refused(kind: str, operation: str) -> None:
    changes = [lambda m: m.target.model] + ([OWN[kind]] if kind in OWN else [])
    for changed in changes:
        mechanisms = BOUND[kind](dtype=torch.float32)
        OPERATIONS[operation](mechanisms)
        step(changed(mechanisms))
        words = "the network" if changed is changes[0] else "the d|the crosscoder"
        with pytest.raises(InputError, match=f"({words}).* changed after the {mechanisms.kind}"):
            OPERATIONS[operation](mechanisms)


def test_channels_are_those_of_a_copy() -> None:
    network = cases.bound_channels().target.model.float()
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    mechanisms = assay.channels(network, x, torch.arange(4) % 3)
    before = mechanisms.values()
    step(network)
    assert torch.equal(mechanisms.values(), before)


def test_a_network_in_training_mode_is_refused() -> None:
    mechanisms = cases.bound_components()
    mechanisms.target.model.train()
    with pytest.raises(InputError, match="in training mode"):
        mechanisms.values()


def test_every_way_to_change_weights_is_seen_and_reading_is_not() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    state = {name: entry.clone() for name, entry in model.state_dict().items()}

    def replaced() -> None:
        model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))

    for change in (
        lambda: model.load_state_dict(state),
        lambda: model.double(),
        lambda: model[1].running_mean.add_(1),
        replaced,
    ):
        before = Unchanged({"the network": model})
        change()
        with pytest.raises(InputError, match="the network changed"):
            before.require("parts")
    now = Unchanged({"the network": model})
    model(torch.ones(1, 2).double())
    model.get_buffer("cache").add_(1)
    now.require("parts")
    pickle.loads(pickle.dumps(now)).require("parts")
    assert len(versions(torch.ones(2))) == 1
