"""Definitions of recovery on decompositions whose answer is known, clusters against brute force,
and the comparison of seeds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from assay.errors import InputError
from assay.mechanisms.components import Decomposition, decomposition
from assay.mechanisms.components.clustering import cluster
from assay.mechanisms.components.comparison import match_components, rank_one_cosines
from assay.mechanisms.components.reconstruction import count_important
from assay.mechanisms.components.recovery import (
    alive,
    dense_error,
    identity_error,
    identity_order,
    monosemantic,
    probes,
    recover,
)
from assay.targets.tms import TMS


def test_probes_are_one_hot_at_three_quarters():
    assert torch.equal(probes(3), 0.75 * torch.eye(3))


def test_alive_is_the_largest_importance_over_the_probes():
    importance = torch.tensor([[0.0, 0.1, 0.11, 0.0], [0.05, 0.0, 0.0, 1.0]])
    assert alive(importance).tolist() == [False, False, True, True]


def test_monosemantic_components_matter_on_exactly_one_probe():
    importance = torch.tensor([[0.9, 0.2, 0.0, 1.0], [0.05, 0.3, 0.0, 0.0]])
    assert monosemantic(importance).tolist() == [True, False, False, True]


@pytest.mark.parametrize("seed", range(4))
def test_the_identity_error_is_the_smallest_over_all_matchings(seed):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(5, generator=generator)
    importance = torch.zeros(4, 5)
    importance[torch.arange(4), order[:4]] = 1
    assert identity_error(importance) == 0
    assert identity_order(importance)[:4] == order[:4].tolist()
    importance[2, order[2]] = 0.85  # off by more than 0.1
    importance[0, order[4]] = 0.2  # an unmatched column
    assert identity_error(importance) == 2
    noisy = torch.rand(4, 5, generator=generator)
    sums = {
        columns: sum(float(noisy[row, column]) for row, column in enumerate(columns))
        for columns in itertools.permutations(range(5), 4)
    }
    best = max(sums, key=lambda columns: sums[columns])
    assert tuple(identity_order(noisy)[:4]) == best
    ordered = noisy[:, identity_order(noisy)]
    wrong = sum(abs(float(ordered[i, j]) - (i == j)) > 0.1 for i in range(4) for j in range(5))
    assert identity_error(noisy) == wrong


def test_an_identity_layer_has_as_many_components_as_dimensions():
    importance = torch.zeros(5, 6)
    importance[:, :2] = 1
    assert dense_error(importance, 2) == 0
    assert dense_error(importance, 3) == 1


def known(scale: float = 1.0, side: str = "inputs") -> tuple[TMS, Decomposition, str]:
    model = TMS(5, 2)
    with torch.no_grad():
        model.linear1.weight.copy_(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
        model.linear2.weight.copy_(model.linear1.weight.T)
    name = "linear1" if side == "inputs" else "linear2"
    found = decomposition(model, name, 7)
    w = model.encoder
    with torch.no_grad():
        found.V[0].zero_()
        found.U[0].zero_()
        for j in range(5):  # component j + 1 holds feature j
            if side == "inputs":
                found.V[0][j, j + 1] = -1
                found.U[0][j + 1] = -scale * w[:, j]
            else:
                found.V[0][:, j + 1] = scale * w[:, j]
                found.U[0][j + 1, j] = 1
    return model, found, name


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_known_components_are_recovered_and_dead_ones_are_never_picked(side):
    model, found, name = known(1.02, side)
    importance = torch.zeros(5, 7)
    importance[torch.arange(5), torch.arange(1, 6)] = 1
    recovery = recover(model, found, name, importance, features=side)
    assert recovery.mmcs == pytest.approx(1)
    assert recovery.ml2r == pytest.approx(1.02)
    assert recovery.component.tolist() == [1, 2, 3, 4, 5]
    assert recovery.alive == 5
    importance[2] = 0  # feature 2's own component is dead
    again = recover(model, found, name, importance, features=side)
    assert 3 not in again.component.tolist()
    assert again.alive == 4
    assert float(again.cosines[2]) < 0.999


def test_recovery_is_the_definition_with_matrices_formed():
    model, found, name = known()
    generator = torch.Generator().manual_seed(1)
    for factor in (found.V[0], found.U[0]):
        factor.data.copy_(torch.randn(factor.shape, generator=generator))
    importance = torch.rand(5, 7, generator=generator)
    importance[:, [0, 4]] = 0
    recovery = recover(model, found, name, importance)
    w = model.encoder.double()
    for j in range(5):
        best = max(
            (c for c in range(7) if c not in (0, 4)),
            key=lambda c: float(nn.functional.cosine_similarity(part(found, c)[:, j], w[:, j], 0)),
        )
        column = part(found, best)[:, j]
        cosine = nn.functional.cosine_similarity(column, w[:, j], 0)
        assert float(recovery.cosines[j]) == pytest.approx(float(cosine))
        assert float(recovery.ratios[j]) == pytest.approx(float(column.norm() / w[:, j].norm()))
        assert int(recovery.component[j]) == best


def part(found: Decomposition, c: int) -> Tensor:
    """Return component c as hidden x features."""
    v, u = (entry.detach().double() for entry in found.factors("linear1"))
    return torch.outer(u[c], v[:, c])


def test_recovery_without_a_living_component_is_refused():
    model, found, name = known()
    with pytest.raises(InputError, match="no component of 'linear1' is alive"):
        recover(model, found, name, torch.zeros(5, 7))


def test_importances_are_counted_above_thresholds():
    g = torch.tensor([[[0.0, 0.005, 0.05, 0.5]], [[0.2, 0.0, 0.0, 0.0]]])
    (row,) = count_important({"a": g}).to_dicts()
    assert row == {"site": "a", "above 0": 2.0, "above 0.01": 1.5, "above 0.1": 1.0}


def length(members: list[list[int]], active: Tensor, rank_bits: float) -> float:
    """Return the description length in bits per position, written out."""
    bits = 0.0
    for row in active.tolist():
        for own in members:
            if any(row[c] for c in own):
                bits += math.log2(len(members)) + rank_bits * len(own)
    return bits / len(active)


def test_components_that_go_together_are_clustered():
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(300, 12, generator=generator) < 0.1
    active = torch.cat([base, base[:, :2], base[:, :1], torch.zeros(300, 1, dtype=bool)], 1)
    found = cluster(active)
    owner = {c: own for own in found.members for c in own}
    assert owner[0] == owner[12] == owner[14]
    assert owner[1] == owner[13] != owner[0]
    members = [list(own) for own in found.members]
    for one, two in itertools.combinations(range(len(members)), 2):  # no merger shortens it
        others = [own for index, own in enumerate(members) if index not in (one, two)]
        merged = [*others, members[one] + members[two]]
        assert length(merged, active, 1.0) >= found.bits - 1e-9
    assert found.bits == pytest.approx(length([list(own) for own in found.members], active, 1.0))
    single = [[c] for c in range(15)]
    assert found.bits_single == pytest.approx(length(single, active, 1.0))
    assert found.bits < found.bits_single
    apart = cluster(torch.eye(6, dtype=bool).repeat(5, 1))
    assert len(apart.members) == 6
    with pytest.raises(InputError, match="at least one active"):
        cluster(torch.zeros(3, 2, dtype=bool))
    with pytest.raises(InputError, match="rank_bits"):
        cluster(active, rank_bits=-1.0)


def test_two_decompositions_are_matched_by_their_rank_one_matrices():
    model, first, _ = known()
    _, second, _ = known(1.3)
    order = torch.tensor([3, 0, 6, 5, 4, 2, 1])
    second.V[0].data, second.U[0].data = second.V[0].data[:, order], second.U[0].data[order]
    importance = torch.zeros(5, 7)
    importance[torch.arange(5), torch.arange(1, 6)] = 1
    theirs = importance[:, order].clone()
    theirs[:, 0] = 0  # what holds feature 2 there is dead
    table = match_components(first, second, ({"linear1": importance}, {"linear1": theirs}))
    pairs = {row["first"]: (row["second"], row["cosine"]) for row in table.to_dicts()}
    assert set(pairs) == {1, 2, 3, 4, 5}
    for c, (other, cosine) in pairs.items():
        if c == 3:
            assert (other, cosine) == (None, None)
        else:
            assert int(order[other]) == c
            assert cosine == pytest.approx(1)
    cosines = rank_one_cosines(first.factors("linear1"), second.factors("linear1"))
    one, two = part(first, 2), part(second, 4)
    expected = (one * two).sum() / (one.norm() * two.norm())
    assert float(cosines[2, 4].detach()) == pytest.approx(float(expected))
    v, u = first.factors("linear1")
    opposite = rank_one_cosines((v, u), (-v, u)).diagonal()[1:6]
    torch.testing.assert_close(opposite, -torch.ones(5, dtype=torch.float64))
    other = decomposition(model, "linear2", 3)
    with pytest.raises(InputError, match="of other sites"):
        match_components(first, other, ({}, {}))
