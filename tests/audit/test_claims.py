"""What a graph implies, against networks whose effects are known; and what counts as holding."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.audit.claims import implied_effects, influences, judge
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


def rows(claimed, exact, sampled=None):
    return pl.DataFrame(
        {"claimed": claimed, "exact": exact, "sampled": sampled or [False] * len(claimed)},
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
    claimed = generator.normal(size=400)
    truth = claimed + generator.normal(size=400)
    truth[:20] += 9  # those that are listed say nothing of the others
    exact = [value if place < 120 else None for place, value in enumerate(truth)]
    found = judge(rows(claimed.tolist(), exact, [20 <= place < 120 for place in range(400)]))
    bar = found.table["bar"].to_list()
    assert bar[:120] == [0.0] * 120
    residuals = np.sort(np.abs(truth - claimed)[20:120])
    assert set(bar[120:]) == {residuals[90]}  # the 91st of 100
    covered = np.abs(truth - claimed)[120:] <= bar[-1]
    assert 0.82 < covered.mean() < 0.98
    assert found.table["holds"][200] is None


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
