"""A kind of one's own: its package and one registry line, and it passes the whole table."""

from __future__ import annotations

import pytest
import toy_kind
from invariants import INVARIANTS

from assay.core.kind import Reference
from assay.errors import InputError
from assay.mechanisms import KINDS, kind


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(KINDS, "squares", "toy_kind:Squares")


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda function: function.__name__)
def test_invariant(invariant):
    invariant(toy_kind.bound)


def test_it_is_found_by_name_and_refuses_a_reference():
    target, batch = toy_kind.small()
    found = kind("squares")().bind(target, batch)
    assert found.values().shape == (5,)
    with pytest.raises(InputError, match="take no reference"):
        kind("squares")().bind(target, batch, Reference("zero"))
    with pytest.raises(InputError, match="did you mean squares"):
        kind("square")
