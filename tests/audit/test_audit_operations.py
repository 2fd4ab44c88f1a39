"""Audit, faithfulness, worst case and scrubbing, on every tiny kind."""

from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest
import torch
from cases import KINDS, dictionary, displacements, rank_one, tiny_batch, tiny_target, two_sites
from plain_gpt2 import pair, target_of, tiny_gpt2

from assay.attribution import Exact, IntegratedGradients, attribute
from assay.audit import (
    adversary,
    areas,
    curve,
    exhaustive,
    faithfulness,
    keep_top,
    scrub,
    worst_case,
)
from assay.audit.scrubbing import derangement
from assay.core.sites import read_sites
from assay.errors import InputError
from assay.mechanisms.nodes import nodes

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@kinds
def test_audit_reports_true_effects_and_valid_bars(kind):
    mechanisms = kind(60)
    scores = attribute(mechanisms)
    exact = attribute(mechanisms, Exact())
    audit = scores.audit(exact=8)
    for row in audit.table.iter_rows(named=True):
        place = (row["example"], *row["index"])
        assert row["exact"] == pytest.approx(float(exact.values[row["group"]][place]), abs=1e-9)
        assert row["estimate"] == pytest.approx(float(scores.values[row["group"]][place]), abs=1e-9)
        assert row["lower"] <= row["estimate"] <= row["upper"]
    assert set(audit.table["fold"].unique()) == {"tuning", "calibration", "test"}
    by_fold = audit.table.group_by("example").agg(pl.col("fold").n_unique())
    assert (by_fold["fold"] == 1).all()
    assert audit.coverage >= 0.6
    assert np.isfinite(audit.width)
    assert audit.table["inclusion"].is_between(0, 1).all()
    assert "exact ablations" in audit._repr_html_()
    halves, norms = audit.half_widths(), mechanisms.norms()
    for name, half in halves.items():
        assert half.shape == scores.values[name].shape
        assert (half[norms[name] == 0] == 0).all()
    top = audit.top(3)
    assert top.height == 3
    assert (top["low"] <= top["effect"]).all()
    assert audit.at_level(0.1).table.equals(audit.table)
    assert audit.at_level(0.5).width <= audit.width
    summary = audit.summary()
    assert summary["agreement"]["n"] == audit.table.height
    promise = summary["bars"]["promises"]["all"]
    assert promise["low"] <= promise["share"] <= promise["high"]
    assert promise["sentence"].startswith(f"{promise['covered']} of {promise['n']} bars contain")
    assert "positive where removing the part lowers the metric" in summary["score"]
    assert summary["metric"].startswith("squared_logit: higher is right")


def test_results_show_themselves_in_a_terminal():
    mechanisms = dictionary(40)
    scores = attribute(mechanisms, IntegratedGradients())
    for shown in (repr(scores), repr(scores.audit(exact=3))):
        assert shown.startswith("dictionary: integrated" if shown == repr(scores) else "integrated")
        assert "tensor(" not in shown
        assert "Linear(" not in shown
    assert "share of F(all gates at one)" in scores.signs["score"]
    with pytest.raises(InputError, match="example must lie between 0 and 39, got 40"):
        scores.audit(exact=3).largest_of(40)
    for method in ("ig", IntegratedGradients):
        with pytest.raises(InputError, match="method takes a method object"):
            attribute(mechanisms, method)
    assert "tensor(" not in repr(mechanisms.batch) + repr(mechanisms.target)


def test_parts_shared_over_the_batch_have_bars_where_they_were_ablated():
    mechanisms = displacements(60)
    found = attribute(mechanisms).audit(exact=3)
    ablated = found.table["index"].list.get(0).unique().to_list()
    assert len(ablated) == 3
    half = found.half_widths()["directions"]
    assert torch.isfinite(half[:, ablated]).all()
    others = [place for place in range(5) if place not in ablated]
    assert torch.isinf(half[:, others]).all()
    assert "only parts that were ablated have a bar" in found.bars.guarantee
    listed = {place for _, place in found.selections.listed}
    certain = found.table.filter(pl.col("index").list.get(0).is_in(list(listed)))
    assert (certain["inclusion"] == 1).all()
    rest = found.table.filter(~pl.col("index").list.get(0).is_in(list(listed)))
    assert rest["inclusion"].to_list() == pytest.approx(
        [(3 - len(listed)) / (5 - len(listed))] * rest.height
    )


def test_the_largest_parts_of_every_input_and_the_listed_ones_are_ablated_for_certain():
    mechanisms = dictionary(40)
    scores = attribute(mechanisms)
    found = scores.audit(exact=10, top=3)
    assert found.selections.count == 3
    active = {name: norm > 0 for name, norm in mechanisms.norms().items()}
    known = {
        (row["example"], row["group"], tuple(row["index"])): row["inclusion"]
        for row in found.table.iter_rows(named=True)
    }
    for example in range(40):
        sizes = sorted(
            (
                (float(values[example][place].abs()), name, place)
                for name, values in scores.values.items()
                for place in map(tuple, active[name][example].nonzero().tolist())
            ),
            reverse=True,
        )
        for _, name, place in sizes[:3]:
            assert known[example, name, place] == 1
        for name, flat in found.selections.listed:
            place = tuple(int(i) for i in np.unravel_index(flat, active[name].shape[1:]))
            if active[name][example][place]:
                assert known[example, name, place] == 1
        assert sum(1 for key in known if key[0] == example) <= 10
    own = found.largest_of(7)
    assert own["exact"].is_not_null().all()
    assert own.height == 3
    assert (own["together_high"] - own["together_low"]).is_finite().all()


def test_audit_can_use_a_second_estimate_and_a_certificate_as_scale():
    mechanisms = dictionary(80)
    scores = attribute(mechanisms, IntegratedGradients())
    exact = attribute(mechanisms, Exact())
    oracle = {
        name: (exact.values[name] - scores.values[name]).abs() + 1e-6 for name in scores.values
    }
    audit = scores.audit(exact=6, against=attribute(mechanisms), scales={"oracle": oracle})
    assert audit.bars.scale.name == "oracle"
    assert audit.width < audit.constant_width
    whole = scores.audit(effects=exact, against=attribute(mechanisms), scales={"oracle": oracle})
    assert whole.bars.scale.name == "oracle"
    assert whole.width < whole.constant_width / 3
    assert (whole.table["inclusion"] == 1).all()
    assert whole.effects.spent == 0
    with pytest.raises(InputError, match="lacks"):
        scores.audit(exact=6, scales={"half": {"features": oracle["features"]}})
    with pytest.raises(InputError, match="at least 2"):
        scores.audit(exact=1)
    with pytest.raises(InputError, match="top must be"):
        scores.audit(top=0)
    with pytest.raises(InputError, match="no scale 'half'"):
        scores.audit(exact=6, scale="half")
    with pytest.raises(InputError, match="same groups"):
        scores.audit(exact=6, against=attribute(displacements(80)))
    with pytest.raises(InputError, match="exact scores"):
        scores.audit(effects=scores)
    with pytest.raises(InputError, match="of the mechanisms that are audited"):
        scores.audit(effects=attribute(dictionary(80), Exact()))


@kinds
def test_faithfulness_is_the_ratio_of_plain_runs(kind):
    mechanisms = kind()
    keep = keep_top(attribute(mechanisms), 0.4)
    found = faithfulness(mechanisms, keep)
    gates, anti = mechanisms.full(0.0), mechanisms.ones()
    for name, mask in keep.items():
        gates[name] = gates[name] + mask.to(gates[name])
        anti[name] = anti[name] - mask.to(gates[name])
    with torch.no_grad():
        full, empty = mechanisms.values().mean(), mechanisms.values(mechanisms.full(0.0)).mean()
        expected = (mechanisms.values(gates).mean() - empty) / (full - empty)
        complement = (mechanisms.values(anti).mean() - empty) / (full - empty)
    assert found.faithfulness == pytest.approx(float(expected))
    assert found.completeness == pytest.approx(float(complement))
    assert faithfulness(
        mechanisms, keep_top(attribute(mechanisms), 1.0)
    ).faithfulness == pytest.approx(1)
    assert faithfulness(mechanisms, keep_top(attribute(mechanisms), 0.0)).faithfulness == 0


def test_curves_have_the_ends_and_areas():
    table = curve(attribute(two_sites()), (0.0, 0.5, 1.0))
    assert table["faithfulness"][0] == 0
    assert table["faithfulness"][2] == pytest.approx(1)
    found = areas(table)
    middle = table["faithfulness"][1]
    assert found["cpr"] == pytest.approx(0.25 * (0 + 2 * middle + 1))
    assert found["cmd"] == pytest.approx(0.25 * (1 + 2 * abs(1 - middle)))
    per_example = keep_top(attribute(two_sites()), 0.5, per_example=True)["reader"]
    assert (per_example.flatten(1).sum(1) == 3).all()


def test_masks_must_be_boolean_and_fit():
    with pytest.raises(InputError, match="boolean"):
        faithfulness(dictionary(), {"features": torch.ones(6)})
    with pytest.raises(InputError, match="broadcast"):
        faithfulness(dictionary(), {"features": torch.ones(2, 7, dtype=torch.bool)})
    with pytest.raises(InputError, match="between 0 and 1"):
        keep_top(attribute(dictionary()), 1.5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["weight site", "parameter shift", "two sites"])
def test_worst_case_reaches_the_exhaustive_maximum(kind, seed):
    bound = KINDS[kind]()
    mechanisms = type(bound)(tiny_target(seed), tiny_batch(4, seed=seed + 10))
    truth, found = exhaustive(mechanisms), worst_case(mechanisms, seed=seed)
    assert found.label == "lower bound of the damage"
    assert found.evaluations > 10
    assert not found.exhaustive
    if mechanisms.groups[next(iter(mechanisms.groups))].per_example:
        assert (found.damage >= 0.95 * truth.damage - 1e-12).all()
    else:
        assert found.damage.mean() >= 0.95 * truth.damage.mean() - 1e-12
    with torch.no_grad():
        torch.testing.assert_close(
            mechanisms.values() - mechanisms.values(found.gates), found.damage, rtol=1e-9, atol=1e-9
        )
    for name, gates in found.gates.items():
        assert (gates >= mechanisms.box(name)[0]).all()
        assert (gates <= 1).all()


@pytest.mark.parametrize("together", [1, 6, 64])
def test_the_exhaustive_maximum_is_that_of_a_loop_over_corners(together, monkeypatch):
    """The examples keep different parts, and passes hold one copy of the batch, two or all."""
    monkeypatch.setattr(adversary, "TOGETHER", together)
    mechanisms = type(two_sites())(tiny_target(1), tiny_batch(3, seed=5))
    generator = torch.Generator().manual_seed(0)
    keep = {
        name: torch.rand(gate.shape, generator=generator) < 0.6
        for name, gate in mechanisms.ones().items()
    }
    found = exhaustive(mechanisms, keep)
    full, free = mechanisms.values(), {name: ~mask for name, mask in keep.items()}
    for example in range(3):
        places = [(n, tuple(p)) for n, mask in free.items() for p in mask[example].nonzero()]
        best = 0.0
        for off in itertools.product((0, 1), repeat=len(places)):
            gates = mechanisms.ones()
            for (name, place), down in zip(places, off, strict=True):
                if down:
                    gates[name][(example, *place)] = mechanisms.box(name)[0].expand(
                        gates[name].shape
                    )[(example, *place)]
            with torch.no_grad():
                best = max(best, float((full - mechanisms.values(gates))[example]))
        assert float(found.damage[example]) == pytest.approx(best, abs=1e-12)
    assert any(mask.sum() not in (0, mask.numel()) for mask in free.values())
    with torch.no_grad():
        torch.testing.assert_close(full - mechanisms.values(found.gates), found.damage)


def test_damage_on_pairs_is_the_loss_of_the_right_answer():
    """`logit_difference` is patch answer - clean answer: the clean answer is right, and damage is
    the rise. The worst case is no better than every gate at zero.
    """
    clean, patch = pair()
    mechanisms = nodes(
        target_of(tiny_gpt2()), clean, patch, ["blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"]
    )
    found = worst_case(mechanisms, steps=4, restarts=2)
    with torch.no_grad():
        full, empty = mechanisms.values(), mechanisms.values(mechanisms.full(0.0))
    assert not mechanisms.target.higher_is_right
    assert (found.damage >= (empty - full).double() - 1e-6).all()
    torch.testing.assert_close(
        mechanisms.values(found.gates).double() - full.double(), found.damage, rtol=1e-5, atol=1e-6
    )
    assert (found.damage > 0).all()


def test_kept_gates_are_never_touched_and_large_sets_are_refused():
    mechanisms = dictionary()
    keep = {"features": torch.arange(6) < 3, "error": torch.tensor(True)}
    found = worst_case(mechanisms, keep, steps=4, restarts=2)
    assert (found.gates["features"][..., :3] == 1).all()
    assert (found.gates["error"] == 1).all()
    assert (found.damage >= 0).all()
    with pytest.raises(InputError, match="at most 12"):
        exhaustive(mechanisms)
    with pytest.raises(InputError, match="at least 1"):
        worst_case(mechanisms, keep, steps=0)


def test_derangement_stays_in_its_class_and_moves_everyone():
    classes = torch.tensor([0, 1, 0, 1, 1, 2])
    order = derangement(classes, torch.Generator().manual_seed(0))
    assert (classes[order] == classes).all()
    assert sorted(order.tolist()) == list(range(6))
    assert (order[:5] != torch.arange(5)).all()
    assert order[5] == 5


def test_scrubbing_everything_inside_one_class_of_copies_changes_nothing():
    target = tiny_target()
    inputs = tiny_batch(3).inputs.repeat_interleave(2, 0)
    mechanisms = two_sites().__class__(target, type(tiny_batch())(inputs))
    keep = {"reader": torch.tensor(True)}
    same = torch.arange(3).repeat_interleave(2)
    found = scrub(mechanisms, keep, same, draws=3)
    assert found.metric == pytest.approx(found.full, abs=1e-10)
    assert found.share == pytest.approx(1, abs=1e-8)


def test_scrubbing_nothing_kept_is_the_random_swap_and_matches_a_plain_swap():
    mechanisms = dictionary(6)
    nothing = {name: torch.zeros((), dtype=torch.bool) for name in mechanisms.groups}
    found = scrub(mechanisms, nothing, draws=2, seed=3)
    assert found.share == pytest.approx(0, abs=1e-10)
    order = derangement(torch.zeros(6), torch.Generator().manual_seed(3))
    with torch.no_grad():
        clean = read_sites(mechanisms.target.model, mechanisms.batch.inputs, ["blocks.1"])[
            "blocks.1"
        ].value
        base = read_sites(mechanisms.target.model, mechanisms.patch.inputs, ["blocks.1"])[
            "blocks.1"
        ].value
        plain = mechanisms.target.values(
            mechanisms.batch, {"blocks.1": lambda seen: base + (clean - base)[order]}
        )
    again = scrub(mechanisms, nothing, draws=1, seed=3)
    assert again.metric == pytest.approx(float(plain.mean()), abs=1e-10)
    assert again.error is None


def test_scrubbing_carries_what_each_input_keeps_to_its_donor():
    """Each input keeps other parts: the brute force puts the donor's part where the receiver's own
    mask says so.
    """
    mechanisms = dictionary(6)
    generator = torch.Generator().manual_seed(5)
    keep = {
        name: torch.rand(gate.shape, generator=generator) < 0.5
        for name, gate in mechanisms.ones().items()
    }
    classes = torch.tensor([0, 1, 0, 1, 0, 1])
    found = scrub(mechanisms, keep, classes, draws=1, seed=4)
    again = torch.Generator().manual_seed(4)
    anyone, same = derangement(torch.zeros(6), again), derangement(classes, again)
    parts = dict(mechanisms.clean_parts())["blocks.1"]
    with torch.no_grad():
        inputs = mechanisms.patch.inputs
        base = read_sites(mechanisms.target.model, inputs, ["blocks.1"])["blocks.1"].value
        total = base.clone()
        for receiver in range(6):
            for name, mask in keep.items():
                for place in torch.ones_like(mask[0]).nonzero():
                    donor = (same if mask[(receiver, *place.tolist())] else anyone)[receiver]
                    one = parts[name].one(place.expand(6, -1))
                    total[receiver] += one[donor]
        plain = mechanisms.target.values(mechanisms.batch, {"blocks.1": lambda seen: total})
    assert found.metric == pytest.approx(float(plain.mean()), abs=1e-9)
    assert found.alone == 0


def test_a_share_kept_without_support_is_absent():
    single = scrub(two_sites(1), {"reader": torch.tensor(True)}, torch.zeros(1))
    assert single.share is None
    assert single.reason == "a single input has no other to swap parts with"
    assert single.alone == 1
    copies = two_sites().__class__(
        tiny_target(), type(tiny_batch())(tiny_batch(1).inputs.repeat(4, 1, 1))
    )
    flat = scrub(copies, {}, draws=2)
    assert flat.share is None
    assert flat.reason == "swapping every part does not change the mean metric"


def test_scrubbing_bad_input():
    with pytest.raises(InputError, match="shared over the batch"):
        scrub(displacements(), {})
    with pytest.raises(InputError, match="one label per example"):
        scrub(rank_one(), {}, torch.zeros(2))
