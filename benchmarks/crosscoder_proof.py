"""Crosscoder proofs: certified share against operations, beside running the network on every point.

Run with `python benchmarks/crosscoder_proof.py [--seeds 1] [--short]`: about a minute a seed. It
carries out `assay run crosscoder-proof`, prints every certificate and the curve of grouped bounds,
then how the operations of proofs and of evaluation grow with the number of points, and how long the
independent check takes."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch

from assay.io import files
from assay.mechanisms.crosscoder import load
from assay.proofs.crosscoder.problem import Network, Points, Problem, features_of
from assay.proofs.crosscoder.prove import evaluation_operations, prove
from assay.studies import recipes, runner
from assay.targets import residual_relu
from assay_check import check

GROWING = ("one_side", "strongest", "compact", "exact", "linear_propagation")


def print_run(folder: Path) -> None:
    summary = files.read_json(folder / "summary.json")
    total = summary["points"]
    print(
        f"{total} points, {summary['held_out']} held out from training; {summary['features']}"
        f" features, mean L0 {summary['mean_l0']:.2f}, FVU {summary['fvu']:.4f}; true share"
        f" {summary['right'] / total:.4f}, claimed {summary['claimed']:.4f}"
    )
    cost = summary["evaluation_operations"]
    print(
        f"{'certificate':20s} {'share':>7s} {'held out':>9s} {'operations':>12s} {'/ running':>9s}"
    )
    for row in pl.read_parquet(folder / "proofs.parquet").iter_rows(named=True):
        print(
            f"{row['strategy']:20s} {row['share']:7.4f} {row['held out']:9.4f}"
            f" {row['operations']:12d} {row['operations'] / cost:9.2f}"
        )
    print(f"{'running the network':20s} {'':7s} {'':9s} {cost:12d} {1:9.2f}")
    print(f"{'groups':>20s} {'share':>7s} {'held out':>9s} {'operations':>12s} {'/ running':>9s}")
    for row in pl.read_parquet(folder / "curve.parquet").iter_rows(named=True):
        print(
            f"{row['groups']:20d} {row['share']:7.4f} {row['held out']:9.4f}"
            f" {row['operations']:12d} {row['operations'] / cost:9.2f}  {row['split by']}"
        )
    estimate = summary["estimate"]
    print(
        f"heuristic estimate (no bound): share {estimate['right']:.4f}, bars +-"
        f"{estimate['half_width']:.3f}, to be widened {estimate['stretch']:.2f} times to hold 95 %"
        " of the true margins"
    )


def print_growth(folder: Path) -> None:
    model = residual_relu.load(folder / "weights.safetensors")
    tokens, labels = residual_relu.pairs_of_tokens(model.unembed.out_features)
    points = Points(tokens.double().numpy(), labels.numpy(), pairs=True)
    problem = Problem(Network.of(model), points, features_of(load(folder), model, points))
    order = np.random.default_rng(0).permutation(len(points))
    print(f"operations by points: {'running':>12s}", *(f"{name:>18s}" for name in GROWING))
    for share in (8, 4, 2, 1):
        some = problem.take(np.sort(order[: len(order) // share])).at("float64")
        steps = [prove(some, name).operations for name in GROWING]
        print(
            f"{len(some.points):20d}  {evaluation_operations(some):12d}",
            *(f"{step:18d}" for step in steps),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--short", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(given.seeds):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "run"
            recipe = recipes.load("crosscoder-proof", [f"seed={seed}"], short=given.short)
            began = time.process_time()
            runner.execute(recipe, folder)
            print(f"seed {seed}: {time.process_time() - began:.0f} CPU s in all")
            print_run(folder)
            print_growth(folder)
            began = time.process_time()
            verdict = check(folder / "certificate.json", folder / "weights.safetensors")
            print(
                f"independent check: {time.process_time() - began:.1f} CPU s, accepted:"
                f" {verdict.accepted}, {verdict.reason}"
            )


if __name__ == "__main__":
    main()
