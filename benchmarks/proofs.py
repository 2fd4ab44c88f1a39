"""Proofs of max-of-K networks: normalised bounds, CPU seconds, operations and unexplained
dimensions over six seeds.

Run with `python benchmarks/proofs.py [--seeds 6 --level real]`: about half a minute a seed. Below
the table: how long an independent check of each certificate takes, larger networks, where brute
force is out of reach, and how the operations of each verifier grow with the vocabulary and the
number of positions."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from assay.learn.max_of_k import train_max_of_k
from assay.proofs.max_of_k.prove import ProofResult, prove
from assay.proofs.max_of_k.strategies import STRATEGIES
from assay.targets import max_of_k
from assay.targets.max_of_k import Weights
from assay_check import check

CHECKED = ("brute_force", "best", "named_rivals", "cubic", "subcubic", "subcubic_low_rank_anchored")
LARGE = (
    (64, 10, ("box_exact", "named_rivals", "cubic", "subcubic_anchored")),
    (128, 20, ("named_rivals", "cubic", "subcubic_anchored")),
)
GROWTH = ("box_exact", "named_rivals", "cubic", "subcubic", "subcubic_low_rank")


def train(vocabulary: int, positions: int, seed: int) -> Weights:
    return max_of_k.weights_of(train_max_of_k(vocabulary, positions, seed=seed))


def print_table(results: dict[str, list[ProofResult]], truth: list[int]) -> None:
    print(
        f"{'strategy':28s} {'normalised bound':>18s} {'CPU s':>7s} {'operations':>12s}"
        f" {'unexplained':>12s}"
    )
    for name, rows in results.items():
        bounds = [row.count / count for row, count in zip(rows, truth, strict=True)]
        seconds, steps = (
            np.mean([row.seconds for row in rows]),
            np.mean([row.operations or 0 for row in rows]),
        )
        print(
            f"{name:28s} {np.mean(bounds):9.4f} +- {np.std(bounds):.4f} {seconds:7.2f}"
            f" {steps:12.3g} {rows[0].unexplained:12d}"
        )


def print_checks(weights: Weights) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = max_of_k.save(Path(folder) / "weights.safetensors", weights)
        for name in CHECKED:
            claim = Path(folder) / f"{name}.json"
            prove(weights, name, certificate_path=claim, count_operations=False, normalise=False)
            began = time.process_time()
            verdict = check(claim, path)
            print(
                f"checking {name:28s} {time.process_time() - began:.2f} CPU s, accepted:"
                f" {verdict.accepted}"
            )


def print_large() -> None:
    for V, K, names in LARGE:
        weights = train(V, K, 0)
        for name in names:
            row = prove(weights, name, count_operations=False)
            print(
                f"V = {V}, K = {K}: {name:20s} bound {float(row.bound):.4f} in {row.seconds:.2f}"
                " CPU s (level real)"
            )


def print_growth() -> None:
    generator = torch.Generator().manual_seed(0)

    def steps(name: str, V: int, K: int) -> int:
        weights = max_of_k.weights_of(max_of_k.MaxOfK(V, K, 32, generator=generator))
        return prove(weights, name, "float64", normalise=False).operations or 0

    for name in GROWTH:
        in_v = np.log(steps(name, 64, 4) / steps(name, 32, 4)) / np.log(2)
        in_k = np.log(steps(name, 32, 16) / steps(name, 32, 8)) / np.log(2)
        print(
            f"operations of {name:20s} grow like V^{in_v:.2f} (32 to 64 tokens) and K^{in_k:.2f} (8"
            " to 16 positions)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--level", default="real", choices=("float64", "real", "float32"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    results, truth = defaultdict(list), []
    for seed in range(given.seeds):
        weights = train(64, 4, seed)
        for name in STRATEGIES:
            results[name].append(prove(weights, name, given.level, normalise=False))
        truth.append(results["brute_force"][-1].count)
    print(f"max of 4 tokens out of 64, level {given.level}, {given.seeds} seeds")
    print_table(results, truth)
    print_checks(weights)
    print_large()
    print_growth()
    print(f"{time.process_time() - began:.0f} CPU s in all")


if __name__ == "__main__":
    main()
