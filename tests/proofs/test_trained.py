"""On trained networks every certified cell is checked through all its sequences, and the bounds
reach their figures.
"""

from __future__ import annotations

import numpy as np
import pytest

from assay.learn.max_of_k import train_max_of_k
from assay.proofs.max_of_k.strategies import STRATEGIES, brute, named
from assay.proofs.max_of_k.strategies.base import Problem
from assay.proofs.max_of_k.strategies.brute import CertifiedTable
from assay.targets import max_of_k
from assay.targets.max_of_k import Weights


def spread(sets: np.ndarray) -> np.ndarray:
    """Return which sequences lie in sets (families, q, m, c, k), as a table with the query token
    first.
    """
    V, K = sets.shape[1], sets.shape[3]
    inside = np.zeros((V,) * K, bool)
    others = np.stack(np.meshgrid(*[np.arange(V)] * (K - 1), indexing="ij"))
    for q in range(V):
        m = np.maximum(others.max(0), q)
        c = (others < m).sum(0)
        for family in sets[:, q]:
            good = np.where(c == 0, family[m, c, 0], True)
            for token in others:
                good &= (token == m) | family[m, c, token]
            inside[q] |= good
    return inside


def violations(weights: Weights, level: str) -> dict[str, float]:
    """Assert for every strategy that its cells hold right sequences only; return normalised
    bounds.
    """
    problem = Problem(weights, level)
    right = brute.table(problem.tables)
    found = {}
    for name in STRATEGIES:
        strategy = named(name)
        certified = strategy.verify(problem, strategy.search(problem))
        inside = (
            certified.right if isinstance(certified, CertifiedTable) else spread(certified.sets)
        )
        assert not (inside & ~right).any(), name
        assert certified.weigh() == np.count_nonzero(inside), name
        found[name] = certified.weigh() / right.sum()
    return found


def test_a_small_trained_network_has_no_violation() -> None:
    weights = max_of_k.weights_of(train_max_of_k(16, 3, 16, seed=0, steps=400, rate=3e-3))
    bounds = violations(weights, "real")
    assert bounds["brute_force"] == 1.0
    assert bounds["box_exact"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_three_seeds_have_no_violation_and_reach_the_figures(seed: int) -> None:
    weights = max_of_k.weights_of(train_max_of_k(seed=seed))
    bounds = violations(weights, "real")
    violations(weights, "float32")
    assert bounds["box_exact"] > 0.98
    assert bounds["cubic"] > 0.93
    assert bounds["subcubic"] > 0.86
    assert bounds["subcubic_qk_range"] > 0.85
    assert bounds["subcubic_low_rank"] > 0.65
