"""What may be bound as channels, and what is refused."""

from __future__ import annotations

import pytest
import torch
from channel_oracle import batch, network

import assay
from assay.errors import InputError
from assay.mechanisms.channels import channels


def test_a_target_keeps_its_model_and_name() -> None:
    model = network(2)
    x, y = batch(2)
    bound = channels(
        assay.target(model, metric=lambda output, batch: output[:, 0], name="mine"), x, y
    )
    assert bound.target.name == "mine"
    assert torch.allclose(bound.values(), model(x).gather(1, y[:, None])[:, 0])


def test_models_that_compute_something_else_are_refused() -> None:
    class Shifted(type(network(0))):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    model = network(0)
    model.__class__ = Shifted
    with pytest.raises(InputError, match="computes something else"):
        channels(model, *batch(0))
    with pytest.raises(InputError, match="torch module"):
        channels("model", *batch(0))  # type: ignore[arg-type]
