"""What a graph implies, against networks whose effects are known; and what counts as holding."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.audit.claims import implied_effects, influences, judge
from assay.audit.strata import draw_by_rank, least_sample, strata_of_links
from assay.errors import InputError


@given(seed=st.integers(0, 10_000), count=st.integers(2, 8))
def test_a_linear_network_does_what_its_edges_imply(seed, count):
    generator = np.random.default_rng(seed)
    jacobian = np.triu(generator.normal(size=(count, count)), 1)
    jacobian *= generator.random((count, count)) < 0.6
    given_ = generator.normal(size=count)  # what each node gets from outside of the graph

    def run(removed=None):
        values = np.zeros(count)
        for node in range(count):
            values[node] = given_[node] + values[:node] @ jacobian[:node, node]
            values[node] *= node != removed
        return values

    clean = run()
    links = [
        (str(source), str(target), clean[source] * jacobian[source, target])
        for source, target in zip(*jacobian.nonzero(), strict=True)
    ]
    activations = {str(node): clean[node] for node in range(count)}
    found = implied_effects(links, str(count - 1), activations)
    for node in range(count - 1):
        expected = clean[-1] - run(node)[-1]
        assert found.get(str(node), 0.0) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_influence_is_what_normalised_paths_add_up_to():
    links = [("a", "b", 3.0), ("c", "b", -1.0), ("b", "out", 2.0), ("a", "out", -2.0)]
    links.append(("b", "other", 5.0))
    found, of_links = influences(links, {"out": 0.6, "other": 0.1})
    assert found["b"] == pytest.approx(0.5 * 0.6 + 0.1)
    assert found["a"] == pytest.approx(0.75 * found["b"] + 0.5 * 0.6)
    assert of_links == pytest.approx([0.75 * 0.4, 0.25 * 0.4, 0.3, 0.3, 0.1])


def test_links_that_form_a_circle_are_refused():
    with pytest.raises(InputError, match="circle through"):
        implied_effects([("a", "b", 1.0), ("b", "a", 1.0), ("b", "out", 1.0)], "out", {})


def rows(claimed, exact, sampled=None, strata=None):
    return pl.DataFrame(
        {
            "claimed": claimed,
            "exact": exact,
            "sampled": sampled or [False] * len(claimed),
            "stratum": strata or [0] * len(claimed),
        },
        schema_overrides={"exact": pl.Float64},
    )


def test_holding_asks_for_sign_and_size():
    found = judge(rows([1.0, 1.0, 1.0, 1.0, 0.0], [1.2, 1.5, -1.0, 0.01, 0.0]), top=3)
    assert found.table["right_sign"].to_list() == [True, True, False, True, True]
    assert found.table["holds"].to_list() == [True, False, False, False, True]
    assert found.table["survives"].to_list() == [True, True, True, False, False]
    summary = found.summary()
    assert (summary["listed"], summary["hold"], summary["right_sign"]) == (3, 1, 2)
    assert "1 of the top 3 nodes hold exactly" in found.sentence("nodes")
    assert summary["agreement"]["n"] == 5


def test_rows_that_were_not_measured_have_the_bar_of_a_random_sample():
    generator = np.random.default_rng(0)
    claimed = np.sign(generator.normal(size=400))
    truth = claimed + generator.normal(size=400)
    truth[:20] += 9  # those that are listed say nothing of the others
    exact = [value if place < 120 else None for place, value in enumerate(truth)]
    sampled = [20 <= place < 120 for place in range(400)]
    found = judge(rows(claimed.tolist(), exact, sampled))
    bar = found.table["bar"].to_list()
    assert bar[:120] == [0.0] * 120
    residuals = np.sort(np.abs(truth - claimed)[20:120])
    assert set(bar[120:]) == {residuals[90]}  # the 91st of 100
    covered = np.abs(truth - claimed)[120:] <= bar[-1]
    assert 0.82 < covered.mean() < 0.98
    assert found.table["holds"][200] is None
    # A bar is of a row's own stratum, and as wide as its claim is large.
    halves = [None] * 20 + [place % 2 for place in range(380)]
    claimed[120:200] *= 3.0
    parts = judge(rows(claimed.tolist(), exact, sampled, halves)).table["bar"].to_list()
    floor = np.median(np.abs(claimed[20::2]))
    own = np.sort(np.abs(truth - claimed)[20:120:2]) / floor
    assert [parts[300], parts[120]] == pytest.approx([own[45], 3 * own[45]])  # the 46th of 50
    assert len({round(bar, 9) for bar in parts[120:]}) == 4
    halves[300] = None  # drawn like none
    alone = judge(rows(claimed.tolist(), exact, sampled, halves)).table["bar"]
    assert alone[300] is None
    assert alone[301] == pytest.approx(parts[301])


def test_claims_of_zero_have_a_bar():
    exact = [float(place) for place in range(20)]
    found = judge(rows([0.0] * 25, [*exact, *[None] * 5], [True] * 20 + [False] * 5))
    assert found.table["bar"][-1] == 18.0


@pytest.mark.parametrize("size", [60, 200])
def test_bars_hold_at_the_top_of_what_was_not_measured(size):
    """Where claims and their errors fall with the rank, nine in ten bars hold over all rows without
    an exact effect, and of the first 25; without strata those of the first are too narrow.
    """
    generator = np.random.default_rng(0)
    names = ("all", "first", "plain")
    held = {name: [] for name in names}
    for repetition in range(60):
        scale = 1 / (5 + np.arange(600))
        claimed = scale * generator.normal(size=600)
        truth = claimed + scale * generator.normal(size=600)
        strata = draw_by_rank(600, size, 0.1, repetition)
        assert len(strata.drawn) == size
        sampled = [place in strata.drawn for place in range(600)]
        exact = [value if here else None for value, here in zip(truth, sampled, strict=True)]
        bars = judge(rows(claimed.tolist(), exact, sampled, strata.stratum.tolist())).table["bar"]
        left = ~np.array(sampled)
        miss = np.abs(truth - claimed)
        inside = (miss <= bars.to_numpy())[left]
        narrow = np.quantile(generator.choice(miss, size), 0.9)
        for name, some in zip(names, (inside, inside[:25], miss[left][:25] <= narrow), strict=True):
            held[name].append(some.mean())
    for name in names[:2]:
        assert np.mean(held[name]) > 0.87
    assert np.mean(held["plain"]) < 0.7


@given(count=st.integers(0, 300), size=st.integers(-3, 400), alpha=st.sampled_from([0.05, 0.1]))
def test_strata_are_runs_of_ranks_that_share_what_is_drawn(count, size, alpha):
    found = draw_by_rank(count, size, alpha, 0)
    assert len(found.stratum) == count
    assert len(found.drawn) == max(0, min(size, count))
    assert (np.diff(found.stratum) >= 0).all()
    for one in np.unique(found.stratum):
        inside = np.flatnonzero(found.stratum == one)
        hits = sum(place in found.drawn for place in inside.tolist())
        enough = hits >= least_sample(alpha) or hits == len(inside)
        assert enough or len(np.unique(found.stratum)) == 1


def test_links_of_a_stratum_have_sources_of_one_and_one_link_of_each():
    nodes = draw_by_rank(200, 90, 0.1, 0)
    generator = np.random.default_rng(1)
    sources = [None if one >= 200 else int(one) for one in 210 * generator.random(4000) ** 2]
    found, drawn = strata_of_links(sources, nodes, 0.1, 0)
    assert [one is None for one in found] == [source is None for source in sources]
    cells = {}
    for place, (cell, source) in enumerate(zip(found, sources, strict=True)):
        if cell is not None:
            cells.setdefault(cell, []).append((place, source))
    assert len(cells) > len(np.unique(nodes.stratum))
    for links in cells.values():
        assert len({nodes.stratum[source] for _, source in links}) == 1
        here = [source for place, source in links if place in drawn]
        assert sorted(here) == sorted({source for _, source in links} & nodes.drawn)


def test_too_small_a_sample_gives_no_bar_and_nothing_measured_is_refused():
    found = judge(rows([1.0, 2.0, 3.0], [1.0, 2.0, None], [False, True, False]))
    assert found.table["bar"].to_list() == [0.0, 0.0, None]
    with pytest.raises(InputError, match="no claim was measured"):
        judge(rows([1.0], [None]))


def test_the_circle_that_is_named_is_one():
    links = [("token", "a", 1.0), ("a", "b", 1.0), ("b", "a", 1.0), ("b", "out", 1.0)]
    with pytest.raises(InputError, match=r"circle through '[ab]'"):
        influences(links, {"out": 1.0})


def test_weights_whose_sum_overflows_are_named():
    links = [("a", "out", 1e308), ("b", "out", 1e308), ("c", "a", 1.0)]
    with pytest.raises(InputError, match="links at 'out' add up to inf"):
        influences(links, {"out": 1.0})
    links = [("a", "out", 1e308), ("b", "a", 1e308)]
    with pytest.raises(InputError, match="links at 'b' add up to inf"):
        implied_effects(links, "out", {"a": 1e-3})
