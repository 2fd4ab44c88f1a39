"""Circuits of parts: which are taken, that a doubtful one is patched first, and what is kept."""

from __future__ import annotations

from dataclasses import replace

import cases
import pytest
import torch

from assay.attribution import Exact, attribute
from assay.audit import areas, circuit_curve, node_masks, rank_parts
from assay.audit.faithfulness import faithfulness
from assay.errors import InputError


@pytest.fixture(scope="module")
def exact():
    return attribute(cases.CASES["features"](), Exact())


def helps(scores):
    mean = scores.mean()
    return {
        (name, tuple(index)): float(values[tuple(index)])
        for name, values in mean.items()
        for index in torch.cartesian_prod(*map(torch.arange, values.shape))
        .reshape(-1, values.ndim)
        .tolist()
    }


def test_the_parts_that_help_most_come_first(exact):
    found, every = rank_parts(exact, 5), helps(exact)
    sizes = [value for value in sorted(every.values(), reverse=True) if value]
    assert [every[node] for node in found.nodes] == sizes
    assert found.patches == found.doubtful == 0
    assert found.circuit == found.nodes[:5]
    some = rank_parts(exact, 3, groups=["blocks.1"])
    assert {name for name, _ in some.nodes} == {"blocks.1"}


def test_where_lower_is_right_the_signs_turn(exact):
    target = replace(exact.mechanisms.target, higher_is_right=False)
    turned = replace(exact, mechanisms=replace(exact.mechanisms, target=target))
    assert rank_parts(turned, 1).nodes[0] == rank_parts(exact, 1).nodes[-1]


def test_a_bar_across_the_bound_is_patched_exactly(exact):
    """Scores with large errors and honest bars give the exact circuit, with bars that are narrow
    far from the bound fewer patches, and without any bar all of them.
    """
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: 0.5 * torch.randn(values.shape[1:], generator=generator, dtype=torch.float64)
        for name, values in exact.values.items()
    }
    rough = replace(
        exact,
        exact=False,
        values={name: values + noise[name] for name, values in exact.values.items()},
    )
    bars = {name: (noise[name].abs() + 1e-9).expand_as(exact.values[name]) for name in noise}
    wanted = rank_parts(exact, 5)
    honest = rank_parts(rough, 5, half_widths=bars)
    assert set(honest.circuit) == set(wanted.circuit)
    assert honest.doubtful == 0
    blind = rank_parts(rough, 5)
    assert set(blind.circuit) == set(wanted.circuit)
    assert 0 < honest.patches < blind.patches
    stopped = rank_parts(rough, 5, patches=2)
    assert stopped.patches == 2
    assert stopped.doubtful > 0
    none = {name: torch.zeros_like(values) for name, values in exact.values.items()}
    assert rank_parts(rough, 5, half_widths=none).patches == 0


def test_curves_are_faithfulness_by_count(exact):
    bound = exact.mechanisms
    errors = [name for name in bound.groups if name.endswith("error")]
    nodes = rank_parts(exact, 5, groups=set(bound.groups) - set(errors)).nodes
    table = circuit_curve(bound, nodes, [0, 3, 100], always=errors, of=20)
    assert table["nodes"].to_list() == [0, 3, len(nodes)]
    assert table["share"].to_list() == [0, 0.15, 5]
    masks = node_masks(bound, nodes[:3], errors)
    by_hand = faithfulness(bound, masks)
    assert table["faithfulness"][1] == by_hand.faithfulness
    kept = sum(int(mask.expand(1, *bound.group(name).axes).sum()) for name, mask in masks.items())
    assert kept == 3 + sum(int(torch.tensor(bound.group(name).axes).prod()) for name in errors)
    whole = circuit_curve(bound, nodes, [0], always=list(bound.groups))
    assert whole["faithfulness"][0] == pytest.approx(1)
    assert set(areas(table)) == {"cpr", "cmd"}


def test_bad_input_is_refused(exact):
    with pytest.raises(InputError, match="count must be between 1"):
        rank_parts(exact, 0)
    shared = attribute(cases.CASES["directions"]())
    with pytest.raises(InputError, match="they are no nodes"):
        rank_parts(shared, 1)
