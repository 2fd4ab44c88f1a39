"""The loss recovered, its interval, and where it is absent."""

from __future__ import annotations

import math

import pytest
import torch

from assay.dictionaries.recovered import Losses, recovered


def losses(per_token: torch.Tensor, counts: torch.Tensor) -> Losses:
    return Losses(per_token.double() * counts, counts)


def draw(windows: int, rise: float, added: float, noise: float, seed: int):
    """Windows of unequal lengths whose losses rise by about `rise` with zeros, and by about
    `added` with what is rebuilt.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(3, 9, (windows,), generator=generator).double()
    own, first, second = torch.randn(3, windows, generator=generator).double()
    clean = 2 + own
    zero, spliced = clean + rise + noise * first, clean + added + noise * second
    return [losses(entry, counts) for entry in (zero, spliced, clean)]


def test_the_ends_solve_fiellers_equation():
    zero, spliced, clean = draw(40, 0.5, 0.1, 0.3, seed=0)
    found = recovered(zero, spliced, clean)
    assert found.share == pytest.approx((zero.mean - spliced.mean) / (zero.mean - clean.mean))
    assert found.rise == pytest.approx(zero.mean - clean.mean)
    assert found.low < found.share < found.high
    counts = clean.counts
    for share in (found.low, found.high):
        kept = (zero.sums - spliced.sums) - share * (zero.sums - clean.sums)
        mean = float(kept.sum() / counts.sum())
        rest = kept - mean * counts
        variance = float(rest.square().sum()) * 40 / 39 / float(counts.sum()) ** 2
        assert mean**2 == pytest.approx(2.0226909**2 * variance)  # Student, 39 degrees of freedom
    of = (zero.sums - clean.sums) - found.rise * counts
    error = math.sqrt(float(of.square().sum()) * 40 / 39) / float(counts.sum())
    assert found.rise_error == pytest.approx(error)
    assert found.reason == ""


@pytest.mark.parametrize("rise", [0.0, 0.01, -0.5])
def test_a_share_without_a_denominator_is_absent_with_the_reason(rise):
    found = recovered(*draw(40, rise, 0.1, 0.3, seed=1))
    assert (found.share, found.low, found.high) == (None, None, None)
    assert "there is no loss to recover" in found.reason
    assert f"{found.rise:.5f} nats, standard error {found.rise_error:.5f}" in found.reason


def test_windows_without_tokens_have_no_share():
    found = recovered(*[Losses(0 * one.sums, 0 * one.counts) for one in draw(3, 1, 0, 1, seed=0)])
    assert found.share is None
    assert "no window" in found.reason


def test_one_window_has_no_interval():
    found = recovered(*draw(1, 1.0, 0.1, 0.3, seed=1))
    assert found.share is None
    assert "one window" in found.reason


@pytest.mark.parametrize(("windows", "noise"), [(60, 0.4), (5, 0.12)])
def test_intervals_hold_the_true_share_as_often_as_they_say(windows, noise):
    """Of 600 intervals around a share of .8 with a denominator of about four standard errors."""
    held = [
        found.low <= 0.8 <= found.high
        for seed in range(600)
        for found in [recovered(*draw(windows, 0.2, 0.04, noise, seed))]
        if found.share is not None
    ]
    assert len(held) > 400
    assert 0.92 <= sum(held) / len(held) <= 0.98
