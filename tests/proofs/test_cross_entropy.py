"""The bound of the cross-entropy holds on small networks, level by level, and its elementary
functions bound theirs.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from flint import arb, ctx
from hypothesis import given
from hypothesis import strategies as st
from small_models import KINDS, draw, empty, logits, planted, sequences

from assay.bounds.rounding import Interval
from assay.errors import AssayError
from assay.proofs.max_of_k import cross_entropy
from assay.proofs.max_of_k.cross_entropy import LossBound, bound_cross_entropy
from assay.proofs.max_of_k.tables import LEVELS
from assay.targets.max_of_k import Weights


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


@pytest.mark.parametrize("vocabulary", [2, 3, 5, 6, 7, 11])
def test_a_loss_known_in_closed_form_is_met_from_above(vocabulary: int) -> None:
    """Without any weights every input loses log V, which lies between two units of the sum."""
    bound = bound_cross_entropy(empty(vocabulary, 3, 1, 1), "real").bound
    with ctx.workprec(300):
        found, true = arb(bound.numerator) / bound.denominator, arb(vocabulary).log()
        assert true < found < true * (1 + arb(1e-5))


@given(st.integers(0, 10**6), st.integers(0, 80), st.integers(1, 10**6))
def test_what_is_claimed_is_no_less_than_what_is_proved(top: int, bits: int, ways: int) -> None:
    found = LossBound(Fraction(top, ways << bits), "real", 0.0)
    assert found.bound * (1 + Fraction(1, 1 << 20)) <= found.claimed
    assert found.claimed <= found.bound * (1 + Fraction(1, 10**6)) + Fraction(1, 10**12)
    assert Fraction(found.to_json()["bound"]) >= found.claimed


def tables_of(scores: list[float], written: list[list[float]], places: list[float]) -> Weights:
    """A network whose attention goes by `scores` of tokens and `places` of positions, and whose
    head writes a row of `written` for a token; there is no direct path.
    """
    V, K = len(scores), len(places)
    w = empty(V, K, 2 * V + 1, V + 1)
    w.E[:, :V], w.P[:, V] = np.eye(V), np.array(places)
    w.q_bias[V], w.K[:V, V], w.K[V, V] = np.sqrt(V + 1), scores, 1.0
    w.V[:V, :V], w.O[:V, V + 1 :], w.U[V + 1 :] = np.eye(V), np.eye(V), written
    return w


@pytest.mark.parametrize("bad", [0, 1])
def test_tokens_count_by_how_many_sequences_have_them_as_their_worst(bad: int) -> None:
    """One bad token takes all the attention, so that a mixture loses what that token loses."""
    scores = [0.0, 0.0, 12.0]
    scores[bad] = 25.0
    w = tables_of(scores, [[6.0, 0, 0], [0, 6.0, 0], [0, 0, 6.0]], [0.0] * 4)
    for level in LEVELS:
        bound, loss = float(bound_cross_entropy(w, level).bound), true_loss(w)
        assert loss * (1 - 1e-9) <= bound < loss * 1.001


@pytest.mark.parametrize("bad", [0, 1])
def test_both_ends_of_the_positional_weight_are_looked_at(bad: int) -> None:
    """Positions differ: if the largest token hurts, it is worst in the heaviest positions, and if
    the smaller one hurts, in the lightest.
    """
    written = [[0.0, 5.0], [0.0, 5.0]]
    written[bad] = [5.0, 0.0]
    w = tables_of([0.0, 0.0], written, [4.0, 0.0, -4.0, -8.0])
    for level in LEVELS:
        assert true_loss(w) * (1 - 1e-9) <= float(bound_cross_entropy(w, level).bound)
    # The sequences with one smaller token besides the query reach both ends.
    tables = cross_entropy.Problem(w, "float64").tables
    ends = cross_entropy._margins(tables, 1, 1, slice(0, 1))
    tokens = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]])
    exact = logits(w, tokens)
    reached = [(exact[:, 0] - exact[:, 1]).min(), (exact[:, 0] - exact[:, 1]).max()]
    np.testing.assert_allclose(sorted(float(end.item()) for end in ends), reached, rtol=1e-9)


def test_a_mean_is_bounded_whatever_weights_are_in_their_intervals() -> None:
    """Intervals a tenth wide, around means above and below zero."""
    rng = np.random.default_rng(0)
    tables = cross_entropy.Problem(tables_of([0.0] * 2, [[0.0] * 2] * 2, [0.0] * 2), "real").tables
    for sign in (1.0, -1.0):
        for _ in range(200):
            low = rng.uniform(0.5, 1.0, 3)
            weights = [Interval(np.array([x]), np.array([1.1 * x])) for x in low]
            values = [np.array([v]) for v in sign * rng.uniform(0, 10, 3)]
            found = float(cross_entropy._mean(tables, weights, values)[0])
            means = []
            for ends in product((1.0, 1.1), repeat=3):
                w = low * ends
                means.append(float((w * np.concatenate(values)).sum() / w.sum()))
            assert max(means) * (1 - sign * 1e-12) <= found


def test_weights_lost_to_underflow_leave_the_largest_value() -> None:
    """Two tokens far below a third: their shares cannot be told in float64, and their losses
    differ.
    """
    for low in np.linspace(-745.3, -743.0, 12):
        w = tables_of([low, -744.5, 0.0], [[9.0, 0, 0], [0, 0.5, 0], [0, 0, 0.5]], [0.0] * 2)
        bound = float(bound_cross_entropy(w, "real").bound)
        assert true_loss(w) * (1 - 1e-6) <= bound


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
