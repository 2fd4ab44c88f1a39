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


def test_ticks_are_whole_and_alone_where_nodes_stand_in_one_place():
    found = graph(NODES.head(2).with_columns(y=pl.Series([-1.0, 2.5])), EDGES.clear()).to_dict()
    x, y = (found["layer"][1]["encoding"][axis] for axis in "xy")
    assert x["axis"]["values"] == [1]
    assert x["scale"]["domain"] == [0.5, 1.5]
    assert y["axis"]["values"] == [-1, 0, 1, 2]
    assert y["axis"]["format"] == "d"
    wide = NODES.with_columns(x=pl.Series([0, 5, 100]))
    ticks = graph(wide, EDGES).to_dict()["layer"][0]["encoding"]["x"]["axis"]["values"]
    assert 10 <= len(ticks) <= 13


def test_groups_are_outlined_and_named():
    grouped = NODES.with_columns(pl.Series("group", ["one", "one", ""]))
    edges, marks = graph(grouped, EDGES, outline="group").to_dict()["layer"]
    assert marks["encoding"]["stroke"]["scale"]["domain"] == ["one"]
    width = marks["encoding"]["strokeWidth"]
    assert (width["condition"]["value"] > 0, width["value"]) == (True, 0)
    assert "stroke" not in edges["encoding"]
    alone = graph(grouped.with_columns(group=pl.lit("")), EDGES, outline="group").to_dict()
    assert "stroke" not in alone["layer"][1]["encoding"]


def test_nothing_to_draw_is_said():
    empty = graph(NODES.clear(), EDGES.clear())
    assert "nothing to draw" in str(empty.to_dict())
