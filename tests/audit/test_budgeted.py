"""Screen, flag, fix: exact where it says so, and better than patches spent at random; heat-map
tables; circuits of edges.
"""

from __future__ import annotations

import polars as pl
import pytest
import torch
from cases import KINDS, dictionary, displacements
from plain_gpt2 import pair, target_of, tiny_gpt2
from toy_attention import plain_target, prompts

from assay.attribution import (
    Exact,
    Gradient,
    IntegratedGradients,
    SecondOrder,
    attribute,
)
from assay.audit import areas, audit, edge_curve, edge_faithfulness, heat
from assay.audit.budgeted import budgeted
from assay.edges import edges, exact_edges
from assay.errors import InputError
from assay.mechanisms.nodes import nodes


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_fixed_values_are_exact_and_the_others_untouched(kind):
    mechanisms = kind()
    first, exact = attribute(mechanisms), attribute(mechanisms, Exact())
    found = budgeted(first, 3, against=attribute(mechanisms, SecondOrder()))
    for name, mask in found.exact.items():
        torch.testing.assert_close(
            found.scores.values[name][mask], exact.values[name][mask], rtol=1e-9, atol=1e-12
        )
        assert torch.equal(found.scores.values[name][~mask], first.values[name][~mask])
    assert found.patches == sum(int(mask.sum()) for mask in found.exact.values())
    assert found.patches <= 3 * len(mechanisms.batch)
    whole = budgeted(first, 10_000, against=attribute(mechanisms, SecondOrder()))
    active = sum(int((norm > 0).sum()) for norm in mechanisms.norms().values())
    assert whole.patches == active
    assert whole.flagged == 0


def test_patches_go_where_doubt_is_largest_among_what_matters():
    mechanisms = dictionary()
    first, exact = attribute(mechanisms), attribute(mechanisms, Exact())
    found = budgeted(first, 4, against=exact, top=3)  # the doubt is the true error
    errors = torch.cat(
        [(exact.values[name] - first.values[name]).abs().flatten(1) for name in first.values], 1
    )
    sizes = torch.cat([values.abs().flatten(1) for values in first.values.values()], 1)
    masks = torch.cat([mask.flatten(1) for mask in found.exact.values()], 1)
    level = sizes.topk(3, dim=1).values[:, -1:]
    for error, size, mask, limit in zip(errors, sizes, masks, level, strict=True):
        screened = error + size >= limit
        if int(screened.sum()) >= 4:
            assert (screened[mask]).all()
            assert (
                error[mask].min() >= error[screened & ~mask].max()
                if (screened & ~mask).any()
                else True
            )
    chance = torch.Generator().manual_seed(0)
    random = torch.rand(errors.shape, generator=chance).argsort(1) < 4
    assert errors[masks].sum() > 1.5 * errors[random].sum()


def test_an_audit_lends_its_bars_and_its_exact_values():
    mechanisms = dictionary(examples=60)
    scores = attribute(mechanisms)
    checked = audit(scores, exact=4)
    found = budgeted(scores, 2, bars=checked)
    for row in checked.table.head(20).iter_rows(named=True):
        place = (row["example"], *row["index"])
        assert found.exact[row["group"]][place]
        assert float(found.scores.values[row["group"]][place]) == row["exact"]
    assert found.patches <= 2 * 60
    table = found.table()
    assert table["share_exact"].is_between(0, 1).all()
    assert found.share_exact == pytest.approx(
        sum(m.sum() for m in found.exact.values()) / sum(m.numel() for m in found.exact.values())
    )
    assert "2 exact patches" in found.scores.method
    assert found.top(3).height == 3


def test_unclear_requests_are_refused():
    scores = attribute(dictionary())
    with pytest.raises(InputError, match="either against"):
        budgeted(scores, 3)
    with pytest.raises(InputError, match="patches must be"):
        budgeted(scores, 0, against=scores)
    with pytest.raises(InputError, match="top must be"):
        budgeted(scores, 1, against=scores, top=0)
    with pytest.raises(InputError, match="same groups"):
        budgeted(scores, 1, against=attribute(displacements()))
    with pytest.raises(InputError, match="audit of the scores"):
        budgeted(scores, 1, bars=audit(attribute(dictionary(examples=20)), exact=4))


def test_bars_cover_a_saturated_softmax_where_the_gradient_is_zero():
    clean, patch = prompts(examples=80, seed=3)
    bound = nodes(
        plain_target(attention=3000.0),
        clean,
        patch,
        ["blocks.0.attn.hook_q", "blocks.0.attn.hook_k"],
    )
    scores, exact = attribute(bound, Gradient()), attribute(bound, Exact())
    checked = audit(scores, exact=8, seed=0)
    half = checked.half_widths()
    for name in scores.values:
        assert scores.values[name].abs().max() < 1e-6
        assert exact.values[name].abs().max() > 0.1
        inside = (exact.values[name] - scores.values[name]).abs() <= half[name]
        assert inside.double().mean() >= 0.85


def test_the_heat_map_adds_up_what_it_shows():
    target = target_of(tiny_gpt2())
    clean, patch = pair(examples=24)
    bound = nodes(
        target,
        clean,
        patch,
        ["blocks.0.attn.hook_z", "blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"],
    )
    scores = attribute(bound, IntegratedGradients())
    checked = audit(scores, exact=9)
    table, units = heat(checked), heat(checked, units=True)
    assert table.height == 3 * 5
    assert units.height == 2 * 5 + 2 * 5
    values = scores.values["blocks.0.attn.hook_z"]
    row = table.filter((pl.col("site") == "blocks.0.attn.hook_z") & (pl.col("position") == 2)).row(
        0, named=True
    )
    assert row["score"] == pytest.approx(float(-values[:, 2].sum(1).mean()))
    assert row["bar"] == pytest.approx(
        float(checked.half_widths()["blocks.0.attn.hook_z"][:, 2].sum(1).mean())
    )
    one = units.filter(
        (pl.col("site") == "blocks.0.attn.hook_z")
        & (pl.col("position") == 2)
        & (pl.col("unit") == 1)
    ).row(0, named=True)
    drawn = checked.table.filter(
        (pl.col("group") == "blocks.0.attn.hook_z") & (pl.col("index") == [2, 1])
    )
    assert one["sampled"] == drawn.height
    weight = 1 / drawn["inclusion"].to_numpy()
    assert one["exact"] == pytest.approx(-(weight * drawn["exact"].to_numpy()).sum() / weight.sum())
    bare = heat(scores)
    assert bare["score"].to_list() == table["score"].to_list()
    assert bare["bar"].null_count() == bare.height
    assert heat(checked, effect=False)["score"].to_list() == pytest.approx(
        [-value for value in table["score"]]
    )
    with pytest.raises(InputError, match="no position axis"):
        heat(_without_positions())


def _without_positions():
    bound = nodes(plain_target(), *prompts(examples=20), ["blocks.0.hook_mlp_out"])
    checked = audit(attribute(bound), exact=2)
    checked.scores.values["blocks.0.hook_mlp_out"] = checked.scores.values[
        "blocks.0.hook_mlp_out"
    ].sum(1)
    return checked


def test_circuits_of_edges_run_from_the_patch_run_to_the_model():
    target = target_of(tiny_gpt2())
    clean, patch = pair()
    scores = exact_edges(target, clean, patch)
    table = edge_curve(target, clean, patch, scores, (0.0, 0.1, 0.5, 1.0))
    assert table["faithfulness"][0] == pytest.approx(0, abs=1e-9)
    assert table["faithfulness"][-1] == pytest.approx(1, abs=1e-9)
    assert table["completeness"].to_list()[::3] == pytest.approx([1, 0], abs=1e-9)
    assert table["edges"].is_sorted()
    assert set(areas(table)) == {"cpr", "cmd"}
    keep = edges(target, clean, patch).keep_top(0.3)
    found = edge_faithfulness(target, clean, patch, keep)
    assert found.kept == pytest.approx(0.3, abs=0.01)
    assert found.faithfulness == pytest.approx(
        edge_faithfulness(target, clean, patch, scores.graph.prune(keep)).faithfulness
    )
