"""Certificates: no draw may violate them, and what they do not cover is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from channel_oracle import ablated, batch, derivatives, network
from torch import Tensor

from assay.attribution import Exact, SecondOrder, ablate, attribute, every
from assay.errors import InputError
from assay.mechanisms.channels import channels
from assay.mechanisms.channels.ablation import ablate_channels
from assay.mechanisms.channels.attribution import attribute_channels
from assay.mechanisms.channels.certify import certify_channels, certify_relative
from assay.mechanisms.channels.clean import run_clean
from assay.mechanisms.channels.norms import norm_length
from assay.mechanisms.channels.second_order import half_curvatures
from assay.mechanisms.channels.weights import read_weights
from assay.targets.bilinear import BilinearNetwork
from assay.targets.data import load_digits

SETTINGS = list(
    itertools.product(("logit", "cross_entropy"), ("plain", "frozen", "live"), (False, True))
)


def _check_draw(seed: int, *, brute: bool = False) -> None:
    """Draw a network and a batch, and hold every certificate to the computed numbers: no tolerance,
    since the bounds pay for rounding themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    functional, norm, patches = SETTINGS[seed % len(SETTINGS)]
    pick = torch.rand(3, generator=generator)
    scale = float(10 ** (3 * pick[0] - 1.5))
    blocks = 2 + int(4 * pick[1])
    model = network(
        seed, blocks=blocks, width=4, hidden=3, scale=scale, norm=norm != "plain", patches=patches
    )
    x, y = batch(seed, examples=2)
    x = x * float(10 ** (2 * pick[2] - 1))
    with torch.no_grad():
        clean = run_clean(read_weights(model), x, y, functional, frozen=norm == "frozen")  # type: ignore[arg-type]
        if not all(bool(torch.isfinite(g).all()) for g in (*clean.gradients, clean.logits)):
            return
        found = certify_channels(clean, tight=norm != "live")
        scan = ablate_channels(clean)
    assert found.ablation == norm
    assert torch.equal(found.attribution, attribute_channels(clean))
    effects = {"scan": scan.effects}
    attributions = {"closed form": found.attribution}
    if brute:
        effects["brute force"] = ablated(model, x, y, functional, norm == "frozen")
        first, second = derivatives(model, x, y, functional, norm == "frozen")
        attributions["autograd"] = first
    _hold(scan.errors, found.first)
    if found.second is not None and found.curvature is not None:
        assert torch.equal(found.curvature, half_curvatures(clean))
        _hold(scan.errors - found.curvature, found.second)
        _hold(scan.errors, found.first_tight)
    for effect in effects.values():
        for attribution in attributions.values():
            _hold(effect - attribution, found.first)
            if found.second is not None and found.curvature is not None:
                _hold(effect - (attribution - found.curvature), found.second)
                _hold(effect - attribution, found.first_tight)
        if brute and found.second is not None:
            _hold(effect - (first - second / 2), found.second)


def _hold(error: Tensor, bound: Tensor) -> None:
    assert bool((bound >= 0).all())
    known = torch.isfinite(error)
    excess = (error.abs() - bound)[known]
    assert not bool((excess > 0).any()), f"exceeded by {float(excess.max()):.3g}"


def test_no_certificate_is_violated() -> None:
    for seed in range(240):
        _check_draw(seed)


def test_no_certificate_is_violated_against_brute_force() -> None:
    for seed in range(1000, 1036):
        _check_draw(seed, brute=True)


@pytest.mark.slow
@pytest.mark.parametrize("thousand", range(2, 12))
def test_no_certificate_is_violated_in_ten_thousand_draws(thousand: int) -> None:
    for seed in range(1000 * thousand, 1000 * (thousand + 1)):
        _check_draw(seed, brute=seed % 10 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [False, True])
def test_scores_and_certificates_of_a_network_are_about_the_same_numbers(
    dtype: torch.dtype, norm: bool
) -> None:
    """Of an untrained network of any precision, whichever way scores and effects are computed."""
    data = load_digits()
    generator = torch.Generator().manual_seed(0)
    model = BilinearNetwork(64, 10, hidden=16, norm=norm, generator=generator).to(dtype)
    bound = channels(model, data.test_x[:20].to(dtype), data.test_y[:20])
    assert next(model.parameters()).dtype == dtype
    found = certify_channels(bound.clean, tight=not norm)
    first, exact = attribute(bound), attribute(bound, Exact())
    for block, (name, group) in enumerate(bound.groups.items()):
        index = every(bound, name)
        general = ablate(bound, name, index, general=True).T.reshape(group.shape)
        for effects in (exact.values[name], general):
            _hold(effects - first.values[name], found.first[:, block])
    if not norm:
        assert found.second is not None
        second = attribute(bound, SecondOrder())
        for block, name in enumerate(bound.groups):
            _hold(exact.values[name] - second.values[name], found.second[:, block])
            _hold(exact.values[name] - first.values[name], found.first_tight[:, block])
    # What rounding adds is far below what is certified.
    size = found.attribution.flatten(1).abs().topk(5).values.min()
    assert float(found.rounding.max()) < 1e-6 * float(size)


@pytest.mark.parametrize("epsilon", [1e-6, 0.1, 3.0, 100.0])
def test_the_epsilon_of_a_norm_counts_once(epsilon: float) -> None:
    """Of norms whose epsilon is small or large against their input: the length in a certificate is
    that which the norm divides by, and no effect exceeds its bound.
    """
    for seed in range(8):
        model = network(seed, blocks=3, width=4, hidden=3, scale=10 ** (seed / 4 - 1), norm=True)
        for block in model.blocks:
            block.norm.eps = epsilon
        x, y = batch(seed, examples=3)
        with torch.no_grad():
            clean = run_clean(read_weights(model), x, y)
            for block in range(3):
                length, _ = norm_length(clean, block)
                gain = model.blocks[block].norm.weight
                divided = gain * clean.sums[block] / model.blocks[block].norm(clean.sums[block])
                torch.testing.assert_close(length.expand(-1, 4), 2 * divided, rtol=1e-9, atol=0)
            found = certify_channels(clean, tight=False)
        _hold(ablated(model, x, y, "logit", False) - found.attribution, found.first)


def test_certificates_are_of_the_right_order() -> None:
    """As a channel's step shrinks by 10, the scalar bound shrinks by 100 and the tight one by
    1000 or more, like the errors they bound.
    """
    model = network(5, blocks=4, width=6, hidden=5, scale=2.0)
    x, y = batch(5)
    bounds = []
    for factor in (1e-1, 1e-2, 1e-3):
        with torch.no_grad():
            shrunk = network(5, blocks=4, width=6, hidden=5, scale=2.0)
            shrunk.load_state_dict(model.state_dict())
            for block in shrunk.blocks:
                block.down.weight[:, 0] *= factor
        found = certify_channels(run_clean(read_weights(shrunk), x, y))
        assert found.second is not None
        bounds.append([(bound - found.rounding)[:, 0, 0] for bound in (found.first, found.second)])
    assert torch.allclose(
        bounds[1][0] / bounds[2][0], torch.full((4,), 100.0, dtype=torch.float64), rtol=0.2
    )
    assert bool((bounds[0][1] / bounds[1][1] > 900).all())


def test_the_last_block_is_certified_exact_and_the_one_before_in_second_order() -> None:
    found = certify_channels(run_clean(read_weights(network(1, blocks=3)), *batch(1)))
    assert found.second is not None
    assert torch.equal(found.first[:, 2], found.rounding[:, 2])
    assert torch.equal(found.second[:, 1:], found.rounding[:, 1:])
    assert bool((found.second[:, 0] > found.rounding[:, 0]).all())
    assert found.exact[:, 2].all()
    assert not found.exact[:, :2].any()
    assert float(found.rounding.max()) < 1e-10


def test_frobenius_norms_bound_the_spectral_ones_and_chunks_do_not_matter() -> None:
    clean = run_clean(read_weights(network(2, blocks=4)), *batch(2, examples=6))
    spectral, frobenius = certify_channels(clean), certify_channels(clean, norms="frobenius")
    assert bool((frobenius.first >= spectral.first).all())
    small = certify_channels(clean, budget=8000)
    assert torch.allclose(small.first, spectral.first, rtol=1e-12)
    assert torch.allclose(small.first_tight, spectral.first_tight, rtol=1e-10)


def test_the_relative_certificate_implies_the_relative_error() -> None:
    clean = run_clean(read_weights(network(3, blocks=4, scale=0.6)), *batch(3, examples=20))
    found, attribution, effects = (
        certify_channels(clean),
        attribute_channels(clean),
        ablate_channels(clean).effects,
    )
    for tolerance in (0.01, 0.1, 1.0):
        for bound in (found.first, found.first_tight):
            proved = certify_relative(bound, attribution, tolerance)
            assert bool(
                ((attribution - effects).abs() <= tolerance * effects.abs() * (1 + 1e-9))[
                    proved
                ].all()
            )
        assert bool(certify_relative(found.first_tight, attribution, tolerance)[:, :-1].any())


def test_the_relative_certificate_goes_to_its_limit() -> None:
    """An estimate of 1 that is at most 1/11 off is of an effect of at least 10/11: a tenth."""
    bound = torch.tensor([1 / 11 - 1e-9, 1 / 11 + 1e-9], dtype=torch.float64)
    assert certify_relative(bound, torch.ones(2).double(), 0.1).tolist() == [True, False]


def test_an_overflowing_network_has_infinite_bounds() -> None:
    model = network(4, blocks=5, scale=1e30)
    with pytest.raises(InputError):
        run_clean(read_weights(model), batch(4)[0] * float("inf"), batch(4)[1])
    found = certify_channels(run_clean(read_weights(model), *batch(4)))
    assert not bool(torch.isnan(found.first).any())
    assert bool(torch.isinf(found.first[:, 0]).all())


def test_what_is_not_covered_is_refused() -> None:
    x, y = batch(0)
    with pytest.raises(InputError, match="gate 'silu'"):
        certify_channels(run_clean(read_weights(network(0, gate="silu")), x, y))
    live = run_clean(read_weights(network(0, norm=True)), x, y)
    with pytest.raises(InputError, match="frozen"):
        certify_channels(live)
    with pytest.raises(InputError, match="tight"):
        _ = certify_channels(live, tight=False).first_tight
    with pytest.raises(InputError, match="float64"):
        certify_channels(run_clean(read_weights(network(0), torch.float32), x, y))
    with pytest.raises(InputError, match="did you mean spectral"):
        certify_channels(run_clean(read_weights(network(0)), x, y), norms="spektral")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tolerance"):
        certify_relative(torch.ones(1), torch.ones(1), 0.0)
