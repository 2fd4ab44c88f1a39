"""With few free gates the search visits every corner, and splits carry the proof to it."""

from __future__ import annotations

import cases
import pytest
import torch
from small_units import units

from assay import certify
from assay.bounds.search.leaves import Budget
from assay.core.mechanisms import Mechanisms

BUDGET = Budget(seconds=1e9, boxes=20_000, gap=1e-7)


def few(mechanisms: Mechanisms, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Keep all gates but a few that are drawn."""
    ones = mechanisms.ones()
    sizes = [gate.numel() for gate in ones.values()]
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    keep = torch.ones(sum(sizes), dtype=torch.bool)
    keep[order[:count]] = False
    parts = zip(ones, keep.split(sizes), strict=True)
    return {name: part.reshape(ones[name].shape) for name, part in parts}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["units", "channels"])
def test_the_ends_meet(kind: str, seed: int) -> None:
    made = units(1) if kind == "units" else cases.CASES[kind]().take(slice(0, 1))
    found = certify(made, few(made, 12, seed), budget=BUDGET)
    assert found.free == 12
    assert float(found.found.values) > 0
    assert found.ratio == pytest.approx(1, abs=1e-6)
