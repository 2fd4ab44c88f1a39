"""Certificates made of features: never above the true margin, and the identities they rest on."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.bounds.rounding import Interval
from assay.errors import InputError
from assay.proofs.crosscoder.arithmetic import arithmetic
from assay.proofs.crosscoder.certificates import (
    Sides,
    exact_margins,
    interactions,
    linear_margins,
    sides_of,
)
from assay.proofs.crosscoder.groups import group_margins, refine
from assay.proofs.crosscoder.heuristic import heuristic_estimate
from assay.proofs.crosscoder.problem import (
    Features,
    Network,
    Points,
    Problem,
    claimed_margins,
    true_margins,
)
from assay.proofs.crosscoder.prove import STRATEGIES, curve, evaluation_operations, prove
from assay.proofs.crosscoder.relaxation import relax
from assay.proofs.crosscoder.sides import one_side, strongest_sides


def problem(
    seed: int,
    level: str = "real",
    *,
    points: int = 12,
    size: int = 5,
    error: float = 1.0,
    scale: float = 1.0,
) -> Problem:
    """A random network and random features; `error` scales how far rhat_0 lies from r_0 (at zero
    the features are the inputs themselves and eps_0 is rounding alone).
    """
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (scale * rng.normal(size=shape)).astype(np.float32).astype(np.float64)

    width, hidden, outputs = 4, 7, 3
    network = Network(
        draw(width, size), draw(width), draw(hidden, width), draw(hidden), draw(width, hidden),
        draw(width), draw(outputs, width), draw(outputs),
    )  # fmt: skip
    inputs = np.maximum(draw(points, size), 0)
    decoder = np.stack([network.E.T, draw(size, width)], 1)
    bias = np.stack([network.b_e, draw(width)])
    if error:
        decoder[:, 0] += np.float32(error) * draw(size, width)
        decoder = decoder.astype(np.float32).astype(np.float64)
    labels = rng.integers(0, outputs, points)
    return Problem(network, Points(inputs, labels), Features(decoder, bias, inputs.copy()), level)


def exact_true_margins(of: Problem) -> list[Fraction]:
    """The network's margins in rational arithmetic, value by value."""
    n = of.network

    def affine(W: np.ndarray, x: list[Fraction], b: np.ndarray) -> list[Fraction]:
        return [
            sum((Fraction(w) * v for w, v in zip(row, x, strict=True)), Fraction(c))
            for row, c in zip(W.tolist(), b.tolist(), strict=True)
        ]

    found = []
    for x, label in zip(of.points.inputs.tolist(), of.points.labels.tolist(), strict=True):
        state = affine(n.E, [Fraction(v) for v in x], n.b_e)
        hidden = [max(v, Fraction(0)) for v in affine(n.W_in, state, n.b_in)]
        state = [a + b for a, b in zip(state, affine(n.W_out, hidden, n.b_out), strict=True)]
        logits = affine(n.U, state, n.b_u)
        found.append(logits[label] - max(v for k, v in enumerate(logits) if k != label))
    return found


def assert_below(bounds: np.ndarray, true: list[Fraction], what: str) -> None:
    for bound, margin in zip(bounds.tolist(), true, strict=True):
        assert bound == -np.inf or Fraction(bound) <= margin, what


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]
)
def test_no_bound_exceeds_the_true_margin(seed):
    for error, scale in ((1.0, 1.0), (0.01, 1.0), (0.0, 1.0), (0.1, 1e-3), (0.1, 30.0)):
        of = problem(seed, error=error, scale=scale, points=6)
        true = exact_true_margins(of)
        for name in STRATEGIES:
            assert_below(prove(of, name).margins, true, f"{name}, error {error}, scale {scale}")
        for one in refine(of):
            assert_below(one.margins, true, f"groups by {one.about}")


@given(st.integers(0, 10_000), st.floats(0, 3), st.integers(1, 4))
@settings(max_examples=5, deadline=None)
def test_any_advice_is_sound(seed, error, groups):
    of = problem(seed, points=6, error=error)
    rng = np.random.default_rng(seed + 1)
    sides = Sides(rng.integers(0, groups, 6), rng.random((groups, 7)) < 0.5)
    codes = np.maximum(rng.normal(size=of.features.codes.shape), 0) * (rng.random(5) < 0.7)
    other = Problem(
        of.network, of.points, Features(of.features.decoder, of.features.bias, codes), "real"
    )
    for one in (of, other):
        true = exact_true_margins(one)
        for compact in (False, True):
            assert_below(linear_margins(one, sides, compact=compact), true, "linear")
        assert_below(exact_margins(one), true, "exact")
        by_label = [np.flatnonzero(one.points.labels == y) for y in np.unique(one.points.labels)]
        for rows in by_label:
            assert_below(group_margins(one, rows), [true[row] for row in rows], "group")


def test_norms_and_linear_bounds_are_rounded_to_the_safe_side():
    of = problem(7, error=1.0)
    n, f = of.network, of.features

    def exactly(array: np.ndarray) -> np.ndarray:
        return np.vectorize(Fraction, otypes=[object])(array)

    state = exactly(of.points.inputs) @ exactly(n.E.T) + exactly(n.b_e)
    error = state - exactly(f.codes) @ exactly(f.decoder[:, 0]) - exactly(f.bias[0])
    for uppers, rows in ((of.error_norm, error), (of.tables.reach, exactly(n.W_in))):
        for upper, row in zip(uppers.tolist(), rows, strict=True):
            assert 0 <= Fraction(upper) ** 2 - (row * row).sum() <= Fraction(1, 10**12)
    # Where features are the inputs no norm is left, and the bound is a rational number.
    of = problem(7, error=0.0)
    n, f, sides = of.network, of.features, Sides(np.zeros(12, int), np.arange(7)[None] % 2 == 0)
    P, N = (exactly(f.codes) @ np.maximum(sign * exactly(f.decoder[:, 0]) @ exactly(n.W_in.T), 0)
            + np.maximum(sign * (exactly(n.W_in) @ exactly(f.bias[0]) + exactly(n.b_in)), 0)
            for sign in (1, -1))  # fmt: skip
    rebuilt = exactly(f.codes) @ exactly(f.decoder[:, 0]) + exactly(f.bias[0])
    written = rebuilt + P @ exactly(n.W_out.T) + exactly(n.b_out)
    logits = written @ exactly(n.U.T) + exactly(n.b_u)
    inner = exactly(n.U) @ exactly(n.W_out)
    chosen = np.where(sides.negative, N, P)
    for row, label in enumerate(of.points.labels.tolist()):
        lost = np.maximum(inner[label] - inner, 0) @ chosen[row]
        bounds = logits[row, label] - logits[row] - lost
        least = min(bound for k, bound in enumerate(bounds) if k != label)
        found = Fraction(linear_margins(of, sides)[row])
        assert 0 <= least - found <= Fraction(1, 10**10)


def test_the_interaction_identity_is_exact():
    of = problem(3, "float64")
    n, f = of.network, of.features
    shared = interactions(of)
    state = f.codes @ f.decoder[:, 0] + f.bias[0]
    direct = n.W_out @ np.maximum(n.W_in @ state.T + n.b_in[:, None], 0)
    alone = np.maximum(f.decoder[:, 0] @ n.W_in.T, 0) @ n.W_out.T
    fixed = np.maximum(n.W_in @ f.bias[0] + n.b_in, 0) @ n.W_out.T
    np.testing.assert_allclose(direct.T, f.codes @ alone + fixed - shared @ n.W_out.T, atol=1e-10)
    assert (shared > 0).any()


def test_without_error_exact_interactions_give_the_margin_itself():
    of = problem(1, error=0.0)
    np.testing.assert_allclose(exact_margins(of), true_margins(of), atol=1e-9)


def test_an_error_that_no_neuron_reads_counts_by_its_norm():
    of = problem(0, error=1.0)
    of = replace(of, network=replace(of.network, W_out=0 * of.network.W_out))
    n, f, labels = of.network, of.features, of.points.labels
    rebuilt = f.codes @ f.decoder[:, 0] + f.bias[0]
    size = np.linalg.norm(of.points.inputs @ n.E.T + n.b_e - rebuilt, axis=1)
    logits = (rebuilt + n.b_out) @ n.U.T + n.b_u
    leads = logits[np.arange(12), labels][:, None] - logits
    expected = leads - size[:, None] * np.linalg.norm(n.U[labels][:, None] - n.U, axis=2)
    expected[np.arange(12), labels] = np.inf
    found = linear_margins(of, one_side(of), compact=True)
    np.testing.assert_allclose(found, expected.min(1), atol=1e-9)
    assert_below(found, exact_true_margins(of), "compact")


def test_an_error_passes_by_half_up_to_as_much_again():
    # One coordinate: r_0 = 1, rhat_0 = .8, one neuron that copies it, logits +r_1 and -r_1.
    one, zero = np.ones((1, 1)), np.zeros(1)
    network = Network(one, zero, one, zero, one, zero, np.array([[1.0], [-1.0]]), np.zeros(2))
    features = Features(np.full((1, 2, 1), 0.8), np.zeros((2, 1)), one)
    of = Problem(network, Points(one, np.zeros(1, dtype=np.int64)), features)
    lead, known, reach = 2 * (0.8 + 0.8), 2 * (1 + 0.5) * 0.2, 2 * 0.5 * 0.2
    assert lead + known - reach < true_margins(of)[0] == 4
    for sides in (one_side(of), strongest_sides(of)):
        np.testing.assert_allclose(linear_margins(of, sides), lead + known - reach)
        np.testing.assert_allclose(linear_margins(of, sides, compact=True), lead - known - reach)
    np.testing.assert_allclose(exact_margins(of), lead + known - reach)


def test_searched_sides_certify_no_less_than_those_that_are_smaller_on_average():
    more = 0
    for seed in range(6):
        of = problem(seed, "float64", points=40, error=0.05)
        for search, groups in ((one_side, 1), (strongest_sides, 5)):
            found = search(of)
            P, N = sides_of(of, np.arange(40))
            lead = np.zeros((groups, 7))
            np.add.at(lead, found.group, P - N)
            plain = Sides(found.group, lead > 0)
            counts = [int((linear_margins(of, one) > 0).sum()) for one in (found, plain)]
            assert counts[0] >= counts[1]
            more += counts[0] - counts[1]
    assert more > 5


def test_levels_agree_and_only_one_proves():
    of = problem(2, error=0.3)
    for name in STRATEGIES:
        real, search = prove(of, name), prove(of.at("float64"), name)
        np.testing.assert_allclose(real.margins, search.margins, rtol=1e-8, atol=1e-8)
        assert real.proved
        assert not search.proved
        assert real.operations == search.operations > 0
        assert (real.margins <= search.margins + 1e-12).all()


def test_certificates_are_ordered_as_they_should_be():
    for seed in range(2):
        of = problem(seed, error=0.2)
        found = {name: prove(of, name).margins for name in STRATEGIES}
        assert (found["compact"] <= found["strongest"] + 1e-9).all()
        assert (found["strongest"] <= found["exact"] + 1e-9).all() or (
            found["strongest"].mean() <= found["exact"].mean()
        )
        assert (found["intervals"] <= found["linear_propagation"] + 1e-9).mean() > 0.5


def test_groups_of_one_point_are_exact_and_the_curve_never_falls():
    of = problem(4, error=0.5, points=20)
    true = true_margins(of)
    for row in range(20):
        np.testing.assert_allclose(group_margins(of, np.array([row]))[0], true[row], atol=1e-8)
    found = curve(of)
    assert (found[-1].right == (true > 0)).all()
    for before, after in pairwise(found):
        assert after.groups >= before.groups
        assert after.operations > before.operations
        assert (after.right >= before.right).all()


def test_operations_are_those_of_the_sums():
    of = problem(0, points=10, size=5)
    rows, width, hidden, outputs = 10, 4, 7, 3
    affine = [(5, width), (width, hidden), (hidden, width), (width, outputs)]
    expected = sum(rows * o * (2 * i - 1) for i, o in affine)
    expected += rows * (width + hidden + width + outputs)  # biases
    expected += rows * (hidden + width)  # relu, residual sum
    assert evaluation_operations(of) == expected + rows * (outputs - 1)


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_relaxations_lie_below_the_neurons(seed):
    rng = np.random.default_rng(seed)
    low = rng.normal(size=4) * rng.choice([0, 1, 10])
    high = low + np.abs(rng.normal(size=4)) * rng.choice([0, 1e-12, 1])
    inner = rng.normal(size=(3, 4))
    ar = arithmetic("real")
    slope, offset = relax(ar, ar.exact(inner), low, high)
    for share in rng.random(20):
        x = low + share * (high - low)
        x = np.clip(x, low, high)
        for k in range(3):
            value = sum(Fraction(a) * max(Fraction(b), 0) for a, b in zip(inner[k], x, strict=True))
            bound = Fraction(offset.lo[k]) + sum(
                Fraction(a) * Fraction(b) for a, b in zip(slope.lo[k], x, strict=True)
            )
            reach = sum(
                (Fraction(b) - Fraction(a)) * abs(Fraction(c))
                for a, b, c in zip(slope.lo[k], slope.hi[k], x, strict=True)
            )
            assert bound - reach <= value


def test_intervals_of_products_enclose_them():
    rng = np.random.default_rng(0)
    ar = arithmetic("real")
    a, b = rng.normal(size=(3, 5)), rng.normal(size=(5, 2))
    wide = Interval(a, a + 1e-3)
    found = ar.matmul(wide, ar.exact(b))
    for i in range(3):
        for j in range(2):
            ends = [
                sum(
                    max(Fraction(x) * Fraction(v) for x in (lo, hi)) if upper else
                    min(Fraction(x) * Fraction(v) for x in (lo, hi))
                    for lo, hi, v in zip(wide.lo[i], wide.hi[i], b[:, j], strict=True)
                )
                for upper in (False, True)
            ]  # fmt: skip
            assert Fraction(found.lo[i, j]) <= ends[0] <= ends[1] <= Fraction(found.hi[i, j])


def test_an_estimate_is_no_bound_and_says_how_wide_it_would_have_to_be():
    of = problem(5, "float64", error=0.0, points=60)
    n, x = of.network, of.points.inputs
    state = x @ n.E.T + n.b_e
    state = state + np.maximum(state @ n.W_in.T + n.b_in, 0) @ n.W_out.T + n.b_out
    # Features that rebuild the last state up to noise that is what it is taken for.
    rng = np.random.default_rng(0)
    solved = np.linalg.lstsq(
        np.c_[x, np.ones(60)], state + rng.normal(size=state.shape), rcond=None
    )
    decoder = of.features.decoder.copy()
    decoder[:, 1] = solved[0][:5]
    bias = np.stack([of.features.bias[0], solved[0][5]])
    of = Problem(n, of.points, Features(decoder, bias, x.copy()), "float64")
    found = heuristic_estimate(of, np.arange(60))
    assert not hasattr(found, "proved")
    assert 0 <= found.right <= 1
    assert found.width() > 0
    assert found.stretch(found.margins) == 0
    assert found.stretch(found.margins + 3 * found.deviations) == pytest.approx(3 / 1.96, rel=1e-3)
    assert (claimed_margins(of) <= found.margins + 1e-9).all()
    with pytest.raises(InputError, match="true margins have shape"):
        found.stretch(np.zeros(3))


def test_bad_input_is_refused():
    of = problem(0)
    with pytest.raises(InputError, match="unknown strategy 'strongst'; did you mean strongest"):
        prove(of, "strongst")
    with pytest.raises(InputError, match="at level real, not float32"):
        of.at("float32")
    with pytest.raises(InputError, match="did you mean real"):
        of.at("reals")
    f = of.features
    with pytest.raises(InputError, match="must not be negative"):
        Features(f.decoder, f.bias, f.codes - 9)
    with pytest.raises(InputError, match="codes holds NaN"):
        Features(f.decoder, f.bias, f.codes * np.nan)
    with pytest.raises(InputError, match="are needed, got"):
        Features(f.decoder[:, :1], f.bias, f.codes)
    with pytest.raises(InputError, match="features are of 11 points"):
        Problem(of.network, of.points, Features(f.decoder, f.bias, f.codes[:11]))
    with pytest.raises(InputError, match="labels must lie in"):
        Problem(of.network, Points(of.points.inputs, of.points.labels + 9), f)
    with pytest.raises(InputError, match="points have 4 inputs"):
        Problem(of.network, Points(of.points.inputs[:, :4], of.points.labels), f)
