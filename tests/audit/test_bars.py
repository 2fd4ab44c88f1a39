"""Bars: the quantile against its definition, coverage of every selection over fresh draws, and what
happens when data are too few, tied, repeated or heavy-tailed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from audit_populations import column_of, drawn, of_arrays, sampled, selected
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.audit.bars import Bars, Tail, conformal_quantile, split, tail
from assay.audit.calibration import calibrate, folds, reaches
from assay.audit.held_out import held_out
from assay.audit.sampling import design
from assay.audit.scale import Scale
from assay.audit.selections import TOP_BY_SCORE, Selections
from assay.errors import InputError


@given(st.integers(1, 60), st.sampled_from([0.05, 0.1, 0.2, 0.5]))
def test_quantile_is_the_stated_order_statistic(n, alpha):
    values = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))
    found = conformal_quantile(values, alpha)
    rank = -((-(n + 1) * round((1 - alpha) * 100)) // 100)
    assert found == (rank if rank <= n else math.inf)
    assert math.isinf(found) == (n < math.ceil(1 / alpha) - 1)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=12),
    st.sampled_from([0.1, 0.25, 0.5]),
    st.integers(0, 4),
    st.integers(0, 6),
)
@settings(deadline=None)
def test_weighted_quantiles_are_the_smallest_residual_that_is_controlled(rows, alpha, count, more):
    residuals, weight = (np.array(entry, float) for entry in zip(*rows, strict=True))
    found = tail(residuals, weight, alpha, weight.sum(), len(rows))
    reach = float(count + more)
    room = alpha * (weight.sum() + count) - reach
    fit = [value for value in residuals if weight[residuals > value].sum() <= room + 1e-9]
    expected = min(fit, default=math.inf)
    assert float(found.quantile(alpha, np.array([count]), np.array([reach]))[0]) == expected


def test_one_row_an_input_is_split_conformal_and_more_rows_keep_its_correction():
    # 19 inputs of two rows: at alpha = 0.1 a new input of two rows leaves room for
    # 0.1 * 40 - 2 = 2 rows above the quantile, the third largest of 38.
    values = np.arange(1.0, 39)
    found = tail(values, np.ones(38), 0.1, 38.0, 19)
    assert found.quantile(0.1, np.array([2.0]), np.array([2.0]))[0] == 36
    assert found.quantile(0.1, np.array([4.0]), np.array([4.0]))[0] == 38
    assert math.isinf(found.quantile(0.1, np.array([6.0]), np.array([6.0]))[0])


def by_hand(quantiles, caps):
    """Bars of one group whose selections have these quantiles, around four scores of one input."""
    parts = of_arrays(np.array([[4.0, -3, 2, 1]]), sizes={"g": 4})
    chosen = Selections(1, (("g", 3),), 2.0, {"g": 2.0})
    tails = {
        name: Tail(np.array([value]), np.array([0.0]), 1e6, 9) for name, value in quantiles.items()
    }
    bars = Bars(0.1, Scale(), chosen, tails, {}, caps, distinct=9, tuned=9)
    reach = dict.fromkeys(tails, np.zeros(1))
    return bars, parts, bars.half_widths(parts, reach)


def test_a_bar_is_the_widest_that_one_of_its_selections_needs():
    quantiles = {"site g": 3.0, "top of g": 1.0, TOP_BY_SCORE: 7.0, "largest": 5.0, "listed": 2.0}
    assert by_hand(quantiles, {})[2].tolist() == [7, 7, 7, 3]
    assert by_hand({"site g": 1.0, "listed": 2.0}, {})[2].tolist() == [1, 1, 1, 2]
    assert np.isinf(by_hand({"largest": 1.0}, {})[2]).tolist() == [False, True, True, True]


def test_a_cap_holds_the_promise_to_the_largest_rows():
    bars, parts, half = by_hand({"site g": 1.0, TOP_BY_SCORE: 7.0}, {TOP_BY_SCORE: 2})
    assert half.tolist() == [7, 7, 1, 1]
    assert bars.masks(parts)[TOP_BY_SCORE].tolist() == [True, True, False, False]
    assert by_hand({"site g": 1.0, "top of g": 7.0}, {"top of g": 1})[2].tolist() == [7, 1, 1, 1]


def test_a_sample_is_drawn_by_its_keys_in_every_stratum():
    """Two inputs of five parts; the largest is certain, two of the four others are drawn: those
    with the smallest keys.
    """
    score = np.array([[1.0, 9, 2, 3, 4], [9, 1, 1, 1, 1]])
    parts = of_arrays(score, sizes={"g": 5})
    plan = design(parts, Selections(1, (), np.inf, {}), 3)
    keys = np.array([0.9, 0.5, 0.1, 0.8, 0.2, 0.5, 0.4, 0.3, 0.2, 0.1])
    drawn = plan.draw(parts, SimpleNamespace(random=lambda count: keys[:count]))  # type: ignore[arg-type]
    assert [(parts.example[row], parts.place[row]) for row in drawn] == [
        (0, 1),
        (0, 2),
        (0, 4),
        (1, 0),
        (1, 3),
        (1, 4),
    ]
    inclusion = plan.inclusion(parts)
    assert inclusion[drawn].tolist() == [1, 0.5, 0.5, 1, 0.5, 0.5]
    mask = np.array([True, True, True, False, False, False, True, False, False, False])
    # Input 0: the certain row, and one drawn row of weight 2; input 1: one of weight 2.
    assert plan.reach(parts, mask).tolist() == [5, 2]


def coverage_of_new_inputs(repetitions: int, passes: int | None, inputs: int = 120, **options):
    """Return by selection the number of rows and of misses in fresh inputs, a pair per repetition,
    and the same for lists as wholes.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(repetitions):
        generator = np.random.default_rng(seed)
        score, exact, step = drawn(generator, inputs + 20)
        old, new = slice(0, inputs), slice(inputs, None)
        parts = of_arrays(score[old], step[old])
        fold = folds(parts, seed)
        chosen = selected(parts, fold, 3)
        ablated = sampled(parts, exact[old], chosen, passes, generator)
        bars = calibrate(ablated, fold, chosen, 0.1, **options)
        fresh = of_arrays(score[new], step[new])
        plan, masks = design(fresh, chosen, passes), bars.masks(fresh)
        half = bars.half_widths(fresh, reaches(fresh, plan, masks))
        error = np.abs(column_of(fresh, exact[new]) - fresh.score)
        masks = {**masks, "all": np.ones(len(fresh), dtype=bool)}
        for name, mask in masks.items():
            if name in bars.tails or name == "all":
                missed = float((error > half)[mask].sum())
                found.setdefault(name, []).append((missed, float(mask.sum())))
        for name in bars.together:
            wide = bars.together_half_widths(fresh, name)
            broken = np.unique(fresh.example[masks[name] & (error > wide)])
            found.setdefault(f"{name}, together", []).append((float(len(broken)), 20.0))
    return found


def assert_promised(found, alpha=0.1):
    for name, counts in found.items():
        missed, rows = np.array(counts).T
        surplus = missed - alpha * rows  # its mean is what the promise bounds by zero
        error = surplus.std(ddof=1) / math.sqrt(len(surplus))
        assert surplus.mean() <= 3 * error, (name, missed.sum() / rows.sum())


def test_every_selection_is_covered_on_new_inputs_from_a_sample_of_their_parts():
    found = coverage_of_new_inputs(200, 10, scale="magnitude", by_part=False)
    assert {"all", "site a", "site b", "site one", "largest", "listed", "top of a"} <= set(found)
    assert {TOP_BY_SCORE, "largest, together", "listed, together"} <= set(found)
    assert_promised(found)


def test_the_chosen_scale_keeps_the_promise_when_everything_is_ablated():
    assert_promised(coverage_of_new_inputs(40, None))


def test_bars_for_sites_alone_fail_where_users_read():
    """What the further selections are for: the same bars without them miss the top."""
    found = coverage_of_new_inputs(60, None, scale="constant", by_part=False, promises=())
    promised = coverage_of_new_inputs(60, None, scale="constant", by_part=False)
    site = np.array(found["all"]).sum(0)
    top = np.array(promised["largest"]).sum(0)
    assert set(found) == {"all", "site a", "site b", "site one"}
    assert 1 - site[0] / site[1] >= 0.87
    assert 1 - top[0] / top[1] >= 0.88
    masks, missed = [], []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        score, exact, step = drawn(generator, 140)
        parts = of_arrays(score[:120], step[:120])
        fold = folds(parts, seed)
        chosen = selected(parts, fold, 3)
        bars = calibrate(
            sampled(parts, exact[:120], chosen, None, generator),
            fold,
            chosen,
            0.1,
            scale="constant",
            by_part=False,
            promises=(),
        )
        fresh = of_arrays(score[120:], step[120:])
        half = bars.half_widths(
            fresh, reaches(fresh, design(fresh, chosen, None), bars.masks(fresh))
        )
        mask = chosen.masks(fresh)["largest"]
        missed.append((np.abs(column_of(fresh, exact[120:]) - fresh.score) > half)[mask].sum())
        masks.append(mask.sum())
    assert 1 - sum(missed) / sum(masks) < 0.8


def test_copies_of_an_input_count_once():
    """Ten copies of 12 inputs calibrate like 12 inputs, and the promise holds for a new one."""
    missed = []
    for seed in range(150):
        generator = np.random.default_rng(seed)
        score, exact, step = drawn(generator, 17)
        unit = np.repeat(np.arange(16), 10)
        parts = of_arrays(score[unit], step[unit], unit=unit)
        fold = folds(parts, seed)
        assert all(len(set(fold[unit == one])) == 1 for one in range(16))
        chosen = selected(parts, fold, 3)
        ablated = sampled(parts, exact[unit], chosen, None, generator)
        bars = calibrate(ablated, fold, chosen, 0.2, scale="constant", by_part=False)
        assert bars.distinct == 8
        fresh = of_arrays(score[16:], step[16:])
        half = bars.half_widths(
            fresh, reaches(fresh, design(fresh, chosen, None), bars.masks(fresh))
        )
        error = np.abs(column_of(fresh, exact[16:]) - fresh.score)
        missed.append(float((error > half).sum()) - 0.2 * len(fresh))
        once = of_arrays(score[:16], step[:16])
        alone = calibrate(
            sampled(once, exact[:16], chosen, None, generator),
            fold[::10],
            chosen,
            0.2,
            scale="constant",
            by_part=False,
        )
        for name, entry in alone.tails.items():
            np.testing.assert_allclose(entry.residuals, bars.tails[name].residuals, rtol=1e-12)
            np.testing.assert_allclose(entry.above, bars.tails[name].above, atol=1e-9)
    error = np.std(missed, ddof=1) / math.sqrt(len(missed))
    assert np.mean(missed) <= 3 * error


def audited(score, exact, step=None, passes=None, count=3, alpha=0.1, seed=0, **options):
    parts = of_arrays(score, step)
    fold = folds(parts, seed)
    chosen = selected(parts, fold, count)
    ablated = sampled(parts, exact, chosen, passes, np.random.default_rng(seed))
    return ablated, calibrate(ablated, fold, chosen, alpha, **options), fold


def test_the_informative_scale_is_chosen_and_narrower():
    generator = np.random.default_rng(0)
    step = generator.gamma(1.0, size=(200, 19)) + 0.01
    exact = generator.normal(size=step.shape)
    score = exact + step * generator.normal(size=step.shape)
    ablated, bars, fold = audited(score, exact, step)
    plain = audited(score, exact, step, scale="constant", by_part=False)[1]
    assert bars.scale.name == "step"
    half, found = held_out(ablated, bars, fold == 2)
    width, constant = (
        held_out(ablated, entry, fold == 2)[1]["all"].width for entry in (bars, plain)
    )
    assert width < 0.8 * constant
    assert half.shape == (len(ablated.parts),)
    assert found["all"].share >= 0.88


def test_a_part_that_errs_more_than_others_gets_wider_bars():
    generator = np.random.default_rng(1)
    score = generator.normal(size=(160, 19))
    size = np.where(np.arange(19) % 6 == 0, 5.0, 0.1)
    exact = score + size * generator.normal(size=score.shape)
    ablated, bars, _ = audited(score, exact)
    assert bars.scale.by_part
    widths = bars.scale.of(ablated.parts)
    wide = np.isin(ablated.parts.part, np.flatnonzero(size > 1))
    assert widths[wide].mean() > 10 * widths[~wide].mean()
    unseen = replace(ablated.parts, place=ablated.parts.place + 100)
    assert set(bars.scale.of(unseen)) <= {bars.scale.floor, *bars.scale.of(unseen)}
    np.testing.assert_allclose(
        bars.scale.of(unseen), replace(bars.scale, factors={}).of(ablated.parts)
    )


def test_too_few_inputs_give_infinite_bars_and_say_so():
    score, exact, step = drawn(np.random.default_rng(0), 8)
    ablated, bars, fold = audited(score, exact, step)
    half, found = held_out(ablated, bars, fold == 2)
    assert np.isinf(half).all()
    assert "needs at least 9" in bars.guarantee
    assert found["all"].share is None
    assert "no bar" in found["all"].reason
    assert "not given" in found["all"].sentence
    assert np.isinf(bars.together_half_widths(ablated.parts, "largest")).all()


def test_a_scale_that_vanishes_on_a_wrong_row_cannot_hide_it():
    score, exact = np.ones((40, 19)), np.zeros((40, 19))
    parts = of_arrays(score)
    zero = replace(parts, scales={**parts.scales, "zero": np.zeros(len(parts))})
    fold = folds(zero, 0)
    chosen = selected(zero, fold, 3)
    ablated = sampled(zero, exact, chosen, None, np.random.default_rng(0))
    bars = calibrate(ablated, fold, chosen, 0.1, scale="zero")
    assert np.isinf(held_out(ablated, bars, fold == 2)[0]).all()


def test_ties_and_exact_scores_have_bars_that_hold():
    exact = np.random.default_rng(0).normal(size=(60, 19))
    zero = np.zeros_like(exact)
    ablated, bars, fold = audited(zero, exact)  # every score ties with every other
    half, found = held_out(ablated, bars, fold == 2)
    assert np.isfinite(half).all()
    assert found["all"].share >= 0.8
    right, exact_bars, fold = audited(exact, exact)
    half, found = held_out(right, exact_bars, fold == 2)
    assert (half == 0).all()
    assert found["all"].share is None  # covering proves nothing where nothing can miss


def test_selections_that_cannot_be_calibrated_are_not_promised():
    score, exact, step = drawn(np.random.default_rng(3), 24)
    bars = audited(score, exact, step)[1]
    assert "site a" in bars.tails
    assert TOP_BY_SCORE not in bars.tails
    assert "top 5" not in bars.guarantee
    many = audited(*drawn(np.random.default_rng(3), 300))[1]
    assert TOP_BY_SCORE in many.tails
    assert "(the top 5% of the 75 inputs that tuned the bars; at most the" in many.guarantee
    assert "Nothing is promised for parts selected by their exact effect" in many.guarantee


def test_folds_keep_inputs_whole():
    folds_of = split(np.array([3, 3, 1, 2, 2, 2, 9]), (1, 1), np.random.default_rng(0))
    assert sorted(np.concatenate(folds_of)) == [1, 2, 3, 9]
    assert len(folds_of[0]) == len(folds_of[1]) == 2


def test_bad_levels_scales_and_lists_are_refused():
    with pytest.raises(InputError, match="alpha"):
        conformal_quantile(np.ones(3), 1.5)
    score, exact, step = drawn(np.random.default_rng(0), 40)
    with pytest.raises(InputError, match="no scale 'other'; known: constant, magnitude, step"):
        audited(score, exact, step, scale="other")
    ablated, bars, _ = audited(score, exact, step)
    with pytest.raises(InputError, match="no list 'longest'"):
        bars.together_half_widths(ablated.parts, "longest")
