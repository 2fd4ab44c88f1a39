"""What may be bound as channels, and what is refused."""

from __future__ import annotations

import pytest
import torch
from channel_oracle import batch, network

import assay
from assay.errors import InputError
from assay.mechanisms.channels import channels
from assay.mechanisms.channels.certify import certify_channels


def test_a_target_keeps_its_model_and_name() -> None:
    model = network(2)
    x, y = batch(2)
    bound = channels(
        assay.target(model, metric=lambda output, batch: output[:, 0], name="mine"), x, y
    )
    assert bound.target.name == "mine"
    assert torch.allclose(bound.values(), model(x).gather(1, y[:, None])[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("known", ["nothing", "clean", "ablation"])
@pytest.mark.parametrize("views", [False, True])
def test_certificates_are_of_the_network_that_was_bound(
    dtype: torch.dtype, known: str, views: bool
) -> None:
    """Weights, inputs and classes change in place, before or after some results are known."""
    model, (x, y) = network(0).to(dtype), batch(0)
    whole, classes = torch.stack([x, x]).to(dtype), torch.stack([y, y])
    store = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    if views:  # all parameters lie in one storage, as optimisers and shards keep them
        begin = 0
        for parameter in model.parameters():
            end = begin + parameter.numel()
            parameter.data = store[begin:end].view(parameter.shape)
            begin = end
    fixed = channels(network(0).to(dtype), whole[0].clone(), y)
    bound = channels(model, whole[0], classes[0])
    if known != "nothing":
        getattr(bound, known)
    with torch.no_grad():
        for changed in [store] if views else model.parameters():
            changed.mul_(1.5).add_(0.1)
        whole.mul_(2)
        classes.add_(1).remainder_(4)
    found, wanted = certify_channels(bound.clean), certify_channels(fixed.clean)
    assert torch.equal(found.first, wanted.first)
    assert torch.equal(bound.ablation.effects, fixed.ablation.effects)
    assert torch.equal(bound.values(), fixed.values())
    assert bool(((bound.ablation.effects - bound.attributions()).abs() <= found.first).all())


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
