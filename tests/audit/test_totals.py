"""Prediction-powered intervals: coverage over resampled populations, width against sampling
alone, and refusals.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from audit_populations import of_arrays
from audit_populations import sampled as sampled_of
from cases import dictionary, displacements

from assay.attribution import Exact, IntegratedGradients, attribute
from assay.audit import audit
from assay.audit.intervals import mean_interval, ratio_interval
from assay.audit.selections import Selections
from assay.audit.totals import ConfidenceInterval, top_recall, totals
from assay.errors import InputError

PARTS = 30


def population(generator: np.random.Generator, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact effects and biased estimates of one group, (inputs, parts): heavy tails, and errors
    that grow with the effect.
    """
    level = generator.gamma(2.0, size=(inputs, 1))
    exact = level * generator.standard_t(4, size=(inputs, PARTS)) + 0.2
    estimate = 0.8 * exact + 0.1 + 0.3 * np.abs(exact) * generator.normal(size=exact.shape)
    return exact, estimate


def audited(seed: int, inputs: int = 60, sampled: int = 6, count: int = 0):
    """An audit of drawn inputs, with only what the intervals read; the last five parts are
    inactive, and the `count` largest scores of an input are sampled for certain.
    """
    generator = np.random.default_rng(seed)
    exact, estimate = population(generator, inputs)
    step = np.ones_like(exact)
    step[:, -5:] = exact[:, -5:] = estimate[:, -5:] = 0
    return audit_of(of_arrays(estimate, step, {"g": PARTS}), exact, sampled, count, generator)


def audit_of(parts, exact, sampled, count, generator):
    chosen = Selections(count, (), np.inf, {})
    found = sampled_of(parts, exact, chosen, sampled, generator)
    return SimpleNamespace(parts=parts, ablated=found, bars=SimpleNamespace(alpha=0.1))


def covered(found: list[bool], level: float = 0.9) -> None:
    error = math.sqrt(level * (1 - level) / len(found))
    assert np.mean(found) >= level - 3 * error
    assert np.mean(found) <= level + 3.5 * error + 0.01


def test_totals_cover_the_mean_over_inputs_and_are_narrower_than_the_sample_alone():
    truth = 0.2 * (PARTS - 5)
    found = [totals(audited(seed)) for seed in range(250)]
    covered([entry["g"].covers(truth) for entry in found])
    assert all(entry["g"] == entry["all"] for entry in found)
    assert np.mean([entry["g"].width for entry in found]) < 0.7 * np.mean(
        [entry["g"].sampled_only for entry in found]
    )


def test_scores_of_further_inputs_make_the_interval_narrower_and_keep_its_coverage():
    truth, found, plain = 0.2 * (PARTS - 5), [], []
    for seed in range(250):
        one = audited(seed)
        _, estimate = population(np.random.default_rng(10_000 + seed), 400)
        estimate[:, -5:] = 0
        found.append(totals(one, more=SimpleNamespace(values={"g": torch.tensor(estimate)}))["g"])
        plain.append(totals(one)["g"])
    covered([interval.covers(truth) for interval in found])
    assert np.mean([interval.width for interval in found]) < 0.85 * np.mean(
        [interval.width for interval in plain]
    )


def test_totals_stay_unbiased_where_the_largest_scores_are_sampled_for_certain():
    truth = 0.2 * (PARTS - 5)
    found = [totals(audited(seed, sampled=8, count=4))["g"] for seed in range(250)]
    covered([entry.covers(truth) for entry in found])
    middle = np.array([entry.estimate for entry in found])
    assert abs(middle.mean() - truth) <= 4 * middle.std(ddof=1) / math.sqrt(len(found))


def test_a_total_is_the_scores_plus_the_errors_divided_by_the_inclusion_probability():
    """Three inputs of four parts of one group, of which two are sampled: exact by hand."""
    score = np.array([[1.0, 2, 3, 4], [2, 2, 2, 2], [0, 1, 0, 1]])
    exact = score + np.array([[0.5], [-1.0], [2.0]])  # the same error in every part of an input
    one = audit_of(of_arrays(score, sizes={"g": 4}), exact, 2, 0, np.random.default_rng(0))
    assert one.ablated.inclusion.tolist() == [0.5] * 6
    found = totals(one)["g"]
    assert found.estimate == pytest.approx(exact.sum(1).mean())
    deviation = exact.sum(1).std(ddof=1)
    assert found.width == pytest.approx(2 * 2.919986 * deviation / math.sqrt(3), rel=1e-6)
    doubled = np.repeat(np.arange(3), 2)
    twice = of_arrays(score[doubled], sizes={"g": 4}, unit=doubled)
    again = totals(audit_of(twice, exact[doubled], 2, 0, np.random.default_rng(0)))["g"]
    assert (again.estimate, again.width) == pytest.approx((found.estimate, found.width))
    assert again.inputs == 3


def test_recall_covers_the_ratio_of_the_population():
    k = 4
    exact, estimate = (values[:, :-5] for values in population(np.random.default_rng(1), 40_000))
    level = np.sort(np.abs(estimate), axis=1)[:, -k][:, None]
    large = np.abs(exact) >= level
    truth = (large & (np.abs(estimate) >= level)).sum() / large.sum()
    found = [top_recall(audited(seed), k) for seed in range(250)]
    assert 0.5 < truth < 0.95
    covered([interval.covers(truth) for interval in found])
    assert np.mean([interval.width for interval in found]) < 0.4
    sharper = [top_recall(audited(seed, sampled=8, count=k), k) for seed in range(250)]
    covered([interval.covers(truth) for interval in sharper])


def test_the_interval_of_a_mean_is_students_and_predictions_that_know_nothing_cost_nothing():
    values = np.random.default_rng(0).normal(size=12)
    plain = mean_interval(values)
    assert plain.estimate == pytest.approx(values.mean())
    assert plain.width == pytest.approx(2 * 1.7958848 * values.std(ddof=1) / math.sqrt(12))
    noise = np.random.default_rng(1)
    other = mean_interval(values, predicted=noise.normal(size=12), more=noise.normal(size=1000))
    assert other.width < 1.05 * plain.width
    perfect = mean_interval(values, predicted=values, more=noise.normal(size=100_000))
    assert perfect.width < 0.05 * plain.width
    assert mean_interval(values, predicted=np.ones(12), more=np.ones(5)).width == pytest.approx(
        plain.width
    )


def test_the_variance_of_further_inputs_is_part_of_the_interval():
    """The definition with numbers: weight, middle and variance by hand."""
    values, predicted = np.array([1.0, 2, 4, 5]), np.array([1.0, 3, 3, 5])
    more = np.array([0.0, 2, 4, 6, 8])
    found = mean_interval(values, predicted=predicted, more=more)
    covariance = np.cov(values, predicted)
    weight = covariance[0, 1] / ((1 + 4 / 5) * covariance[1, 1])
    assert found.estimate == pytest.approx(3 + weight * (4 - 3))
    variance = np.var(values - weight * predicted, ddof=1) / 4 + weight**2 * 10 / 5
    assert found.width == pytest.approx(2 * 2.3533634 * math.sqrt(variance))


def test_a_ratio_whose_denominator_may_be_zero_says_nothing():
    interval = ratio_interval(np.array([0.1, -0.2, 0.3, 0.0]), np.array([1.0, -1.0, 2.0, -2.0]))
    assert (interval.estimate, interval.low, interval.high) == (None, None, None)
    assert interval.reason == "the denominator of the ratio is not clear of zero"
    assert math.isnan(interval.width)
    assert not interval.covers(0.5)
    certain = ratio_interval(np.full(5, 2.0), np.full(5, 4.0))
    assert (certain.low, certain.high) == pytest.approx((0.5, 0.5))


def test_a_sample_without_a_miss_does_not_claim_certainty():
    interval = top_recall(without_error(60), 4)
    assert interval.estimate == 1.0
    assert 0.85 < interval.low < 1.0
    few = top_recall(without_error(9), 4)
    assert few.estimate == 1.0
    assert few.low < interval.low


def without_error(inputs):
    one = audited(3, inputs=inputs)
    ablated = replace(one.ablated, exact=one.parts.score[one.ablated.rows])
    return SimpleNamespace(parts=one.parts, ablated=ablated, bars=one.bars)


def test_what_has_no_support_is_absent_and_says_why():
    few = top_recall(without_error(4), 4)
    assert (few.estimate, few.low, few.high) == (None, None, None)
    assert few.reason.endswith("and at least 5 are needed")
    one = audited(0, inputs=1)
    for found in totals(one).values():
        assert found.estimate is None
        assert "at least two inputs, got 1" in found.reason


def test_recall_without_variance_is_not_certain_either():
    """Every input has the same exact effects and scores, all of them ablated."""
    score, exact = np.array([[4.0, 3, 2, 1]] * 6), np.array([[4.0, 1, 3.5, 1]] * 6)
    one = audit_of(of_arrays(score, sizes={"g": 4}), exact, None, 2, np.random.default_rng(0))
    found = top_recall(one, 2)
    assert found.estimate == 0.5
    assert found.low < 0.25
    assert found.high > 0.75
    right = audit_of(of_arrays(score, sizes={"g": 4}), score, None, 2, np.random.default_rng(0))
    assert top_recall(right, 2).low == pytest.approx(0.05 ** (1 / 6))


def test_a_real_audit_brackets_the_exact_total():
    mechanisms = dictionary(examples=40)
    scores = attribute(mechanisms, IntegratedGradients())
    checked = audit(scores, exact=9, seed=1)
    exact = attribute(mechanisms, Exact())
    found = totals(checked, alpha=0.01)
    for name in ("features", "error"):
        truth = float(exact.values[name].flatten(1).sum(1).mean())
        assert found[name].covers(truth)
        assert found[name].width < 2 * found[name].sampled_only
    recall = top_recall(checked, 2)
    assert 0 <= recall.low <= recall.estimate <= recall.high <= 1


def test_what_cannot_have_an_interval_is_refused():
    assert ConfidenceInterval(1.0, 0.5, 1.5, 0.1, 4).covers(1.2)
    with pytest.raises(InputError, match="shared over the batch"):
        totals(audit(attribute(displacements(20)), exact=3))
    with pytest.raises(InputError, match="two inputs"):
        mean_interval(np.ones(1))
    with pytest.raises(InputError, match="alpha"):
        mean_interval(np.ones(3), 0.0)
    with pytest.raises(InputError, match="both or none"):
        mean_interval(np.ones(3), predicted=np.ones(3))
    with pytest.raises(InputError, match="predictions of them"):
        mean_interval(np.arange(3.0), predicted=np.arange(4.0), more=np.arange(4.0))
    with pytest.raises(InputError, match="one length"):
        ratio_interval(np.ones(3), np.ones(4))
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match="needs finite numbers"):
            ratio_interval(np.array([1.0, bad, 2.0]), np.array([1.0, 2.0, 3.0]))
    with pytest.raises(InputError, match="active parts"):
        top_recall(audited(0), 26)
    with pytest.raises(InputError, match="at least 1"):
        top_recall(audited(0), 0)
