"""The heuristic estimate of a max-of-K network: its cells against every sequence, and its type."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import norm

from assay.proofs.max_of_k.heuristic import heuristic_estimate
from assay.targets.max_of_k import MaxOfK, Weights, weights_of


def network(seed: int, vocabulary: int = 4, positions: int = 3) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return weights_of(MaxOfK(vocabulary, positions, 6, generator=generator))


def cell_of(tokens: tuple[int, ...]) -> tuple[int, int, int]:
    m = max(tokens)
    return tokens[-1], m, sum(token < m for token in tokens[:-1])


def right(weights: Weights, tokens: tuple[int, ...]) -> bool:
    """Whether the network names the largest token, from its weights in float64."""
    w = {name: array.astype(np.float64) for name, array in vars(weights).items()}
    state = w["E"][list(tokens)] + w["P"]
    query = state[-1] @ w["Q"] + w["q_bias"]
    scores = (state @ w["K"] + w["k_bias"]) @ query / np.sqrt(weights.head)
    attention = np.exp(scores - scores.max())
    attention /= attention.sum()
    written = attention @ (state @ w["V"] + w["v_bias"]) @ w["O"] + w["o_bias"]
    logits = (state[-1] + written) @ w["U"] + w["u_bias"]
    m = max(tokens)
    return bool((np.delete(logits, m) < logits[m]).all())


def test_cells_without_noise_are_the_truth_and_all_sequences_are_counted():
    for seed in range(3):
        weights = network(seed)
        found = heuristic_estimate(weights)
        assert not hasattr(found, "proved")
        counts: dict[tuple[int, int, int], list[bool]] = {}
        for tokens in product(range(4), repeat=3):
            counts.setdefault(cell_of(tokens), []).append(right(weights, tokens))
        for cell, answers in counts.items():
            assert found.weights[cell] == pytest.approx(len(answers) / 64)
            if cell[2] == 0 or (cell[1] == 1 and cell[2] == 2):
                # No smaller token, or one choice of them in every position: nothing is drawn.
                assert found.cells[cell] == float(all(answers)) == float(np.mean(answers))
        assert np.isnan(found.cells[found.weights == 0]).all()
        assert found.weights.sum() == pytest.approx(1)


def test_the_noise_has_the_mean_and_the_variance_of_all_sequences():
    weights = network(7, vocabulary=5, positions=2)
    w = {name: array.astype(np.float64) for name, array in vars(weights).items()}
    # Two positions, the largest token in the last: one smaller token, drawn from four.
    sums = []
    for k in range(4):
        state = w["E"][[k, 4]] + w["P"]
        scores = (state @ w["K"]) @ (state[-1] @ w["Q"]) / np.sqrt(weights.head)
        logits = ((state @ w["V"]) @ w["O"] + state[-1]) @ w["U"]
        sums.append(np.exp(scores) @ logits)
    leads = np.array(sums)[:, 4:] - np.array(sums)[:, :4]
    expected = norm.cdf(leads.mean(0) / leads.std(0)).min()
    assert 0 < expected < 1
    assert heuristic_estimate(weights).cells[4, 4, 1] == pytest.approx(expected)


def test_a_network_far_from_any_doubt_is_estimated_at_one():
    eye = np.eye(4, dtype=np.float32)
    zeros = np.zeros(4, np.float32)
    scale = np.arange(4, dtype=np.float32)
    # The query attends to large tokens, which the head copies to the output.
    weights = Weights(
        E=eye, P=np.zeros((3, 4), np.float32), Q=np.ones((4, 1), np.float32) * 30,
        K=scale[:, None], V=eye * 10, O=eye, U=eye,
        q_bias=np.zeros(1, np.float32), k_bias=np.zeros(1, np.float32), v_bias=zeros,
        o_bias=zeros, u_bias=zeros,
    )  # fmt: skip
    assert heuristic_estimate(weights).accuracy == pytest.approx(1, abs=1e-6)
