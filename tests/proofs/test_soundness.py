"""No strategy certifies a wrong sequence, on networks of every kind and at every level; planted
errors are caught.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from small_models import KINDS, draw, empty, planted
from soundness import check

from assay.errors import AssayError
from assay.proofs.max_of_k import cells
from assay.proofs.max_of_k.strategies import STRATEGIES, low_rank, named, subcubic
from assay.proofs.max_of_k.strategies.base import Problem
from assay.proofs.max_of_k.tables import LEVELS, Outputs
from assay.targets.max_of_k import Weights

CASES = list(product(KINDS, LEVELS))


def sample(count: int, first: int) -> list[tuple[int, str, str, str]]:
    names = list(STRATEGIES)
    return [
        (first + i, *CASES[i % len(CASES)], names[(i // len(CASES) + 7 * i) % len(names)])
        for i in range(count)
    ]


def attempt(seed: int, kind: str, level: str, strategy: str, *, most: int) -> int:
    try:
        return check(draw(seed, kind, most_sequences=most), strategy, level)
    except AssayError as error:
        if "overflow" not in str(error):
            raise
        return 0  # refused, never certified


@pytest.mark.parametrize("kind", KINDS)
def test_no_strategy_certifies_a_wrong_sequence(kind: str) -> None:
    for case in sample(900, 0):
        if case[1] == kind:
            attempt(*case, most=130)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_networks(part: int) -> None:
    for case in sample(1000, 10_000 + 1000 * part):
        attempt(*case, most=700)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if "global" not in name])
def test_a_network_that_is_right_is_certified_in_full(strategy: str, level: str) -> None:
    weights = planted(5, 3, np.random.default_rng(0), 0.0)
    assert check(weights, strategy, level) == 5**3


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ties_are_wrong(strategy: str, level: str) -> None:
    """Where all logits are equal to the last bit, no sequence is right, at no level."""
    for V, K in ((2, 2), (3, 3), (4, 2)):
        w = empty(V, K, 2, 2)
        for shift in (0.0, 1.0):
            assert check(replace(w, u_bias=w.u_bias + np.float32(shift)), strategy, level) == 0
        ones = np.ones((V, 2), np.float32)  # attention and values, the same for all logits
        tied = replace(w, E=ones, V=w.V + 1, O=w.O + 1, U=w.U + 1, Q=w.Q + 1, K=w.K + 1)
        assert check(tied, strategy, level) == 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ties_are_wrong_whatever_the_advice_claims(strategy: str, level: str) -> None:
    """Advice that claims every sequence, which no search finds, certifies none of them."""
    for V, K in ((2, 2), (3, 3), (4, 2)):
        w, chosen = empty(V, K, 2, 2), named(strategy)
        for shift in (0.0, 1.0):
            problem = Problem(replace(w, u_bias=w.u_bias + np.float32(shift)), level)
            advice = dict(chosen.search(problem))
            if "sets" in advice:
                families = len(advice["sets"])
                advice["sets"] = np.repeat(cells.everything(V, K), families, axis=0)
            if "limits" in advice:
                m, c = np.arange(V)[None, :, None], np.arange(K)
                every = np.where(c == 0, 0, np.maximum(m - 1, 0))
                advice["limits"] = np.where(cells.possible(V, K), every, -1).astype(np.int16)
            assert chosen.verify(problem, advice).weigh() == 0


def test_a_tie_in_one_cell_spares_the_others() -> None:
    """The logits of the two largest tokens are twins, so that sequences with either are wrong."""
    w = planted(4, 3, np.random.default_rng(0), 0.0)
    w.E[3], w.U[:, 3], w.u_bias[3] = w.E[2], w.U[:, 2], w.u_bias[2]
    for strategy in STRATEGIES:
        for level in LEVELS:
            count = check(w, strategy, level)
            assert count <= 2**3
    assert check(w, "box_exact", "float64") == 2**3


def unchecked_end(
    p: subcubic.Prepared, q: np.ndarray, m: np.ndarray, c: np.ndarray, j: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    low, _ = ATTENTION(p, q, m, c, j)
    return low, low


def without_cross_terms(f, advice, how):  # type: ignore[no-untyped-def]
    scores = SCORES(f, advice, how)
    if how == "exact":
        return scores
    W, Z = advice["query_directions"].astype(float), advice["key_directions"].astype(float)
    left = np.eye(len(W)) - W @ np.linalg.pinv(W)
    right = np.eye(len(W)) - Z @ np.linalg.pinv(Z)
    plain = f.query if isinstance(f.query, np.ndarray) else f.query.interval().lo
    keys = f.keys if isinstance(f.keys, np.ndarray) else f.keys.interval().lo
    E = f.E if isinstance(f.E, np.ndarray) else f.E.interval().lo
    error = np.ptp(plain @ left @ right @ keys @ (E - advice["key_center"]).T, axis=1) / np.sqrt(
        f.head
    )
    return low_rank.ExplainedScores(scores.content, error, scores.position)


ATTENTION, SCORES = subcubic.attention, low_rank.scores
POSSIBLE, COUNT, AS_SETS, EVERYTHING = (
    cells.possible,
    cells._count,
    subcubic.as_sets,
    cells.everything,
)


def wrong_limit(V: int, K: int) -> np.ndarray:
    q, m, c = np.ogrid[:V, :V, :K]
    return (q <= m) & (c <= K - 1) & ((c == 0) | (m > 0))


def count_every_lone_cell(sets: np.ndarray) -> int:
    lone = POSSIBLE(sets.shape[0], sets.shape[2])[:, :, 0]
    return COUNT(sets) + int((lone & ~sets[:, :, 0].any(-1)).sum())


def trusting(self, problem: Problem, advice):  # type: ignore[no-untyped-def]
    other = Problem(replace(problem.weights, P=problem.weights.P[::-1].copy()), problem.level)
    found = subcubic.search(subcubic.prepare(other.factors, other.outputs, advice, self.how))
    return cells.CertifiedSets(
        AS_SETS(found, problem.weights.vocabulary, problem.weights.positions)
    )


MUTATIONS: dict[str, tuple[object, str, object, list[str]]] = {
    "one choice too few": (
        subcubic,
        "as_sets",
        lambda limits, V, K: AS_SETS(
            np.where(np.arange(K) == 0, limits, np.maximum(limits - 1, -1)), V, K
        ),
        ["subcubic"],
    ),
    "negative part times its largest weight": (
        Outputs,
        "times",
        lambda self, w, value: w.hi * value,
        ["worst_positions_qk"],
    ),
    "one end of a convex function": (subcubic, "attention", unchecked_end, ["subcubic_anchored"]),
    "other positions in the search": (subcubic.SubCubic, "verify", trusting, ["subcubic"]),
    "cross terms dropped": (
        low_rank,
        "scores",
        without_cross_terms,
        ["subcubic_qk_range", "subcubic_low_rank"],
    ),
    "largest token nowhere": (cells, "possible", wrong_limit, ["subcubic", "cubic", "box_exact"]),
    "an empty product certifies": (cells, "_count", count_every_lone_cell, ["cubic", "box_exact"]),
}


def check_explanation(weights: Weights, how: str) -> None:
    """Assert that what a low-rank explanation of the scores leaves out differs within a row by
    at most its error.
    """
    problem = Problem(weights, "real")
    advice = low_rank.find_advice(problem.floating().factors, qk=how, direct="exact", rank=1)
    found = low_rank.scores(problem.factors, advice, how)
    rest = problem.floating().tables.a.lo - found.content.lo
    assert (
        np.ptp(rest, axis=1) <= found.error * (1 + 1e-9) + 1e-9 * np.abs(found.content.lo).max()
    ).all(), how


@pytest.mark.parametrize("how", low_rank.QK)
def test_errors_of_low_rank_scores_cover_their_residual(how: str) -> None:
    for seed in range(10):
        for kind in ("rough", "random"):
            check_explanation(draw(seed, kind), how)


def caught(strategies: list[str]) -> str | None:
    """Return what the checks above say about some networks, or None if they pass."""
    try:
        for seed in (*range(12), 43, 106, 123):
            for kind in ("rough", "random"):
                for strategy in strategies:
                    attempt(seed, kind, "real", strategy, most=260)
                if seed < 5 and kind == "random":
                    check_explanation(draw(seed, kind), "range")
        for strategy in strategies:
            assert check(planted(5, 3, np.random.default_rng(0), 0.0), strategy, "real") == 5**3, (
                "not certified in full"
            )
    except AssertionError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_error_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, attribute, wrong, strategies = MUTATIONS[name]
    monkeypatch.setattr(where, attribute, wrong)
    assert caught(strategies) is not None


@pytest.mark.slow
def test_nothing_is_caught_without_a_planted_error() -> None:
    for _, _, _, strategies in MUTATIONS.values():
        assert caught(strategies) is None
