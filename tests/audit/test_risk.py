"""Selective risk: the guarantee by simulation, `none` when it must be, and bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import betainc

from assay.audit.risk import SelectiveRisk, calibrate_list_bars, calibrate_risk
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


def _inputs(
    seed: int, inputs: int, per_input: int = 5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Several rows an input, whose failures come together: an input is hard or easy, and a row of a
    hard one fails with probability .8 times its score.
    """
    generator = np.random.default_rng(seed)
    hard = generator.random(inputs) < 0.3
    score = 1 - generator.random((inputs, per_input))
    failed = generator.random(score.shape) < 0.8 * score * hard[:, None]
    group = np.repeat(np.arange(inputs), per_input)
    return score.flatten(), np.where(failed, 1.0, 0.01).flatten(), group


def _risk(found: SelectiveRisk, promise: str) -> float:
    """Measure a threshold's risk on many new inputs."""
    score, error, group = _inputs(10**6, 40_000)
    assert found.threshold is not None
    trusted = score <= found.threshold
    wrong = trusted & (error > 0.1)
    if promise == "channel":
        return float(wrong.sum() / trusted.sum())
    return len(np.unique(group[wrong])) / len(np.unique(group[trusted]))


@pytest.mark.parametrize("promise", ["input", "channel"])
def test_the_promise_is_kept_for_inputs_and_for_channels(promise: str) -> None:
    alpha, eta, runs = 0.1, 0.1, 100
    found = [
        calibrate_risk(*_inputs(seed, 600), promise=promise, alpha=alpha, eta=eta, seed=seed)  # type: ignore[arg-type]
        for seed in range(runs)
    ]
    chosen = [entry for entry in found if entry.threshold is not None]
    assert len(chosen) > 0.8 * runs
    violated = sum(_risk(entry, promise) > alpha for entry in chosen)
    assert violated <= runs * (eta + 3 * math.sqrt(eta * (1 - eta) / runs))
    # What is promised of one random channel does not hold for all of an input.
    if promise == "channel":
        assert sum(_risk(entry, "input") > alpha for entry in chosen) > 0.5 * runs


def test_copies_break_the_promise_unless_they_share_their_group() -> None:
    """Ten copies of each of 60 inputs: taken for 600 they promise what they cannot keep."""
    alpha, eta, runs, slope = 0.1, 0.05, 200, 0.3
    violated = {"apart": 0, "together": 0}
    for seed in range(runs):
        score, error, _ = _rows(seed, 60, slope)
        score, error = np.repeat(score, 10), np.repeat(error, 10)
        for name, group in (("apart", np.arange(600)), ("together", np.repeat(np.arange(60), 10))):
            threshold = calibrate_risk(
                score, error, group, alpha=alpha, eta=eta, seed=seed
            ).threshold
            violated[name] += threshold is not None and slope * threshold / 2 > alpha
    allowed = runs * (eta + 3 * math.sqrt(eta * (1 - eta) / runs))
    assert violated["together"] <= allowed
    assert violated["apart"] > allowed


def test_exact_rows_may_hold_anything_and_are_trusted() -> None:
    score, error, group = _rows(3, 400, 0.05)
    exact = np.arange(400) % 4 == 0
    score[exact], error[exact] = np.nan, np.nan
    found = calibrate_risk(score, error, group, exact=exact)
    assert found.exact == 100
    assert found.tuning + found.calibration == 300
    alone = calibrate_risk(score[~exact], error[~exact], group[~exact])
    assert replace(found, exact=0) == alone
    assert found.threshold is not None
    trusted = found.trusts(np.array([np.nan, 0.0, np.inf]), np.array([True, False, False]))
    assert trusted.tolist() == [True, True, False]
    assert SelectiveRisk.from_dict(found.to_dict()) == found
    with pytest.raises(InputError, match="no calibrated threshold"):
        SelectiveRisk.from_dict({"threshold": 1.0})


def test_the_guarantee_says_what_it_is_about() -> None:
    rows = _rows(0, 2000, 0.1)
    assert "Of new inputs" in calibrate_risk(*rows).guarantee
    assert "drawn at random from a new input" in calibrate_risk(*rows, promise="channel").guarantee
    none = calibrate_risk(rows[0][:20], rows[1][:20], rows[2][:20])
    assert none.guarantee.startswith("No threshold is returned: no threshold has 59")
    assert not none.trusts(np.array([0.0, 1.0])).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.1, 0.5]), st.integers(1, 60))
def test_list_bars_hold_for_their_rank_of_the_inputs(seed: int, alpha: float, inputs: int) -> None:
    generator = np.random.default_rng(seed)
    scale = generator.random(inputs * 4)
    error = scale * generator.standard_normal(inputs * 4)
    group = np.repeat(np.arange(inputs), 4)
    found = calibrate_list_bars(error, scale, group, alpha=alpha)
    rank = math.ceil(round((inputs + 1) * (1 - alpha), 9))
    held = (np.abs(error) <= found.half_width(scale) * (1 + 1e-12)).reshape(-1, 4).all(1)
    if rank > inputs:
        assert math.isinf(found.quantile)
        assert "There are no bars" in found.guarantee
    else:
        assert held.sum() == rank
        assert "All bars of a new input" in found.guarantee


def test_list_bars_cover_new_inputs_together() -> None:
    covered = []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        size = generator.exponential(size=(150, 1))
        error = size * generator.standard_normal((150, 5))
        group = np.arange(100).repeat(5)
        found = calibrate_list_bars(error[:100].flatten(), np.ones(500), group, alpha=0.1)
        covered.append((np.abs(error[100:]) <= found.quantile).all(1).mean())
    assert np.mean(covered) >= 0.9 - 3 * np.std(covered) / 200**0.5


def test_rows_without_error_or_scale() -> None:
    group = np.arange(20)
    exact = calibrate_list_bars(np.zeros(20), np.zeros(20), group)
    assert exact.quantile == 0
    assert exact.half_width(np.zeros(2)).tolist() == [0, 0]
    wrong = calibrate_list_bars(np.ones(20), np.zeros(20), group)
    assert math.isinf(wrong.quantile)
    with pytest.raises(InputError, match="scale must be at least 0"):
        calibrate_list_bars(np.ones(2), np.array([1.0, np.nan]), np.arange(2))


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
        ({"promise": "inputs"}, "did you mean input"),
        ({"exact": np.zeros(2, bool)}, "one length"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments = {"score": np.ones(3), "relative_error": np.ones(3), "group": np.arange(3)} | change
    with pytest.raises(InputError, match=message):
        calibrate_risk(**arguments)  # type: ignore[arg-type]
