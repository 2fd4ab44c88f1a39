"""Selective risk: the guarantee by simulation, `none` when it must be, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import betainc

from assay.audit.risk import calibrate_risk
from assay.errors import InputError


def _rows(
    seed: int, inputs: int, slope: float = 0.25, per_input: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores uniform in (0, 1]; a row fails with probability slope * score, so the risk below
    tau is slope * tau / 2.
    """
    generator = np.random.default_rng(seed)
    score = 1 - generator.random(inputs * per_input)
    failed = generator.random(len(score)) < slope * score
    return score, np.where(failed, 1.0, 0.01), np.repeat(np.arange(inputs), per_input)


def test_the_guarantee_holds_in_simulation() -> None:
    slope, alpha, eta, runs = 0.3, 0.1, 0.1, 300
    found = [
        calibrate_risk(*_rows(seed, 1500, slope), alpha=alpha, eta=eta, seed=seed).threshold
        for seed in range(runs)
    ]
    violated = sum(threshold is not None and slope * threshold / 2 > alpha for threshold in found)
    assert violated <= runs * (eta + 3 * math.sqrt(eta * (1 - eta) / runs))
    given_out = [threshold for threshold in found if threshold is not None]
    assert len(given_out) > 0.8 * runs
    # The best threshold is 2 alpha / slope; the one found must not be far below it.
    assert 0.6 < np.median(given_out) / (2 * alpha / slope) <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.02, 0.05, 0.2]), st.sampled_from([0.05, 0.2]))
def test_the_returned_test_is_a_rejection_with_enough_rows(
    seed: int, alpha: float, eta: float
) -> None:
    found = calibrate_risk(*_rows(seed, 500, 0.2), alpha=alpha, eta=eta, seed=seed)
    assert found.needed == math.ceil(math.log(eta) / math.log(1 - alpha))
    if found.threshold is not None:
        assert found.rows >= found.needed
        # The binomial tail as an incomplete beta function.
        tail = betainc(found.rows - found.failures, found.failures + 1, 1 - alpha)
        assert found.p_value == pytest.approx(tail)
        assert tail <= eta
        assert found.reason == ""
    else:
        assert found.reason


def test_fifty_nine_rows_are_needed_at_five_per_cent() -> None:
    score, error, group = np.full(200, 0.5), np.zeros(200), np.arange(200)
    for calibration, expected in ((58, None), (59, 0.5)):
        found = calibrate_risk(
            score[: 2 * calibration], error[: 2 * calibration], group[: 2 * calibration], tuning=0.5
        )
        assert found.needed == 59
        assert found.calibration == calibration
        assert found.threshold == expected


def test_none_when_it_must() -> None:
    score, _, group = _rows(0, 1000)
    wrong = calibrate_risk(score, np.ones(1000), group)
    assert wrong.threshold is None
    assert "fail" in wrong.reason
    assert calibrate_risk(score[:0], score[:0], group[:0]).threshold is None
    everything_exact = calibrate_risk(np.zeros(50), np.zeros(50), np.arange(50))
    assert everything_exact.threshold is None
    assert everything_exact.exact == 50
    assert calibrate_risk(np.full(500, np.inf), np.zeros(500), np.arange(500)).threshold is None


def test_testing_stops_at_the_first_threshold_that_is_not_rejected() -> None:
    # Right below .3, always wrong between .3 and .6, right above: later thresholds would pass
    # again, and must not be reached.
    score = np.random.default_rng(1).random(20_000) * 5
    error = np.where((score > 0.3) & (score < 0.6), 1.0, 0.0)
    found = calibrate_risk(score, error, np.arange(len(score)), alpha=0.1, steps=100)
    assert found.threshold is not None
    assert found.threshold < 0.6


def test_one_row_an_input_and_no_input_in_two_folds() -> None:
    score, error, group = _rows(2, 300, per_input=5)
    found = calibrate_risk(score, error, group)
    assert found.tuning + found.calibration == 300
    assert found.rows <= found.calibration
    assert found == calibrate_risk(score, error, group)
    others = {
        calibrate_risk(score, np.zeros(1500), group, seed=seed).threshold for seed in range(3)
    }
    assert len(others) > 1


def test_exact_rows_are_left_out() -> None:
    score, error, group = _rows(3, 400)
    more = (
        np.concatenate([score, np.zeros(400)]),
        np.concatenate([error, np.zeros(400)]),
        np.concatenate([group, group]),
    )
    found = calibrate_risk(*more)
    assert found.exact == 400
    assert found.tuning + found.calibration == 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": np.array([0.1, -1.0, np.nan])}, "2 of 3 rows"),
        ({"relative_error": np.array([0.1, np.nan, 1.0])}, "relative_error"),
        ({"group": np.arange(2)}, "one length"),
        ({"alpha": 1.0}, "alpha"),
        ({"eta": 0.0}, "eta"),
        ({"tuning": 1.5}, "tuning"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments = {"score": np.ones(3), "relative_error": np.ones(3), "group": np.arange(3)} | change
    with pytest.raises(InputError, match=message):
        calibrate_risk(**arguments)  # type: ignore[arg-type]
