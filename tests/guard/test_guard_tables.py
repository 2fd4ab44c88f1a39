"""Bounds of probabilities, bins and tables against brute force; the bounds' monotonicity."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from laboratories import chain

from assay.errors import InputError
from assay.guard.quantise import quantise, without_knowledge
from assay.guard.tables import interval, lower_bound, needed, tabulate, upper_bound

few = settings(max_examples=60, deadline=None)
counts = st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
shares = st.floats(1e-9, 0.5)


def tail(count: int, total: int, p: float) -> float:
    """Return P(at least `count` of `total`), summed in full."""
    return math.fsum(math.comb(total, k) * p**k * (1 - p) ** (total - k)
                     for k in range(count, total + 1))  # fmt: skip


@few
@given(counts, shares)
def test_the_lower_bound_is_where_the_tail_is_delta(case, delta):
    count, total = case
    found = lower_bound(count, total, delta)
    if count:
        assert tail(count, total, found) == pytest.approx(delta, rel=1e-5)
    else:
        assert found == 0
    assert upper_bound(total - count, total, delta) == pytest.approx(1 - found, abs=1e-9)


@few
@given(counts, shares)
def test_the_bound_falls_with_the_count_at_fixed_total(case, delta):
    count, total = case
    if count:
        assert lower_bound(count - 1, total, delta) < lower_bound(count, total, delta)


@few
@given(st.integers(1, 20), st.integers(1, 20), st.integers(2, 5), st.floats(1e-9, 0.05))
def test_the_bound_falls_with_the_total_at_fixed_frequency(count, rest, times, delta):
    small = lower_bound(count, count + rest, delta)
    assert small < lower_bound(times * count, times * (count + rest), delta)


@few
@given(counts, shares, st.floats(1.01, 100))
def test_the_bound_falls_with_delta(case, delta, times):
    count, total = case
    if count:
        less = lower_bound(count, total, delta / times)
        assert less < lower_bound(count, total, delta)


@few
@given(st.integers(1, 200), st.floats(1e-6, 0.3), st.floats(1e-8, 0.3))
def test_the_needed_count_is_the_first_that_reaches_theta(total, theta, delta):
    found = needed(total, theta, delta)
    brute = [c for c in range(1, total + 1) if lower_bound(c, total, delta) >= theta]
    assert found == (brute[0] if brute else total + 1)


def test_about_three_joint_occurrences_in_900_support_an_event_at_one_in_100_000():
    assert needed(900, 1e-5, 0.05 / 4e5) == 3


def test_the_interval_covers_as_often_as_it_says():
    p, total = 0.3, 25
    covered = math.fsum(
        math.comb(total, k) * p**k * (1 - p) ** (total - k)
        for k in range(total + 1)
        if interval(k, total)[0] <= p <= interval(k, total)[1]
    )
    assert covered >= 0.95
    assert interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("count", "total", "delta"), [(-1, 5, 0.1), (6, 5, 0.1), (1, 0, 0.1),
                                                       (1, 5, 0.0), (1, 5, 1.0)])  # fmt: skip
def test_bounds_of_nothing_are_refused(count, total, delta):
    with pytest.raises(InputError, match="a bound needs"):
        lower_bound(count, total, delta)


@few
@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(1, 40))
def test_bins_are_the_counts_of_cuts_below_and_hold_enough(seed, bins, least):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(120, 3, generator=generator)
    values[:, 1] = values[:, 1].clamp_min(0)
    values[:, 2] = 0.0
    found = quantise(values, bins, least=least)
    placed = found(values)
    brute = (values[:, :, None] > found.cuts[None]).sum(2)
    assert torch.equal(placed, brute)
    assert found.bins <= max(bins, 2)
    assert torch.equal(placed >= found.fires, values > 0)
    for feature in range(3):
        held = placed[:, feature].bincount(minlength=found.bins)
        for side in (held[: found.fires[feature]], held[found.fires[feature] :]):
            used = side[side > 0]
            assert len(used) < 2 or int(used.min()) >= least
    assert found.sizes.tolist()[2] == 2  # that a dead feature fires is an event of its own


@pytest.mark.parametrize(
    ("values", "bins", "message"),
    [
        (torch.zeros(0, 2), 4, "no inputs"),
        (torch.full((3, 2), torch.nan), 4, "NaN or infinite"),
        (torch.zeros(3, 2), 1, "at least 2"),
    ],
)
def test_bins_of_nothing_are_refused(values, bins, message):
    with pytest.raises(InputError, match=message):
        quantise(values, bins)


def test_tables_count_what_a_loop_counts():
    data = chain(150, 3)
    quantiser = quantise(data.values, 4, least=5)
    bins = quantiser(data.values)
    roots = (data.values[:, 0] > 0).long()
    found = tabulate(bins, quantiser, roots, 2)
    for i in range(3):
        for a in range(quantiser.bins):
            assert found.single[i, a] == (bins[:, i] == a).sum()
            for y in range(2):
                assert found.rooted[y, i, a] == ((bins[:, i] == a) & (roots == y)).sum()
            for j in range(3):
                for b in range(quantiser.bins):
                    both = ((bins[:, i] == a) & (bins[:, j] == b)).sum()
                    assert found.pairs[i, a, j, b] == both
    sizes = quantiser.sizes.tolist()
    cells = sum(sizes) + sum(sizes[i] * sizes[j] for i in range(3) for j in range(i))
    assert found.candidates == cells + 2 * (sum(sizes) + 1)
    information = 0.0
    joint = found.pairs[0, :, 1].double() / 150
    for a in range(quantiser.bins):
        for b in range(quantiser.bins):
            if joint[a, b]:
                apart = joint[a].sum() * joint[:, b].sum()
                information += float(joint[a, b] * (joint[a, b] / apart).log())
    assert float(found.information()[0, 1]) == pytest.approx(information)
    with pytest.raises(InputError, match="NaN"):
        tabulate(bins - 1, quantiser)


def test_without_knowledge_bins_have_the_shares_of_their_widths():
    values = torch.tensor([[-1.0, 0.0], [0.5, 0.0], [1.0, 0.0], [3.0, 2.0]] * 5)
    quantiser = quantise(values, 3, least=5)
    shares = without_knowledge(quantiser, values)
    assert torch.allclose(shares.sum(1), torch.ones(2, dtype=torch.float64))
    cuts = [-1.0, *quantiser.cuts[0][torch.isfinite(quantiser.cuts[0])].tolist(), 3.0]
    wide = [high - low for low, high in itertools.pairwise(cuts)]
    lone = [len(set(values[quantiser(values)[:, 0] == one, 0].tolist())) < 2 for one in range(3)]
    rest = 1 - sum(lone) / 3
    total = sum(w for w, alone in zip(wide, lone, strict=True) if not alone)
    for one in range(3):
        wanted = 1 / 3 if lone[one] else rest * wide[one] / total if total else 0
        assert float(shares[0, one]) == pytest.approx(wanted)
    assert shares[1, :2].tolist() == [0.5, 0.5]  # both bins hold one value each
