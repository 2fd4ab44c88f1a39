"""A graph of parts stands where its nodes are, and draws the edges between them alone."""

from __future__ import annotations

import polars as pl

from assay.charts import graph

NODES = pl.DataFrame(
    {
        "name": ["a", "b", "c"],
        "x": [1, 1, 2],
        "y": [0, 0, 1],
        "value": [1.0, -0.5, 2.0],
    }
)
EDGES = pl.DataFrame(
    {"source": ["a", "b", "a"], "receiver": ["c", "c", "metric"], "score": [0.3, -2.0, 1.0]}
)


def rows(chart) -> list[list[dict]]:
    found = chart.to_dict()
    held = found.get("datasets", {})
    return [held[layer["data"]["name"]] for layer in found["layer"]]


def test_edges_join_the_places_of_their_nodes():
    edges, nodes = rows(graph(NODES, EDGES))
    assert len({(node["x"], node["y"]) for node in nodes}) == 3
    assert len(edges) == 2
    starts = {(edge["x"], edge["y"]) for edge in edges}
    assert starts == {(node["x"], node["y"]) for node in nodes if node["value"] < 2}
    assert {(edge["low"], edge["high"]) for edge in edges} == {
        (node["x"], node["y"]) for node in nodes if node["value"] == 2
    }
    assert sorted(edge["size"] for edge in edges) == [0.3, 2.0]


def test_nothing_to_draw_is_said():
    empty = graph(NODES.clear(), EDGES.clear())
    assert "nothing to draw" in str(empty.to_dict())
