"""Bad models and bad batches are refused before any work."""

from __future__ import annotations

import pytest
import torch
from channel_oracle import batch, network
from torch import nn

from assay.errors import InputError
from assay.mechanisms.channels.clean import run_clean
from assay.mechanisms.channels.second_order import half_curvatures
from assay.mechanisms.channels.weights import read_weights
from assay.targets.bilinear import BilinearNetwork


def test_models_that_are_not_bilinear_networks_are_refused() -> None:
    with pytest.raises(InputError, match=r"embed must be an nn\.Linear"):
        read_weights(nn.Linear(3, 3))
    model = network(0)
    model.blocks[1].left = nn.Linear(6, 5)
    with pytest.raises(InputError, match=r"blocks.1.left has a bias"):
        read_weights(model)
    model.blocks[1].left = nn.Linear(6, 4, bias=False)
    with pytest.raises(InputError, match=r"blocks.1: left and right"):
        read_weights(model)
    model = network(0)
    model.blocks[0].norm = nn.LayerNorm(6)
    with pytest.raises(InputError, match="RMSNorm"):
        read_weights(model)
    model = network(0)
    model.head = nn.Linear(5, 4, bias=False)
    with pytest.raises(InputError, match="head reads 5"):
        read_weights(model)
    model.blocks = nn.ModuleList()
    with pytest.raises(InputError, match="no blocks"):
        read_weights(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    model = network(0)
    with torch.no_grad():
        model.blocks[1].down.weight[0, 0] = bad
    with pytest.raises(InputError, match=r"blocks.1.down.weight.*1 NaN or infinite"):
        read_weights(model)


def test_bad_batches_are_refused() -> None:
    weights = read_weights(network(0))
    x, y = batch(0)
    with pytest.raises(InputError, match="at least one example"):
        run_clean(weights, x[:0], y[:0])
    with pytest.raises(InputError, match="integer classes"):
        run_clean(weights, x, y.double())
    with pytest.raises(InputError, match=r"0\.\.3"):
        run_clean(weights, x, y + 4)
    with pytest.raises(InputError, match="16"):
        run_clean(weights, x[:, :10], y)
    with pytest.raises(InputError, match="NaN"):
        run_clean(weights, x * float("nan"), y)
    with pytest.raises(InputError, match="did you mean logit"):
        run_clean(weights, x, y, "logits")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="frozen"):
        run_clean(weights, x, y, frozen=True)


def test_a_gate_nonlinearity_refuses_the_closed_second_order() -> None:
    clean = run_clean(read_weights(network(0, gate="gelu")), *batch(0))
    with pytest.raises(InputError, match="gate 'gelu'"):
        half_curvatures(clean)


def test_bad_networks_are_refused() -> None:
    for options, message in (
        ({"hidden": 0}, "hidden"),
        ({"gate": "gellu"}, "did you mean gelu"),
        ({"patch": 2}, "together"),
        ({"image": (4, 4), "patch": 3}, "tile"),
        ({"image": (4, 5), "patch": 1}, "20 entries"),
        ({"image": (16,), "patch": 1}, "height"),
    ):
        with pytest.raises(InputError, match=message):
            BilinearNetwork(16, 3, **options)  # type: ignore[arg-type]


def test_patches_cover_the_image_in_row_order() -> None:
    model = BilinearNetwork(2 * 4 * 6, 3, image=(2, 4, 6), patch=2)
    x = torch.arange(48.0).reshape(1, 2, 4, 6)
    patches = model.cut(x)
    assert patches.shape == (1, 6, 8)
    assert patches[0, 1].tolist() == x[0, :, :2, 2:4].flatten().tolist()
    assert patches[0, 3].tolist() == x[0, :, 2:, :2].flatten().tolist()


def test_the_same_seed_gives_the_same_network() -> None:
    first, second = (
        BilinearNetwork(8, 3, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
