"""Sparse values against dense ones, function by function; every invariant with sparse scores."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import INVARIANTS

from assay.attribution import Gradient, attribute
from assay.core import values as v

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def draw(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=generator, dtype=torch.float64)
    return dense * (torch.rand(shape, generator=generator) < 0.4)


@given(shapes, st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_functions_of_sparse_values_equal_those_of_dense_ones(shape, seed):
    dense = draw(shape, seed)
    sparse = dense.to_sparse().coalesce()
    assert torch.equal(v.dense(sparse), dense)
    torch.testing.assert_close(v.mean(sparse), v.mean(dense))
    torch.testing.assert_close(v.totals(sparse), v.totals(dense))
    other = draw(shape, seed + 1)
    torch.testing.assert_close(v.dense(v.add(sparse, other.to_sparse())), dense + other)
    torch.testing.assert_close(v.add(sparse, other), dense + other)
    for nonzero in (True, False):
        (some, places), (same, same_places) = (
            v.columns(entry, nonzero=nonzero) for entry in (sparse, dense)
        )
        assert torch.equal(places, same_places)
        assert torch.equal(some, same)
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randint(dense[0].numel(), (3, shape[0]), generator=generator)
    index = v.unravel(flat, shape[1:])
    expected = dense.reshape(shape[0], -1).T.gather(0, flat)
    assert torch.equal(v.at(dense, index), expected)
    assert torch.equal(v.at(sparse, index), expected)


@given(shapes, st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_active_rows_hold_every_active_part_once_and_scatter_is_their_inverse(shape, seed):
    dense = draw(shape, seed).abs()
    for sizes in (dense, dense.to_sparse().coalesce()):
        index, mask = v.active_rows(sizes)
        assert int(mask.sum()) == int((dense > 0).sum())
        found = v.at(dense, index)
        assert (found[mask] > 0).all()
        torch.testing.assert_close(v.scatter(shape, index, mask, found), dense)
        keys = torch.rand(v.data(sizes).shape, generator=torch.Generator().manual_seed(seed))
        other, other_mask = v.active_rows(sizes, keys)
        assert torch.equal(mask, other_mask)
        torch.testing.assert_close(v.scatter(shape, other, mask, v.at(dense, other)), dense)


def test_the_first_rows_under_random_keys_are_a_uniform_sample():
    sizes = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 1]])
    counts = torch.zeros(2, 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        index, _ = v.active_rows(sizes, torch.rand(8, generator=generator))
        for example in range(2):
            counts[example, index[0, example, 0]] += 1
    expected = sizes / sizes.sum(1, keepdim=True) * 600
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected / 600)).sqrt()).all()


def test_an_entry_that_is_held_and_zero_is_not_active():
    index = torch.tensor([[0, 0], [1, 2]])
    sizes = torch.sparse_coo_tensor(
        index, torch.tensor([0.0, 1.0]), (1, 4), check_invariants=False
    ).coalesce()
    rows, mask = v.active_rows(sizes)
    assert rows.tolist() == [[[2]]]
    assert mask.tolist() == [[True]]


def test_many_values_become_sparse_and_few_stay_dense(monkeypatch):
    assert not v.compact(draw((3, 4), 0)).is_sparse
    monkeypatch.setattr(v, "DENSE", 5)
    rare = torch.zeros(3, 4)
    rare[1, 2] = 1
    assert v.compact(rare).is_sparse
    assert not v.compact(torch.ones(3, 4)).is_sparse


@pytest.mark.parametrize("case", ["counterfactual", "two sites", "reads earlier", "nodes"])
@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda function: function.__name__)
def test_invariants_hold_with_sparse_scores(invariant, case, monkeypatch):
    monkeypatch.setattr(v, "DENSE", 0)
    monkeypatch.setattr(v, "SHARE", 1.0)
    assert any(entry.is_sparse for entry in attribute(CASES[case](), Gradient()).values.values())
    invariant(CASES[case])


def test_tables_of_sparse_scores_are_those_of_dense_ones(monkeypatch):
    whole = attribute(CASES["counterfactual"]())
    monkeypatch.setattr(v, "DENSE", 0)
    monkeypatch.setattr(v, "SHARE", 1.0)
    sparse = attribute(CASES["counterfactual"]())
    assert all(entry.is_sparse for entry in sparse.values.values())
    assert sparse.table().equals(whole.table())
    assert sparse.top(3).equals(whole.top(3))
    for name, mean in sparse.mean().items():
        torch.testing.assert_close(mean, whole.mean()[name])
