"""Certificates about bilinear networks and attention models made of features: the checker agrees
with the prover, and forgeries fail."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import attention_cases
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import assay_check
from assay.errors import InputError
from assay.proofs.crosscoder.attention import AttentionProblem, attention_margins, true_margins
from assay.proofs.crosscoder.bilinear import BilinearProblem, Weights
from assay.proofs.crosscoder.certificate import (
    ATTENTION_RULES,
    BILINEAR_NAMES,
    BILINEAR_RULES,
    certify_attention,
    certify_bilinear,
)
from assay.proofs.crosscoder.problem import Features, Points
from assay.targets import max_of_k
from assay_check.crosscoder.attention import Attention, right_points_of_attention

Changes = dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray | None]]]
V, POSITIONS, WIDTH = 4, 2, 6


def bilinear(seed: int = 0, error: float = 0.02) -> BilinearProblem:
    """A network that squares what it reads, and features that are nearly its inputs."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.normal(size=shape)).astype(np.float32).astype(np.float64)

    weights = Weights(draw(5, 4), draw(6, 5), draw(6, 5), draw(5, 6, scale=0.3), draw(3, 5))
    inputs = np.maximum(draw(30, 4), 0)
    state = inputs @ weights.E.T
    hidden = (state @ weights.L.T) * (state @ weights.R.T)
    labels = ((state + hidden @ weights.D.T) @ weights.U.T).argmax(1)
    labels[:3] = (labels[:3] + 1) % 3
    decoder = np.stack([weights.E.T + draw(4, 5, scale=error), draw(4, 5)], 1)
    bias = draw(2, 5, scale=error)
    narrow = [entry.astype(np.float32).astype(np.float64) for entry in (decoder, bias)]
    return BilinearProblem(weights, Points(inputs, labels), Features(*narrow, inputs.copy()))


def attention(seed: int = 0, error: float = 0.05) -> AttentionProblem:
    """A model that attends to the larger token and names it, most of the time; features that are
    nearly the tokens at their positions.
    """
    rng = np.random.default_rng(seed)

    def draw(*shape: int, scale: float = 0.1) -> np.ndarray:
        return (scale * rng.normal(size=shape)).astype(np.float32)

    one, square = np.eye(V, WIDTH, dtype=np.float32), np.eye(WIDTH, dtype=np.float32)
    query, key = draw(WIDTH, WIDTH), draw(WIDTH, WIDTH)
    query[:V, 0] += 4
    key[:V, 0] += np.arange(V, dtype=np.float32)
    weights = max_of_k.Weights(
        one + draw(V, WIDTH), draw(POSITIONS, WIDTH), query, key, square + draw(WIDTH, WIDTH),
        2 * square + draw(WIDTH, WIDTH), one.T + draw(WIDTH, V), draw(WIDTH), draw(WIDTH),
        draw(WIDTH), draw(WIDTH), draw(V),
    )  # fmt: skip
    tokens = np.indices((V,) * POSITIONS).reshape(POSITIONS, -1).T
    size = POSITIONS * V
    decoder = draw(size, POSITIONS + 1, WIDTH, scale=error)
    codes = np.zeros((len(tokens), size))
    for p in range(POSITIONS):
        decoder[p * V : (p + 1) * V, p] += weights.E
        codes[np.arange(len(tokens)), p * V + tokens[:, p]] = 1
    bias = np.concatenate([weights.P, draw(1, WIDTH)])
    features = Features(decoder.astype(np.float64), bias.astype(np.float64), codes)
    return AttentionProblem(weights, tokens, features)


def put(of: BilinearProblem | AttentionProblem, strategy: str, folder: Path) -> tuple[Path, Path]:
    weights, path = folder / "weights.safetensors", folder / "claim.json"
    if isinstance(of, AttentionProblem):
        put_weights(of, weights)
        certify_attention(of, strategy, path)
    else:
        named = {BILINEAR_NAMES[key]: array for key, array in vars(of.weights).items()}
        save_file({key: np.ascontiguousarray(x, np.float32) for key, x in named.items()}, weights)
        certify_bilinear(of, strategy, path)
    return path, weights


def put_weights(of: AttentionProblem, path: Path) -> Path:
    max_of_k.save(path, of.weights)
    return path


def claim_of(path: Path) -> dict[str, str]:
    claim: dict[str, str] = json.loads(path.read_text())["claim"]
    return claim


@pytest.mark.parametrize("make", [bilinear, attention])
@pytest.mark.parametrize("strategy", ["exact", "compact"])
def test_the_checker_finds_what_the_prover_found(make, strategy, tmp_path):
    counts = []
    for seed in range(2):
        for error in (0.02, 0.2):
            path, weights = put(make(seed, error), strategy, tmp_path)
            verdict = assay_check.check(path, weights)
            assert verdict.accepted, verdict.reason
            assert verdict.bound == Fraction(claim_of(path)["bound"])
            counts.append(int(claim_of(path)["count"]))
    words = {bilinear: "points that the advice lists", attention: "all sequences of tokens"}
    assert words[make] in verdict.measure
    assert max(counts) > 5
    assert min(counts) < max(counts)


def change(path: Path, fields: dict[str, Any], arrays: dict[str, np.ndarray | None]) -> None:
    """Change fields and advice of a certificate, with the digest made right again."""
    advice = path.with_suffix(".advice.safetensors")
    held = {**load_file(advice), **arrays}
    save_file({k: np.ascontiguousarray(x) for k, x in held.items() if x is not None}, advice)
    entry = json.loads(path.read_text()) | fields
    entry["advice"]["sha256"] = hashlib.sha256(advice.read_bytes()).hexdigest()
    path.write_text(json.dumps(entry))


ADVICE: Changes = {
    "a feature moved": lambda a: {"decoder": np.roll(a["decoder"], 1, axis=0)},
    "codes of other points": lambda a: {"codes": a["codes"][::-1]},
    "codes doubled": lambda a: {"codes": 2 * a["codes"]},
    "codes of fewer points": lambda a: {"codes": a["codes"][:-1]},
    "codes a little below zero": lambda a: {
        "codes": np.where(a["codes"] == 0, np.float32(-1e-30), a["codes"])
    },
    "codes that are no numbers": lambda a: {"codes": a["codes"] * np.float32("nan")},
    "codes in float64 that float32 cannot hold": lambda a: {
        "codes": a["codes"].astype(np.float64) * (1 + 2.0**-40)
    },
    "fewer features": lambda a: {"decoder": a["decoder"][:-1]},
    "features of another width": lambda a: {"decoder": a["decoder"][..., :-1]},
    "another bias": lambda a: {"bias": a["bias"] + 1},
    "no bias": lambda a: {"bias": None},
    "sides that are not asked for": lambda a: {"negative": np.zeros((1, 6), np.uint8)},
}
FIELDS: dict[str, dict[str, Any]] = {
    "another total": {"claim": {"count": "3", "total": "4", "bound": "3/4"}},
    "a bound that is not count / total": {"claim": {"count": "1", "total": "16", "bound": "1"}},
    "a search as a proof": {"level": "float64"},
    "a level that it was not proved at": {"level": "float32"},
    "the rule of another network": {"rule": "exact"},
    "a rule that does not exist": {"rule": "cubic-features"},
    "points of another kind": {"points": {"kind": "pairs"}},
    "options": {"options": {"norm": "none"}},
    "assumptions": {"assumptions": {"errors": "small"}},
    "another task": {"task": "max-of-k"},
}


def refused(path: Path, weights: Path) -> bool:
    try:
        return not assay_check.check(path, weights).accepted
    except assay_check.InputError:
        return True


@pytest.mark.parametrize("make", [bilinear, attention])
def test_forgeries_are_refused(make, tmp_path):
    of = make()
    path, weights = put(of, "compact", tmp_path)
    advice = path.with_suffix(".advice.safetensors")
    held, kept, whole = load_file(advice), advice.read_bytes(), path.read_text()
    count, total = int(claim_of(path)["count"]), int(claim_of(path)["total"])
    assert 5 < count < total
    bound = str(Fraction(count + 1, total))
    more = {"count": str(count + 1), "total": str(total), "bound": bound}
    forged = [(name, {}, forge(held)) for name, forge in ADVICE.items()]
    forged += [(name, fields, {}) for name, fields in FIELDS.items()]
    forged += [("one point more", {"claim": more}, {})]
    assert len(forged) > 20
    for name, fields, arrays in forged:
        path.write_text(whole)
        advice.write_bytes(kept)
        assert not refused(path, weights)
        change(path, fields, arrays)
        assert refused(path, weights), name
    path.write_text(whole)
    advice.write_bytes(kept)
    known = load_file(weights)
    for name, array in known.items():
        other = tmp_path / "other.safetensors"
        save_file({**known, name: array + np.float32(0.01)}, other)
        assert refused(path, other), name
        save_file({key: entry for key, entry in known.items() if key != name}, other)
        assert refused(path, other), name


def test_inputs_and_labels_of_listed_points(tmp_path):
    path, weights = put(bilinear(), "exact", tmp_path)
    labels = load_file(path.with_suffix(".advice.safetensors"))["labels"]
    assert 2 in labels
    for arrays in (
        {"labels": (labels + 1) % 3},
        {"labels": labels + 3},
        {"labels": np.where(labels == 2, 3, labels).astype(np.int32)},
        {"labels": labels[:-1]},
    ):
        change(path, {}, arrays)
        assert refused(path, weights)
        change(path, {}, {"labels": labels})
        assert not refused(path, weights)


def claim_all(path: Path) -> None:
    total = claim_of(path)["total"]
    change(path, {"claim": {"count": total, "total": total, "bound": "1"}}, {})


@pytest.mark.parametrize("make", [bilinear, attention])
@pytest.mark.parametrize("strategy", ["exact", "compact"])
def test_a_tie_is_not_right(make, strategy, tmp_path):
    of = make()
    zero = {"U": 0 * of.weights.U}
    if make is attention:
        zero["u_bias"] = 0 * of.weights.u_bias
    path, weights = put(replace(of, weights=replace(of.weights, **zero)), strategy, tmp_path)
    assert claim_of(path)["count"] == "0"
    claim_all(path)
    verdict = assay_check.check(path, weights)
    assert not verdict.accepted
    assert verdict.bound == 0


@pytest.mark.parametrize("strategy", ["exact", "compact"])
def test_the_checker_decides_every_sequence_as_the_prover_does(strategy, tmp_path):
    decided = set()
    for seed in range(4):
        for error in (0.02, 0.1, 0.3):
            of = attention_cases.problem(seed, error)
            model = Attention(put_weights(of, tmp_path / "weights.safetensors").read_bytes())
            f = of.features
            arrays = {"decoder": f.decoder[:, :-1], "bias": f.bias[:-1], "codes": f.codes}
            narrow = {key: array.astype(np.float32) for key, array in arrays.items()}
            right = right_points_of_attention(model, ATTENTION_RULES[strategy], narrow)
            proved, true = attention_margins(of, strategy) > 0, true_margins(of) > 0
            assert right == proved.tolist()
            assert not (np.array(right) & ~true).any()
            decided |= set(zip(right, true.tolist(), strict=True))
    assert decided == {(True, True), (False, True), (False, False)}


def test_one_position_attends_to_itself(tmp_path):
    of = attention(error=0.02)
    w, f = of.weights, of.features
    own = f.decoder[V:, 1:], f.bias[1:], np.eye(V)
    one = AttentionProblem(replace(w, P=w.P[1:]), np.arange(V)[:, None], Features(*own))
    for strategy in ATTENTION_RULES:
        bound, true = attention_margins(one, strategy), true_margins(one)
        assert (bound <= true).all()
        np.testing.assert_allclose(bound, true, atol=1.0)
        path, weights = put(one, strategy, tmp_path)
        assert assay_check.check(path, weights).accepted


@pytest.mark.parametrize("make", [bilinear, attention])
def test_files_that_no_writer_makes_are_bad_input(make, tmp_path):
    path, weights = put(make(), "exact", tmp_path)
    whole = json.loads(path.read_text())
    advice = path.with_suffix(".advice.safetensors")
    for shape in ([2**62, 0], [10**400, 0], [0, 2**63 - 1, 2]):
        entry = {"codes": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
        header = json.dumps(entry).encode()
        for file, other in ((advice, weights), (weights, weights)):
            kept = file.read_bytes()
            file.write_bytes(len(header).to_bytes(8, "little") + header)
            if file == advice:
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                stored = {**whole["advice"], "sha256": digest}
                path.write_text(json.dumps(whole | {"advice": stored}))
            with pytest.raises(assay_check.InputError):
                assay_check.check(path, other)
            file.write_bytes(kept)
            path.write_text(json.dumps(whole))
    path.write_text(json.dumps(whole | {"advice": {**whole["advice"], "file": "\ud800"}}))
    with pytest.raises(assay_check.InputError, match="a file beside the certificate"):
        assay_check.check(path, weights)


def test_what_cannot_be_certified_is_refused(tmp_path):
    of, words = attention(), "writes no certificate"
    for certify, problem, rules in (
        (certify_attention, of, ATTENTION_RULES),
        (certify_bilinear, bilinear(), BILINEAR_RULES),
    ):
        assert set(rules) == {"exact", "compact"}
        with pytest.raises(InputError, match=words):
            certify(problem, "balls", tmp_path / "c.json")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="holds at level real"):
            certify(replace(problem, level="float64"), "exact", tmp_path / "c.json")  # type: ignore[arg-type,type-var]
        f = problem.features
        wide = replace(f, codes=f.codes * (1 + 1e-12))
        with pytest.raises(InputError, match="codes must hold float32"):
            certify(replace(problem, features=wide), "exact", tmp_path / "c.json")  # type: ignore[arg-type,type-var]
        weights = problem.weights
        wide = replace(weights, U=weights.U.astype(np.float64) * (1 + 1e-12))  # type: ignore[type-var]
        with pytest.raises(InputError, match="U must hold float32"):
            certify(replace(problem, weights=wide), "exact", tmp_path / "c.json")  # type: ignore[arg-type,type-var]
    with pytest.raises(InputError, match="all 16 sequences in order"):
        certify_attention(of.take(np.arange(3)), "exact", tmp_path / "c.json")
    assert not list(tmp_path.iterdir())
