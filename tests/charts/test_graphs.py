"""A graph of parts stands where its nodes are, and draws the edges between them alone."""

from __future__ import annotations

from itertools import pairwise

import polars as pl
import pytest

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
    assert x["axis"]["values"] == [0.5]
    assert '"1"' in x["axis"]["labelExpr"]
    assert x["scale"]["domain"] == [-0.5, 1.5]
    assert y["axis"]["values"] == [-1, 0, 1, 2]
    assert y["axis"]["format"] == "d"
    wide = NODES.with_columns(x=pl.Series([0, 5, 100]))
    axis = graph(wide, EDGES).to_dict()["layer"][0]["encoding"]["x"]["axis"]
    assert len(axis["values"]) == 3
    assert [f'"{label}"' in axis["labelExpr"] for label in (0, 5, 100)] == [True] * 3
    many = pl.DataFrame({"name": [str(at) for at in range(60)], "x": range(60), "y": 0})
    ticks = graph(many.with_columns(value=1.0), EDGES).to_dict()["layer"][0]["encoding"]["x"]
    assert 10 <= len(ticks["axis"]["values"]) <= 13


def test_columns_are_as_wide_as_their_nodes_need():
    """Nodes side by side are one unit apart wherever they stand, no two columns overlap, and places
    without a node take no room.
    """
    places = [(0, 0)] + [(7, 1)] * 20 + [(7, 0)] * 3 + [(9, 1)]
    nodes = pl.DataFrame(
        {"name": [str(at) for at in range(25)], "x": [x for x, _ in places], "value": 1.0}
    ).with_columns(pl.Series("y", [y for _, y in places]))
    drawn = rows(graph(nodes, EDGES))[1]
    at = {where: [] for where in places}
    for place, row in zip(places, drawn, strict=True):
        at[place].append(row["x"])
    gaps = [b - a for found in at.values() for a, b in pairwise(found)]
    assert gaps == pytest.approx([1.0] * 21)
    assert at[0, 0][0] + 1 < at[7, 1][0]
    assert at[7, 1][-1] + 1 < at[9, 1][0] < at[7, 1][-1] + 4
    middle = sum(at[7, 1]) / 20
    assert sum(at[7, 0]) / 3 == pytest.approx(middle)


def test_groups_are_outlined_and_named():
    grouped = NODES.with_columns(pl.Series("group", ["one", "one", ""]))
    edges, marks = graph(grouped, EDGES, outline="group").to_dict()["layer"]
    assert marks["encoding"]["stroke"]["scale"]["domain"] == ["one"]
    limit = marks["encoding"]["stroke"]["legend"]["labelLimit"]
    assert "width" in limit["expr"]  # of whatever box the picture stands in
    width = marks["encoding"]["strokeWidth"]
    assert (width["condition"]["value"] > 0, width["value"]) == (True, 0)
    assert "stroke" not in edges["encoding"]
    alone = graph(grouped.with_columns(group=pl.lit("")), EDGES, outline="group").to_dict()
    assert "stroke" not in alone["layer"][1]["encoding"]


def test_nothing_to_draw_is_said():
    empty = graph(NODES.clear(), EDGES.clear())
    assert "nothing to draw" in str(empty.to_dict())
