"""Comparison of scores: parts are matched by how they vary over the same examples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import dictionary, displacements, two_sites

from assay.attribution import attribute
from assay.audit import compare
from assay.errors import InputError


def test_permuted_parts_are_found_again():
    scores = attribute(two_sites(30))
    values = scores.values["reader"]
    flat = values.reshape(30, -1)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    other = replace(scores, values={"reader": -3 * flat[:, order].reshape(values.shape)})
    found = compare(scores, other)
    assert found.stability == pytest.approx(1)
    assert found.table.height == 6
    for row in found.table.iter_rows(named=True):
        first, second = (
            torch.tensor([int(entry) for entry in row[side] if entry.isdigit()])
            for side in ("first", "second")
        )
        assert int(order[second[0] * 2 + second[1]]) == int(first[0] * 2 + first[1])
        size = float(values[:, first[0], first[1]].abs().mean())
        assert row["size"] == pytest.approx(size)
    assert found.summary()["matched"] == 6
    assert found.summary()["above_0.9"] == 1


def test_parts_without_a_score_are_left_out_and_nothing_is_not_stable():
    scores = attribute(two_sites(12))
    zero = replace(scores, values={"reader": torch.zeros_like(scores.values["reader"])})
    found = compare(zero, zero)
    assert found.table.height == 0
    assert found.stability is None
    assert "no part" in found.summary()["reason"]
    assert found.summary()["above_0.9"] is None


def test_parts_with_a_score_in_too_few_examples_say_nothing():
    scores = attribute(two_sites(30))
    values = scores.values["reader"].clone().reshape(30, -1)
    values[2:, :2] = 0
    rare = replace(scores, values={"reader": values.reshape(scores.values["reader"].shape)})
    found = compare(rare, rare)
    assert found.table.height == 4
    assert (found.table["first"] == found.table["second"]).all()
    assert found.summary()["left_out"] == 2


def test_scores_of_other_groups_or_examples_are_refused():
    with pytest.raises(InputError, match="cannot be compared"):
        compare(attribute(dictionary(5)), attribute(displacements(5)))
    with pytest.raises(InputError, match="cannot be compared"):
        compare(attribute(dictionary(5)), attribute(dictionary(6)))
