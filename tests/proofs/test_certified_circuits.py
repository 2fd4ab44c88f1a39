"""Certified circuits beside brute force over all circuits of a small network."""

from __future__ import annotations

import functools
import itertools

import cases
import pytest
import torch
from test_certify_gates import damages

import assay
from assay.bounds.search.leaves import Budget
from assay.core.mechanisms import Mechanisms
from assay.errors import InputError
from assay.proofs.circuits import certified_circuit, smallest_hitting_set

QUICK = Budget(seconds=0.15, whole=0, steps=(4, 2), boxes=32)


@functools.cache
def one(name: str) -> Mechanisms:
    return cases.CASES[name]().take(slice(0, 1))


@pytest.mark.slow
def test_a_circuit_is_between_its_bounds() -> None:
    """On six parts every circuit is tried at all corners: none that survives is smaller than the
    bound, and the circuit that is returned survives.
    """
    mechanisms = one("directions")
    scores = assay.attribute(mechanisms).values
    scores = {n: v.mean(0) if v.ndim > g.ndim else v for (n, v), g in _pairs(mechanisms, scores)}
    whole = certified_circuit(mechanisms, scores, most=0.0, budget=QUICK)
    assert 0 <= whole.at_least <= whole.size <= whole.prefix
    ones = mechanisms.ones()
    total = sum(gate.numel() for gate in ones.values())
    everything = {n: torch.zeros_like(g, dtype=torch.bool) for n, g in ones.items()}
    most = 0.3 * float(damages(mechanisms, everything, 0.0, 0).max())
    found = certified_circuit(mechanisms, scores, most=most, budget=QUICK)
    assert 0 < found.at_least <= found.size < total
    assert float(damages(mechanisms, dict(found.kept), 0.0, 32).max()) <= most + 1e-9
    for size in range(found.at_least):
        for chosen in itertools.combinations(range(total), size):
            keep = _masks(mechanisms, chosen)
            assert float(damages(mechanisms, keep, 0.0, 0).max()) > most
    for entry in found.blocking:
        free = _masks(mechanisms, [p for p in range(total) if p not in entry])
        assert float(damages(mechanisms, free, 0.0, 0).max()) > most
    assert found.sampled <= total


def _pairs(mechanisms: Mechanisms, scores: object) -> list[object]:
    return list(zip(scores.items(), mechanisms.ones().values(), strict=True))  # type: ignore[attr-defined]


def _masks(mechanisms: Mechanisms, chosen: object) -> dict[str, torch.Tensor]:
    ones = mechanisms.ones()
    flat = torch.zeros(sum(g.numel() for g in ones.values()), dtype=torch.bool)
    flat[list(chosen)] = True  # type: ignore[call-overload]
    parts = flat.split([g.numel() for g in ones.values()])
    return {n: p.reshape(g.shape) for (n, g), p in zip(ones.items(), parts, strict=True)}


@pytest.mark.slow
def test_a_circuit_of_an_answer() -> None:
    mechanisms = one("channels")
    scores = assay.attribute(mechanisms).values
    found = certified_circuit(mechanisms, scores, budget=QUICK, pairs=8, deletions=6)
    again = assay.certify(mechanisms, dict(found.kept), claim="same-answer", budget=QUICK)
    assert bool(again.certified.all()) or found.size == found.prefix == 18
    assert found.at_least <= found.size


def test_hitting_sets() -> None:
    assert smallest_hitting_set([]) == 0
    assert smallest_hitting_set([frozenset([3])]) == 1
    sets = [frozenset(p) for p in itertools.combinations(range(5), 2)]
    assert smallest_hitting_set(sets) == 4
    assert smallest_hitting_set([frozenset([1, 2]), frozenset([2, 3]), frozenset([5])]) == 2


def test_bad_input_is_refused() -> None:
    mechanisms = cases.CASES["channels"]()
    scores = assay.attribute(mechanisms).values
    with pytest.raises(InputError, match="one example"):
        certified_circuit(mechanisms, scores)
    with pytest.raises(InputError, match="most"):
        certified_circuit(one("channels"), scores, most=float("nan"))
    with pytest.raises(InputError, match="must have the shape"):
        certified_circuit(one("channels"), {})
