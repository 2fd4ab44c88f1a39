"""Wide dictionaries are certified within a memory, and within the time that they are given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MEMORY = 3 << 30
"""Bytes of addresses, of which libraries take half; rows of all features at once take more."""

PROGRAM = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
import cases
import torch
from assay.bounds.search.leaves import Budget
from assay.dictionaries import Placed
from assay.mechanisms.features import features
from assay.proofs.gates import certify

sites = ("blocks.0", "blocks.1")
dictionaries = {{
    site: Placed(cases.random_dictionary(4, 640, seed, "topk", k=64).double(), site, (site,))
    for seed, site in enumerate(sites)
}}
clean, patch = (cases.tiny_batch(1, positions=2, seed=seed) for seed in (1, 2))
mechanisms = features(cases.tiny_target(), dictionaries, clean, patch)
keep = {{name: torch.zeros_like(g, dtype=torch.bool) for name, g in mechanisms.ones().items()}}
keep["blocks.1 error"][:] = True
budget = Budget(seconds=8.0, boxes=1 << 20, steps=(2, 1), whole=1, memory=1 << 28)
found = certify(mechanisms, keep, low=0.5, budget=budget)
with torch.no_grad():
    gates = {{n: torch.where(keep[n], g, 0.5 * g) for n, g in mechanisms.ones().items()}}
    full, least = mechanisms.values().double(), mechanisms.values(gates).double()
    damage = mechanisms.target.damage(full, least)
print(float(damage), float(found.found.values), float(found.proved.values), found.seconds[0])
"""


@pytest.mark.slow
def test_a_wide_dictionary_is_certified_within_a_memory_and_the_budget() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    damage, found, proved, seconds = map(float, result.stdout.split())
    assert damage <= found + 1e-9
    assert found <= proved < 1e3
    assert seconds < 20
