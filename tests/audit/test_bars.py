"""Conformal bars: the rank, the coverage over resampled splits, and what happens when data are
too few.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.audit.bars import Rows, calibrate, conformal_quantile, split
from assay.errors import InputError


@given(st.integers(1, 60), st.sampled_from([0.05, 0.1, 0.2, 0.5]))
def test_quantile_is_the_stated_order_statistic(n, alpha):
    values = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))
    found = conformal_quantile(values, alpha)
    rank = -((-(n + 1) * round((1 - alpha) * 100)) // 100)
    assert found == (rank if rank <= n else math.inf)
    assert math.isinf(found) == (n < math.ceil(1 / alpha) - 1)


def rows(generator: np.random.Generator, inputs: int = 120, each: int = 4) -> Rows:
    input = np.repeat(np.arange(inputs), each)
    scale = generator.gamma(1.0, size=input.size) + 0.01
    difficulty = np.repeat(
        generator.gamma(2.0, size=inputs), each
    )  # rows of one input share their difficulty
    exact = generator.normal(size=input.size)
    estimate = exact + scale * difficulty * generator.normal(size=input.size)
    stratum = np.where(np.arange(input.size) % 2 == 0, "a", "b")
    return Rows(
        estimate,
        exact,
        input,
        stratum,
        {"known": scale, "noise": generator.gamma(1.0, size=input.size)},
    )


def test_coverage_over_resampled_splits_is_nominal_for_dependent_rows():
    coverage = {"a": [], "b": []}
    for seed in range(200):
        generator = np.random.default_rng(seed)
        data = rows(generator)
        tune, fit, test = split(data.input, (1, 2, 2), generator)
        bars = calibrate(
            data.take(np.isin(data.input, fit)),
            0.1,
            generator,
            tuning=data.take(np.isin(data.input, tune)),
        )
        held = data.take(np.isin(data.input, test))
        scale = held.scales.get(bars.scale, np.ones(len(held)))
        covered = np.abs(held.exact - held.estimate) <= bars.half_width(held.stratum, scale)
        for name, found in coverage.items():
            found.append(covered[held.stratum == name].mean())
    for found in coverage.values():
        n = 48
        nominal = math.ceil((n + 1) * 0.9) / (n + 1)
        error = np.std(found, ddof=1) / math.sqrt(len(found))
        assert abs(np.mean(found) - nominal) <= 3 * error


def test_the_informative_scale_is_chosen_and_narrower():
    generator = np.random.default_rng(0)
    data = rows(generator, inputs=400)
    tune, fit = split(data.input, (1, 1), generator)
    tuning, calibration = data.take(np.isin(data.input, tune)), data.take(np.isin(data.input, fit))
    chosen = calibrate(calibration, 0.1, generator, tuning=tuning)
    constant = calibrate(calibration, 0.1, generator)
    assert chosen.scale == "known"
    width = chosen.half_width(calibration.stratum, calibration.scales["known"]).mean()
    assert width < constant.half_width(calibration.stratum, np.ones(len(calibration))).mean()


def test_too_few_inputs_give_infinite_bars_and_say_so():
    data = rows(np.random.default_rng(0), inputs=8)
    bars = calibrate(data, 0.1, np.random.default_rng(0))
    assert all(math.isinf(value) for value in bars.quantile.values())
    assert "needs at least 9" in bars.guarantee
    assert math.isinf(bars.half_width(np.array(["unseen"]), np.ones(1))[0])


def test_a_scale_that_vanishes_on_a_wrong_row_cannot_hide_it():
    data = Rows(np.ones(30), np.zeros(30), np.arange(30), np.full(30, "a"), {"zero": np.zeros(30)})
    bars = calibrate(data, 0.1, np.random.default_rng(0), scale="zero", tuning=data)
    assert math.isinf(bars.quantile["a"])


def test_bad_levels_and_scales_are_refused():
    with pytest.raises(InputError, match="alpha"):
        conformal_quantile(np.ones(3), 1.5)
    with pytest.raises(InputError, match="no scale"):
        calibrate(rows(np.random.default_rng(0)), 0.1, np.random.default_rng(0), scale="other")
