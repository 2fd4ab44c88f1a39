"""The bound of the cross-entropy holds on small networks, level by level, and its elementary
functions bound theirs.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from small_models import KINDS, draw, logits, planted, sequences

from assay.errors import AssayError
from assay.proofs.max_of_k import cross_entropy
from assay.proofs.max_of_k.cross_entropy import bound_cross_entropy
from assay.proofs.max_of_k.tables import LEVELS


def true_loss(w, dtype: type = np.float64) -> float:  # type: ignore[no-untyped-def]
    tokens = sequences(w)
    values = logits(w, tokens, dtype=dtype).astype(np.float64)
    own = np.take_along_axis(values, tokens.max(1)[:, None], 1)
    return float(np.log(np.exp(np.minimum(values - own, 700)).sum(1)).mean())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_above_the_mean_loss(kind: str, level: str) -> None:
    for seed in range(6):
        w = draw(seed, kind, most_sequences=200)
        try:
            bound = bound_cross_entropy(w, level).bound
        except AssayError:
            assert kind in ("huge", "mixed", "random", "ties", "twins")
            continue
        slack = 1e-9 if level == "float64" else 0.0
        assert true_loss(w) <= float(bound) * (1 + 1e-12) + slack
        if level == "float32":
            assert true_loss(w, np.float32) <= float(bound) * (1 + 1e-12)


def test_the_bound_is_tight_where_tokens_agree() -> None:
    w = planted(5, 3, np.random.default_rng(0), 0.01)
    bound, loss = float(bound_cross_entropy(w, "real").bound), true_loss(w)
    assert loss <= bound < 1.5 * loss + 1e-9


def test_elementary_functions_round_up() -> None:
    x = np.concatenate(
        [
            np.linspace(-650, 590, 4001),
            np.linspace(-1e-3, 1e-3, 101),
            [-0.0, 1e-300, -1e-300, 0.015625],
        ]
    )
    value = cross_entropy._exp_up(x)
    for one, got in zip(x.tolist(), value.tolist(), strict=True):
        assert got >= math.exp(one)
        assert got <= math.exp(max(one, -600.0)) * (1 + 2e-4)
    z = np.concatenate([1 + np.logspace(-15, 300, 3001), np.linspace(1, 3, 1001)])
    logs = cross_entropy._log_up(z)
    assert (logs >= np.log(z)).all()
    assert (logs <= np.log(z) + 1e-5).all()
    assert cross_entropy._exp_up(np.array([700.0]))[0] == np.inf
