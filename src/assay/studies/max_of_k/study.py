"""The max-of-K study: train a small transformer, prove how often it is right with every
strategy, certify and check.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

import assay_check
from assay.errors import AssayError, InputError
from assay.io.files import existing
from assay.io.runs import Run
from assay.learn.max_of_k import train_max_of_k
from assay.proofs.max_of_k.cells import Measure
from assay.proofs.max_of_k.circuits import circuits, margin_shares, sampled_accuracy
from assay.proofs.max_of_k.heuristic import heuristic_estimate
from assay.proofs.max_of_k.prove import (
    LossBound,
    ProofResult,
    prove,
    prove_all,
    prove_cross_entropy,
    true_count,
)
from assay.proofs.max_of_k.strategies import STRATEGIES
from assay.studies.max_of_k.config import Config
from assay.studies.max_of_k.page import headline, sections
from assay.targets import max_of_k
from assay.targets.max_of_k import Weights

__all__ = ["Config", "check", "headline", "run", "sections"]

CERTIFICATE = "certificate.json"
LOSS_CERTIFICATE = "cross-entropy.json"


def check(config: Config) -> None:
    """Refuse weights that cannot be proved about."""
    if config.model.path is not None:
        max_of_k.load(existing(config.model.path))


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train or load, prove, certify and check; everything the report shows is saved."""
    weights = _weights(config, run)
    path = run.write("weights.safetensors", lambda new: max_of_k.save(new, weights))
    results = _prove(config, weights)
    truth = true_count(weights)
    run.save_table("proofs.parquet", _table(results, truth))
    best = _certify(config, weights, run)
    verdict = _check(run.checked(CERTIFICATE), path)
    found = circuits(weights)
    run.save_tensors(
        "circuits.safetensors",
        {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in vars(found).items()},
    )
    shares = margin_shares(weights, seed=config.seed)
    run.save_table(
        "shares.parquet", pl.DataFrame({"path": list(shares), "margin": list(shares.values())})
    )
    run.save_table("measures.parquet", _measures(config, weights))
    executed = (
        prove(weights, config.proofs.certified, "float32", count_operations=False, normalise=False)
        if config.proofs.float32
        else None
    )
    return {
        "total": best.total,
        "right": truth,
        "accuracy": truth / best.total if truth is not None else None,
        "sampled_accuracy": sampled_accuracy(weights, seed=config.seed) if truth is None else None,
        "certified": {
            "strategy": best.strategy,
            "count": best.count,
            "bound": float(best.bound),
            "seconds": best.seconds,
        },
        "estimate": heuristic_estimate(weights).accuracy,
        "checked": verdict.reason,
        "measure": verdict.measure,
        "assumptions": list(verdict.assumptions),
        "executed": float(executed.bound) if executed else None,
        "cross_entropy": _cross_entropy(config, run, weights, path),
        "bounds": {result.strategy: float(result.bound) for result in results},
        "operations": {result.strategy: result.operations for result in results},
        "vocabulary": weights.vocabulary,
        "positions": weights.positions,
        "level": config.proofs.level,
    }


def _weights(config: Config, run: Run) -> Weights:
    if config.model.path is not None:
        return max_of_k.load(existing(Path(config.model.path)))
    model, training = config.model, config.training
    trained = train_max_of_k(
        model.vocabulary,
        model.positions,
        model.width,
        seed=config.seed,
        steps=training.steps,
        batch=training.batch,
        rate=training.rate,
        decay=training.decay,
        run=run,
    )
    return max_of_k.weights_of(trained)


def _certify(config: Config, weights: Weights, run: Run) -> ProofResult:
    """Prove by the certified strategy and write the certificate into the run."""
    results: list[ProofResult] = []

    def write(folder: Path) -> None:
        result = prove(
            weights,
            config.proofs.certified,
            config.proofs.level,
            certificate_path=folder / CERTIFICATE,
            normalise=False,
        )
        results.append(result)

    run.write_files(write)
    return results[0]


def _prove(config: Config, weights: Weights) -> list[ProofResult]:
    level = config.proofs.level
    if not config.proofs.strategies:
        return list(prove_all(weights, level, normalise=False))
    return [prove(weights, name, level, normalise=False) for name in config.proofs.strategies]


def _table(results: list[ProofResult], truth: int | None) -> pl.DataFrame:
    rows = [
        {
            "strategy": result.strategy,
            "bound": float(result.bound),
            "normalised": result.count / truth if truth else None,
            "certified sequences": str(result.count),
            "operations": result.operations,
            "unexplained dimensions": float(result.unexplained),
            "CPU seconds": result.seconds,
            "about": STRATEGIES[result.strategy].about,
        }
        for result in results
    ]
    return pl.DataFrame(rows)


def _measures(config: Config, weights: Weights) -> pl.DataFrame:
    """Return the certified value of some predicates of the input, from the certified strategy."""
    V, K = weights.vocabulary, weights.positions
    q, m, c = np.ogrid[:V, :V, :K]
    predicates = {
        "all inputs": None,
        "the query is the largest token": (q == m) & (c >= 0),
        "the query is not the largest token": (q != m) & (c >= 0),
        "the largest token appears once": c + (q != m) == K - 1,
        "the largest token is below half of the vocabulary": (m < V // 2) & (q >= 0) & (c >= 0),
    }
    rows = []
    for name, cells in predicates.items():
        chosen = None if cells is None else np.broadcast_to(cells, (V, V, K)).copy()
        measure = Measure(name, None, chosen)
        result = prove(
            weights, "box_exact", config.proofs.level, measure=measure, count_operations=False
        )
        rows.append(
            {
                "inputs": name,
                "share of all": result.total / V**K,
                "bound": float(result.bound),
                "normalised": result.normalised,
            }
        )
    return pl.DataFrame(rows, schema_overrides={"normalised": pl.Float64})


def _write_loss(config: Config, run: Run, weights: Weights) -> LossBound:
    results: list[LossBound] = []

    def write(folder: Path) -> None:
        target = folder / LOSS_CERTIFICATE
        level = config.proofs.level
        results.append(prove_cross_entropy(weights, level, certificate_path=target))

    run.write_files(write)
    return results[0]


def _cross_entropy(config: Config, run: Run, weights: Weights, path: Path) -> dict[str, Any] | None:
    """Return a bound of the mean loss that the independent checker has confirmed, or none where a
    margin is too large for one: a network far from trained.
    """
    try:
        found = _write_loss(config, run, weights)
    except InputError:
        raise
    except AssayError:
        return None
    return {
        "bound": found.to_json()["bound"],
        "checked": _check(run.checked(LOSS_CERTIFICATE), path).reason,
        "seconds": found.seconds,
    }


def _check(certificate: Path, weights: Path) -> assay_check.Verdict:
    """Return the verdict of the independent checker; AssayError where it refuses the claim."""
    verdict = assay_check.check(certificate, weights)
    if not verdict.accepted:
        raise AssayError(f"the independent checker refuses {certificate.name}: {verdict.reason}")
    return verdict
