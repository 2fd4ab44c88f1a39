"""Bars on new inputs, bars as JSON, and every operation of the audit on sparse scores."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import torch
from cases import Dictionary, bound_nodes, dictionary, displacements, tiny_batch, tiny_target

from assay.attribution import Exact, IntegratedGradients, attribute
from assay.audit import (
    apply_bars,
    bars_from_json,
    bars_to_json,
    budgeted,
    compare,
    disagreement,
    heat,
    keep_top,
    top_recall,
    totals,
)
from assay.audit.applied import Applied
from assay.audit.coverage import Coverage
from assay.audit.held_out import BY_EXACT
from assay.core import values as v
from assay.errors import InputError


def fresh(examples: int, scale: float = 1.0, seed: int = 50) -> Dictionary:
    """The dictionary on other inputs, `scale` times as large as those of the table of kinds."""
    batch, patch = tiny_batch(examples, seed=seed), tiny_batch(examples, seed=seed + 1)
    batch = type(batch)(scale * batch.inputs)
    return Dictionary(tiny_target(), batch, patch=patch)


def test_bars_hold_on_new_inputs_and_the_check_notices_inputs_that_are_unlike():
    mechanisms = dictionary(80)
    scores, first = attribute(mechanisms, IntegratedGradients()), attribute(mechanisms)
    audit = scores.audit(exact=10, against=first)
    saved = json.loads(json.dumps(bars_to_json(audit), allow_nan=False))
    bars = bars_from_json(saved)
    assert bars.guarantee == audit.bars.guarantee
    new = fresh(60)
    again = attribute(new, IntegratedGradients())
    scales = {"disagreement": disagreement(again, attribute(new))}
    found = apply_bars(bars, again, exact=saved["exact"], scales=scales)
    exact = attribute(new, Exact())
    assert found.table.height == 60 * audit.selections.count
    for row in found.table.head(8).iter_rows(named=True):
        assert row["low"] <= row["score"] <= row["high"]
        assert row["together_low"] <= row["low"] or row["together_high"] >= row["high"]
        assert row["exact"] is not None
    assert found.promises["largest"].share >= 0.8
    assert found.broken == []
    assert "speaks against" in found.verdict
    assert found.summary()["guarantee"] == bars.guarantee
    assert exact.exact
    far = fresh(60, scale=4.0)
    strange = attribute(far, IntegratedGradients())
    scales = {"disagreement": disagreement(strange, attribute(far))}
    wrong = apply_bars(bars, strange, exact=saved["exact"], scales=scales)
    assert wrong.broken
    assert wrong.verdict.startswith("these inputs are unlike those that calibrated")
    bare = apply_bars(bars, again, exact=saved["exact"], scales=scales_of(new), check=False)
    assert bare.table["exact"].null_count() == bare.table.height
    assert bare.table.drop("exact").equals(found.table.drop("exact"))
    assert "not checked" in bare.verdict


def test_a_shortfall_that_the_calibration_explains_is_no_verdict():
    short = Coverage("listed", 0.78, 0.69, 0.87, 78, 100, 100, 0.9, 1.0)
    for calibrated, broken in ((100, []), (100_000, ["listed"])):
        found = Applied(pl.DataFrame(), {"listed": short, BY_EXACT: short}, "", calibrated)
        assert found.broken == broken


def scales_of(mechanisms):
    scores = attribute(mechanisms, IntegratedGradients())
    return {"disagreement": disagreement(scores, attribute(mechanisms))}


def test_saved_bars_put_the_same_bars_on_the_same_inputs():
    mechanisms = dictionary(60)
    scores = attribute(mechanisms)
    audit = scores.audit(exact=9)
    saved = bars_to_json(audit)
    bars = bars_from_json(json.loads(json.dumps(saved)))
    found = apply_bars(bars, scores, exact=saved["exact"], check=False).table
    for example in (0, 7):
        own = audit.largest_of(example)
        same = found.filter(pl.col("example") == example)
        assert same["part"].to_list() == own["part"].to_list()
        for column in ("low", "high", "together_low", "together_high"):
            np.testing.assert_allclose(same[column], own[column], rtol=1e-12)


def test_bars_that_do_not_fit_are_refused():
    audit = attribute(dictionary(40)).audit(exact=6)
    saved = bars_to_json(audit)
    with pytest.raises(InputError, match="absent"):
        apply_bars(bars_from_json(saved), attribute(bound_nodes()), exact=6)
    shared = attribute(displacements(40))
    of_shared = bars_from_json(bars_to_json(shared.audit(exact=3)))
    with pytest.raises(InputError, match="shared over the batch"):
        apply_bars(of_shared, shared, exact=3)
    for broken in ({}, {**saved, "tails": 3}, {**saved, "scale": {"name": "x"}}):
        with pytest.raises(InputError, match="saved bars cannot be read"):
            bars_from_json(broken)
    group = next(iter(saved["axes"]))
    tail = saved["tails"]["largest"]
    for key, value in (
        ("alpha", 1.5),
        ("alpha", float("nan")),
        ("distinct", 0),
        ("tuned", -1),
        ("caps", {"largest": -1}),
        ("scale", {**saved["scale"], "floor": -1.0}),
        ("scale", {**saved["scale"], "factors": {group: {"places": [1, 0], "factors": [1, 1]}}}),
        ("scale", {**saved["scale"], "factors": {group: {"places": [0], "factors": [-1]}}}),
        ("selections", {**saved["selections"], "level": float("nan")}),
        ("tails", {**saved["tails"], "largest": {**tail, "weight": float("nan")}}),
        ("tails", {**saved["tails"], "largest": {**tail, "residuals": [1.0, 2.0]}}),
        ("together", {"other": tail}),
    ):
        with pytest.raises(InputError, match="of no calibration"):
            bars_from_json({**saved, key: value})
    with pytest.raises(InputError, match="true or false"):
        bars_from_json({**saved, "shared": "no"})


def everything(mechanisms, against: bool = True):
    """Return what the audit room says of scores, as plain numbers."""
    scores = attribute(mechanisms)
    other = attribute(mechanisms, IntegratedGradients()) if against else None
    audit = scores.audit(exact=8, against=other)
    fixed = budgeted(scores, 2, bars=audit)
    kept = {
        share: {name: mask.tolist() for name, mask in keep_top(scores, share).items()}
        for share in (0.1, 0.6)
    }
    each = keep_top(scores, 0.3, per_example=True)
    return {
        "sparse": any(entry.is_sparse for entry in audit.half_widths().values()),
        "half": {name: v.dense(half).tolist() for name, half in audit.half_widths().items()},
        "together": {
            name: v.dense(half).tolist() for name, half in audit.half_widths("largest").items()
        },
        "table": audit.table.to_dicts(),
        "summary": audit.summary(),
        "top": audit.top(5).to_dicts(),
        "totals": totals(audit),
        "recall": top_recall(audit, 2),
        "fixed": {name: v.dense(entry).tolist() for name, entry in fixed.scores.values.items()},
        "known": {name: v.dense(mask).tolist() for name, mask in fixed.exact.items()},
        "share": fixed.share_exact,
        "fixed table": fixed.top(5).to_dicts(),
        "kept": kept,
        "each": {name: mask.tolist() for name, mask in each.items()},
        "heat": heat(audit).to_dicts(),
        "compared": compare(scores, other if other is not None else scores).table.to_dicts(),
    }


def equal(one, two, path=""):
    """Assert that two nested values agree, numbers to rounding and infinities exactly."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            equal(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), path
        for place, (left, right) in enumerate(zip(one, two, strict=True)):
            equal(left, right, f"{path}[{place}]")
    elif isinstance(one, float) and isinstance(two, float):
        assert one == pytest.approx(two, rel=1e-9, abs=1e-11, nan_ok=True), path
    else:
        assert one == two, path


@pytest.mark.parametrize("make", [dictionary], ids=["counterfactual"])
def test_sparse_scores_are_audited_like_dense_ones(make, monkeypatch):
    dense = everything(make(40))
    assert not dense.pop("sparse")
    monkeypatch.setattr(v, "DENSE", 0)
    monkeypatch.setattr(v, "SHARE", 1.0)
    sparse = everything(make(40))
    assert sparse.pop("sparse")
    for key in ("totals",):
        left, right = dense.pop(key), sparse.pop(key)
        for name, interval in left.items():
            assert interval.estimate == pytest.approx(right[name].estimate)
            assert interval.width == pytest.approx(right[name].width)
    left, right = dense.pop("recall"), sparse.pop("recall")
    assert (left.low, left.high) == pytest.approx((right.low, right.high))
    equal(dense, sparse)


def test_large_groups_are_never_made_dense(monkeypatch):
    """`to_dense` fails: the audit, the fixed scores and the means use the entries that are held."""
    monkeypatch.setattr(v, "DENSE", 0)
    monkeypatch.setattr(v, "SHARE", 1.0)
    mechanisms = dictionary(40)
    scores, other = attribute(mechanisms), attribute(mechanisms, IntegratedGradients())
    sizes = []
    whole = torch.Tensor.to_dense

    def small(self, *given, **options):
        sizes.append(self.numel())
        assert self.ndim < 3, "a whole group was made dense"
        return whole(self, *given, **options)

    monkeypatch.setattr(torch.Tensor, "to_dense", small)
    audit = scores.audit(exact=8, against=other)
    audit.half_widths()
    audit.top(4)
    totals(audit)
    top_recall(audit, 2)
    budgeted(scores, 2, bars=audit).top(4)
    keep_top(scores, 0.2, per_example=True)
    heat(audit)
    compare(scores, other)
    assert max(sizes, default=0) <= 18  # a mean over the examples, or one example
