"""What the balls of norms allow, beside the extreme that is reached and the box around the ball."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from assay.bounds.search.ball import least_anywhere
from assay.bounds.trace import trace

WIDTH = 6


def normed(kind: str) -> tuple[nn.Module, Tensor]:
    """Return a norm with random weights and a random readout, in float64."""
    generator = torch.Generator().manual_seed(2)
    norm = nn.LayerNorm(WIDTH) if kind == "layer" else nn.RMSNorm(WIDTH, eps=1e-6)
    norm = norm.double()
    for parameter in norm.parameters():
        parameter.data = torch.randn(WIDTH, generator=generator).double()
    return norm.requires_grad_(False), torch.randn(WIDTH, 2, generator=generator).double()


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("level", ["real", "float64"])
def test_no_input_leaves_the_ball_and_some_reach_it(kind: str, level: str) -> None:
    norm, readout = normed(kind)

    def value(x: Tensor) -> Tensor:
        return (norm(x) @ readout).sum(1)

    x = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    at = trace(value, x).at(level)
    row = np.array([[1.0, -0.7]])
    bound = least_anywhere(at, row)
    # The worst direction of the readout, at every position; without its mean for LayerNorm.
    steep = -(norm.weight.double() * (readout @ torch.tensor(row[0])))
    steep = steep - steep.mean() if kind == "layer" else steep
    worst = (value(1e4 * steep.expand(1, 3, WIDTH)) @ torch.tensor(row[0])).item()
    drawn = 1e3 * torch.randn(500, 3, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    seen = (value(drawn) @ torch.tensor(row[0])).min().item()
    assert bound <= worst + 1e-9
    assert worst <= seen
    if kind == "rms":
        assert bound == pytest.approx(worst, rel=1e-6)
    length = (norm.weight.double() * (readout @ torch.tensor(row[0]))).norm().item()
    assert (
        bound
        >= -3 * (length * WIDTH**0.5)
        - 3
        * abs(
            float(
                row[0]
                @ readout.T.numpy()
                @ (norm.bias.numpy() if kind == "layer" else np.zeros(WIDTH))
            )
        )
        - 1e-6
    )


def test_a_value_that_follows_from_no_norm_has_no_bound() -> None:
    norm, readout = normed("layer")
    x = torch.ones(1, 3, WIDTH).double()
    plain = trace(lambda x: (x @ readout).sum(1), x).at("real")
    assert least_anywhere(plain, np.ones((1, 2))) == -np.inf
    beside = trace(lambda x: ((norm(x) + 0.1 * x) @ readout).sum(1), x).at("real")
    assert least_anywhere(beside, np.ones((1, 2))) == -np.inf
