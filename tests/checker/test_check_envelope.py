"""Every verdict says what it is about; the envelope knows no task, and takes a new one as it is."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checker_cases import certify, model_entry, right, sizes_of, write_tensors

import assay_check
from assay.errors import InputError as ProverError
from assay.proofs.certificate import Certificate, write
from assay.proofs.max_of_k.cells import Measure
from assay_check import InputError, check
from assay_check.envelope import Envelope, Task, Verdict
from assay_check.reading import tensors

NETWORK = right(5, 3, np.random.default_rng(0), 0.02)
ONE = [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 125]]


def verdict_of(folder: Path, **changes: Any) -> Verdict:
    settings = {"rule": "sequences", **changes}
    count = settings.pop("count", 125)
    return check(*certify(folder, NETWORK, count, None, **settings))


def test_all_weight_on_one_input_is_not_called_accuracy(tmp_path: Path) -> None:
    """The counts are those of the whole uniform measure; only the measure tells them apart."""
    whole = verdict_of(tmp_path)
    one = verdict_of(tmp_path, tokens=ONE)
    assert whole.accepted
    assert one.accepted
    assert whole.bound == one.bound == 1
    assert whole.measure == "accuracy, the share of all 5^3 = 125 inputs"
    assert "1 of the 5^3 = 125 inputs have a weight above zero" in one.measure
    assert "more than 1 of the total weight" in one.measure
    assert "a weight of 125 out of 125" in one.reason
    for text in (*one.lines(), json.dumps(one.plain())):
        assert "accuracy" not in text.casefold()


NAMED_ACCURACY = [
    "accuracy",
    "Accuracy",
    "true ACCURACY over everything",
    "accu-racy",
    "a c c u r a c y",
    "accu\u00adracy",
    "accu\u200bracy",
    "\uff41\uff43\uff43\uff55\uff52\uff41\uff43\uff59",
]


@pytest.mark.parametrize("name", NAMED_ACCURACY)
def test_the_name_of_a_measure_is_only_a_label(name: str, tmp_path: Path) -> None:
    measure = {"name": name, "tokens": ONE, "cells": None}
    with pytest.raises(ProverError, match="accuracy"):
        Measure(name, cells=np.zeros((5, 5, 3), bool))
    for entry in (measure, {**measure, "tokens": None, "cells": [[4, 4, 0]]}):
        total = 125 if entry["tokens"] else 1
        verdict = verdict_of(tmp_path, measure=entry, total=total, count=0)
        assert "accuracy" not in " ".join(verdict.lines()).casefold()
        assert name not in verdict.measure
    cyrillic = verdict_of(tmp_path, measure={**measure, "name": "\u0430ccuracy"})
    assert r"('\u0430ccuracy')" in cyrillic.measure
    label = verdict_of(tmp_path, measure={**measure, "name": "only fours\x1b[2J"})
    assert r"('only fours\x1b[2J')" in label.measure
    assert "\x1b" not in "".join(label.lines())


@pytest.mark.parametrize(
    ("tokens", "cells", "words"),
    [
        (None, None, "accuracy, the share of all 5^3 = 125 inputs"),
        (None, [[4, 4, 0], [0, 1, 1]], "the share of 3 of the 5^3 = 125 inputs"),
        ([[1] * 5] * 3, None, "125 of the 5^3 = 125 inputs have a weight above zero"),
        ([[1, 0, 1, 1, 1], [1] * 5, [7] * 5], None, "100 of the 5^3"),
        ([[1] * 5, [1] * 5, [96, 1, 1, 1, 1]], None, "more than 0.0384 of"),
        ([[1] * 5, [1] * 5, [1, 0, 0, 0, 1]], [[0, 1, 1], [1, 1, 1]], "2 of the 5^3"),
    ],
)
def test_measures_are_described_from_their_weights(
    tokens: Any, cells: Any, words: str, tmp_path: Path
) -> None:
    measure = {"name": "some", "tokens": tokens, "cells": cells}
    weights = np.array([[1] * 5] * 3 if tokens is None else tokens)
    grid = np.stack(np.meshgrid(*[np.arange(5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    each = np.prod([weights[p][grid[:, p]] for p in range(3)], axis=0)
    if cells is not None:
        m = grid.max(1)
        triples = np.stack([grid[:, 2], m, (grid[:, :2] < m[:, None]).sum(1)], -1).tolist()
        each = each * np.array([t in cells for t in triples])
    verdict = verdict_of(tmp_path, measure=measure, total=int(each.sum()), count=0)
    assert words in verdict.measure
    if tokens is not None:
        assert f"{int((each > 0).sum())} of the 5^3" in verdict.measure


@pytest.mark.parametrize("level", ["real", "float32", "float64"])
@pytest.mark.parametrize("kind", ["accepted", "too much", "other weights", "wrong total"])
def test_every_verdict_says_measure_level_and_assumptions(
    level: str, kind: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"level": level}
    if kind == "too much":
        changes |= {"tokens": [[1, 1, 1, 1, 0]] * 3, "total": 64, "count": 65}
        changes["claim"] = {"count": "65", "total": "64", "bound": "65/64"}
    if kind == "other weights":
        changes["model"] = {**model_entry(NETWORK), "sha256": "0" * 64}
    if kind == "wrong total":
        changes["claim"] = {"count": "1", "total": "124", "bound": "1/124"}
    verdict = verdict_of(tmp_path, **changes)
    assert verdict.accepted == (kind == "accepted" and level != "float64")
    assert verdict.level == level
    assert "5^3 = 125 inputs" in verdict.measure
    assert bool(verdict.assumptions) == (level == "float32")
    lines = verdict.lines()
    assert [line.split(":")[0] for line in lines[1:]] == ["measure", "level", "assumptions"]
    assert level in lines[2]
    assert ("2.0 units in the last place" in lines[3]) == (level == "float32")
    plain = json.loads(json.dumps(verdict.plain()))
    assert (plain["level"], plain["measure"]) == (level, verdict.measure)
    assert plain["assumptions"] == list(verdict.assumptions)


def test_an_accuracy_that_is_none_cannot_be_named_so() -> None:
    for settings in (
        {"tokens": np.ones((3, 5), np.int64)},
        {"cells": np.ones((5, 5, 3), bool)},
    ):
        for name in ({}, {"name": "accuracy"}, {"name": "Accuracy on a few"}):
            with pytest.raises(ProverError, match="all inputs count the same"):
                Measure(**name, **settings)
    assert Measure().name == "accuracy"


# A certificate and its advice as the first release wrote them, to the byte.
OLD = """{
  "format": "assay-certificate/1",
  "task": "max-of-k",
  "model": {
    "sha256": "10ddc560160c948fad4acc377fe4ac8ad4c60b6049556073bf2c84e13b7653e7",
    "vocabulary": 3,
    "positions": 2,
    "width": 4,
    "head": 4
  },
  "strategy": "box_exact",
  "rule": "cells",
  "level": "real",
  "options": {},
  "assumptions": {},
  "measure": {
    "name": "accuracy",
    "tokens": null,
    "cells": null
  },
  "claim": {
    "count": "9",
    "total": "9",
    "bound": "1"
  },
  "advice": {
    "file": "old.safetensors",
    "sha256": "f057af91c0ec470b91ed00932b1f4b4d3e67f2e2d2fa26f0cc7fb5bcaa217173"
  }
}
"""
OLD_ADVICE = (
    b"X\0\0\0\0\0\0\0"
    b'{"__metadata__":{},"sets":{"dtype":"U8","shape":[1,3,3,2,1],"data_offsets":[0,18]}}     '
    + bytes([1, 0, 1, 0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 3])
)


def test_certificates_of_the_first_release_are_read(tmp_path: Path) -> None:
    w = right(3, 2, np.random.default_rng(0), 0.0)
    weights = write_tensors(tmp_path / "weights.safetensors", w)
    (tmp_path / "old.safetensors").write_bytes(OLD_ADVICE)
    (tmp_path / "old.json").write_text(OLD)
    verdict = check(tmp_path / "old.json", weights)
    assert verdict.accepted, verdict
    assert verdict.bound == 1
    assert verdict.measure == "accuracy, the share of all 3^2 = 9 inputs"


def check_parity(envelope: Envelope, weights: bytes) -> Verdict:
    """The rule of a task made up here: the advice names a tensor, and how many entries are even."""
    name = str(envelope.own["tensor"])
    values = tensors(weights, "weights")[name]
    given = tensors(envelope.advice()[1], "advice")["even"]
    even = int((values % 2 == 0).sum())
    accepted = envelope.claim == {"even": str(even)} and bool((given == (values % 2 == 0)).all())
    reason = f"{even} entries are even"
    return Verdict(accepted, reason, f"entries of {name}", envelope.level, bound=Fraction(even))


def test_a_new_task_fits_the_envelope_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(assay_check.TASKS, "parity", Task(frozenset({"tensor"}), check_parity))
    weights = write_tensors(tmp_path / "w.safetensors", {"a": np.array([1, 2, 4], np.int64)})
    claim = Certificate(
        task="parity",
        model={"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()},
        strategy="by hand",
        rule="counting",
        level="real",
        claim={"even": "2"},
        advice={"even": np.array([False, True, True])},
        own={"tensor": "a"},
    )
    path = write(tmp_path / "parity.json", claim)
    verdict = check(path, weights)
    assert verdict.accepted
    assert verdict.lines()[1] == "measure: entries of a"
    for change in ({"tensor": None}, {"measure": {}}, {"extra": 1}):
        entry = {**json.loads(path.read_text()), **change}
        entry = {key: value for key, value in entry.items() if value is not None}
        (tmp_path / "other.json").write_text(json.dumps(entry))
        with pytest.raises(InputError, match="has the fields"):
            check(tmp_path / "other.json", weights)
    with pytest.raises(ProverError, match="those of all tasks"):
        write(path, Certificate(**{**vars(claim), "own": {"level": "float32"}}))


@pytest.mark.parametrize("file", ["envelope.py", "reading.py", "__init__.py", "__main__.py"])
def test_the_envelope_names_nothing_of_any_task(file: str) -> None:
    source = (Path(assay_check.__file__).parent / file).read_text()
    for word in ("max_of_k", "max-of-k", "vocabulary", "exp_ulp", "tokens", "sequences", "cubic"):
        assert word not in source, word


def test_the_provers_envelope_names_nothing_of_any_task() -> None:
    from assay.proofs import certificate

    code = Path(certificate.__file__).read_text().split('"""', 2)[2]
    for word in ("max_of_k", "max-of-k", "Measure", "count", "exp_ulp", "sets"):
        assert word not in code, word


@pytest.mark.parametrize("task", [None, 3, [], {}, "min-of-k", "Max-of-K"])
def test_unknown_tasks_are_refused_with_the_known_ones(task: Any, tmp_path: Path) -> None:
    paths = certify(tmp_path, NETWORK, 1, None, rule="sequences", task=task)
    with pytest.raises(InputError, match="'max-of-k'"):
        check(*paths)


def test_numbers_of_thousands_of_digits_are_refused(tmp_path: Path) -> None:
    V, K = sizes_of(NETWORK)
    huge = [[10**1500] * V] * K
    measure = {"name": "huge", "tokens": huge, "cells": None}
    with pytest.raises(InputError, match="digits"):
        verdict_of(tmp_path, measure=measure)
