"""Counting: cells partition the inputs, and weights of sets agree with enumeration."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import draw, members, sequences

from assay.errors import InputError
from assay.proofs.max_of_k import cells
from assay.proofs.max_of_k.cells import Measure
from assay.proofs.max_of_k.strategies import brute
from assay.proofs.max_of_k.strategies.base import Problem


def all_inputs(V: int, K: int) -> np.ndarray:
    return np.stack(np.meshgrid(*[np.arange(V)] * K, indexing="ij"), -1).reshape(-1, K)


@pytest.mark.parametrize(("V", "K"), [(1, 2), (2, 2), (3, 4), (5, 3), (4, 5), (64, 4), (128, 20)])
def test_cells_partition_the_inputs(V: int, K: int) -> None:
    assert cells.weigh(cells.everything(V, K)) == V**K == cells.total(V, K)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(2, 5),
    st.integers(2, 4),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
)
def test_weights_agree_with_enumeration(
    seed: int, V: int, K: int, families: int, weighted: bool, chosen: bool
) -> None:
    rng = np.random.default_rng(seed)
    sets = cells.normal(rng.random((families, V, V, K, V)) < 0.6)
    measure = Measure(
        "some",
        rng.integers(0, 4, size=(K, V)) if weighted else None,
        rng.random((V, V, K)) < 0.5 if chosen else None,
    )
    tokens = all_inputs(V, K)
    weights = np.ones(len(tokens), int)
    if measure.tokens is not None:
        weights = np.prod([measure.tokens[p, tokens[:, p]] for p in range(K)], axis=0)
    if measure.cells is not None:
        m = tokens.max(1)
        weights = weights * measure.cells[tokens[:, -1], m, (tokens[:, :-1] < m[:, None]).sum(1)]
    assert cells.weigh(sets, measure) == weights[members(sets, tokens)].sum()
    assert cells.total(V, K, measure) == weights.sum()


def test_brute_force_weighs_like_cells() -> None:
    rng = np.random.default_rng(0)
    w = draw(2, "rough")
    V, K = w.vocabulary, w.positions
    right = brute.table(Problem(w, "real").tables)
    tokens = sequences(w)
    inside = right[(tokens[:, -1], *tokens[:, :-1].T)]
    measure = Measure("some", rng.integers(0, 5, size=(K, V)), rng.random((V, V, K)) < 0.5)
    everything = np.ones_like(right)
    assert brute.weigh(everything, measure) == cells.total(V, K, measure)
    assert brute.weigh(right) == inside.sum()


def test_bounds_are_exact_fractions() -> None:
    sets = cells.everything(7, 3)
    sets[0, 0, 6, 1] = False
    assert cells.bound(sets) == Fraction(7**3 - 2 * 6, 7**3)


def test_measures_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="integers"):
        Measure("half", np.full((2, 3), 0.5))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="shape"):
        cells.total(4, 2, Measure("other", np.ones((2, 3), np.int64)))
    with pytest.raises(InputError, match="two families"):
        cells.weigh(np.zeros((3, 2, 2, 2, 2), bool))
