"""The folded tables reproduce the network, and the additive margin has the sign of the logit
difference.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from small_models import KINDS, draw, logits, margins, sequences

from assay.errors import InputError
from assay.proofs.max_of_k.execution import logit_error
from assay.proofs.max_of_k.strategies import brute
from assay.proofs.max_of_k.strategies.base import Problem
from assay.proofs.max_of_k.tables import LEVELS
from assay.proofs.max_of_k.terms import position_terms


@pytest.mark.parametrize("kind", ["rough", "random", "ties"])
def test_the_additive_margin_has_the_sign_of_the_logit_difference(kind: str) -> None:
    for seed in range(5):
        w = draw(seed, kind)
        t, tokens = Problem(w, "float64").tables, sequences(w)
        values, q, m = logits(w, tokens), tokens[:, -1], tokens.max(1)
        difference = values - np.take_along_axis(values, m[:, None], 1)
        total, weight = np.zeros_like(values), np.zeros((len(tokens), 1))
        for p in range(w.positions):
            k = tokens[:, p]
            part = np.exp(t.a.lo[q, k] + t.b.lo[q, p] - (t.a.lo[q].max(1) + t.b.lo[q].max(1)))[
                :, None
            ]
            bracket = t.EV.lo[k] + t.PV.lo[p] + t.D.lo[q]
            total += part * (bracket - np.take_along_axis(bracket, m[:, None], 1))
            weight += part
        np.testing.assert_allclose(
            total / weight, difference, atol=1e-9 * (1 + np.abs(values).max())
        )
        clear = np.abs(difference) > 1e-9
        np.testing.assert_array_equal(np.sign(total[clear]), np.sign(difference[clear]))


def test_position_terms_add_up_to_the_additive_margin() -> None:
    w = draw(3, "rough")
    t, V = Problem(w, "real").tables, w.vocabulary
    tokens = sequences(w)
    signs = margins(w, tokens) < 0
    right = np.zeros(len(tokens), bool)
    for row, sequence in enumerate(tokens):
        q, m = sequence[-1], sequence.max()
        terms, own = position_terms(t, m, slice(q, q + 1))
        total = own[0] + sum(terms[p, k, 0] for p, k in enumerate(sequence[:-1]))
        right[row] = (np.delete(total, m) < 0).all() if V > 1 else True
    np.testing.assert_array_equal(right, signs)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_enclosures(kind: str, level: str) -> None:
    for seed in range(3):
        w = draw(seed, kind)
        try:
            t = Problem(w, level).tables
        except InputError:
            continue
        for name in ("a", "b", "EV", "PV", "D", "ea", "eb"):
            interval = getattr(t, name)
            assert (interval.lo <= interval.hi).all()
            assert np.isfinite(interval.hi).all()
        assert (t.ea.lo >= 0).all()
        assert (t.eb.hi <= 1 + 1e-12).all()


def test_rigorous_tables_enclose_exact_rational_products() -> None:
    from fractions import Fraction

    w = draw(1, "random")
    t = Problem(w, "real").tables

    def exact(x: np.ndarray) -> list[list[Fraction]]:
        return [[Fraction(float(v)) for v in row] for row in np.atleast_2d(x)]

    def times(a: list[list[Fraction]], b: list[list[Fraction]]) -> list[list[Fraction]]:
        return [
            [
                sum((x * y for x, y in zip(row, col, strict=True)), Fraction(0))
                for col in zip(*b, strict=True)
            ]
            for row in a
        ]

    product = times(times(times(exact(w.E), exact(w.V)), exact(w.O)), exact(w.U))
    for k in range(w.vocabulary):
        for x in range(w.vocabulary):
            assert Fraction(t.EV.lo[k, x]) <= product[k][x] <= Fraction(t.EV.hi[k, x])


def test_executed_logits_stay_within_the_forward_error_bound() -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        w = draw(seed, "rough" if seed % 2 else "random")
        bound, tokens = logit_error(w), sequences(w)
        exact = logits(w, tokens)
        for order in (np.arange(w.positions), rng.permutation(w.positions)):
            error = np.abs(logits(w, tokens, dtype=np.float32, order=order) - exact)
            assert (error <= bound[tokens[:, -1]]).all()


def test_differences_of_written_logits_are_bounded_exactly() -> None:
    """Entries that agree to many digits, so that the ends of their enclosures decide."""
    for seed in range(4):
        w = draw(seed, "random")
        columns = np.repeat(w.U[:, :1], w.vocabulary, axis=1)
        close = replace(
            w, U=columns + np.spacing(columns) * np.float32(np.arange(w.vocabulary) % 3)
        )
        problem = Problem(close, "real")
        for factor, differences in (
            (problem.factors.E, problem.outputs.ov),
            (problem.factors.P, problem.outputs.position_ov),
        ):
            exact = (factor @ problem.factors.values).fractions()
            for m in range(w.vocabulary):
                found = differences(m)
                for k, row in enumerate(exact):
                    for x, value in enumerate(row):
                        assert Fraction(float(found[k, x])) >= value - row[m]


def test_the_slack_covers_both_logits_of_a_difference() -> None:
    """One logit may be executed too low and the other too high, by their whole errors each."""
    for seed in range(6):
        w = draw(seed, "rough")
        # Twin columns of the unembedding have equal errors, and so the largest difference.
        twins = replace(w, U=np.repeat(w.U[:, :1], w.vocabulary, axis=1))
        for weights in (w, twins):
            error = logit_error(weights)
            both = error[:, :, None] + error[:, None, :]
            both[:, np.eye(weights.vocabulary, dtype=bool)] = 0
            slack = Problem(weights, "float32").outputs.slack
            assert (slack >= both.max((1, 2))).all()
            assert (slack <= 2 * both.max((1, 2))).all()
            assert not Problem(weights, "real").outputs.slack.any()


def test_biases_and_heads_fold_exactly() -> None:
    w = draw(0, "random")
    shifted = replace(w, k_bias=w.k_bias + np.float32(1.0))
    first, second = Problem(w, "real").tables, Problem(shifted, "real").tables
    np.testing.assert_array_equal(first.ea.lo, second.ea.lo)  # a key bias changes no attention
    moved = replace(w, u_bias=w.u_bias + np.float32(4.0))
    np.testing.assert_allclose(Problem(moved, "real").tables.direct(1), first.direct(1), atol=1e-5)


def test_levels_are_ordered() -> None:
    for seed in range(10):
        w = draw(seed, "rough")
        counts = {level: brute.table(Problem(w, level).tables) for level in LEVELS}
        assert not (counts["float32"] & ~counts["real"]).any()


def test_unknown_level_and_overflow_are_refused() -> None:
    w = draw(0, "random")
    with pytest.raises(InputError, match="unknown level"):
        _ = Problem(w, "exact").tables
    with pytest.raises(InputError, match="overflow"):
        _ = Problem(
            replace(w, E=w.E * np.float32(1e30), U=w.U * np.float32(1e30)), "float32"
        ).tables
    with pytest.raises(InputError, match="exp_ulp"):
        _ = Problem(w, "float32", exp_ulp=0.0).tables
