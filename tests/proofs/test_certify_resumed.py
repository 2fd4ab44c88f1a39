"""A call of certify that is stopped goes on, example by example and box by box."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from killing import KilledError, Killing, always_saving
from small_units import units

import assay_check
from assay import certify
from assay.bounds.search import branch
from assay.bounds.search.leaves import Budget
from assay.io.runs import Run
from assay.proofs.bracket import Certified

pytestmark = pytest.mark.slow

BUDGET = Budget(seconds=1e9, boxes=5, steps=(2, 1), whole=1, gap=0.0)


def same(one: Certified, other: Certified) -> bool:
    return (
        torch.equal(one.found.values, other.found.values)
        and torch.equal(one.proved.values, other.proved.values)
        and one.boxes == other.boxes
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return always_saving(tmp_path, monkeypatch)


def test_a_call_that_is_killed_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = certify(units(), budget=BUDGET)
    assert min(whole.boxes) >= 5
    run = Killing(folder)
    run.left = 3  # within the second example
    with pytest.raises(KilledError):
        certify(units(), budget=BUDGET, work=run)
    assert Run(folder).has("damage-0-0.pt")
    begun = []
    begin = branch._Search.begin

    def counted(self: Any, *args: Any) -> Any:
        begun.append(1)
        return begin(self, *args)

    monkeypatch.setattr(branch._Search, "begin", counted)
    again = certify(units(), budget=BUDGET, work=Run(folder))
    assert same(again, whole)
    assert len(begun) <= 1
    begun.clear()
    assert same(certify(units(), budget=BUDGET, work=Run(folder)), whole)
    assert begun == []


def test_what_was_found_for_another_call_is_not_taken(folder: Path) -> None:
    run = Run(folder)
    first = certify(units(1), low=0.5, budget=BUDGET, work=run)
    for changed in (
        {"low": 0.4},
        {"low": 0.5, "budget": Budget(seconds=1e9, boxes=1, steps=(0, 0), whole=0, pins=0)},
    ):
        other = {"budget": BUDGET, **changed}
        assert same(certify(units(1), **other, work=run), certify(units(1), **other))
    other = copy.deepcopy(units(1))
    with torch.no_grad():
        other.target.model[0].weight += 0.1  # type: ignore[index, union-attr]
    other = replace(other, bound=None)
    assert not same(certify(other, low=0.5, budget=BUDGET, work=run), first)


def test_the_certificate_of_a_call_that_went_on_is_accepted(folder: Path, tmp_path: Path) -> None:
    run, path = Killing(folder), tmp_path / "proof.json"
    run.left = 3
    with pytest.raises(KilledError):
        certify(units(), budget=BUDGET, certificate=path, work=run)
    assert not path.exists()
    found = certify(units(), budget=BUDGET, certificate=path, work=Run(folder))
    verdict = assay_check.check(path)
    assert verdict.accepted
    assert float(verdict.bound or 0) <= float(found.proved.values.max()) * (1 + 1e-6)


@pytest.mark.parametrize("claim", ["damage", "same-answer"])
def test_another_claim_has_files_of_its_own(claim: Any, folder: Path) -> None:
    with_work = certify(cases.CASES["channels"]().take(slice(0, 1)), low=0.9, claim=claim,
                        budget=BUDGET, work=Run(folder))  # fmt: skip
    without = certify(cases.CASES["channels"]().take(slice(0, 1)), low=0.9, claim=claim,
                      budget=BUDGET)  # fmt: skip
    assert same(with_work, without)
