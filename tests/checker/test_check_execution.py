"""The float32 error bound against networks executed in float32, and against the prover's own
bound.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from checker_cases import HEAD, NAMES, Tensors, Truth, certify, draw, right, sizes_of, write_tensors

import assay_check
from assay.proofs.max_of_k import execution
from assay.targets.max_of_k import from_tensors
from assay_check import check
from assay_check.max_of_k.execution import logit_error
from assay_check.max_of_k.model import Model


def total(terms: np.ndarray, order: str, rng: np.random.Generator) -> np.ndarray:
    """Sum float32 terms over the last axis, one after the other, in pairs, or in a random order."""
    if order == "shuffled":
        terms = terms[..., rng.permutation(terms.shape[-1])]
    if order == "pairs":
        while terms.shape[-1] > 1:
            odd = terms[..., -1:] if terms.shape[-1] % 2 else terms[..., :0]
            terms = np.concatenate(
                [terms[..., 0 : terms.shape[-1] - 1 : 2] + terms[..., 1::2], odd], axis=-1
            )
        return terms[..., 0]
    value = terms[..., 0]
    for i in range(1, terms.shape[-1]):
        value = value + terms[..., i]
    return value


def executed(
    w: Tensors, tokens: tuple[int, ...], order: str, rng: np.random.Generator
) -> np.ndarray:
    """Run the network on a sequence in float32 with sums in an order."""
    E, P, Q, K, V, O, U, bq, bk, bv, bo, bu = (w[name] for name in NAMES)

    def affine(x: np.ndarray, matrix: np.ndarray, bias: np.ndarray) -> np.ndarray:
        terms = x[..., None, :] * matrix.T
        return total(
            np.concatenate(
                [terms, np.broadcast_to(bias[:, None], (*terms.shape[:-1], 1))], axis=-1
            ),
            order,
            rng,
        )

    x = E[list(tokens)] + P
    query, key, value = affine(x[-1], Q, bq), affine(x, K, bk), affine(x, V, bv)
    scores = total(key * query, order, rng) / np.sqrt(np.float32(Q.shape[1]))
    weights = np.exp(scores - scores.max())
    attention = weights / total(weights, order, rng)
    mixed = total(attention * value.T, order, rng)
    logits = affine(x[-1] + affine(mixed, O, bo), U, bu)
    assert logits.dtype == np.float32
    return logits


def exact(w: Tensors, tokens: tuple[int, ...]) -> np.ndarray:
    E, P, Q, K, V, O, U, bq, bk, bv, bo, bu = (w[name].astype(np.longdouble) for name in NAMES)
    x = E[list(tokens)] + P
    scores = (x @ K + bk) @ (x[-1] @ Q + bq) / np.sqrt(np.longdouble(Q.shape[1]))
    weights = np.exp(scores - scores.max())
    return (x[-1] + (weights / weights.sum()) @ (x @ V + bv) @ O + bo) @ U + bu


def bound(w: Tensors, folder: Path, ulps: float = 2.0) -> np.ndarray:
    return logit_error(Model(write_tensors(folder / "w.safetensors", w).read_bytes()), ulps)


@pytest.mark.parametrize("kind", ["right", "rough", "random", "mixed", "tiny", "denormal"])
def test_executed_logits_are_within_the_bound(kind: str, tmp_path: Path) -> None:
    for seed in range(4):
        w, rng = draw(seed, kind, most=60), np.random.default_rng(seed)
        try:
            error = bound(w, tmp_path)
        except assay_check.InputError:
            continue
        V, K = sizes_of(w)
        for tokens in product(range(V), repeat=K):
            for order in ("sequential", "pairs", "shuffled"):
                off = np.abs(
                    executed(w, tokens, order, rng).astype(np.longdouble) - exact(w, tokens)
                )
                assert (off <= error[tokens[-1]]).all()


def test_bound_is_of_the_size_of_errors(tmp_path: Path) -> None:
    w = right(12, 3, np.random.default_rng(0), 0.05)
    error = bound(w, tmp_path)
    assert error.max() < 5e-3
    assert bound(w, tmp_path, 64.0).max() > error.max()


def test_certified_sequences_are_right_as_executed(tmp_path: Path) -> None:
    found = 0
    for seed in range(6):
        w, rng = draw(seed, "rough", most=90), np.random.default_rng(seed)
        truth = Truth(w, bound(w, tmp_path))
        for tokens in product(range(truth.V), repeat=truth.K):
            if truth.right(tokens):
                logits = executed(w, tokens, "shuffled", rng)
                assert np.delete(logits, max(tokens)).max() < logits[max(tokens)]
                found += 1
    assert found > 50


def test_bound_is_no_wider_than_the_provers(tmp_path: Path) -> None:
    for seed in range(25):
        for kind in ("right", "rough", "random", "mixed"):
            w = draw(seed, kind)
            try:
                theirs = execution.logit_error(
                    from_tensors({name: torch.from_numpy(array) for name, array in w.items()})
                )
            except ValueError:
                continue
            assert (bound(w, tmp_path) <= theirs.max(1, keepdims=True) + 1e-36).all()


@pytest.mark.parametrize("ulps", [None, "2", True, 0.25, 1e9, [2.0]])
def test_strange_assumptions_are_refused(ulps: object, tmp_path: Path) -> None:
    w = right(3, 2, np.random.default_rng(0), 0.02)
    paths = certify(
        tmp_path, w, 0, None, rule="sequences", level="float32", assumptions={"exp_ulp": ulps}
    )
    with pytest.raises(assay_check.InputError, match="exp_ulp"):
        check(*paths)


def test_overflow_in_float32_is_refused(tmp_path: Path) -> None:
    w = right(3, 2, np.random.default_rng(0), 0.02)
    w[HEAD + "W_Q"] *= np.float32(1e30)
    w[HEAD + "W_K"] *= np.float32(1e30)
    paths = certify(tmp_path, w, 0, None, rule="sequences", level="float32")
    with pytest.raises(assay_check.InputError, match="float32"):
        check(*paths)
    assert check(*certify(tmp_path, w, 0, None, rule="sequences")).accepted
