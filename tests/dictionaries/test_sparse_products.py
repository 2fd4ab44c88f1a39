"""Sparse products against dense autograd in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.dictionaries import sparse


@settings(deadline=None, max_examples=25)
@given(
    positions=st.integers(1, 7),
    width=st.integers(1, 5),
    size=st.integers(1, 9),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_values_and_derivatives_are_those_of_dense_products(positions, width, size, share, seed):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    x, W_enc, b_enc, W_dec = (
        drawn(positions, width),
        drawn(width, size),
        drawn(size),
        drawn(size, 3),
    )
    mask = torch.rand(positions, size, generator=generator) < share
    weights = torch.randn(positions, 3, generator=generator, dtype=torch.float64)
    centre = drawn(width)
    before = (x - centre) @ W_enc + b_enc
    dense = (before * mask) @ W_dec
    expected = torch.autograd.grad((dense * weights).sum(), (x, centre, W_enc, b_enc, W_dec))
    active = sparse.active_where(mask)
    known = active.values_of(before.detach())
    values = sparse.take_before(x, centre, W_enc, b_enc, known, active)
    found = sparse.decode(values, W_dec, active)
    assert torch.allclose(found, dense)
    gradients = torch.autograd.grad((found * weights).sum(), (x, centre, W_enc, b_enc, W_dec))
    for one, other in zip(gradients, expected, strict=True):
        assert torch.allclose(one, other)
    assert active.counts.tolist() == mask.sum(0).tolist()
    assert active.share == pytest.approx(float(mask.double().mean()))


def test_a_part_of_a_pattern_keeps_its_positions():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 8, generator=generator) < 0.5
    active = sparse.active_where(mask)
    even = sparse.active_where(mask & (torch.arange(8) % 2 == 0))
    chosen = active.chosen(active.features % 2 == 0)
    assert torch.equal(chosen.offsets, even.offsets)
    assert torch.equal(chosen.features, even.features)
    at = sparse.active_at(torch.tensor([[3, 1], [0, 2]]), 4)
    assert at.rows.tolist() == [0, 0, 1, 1]
    assert at.offsets.tolist() == [0, 2, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("threads", [0, 2])
def test_the_largest_of_rows_are_those_of_a_sort(dtype, threads, monkeypatch):
    monkeypatch.setattr(sparse, "THREADS", threads)
    monkeypatch.setattr(sparse, "BLOCK", 100)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(37, 30, generator=generator).to(dtype)
    sizes[3] = 1.0  # all alike
    sizes[5, :4] = torch.inf
    sizes[7] = -torch.inf
    sizes[9, 2] = torch.nan
    for k in (1, 5, 30):
        found = sparse.largest(sizes, k)
        assert found.shape == (37, k)
        assert all(len(set(row)) == k for row in found.tolist())
        assert 2 in found[9]
        ours = sizes.gather(1, found).sort(1).values
        expected = sizes.sort(1).values[:, 30 - k :]
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    assert sparse.largest(sizes[:0], 3).shape == (0, 3)
    # A tie in one row does not make up for a NaN in another.
    mixed = torch.tensor([[1.0, 1.0, 0.0], [torch.nan, 5.0, 0.0]], dtype=dtype)
    assert sparse.largest(mixed, 1)[1].tolist() == [0]
