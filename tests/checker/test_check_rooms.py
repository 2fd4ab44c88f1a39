"""Every room that the checker leaves for rounding is needed: networks that use it up.

The first part is about float64 in the checker, on networks whose tables need more bits than a float
has, so that sums of floats have the wrong sign; the second about executions in float32 that are as
wrong as the bounds allow for, of the checker's bound and of the prover's."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from checker_cases import HEAD, Tensors, Truth, certify, possible, shapes, write_tensors
from flint import arb, ctx

from assay.proofs.max_of_k import execution
from assay.proofs.max_of_k.cross_entropy import bound_cross_entropy
from assay.proofs.max_of_k.prove import prove, prove_cross_entropy
from assay.targets.max_of_k import Weights, from_tensors
from assay_check import check
from assay_check.max_of_k import cross_entropy
from assay_check.max_of_k.execution import logit_error
from assay_check.max_of_k.margins import Margins
from assay_check.max_of_k.measure import Measure
from assay_check.max_of_k.model import Model

U32 = 2.0**-24
UNIFORM = {"name": "accuracy", "tokens": None, "cells": None}


def empty(V: int, K: int, d: int, h: int) -> Tensors:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes(V, K, d, h).items()}


def written(token: list[float], place: list[float], direct: list[float], K: int = 2) -> Tensors:
    """Two tokens with the same rows of EV, PV and D, and attention that is the same everywhere."""
    w = empty(2, K, 4, 2)
    w["embed.W_E"][:, 0], w["pos_embed.W_pos"][:, 1] = 1.0, 1.0
    w[HEAD + "W_V"][:2], w[HEAD + "W_O"][:, 2:] = np.eye(2), np.eye(2)
    w["unembed.W_U"][:] = [direct, [0.0, 0.0], token, place]
    return w


def narrow(*values: float) -> list[float]:
    return [float(np.float32(v)) for v in values]


def ties() -> list[Tensors]:
    """Both logits are a + b + c, added in different orders, and float64 rounds them differently:
    either the two sums, or the sum of the three differences.
    """
    rng, found = np.random.default_rng(0), []
    while len(found) < 20:
        a, b, c = narrow(rng.uniform(1, 2), rng.uniform(1, 2) * 2.0**-33, -rng.uniform(2, 4))
        if (a + b) + c != (b + c) + a:
            found.append(written([a, b], [b, c], [c, a]))
    while len(found) < 40:
        a, b, c = narrow(rng.uniform(1, 2), *(rng.uniform(1, 2, 2) * [2.0**-30, 2.0**-33]))
        if ((a - b) + (b - c)) + (c - a) != 0:
            found.append(written([a, b], [b, c], [c, a]))
    return found


def settled(folder: Path, w: Tensors, change: float) -> None:
    """Assert that single sequences and cells are counted as they are in exact arithmetic."""
    w["unembed.b_U"][1] = np.float32(change)
    truth = Truth(w)
    count = truth.everything()
    for rule, advice in (("sequences", None), ("cells", possible(truth.V, truth.K)[None])):
        verdict = check(*certify(folder, w, count, advice, rule=rule))
        assert verdict.accepted, (rule, verdict)
        assert verdict.bound == Fraction(count, truth.V**truth.K), rule


@pytest.mark.parametrize("change", [0.0, 2.0**-70, -(2.0**-70), 2.0**-52, -(2.0**-52)])
def test_ties_that_float64_gets_wrong_are_settled(change: float, tmp_path: Path) -> None:
    for w in ties():
        settled(tmp_path, w, change)


def test_weights_lost_to_underflow_are_settled(tmp_path: Path) -> None:
    """The query's share is below the smallest float, and decides."""
    for low in np.linspace(-746.5, -744.0, 21):
        w = empty(3, 2, 7, 4)
        w["embed.W_E"][:, :3], w["pos_embed.W_pos"][:, 3] = np.eye(3), 0.0
        w[HEAD + "b_Q"][3] = 2.0
        w[HEAD + "W_K"][:3, 3] = [low, -744.4, 0.0]
        w[HEAD + "W_V"][:3, :3], w[HEAD + "W_O"][:3, 4:] = np.eye(3), np.eye(3)
        w["unembed.W_U"][4:] = [[9.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]
        truth = Truth(w)
        count = truth.everything()
        for rule, advice in (("sequences", None), ("cells", possible(3, 2)[None])):
            verdict = check(*certify(tmp_path, w, count, advice, rule=rule))
            assert verdict.accepted, (rule, low, verdict)
            assert verdict.bound == Fraction(count, 9), (rule, low)


def test_the_mean_loss_allows_for_large_numbers_that_cancel(tmp_path: Path) -> None:
    """The logits are a billion and differ by one: float64 holds them to a ten-millionth."""
    rng = np.random.default_rng(0)
    for _ in range(25):
        w = empty(2, 2, 3, 1)
        w["embed.W_E"][:] = [[1, 0, 1], [0, 1, 1]]
        w["unembed.W_U"][:] = rng.normal(size=(3, 2))
        w["unembed.W_U"][2] = 2.0**30
        paths = certify(
            tmp_path,
            w,
            0,
            None,
            rule="cross-entropy",
            measure={"name": "all", "tokens": None, "cells": None},
            claim={"cross_entropy": "1000"},
        )
        bound = check(*paths).bound
        assert bound is not None
        with ctx.workprec(400):
            assert arb(bound.numerator) / bound.denominator > Truth(w).mean_loss()
            assert arb(bound.numerator) / bound.denominator < Truth(w).mean_loss() + arb(1e-5)


def test_the_smallest_losses_are_not_rounded_away(tmp_path: Path) -> None:
    """A loss of 1e-17 is below the precision of one, to which its exponential is added."""
    for gap in (20.0, 36.0, 37.0, 38.0, 45.0, 60.0):
        w = empty(2, 2, 2, 1)
        w["embed.W_E"][:] = np.eye(2)
        w[HEAD + "W_V"][1], w[HEAD + "W_O"][0] = 1.0, [0.0, 1.0]
        w["unembed.W_U"][0], w["unembed.W_U"][1] = [gap, 0.0], [-gap, gap]
        w["unembed.b_U"][:] = 0.0
        settings = {"measure": {"name": "all", "tokens": None, "cells": None}}
        claim = {"cross_entropy": "1000"}
        paths = certify(tmp_path, w, 0, None, rule="cross-entropy", claim=claim, **settings)
        bound = check(*paths).bound
        assert bound is not None
        with ctx.workprec(400):
            assert arb(bound.numerator) / bound.denominator > Truth(w).mean_loss()


def test_what_the_prover_claims_leaves_room_for_other_roundings(tmp_path: Path) -> None:
    """All logits are two million: the prover sees that they are equal, the checker allows for
    rounding them, and its bound exceeds the prover's but not its claim.
    """
    for V in range(2, 8):
        w = empty(V, 3, 1, 1)
        w["unembed.b_U"][:] = 2.0**21
        weights = write_tensors(tmp_path / "weights.safetensors", w)
        loaded = from_tensors({name: torch.from_numpy(array) for name, array in w.items()})
        prove_cross_entropy(loaded, certificate_path=tmp_path / "loss.json")
        verdict = check(tmp_path / "loss.json", weights)
        assert verdict.accepted, verdict
        assert verdict.bound is not None
        assert verdict.bound > bound_cross_entropy(loaded).bound


def test_screening_in_float32_leaves_doubtful_sequences_to_float64() -> None:
    """Three terms of 1 + .49 units lose their fraction in float32, and their opponent gains one."""
    ulp = 2.0**-23
    w = empty(2, 4, 4, 2)
    w["embed.W_E"][:, :2] = np.eye(2)
    w[HEAD + "W_V"][:2] = [[-3.0, -1.2 * ulp], [1.0, 0.49 * ulp]]
    w[HEAD + "W_O"][:, 2:], w["unembed.W_U"][2:, 0] = np.eye(2), 1.0
    truth = Truth(w)
    assert not truth.right((1, 1, 1, 0))
    loaded = from_tensors({name: torch.from_numpy(array) for name, array in w.items()})
    for level in ("real", "float64"):
        result = prove(loaded, "brute_force", level, normalise=False, count_operations=False)
        assert result.count == truth.everything()


@pytest.mark.parametrize(("low", "high", "count"), [(0.2, 0.2, 3), (0.35, 0.35, 0), (0.5, 0.0, 3)])
@pytest.mark.parametrize("swapped", [False, True])
def test_the_errors_of_both_logits_count(
    low: float, high: float, count: int, swapped: bool, tmp_path: Path
) -> None:
    """Token one leads by 0.6 whatever the input is: that must exceed both errors together."""
    w = empty(2, 2, 3, 2)
    w["unembed.b_U"][1] = 0.6
    model = Model(write_tensors(tmp_path / "w.safetensors", w).read_bytes())
    error = np.array([[high, low] if swapped else [low, high]] * 2)
    margins, measure = Margins(model, error), Measure(UNIFORM, 2, 2)
    assert margins.weigh_sequences(measure) == count
    sets = possible(2, 2)[None]
    holds = margins.hold(sets, sets.any(-1) & measure.counted)
    assert measure.weigh(sets, holds) == count


@pytest.mark.parametrize("bad", [0, 1])
def test_both_ends_of_the_positional_weight_are_looked_at(bad: int, tmp_path: Path) -> None:
    """Positions differ: a mean over one smaller token is largest where that token stands in the
    lightest of them, or in the heaviest.
    """
    w = empty(2, 4, 5, 3)
    w["embed.W_E"][:, :2], w["pos_embed.W_pos"][:, 2] = np.eye(2), [4.0, 0.0, -4.0, -8.0]
    w[HEAD + "b_Q"][2], w[HEAD + "W_K"][2, 2] = np.sqrt(3), 1.0
    w[HEAD + "W_V"][:2, :2], w[HEAD + "W_O"][:2, 3:] = np.eye(2), np.eye(2)
    w["unembed.W_U"][3:] = [[5.0, 0.0], [0.0, 5.0]] if bad else [[0.0, 5.0], [5.0, 0.0]]
    model = Model(write_tensors(tmp_path / "w.safetensors", w).read_bytes())
    margins = Margins(model, np.zeros((2, 2)))
    ends = cross_entropy._means(margins, 1, 1, np.array([0]))
    found = sorted(float(end.item()) for end in ends)
    logits = [exact(w, tokens) for tokens in ((1, 1, 0, 0), (1, 0, 1, 0), (0, 1, 1, 0))]
    reached = [float(first - second) for first, second in logits]
    np.testing.assert_allclose(found, [min(reached), max(reached)], rtol=1e-6)
    bound = cross_entropy.mean_loss(margins)
    assert bound is not None
    with ctx.workprec(400):
        assert arb(bound.numerator) / bound.denominator > Truth(w).mean_loss()


@pytest.mark.parametrize("loss", [1e-19, 1e-18, 1.7e-18, 1e-9, 0.1, 3.0])
def test_summed_losses_are_rounded_up(
    loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of equal losses is no less than each of them, however small they are."""
    monkeypatch.setattr(cross_entropy, "_loss", lambda means: np.full(means.shape[:-1], loss))
    model = Model(write_tensors(tmp_path / "w.safetensors", empty(3, 3, 2, 2)).read_bytes())
    found = cross_entropy.mean_loss(Margins(model, np.zeros((3, 3))))
    assert found is not None
    assert loss <= found <= Fraction(loss) * (1 + Fraction(1, 2**40)) + Fraction(1, 2**59)


@pytest.mark.parametrize(
    "value", [Fraction(1, 3), Fraction(2, 3), Fraction(1), Fraction(1, 10**12)]
)
def test_a_bound_is_shown_rounded_up(value: Fraction) -> None:
    shown = Fraction(cross_entropy._up(value))
    assert value <= shown < value + Fraction(2, 10**9)


def total(terms: np.ndarray) -> np.ndarray:
    """Add float32 terms over the last axis, one after the other."""
    value = terms[..., 0]
    for i in range(1, terms.shape[-1]):
        value = value + terms[..., i]
    return value


def executed(w: Tensors, tokens: tuple[int, ...], exp: Callable = np.exp) -> np.ndarray:
    """Run the network in float32, every sum from the first term to the last, biases at the end."""
    E, P, Q, K, V, O, U, bq, bk, bv, bo, bu = w.values()

    def affine(x: np.ndarray, matrix: np.ndarray, bias: np.ndarray) -> np.ndarray:
        terms = x[..., None, :] * matrix.T
        wide = np.broadcast_to(bias[:, None], (*terms.shape[:-1], 1))
        return total(np.concatenate([terms, wide], axis=-1))

    x = E[list(tokens)] + P
    query, key, value = affine(x[-1], Q, bq), affine(x, K, bk), affine(x, V, bv)
    scores = total(key * query) / np.sqrt(np.float32(Q.shape[1]))
    weights = exp(scores - scores.max())
    mixed = total((weights / total(weights)) * value.T)
    logits = affine(x[-1] + affine(mixed, O, bo), U, bu)
    assert logits.dtype == np.float32
    return logits


def exact(w: Tensors, tokens: tuple[int, ...]) -> list[Fraction]:
    """Run the network in balls of 200 bits; return the logits as fractions."""
    names = [[list(map(float, row)) for row in np.atleast_2d(a)] for a in w.values()]
    E, P, Q, K, V, O, U, bq, bk, bv, bo, bu = names

    def affine(x: list, matrix: list, bias: list) -> list:
        return [
            sum((x[i] * arb(row[j]) for i, row in enumerate(matrix)), arb(bias[0][j]))
            for j in range(len(bias[0]))
        ]

    with ctx.workprec(200):
        x = [
            [arb(e) + arb(p) for e, p in zip(E[t], P[i], strict=True)] for i, t in enumerate(tokens)
        ]
        query = affine(x[-1], Q, bq)
        keys, values = ([affine(row, *part) for row in x] for part in ((K, bk), (V, bv)))
        root = arb(len(query)).sqrt()
        weights = [
            (sum((a * b for a, b in zip(k, query, strict=True)), arb(0)) / root).exp() for k in keys
        ]
        whole = sum(weights, arb(0))
        mixed = [
            sum((a * v[j] for a, v in zip(weights, values, strict=True)), arb(0)) / whole
            for j in range(len(values[0]))
        ]
        out = [a + b for a, b in zip(x[-1], affine(mixed, O, bo), strict=True)]
        return [Fraction(*_parts(y.mid())) for y in affine(out, U, bu)]


def _parts(x: arb) -> tuple[int, int]:
    mantissa, exponent = (int(n) for n in x.man_exp())
    return (mantissa << exponent, 1) if exponent >= 0 else (mantissa, 1 << -exponent)


def bounds_of(w: Tensors, folder: Path, ulps: float = 2.0) -> dict[str, np.ndarray]:
    """Return how far the checker and the prover allow each executed logit to be off."""
    loaded: Weights = from_tensors({name: torch.from_numpy(array) for name, array in w.items()})
    model = Model(write_tensors(folder / "w.safetensors", w).read_bytes())
    return {
        "checker": logit_error(model, ulps),
        "prover": execution.logit_error(loaded, exp_ulp=ulps),
    }


def assert_used(
    w: Tensors, tokens: tuple[int, ...], folder: Path, least: float, **how: object
) -> None:
    """Assert that an execution is off by at least `least` in some logit, and within both bounds."""
    ulps = float(how.pop("ulps", 2.0))  # type: ignore[arg-type]
    run = executed(w, tokens, **how)  # type: ignore[arg-type]
    off = [float(abs(Fraction(float(a)) - b)) for a, b in zip(run, exact(w, tokens), strict=True)]
    assert max(off) > least, (max(off) / U32, least / U32)
    for who, bound in bounds_of(w, folder, ulps).items():
        assert (np.array(off) <= bound[tokens[-1]]).all(), (who, max(off) / U32)


def test_every_rounding_of_the_direct_path(tmp_path: Path) -> None:
    """Embedding, head output, unembedding and bias are added and multiplied, each time off by
    nearly half a unit: four roundings, and the checker allows for four.
    """
    w = empty(2, 2, 1, 1)
    part = np.float32(0.99 * U32)
    w["embed.W_E"][:] = 1 + 1409 * 2.0**-23
    w["pos_embed.W_pos"][:] = part
    w[HEAD + "b_O"][:] = part
    w["unembed.W_U"][:] = 1.0
    w["unembed.b_U"][:] = part
    found = 0.0
    for step in range(1, 4000):  # a factor whose product is nearly half a unit above a float
        factor = 1 + step * 2.0**-23
        low = Fraction(1409 * step, 2**46) % Fraction(1, 2**23)
        if Fraction(97, 100) < low * 2**24 < 1:
            w["unembed.W_U"][:] = factor
            found = float(low * 2**24)
            break
    assert found
    assert_used(w, (0, 0), tmp_path, 3.9 * U32)
    assert bounds_of(w, tmp_path)["checker"].max() < 4.2 * U32


@pytest.mark.parametrize("head", [64, 256, 1024])
def test_a_score_that_loses_all_its_small_terms(head: int, tmp_path: Path) -> None:
    """One product of a score swallows the others, each half a unit in its last place."""
    w = empty(2, 2, 1, head)
    size = np.sqrt(float(head))  # the score itself is one
    w["embed.W_E"][1] = 1.0
    w[HEAD + "b_Q"][:] = np.sqrt(size * U32)
    w[HEAD + "W_K"][0] = np.sqrt(size * U32)
    w[HEAD + "b_Q"][0] = w[HEAD + "W_K"][0, 0] = np.sqrt(size)
    w[HEAD + "W_V"][0, 0], w[HEAD + "W_O"][0, 0] = 1.0, 0.0
    w[HEAD + "b_V"][0] = -0.5
    w[HEAD + "W_O"][0, 0] = 1.0
    w["unembed.W_U"][0] = [1.0, 0.0]
    assert_used(w, (1, 0), tmp_path, 0.15 * head * U32)


@pytest.mark.parametrize("head", [64, 256, 1024])
def test_a_large_score_that_loses_all_its_small_terms(head: int, tmp_path: Path) -> None:
    """Two scores of 32 share the attention, and one of them loses its small terms: what follows
    weighs far more than the head's own sums.
    """
    w = empty(2, 2, 1, head)
    score = 32 * np.sqrt(float(head))
    w["embed.W_E"][1] = 1.0
    w[HEAD + "b_Q"][:] = 1.0
    w[HEAD + "b_K"][0] = score
    w[HEAD + "W_K"][0, 1:] = 0.49 * np.spacing(np.float32(score))
    w[HEAD + "W_V"][0, 0], w[HEAD + "W_O"][0, 0] = 1.0, 1.0
    w[HEAD + "b_V"][0] = -0.5
    w["unembed.W_U"][0] = [1.0, 0.0]
    assert_used(w, (1, 0), tmp_path, 7 * head * U32)


def test_a_softmax_and_a_mean_that_lose_all_their_small_terms(tmp_path: Path) -> None:
    """A thousand positions share half a unit each: the sum loses them, the mean rounds them up."""
    K = 1200
    w = empty(2, K, 1, 1)
    low = np.float32(-16.6356)
    assert 0.99 * U32 < np.exp(low) < U32
    w["embed.W_E"][1] = 1.0
    w[HEAD + "b_Q"][:], w[HEAD + "W_K"][:] = 1.0, low
    w[HEAD + "b_V"][:], w[HEAD + "W_V"][:] = 1.0, 2.0**-6
    w[HEAD + "W_O"][:], w["unembed.W_U"][0, 0] = 1.0, 1.0
    assert_used(w, (0, *[1] * (K - 2), 1), tmp_path, 1.95 * K * U32)


@pytest.mark.parametrize("ulps", [1.0, 16.0, 256.0])
def test_an_exponential_as_inaccurate_as_it_may_be(ulps: float, tmp_path: Path) -> None:
    """One weight errs upwards and the other downwards."""
    w = empty(2, 2, 1, 1)
    w["embed.W_E"][1] = 1.0
    w[HEAD + "b_Q"][:], w[HEAD + "W_K"][:] = 1.0, np.float32(-np.log(2) * 1.0000002)
    w[HEAD + "W_V"][:], w[HEAD + "b_V"][:], w[HEAD + "W_O"][:] = 1.0, -0.5, 1.0
    w["unembed.W_U"][0, 0] = 1.0

    def exp(x: np.ndarray) -> np.ndarray:
        y = np.exp(x.astype(np.float64)).astype(np.float32)
        sides = np.where(y == 1, -1, 1).astype(np.float32)
        return y + sides * np.float32(ulps - 0.5) * np.spacing(y) * np.where(y == 1, 0.5, 1).astype(
            np.float32
        )

    assert_used(w, (0, 1), tmp_path, 0.2 * (ulps - 0.5) * U32, exp=exp, ulps=ulps)


def test_executions_are_those_of_the_network(tmp_path: Path) -> None:
    """The helpers above agree with each other up to float32."""
    rng = np.random.default_rng(0)
    w = {n: rng.normal(size=a.shape).astype(np.float32) for n, a in empty(3, 3, 4, 5).items()}
    bound = bounds_of(w, tmp_path)
    for tokens in product(range(3), repeat=3):
        off = np.abs(executed(w, tokens) - np.array([float(y) for y in exact(w, tokens)]))
        assert (off <= bound["checker"][tokens[-1]]).all()
        assert (off <= bound["prover"][tokens[-1]]).all()
        assert off.max() < 1e-3
