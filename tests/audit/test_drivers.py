"""What drives AtP, against brute force; and restoration of clean parts."""

from __future__ import annotations

import cases
import numpy as np
import polars as pl
import pytest
import torch

from assay.attribution import Exact, attribute
from assay.audit.drivers import by_node, measure_drivers, with_effects
from assay.audit.restoration import Restoration, restore
from assay.audit.trends import (
    missed_by_threshold,
    rank_with_layer,
    relative_sizes,
    shape_of,
    shares_of_variance,
)
from assay.errors import InputError


def test_the_three_factors_are_those_of_brute_force():
    bound = cases.CASES["features"]()
    table = with_effects(measure_drivers(bound), attribute(bound, Exact()), "exact")
    scores, exact = attribute(bound), attribute(bound, Exact())
    model = bound.target
    x = model.model.blocks[0](model.model.embed(bound.batch.inputs)).detach().requires_grad_()
    out = model.model.head(model.model.blocks[2](model.model.blocks[1](x))).mean(1)
    (gradient,) = torch.autograd.grad((out[:, 0] - 0.3 * out[:, 1] ** 2).sum(), x)
    parts = dict(bound.clean_parts())["blocks.0"]
    vectors = {
        "blocks.0 error": parts["blocks.0 error"].vectors[:, :, None],
        "blocks.0": parts["blocks.0"].coefficients[..., None] * parts["blocks.0"].atoms,
    }
    for row in table.filter(pl.col("group").is_in(list(vectors))).iter_rows(named=True):
        place = (row["example"], *row["index"])
        own = place if len(place) == 3 else (*place, 0)
        part = -vectors[row["group"]][own].detach()  # what the patch adds
        slope = gradient[place[:2]]
        assert row["norm"] == pytest.approx(float(part.norm()))
        assert row["gradient_norm"] == pytest.approx(float(slope.norm()))
        assert row["atp"] == pytest.approx(float(part @ slope))
        assert row["cosine"] == pytest.approx(
            float(torch.nn.functional.cosine_similarity(part, slope, dim=0))
        )
        assert row["atp"] == pytest.approx(-float(scores.values[row["group"]][place]))
        assert row["exact"] == pytest.approx(-float(exact.values[row["group"]][place]))
    active = sum(int((norm != 0).sum()) for norm in bound.norms().values())
    assert table.height == active


def test_some_rows_are_those_of_all():
    bound = cases.CASES["features"]()
    table = measure_drivers(bound, ["blocks.0"])
    some = table[::3]
    again = measure_drivers(bound, ["blocks.0"], {"blocks.0": some})
    assert again.equals(some)


def test_heads_and_groups_of_several_sites_are_refused():
    with pytest.raises(InputError, match="whole positions"):
        measure_drivers(cases.CASES["nodes"]())
    with pytest.raises(InputError, match="several sites"):
        measure_drivers(cases.CASES["features, transcoders"]())


def table_of(**columns) -> pl.DataFrame:
    count = len(next(iter(columns.values())))
    plain = {"example": list(range(count)), "group": ["a"] * count, "kind": ["mlp"] * count}
    plain |= {"index": [[0]] * count, "position": [0] * count, "layer": [0] * count}
    return pl.DataFrame({**plain, **columns})


def drawn(count: int = 400, seed: int = 0) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(seed)
    norm, slope = np.exp(chance.normal(0, 1, count)), np.exp(chance.normal(0, 2, count))
    cosine = np.clip(np.exp(chance.normal(-2, 0.5, count)), 0, 1) * chance.choice([-1, 1], count)
    return {"norm": norm, "gradient_norm": slope, "cosine": cosine, "atp": norm * slope * cosine}


def test_shares_of_variance_are_those_of_independent_terms():
    found = shares_of_variance(table_of(**drawn(20_000)), "kind").row(0, named=True)
    total = 1 + 4 + 0.25
    assert found["norm"] == pytest.approx(1 / total, abs=0.02)
    assert found["gradient_norm"] == pytest.approx(4 / total, abs=0.03)
    assert found["norm"] + found["gradient_norm"] + found["cosine"] == pytest.approx(1)
    flat = table_of(norm=[1.0, 1.0], gradient_norm=[1.0, 1.0], cosine=[0.5, 0.5], atp=[0.5, 0.5])
    assert shares_of_variance(flat, "kind")["norm"].to_list() == [None]


def test_cosines_of_means_weigh_by_size():
    table = table_of(norm=[1.0, 3.0], gradient_norm=[1.0, 1.0], cosine=[1.0, -1.0], atp=[1.0, -3.0])
    found = by_node(table).row(0, named=True)
    assert found["cosine"] == 0
    assert found["cosine_of_means"] == pytest.approx(-1 / 2)
    assert found["n"] == 2


@pytest.mark.parametrize(
    ("power", "verdict"),
    [((1.0, 1.0), "rising"), ((1.0, -1.0), "peaked"), ((-1.0, -1.0), "falling"), ((0, 0), None)],
)
def test_the_shape_of_two_lines_is_found(power, verdict):
    chance = np.random.default_rng(1)
    x = chance.normal(0, 1, 600)
    y = np.where(x < 0, power[0] * x, power[1] * x) + chance.normal(0, 0.2, 600)
    table = table_of(norm=np.exp(x), atp=np.exp(y)).with_columns(pl.col("example") % 40)
    found = shape_of(table)
    assert found is not None
    if verdict is None:
        assert found.below[1] <= 0 <= found.below[2] or found.above[1] <= 0 <= found.above[2]
    else:
        assert found.verdict == verdict
        assert found.below[0] == pytest.approx(power[0], abs=0.15)
        assert found.above[0] == pytest.approx(power[1], abs=0.15)
    flat = table.with_columns(norm=pl.when(pl.col("example") % 2 == 1).then(1.0).otherwise("norm"))
    nothing = shape_of(flat)
    assert nothing is None or nothing.verdict == "undecided"
    assert shape_of(table.head(10)) is None


def test_ranks_and_ratios_by_layer():
    layers = [0, 0, 1, 1, 2, 2]
    table = table_of(
        norm=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], gradient_norm=[2.0] * 6, atp=[1.0] * 6
    ).with_columns(layer=pl.Series(layers), kind=pl.Series(["attention", "mlp"] * 3))
    found = rank_with_layer(table, ("norm", "gradient_norm"), "kind")
    assert found["norm"].to_list() == [pytest.approx(1.0)] * 2
    assert found["gradient_norm"].to_list() == [None, None]
    ratios = relative_sizes(table, "attention")
    assert ratios["norm_ratio"].to_list() == [pytest.approx(r) for r in (1 / 2, 3 / 4, 5 / 6)]
    assert ratios["gradient_norm_ratio"].to_list() == [pytest.approx(1.0)] * 3


def test_ratios_are_the_same_to_the_last_bit_in_every_call():
    chance = np.random.default_rng(0)
    table = table_of(
        **{name: chance.random(20_000) for name in ("norm", "gradient_norm", "atp")}
    ).with_columns(
        layer=pl.Series(chance.integers(0, 4, 20_000)),
        kind=pl.Series(np.where(chance.random(20_000) < 0.4, "attention", "mlp")),
    )
    found = {tuple(relative_sizes(table, "attention")["norm_ratio"]) for _ in range(100)}
    assert len(found) == 1


def test_missed_nodes_have_their_reasons():
    others = {"norm": [1.0] * 8, "gradient_norm": [1.0] * 8, "cosine": [0.5] * 8}
    table = table_of(
        norm=[1e-3, 1e3, 1.0, 1.0, *others["norm"]],
        gradient_norm=[1e3, 1e-3, 1.0, 1.0, *others["gradient_norm"]],
        cosine=[0.01, 0.5, 1e-4, 0.9, *others["cosine"]],
        atp=[0.01, -0.02, 0.0, 5.0, *[0.5] * 8],
        exact=[2.0, -1.0, 1.5, 5.0, *[0.01] * 8],
    )
    found = missed_by_threshold(table, 0.1)
    assert found["exact"].to_list() == [2.0, 1.5, -1.0]
    assert found["reason"].to_list() == [
        "large gradient, small difference",
        "small cosine",
        "small gradient, large difference",
    ]


def test_restored_parts_have_their_clean_values():
    bound = cases.CASES["features"]()
    off = bound.full(0.0, ["blocks.0", "blocks.0 error"])
    every = {name: torch.ones_like(bound.ones([name])[name]).bool() for name in bound.groups}
    later = {name: every[name] for name in ("blocks.1", "blocks.1 error")}
    # All parts of a later site, with the base the same in both runs, are the clean value there.
    found = restore(bound, off, later)
    torch.testing.assert_close(found.restored, found.clean)
    assert torch.equal(found.ablated, bound.values(off).detach().double())
    nothing = restore(bound, off, {})
    assert torch.equal(nothing.restored, nothing.ablated)
    # A restored part that was ablated itself is back.
    own = restore(bound, off, {name: every[name] for name in off})
    torch.testing.assert_close(own.restored, own.clean)
    unchanged = restore(bound, {}, later).recovered()
    assert (unchanged.estimate, unchanged.low, unchanged.high) == (None, None, None)
    assert "not clear of zero" in unchanged.reason


def test_a_share_that_is_recovered_may_be_negative_and_has_an_interval():
    generator = torch.Generator().manual_seed(0)
    lost = 1 + 0.5 * torch.randn(200, generator=generator, dtype=torch.float64)
    back = -0.3 * lost + 0.1 * torch.randn(200, generator=generator, dtype=torch.float64)

    def share(returned, unit, some=slice(None)):
        found = Restoration(lost[some], torch.zeros_like(lost[some]), returned[some], unit)
        return found.recovered()

    every = np.arange(200)
    for gate in (0.0, 1.0):
        assert share(gate * lost, every).estimate == gate
    assert share(back, every).covers(-0.3)
    assert share(back, every).width < 0.1
    # Copies of inputs are no further observations.
    twice = torch.cat([lost, lost]), torch.cat([back, back])
    copied = Restoration(twice[0], 0 * twice[0], twice[1], np.arange(400) % 200).recovered()
    assert copied.width == pytest.approx(share(back, every).width)
    for one in (share(back, 0 * every), share(back, every[:1], slice(0, 1))):
        assert one.estimate is None
        assert "one input" in one.reason
