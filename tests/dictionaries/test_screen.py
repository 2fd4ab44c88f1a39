"""Screening in bfloat16 chooses what the dense product chooses."""

from __future__ import annotations

import pytest
import torch

from assay.dictionaries import architecture, screen
from assay.dictionaries.codes import codes_of, rebuild
from assay.dictionaries.initial import initialise
from assay.dictionaries.settings import Training


def drawn(positions=60, width=40, size=1024, seed=0):
    """Vectors and an encoder in which features stand in close pairs, closer than bfloat16 tells."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(positions, width, generator=generator)
    W = torch.randn(width, size // 2, generator=generator)
    W = torch.cat([W, W + 1e-4 * torch.randn(W.shape, generator=generator)], 1)
    b = 0.3 * torch.randn(size, generator=generator)
    return x * 3, W, b


@pytest.mark.parametrize("k", [1, 7, 24])
def test_the_largest_features_are_those_of_the_dense_product(k, monkeypatch):
    monkeypatch.setattr(screen, "MOST", 1.0)
    x, W, b = drawn()
    exact = x.double() @ W.double() + b.double()
    active, values = screen.largest(x, W, b, k)
    chosen = active.features.reshape(len(x), k)
    assert [len(set(row)) for row in chosen.tolist()] == [k] * len(x)
    found = exact.gather(1, chosen).sort(1).values
    assert torch.allclose(found, exact.topk(k).values.flip(1), atol=1e-5)
    assert torch.allclose(values.reshape(len(x), k), exact.gather(1, chosen).float(), atol=1e-4)


def test_the_product_errs_by_less_than_its_bound(monkeypatch):
    """With a limit at minus infinity nothing is left out; with one that every group's largest
    reaches, nothing above it is.
    """
    monkeypatch.setattr(screen, "MOST", 1.0)
    x, W, b = drawn()
    exact = x.double() @ W.double() + b.double()
    lows = []

    def limit(below):
        lows.append(below)
        return below.amin(1, keepdim=True)

    active, _ = screen.likely(x, W, b, limit)
    tops = exact.view(len(x), screen.GROUP, -1).amax(1)
    assert bool((lows[0].double() <= tops).all())
    likely = torch.zeros(exact.shape, dtype=torch.bool)
    likely[active.rows, active.features] = True
    above = exact >= lows[0].double().amin(1, keepdim=True)
    assert bool(likely[above].all())
    assert float(likely.double().mean()) < 0.9


def test_where_it_does_not_pay_the_product_is_dense():
    x, W, b = drawn()
    assert screen.largest(x, W, b, k=200) is None  # more than there are groups
    assert screen.largest(x, W * 0, b * 0, k=3) is None  # everything is as large
    assert screen.largest(x * float("nan"), W, b, k=3) is None
    assert not screen.pays(x, 2048)
    assert not screen.pays(x.double().repeat(1, 10), 2048)


def test_a_training_step_is_the_same_with_and_without(monkeypatch):
    dictionary = architecture("topk")(40, 2048, k=5)
    initialise(dictionary, torch.Generator().manual_seed(0))
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    parameters = [x, *dictionary.parameters()]

    def step(screened):
        monkeypatch.setattr(screen, "pays", lambda *given: screened)
        monkeypatch.setattr(screen, "MOST", 1.0)
        found = codes_of(dictionary, x, [50], Training())
        out = rebuild(dictionary, found, x)
        return [out, *torch.autograd.grad((out - x.detach()).square().sum(), parameters)]

    for one, other in zip(step(True), step(False), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
