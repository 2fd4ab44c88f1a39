"""Certificates of bilinear networks made of features: never above the true margin, and exact where
nothing is left unexplained."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from assay.errors import InputError
from assay.mechanisms.crosscoder import Cotraining, Crosscoder, Training, cotrain, hash_of
from assay.mechanisms.crosscoder.bilinear import QuadraticHinge
from assay.proofs.crosscoder.bilinear import (
    STRATEGIES,
    BilinearProblem,
    Weights,
    bilinear_margins,
    evaluation_operations,
    features_of,
    proof_operations,
    true_margins,
)
from assay.proofs.crosscoder.problem import Features, Points
from assay.targets.bilinear import BilinearNetwork

POINTS, SIZE, WIDTH, HIDDEN, OUTPUTS = 6, 5, 4, 3, 3


def problem(seed: int, error: float = 0.1, level: str = "real") -> BilinearProblem:
    """A random network and random features; at error 0 the features are the inputs themselves."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32).astype(np.float64)

    weights = Weights(
        draw(WIDTH, SIZE), draw(HIDDEN, WIDTH), draw(HIDDEN, WIDTH), draw(WIDTH, HIDDEN),
        draw(OUTPUTS, WIDTH),
    )  # fmt: skip
    inputs = np.maximum(draw(POINTS, SIZE), 0)
    decoder = np.stack([weights.E.T, draw(SIZE, WIDTH)], 1)
    bias = np.zeros((2, WIDTH))
    if error:
        decoder[:, 0] += error * draw(SIZE, WIDTH)
        bias += error * draw(2, WIDTH)
    labels = rng.integers(0, OUTPUTS, POINTS)
    return BilinearProblem(weights, Points(inputs, labels), Features(decoder, bias, inputs), level)


def exact_true_margins(of: BilinearProblem) -> list[Fraction]:
    def apply(matrix: np.ndarray, x: list[Fraction]) -> list[Fraction]:
        return [
            sum((Fraction(w) * v for w, v in zip(row, x, strict=True)), Fraction(0))
            for row in matrix.tolist()
        ]

    w, found = of.weights, []
    for x, label in zip(of.points.inputs.tolist(), of.points.labels.tolist(), strict=True):
        state = apply(w.E, [Fraction(v) for v in x])
        hidden = [a * b for a, b in zip(apply(w.L, state), apply(w.R, state), strict=True)]
        state = [a + b for a, b in zip(state, apply(w.D, hidden), strict=True)]
        logits = apply(w.U, state)
        found.append(logits[label] - max(v for k, v in enumerate(logits) if k != label))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_no_bound_exceeds_the_true_margin_whatever_the_advice(seed):
    for error in (0.0, 0.05, 1.0):
        of = problem(seed, error)
        rng = np.random.default_rng(seed)
        codes = np.maximum(rng.normal(size=of.features.codes.shape), 0)
        for one in (of, replace(of, features=replace(of.features, codes=codes))):
            true = exact_true_margins(one)
            for name in STRATEGIES:
                for bound, margin in zip(bilinear_margins(one, name).tolist(), true, strict=True):
                    assert Fraction(bound) <= margin, (name, error)


def test_without_error_the_bound_is_the_margin_and_levels_agree():
    of = problem(1, 0.0)
    for name in STRATEGIES:
        np.testing.assert_allclose(bilinear_margins(of, name), true_margins(of), atol=1e-9)
    of = problem(2, 0.3)
    compact, exact = (bilinear_margins(of, name) for name in ("compact", "exact"))
    assert (compact <= exact + 1e-9).all()
    for name in STRATEGIES:
        search = bilinear_margins(replace(of, level="float64"), name)
        np.testing.assert_allclose(bilinear_margins(of, name), search, rtol=1e-8, atol=1e-8)


def test_operations_of_the_network_and_of_pairs():
    of = problem(0)
    affine = [(SIZE, WIDTH), (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH), (WIDTH, OUTPUTS)]
    expected = POINTS * sum(o * (2 * i - 1) for i, o in affine)
    expected += POINTS * (HIDDEN + WIDTH + OUTPUTS - 1)  # products, residual sum, comparison
    assert evaluation_operations(of) == expected
    few = replace(of.features, codes=of.features.codes * (np.arange(SIZE) < 2))
    sparse = proof_operations(replace(of, features=few), "compact")
    assert 0 < sparse < proof_operations(of, "compact")


@pytest.mark.slow
def test_co_training_proves_more_and_names_its_network():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(120, 6, generator=generator)
    y = (x[:, 0] + x[:, 1] > x[:, 2] + x[:, 3]).long()
    shares = []
    for weight in (0.0, 1.0):
        generator = torch.Generator().manual_seed(1)
        model = BilinearNetwork(6, 2, width=5, hidden=6, blocks=1, generator=generator)
        found = Crosscoder(("embed", "blocks.0"), 5, 12, generator=generator)

        def terms(model: BilinearNetwork = model, weight: float = weight) -> list[QuadraticHinge]:
            return [QuadraticHinge(model, y, 0.5, weight)]

        cotrain(
            model, found, x, y, Training(120, 1e-2, 1e-3),
            terms=terms, generator=generator, cotraining=Cotraining(0.0, 64),
        )  # fmt: skip
        assert found.model_hash == hash_of(model)
        points = Points(x.double().numpy(), y.numpy())
        of = BilinearProblem(Weights.of(model), points, features_of(found, model, points))
        bounds = bilinear_margins(of, "compact")
        assert (bounds <= true_margins(of) + 1e-9).all()
        shares.append(float((bounds > 0).mean()))
    assert shares[1] > shares[0] + 0.1
    assert shares[1] > 0.5


def test_bad_input_is_refused():
    of = problem(0)
    with pytest.raises(InputError, match="did you mean compact"):
        bilinear_margins(of, "compat")
    with pytest.raises(InputError, match="labels must lie in"):
        replace(of, points=Points(of.points.inputs, of.points.labels + 9))
    with pytest.raises(InputError, match="points have 4 inputs"):
        replace(of, points=Points(of.points.inputs[:, :4], of.points.labels))
    with pytest.raises(InputError, match="features are of 6 points"):
        replace(of, points=Points(of.points.inputs[:3], of.points.labels[:3]))
    with pytest.raises(InputError, match="one bilinear block"):
        Weights.of(BilinearNetwork(4, 2, blocks=2))
    with pytest.raises(InputError, match="one bilinear block"):
        Weights.of(BilinearNetwork(4, 2, blocks=1, norm=True))
    model = BilinearNetwork(SIZE, OUTPUTS, width=WIDTH, hidden=HIDDEN, blocks=1)
    with pytest.raises(InputError, match="must read the sites"):
        features_of(Crosscoder(("embed",), WIDTH, 3), model, of.points)
    with pytest.raises(InputError, match="batch must be at least 1"):
        Cotraining(batch=0)
