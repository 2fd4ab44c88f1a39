"""Crosscoder proofs: certified share against operations, beside running the network on every point.

Run with `python benchmarks/crosscoder_proof.py [--seeds 1] [--recipe NAME] [--short]`: ten to fifty
CPU seconds a seed and recipe. It carries out `assay run crosscoder-proof` and `assay run
digits-crosscoder-proof`, prints every certificate, the curve of grouped bounds, how the operations
of proofs and of evaluation grow with the number of points, and how long the independent check
takes; then what is proved of networks and crosscoders with random weights."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch

from assay.io import files
from assay.mechanisms.crosscoder import Crosscoder
from assay.proofs.crosscoder.problem import Network, Points, Problem, features_of, true_margins
from assay.proofs.crosscoder.prove import STRATEGIES, prove
from assay.studies import recipes, runner
from assay.targets import residual_relu
from assay_check import check

RECIPES = ("crosscoder-proof", "digits-crosscoder-proof")


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
    table = pl.read_parquet(folder / "growth.parquet")
    table = table.pivot("what", index="points", values="operations")
    print("operations by points:", *(f"{name:>19s}" for name in table.columns[1:]))
    for row in table.iter_rows():
        print(f"{row[0]:21d}", *(f"{count:19d}" for count in row[1:]))


def print_bounds(folder: Path) -> None:
    """Print for every certificate how many bounds lie above the true margin."""
    margins = pl.read_parquet(folder / "margins.parquet")
    true = margins["true"].to_numpy()
    above = {
        name: int((margins[name].to_numpy() > true + 1e-9 * (1 + np.abs(true))).sum())
        for name in STRATEGIES
    }
    print("bounds above the true margin:", ", ".join(f"{k} {v}" for k, v in above.items()))


def print_random(seed: int) -> None:
    """Print what is proved of a network and a crosscoder with random weights."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = residual_relu.pairs_of_tokens(12)
    model = residual_relu.ResidualReLU(24, 16, 32, 12, 1, generator)
    found = Crosscoder(model.sites, 16, 36, generator=generator)
    points = Points(tokens.double().numpy(), labels.numpy(), pairs=True)
    problem = Problem(Network.of(model), points, features_of(found, model, points))
    true = true_margins(problem)
    words = []
    for name in STRATEGIES:
        result = prove(problem, name)
        above = int((result.margins > true + 1e-9 * (1 + np.abs(true))).sum())
        words.append(f"{name} {result.share:.3f} ({above} above)")
    print(f"random weights, seed {seed}: true share {(true > 0).mean():.3f};", "; ".join(words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--recipe", choices=RECIPES)
    parser.add_argument("--short", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(given.seeds):
        for name in RECIPES if given.recipe is None else (given.recipe,):
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place) / "run"
                recipe = recipes.load(name, [f"seed={seed}"], short=given.short)
                began = time.process_time()
                runner.execute(recipe, folder)
                print(f"{name}, seed {seed}: {time.process_time() - began:.0f} CPU s in all")
                print_run(folder)
                print_bounds(folder)
                print_growth(folder)
                began = time.process_time()
                verdict = check(folder / "certificate.json", folder / "weights.safetensors")
                print(
                    f"independent check: {time.process_time() - began:.1f} CPU s, accepted:"
                    f" {verdict.accepted}, {verdict.reason}",
                    flush=True,
                )
        print_random(seed)


if __name__ == "__main__":
    main()
