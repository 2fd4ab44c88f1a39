"""The check that every soundness test makes: certified sequences are right, and their number is
the one claimed.
"""

from __future__ import annotations

import numpy as np
from small_models import margins, members, sequences, surely_right

from assay.proofs.max_of_k.strategies import named
from assay.proofs.max_of_k.strategies.base import Problem
from assay.proofs.max_of_k.strategies.brute import CertifiedTable
from assay.targets.max_of_k import Weights


def check(weights: Weights, strategy: str, level: str) -> int:
    """Assert that a strategy certifies right sequences only, and counts them; return how many."""
    problem, chosen = Problem(weights, level), named(strategy)
    certified = chosen.verify(problem, chosen.search(problem))
    tokens = sequences(weights)
    inside = (
        certified.right[tokens[:, -1], *tokens[:, :-1].T]
        if isinstance(certified, CertifiedTable)
        else members(certified.sets, tokens)
    )
    assert certified.weigh() == inside.sum(), (
        f"{strategy} counts {certified.weigh()} of {inside.sum()} certified sequences"
    )
    if inside.any():
        _assert_right(weights, tokens[inside], level)
    return int(inside.sum())


def _assert_right(weights: Weights, tokens: np.ndarray, level: str) -> None:
    margin = margins(weights, tokens)
    size = np.nan_to_num(np.abs(margin), nan=np.inf, posinf=np.inf)
    scale = np.abs(
        np.concatenate([tensor.ravel() for tensor in vars(weights).values()]).astype(float)
    ).max()
    doubtful = ~(margin < 0) | (size < 1e-6 * (1 + scale) ** 2)
    if level == "float64":
        assert (margin[size > 1e-6 * (1 + scale) ** 4] < 0).all()
        return
    for sequence in tokens[doubtful]:
        assert surely_right(weights, sequence), f"{sequence} is certified but not right"
    if level == "float32":
        for order in (np.arange(weights.positions), np.arange(weights.positions)[::-1]):
            executed = margins(weights, tokens, dtype=np.float32, order=order)
            assert (executed < 0).all(), (
                f"{tokens[~(executed < 0)][0]} is certified but executes wrongly"
            )
