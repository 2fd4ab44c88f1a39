"""Every invariant over every case."""

from __future__ import annotations

import pytest
from cases import CASES
from invariants import INVARIANTS

from assay.mechanisms import KINDS, kind

SLOW = {"features, language", "features, zero"}
"""Cases whose rules are those of faster ones."""


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES]
)
@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda function: function.__name__)
def test_invariant(invariant, case):
    invariant(CASES[case])


@pytest.mark.parametrize("name", KINDS)
def test_every_registered_kind_has_a_case(name):
    assert kind(name).name == name
    assert any(case.split(",")[0] == name for case in CASES)
    assert {CASES[case]().kind for case in CASES if case.split(",")[0] == name} == {name}
