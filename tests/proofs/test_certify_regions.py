"""Claims over inputs and over references, beside brute force over corners and random points."""

from __future__ import annotations

import functools
from pathlib import Path

import cases
import pytest
import torch
from test_certify_gates import few_free
from torch import Tensor

import assay_check
from assay.bounds.search.leaves import Budget
from assay.core.mechanisms import Mechanisms
from assay.errors import InputError
from assay.proofs.boxed import boxed
from assay.proofs.gates import certify

QUICK = Budget(seconds=0.3, whole=0, steps=(5, 3))
LOW, RADIUS = 0.4, 0.05


@functools.cache
def one(name: str) -> Mechanisms:
    return cases.CASES[name]().take(slice(0, 1))


def points(
    mechanisms: Mechanisms, keep: dict[str, Tensor], count: int
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Return gates and inputs at corners and inside the region."""
    generator = torch.Generator().manual_seed(0)
    narrowed, x, found = boxed(mechanisms, LOW), mechanisms.batch.inputs, []
    for index in range(count):
        gates = {}
        for name, one_ in mechanisms.ones().items():
            share = torch.rand(one_.shape, generator=generator, dtype=torch.float64).to(one_)
            share = share.round() if index % 2 else share
            free = narrowed.lows[name] + share * (1 - narrowed.lows[name])
            gates[name] = torch.where(keep[name], one_, free)
        share = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
        share = share.round() if index % 2 else share
        found.append((gates, x + RADIUS * (2 * share - 1)))
    return found


@torch.no_grad()
def damages(mechanisms: Mechanisms, keep: dict[str, Tensor], count: int = 64) -> Tensor:
    """Damages against the untouched network on the same input."""
    found, target = [], mechanisms.target
    for gates, x in points(mechanisms, keep, count):
        here = boxed(mechanisms, LOW).on(x, {})
        full, value = target.values(here.batch).double(), here.values(gates).double()
        found.append(target.damage(full, value))
    return torch.stack(found)


@pytest.mark.parametrize(
    "name",
    [
        "channels",
        pytest.param("components", marks=pytest.mark.slow),
        pytest.param("channels, norms", marks=pytest.mark.slow),
    ],
)
def test_no_input_and_no_gate_leaves_the_bracket(name: str, tmp_path: Path) -> None:
    mechanisms = one(name)
    keep = few_free(mechanisms, 4)
    path = tmp_path / "cert.json"
    found = certify(mechanisms, keep, low=LOW, radius=RADIUS, budget=QUICK, certificate=path)
    seen = damages(mechanisms, keep)
    assert bool((seen <= found.proved.values + 1e-9).all())
    assert float(found.found.values) <= float(found.proved.values)
    # The search from below moves the inputs too: it is no worse than the random points.
    assert float(found.found.values) >= float(seen.max()) - 1e-9
    still = certify(mechanisms, keep, low=LOW, budget=QUICK)
    assert float(found.found.values) >= float(still.found.values) - 1e-9
    assert "every input entry moves by up to 0.05" in found.proved.assumptions[-1]
    gates, (x,) = found.found.gates[0], found.found.elsewhere[0].values()
    with torch.no_grad():
        here = boxed(mechanisms, LOW).on(x, {})
        again = mechanisms.target.damage(
            mechanisms.target.values(here.batch), here.values(gates)
        ).double()
    assert float(again) == pytest.approx(float(found.found.values), abs=1e-6)
    verdict = assay_check.check(path)
    assert verdict.accepted, verdict.reason
    assert "numbers of inputs move, by up to 0.1" in verdict.measure
    assert "than ungated on that input" in verdict.measure


@pytest.mark.slow
def test_one_trace_of_both_networks_is_tighter_than_two() -> None:
    """The damage over inputs is far below the swing of the metric that inputs alone make."""
    mechanisms = one("channels")
    keep = few_free(mechanisms, 2)
    found = certify(mechanisms, keep, low=0.9, radius=0.01, budget=QUICK)
    with torch.no_grad():
        values = torch.cat(
            [
                mechanisms.target.values(boxed(mechanisms, None).on(x, {}).batch).double()
                for _, x in points(mechanisms, keep, 32)
            ]
        )
    assert float(found.proved.values) < 0.5 * float(values.max() - values.min())


@pytest.mark.slow
def test_the_same_answer_over_inputs() -> None:
    mechanisms = one("channels")
    keep = few_free(mechanisms, 2)
    near = certify(
        mechanisms,
        keep,
        low=0.9,
        claim="same-answer",
        radius=0.01,
        domain=(-9.0, 9.0),
        budget=QUICK,
    )
    assert bool(near.certified.all())
    far = certify(mechanisms, keep, claim="same-answer", radius=30.0, budget=QUICK)
    assert not bool(far.certified.any())


@pytest.mark.slow
def test_references_range_over_those_of_the_data(tmp_path: Path) -> None:
    whole = cases.CASES["nodes"]()
    mechanisms = whole.take(slice(0, 1))
    keep = few_free(mechanisms, 3)
    path = tmp_path / "cert.json"
    budget = Budget(seconds=3, whole=2, steps=(5, 3))
    wide = certify(mechanisms, keep, low=0.8, references=whole, budget=budget, certificate=path)
    narrow = certify(mechanisms, keep, low=0.8, budget=budget)
    assert float(wide.proved.values) >= float(narrow.found.values)
    moved, hull = mechanisms.references(whole)
    generator = torch.Generator().manual_seed(0)
    narrowed = boxed(moved, 0.8)
    with torch.no_grad():
        full = moved.values().double()
        for index in range(40):
            values = {}
            for name, (least, most) in hull.items():
                share = torch.rand(least.shape, generator=generator).to(least)
                values[name] = least + (share.round() if index % 2 else share) * (most - least)
            gates = {
                name: torch.where(keep[name], gate, torch.full_like(gate, 0.8))
                for name, gate in moved.ones().items()
            }
            found = narrowed.on(moved.batch.inputs, values).values(gates).double()
            damage = moved.target.damage(full, found)
            assert float(damage) <= float(wide.proved.values) + 1e-9
    verdict = assay_check.check(path)
    assert verdict.accepted, verdict.reason
    assert "numbers of references move" in verdict.measure


def test_references_of_the_examples_lie_in_their_hull() -> None:
    whole = cases.CASES["nodes"]()
    mechanisms = whole.take(slice(0, 1))
    _, hull = mechanisms.references(whole)
    for name, (least, most) in hull.items():
        for spot in (whole.spots[name], mechanisms.spots[name]):  # type: ignore[attr-defined]
            value = spot.base.expand(*spot.active.shape, spot.width)
            inside = (least <= value) & (value <= most) | ~spot.active[..., None]
            assert bool(inside.all())


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("channels", {"radius": -1.0}, "radius: a finite number >= 0 is needed"),
        ("channels", {"radius": float("nan")}, "radius: a finite number >= 0 is needed"),
        ("channels", {"domain": (0.0, 1.0)}, "give radius= too"),
        ("channels", {"radius": 0.1, "domain": (50.0, 51.0)}, "outside the domain"),
        ("nodes", {"radius": 0.1}, "one tensor of floating-point numbers"),
        ("fixed", {"radius": 0.1}, "were fixed when they were bound"),
    ],
)
def test_inputs_that_cannot_move_are_refused(
    name: str, settings: dict[str, object], words: str
) -> None:
    mechanisms = one(name)
    with pytest.raises(InputError, match=words):
        certify(mechanisms, few_free(mechanisms, 1), budget=QUICK, **settings)  # type: ignore[arg-type]


def test_kinds_with_one_base_take_no_references() -> None:
    mechanisms = one("channels")
    with pytest.raises(InputError, match="have one base"):
        certify(mechanisms, references=mechanisms, budget=QUICK)
