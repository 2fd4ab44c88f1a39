"""The checker against every single sequence of small networks, judged layer by layer in balls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from checker_cases import KINDS, Tensors, Truth, certify, draw, possible, sizes_of, write_tensors

import assay_check
from assay_check import InputError, check
from assay_check.max_of_k.execution import logit_error
from assay_check.max_of_k.model import Model


def advice_for(rng: np.random.Generator, truth: Truth, families: int) -> np.ndarray:
    """Return random sets: prefixes or any, full, empty, or only tokens from right sequences."""
    tokens = possible(truth.V, truth.K)
    sets = np.stack([tokens] * families)
    for family in sets:
        style = rng.integers(4)
        if style == 1:
            family &= rng.random(family.shape) < rng.uniform(0.3, 0.95)
        elif style == 2:
            family &= np.arange(truth.V) < rng.integers(0, truth.V + 1, family.shape[:3])[..., None]
        elif style == 3:
            for sequence in product(range(truth.V), repeat=truth.K):
                if not truth.right(sequence):
                    m = max(sequence)
                    others = [t for t in sequence[:-1] if t < m]
                    family[sequence[-1], m, len(others), others[:1] or [0]] = False
    return sets


def compare(folder: Path, w: Tensors, seed: int, level: str = "real") -> int:
    """Assert that the checker supports exactly the count that enumeration gives; return that
    count.
    """
    rng = np.random.default_rng(seed)
    V, K = sizes_of(w)
    write_tensors(folder / "weights.safetensors", w)
    try:
        error = (
            logit_error(Model((folder / "weights.safetensors").read_bytes()), 2.0)
            if level == "float32"
            else None
        )
    except InputError:
        return 0  # as executed it could overflow, or lose every digit
    truth = Truth(w, error)
    families = int(rng.integers(1, 3))
    weights = rng.integers(0, 4, (K, V)).tolist() if rng.random() < 0.3 else None
    total = int(np.prod([sum(row) for row in weights])) if weights else V**K
    if total == 0:
        weights, total = None, V**K
    sets = advice_for(rng, truth, families)
    count = truth.count(sets, weights)
    verdict = check(*certify(folder, w, count, sets, level=level, tokens=weights, total=total))
    assert verdict.accepted, verdict
    assert verdict.bound * total == count
    if count < total:
        verdict = check(
            *certify(folder, w, count + 1, sets, level=level, tokens=weights, total=total)
        )
        assert not verdict.accepted
        assert verdict.bound * total == count
    everything = truth.everything(weights)
    verdict = check(
        *certify(
            folder, w, everything, None, rule="sequences", level=level, tokens=weights, total=total
        )
    )
    assert verdict.accepted, verdict
    assert verdict.bound * total == everything
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_small_networks_by_enumeration(kind: str, tmp_path: Path) -> None:
    counts = [compare(tmp_path, draw(seed, kind), seed) for seed in range(20)]
    if kind in ("right", "rough"):
        assert sum(counts) > 0
    if kind == "zero":
        assert not any(counts)


@pytest.mark.parametrize("kind", ["right", "rough", "random", "mixed"])
def test_small_networks_by_enumeration_at_float32(kind: str, tmp_path: Path) -> None:
    counts = [
        compare(tmp_path, draw(seed, kind, most=90), seed, "float32") for seed in range(100, 110)
    ]
    assert kind == "mixed" or sum(counts) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["real", "float32"])
def test_many_small_networks_by_enumeration(kind: str, level: str, tmp_path: Path) -> None:
    for seed in range(1000, 1300):
        compare(tmp_path, draw(seed, kind, most=260), seed, level)


def test_listed_cells_alone_are_counted(tmp_path: Path) -> None:
    for seed in range(12):
        w, rng = draw(seed, "rough", most=100), np.random.default_rng(seed)
        truth = Truth(w)
        sets = advice_for(rng, truth, 2)
        listed = [
            cell
            for cell in np.argwhere(possible(truth.V, truth.K).any(-1)).tolist()
            if rng.random() < 0.6
        ]
        inside = [
            t
            for t in product(range(truth.V), repeat=truth.K)
            if [t[-1], max(t), sum(o < max(t) for o in t[:-1])] in listed
        ]
        count = truth.count(sets, counted=listed)
        verdict = check(*certify(tmp_path, w, count, sets, cells=listed, total=len(inside)))
        assert verdict.accepted
        assert verdict.bound * len(inside) == count
        found = sum(truth.right(tokens) for tokens in inside)
        verdict = check(
            *certify(tmp_path, w, found, None, rule="sequences", cells=listed, total=len(inside))
        )
        assert verdict.accepted
        assert verdict.bound * len(inside) == found


def test_limits_are_boxes(tmp_path: Path) -> None:
    for seed in range(12):
        w, rng = draw(seed, "rough", most=100), np.random.default_rng(seed)
        truth = Truth(w)
        tokens = possible(truth.V, truth.K)
        limits = np.where(tokens.any(-1), rng.integers(-1, tokens.sum(-1), endpoint=False), -1)
        sets = tokens[None] & (np.arange(truth.V) <= limits[None, ..., None])
        count = truth.count(sets)
        verdict = check(*certify(tmp_path, w, count, limits, rule="envelope"))
        assert verdict.accepted
        assert verdict.bound * truth.V**truth.K == count


MUTANTS = {
    "a cell with q < m may have K - 1 smaller tokens": [
        ("np.where(q == m, K - 1, K - 2)", "K - 1 + 0 * q")
    ],
    "a cell without smaller tokens holds unchecked": [
        ("want & ~(margin", "want & (np.arange(K) == 0) | want & ~(margin"),
        ("hold[c] = all(", "hold[c] = c == 0 or all("),
    ],
    "c largest becomes c smallest": [
        ("np.maximum(best[1:] + here", "np.minimum(best[1:] + here"),
        ("(K, *change.shape[1:]), -np.inf", "(K, *change.shape[1:]), np.inf"),
    ],
    "both families count in full": [("sign * self._cell", "max(sign, 0) * self._cell")],
    "a tie is right": [("if best[c] < 0:", "if not best[c] > 0:")],
}


@pytest.mark.parametrize("what", MUTANTS)
def test_enumeration_finds_planted_errors(what: str, tmp_path: Path) -> None:
    mutant = tmp_path / "assay_check"
    shutil.copytree(
        Path(assay_check.__file__).parent, mutant, ignore=shutil.ignore_patterns("__pycache__")
    )
    for old, new in MUTANTS[what]:
        (holder,) = [path for path in mutant.rglob("*.py") if old in path.read_text()]
        source = holder.read_text()
        assert source.count(old) == 1
        holder.write_text(source.replace(old, new))
    script = (
        "import sys; from pathlib import Path; from checker_cases import draw; from"
        " test_check_exhaustively import compare\nimport assay_check; assert"
        " Path(assay_check.__file__).parent == Path(sys.argv[1]) / 'assay_check'\ntry:\n   "
        " [compare(Path(sys.argv[1]), draw(s, kind), s) for s in range(30) for kind in ('rough',"
        " 'twins')]\nexcept AssertionError:\n    sys.exit(77)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 77, done.stderr
