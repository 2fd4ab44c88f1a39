"""Certificates of crosscoder proofs: the checker agrees with the prover, and forgeries fail."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import assay_check
from assay.errors import InputError
from assay.proofs.crosscoder.certificate import NAMES, RULES, certify_points
from assay.proofs.crosscoder.groups import grouped_margins
from assay.proofs.crosscoder.problem import Features, Network, Points, Problem, true_margins
from assay.proofs.crosscoder.prove import prove

V, H = 5, 6


def small(seed: int = 0, pairs: bool = True, noise: float = 0.25, block: float = 0.2) -> Problem:
    """A network that names the larger of two tokens, most of the time, and features that are the
    tokens, nearly, after a block that writes little too.
    """
    rng = np.random.default_rng(seed)

    def draw(*shape: int, scale: float = noise) -> np.ndarray:
        return (scale * rng.normal(size=shape)).astype(np.float32).astype(np.float64)

    d = 2 * V
    growing = np.diag(np.arange(1.0, V + 1))
    U = np.concatenate([growing, growing], 1) + draw(V, d, scale=0.02)
    network = Network(
        np.eye(d), draw(d, scale=0.01), draw(H, d, scale=0.4), draw(H), draw(d, H, scale=block),
        draw(d, scale=0.01), U.astype(np.float32).astype(np.float64), draw(V, scale=0.01),
    )  # fmt: skip
    tokens = np.indices((V, V)).reshape(2, -1)
    inputs = np.concatenate([np.eye(V)[tokens[0]], np.eye(V)[tokens[1]]], 1)
    decoder = np.stack([np.eye(d)] * 2, 1) + draw(d, 2, d, scale=0.02)
    after = (network.b_e + network.b_out).astype(np.float32).astype(np.float64)
    features = Features(
        decoder.astype(np.float32).astype(np.float64),
        np.stack([network.b_e, after]),
        inputs.copy(),
    )
    return Problem(network, Points(inputs, tokens.max(0), pairs), features)


def put(problem: Problem, folder: Path, strategy: str) -> tuple[Path, Path, int]:
    weights = folder / "weights.safetensors"
    arrays = {NAMES[key]: value.astype(np.float32) for key, value in vars(problem.network).items()}
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, weights)
    path = folder / "claim.json"
    return path, weights, certify_points(problem, strategy, path).count


@pytest.mark.parametrize("strategy", RULES)
@pytest.mark.parametrize("pairs", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_checker_finds_what_the_prover_found(strategy, pairs, tmp_path):
    found = []
    for seed in range(2):
        of = small(seed, pairs, block=0.02 if strategy == "balls" else 0.2)
        path, weights, count = put(of, tmp_path, strategy)
        verdict = assay_check.check(path, weights)
        assert verdict.accepted, verdict.reason
        assert verdict.bound == Fraction(count, V * V)
        assert ("pairs" in verdict.measure) is pairs
        assert count <= int((true_margins(of) > 0).sum())
        found.append(count)
    assert max(found) > 0
    if strategy == "exact":
        assert min(found) < V * V


@pytest.mark.parametrize("strategy", RULES)
def test_the_bounds_of_checker_and_prover_are_equal(strategy, tmp_path):
    """With the right output lowered by the prover's bound, a little less or more decides."""
    every = small(1, pairs=False, block=0.1)
    for row in (3, 16):
        of = every.take(np.array([row]))
        label, n = of.points.labels[0], of.network
        bound = prove(of, strategy).margins[0]
        for rest in (1e-5, -1e-5):
            bias = n.b_u.copy()
            bias[label] = np.float32(bias[label] - bound + rest)
            moved = replace(of, network=replace(n, b_u=bias))
            path, weights, count = put(moved, tmp_path, strategy)
            assert count == (rest > 0)
            assert assay_check.check(path, weights).bound == count


def claim_of(count: Any, total: int = V * V) -> dict[str, str]:
    return {
        "count": str(count),
        "total": str(total),
        "bound": str(Fraction(int(count), total)),
    }


def change_advice(path: Path, **arrays: np.ndarray | None) -> None:
    """Put other arrays into the advice of a certificate, with the digest made right again."""
    advice = path.with_suffix(".advice.safetensors")
    held = load_file(advice)
    for name, array in arrays.items():
        if array is None:
            del held[name]
        else:
            held[name] = np.ascontiguousarray(array)
    save_file(held, advice)
    entry = json.loads(path.read_text())
    entry["advice"]["sha256"] = hashlib.sha256(advice.read_bytes()).hexdigest()
    path.write_text(json.dumps(entry))


def advice_of(path: Path) -> dict[str, np.ndarray]:
    return load_file(path.with_suffix(".advice.safetensors"))


def moved(path: Path) -> dict[str, np.ndarray]:
    decoder = advice_of(path)["decoder"].copy()
    decoder[[0, 3]] = decoder[[3, 0]]
    return {"decoder": decoder}


def swapped_sides(path: Path) -> dict[str, np.ndarray]:
    return {"negative": 1 - advice_of(path)["negative"]}


def larger_codes(path: Path) -> dict[str, np.ndarray]:
    return {"codes": 2 * advice_of(path)["codes"]}


def fewer(name: str) -> Any:
    return lambda path: {name: advice_of(path)[name][:-1]}


def with_nan(path: Path) -> dict[str, np.ndarray]:
    return {"codes": np.full_like(advice_of(path)["codes"], np.nan)}


def negative_codes(path: Path) -> dict[str, np.ndarray]:
    # So little that everything else would still be proved.
    codes = advice_of(path)["codes"]
    return {"codes": np.where(codes == 0, np.float32(-1e-30), codes)}


ADVICE = {
    "a feature moved": moved,
    "the other sides": swapped_sides,
    "codes doubled": larger_codes,
    "codes of fewer points": fewer("codes"),
    "fewer features": fewer("decoder"),
    "sides of fewer groups than there are": lambda path: {
        "group": advice_of(path)["group"] + np.int32(100)
    },
    "a group below zero": lambda path: {"group": advice_of(path)["group"] - np.int32(100)},
    "codes that are no numbers": with_nan,
    "codes below zero": negative_codes,
    "sides that are not bits": lambda path: {"negative": 2 * advice_of(path)["negative"] + 2},
    "sides left out": lambda path: {"negative": None},
    "inputs of its own": lambda path: {"inputs": np.eye(2 * V, dtype=np.float32)},
    "the bias of another network": lambda path: {"bias": advice_of(path)["bias"] + 1},
}

FIELDS: dict[str, dict[str, Any]] = {
    "one point more": {},
    "a count below zero": {"claim": {**claim_of(1), "count": "-1"}},
    "another total": {"claim": claim_of(3, 24)},
    "a bound that is not count / total": {"claim": {**claim_of(3), "bound": "1"}},
    "everything": {"claim": claim_of(V * V)},
    "more than everything": {"claim": claim_of(V * V + 1)},
    "a level that it was not proved at": {"level": "float32"},
    "a search as a proof": {"level": "float64"},
    "a rule that does not exist": {"rule": "strongest"},
    "the rule that the advice does not fit": {"rule": "exact"},
    "points of its own": {"points": {"kind": "listed"}},
    "points without a kind": {"points": {}},
    "options": {"options": {"side": "P"}},
    "assumptions": {"assumptions": {"rounding": "none"}},
    "another task": {"task": "max-of-k"},
}


def refused(path: Path, weights: Path) -> bool:
    try:
        return not assay_check.check(path, weights).accepted
    except assay_check.InputError:
        return True


@pytest.fixture
def claim(tmp_path: Path) -> tuple[Path, Path, int]:
    found = put(small(), tmp_path, "strongest")
    assert 5 < found[2] < V * V
    return found


@pytest.mark.parametrize("name", ADVICE)
def test_forged_advice_is_refused(name, claim):
    path, weights, _ = claim
    change_advice(path, **ADVICE[name](path))
    assert refused(path, weights)


@pytest.mark.parametrize("name", FIELDS)
def test_forged_fields_are_refused(name, claim):
    path, weights, count = claim
    changed = FIELDS[name] or {"claim": claim_of(count + 1)}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    assert refused(path, weights)


GROUPED = {
    "a feature moved": moved,
    "codes of other points": lambda path: {"codes": advice_of(path)["codes"][::-1]},
    "groups of several labels": lambda path: {"group": 0 * advice_of(path)["group"]},
    "a group below zero": lambda path: {"group": advice_of(path)["group"] - np.int32(1)},
    "groups of fewer points": fewer("group"),
    "sides that are not asked for": lambda path: {"negative": np.zeros((1, H), np.uint8)},
    "features elsewhere": lambda path: {"decoder": advice_of(path)["decoder"] + 1},
}


@pytest.mark.parametrize("name", GROUPED)
def test_forged_groups_are_refused(name, tmp_path):
    # Larger groups than the search's, so that what the advice says decides how much is proved.
    of = small()
    path, weights, _ = put(of, tmp_path, "groups")
    labels = of.points.labels.astype(np.int32)
    change_advice(path, group=labels)
    claim_what_is_proved(path, of, labels)
    assert not refused(path, weights)
    change_advice(path, **GROUPED[name](path))
    assert refused(path, weights)


BALLS = {
    "a feature moved": lambda path: {"decoder_after": advice_of(path)["decoder_after"][::-1]},
    "the bias after the block of another": lambda path: {
        "bias_after": advice_of(path)["bias_after"] + 1
    },
    "no features after the block": lambda path: {"decoder_after": None},
    "features of another width": lambda path: {
        "decoder_after": advice_of(path)["decoder_after"][:, 1:]
    },
}


@pytest.mark.parametrize("name", BALLS)
def test_forged_balls_are_refused(name, tmp_path):
    path, weights, count = put(small(1, block=0.02), tmp_path, "balls")
    assert count > 5
    change_advice(path, **BALLS[name](path))
    assert refused(path, weights)


def claim_what_is_proved(path: Path, of: Problem, group: np.ndarray) -> None:
    """Claim what these groups prove."""
    count = int((grouped_margins(of, group) > 0).sum())
    assert count > 5
    path.write_text(json.dumps(json.loads(path.read_text()) | {"claim": claim_of(count)}))


def test_groups_prove_no_more_in_balls_than_the_prover_finds(tmp_path):
    of = small(1)
    path, weights, count = put(of, tmp_path, "groups")
    assert count == int((true_margins(of) > 0).sum())
    for group in (of.points.labels, 5 * of.points.labels + np.arange(V * V) % 2):
        expected = int((grouped_margins(of, group) > 0).sum())
        change_advice(path, group=np.unique(group, return_inverse=True)[1].astype(np.int32))
        path.write_text(json.dumps(json.loads(path.read_text()) | {"claim": claim_of(expected)}))
        verdict = assay_check.check(path, weights)
        assert verdict.accepted
        assert verdict.bound == Fraction(expected, V * V)
    with pytest.raises(InputError, match="group 0 holds points of several labels"):
        grouped_margins(of, np.zeros(V * V, dtype=np.int64))


def test_other_weights_are_refused(claim, tmp_path):
    path, weights, _ = claim
    held = load_file(weights)
    for name, entry in (
        ("unembed.bias", held["unembed.bias"] + np.float32(1e-3)),
        ("embed.weight", held["embed.weight"] * np.float32("nan")),
        ("embed.weight", held["embed.weight"][:, :-1]),
        ("blocks.1.mlp_in.weight", held["embed.weight"]),
    ):
        other = tmp_path / "other.safetensors"
        save_file({**held, name: np.ascontiguousarray(entry)}, other)
        assert refused(path, other), name
    assert not refused(path, weights)


def test_a_smaller_claim_is_accepted(claim):
    path, weights, count = claim
    path.write_text(json.dumps(json.loads(path.read_text()) | {"claim": claim_of(count - 1)}))
    assert assay_check.check(path, weights).accepted


def test_what_cannot_be_certified_is_refused(tmp_path):
    with pytest.raises(InputError, match="writes no certificate"):
        certify_points(small(), "strongst", tmp_path / "c.json")
    with pytest.raises(InputError, match="holds at level real"):
        certify_points(small().at("float64"), "exact", tmp_path / "c.json")
    wide = small()
    codes = wide.features.codes + 1e-12
    wide = Problem(
        wide.network,
        wide.points,
        Features(wide.features.decoder, wide.features.bias, codes),
    )
    with pytest.raises(InputError, match="codes must hold float32"):
        certify_points(wide, "exact", tmp_path / "c.json")
    assert not list(tmp_path.iterdir())
