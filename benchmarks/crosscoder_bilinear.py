"""Crosscoder proofs of a bilinear network that reads digits: interactions exact and quadratic.

Run with `python benchmarks/crosscoder_bilinear.py [--seeds 1] [--steps 600]`: minutes a seed. A
network of one block and its crosscoder are trained together (the network is made to be proved
about), 359 of the 1797 digits held out; the script prints the certified shares, whether the
independent checker accepts the certificates, and how the operations of the proofs and of running
the network grow with the number of points."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from assay.io import files
from assay.learn.residual_relu import train_classifier
from assay.mechanisms.crosscoder import (
    Cotraining,
    Crosscoder,
    Training,
    cotrain,
    residual_states,
    unexplained,
)
from assay.mechanisms.crosscoder.bilinear import QuadraticHinge
from assay.proofs.crosscoder.bilinear import (
    STRATEGIES,
    BilinearProblem,
    Weights,
    evaluation_operations,
    features_of,
    proof_operations,
    true_margins,
)
from assay.proofs.crosscoder.certificate import certify_bilinear
from assay.proofs.crosscoder.problem import Points
from assay.targets.bilinear import BilinearNetwork
from assay.targets.data import load_digits
from assay_check import check

SITES = ("embed", "blocks.0")


def trained(
    x: torch.Tensor, y: torch.Tensor, given: argparse.Namespace, seed: int
) -> tuple[BilinearNetwork, Crosscoder]:
    generator = torch.Generator().manual_seed(seed)
    model = BilinearNetwork(
        x.shape[1], 10, width=given.width, hidden=given.hidden, blocks=1, generator=generator
    )
    train_classifier(model, x, y, generator=generator, steps=300, rate=3e-3, decay=0.01)
    found = Crosscoder(SITES, given.width, given.features, generator=generator)
    training = Training(given.steps, 3e-3, given.sparsity)
    cotrain(
        model,
        found,
        x,
        y,
        training,
        terms=lambda: [QuadraticHinge(model, y)],
        generator=generator,
        cotraining=Cotraining(0.01, 256),
    )
    return model.eval(), found.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--sparsity", type=float, default=0.1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    x, y = load_digits().both_parts()
    for seed in range(given.seeds):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        held, fitted = order[:359].numpy(), order[359:]
        began = time.process_time()
        model, found = trained(x[fitted], y[fitted], given, seed)
        points = Points(x.double().numpy(), y.numpy())
        problem = BilinearProblem(Weights.of(model), points, features_of(found, model, points))
        true = true_margins(problem)
        codes, fvu = problem.features.codes, unexplained(found, residual_states(model, x, SITES))
        print(
            f"seed {seed}: {time.process_time() - began:.0f} CPU s of training; right"
            f" {(true > 0).mean():.4f}, held out {(true[held] > 0).mean():.4f}; {found.size}"
            f" features, mean L0 {(codes > 0).sum(1).mean():.1f}, FVU {fvu.max():.4f}"
        )
        cost = evaluation_operations(problem)
        with tempfile.TemporaryDirectory() as place:
            weights = files.save_tensors(
                Path(place) / "weights.safetensors", dict(model.state_dict())
            )
            for name in STRATEGIES:
                path = Path(place) / "claim.json"
                bounds = certify_bilinear(problem, name, path)
                above = int((bounds > true + 1e-9 * (1 + np.abs(true))).sum())
                began = time.process_time()
                verdict = check(path, weights)
                print(
                    f"{name:8s} certified {(bounds > 0).mean():.4f}, held out"
                    f" {(bounds[held] > 0).mean():.4f}; bounds above the true margin: {above};"
                    f" operations {proof_operations(problem, name)}, running the network {cost};"
                    f" independent check {time.process_time() - began:.1f} CPU s, accepted:"
                    f" {verdict.accepted}, {verdict.reason}",
                    flush=True,
                )
        print(f"{'points':>8s} {'running':>12s}", *(f"{name:>12s}" for name in STRATEGIES))
        shuffled = np.random.default_rng(seed).permutation(len(points))
        for part in (16, 8, 4, 2, 1):
            some = problem.take(np.sort(shuffled[: len(points) // part]))
            steps = [proof_operations(some, name) for name in STRATEGIES]
            print(
                f"{len(some.points):8d} {evaluation_operations(some):12d}",
                *(f"{step:12d}" for step in steps),
            )


if __name__ == "__main__":
    main()
