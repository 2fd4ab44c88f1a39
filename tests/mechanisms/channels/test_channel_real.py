"""Level real: certificates against ablation in exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from channel_oracle import batch, network
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.channels.certify import certify_channels
from assay.mechanisms.channels.certify_real import certify_channels_real
from assay.mechanisms.channels.clean import run_clean
from assay.mechanisms.channels.weights import read_weights
from assay.targets.bilinear import BilinearNetwork

Rows = list[list[Fraction]]


def _exact(weight: Tensor) -> Rows:
    return [[Fraction(float(entry)) for entry in row] for row in weight.detach()]


def _apply(matrix: Rows, vector: list[Fraction]) -> list[Fraction]:
    return [sum((a * b for a, b in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]


def _logit(
    model: BilinearNetwork, x: Tensor, label: int, ablated: tuple[int, int] | None = None
) -> Fraction:
    state = _apply(_exact(model.embed.weight), [Fraction(float(entry)) for entry in x])
    for index, block in enumerate(model.blocks):
        left, right = (
            _apply(_exact(block.left.weight), state),
            _apply(_exact(block.right.weight), state),
        )
        hidden = [a * b for a, b in zip(left, right, strict=True)]
        if ablated is not None and ablated[0] == index:
            hidden[ablated[1]] = Fraction(0)
        state = [
            a + b for a, b in zip(state, _apply(_exact(block.down.weight), hidden), strict=True)
        ]
    return _apply(_exact(model.head.weight), state)[label]


@pytest.mark.parametrize(
    ("seed", "blocks", "scale"), [(0, 3, 1.0), (1, 4, 0.3), (2, 4, 3.0), (3, 2, 30.0)]
)
def test_real_certificates_hold_in_rational_arithmetic(
    seed: int, blocks: int, scale: float
) -> None:
    model = network(seed, blocks=blocks, width=3, hidden=3, scale=scale)
    x, y = batch(seed, examples=1)
    found = certify_channels_real(read_weights(model), x, y)
    assert found.level == "real"
    assert found.curvature is not None
    assert found.second is not None
    clean = _logit(model, x[0], int(y))
    for block in range(blocks):
        for channel in range(3):
            effect = clean - _logit(model, x[0], int(y), (block, channel))
            attribution, curvature, first, second, tight = (
                Fraction(float(values[0, block, channel]))
                for values in (
                    found.attribution,
                    found.curvature,
                    found.first,
                    found.second,
                    found.first_tight,
                )
            )
            assert abs(effect - attribution) <= first
            assert abs(effect - (attribution - curvature)) <= second
            assert abs(effect - attribution) <= tight
            # Even the last block's certificate pays for the rounding of the attribution that it is
            # about.
            assert first > 0 or attribution == effect


def test_real_is_close_to_float64_for_small_steps() -> None:
    model = network(5, blocks=4, scale=0.5)
    x, y = batch(5)
    weights = read_weights(model)
    real, computed = (
        certify_channels_real(weights, x, y),
        certify_channels(run_clean(weights, x, y)),
    )
    assert real.second is not None
    assert computed.second is not None
    assert torch.allclose(real.attribution, computed.attribution, rtol=1e-10, atol=1e-13)
    ratio = (real.first / computed.first)[:, :-1]
    assert float(ratio.min()) >= 1
    assert float(ratio.max()) < 4


def test_float32_weights_are_taken_as_they_are() -> None:
    model = network(6, blocks=2).float()
    x, y = batch(6)
    single = certify_channels_real(read_weights(model), x.float(), y)
    double = certify_channels_real(read_weights(model.double()), x.float().double(), y)
    assert torch.equal(single.first, double.first)
    assert math.isfinite(float(single.first.max()))


def test_what_has_no_proof_is_refused() -> None:
    x, y = batch(0)
    for options, message in (
        ({"norm": True}, "without norms"),
        ({"patches": True}, "dense"),
        ({"gate": "relu"}, "gate"),
    ):
        with pytest.raises(InputError, match=message):
            certify_channels_real(read_weights(network(0, **options)), x, y)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one class per example"):
        certify_channels_real(read_weights(network(0)), x, y[:2])
    with pytest.raises(InputError, match="bits"):
        certify_channels_real(read_weights(network(0)), x, y, bits=10)
