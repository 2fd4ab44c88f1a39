"""Refined circuits: nearer to the network, and right where effects of single parts choose wrong."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import tiny_batch
from torch import nn

from assay.attribution import Exact, attribute
from assay.audit import circuit_curve, rank_parts, refine_circuit
from assay.core.target import Target
from assay.errors import InputError
from assay.mechanisms.features import features
from assay.mechanisms.features.kind import identities


class _Redundant(nn.Module):
    """max(a, b) + c / 4 of three inputs that are all one: without a, or without b, nothing is lost,
    and without both of them nearly everything.
    """

    def __init__(self):
        super().__init__()
        self.site = nn.Identity()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        a, b, c = (self.site(x) * self.scale).unbind(-1)
        return torch.maximum(a, b) + c / 4


def test_a_redundant_pair_that_single_effects_miss_is_found():
    model = _Redundant().double().requires_grad_(False)
    target = Target(model, lambda output, batch: output.mean(-1), higher_is_right=True)
    batch = tiny_batch(4, positions=1)
    x = torch.rand(4, 1, 3, dtype=torch.float64) + 1
    x[..., 1] = x[..., 0]
    batch = type(batch)(x, {})
    bound = features(target, identities(target, batch, ["site"]), batch, reference="zero")
    ranked = rank_parts(attribute(bound, Exact()), 1)
    assert ranked.circuit == (("site", (0, 2)),)
    every = [("site", (0, unit)) for unit in range(3)]
    found = refine_circuit(bound, ranked.circuit, every)
    assert found.nodes[0] in every[:2]
    assert found.exchanged == 1
    kept = [
        circuit_curve(bound, nodes, [1]).table()["faithfulness"][0]
        for nodes in (ranked.circuit, found.nodes)
    ]
    assert kept[0] < 0.3
    assert kept[1] > 0.7


class _Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.site = nn.Identity()
        self.weights = nn.Parameter(torch.tensor([3.0, -2.0, 1.0, 0.5, -0.25, 4.0, -1.5]))

    def forward(self, x):
        return (self.site(x) * self.weights).sum(-1)


def test_the_best_exchange_of_a_linear_network_is_predicted():
    model = _Weighted().double().requires_grad_(False)
    target = Target(model, lambda output, batch: output.mean(-1), higher_is_right=True)
    batch = tiny_batch(4, positions=1)
    batch = type(batch)(torch.rand(4, 1, 7, dtype=torch.float64), {})
    bound = features(target, identities(target, batch, ["site"]), batch, reference="zero")
    every = [("site", (0, unit)) for unit in range(7)]
    inside, outside = every[:3], every[3:]
    losses = {}
    for one in inside:
        for other in outside:
            nodes = [node for node in inside if node != one] + [other]
            curve = circuit_curve(bound, nodes, [3])
            losses[one, other] = float((curve.kept[0] - curve.full).square().mean())
    (gone, came), least = min(losses.items(), key=lambda entry: entry[1])
    found = refine_circuit(bound, inside, every, rounds=1, tried=1)
    assert found.after == pytest.approx(least)
    assert set(found.nodes) == {*inside, came} - {gone}


@pytest.mark.parametrize("biased", [True, False])
def test_a_smaller_spread_is_not_bought_with_a_larger_bias(biased):
    """Without the first unit d is 1 or -1 in every example, without the second 2 and -2 in turn."""
    model = _Weighted().double().requires_grad_(False)
    model.weights.data = torch.ones(2, dtype=torch.float64)
    target = Target(model, lambda output, batch: output.mean(-1), higher_is_right=True)
    turn = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    x = torch.stack([torch.ones(4).double() if biased else turn, 2 * turn], 1)[:, None]
    batch = type(tiny_batch(4, positions=1))(x, {})
    bound = features(target, identities(target, batch, ["site"]), batch, reference="zero")
    first, second = ("site", (0, 0)), ("site", (0, 1))
    found = refine_circuit(bound, [first], [first, second])
    assert (found.before, found.bias_before) == (4, 0)
    if biased:
        assert (found.nodes, found.after, found.bias_after) == ((first,), 4, 0)
    else:
        assert (found.nodes, found.after, found.bias_after) == ((second,), 1, 0)


def test_a_refined_circuit_is_measured_and_never_further_away():
    scores = attribute(cases.CASES["features"](), Exact())
    bound = scores.mechanisms
    ranked = rank_parts(scores, 3)
    found = refine_circuit(bound, ranked.circuit, ranked.nodes)
    assert len(set(found.nodes)) == 3
    assert found.after <= found.before
    curve = circuit_curve(bound, found.nodes, [3])
    assert float((curve.kept[0] - curve.full).square().mean()) == pytest.approx(found.after)
    assert refine_circuit(bound, ranked.nodes, ranked.nodes).exchanged == 0
    assert refine_circuit(bound, ranked.circuit, ranked.nodes, rounds=0).nodes == ranked.circuit


def test_nothing_is_refined_to_nothing_and_shared_gates_are_refused():
    bound = cases.CASES["features"]()
    assert refine_circuit(bound, [], [("blocks.0", (0, 0))]).nodes == ()
    shared = cases.CASES["directions"]()
    name = next(iter(shared.groups))
    with pytest.raises(InputError, match="they are no nodes"):
        refine_circuit(shared, [(name, (0,))], [])
