"""What the data cannot support is absent with the reason, or as wide as what the sample can have
passed over: exact cases by hand.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from audit_populations import column_of, of_arrays, sampled
from scipy.stats import betabinom, binom

from assay.audit import Applied, mean_effects
from assay.audit.bars import TOP_BY_SCORE, Bars, Tail
from assay.audit.calibration import calibrate, reaches
from assay.audit.held_out import BY_EXACT, held_out
from assay.audit.intervals import mean_interval
from assay.audit.risk import ListBars, calibrate_list_bars
from assay.audit.scale import Scale
from assay.audit.selections import Selections
from assay.audit.totals import top_recall, totals
from assay.studies.channels.promises import Promises, judge_promises

NOTHING = Selections(0, (), np.inf, {})


def test_values_that_inputs_share_give_no_interval():
    same = mean_interval(np.zeros(30))
    assert (same.estimate, same.low, same.high) == (None, None, None)
    assert same.reason == "all 30 inputs have the same value, which says nothing of its error"
    few, enough = (np.r_[np.zeros(20), np.ones(count)] for count in (4, 5))
    assert mean_interval(few).reason == (
        "4 of 24 inputs differ from the others, and at least 5 are needed"
    )
    assert mean_interval(enough).estimate == pytest.approx(5 / 25)
    assert mean_interval(np.array([1.0, 2.0])).width > 0


def test_a_total_of_a_group_that_is_hardly_ever_active_says_why_it_has_none():
    step = np.ones((20, 3))
    step[2:, 2] = 0
    score = np.arange(60.0).reshape(20, 3) * step
    parts = of_arrays(score, step, {"a": 2, "b": 1})
    found = sampled(parts, score, NOTHING, None, np.random.default_rng(0))
    sums = totals(SimpleNamespace(parts=parts, ablated=found, bars=SimpleNamespace(alpha=0.1)))
    assert sums["b"].reason == "2 of 20 inputs differ from the others, and at least 5 are needed"
    assert sums["a"].covers(float(score[:, :2].sum(1).mean()))


def test_a_mean_from_a_sample_needs_ablations():
    """The scores are certain of an effect that nobody has seen."""
    score = np.repeat([[3.0, 2.0, 1.0]], 20, 0) + np.arange(20.0)[:, None]
    parts = of_arrays(score, sizes={"a": 3})
    known = SimpleNamespace(of=lambda _, rows: 10 * parts.score[rows])
    choosing = np.arange(20) < 5
    for count, given in ((4, False), (5, True)):
        rows = np.flatnonzero((parts.place == 0) & (parts.example >= 20 - count))
        sample = (rows, 10 * parts.score[rows], np.full(len(rows), count / 15))
        row = mean_effects(parts, 1, known, choosing, exact=False, sampled=sample).row(
            0, named=True
        )
        assert row["ablated"] == count
        assert (row["low"] is not None) is given
        assert row["reason"] == (
            "" if given else "4 inputs have the part ablated, at least 5 are needed"
        )


def test_recall_allows_for_what_the_sample_can_have_passed_over():
    """The largest of four scores is right in 20 inputs; one of the other three is sampled."""
    score = np.repeat([[4.0, 3.0, 2.0, 1.0]], 20, 0)
    parts = of_arrays(score, sizes={"a": 4})
    largest = Selections(1, (), np.inf, {})
    found = sampled(parts, score, largest, 2, np.random.default_rng(0))
    one = SimpleNamespace(parts=parts, ablated=found, bars=SimpleNamespace(alpha=0.1))
    recall = top_recall(one, 1)
    assert recall.estimate == recall.high == 1.0
    missed = -np.log(0.05) * 3 / 20  # none seen in 20 inputs, each sampled with probability 1/3
    assert recall.low == pytest.approx(1 / (1 + missed))
    everything = sampled(parts, score, largest, None, np.random.default_rng(0))
    assert top_recall(replace_(one, everything), 1).low == pytest.approx(0.05 ** (1 / 20))


def replace_(one, ablated):
    return SimpleNamespace(parts=one.parts, ablated=ablated, bars=one.bars)


@pytest.mark.parametrize(("calibrating", "cap"), [(20, 5), (15, 1)])
def test_a_cap_counts_the_reach_of_the_rows_that_it_leaves(calibrating, cap):
    """Five of ten parts have the largest score. The first is certain and one of the nine others is
    sampled, which stands for nine: r > 1 rows reach ten, and 0.1 (n r + r) is at least that for r =
    5 with n = 20 and for no r with n = 15.
    """
    score = np.repeat([[1.0] * 5 + [0.0] * 5], 60, 0)
    parts = of_arrays(score, sizes={"a": 10})
    chosen = Selections(1, (("a", 0),), 1.0, {"a": 1.0})
    errors = np.random.default_rng(0).random((60, 10))
    found = sampled(parts, score + errors, chosen, 2, np.random.default_rng(1))
    fold = np.repeat([0, 1, 2], [20, calibrating, 40 - calibrating])
    bars = calibrate(found, fold, chosen, 0.1)
    assert bars.caps == {"top of a": cap, TOP_BY_SCORE: cap}
    widths = bars.half_widths(parts, reaches(parts, found.design, bars.masks(parts)))
    assert np.isfinite(widths).all()


def test_a_promise_is_measured_on_the_rows_that_it_is_made_for():
    """Of two equal scores the promise holds for the first, whose bar is right in every input."""
    score = np.ones((8, 2))
    parts = of_arrays(score, sizes={"a": 2})
    exact = np.array([[1.0, 5.0]] * 8)
    chosen = Selections(0, (), 1.0, {})
    found = sampled(parts, exact, chosen, None, np.random.default_rng(0))
    certain = Tail(np.array([2.0]), np.zeros(1), 1e9, 100)
    tails = {"site a": certain, TOP_BY_SCORE: certain}
    everyone = np.ones(8, dtype=bool)
    for caps, share, rows in (({TOP_BY_SCORE: 1}, 1.0, 8), ({}, 0.5, 16)):
        bars = Bars(0.1, Scale(), chosen, tails, {}, caps, 100, 100)
        measured = held_out(found, bars, everyone)[1][TOP_BY_SCORE]
        assert (measured.share, measured.rows) == (share, rows)
    assert column_of(parts, exact)[parts.rank == 0].tolist() == [1.0] * 8


def test_what_nothing_promised_cannot_be_broken():
    score, exact = np.ones((30, 2)), np.array([[1.0, 5.0]] * 30)
    parts = of_arrays(score, sizes={"a": 2})
    found = sampled(parts, exact, NOTHING, None, np.random.default_rng(0))
    certain = Tail(np.array([2.0]), np.zeros(1), 1e9, 100)
    bars = Bars(0.1, Scale(), NOTHING, {"site a": certain}, {}, {}, 100, 100)
    promises = held_out(found, bars, np.ones(30, dtype=bool))[1]
    of = {name: promises[name] for name in ("site a", BY_EXACT)}
    assert Applied(pl.DataFrame(), of, "", 100).broken == ["site a"]
    nothing = frozenset({"site a", BY_EXACT})
    assert Applied(pl.DataFrame(), of, "", 100, nothing).broken == []


def test_the_chance_of_the_calibration_is_no_verdict_on_new_inputs():
    """Nine calibration inputs and 90 % bars: the bar is the largest residual, and the share that
    misses it has the law Beta(1, 9).
    """
    bars = calibrate_list_bars(np.arange(1.0, 10.0), np.ones(9), np.arange(9))
    assert (bars.quantile, bars.rank) == (9.0, 9)
    assert binom.sf(6, 20, 0.1) < 0.005
    verdicts = {}
    for missed in range(21):
        measured = {"inputs": 20, "inputs_with_all_effects_in_bars": 20 - missed}
        said = judge_promises(measured, Promises(None, bars, "attribution", "squared_step"))
        verdicts[missed] = said.startswith("These inputs are unlike")
    first = min(missed for missed, broken in verdicts.items() if broken)
    # The `missed` largest of 29 are all new: C(20, missed) / C(29, missed).
    chance = np.cumprod([(20 - drawn) / (29 - drawn) for drawn in range(20)])
    assert first == 1 + int(np.flatnonzero(chance < 0.025)[0])
    assert betabinom.sf(first - 1, 20, 1, 9) == pytest.approx(chance[first - 1])
    assert ListBars(0.1, 1.0, 29).rank == 27
