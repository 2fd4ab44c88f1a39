"""Certified edits and pruning against points of the boxes that they are about."""

from __future__ import annotations

import pytest
import torch
from laboratories import drawn, small_network

from assay.errors import InputError
from assay.guard import Guard, Observed, Settings, fit
from assay.guard.bounded import (
    certified_interval,
    prune_weights,
    redundant,
    single_edits,
    site,
)

DOMAIN = (torch.zeros(4), torch.ones(4))
NAMES = tuple(f"h[{place}]" for place in range(6))


@pytest.fixture(scope="module")
def model():
    return small_network()


@pytest.fixture(scope="module")
def place(model):
    return site(model, 2, DOMAIN)


def observed(model, inputs) -> Observed:
    values = model[:2](inputs)
    return Observed(values, NAMES, model[2:](values))


def fitted(model, *modes: str) -> tuple[Guard, list[Observed]]:
    parts = [observed(model, drawn(n, seed=seed)) for n, seed in ((300, 1), (150, 2), (150, 3))]
    return fit(*parts, Settings(modes=modes, bins=4, least=10)), parts


def test_ranges_hold_every_activation(model, place):
    values = model[:2](drawn(5000, seed=7)).double()
    assert bool((values >= torch.from_numpy(place.low) - 1e-6).all())
    assert bool((values <= torch.from_numpy(place.high) + 1e-6).all())


def test_the_decision_stays_inside_of_a_certified_interval_and_changes_outside(model, place):
    changed = 0
    for point in model[:2](drawn(5, seed=5)):
        decision = int(model[2:](point).argmax())
        for coordinate in range(6):
            low, high = certified_interval(place, point, coordinate, decision)
            assert low <= float(point[coordinate]) <= high
            moved = point.expand(60, 6).clone()
            moved[:, coordinate] = torch.linspace(low, high, 60)
            assert bool((model[2:](moved).argmax(1) == decision).all())
            outside = point.expand(60, 6).clone()
            outside[:, coordinate] = torch.linspace(0, float(place.high[coordinate]), 60)
            changed += int((model[2:](outside).argmax(1) != decision).sum())
    assert changed > 0  # the intervals exclude something


def test_single_edits_are_found_and_others_are_not(model, place):
    memory = model[:2](drawn(20, seed=5))
    decisions = model[2:](memory).argmax(1).tolist()
    values = memory[:4].clone()
    low, high = certified_interval(place, memory[1], 2, decisions[1])
    values[1, 2] = (low + high) / 2
    values[2, 0] += 0.01
    values[2, 1] += 0.01
    values[3, 3] = torch.nan
    found = single_edits(place, memory, decisions, values)
    assert [(edit.place, edit.memorised, edit.coordinate) for edit in found] == [(1, 1, 2)]
    assert found[0].interval == (low, high)


def test_redundant_activations_change_no_decision_at_any_value(model, place):
    values = model[:2](drawn(40, seed=6))
    decisions = model[2:](values).argmax(1)
    generator = torch.Generator().manual_seed(0)
    free = torch.rand(40, 6, generator=generator) < 0.3
    kept = redundant(place, values, free, decisions.tolist())
    assert 0 < int(kept.sum()) < 40
    low, high = (torch.from_numpy(end).float() for end in (place.low, place.high))
    for row in kept.nonzero()[:, 0].tolist():
        other = low + (high - low) * torch.rand(300, 6, generator=generator)
        moved = torch.where(free[row], other, values[row])
        assert bool((model[2:](moved).argmax(1) == decisions[row]).all())
    dirty = values.clone()
    dirty[0, 0] = torch.nan
    assert not redundant(place, dirty, free, decisions.tolist())[0]


def test_an_edited_laboratory_input_is_accepted_inside_of_its_interval(model, place):
    guard, parts = fitted(model, "single-edit")
    attached = guard.attach(place)
    row = parts[0].values[:1].clone()
    decision = int(parts[0].logits[0].argmax())
    low, high = certified_interval(place, row[0], 2, decision)
    for value, wanted in ((low + 0.3 * (high - low), True), (high + 1.0, False)):
        row[0, 2] = value
        data = Observed(row, NAMES, model[2:](row))
        assert bool(attached(data).accepted[0]) is wanted
        assert not guard(data).accepted.any()  # without bounds nothing is certified
    assert attached(parts[0]).accepted.all()
    with pytest.raises(InputError, match="no place is attached"):
        guard.edits(parts[0])


def test_pruning_accepts_more_and_never_without_a_proof(model, place):
    guard, _ = fitted(model, "constant", "add", "prune")
    new = observed(model, drawn(400, seed=9))
    before, after = guard(new), guard.attach(place)(new)
    assert bool((after.accepted >= before.accepted).all())
    gained = after.accepted & ~before.accepted
    decisions = new.logits.argmax(1).tolist()
    proved = redundant(place, new.values, ~before.explained, decisions)
    assert bool((gained <= proved).all())


def test_places_that_do_not_fit_are_refused(model, place):
    guard, parts = fitted(model, "add", "prune")
    for split, domain, message in (
        (0, DOMAIN, "split must lie between 1 and 4"),
        (5, DOMAIN, "split must lie"),
        (2, (torch.ones(4), torch.zeros(4)), "low <= high"),
        (2, (torch.zeros(4), torch.full((4,), torch.inf)), "a finite box"),
    ):
        with pytest.raises(InputError, match=message):
            site(model, split, domain)
    small = fit(*[part.columns([0, 1]) for part in parts], Settings(bins=3))
    with pytest.raises(InputError, match="6 activations and the guard reads 2"):
        small.attach(place)
    bare = [Observed(part.values, NAMES) for part in parts]
    with pytest.raises(InputError, match="this guard reads no logits"):
        fit(*bare, Settings(bins=3)).attach(place)
    assert guard.attach(place).place is place


def test_weights_go_that_provably_do_nothing():
    model = small_network(seed=3, widths=(4, 8, 8, 3))
    model[0].bias[1] = -50.0  # never active on the domain
    model[2].weight[:, 5] = 0.001 * model[2].weight[:, 5]
    found = prune_weights(model, DOMAIN)
    assert found.inactive == 4 + 8  # what it reads, and what reads it
    assert (found.redundant, found.moved) == (0, 0.0)
    x = drawn(2000, seed=8)
    assert torch.allclose(found.model(x), model(x), atol=1e-6)
    wide = prune_weights(model, DOMAIN, tolerance=0.3)
    moved = float((wide.model(x) - model(x)).abs().max())
    assert wide.redundant >= 8
    assert 0 < moved <= wide.moved <= 0.3
    assert wide.weights == 4 * 8 + 8 * 8 + 8 * 3
    for bad, message in (
        ((torch.nn.Sequential(torch.nn.Tanh()), DOMAIN), "Linear and ReLU only"),
        ((model, DOMAIN, -1.0), "tolerance must be"),
        ((model, DOMAIN, float("nan")), "tolerance must be"),
    ):
        with pytest.raises(InputError, match=message):
            prune_weights(*bad)
