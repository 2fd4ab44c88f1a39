"""Agreement measures against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from assay.audit import agreement
from assay.errors import InputError


def test_a_scaled_estimate_has_perfect_correlation_and_a_telling_slope():
    truth = np.random.default_rng(0).normal(size=200)
    found = agreement(truth / 4.5, truth)
    assert found.pearson == pytest.approx(1)
    assert found.spearman == pytest.approx(1)
    assert found.slope == pytest.approx(1 / 4.5)
    assert found.sign == 1
    assert found.recall == 1
    assert found.mae == pytest.approx(np.abs(truth).mean() * (1 - 1 / 4.5))


def test_recall_counts_shared_large_parts():
    found = agreement(np.array([5.0, 0, 0, 4]), np.array([5.0, 4, 0, 0]), k=2)
    assert found.recall == 0.5


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=1, max_size=30))
def test_ranges(pairs):
    estimate, truth = np.array(pairs).T
    found = agreement(estimate, truth)
    assert 0 <= found.recall <= 1 or (math.isnan(found.recall) and np.ptp(np.abs(truth)) == 0)
    assert found.mae >= 0
    assert math.isnan(found.pearson) or -1.000001 <= found.pearson <= 1.000001


def test_effects_of_one_size_have_no_largest():
    found = agreement(np.arange(4.0), np.zeros(4))
    assert math.isnan(found.recall)
    assert found.reason == "all exact effects are equal"
    assert agreement(np.ones(4), np.arange(4.0)).reason == "all estimates are equal"
    assert agreement(np.ones(1), np.ones(1)).reason == "there is one exact effect"
    assert agreement(np.arange(4.0), np.arange(4.0)).reason == ""


@given(st.integers(0, 1000))
@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
def test_weights_count_as_copies_do(seed):
    generator = np.random.default_rng(seed)
    truth = generator.integers(-3, 4, size=9).astype(float)
    estimate = truth + generator.integers(-2, 3, size=9)
    weight = generator.integers(1, 4, size=9)
    found = agreement(estimate, truth, weight=weight)
    copies = agreement(np.repeat(estimate, weight), np.repeat(truth, weight))
    for name in ("pearson", "spearman", "slope", "sign", "mae"):
        assert getattr(found, name) == pytest.approx(getattr(copies, name), nan_ok=True), name
    assert agreement(estimate, truth).spearman == pytest.approx(
        stats.spearmanr(estimate, truth).statistic, nan_ok=True
    )
    equal, plain = agreement(estimate, truth, weight=np.full(9, 7.0)), agreement(estimate, truth)
    assert equal.to_dict() == pytest.approx(plain.to_dict(), nan_ok=True)


def test_a_sample_with_known_inclusion_estimates_the_population():
    generator = np.random.default_rng(0)
    truth = generator.standard_t(5, size=4000)
    estimate = truth * generator.choice([1.0, 0.2], size=4000)
    whole = agreement(estimate, truth)
    inclusion = np.where(np.abs(estimate) > 1, 1.0, 0.2)
    drawn = generator.random(4000) < inclusion
    found = agreement(estimate[drawn], truth[drawn], weight=1 / inclusion[drawn])
    plain = agreement(estimate[drawn], truth[drawn])
    for name in ("pearson", "slope", "recall"):
        wanted = getattr(whole, name)
        assert abs(getattr(found, name) - wanted) < 0.08, name
        assert abs(getattr(found, name) - wanted) < abs(getattr(plain, name) - wanted), name


def test_undefined_is_nan_and_empty_is_refused():
    found = agreement(np.zeros(4), np.arange(4.0))
    assert math.isnan(found.pearson)
    with pytest.raises(InputError, match="at least one"):
        agreement(np.array([]), np.array([]))
    with pytest.raises(InputError, match="one positive weight"):
        agreement(np.ones(2), np.ones(2), weight=np.zeros(2))
    with pytest.raises(InputError, match="differ"):
        agreement(np.zeros(2), np.zeros(3))
