"""Influence, scores, effects and pruning of random graphs against dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.audit.claims import implied_effects, influences
from assay.edges.prompt.influence import Layout, influence, prune, scores, total_effects


def random_graph(seed: int):
    """Return edges, values, weights and layout, and the matrix (targets, sources) of all nodes."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 5, (4,), generator=generator)
    ends = tuple(counts.cumsum(0).tolist())
    layout = Layout(ends, 5, 3, 2)
    edges = torch.randn(ends[-1] + 2, layout.sources, generator=generator, dtype=torch.float64)
    edges *= torch.rand(edges.shape, generator=generator) > 0.3
    for rows in layout.layers:
        edges[rows, rows.start : layout.features] = 0  # nothing feeds its own layer or earlier ones
    values = torch.rand(ends[-1] + 2, generator=generator, dtype=torch.float64) + 0.5
    weights = torch.rand(2, generator=generator, dtype=torch.float64)
    size = layout.sources + 2
    dense = torch.zeros(size, size, dtype=torch.float64)
    dense[: layout.features, : layout.sources] = edges[: layout.features]
    dense[-2:, : layout.sources] = edges[layout.features :]
    start = torch.cat([torch.zeros(layout.sources, dtype=torch.float64), weights])
    return edges, values, weights, layout, dense, start


def normal(dense):
    return dense.abs() / dense.abs().sum(1, keepdim=True).clamp_min(1e-10)


def reach(dense, start):
    """Return the sum of start S^n over n from 1 on."""
    one = torch.eye(len(dense), dtype=torch.float64)
    return start @ (torch.linalg.inv(one - normal(dense)) - one)


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_influence_is_the_whole_series(seed):
    edges, _, weights, layout, dense, start = random_graph(seed)
    expected = reach(dense, start)[: layout.sources]
    torch.testing.assert_close(influence(edges, weights, layout), expected)


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_effects_are_those_of_the_linear_graph(seed):
    edges, values, _, layout, dense, _ = random_graph(seed)
    relative = dense.clone()
    relative[: layout.features] /= values[: layout.features, None]
    whole = torch.linalg.inv(torch.eye(len(dense), dtype=torch.float64) - relative)
    expected = whole[-2:, : layout.sources].T
    torch.testing.assert_close(total_effects(edges, values, layout), expected)


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_links_of_a_file_have_the_influence_and_effects_of_dense_edges(seed):
    edges, values, weights, layout, dense, _ = random_graph(seed)
    links = [
        (str(source), str(receiver), float(dense[receiver, source]))
        for receiver, source in dense.nonzero().tolist()
    ]
    logits = [str(layout.sources), str(layout.sources + 1)]
    found, of_links = influences(links, dict(zip(logits, weights.tolist(), strict=True)))
    reached = influence(edges, weights, layout).tolist()
    assert [found.get(str(source), 0.0) for source in range(layout.sources)] == pytest.approx(
        reached
    )
    assert sum(of_links) == pytest.approx(sum(reached))
    activations = {str(place): float(values[place]) for place in range(layout.features)}
    effects = total_effects(edges, values, layout)
    for column, logit in enumerate(logits):
        implied = implied_effects(links, logit, activations)
        claimed = [implied.get(str(source), 0.0) for source in range(layout.sources)]
        assert claimed == pytest.approx(effects[:, column].tolist())


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_scores_are_those_of_the_matrix(seed):
    edges, _, weights, layout, dense, start = random_graph(seed)
    reached, errors = reach(dense, start), slice(layout.features, layout.features + 5)
    tokens = reached[errors.stop : layout.sources].sum()
    found = scores(edges, weights, layout)
    if float(tokens + reached[errors].sum()) > 0:
        replaced = tokens / (tokens + reached[errors].sum())
        assert found["replacement"] == pytest.approx(float(replaced))
    carried = reached + start
    kept = 1 - normal(dense)[:, errors].sum(1)
    assert found["completeness"] == pytest.approx(float((kept * carried).sum() / carried.sum()))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 0.99), st.floats(0.1, 0.99))
def test_pruning_keeps_what_its_definition_says(seed, node_share, edge_share):
    edges, _, weights, layout, dense, start = random_graph(seed)
    reached = reach(dense, start)
    nodes = reached >= bound(reached, node_share)
    inner = layout.features + layout.errors
    nodes[inner:] = True
    some = dense * nodes[:, None] * nodes
    carried = reach(some, start) + start
    sizes = normal(some) * carried[:, None]
    links = (sizes >= bound(sizes.flatten(), edge_share)) & (sizes > 0)
    for _ in range(50):
        links &= nodes[:, None] & nodes
        for place in range(inner):
            leads = bool(links[:, place].any())
            fed = place >= layout.features or bool(links[place].any())
            nodes[place] = nodes[place] and leads and fed
    kept = prune(edges, weights, layout, node_share, edge_share)
    found = torch.zeros_like(links)
    rows = torch.where(
        kept.rows < layout.features, kept.rows, kept.rows - layout.features + layout.sources
    )
    found[rows, kept.sources] = True
    # Sums of other orders differ by rounding: an edge on the bound may fall to either side.
    near = (sizes - bound(sizes.flatten(), edge_share)).abs() < 1e-12
    if int(near.sum()) == 1:
        assert torch.equal(kept.nodes, nodes)
        assert torch.equal(found, links)


def bound(values, share):
    """Return the smallest of the largest values that add up to a share."""
    total, whole = 0.0, float(values.sum())
    ordered = sorted(values.tolist(), reverse=True)
    for value in ordered:
        total += value
        if total / whole >= share:
            return value
    return ordered[-1]
