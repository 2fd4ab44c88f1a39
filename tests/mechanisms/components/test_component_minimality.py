"""Importance minimality in both forms against plain loops, weighted rows, annealing and running
means."""

from __future__ import annotations

import math

import pytest
import torch

from assay.errors import InputError
from assay.mechanisms.components import LpMinimality, SmoothL0, WeightSite
from assay.mechanisms.components.minimality import RunningMeans
from assay.mechanisms.components.sites import Use

SITES = tuple(WeightSite(name, (Use(name),), 3, 3, 4) for name in ("a", "b"))


def upper_values(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (2 * torch.rand(6, 5, 4, generator=generator, dtype=torch.float64) - 0.5).clamp(min=0)
        for name in ("a", "b")
    }


def test_lp_is_the_plain_loop():
    form = LpMinimality(coefficient=0.3, beta=0.7, p=0.4, eps=1e-6)
    upper = upper_values()
    expected = 0.0
    for entry in upper.values():
        for c in range(4):
            total = sum((float(a) + 1e-6) ** 0.4 for a in entry[..., c].flatten())
            expected += 0.3 * total / 30 * (1 + 0.7 * math.log2(1 + total))
    assert float(form(upper, count=30)) == pytest.approx(expected, rel=1e-12)


def test_smooth_l0_is_the_plain_loop():
    form = SmoothL0(coefficient=0.3, frequency=0.05, references=900.0, gamma=0.2)
    upper = upper_values()
    expected = 0.0
    for entry in upper.values():
        for c in range(4):
            values = [float(a) for a in entry[..., c].flatten()]
            mean = sum(a**2 / (a**2 + 0.04) for a in values) / 30
            expected += 0.3 * mean + 0.05 * mean * math.log2(1 + 900 * mean)
    assert float(form(upper, count=30)) == pytest.approx(expected, rel=1e-12)


def test_the_successor_recovers_the_other_form_at_a_reference_count_of_n():
    beta, coefficient, total = 0.2, 0.3, torch.tensor([0.0, 1.5, 20.0], dtype=torch.float64)
    new = SmoothL0(coefficient=coefficient, frequency=beta * coefficient, references=30.0)
    old = LpMinimality(coefficient=coefficient, beta=beta)
    torch.testing.assert_close(new.price(total, 30), old.price(total, 30), rtol=1e-14, atol=0)


@pytest.mark.parametrize("form", [LpMinimality(beta=0.3, p=0.5), SmoothL0(frequency=1e-3)])
def test_weighted_rows_stand_for_repeated_ones(form):
    upper = {name: entry[:, 0] for name, entry in upper_values().items()}
    times = torch.tensor([1, 4, 2, 1, 7, 3])
    repeated = {name: entry.repeat_interleave(times, 0) for name, entry in upper.items()}
    found = form(upper, count=18, weights=times.double())
    torch.testing.assert_close(found, form(repeated, count=18), rtol=1e-12, atol=0)


def test_p_and_gamma_fall_linearly_between_the_shares():
    form = LpMinimality(p=0.4, p_start=2.0, begin=0.25, end=0.75)
    found = [form.exponent(done) for done in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx([2, 2, 1.2, 0.4, 0.4])
    smooth = SmoothL0(gamma=0.01, gamma_start=1.0, end=0.9)
    assert [smooth.width(done) for done in (0.0, 0.9, 1.0)] == pytest.approx([1, 0.01, 0.01])
    assert smooth.width(0.45) == pytest.approx(0.505)
    assert LpMinimality(p=0.7).exponent(0.3) == 0.7


def test_running_means_are_debiased_and_keep_the_gradient_of_the_current_mean():
    state = RunningMeans(SITES, half_life=3.0)
    decay = 2 ** (-1 / 3)
    history = [torch.rand(4, generator=torch.Generator().manual_seed(k)) for k in range(5)]
    for k, mean in enumerate(history):
        found = state.update({"a": mean, "b": 2 * mean})
        weights = torch.tensor([decay ** (k - j) for j in range(k + 1)])
        expected = sum(w * m for w, m in zip(weights, history, strict=False)) / weights.sum()
        torch.testing.assert_close(found["a"], expected)
        torch.testing.assert_close(found["b"], 2 * expected)
    form = SmoothL0(coefficient=1e-9, frequency=1.0, references=100.0, half_life=3.0)
    now = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    smooth = torch.tensor([0.1], dtype=torch.float64)
    price = form.price(now, 1.0, smooth)
    price.sum().backward()
    slope = math.log2(1 + 10) + 0.1 * 100 / (11 * math.log(2))
    assert float(price.detach()) == pytest.approx(0.1 * math.log2(11), rel=1e-6)
    assert float(now.grad) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LpMinimality(coefficient=0.0),
        lambda: LpMinimality(beta=-0.1),
        lambda: LpMinimality(p=0.0),
        lambda: LpMinimality(p_start=-2.0),
        lambda: LpMinimality(eps=0.0),
        lambda: LpMinimality(begin=0.8, end=0.2),
        lambda: SmoothL0(gamma=0.0),
        lambda: SmoothL0(references=-1.0),
        lambda: SmoothL0(frequency=float("nan")),
        lambda: SmoothL0(half_life=0.0),
    ],
)
def test_bad_coefficients_are_refused(make):
    with pytest.raises(InputError):
        make()
