"""The factors of an attribution's error: alignment, step and constant, by hand and by identity."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as f

from assay.errors import InputError
from assay.mechanisms.channels.ablation import ablate_channels
from assay.mechanisms.channels.attribution import alignments, attribute_channels, measure_steps
from assay.mechanisms.channels.certify import certify_channels
from assay.mechanisms.channels.clean import Clean, run_clean
from assay.mechanisms.channels.constants import closed_form_steps, error_constants
from assay.mechanisms.channels.weights import read_weights
from assay.targets.bilinear import BilinearNetwork


def clean_pass(blocks: int = 3, **options: object) -> Clean:
    generator = torch.Generator().manual_seed(0)
    model = BilinearNetwork(
        16,
        3,
        width=6,
        hidden=5,
        blocks=blocks,
        generator=generator,
        **options,  # type: ignore[arg-type]
    )
    x = torch.randn(7, 16, generator=generator, dtype=torch.float64)
    model.requires_grad_(False)
    return run_clean(read_weights(model, torch.float64), x, torch.arange(7) % 3)


def test_alignment_is_the_cosine_of_gradient_and_written_direction() -> None:
    clean = clean_pass()
    found = alignments(clean)
    for block, layer in enumerate(clean.weights.layers):
        gradient = clean.gradients[block]
        for channel in range(5):
            written = layer.down[:, channel].expand_as(gradient)
            cosine = f.cosine_similarity(gradient, written).abs()
            assert torch.allclose(found[:, block, channel], cosine, atol=1e-12)
    assert float(found.max()) <= 1 + 1e-12


def test_alignment_over_positions_is_a_share_and_zero_where_a_channel_is_off() -> None:
    clean = clean_pass(image=(4, 4), patch=2)
    assert clean.positions == 4
    found = alignments(clean)
    assert 0 < float(found.min()) <= float(found.max()) < 1
    layer = clean.weights.layers[1]
    layer.left[2] = 0
    off = run_clean(clean.weights, torch.randn(7, 16, dtype=torch.float64), clean.labels)
    assert alignments(off)[:, 1, 2].tolist() == [0.0] * 7


def test_the_relative_error_is_the_product_of_its_factors() -> None:
    clean = clean_pass()
    ablation = ablate_channels(clean)
    constants = error_constants(clean, ablation, certify_channels(clean))
    gradients = torch.stack([gradient.norm(dim=1) for gradient in clean.gradients], 1)[..., None]
    relative = ablation.errors.abs() / attribute_channels(clean).abs()
    product = constants.realised * constants.steps / (gradients * alignments(clean))
    assert torch.allclose(product, relative, rtol=1e-9, atol=1e-14)


def test_realised_constants_lie_under_the_certified_ones() -> None:
    clean = clean_pass()
    found = error_constants(clean, ablate_channels(clean), certify_channels(clean))
    assert bool((found.realised <= found.certified * (1 + 1e-9) + 1e-9).all())
    assert torch.equal(found.steps, measure_steps(clean))
    assert found.later.tolist() == [2, 1, 0]
    sizes = [
        torch.linalg.svdvals(layer.left)[0] * torch.linalg.svdvals(layer.right)[0]
        for layer in clean.weights.layers
    ]
    expected = [(sizes[1] + sizes[2]) / 2, sizes[2], 0.0]
    assert found.norms.tolist() == pytest.approx([float(value) for value in expected])
    # The last block's attributions are exact: no error, and none certified.
    assert float(found.certified[:, -1].abs().max()) == 0


def test_the_closed_form_step_spends_the_budget() -> None:
    attribution = torch.tensor([[[2.0], [-3.0]]], dtype=torch.float64)
    constant, later = torch.tensor([4.0, 5.0]).double(), torch.tensor([1.0, 0.0]).double()
    step = closed_form_steps(attribution, constant, later, 0.1)
    assert float(4 * 1 * step[0, 0, 0] ** 2) == pytest.approx(0.1 * 2)
    assert step[0, 1, 0] == float("inf")
    with pytest.raises(InputError, match="tolerance must be above 0"):
        closed_form_steps(attribution, constant, later, 0.0)
