"""Crosscoder proofs of one-layer attention models that name the largest of K tokens.

Run with `python benchmarks/crosscoder_attention.py [--seeds 1] [--steps 300]`: some CPU seconds a
seed. A crosscoder over the residual states of all positions and the last state starts at one
feature per token and position and one per answer and is trained on four fifths of all sequences;
the script prints what its features prove of all of them, how the operations of the proofs and of
running the network grow, and whether the independent checker accepts the certificates; then what is
proved of a model and a crosscoder with random weights."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from assay.learn.max_of_k import train_max_of_k
from assay.mechanisms.crosscoder import Crosscoder, Training, start_at_codes, train, unexplained
from assay.mechanisms.crosscoder.training import equal_norm_scales, rows_of
from assay.proofs.crosscoder.attention import (
    STRATEGIES,
    AttentionProblem,
    attention_margins,
    attention_sites,
    attention_states,
    claimed_margins,
    evaluation_operations,
    features_of,
    proof_operations,
    true_margins,
)
from assay.proofs.crosscoder.certificate import certify_attention
from assay.targets import max_of_k
from assay_check import check

SIZES = ((24, 2), (12, 3))
WIDTH = 32


def trained(
    weights: max_of_k.Weights, tokens: np.ndarray, fitted: torch.Tensor, steps: int, seed: int
) -> tuple[Crosscoder, torch.Tensor]:
    states = attention_states(weights, tokens)
    vocabulary, placed = weights.vocabulary, torch.from_numpy(tokens)
    one_hot = torch.nn.functional.one_hot
    proposed = [one_hot(placed, vocabulary).flatten(1), one_hot(placed.amax(1), vocabulary)]
    generator = torch.Generator().manual_seed(seed)
    size = (weights.positions + 1) * vocabulary
    found = Crosscoder(attention_sites(weights.positions), WIDTH, size, generator=generator)
    scales = equal_norm_scales(states[fitted])
    start_at_codes(found, states[fitted], torch.cat(proposed, 1)[fitted].float(), scales)
    training = Training(steps, 1e-3, 0.1)
    train(found, rows_of(states, fitted), training, scales=scales, generator=generator)
    return found.eval(), unexplained(found, states)


def print_model(vocabulary: int, positions: int, steps: int, seed: int) -> None:
    model = train_max_of_k(vocabulary, positions, WIDTH, seed=seed, steps=1500)
    weights = max_of_k.weights_of(model)
    tokens = np.indices((vocabulary,) * positions).reshape(positions, -1).T
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    held, fitted = order[: len(tokens) // 5].numpy(), order[len(tokens) // 5 :]
    found, fvu = trained(weights, tokens, fitted, steps, seed)
    problem = AttentionProblem(weights, tokens, features_of(found, weights, tokens))
    true, codes = true_margins(problem), problem.features.codes
    print(
        f"{vocabulary} tokens, {positions} positions, seed {seed}: {len(tokens)} sequences,"
        f" {len(held)} held out; {found.size} features, mean L0 {(codes > 0).sum(1).mean():.2f},"
        f" FVU {fvu.max():.4f}; right {(true > 0).mean():.4f}, claimed"
        f" {(claimed_margins(problem) > 0).mean():.4f}"
    )
    cost = evaluation_operations(problem)
    with tempfile.TemporaryDirectory() as place:
        saved = max_of_k.save(Path(place) / "weights.safetensors", weights)
        for name in STRATEGIES:
            path = Path(place) / "claim.json"
            bounds = certify_attention(problem, name, path)
            above = int((bounds > true + 1e-9 * (1 + np.abs(true))).sum())
            began = time.process_time()
            verdict = check(path, saved)
            print(
                f"  {name:8s} certified {(bounds > 0).mean():.4f}, held out"
                f" {(bounds[held] > 0).mean():.4f}; bounds above the true margin: {above};"
                f" operations {proof_operations(problem, name)}, running the network {cost};"
                f" independent check {time.process_time() - began:.1f} CPU s, accepted:"
                f" {verdict.accepted}, {verdict.reason}"
            )
    print(f"  {'points':>8s} {'running':>12s}", *(f"{name:>12s}" for name in STRATEGIES))
    shuffled = np.random.default_rng(seed).permutation(len(tokens))
    for part in (16, 8, 4, 2, 1):
        some = problem.take(np.sort(shuffled[: len(tokens) // part]))
        counts = [evaluation_operations(some), *(proof_operations(some, one) for one in STRATEGIES)]
        print(f"  {len(some.tokens):8d}", *(f"{count:12d}" for count in counts), flush=True)


def print_random(seed: int) -> None:
    """Print what is proved of a model and a crosscoder with random weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = max_of_k.weights_of(max_of_k.MaxOfK(8, 2, 16, generator=generator))
    tokens = np.indices((8, 8)).reshape(2, -1).T
    found = Crosscoder(attention_sites(2), 16, 24, generator=generator)
    problem = AttentionProblem(weights, tokens, features_of(found, weights, tokens))
    true, words = true_margins(problem), []
    for name in STRATEGIES:
        bounds = attention_margins(problem, name)
        above = int((bounds > true + 1e-9 * (1 + np.abs(true))).sum())
        words.append(f"{name} {(bounds > 0).mean():.3f} ({above} above)")
    print(f"random weights, seed {seed}: true share {(true > 0).mean():.3f};", "; ".join(words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(given.seeds):
        for vocabulary, positions in SIZES:
            print_model(vocabulary, positions, given.steps, seed)
        print_random(seed)


if __name__ == "__main__":
    main()
