"""Certificates as the prover writes them, of every strategy: accepted for what is true, and for
no more.
"""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from checker_cases import KINDS, Tensors, Truth, draw, right, sizes_of, write_tensors

from assay.errors import InputError
from assay.proofs.max_of_k.cells import Measure
from assay.proofs.max_of_k.prove import prove
from assay.proofs.max_of_k.strategies import STRATEGIES
from assay.targets.max_of_k import from_tensors
from assay_check import check


def prove_and_check(
    folder: Path, w: Tensors, strategy: str, level: str, measure: Measure, truth: Truth
) -> int:
    """Prove, check, and claim one more than the checker found; return the proved count."""
    weights, path = write_tensors(folder / "weights.safetensors", w), folder / "proof.json"
    loaded = from_tensors({name: torch.from_numpy(array) for name, array in w.items()})
    settings = {
        "measure": measure,
        "certificate_path": path,
        "normalise": False,
        "count_operations": False,
    }
    try:
        result = prove(loaded, strategy, level, **settings)
    except InputError:
        assert level == "float32"  # executed in float32 it could overflow
        return 0
    verdict = check(path, weights)
    assert verdict.accepted, verdict
    tokens = None if measure.tokens is None else measure.tokens.tolist()
    assert result.bound <= verdict.bound <= Fraction(truth.everything(tokens), result.total)
    entry = json.loads(path.read_text())
    more = int(verdict.bound * result.total) + 1
    if more <= result.total:
        entry["claim"] |= {"count": str(more), "bound": str(Fraction(more, result.total))}
        path.write_text(json.dumps(entry))
        assert not check(path, weights).accepted
    return result.count


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_writes_certificates_that_hold(strategy: str, tmp_path: Path) -> None:
    counts = []
    for seed, kind in enumerate(("right", "rough", "twins")):
        w = draw(seed, kind, most=100)
        truth, rng = Truth(w), np.random.default_rng(seed)
        V, K = sizes_of(w)
        weighted = Measure("weighted", tokens=rng.integers(0, 5, (K, V)))
        for level, measure in (("real", Measure()), ("float32", Measure()), ("real", weighted)):
            counts.append(prove_and_check(tmp_path, w, strategy, level, measure, truth))
    assert any(counts) or strategy in ("subcubic_global", "subcubic_mean")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_on_many_networks(strategy: str, tmp_path: Path) -> None:
    for seed in range(2000, 2008):
        for kind in KINDS:
            w = draw(seed, kind, most=150)
            truth = Truth(w)
            for level in ("real", "float32"):
                prove_and_check(tmp_path, w, strategy, level, Measure(), truth)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["box_exact", "subcubic_low_rank"])
def test_checks_four_of_64_tokens_within_seconds(strategy: str, tmp_path: Path) -> None:
    w = right(64, 4, np.random.default_rng(0), 0.05)
    path, weights = tmp_path / "proof.json", write_tensors(tmp_path / "weights.safetensors", w)
    loaded = from_tensors({name: torch.from_numpy(array) for name, array in w.items()})
    result = prove(
        loaded, strategy, "real", certificate_path=path, normalise=False, count_operations=False
    )
    began = time.process_time()
    verdict = check(path, weights)
    assert time.process_time() - began < 6
    assert verdict.accepted
    assert verdict.bound >= result.bound > 0


def test_a_lower_claim_with_a_hole_names_the_cell(tmp_path: Path) -> None:
    w = right(6, 3, np.random.default_rng(1), 0.3)
    path, weights = tmp_path / "proof.json", write_tensors(tmp_path / "weights.safetensors", w)
    loaded = from_tensors({name: torch.from_numpy(array) for name, array in w.items()})
    result = prove(
        loaded,
        "box_exact",
        "float64",
        certificate_path=path,
        normalise=False,
        count_operations=False,
    )
    assert "not a proof" in check(path, weights).reason
    entry = json.loads(path.read_text())
    path.write_text(json.dumps({**entry, "level": "real"}))
    verdict = check(path, weights)
    assert verdict.accepted
    assert verdict.bound == result.bound
