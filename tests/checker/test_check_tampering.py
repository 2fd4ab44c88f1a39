"""Certificates that were altered, with every digest made right again: refused, or sound all the
same.
"""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checker_cases import (
    HEAD,
    Tensors,
    Truth,
    certify,
    model_entry,
    possible,
    right,
    shapes,
    write_tensors,
)

from assay_check import InputError, check


@pytest.fixture(scope="module")
def network() -> tuple[Tensors, Truth, np.ndarray, int]:
    """A network, the truth about it, sets of right answers alone, and their count."""
    w = right(5, 3, np.random.default_rng(7), 0.4)
    truth = Truth(w)
    sets = possible(5, 3)[None].copy()
    for q, m, c in np.argwhere(sets[0].any(-1)).tolist():
        cell = np.zeros_like(sets)
        cell[0, q, m, c] = sets[0, q, m, c]
        while cell.any() and not truth.count(cell):
            cell[0, q, m, c, np.flatnonzero(cell[0, q, m, c])[-1]] = False
        sets[0, q, m, c] = cell[0, q, m, c]
    count = truth.count(sets)
    assert 40 < count < truth.everything() < 125
    return w, truth, sets, count


def altered(path: Path, **changes: Any) -> Path:
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | changes))
    return path


def claim(count: int | str, total: int | str = 125) -> dict[str, str]:
    return {
        "count": str(count),
        "total": str(total),
        "bound": str(Fraction(int(count), int(total))),
    }


def test_the_claim_is_accepted_and_one_more_is_not(network: Any, tmp_path: Path) -> None:
    w, _, sets, count = network
    verdict = check(*certify(tmp_path, w, count, sets))
    assert verdict.accepted
    assert verdict.bound == Fraction(count, 125)
    assert verdict.cell is None
    paths = certify(tmp_path, w, count + 1, sets)
    assert not check(*paths).accepted
    assert check(altered(paths[0], claim=claim(count - 1)), paths[1]).accepted
    assert check(altered(paths[0], claim=claim(0)), paths[1]).accepted


def test_every_altered_bit_of_the_advice(network: Any, tmp_path: Path) -> None:
    w, truth, sets, count = network
    named = 0
    for cell in np.argwhere(possible(5, 3)).tolist():
        other = sets.copy()
        other[0, *cell] ^= True
        verdict = check(*certify(tmp_path, w, count, other))
        found = truth.count(other)
        assert verdict.bound == Fraction(found, 125)
        assert verdict.accepted == (found >= count)
        if not verdict.accepted and other[0, *cell]:
            assert verdict.cell == tuple(cell[:3])
            assert str(verdict.cell) in verdict.reason
            named += 1
    assert named > 2


def test_sets_outside_their_cell_are_refused(network: Any, tmp_path: Path) -> None:
    w, _, sets, count = network
    tokens = possible(5, 3)
    for cell in np.argwhere(~tokens).tolist()[::4]:
        other = sets.copy()
        other[0, *cell] = True
        with pytest.raises(InputError, match="no such sequences"):
            check(*certify(tmp_path, w, count, other))
    padded = np.concatenate([sets, np.zeros((*sets.shape[:-1], 1), bool)], axis=-1)
    padded[0, 0, 1, 1, 5] = True
    with pytest.raises(InputError, match="no such sequences"):
        check(*certify(tmp_path, w, count, padded))


def test_any_advice_is_sound(network: Any, tmp_path: Path) -> None:
    w, truth, _, _ = network
    rng = np.random.default_rng(0)
    for _ in range(20):
        sets = np.stack(
            [possible(5, 3) & (rng.random((5, 5, 3, 5)) < rng.random()) for _ in range(2)]
        )
        found = truth.count(sets)
        for count in (found - 1, found, found + 1):
            if count >= 0:
                assert check(*certify(tmp_path, w, count, sets)).accepted == (count <= found)


@pytest.mark.parametrize("rule", ["cells", "cubic", "envelope", "sequences"])
def test_altered_weights(rule: str, network: Any, tmp_path: Path) -> None:
    w, _, sets, _ = network
    sets = sets & np.logical_and.accumulate(sets, axis=-1)
    limits = sets[0].sum(-1) - 1
    true = {"sequences": network[1].everything()}.get(rule, network[1].count(sets))
    advice = {"envelope": limits, "sequences": None}.get(rule, sets)
    assert check(*certify(tmp_path, w, true, advice, rule=rule)).accepted
    rng = np.random.default_rng(0)
    outcomes = set()
    for name in w:
        other = {**w, name: w[name] + rng.normal(size=w[name].shape).astype(np.float32)}
        truth = Truth(other)
        found = truth.everything() if rule == "sequences" else truth.count(sets)
        certificate, weights = certify(tmp_path, w, true, advice, rule=rule)
        assert "other weights" in check(certificate, write_tensors(weights, other)).reason
        verdict = check(altered(certificate, model=model_entry(other)), weights)
        assert verdict.accepted == (found >= true)
        assert verdict.bound == Fraction(found, 125)
        outcomes.add(verdict.accepted)
    assert False in outcomes


def test_float64_is_no_proof(network: Any, tmp_path: Path) -> None:
    w, _, sets, count = network
    verdict = check(*certify(tmp_path, w, count, sets, level="float64"))
    assert not verdict.accepted
    assert "not a proof" in verdict.reason


@pytest.mark.parametrize(
    "change",
    [
        claim(10, 124),
        claim(10, 126),
        {"count": "10", "total": "125", "bound": "10/125"},
        {"count": "10", "total": "125", "bound": "3/25"},
        {"count": "10", "total": "125", "bound": "0.08"},
        {"count": "010", "total": "125", "bound": "2/25"},
        {"count": 10, "total": 125, "bound": "2/25"},
        {"count": "126", "total": "125", "bound": "126/125"},
        {"count": "9" * 4000, "total": "125", "bound": "1"},
        {**claim(10), "note": "trust me"},
    ],
    ids=lambda change: str(change)[:60],
)
def test_claims_that_do_not_add_up_are_rejected(
    change: dict[str, Any], network: Any, tmp_path: Path
) -> None:
    w, _, sets, count = network
    assert not check(*certify(tmp_path, w, count, sets, claim=change)).accepted


MALFORMED: list[dict[str, Any]] = [
    {"format": "assay-certificate/2"},
    {"format": None},
    {"task": "min-of-k"},
    {"rule": "trust"},
    {"rule": ["cells"]},
    {"rule": {}},
    {"level": "float16"},
    {"level": 3},
    {"claim": None},
    {"claim": []},
    {"claim": {}},
    {"claim": {"count": "-1", "total": "125", "bound": "-1/125"}},
    {"claim": {"count": "1e2", "total": "125", "bound": "4/5"}},
    {"claim": {"count": "9" * 5000, "total": "125", "bound": "1"}},
    {"claim": {"count": 1e300, "total": "125", "bound": "1"}},
    {"claim": {"count": "٣", "total": "125", "bound": "3/125"}},
    {"assumptions": None},
    {"measure": None},
    {"measure": {}},
    {"measure": {"name": "accuracy", "tokens": None}},
    {"measure": {"name": "accuracy", "tokens": [[1] * 5] * 2, "cells": None}},
    {"measure": {"name": "accuracy", "tokens": [[1] * 4] * 3, "cells": None}},
    {"measure": {"name": "accuracy", "tokens": [[1] * 5, [1] * 5, [1] * 4], "cells": None}},
    {
        "measure": {
            "name": "accuracy",
            "tokens": [[1] * 5, [1] * 5, [1, 1, 1, 1, -1]],
            "cells": None,
        }
    },
    {
        "measure": {
            "name": "accuracy",
            "tokens": [[1] * 5, [1] * 5, [1, 1, 1, 1, 0.5]],
            "cells": None,
        }
    },
    {
        "measure": {
            "name": "accuracy",
            "tokens": [[1] * 5, [1] * 5, [1, 1, 1, 1, True]],
            "cells": None,
        }
    },
    {
        "measure": {
            "name": "accuracy",
            "tokens": [[1] * 5, [1] * 5, [1, 1, 1, 1, [1]]],
            "cells": None,
        }
    },
    {"measure": {"name": "accuracy", "tokens": "all", "cells": None}},
    {"measure": {"name": "accuracy", "tokens": 1, "cells": None}},
    {"measure": {"name": "accuracy", "tokens": None, "cells": [[0, 0]]}},
    {"measure": {"name": "accuracy", "tokens": None, "cells": [[0, 0, 3]]}},
    {"measure": {"name": "accuracy", "tokens": None, "cells": [[0, 5, 0]]}},
    {"measure": {"name": "accuracy", "tokens": None, "cells": [[0, -1, 0]]}},
    {"measure": {"name": "accuracy", "tokens": None, "cells": [[0, 1, 0.0]]}},
    {"measure": {"name": "accuracy", "tokens": None, "cells": [[0, 1, 10**30]]}},
    {"measure": {"name": "accuracy", "tokens": None, "cells": [[0, 1, True]]}},
    {"measure": {"name": "accuracy", "tokens": None, "cells": {"0": 1}}},
    {"measure": {"name": "accuracy", "tokens": None, "cells": 7}},
    {"advice": None},
    {"advice": {}},
    {"advice": {"file": None, "sha256": None}},
    {"advice": {"file": "../proof.json", "sha256": None}},
    {"advice": {"file": "/etc/passwd", "sha256": None}},
    {"advice": {"file": "advice.safetensors", "sha256": "0" * 64}},
    {"advice": {"file": ["advice.safetensors"], "sha256": None}},
    {"advice": {"file": "a\0b", "sha256": None}},
    {"note": "a field too many"},
]


@pytest.mark.parametrize("change", MALFORMED, ids=lambda change: str(change)[:60])
def test_malformed_certificates_are_refused(
    change: dict[str, Any], network: Any, tmp_path: Path
) -> None:
    w, _, sets, count = network
    with pytest.raises(InputError):
        check(*certify(tmp_path, w, count, sets, **change))


@pytest.mark.parametrize(
    "field",
    [
        "format",
        "task",
        "model",
        "strategy",
        "rule",
        "level",
        "options",
        "assumptions",
        "measure",
        "claim",
        "advice",
    ],
)
def test_fields_may_not_be_missing_or_of_another_type(
    field: str, network: Any, tmp_path: Path
) -> None:
    w, _, sets, count = network
    certificate, weights = certify(tmp_path, w, count, sets)
    entry = json.loads(certificate.read_text())
    certificate.write_text(json.dumps({key: value for key, value in entry.items() if key != field}))
    with pytest.raises(InputError):
        check(certificate, weights)
    others: list[Any] = [None, True, 0, -1.5, 10**400, "x", [], [[]], {}, {"count": None}]
    for other in others:
        certificate.write_text(json.dumps({**entry, field: other}))
        try:
            verdict = check(certificate, weights)
        except InputError:
            continue
        assert not verdict.accepted or field in ("strategy", "options", "assumptions")


@pytest.mark.parametrize("size", [0, 1, 100, 500, -1])
def test_truncated_certificates_are_refused(size: int, network: Any, tmp_path: Path) -> None:
    w, _, sets, count = network
    certificate, weights = certify(tmp_path, w, count, sets)
    certificate.write_bytes(certificate.read_bytes()[:size])
    with pytest.raises(InputError):
        check(certificate, weights)


def test_nan_and_repeated_keys_are_refused(network: Any, tmp_path: Path) -> None:
    w, _, sets, count = network
    certificate, weights = certify(tmp_path, w, count, sets)
    text = certificate.read_text()
    for new in ("NaN", "-Infinity", "Infinity", '"real", "level": "real"', "1" * 5000, "[" * 10**5):
        certificate.write_text(text.replace('"real"', new))
        with pytest.raises(InputError):
            check(certificate, weights)


def resigned(certificate: Path, data: bytes) -> Path:
    (certificate.parent / "advice.safetensors").write_bytes(data)
    return altered(
        certificate,
        advice={"file": "advice.safetensors", "sha256": hashlib.sha256(data).hexdigest()},
    )


def test_advice_of_other_shapes_and_types_is_refused(network: Any, tmp_path: Path) -> None:
    w, _, sets, count = network
    certificate, weights = certify(tmp_path, w, count, sets)
    bits = np.packbits(sets, axis=-1, bitorder="little")
    scratch = tmp_path / "scratch"
    for other in (
        bits[0],
        bits[:0],
        np.concatenate([bits] * 3),
        bits.astype(np.int16),
        bits[..., :0],
        bits.astype(np.float32),
        bits[:, :4],
    ):
        with pytest.raises(InputError, match="shape"):
            check(
                resigned(certificate, write_tensors(scratch, {"sets": other}).read_bytes()), weights
            )
    with pytest.raises(InputError):
        check(resigned(certificate, write_tensors(scratch, {"limits": bits}).read_bytes()), weights)
    whole = write_tensors(scratch, {"sets": bits}).read_bytes()
    assert check(resigned(certificate, whole), weights).accepted
    for broken in (whole[:-1], whole + b"\0", whole[:7], b""):
        with pytest.raises(InputError):
            check(resigned(certificate, broken), weights)


def test_two_families_only_under_their_rule(network: Any, tmp_path: Path) -> None:
    w, _, sets, count = network
    assert check(*certify(tmp_path, w, count, np.concatenate([sets, sets]))).accepted
    with pytest.raises(InputError, match="shape"):
        check(*certify(tmp_path, w, count, np.concatenate([sets, sets]), rule="cubic"))


@pytest.mark.parametrize("limit", [32767, 5, -2, -32768])
def test_strange_limits_are_refused_or_empty(limit: int, network: Any, tmp_path: Path) -> None:
    w = network[0]
    limits = np.full((5, 5, 3), limit)
    if limit > 0:
        with pytest.raises(InputError, match="no such sequences"):
            check(*certify(tmp_path, w, 1, limits, rule="envelope"))
    else:
        assert check(*certify(tmp_path, w, 1, limits, rule="envelope")).bound == 0


def test_missing_files(network: Any, tmp_path: Path) -> None:
    w, _, sets, count = network
    certificate, weights = certify(tmp_path, w, count, sets)
    with pytest.raises(OSError, match="none"):
        check(tmp_path / "none.json", weights)
    with pytest.raises(OSError, match="none"):
        check(certificate, tmp_path / "none.safetensors")
    (tmp_path / "advice.safetensors").unlink()
    with pytest.raises(OSError, match="advice"):
        check(certificate, weights)


def test_swapped_files_are_refused(network: Any, tmp_path: Path) -> None:
    w, _, sets, count = network
    certificate, weights = certify(tmp_path, w, count, sets)
    with pytest.raises(InputError):
        check(weights, certificate)
    with pytest.raises(InputError):
        check(certificate, tmp_path / "advice.safetensors")


def test_models_beyond_reach_are_refused_before_any_work(tmp_path: Path) -> None:
    for V, K, what in ((1100, 2, "too many"), (40, 9, r"40\^9")):
        w = {name: np.zeros(shape, np.float32) for name, shape in shapes(V, K, 1, 1).items()}
        with pytest.raises(InputError, match=what):
            check(*certify(tmp_path, w, 0, None, rule="sequences"))


def test_products_beyond_float64_are_refused(tmp_path: Path) -> None:
    w = right(3, 2, np.random.default_rng(0), 0.02)
    for name in (HEAD + "W_V", HEAD + "W_O", "embed.W_E", "unembed.W_U"):
        w[name] = np.full_like(w[name], 3e38)
    w["unembed.W_U"][:, 0] = -3e38
    assert check(*certify(tmp_path, w, 0, None, rule="sequences")).accepted
