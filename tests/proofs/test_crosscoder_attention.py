"""Certificates of one-layer attention models made of features: never above the true margin, and
exact where nothing is left unexplained."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from attention_cases import HEAD, WIDTH, K, V, problem
from flint import arb, ctx
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.errors import InputError
from assay.learn.max_of_k import train_max_of_k
from assay.mechanisms.crosscoder import Crosscoder, Training, start_at_codes, train
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
from assay.proofs.crosscoder.problem import Features
from assay.targets.max_of_k import MaxOfK, weights_of


def exact_true_margins(of: AttentionProblem) -> list[arb]:
    """The network in balls of 200 bits, number by number."""
    w = {
        entry.name: [[arb(x) for x in row] for row in np.atleast_2d(array).tolist()]
        for entry in fields(of.weights)
        for array in [getattr(of.weights, entry.name)]
    }

    def apply(x: list[arb], matrix: list[list[arb]], bias: list[arb]) -> list[arb]:
        return [
            sum((a * row[j] for a, row in zip(x, matrix, strict=True)), bias[j])
            for j in range(len(bias))
        ]

    found = []
    for tokens in of.tokens.tolist():
        states = [
            [a + b for a, b in zip(w["E"][t], w["P"][p], strict=True)] for p, t in enumerate(tokens)
        ]
        query = apply(states[-1], w["Q"], w["q_bias"][0])
        scores = [
            sum(a * b for a, b in zip(query, apply(x, w["K"], w["k_bias"][0]), strict=True))
            / arb(HEAD).sqrt()
            for x in states
        ]
        total = sum(s.exp() for s in scores)
        last = [a + b for a, b in zip(states[-1], w["o_bias"][0], strict=True)]
        for x, score in zip(states, scores, strict=True):
            written = apply(apply(x, w["V"], w["v_bias"][0]), w["O"], [arb(0)] * WIDTH)
            last = [a + score.exp() / total * b for a, b in zip(last, written, strict=True)]
        logits = apply(last, w["U"], w["u_bias"][0])
        others = [logits[k] for k in range(V) if k != max(tokens)]
        found.append(min(logits[max(tokens)] - other for other in others))
    return found


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.01, 0.3, 2.0]), st.booleans())
@settings(max_examples=6, deadline=None)
def test_no_bound_exceeds_the_true_margin_whatever_the_advice(seed, error, own):
    of = problem(seed, error)
    if not own:
        codes = np.abs(np.random.default_rng(seed).normal(size=of.features.codes.shape))
        of = replace(of, features=replace(of.features, codes=codes))
    with ctx.workprec(200):
        true = exact_true_margins(of)
        np.testing.assert_allclose(true_margins(of), [float(x) for x in true], atol=1e-9)
        for name in STRATEGIES:
            for bound, margin in zip(attention_margins(of, name).tolist(), true, strict=True):
                assert arb(bound) <= margin, (name, error)


def test_without_error_the_bound_is_the_margin_and_levels_agree():
    of = problem(1, 0.0)
    for name in STRATEGIES:
        np.testing.assert_allclose(attention_margins(of, name), true_margins(of), atol=1e-9)
    of = problem(2, 0.05)
    compact, exact = (attention_margins(of, name) for name in ("compact", "exact"))
    assert (compact < exact).all()
    for name in STRATEGIES:
        search = attention_margins(replace(of, level="float64"), name)
        np.testing.assert_allclose(attention_margins(of, name), search, rtol=1e-8, atol=1e-8)


def test_the_error_at_first_order_costs_nothing():
    # Halving the error halves what a bound by norms loses, and quarters what a known error loses.
    lost = {}
    for name in STRATEGIES:
        gaps = []
        for error in (2e-4, 1e-4):
            of = problem(3, error)
            gaps.append(float((true_margins(of) - attention_margins(of, name)).mean()))
        lost[name] = gaps[0] / gaps[1]
    assert lost["compact"] == pytest.approx(2, rel=0.02)
    assert lost["exact"] == pytest.approx(4, rel=0.1)


def test_operations_of_the_network_and_of_sparse_codes():
    of = problem(0)
    points = len(of.tokens)
    affine = lambda rows, i, o: rows * o * (2 * i - 1) + rows * o  # noqa: E731
    expected = points * K * WIDTH  # embeddings and positions
    expected += affine(points, WIDTH, HEAD) + 2 * affine(points * K, WIDTH, HEAD)
    expected += points * (K * HEAD + K * (HEAD - 1) + K)  # scores
    expected += points * ((K - 1) + K + K + (K - 1) + K)  # softmax
    expected += points * (K * HEAD + (K - 1) * HEAD)  # mixture
    expected += points * (WIDTH * (2 * HEAD - 1) + 2 * WIDTH)
    expected += affine(points, WIDTH, V) + points * (V - 1)
    assert evaluation_operations(of) == expected
    few = replace(of.features, codes=of.features.codes * (np.arange(K * V) < 2))
    sparse = proof_operations(replace(of, features=few), "compact")
    assert 0 < sparse < proof_operations(of, "compact")


def test_features_of_a_trained_model_prove_it_right():
    model = train_max_of_k(6, 2, 12, seed=0, steps=250, batch=64, rate=5e-3)
    weights = weights_of(model)
    tokens = np.indices((6, 6)).reshape(2, -1).T
    states = attention_states(weights, tokens)
    with torch.no_grad():
        logits = states[:, -1].double() @ model.unembed.W_U.double()
        np.testing.assert_allclose(logits, model(torch.from_numpy(tokens)), atol=1e-5)
    one_hot = torch.nn.functional.one_hot
    placed = torch.from_numpy(tokens)
    proposed = torch.cat([one_hot(placed, 6).flatten(1), one_hot(placed.amax(1), 6)], 1).float()
    found = Crosscoder(attention_sites(2), 12, 18)
    scales = equal_norm_scales(states)
    start_at_codes(found, states, proposed, scales)
    generator = torch.Generator().manual_seed(0)
    draw = rows_of(states, torch.arange(36))
    train(found, draw, Training(30, 1e-3, 0.02), scales=scales, generator=generator)
    of = AttentionProblem(weights, tokens, features_of(found, weights, tokens))
    right = true_margins(of) > 0
    assert right.mean() > 0.9
    for name in STRATEGIES:
        assert ((attention_margins(of, name) > 0) <= right).all()
        assert (attention_margins(of, name) > 0).sum() > 0.8 * right.sum()
    assert (claimed_margins(of) > 0).mean() > 0.8


def test_bad_input_is_refused():
    of = problem(0)
    with pytest.raises(InputError, match="did you mean compact"):
        attention_margins(of, "compat")
    with pytest.raises(InputError, match=r"tokens must be \(points, 3\), got \(4, 2\)"):
        replace(of, tokens=of.tokens[:4, :2])
    with pytest.raises(InputError, match=r"tokens must lie in 0\.\.3"):
        replace(of, tokens=of.tokens + 1)
    with pytest.raises(InputError, match="the features are of 64 points"):
        replace(of, tokens=of.tokens[:5])
    f = of.features
    with pytest.raises(InputError, match="the network needs"):
        replace(of, features=Features(f.decoder[:, :3], f.bias[:3], f.codes))
    with pytest.raises(InputError, match="at level real, not float32"):
        replace(of, level="float32")
    weights = weights_of(MaxOfK(V, K, WIDTH, generator=torch.Generator()))
    with pytest.raises(InputError, match="must read 'position 0'"):
        features_of(Crosscoder(("embed", "last"), WIDTH, 3), weights, of.tokens)
