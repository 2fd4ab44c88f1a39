"""The closed forms against brute force: attribution, the error identity, second order."""

from __future__ import annotations

import pytest
import torch
from channel_oracle import ablated, batch, derivatives, network
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.errors import InputError
from assay.mechanisms.channels.ablation import ablate_channels
from assay.mechanisms.channels.attribution import attribute_channels, hoyer, measure_steps
from assay.mechanisms.channels.clean import run_clean
from assay.mechanisms.channels.second_order import half_curvatures, second_order_channels
from assay.mechanisms.channels.weights import read_weights

FUNCTIONALS = ("logit", "cross_entropy")
NORMS = ("none", "live", "frozen")


def _setting(norm: str, patches: bool, gate: str | None = None) -> dict[str, object]:
    return {"norm": norm != "none", "patches": patches, "gate": gate}


@pytest.mark.parametrize("functional", FUNCTIONALS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("gate", [None, "silu"])
def test_every_setting_equals_brute_force(
    functional: str, norm: str, patches: bool, gate: str | None
) -> None:
    model = network(1, blocks=4, **_setting(norm, patches, gate))
    x, y = batch(1)
    frozen = norm == "frozen"
    clean = run_clean(read_weights(model), x, y, functional, frozen=frozen)  # type: ignore[arg-type]
    first, second = derivatives(model, x, y, functional, frozen)
    expected = ablated(model, x, y, functional, frozen)
    result = ablate_channels(clean)
    attribution = attribute_channels(clean)
    assert torch.allclose(clean.logits, model(x), rtol=1e-12, atol=1e-12)
    assert torch.allclose(attribution, first, rtol=1e-10, atol=1e-10)
    assert torch.allclose(result.effects, expected, rtol=1e-10, atol=1e-10)
    assert torch.allclose(result.errors, attribution - expected, rtol=1e-8, atol=1e-10)
    if gate is None:
        assert torch.allclose(half_curvatures(clean), second / 2, rtol=1e-9, atol=1e-10)
        assert torch.allclose(
            second_order_channels(clean), first - second / 2, rtol=1e-9, atol=1e-10
        )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    blocks=st.integers(2, 5),
    scale=st.sampled_from([0.3, 1.0, 2.0]),
    functional=st.sampled_from(FUNCTIONALS),
)
def test_identity_on_random_networks(seed: int, blocks: int, scale: float, functional: str) -> None:
    model = network(seed, blocks=blocks, scale=scale)
    x, y = batch(seed, examples=3)
    effects = ablate_channels(run_clean(read_weights(model), x, y, functional)).effects  # type: ignore[arg-type]
    expected = ablated(model, x, y, functional)
    # Brute force subtracts two values of F, so its own rounding is relative to those.
    size = 1 + float(model(x).abs().max().detach())
    assert float((effects - expected).abs().max()) <= 1e-10 * size


def test_last_block_is_exact_and_chunks_do_not_matter() -> None:
    model = network(3, blocks=3)
    x, y = batch(3, examples=7)
    clean = run_clean(read_weights(model), x, y)
    whole = ablate_channels(clean)
    assert torch.equal(whole.errors[:, -1], torch.zeros_like(whole.errors[:, -1]))
    assert whole.errors[:, :-1].abs().min() > 0
    small = ablate_channels(clean, budget=6000)
    assert torch.allclose(small.effects, whole.effects, rtol=1e-12, atol=1e-14)
    with pytest.raises(InputError, match="budget"):
        ablate_channels(clean, budget=100)


def test_float32_weights_stay_float32_and_a_copy_in_float64_does_not_change_the_model() -> None:
    model = network(4).float()
    x, y = batch(4)
    single = ablate_channels(run_clean(read_weights(model), x.float(), y))
    double = ablate_channels(run_clean(read_weights(model, torch.float64), x, y))
    assert single.effects.dtype == torch.float32
    assert double.effects.dtype == torch.float64
    assert torch.allclose(single.effects.double(), double.effects, rtol=1e-3, atol=1e-4)
    assert model.head.weight.dtype == torch.float32


def test_attribution_carries_gradients_to_the_weights() -> None:
    model = network(5)
    x, y = batch(5)
    attribute_channels(run_clean(read_weights(model), x, y)).square().sum().backward()
    assert model.blocks[0].down.weight.grad is not None
    assert model.blocks[0].down.weight.grad.abs().sum() > 0


def test_rescaling_a_channel_changes_neither_attribution_nor_step() -> None:
    model = network(6)
    x, y = batch(6)
    before = run_clean(read_weights(model), x, y)
    steps, attribution = measure_steps(before), attribute_channels(before)
    with torch.no_grad():
        model.blocks[1].down.weight[:, 2] *= 7
        model.blocks[1].left.weight[2] /= 7
    after = run_clean(read_weights(model), x, y)
    assert torch.allclose(steps, measure_steps(after))
    assert torch.allclose(attribution, attribute_channels(after))


def test_step_bounds_the_attribution() -> None:
    clean = run_clean(read_weights(network(7)), *batch(7))
    norms = torch.stack([g.norm(dim=1) for g in clean.gradients], 1)
    assert bool(
        (
            attribute_channels(clean).abs()
            <= norms.unsqueeze(-1) * measure_steps(clean) * (1 + 1e-12)
        ).all()
    )


@given(seed=st.integers(0, 1000), count=st.integers(2, 30))
@settings(max_examples=30, deadline=None)
def test_hoyer_lies_in_its_range_and_forgets_scale(seed: int, count: int) -> None:
    scores = torch.randn(
        3, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    value, defined = hoyer(scores)
    expected = (count**0.5 - scores.abs().sum(1) / scores.square().sum(1).sqrt()) / (count**0.5 - 1)
    assert bool(defined.all())
    assert torch.allclose(value, expected)
    assert bool(((value >= -1e-12) & (value <= 1 + 1e-12)).all())
    assert torch.allclose(hoyer(1e-200 * scores)[0], value)


def test_hoyer_masks_zero_rows_and_knows_its_ends() -> None:
    scores = torch.tensor(
        [[0.0, 0, 0, 0], [0, 3, 0, 0], [1, -1, 1, 1]], dtype=torch.float64, requires_grad=True
    )
    value, defined = hoyer(scores)
    assert defined.tolist() == [False, True, True]
    assert value.tolist() == pytest.approx([0.0, 1.0, 0.0])
    value.sum().backward()
    assert scores.grad is not None
    assert bool(torch.isfinite(scores.grad).all())
