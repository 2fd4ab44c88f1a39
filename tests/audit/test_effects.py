"""Exact effects are computed once, shared by audits, and equal to ablation; means of what is listed
have intervals; the cheaper way is taken.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from audit_populations import drawn, of_arrays
from cases import KINDS, dictionary, displacements, tiny_batch, two_sites

import assay.audit.auto as auto
from assay.attribution import Exact, Gradient, IntegratedGradients, attribute
from assay.audit import ExactEffects, choose_method, exact_top, mean_effects
from assay.audit.population import distinct, population
from assay.core.target import Batch

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@kinds
def test_effects_are_those_of_exact_ablation_whatever_is_asked_for_first(kind):
    mechanisms = kind(7)
    exact = attribute(mechanisms, Exact())
    parts, effects = population(exact), ExactEffects(mechanisms)
    generator = np.random.default_rng(0)
    for count in (5, 1, len(parts), 9):
        rows = generator.choice(len(parts), min(count, len(parts)), replace=False)
        np.testing.assert_allclose(effects.of(parts, rows), parts.score[rows], atol=1e-9)
    assert not effects.complete
    spent = effects.spent
    effects.of(parts, np.arange(len(parts)))
    assert effects.spent == spent  # nothing is computed twice
    known = ExactEffects(mechanisms, everything=exact)
    assert known.complete
    assert np.array_equal(known.of(parts, np.arange(len(parts))), parts.score)
    assert known.spent == 0


def test_audits_of_several_methods_share_their_ablations(monkeypatch):
    mechanisms = dictionary(40)
    effects, calls = ExactEffects(mechanisms), []
    first = attribute(mechanisms).audit(exact=9, effects=effects)
    spent = effects.spent
    assert spent == first.table.height
    second = attribute(mechanisms, IntegratedGradients()).audit(exact=9, effects=effects)
    assert effects.spent - spent < second.table.height / 2
    monkeypatch.setattr(
        "assay.audit.effects.ablate", lambda *given, **options: calls.append(given) or 1 / 0
    )
    again = attribute(mechanisms).audit(exact=9, effects=effects)
    assert again.table.equals(first.table)
    assert not calls
    whole = attribute(mechanisms).audit(effects=attribute(mechanisms, Exact()))
    assert whole.table.height == len(whole.parts)


def test_copies_are_told_by_inputs_and_labels():
    inputs = torch.tensor([[1.0, 2], [3, 4], [1, 2], [1, 2]])
    labels = {"answer": torch.tensor([0, 1, 0, 1]), "name": "x"}
    assert distinct(Batch(inputs, labels)).tolist() == [0, 1, 0, 2]
    assert distinct(Batch({"a": inputs, "b": torch.arange(4)})).tolist() == [0, 1, 2, 3]


def test_the_mean_effect_of_listed_parts_is_exact_on_the_inputs_that_did_not_choose():
    mechanisms = two_sites(48)
    scores, exact = attribute(mechanisms), attribute(mechanisms, Exact())
    audit = scores.audit(exact=4)
    before = audit.effects.spent
    top = audit.top(3)
    assert audit.effects.spent > before
    chose = {row["example"] for row in audit.table.iter_rows(named=True) if row["fold"] == "tuning"}
    others = [example for example in range(48) if example not in chose]
    sizes = scores.values["reader"][sorted(chose)].abs().mean(0)
    order = sizes.flatten().argsort(descending=True)[:3]
    assert [tuple(index) for index in top["index"].to_list()] == [
        tuple(int(i) for i in np.unravel_index(int(place), sizes.shape)) for place in order
    ]
    for row in top.iter_rows(named=True):
        values = exact.values["reader"][(others, *row["index"])].numpy()
        assert row["effect"] == pytest.approx(values.mean())
        assert row["inputs"] == row["ablated"] == len(others)
        reach = 1.6896 * values.std(ddof=1) / math.sqrt(len(values))
        assert row["high"] - row["effect"] == pytest.approx(reach, rel=1e-3)
        assert row["low"] <= row["effect"] <= row["high"]
        score = scores.values["reader"][(others, *row["index"])]
        assert row["score"] == pytest.approx(float(score.mean()))
    assert exact_top(exact, 3)["reason"].to_list() == [""] * 3
    cheap = audit.top(3, exact=False)
    assert cheap["part"].to_list() == top["part"].to_list()
    assert audit.effects.spent == before + sum(top["inputs"]) - _known(audit, top, others)


def _known(audit, top, others):
    """How many of the listed parts the audit's sample had ablated."""
    listed = {tuple(index) for index in top["index"].to_list()}
    return sum(
        tuple(row["index"]) in listed and row["example"] in others
        for row in audit.table.iter_rows(named=True)
    )


def test_intervals_of_means_cover_the_population_and_choosing_costs_nothing():
    """Twelve parts with the same mean: chosen and estimated on the same inputs, the mean of the
    largest is too large; on others it is not.
    """
    covered, naive = [], []
    for seed in range(300):
        generator = np.random.default_rng(seed)
        exact = 1 + generator.normal(size=(24, 12))
        parts = of_arrays(exact, sizes={"g": 12})
        known = SimpleNamespace(of=lambda parts, rows: parts.score[rows])
        choosing = np.arange(24) % 2 == 0
        row = mean_effects(parts, 1, known, choosing).row(0, named=True)  # type: ignore[arg-type]
        covered.append(row["low"] <= 1 <= row["high"])
        best = exact[:, exact.mean(0).argmax()]
        naive.append(abs(best.mean() - 1) <= 1.7139 * best.std(ddof=1) / math.sqrt(24))
    assert np.mean(covered) >= 0.9 - 3 * math.sqrt(0.09 / 300)
    assert np.mean(naive) < 0.7


def test_prediction_powered_means_are_unbiased_under_unequal_sampling():
    generator = np.random.default_rng(0)
    found, truth = [], []
    for _ in range(300):
        score, exact, step = drawn(generator, 30)
        parts = of_arrays(score, step)
        inclusion = np.where(np.abs(parts.score) > 1, 0.9, 0.3)
        rows = np.flatnonzero(generator.random(len(parts)) < inclusion)
        values = exact[parts.example, parts.part]
        choosing = np.arange(30) < 8
        table = mean_effects(
            parts,
            19,
            SimpleNamespace(of=None),  # type: ignore[arg-type]
            choosing,
            exact=False,
            sampled=(rows, values[rows], inclusion[rows]),
        )
        found.append(table["effect"].sum())
        truth.append(exact[8:].sum() / 22)
    error = np.array(found) - np.array(truth)
    assert abs(error.mean()) <= 4 * error.std(ddof=1) / math.sqrt(300)


def test_too_few_inputs_have_means_without_intervals_and_say_why():
    audit = attribute(two_sites(2)).audit(exact=3)
    top = audit.top(2)
    assert top["low"].null_count() == 2
    assert top["reason"][0].startswith("too few inputs to choose")
    three = attribute(two_sites(3)).audit(exact=3).top(2)
    assert three["low"].null_count() == 0


def test_the_cheaper_way_is_taken_and_the_reason_says_what_it_costs(monkeypatch):
    mechanisms = dictionary(4)
    clock = iter([])
    monkeypatch.setattr(auto, "_seconds", lambda mechanisms, work: next(clock))
    active = int(sum((norm[0] > 0).sum() for norm in mechanisms.norms().values()))
    clock = iter([1.0, 0.7])
    cheap = choose_method(mechanisms, IntegratedGradients(), exact=active // 2)
    assert cheap.parts == active
    assert cheap.audit_seconds == pytest.approx((active // 2) / active)
    assert cheap.exact == (0.7 + cheap.audit_seconds >= 1.0)
    clock = iter([1.0, 0.1])
    dear = choose_method(mechanisms, Gradient(), exact=2)
    assert not dear.exact
    assert dear.taken == "gradient"
    assert "gradient is shown, with its audit" in dear.reason
    clock = iter([1.0, 2.0])
    whole = choose_method(mechanisms, IntegratedGradients())
    assert whole.taken == "exact"
    assert "the exact effects are shown" in whole.reason
    assert f"all {active} active parts takes 1 CPU s" in whole.reason


def test_the_probe_measures_both_ways():
    found = choose_method(displacements(4), IntegratedGradients())
    assert found.exact_seconds > 0
    assert found.estimate_seconds > 0
    assert found.to_dict()["taken"] in ("exact", "integrated gradients")
    assert len(tiny_batch(4)) == 4
