"""Agreement measures against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    assert 0 <= found.recall <= 1
    assert found.mae >= 0
    assert math.isnan(found.pearson) or -1.000001 <= found.pearson <= 1.000001


def test_undefined_is_nan_and_empty_is_refused():
    found = agreement(np.zeros(4), np.arange(4.0))
    assert math.isnan(found.pearson)
    with pytest.raises(InputError, match="at least one"):
        agreement(np.array([]), np.array([]))
    with pytest.raises(InputError, match="differ"):
        agreement(np.zeros(2), np.zeros(3))
