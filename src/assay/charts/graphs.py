"""Graphs of parts: nodes at their places, and the edges between them."""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from assay.charts.encodings import extra, finish, listed, pick, tip
from assay.charts.theme import hue


def graph(
    nodes: pl.DataFrame,
    edges: pl.DataFrame,
    *,
    tooltip: tuple[str, ...] = ("name",),
    title: str | None = None,
    x_title: str = "position",
    y_title: str = "layer",
    height: int = 380,
) -> Any:
    """Draw nodes (columns name, x, y, value) and edges (source, receiver, score) between them; the
    width of an edge is |score|, its colour the sign, and the size of a node |value|.

    Nodes at the same place are set side by side. Edges to nodes that are not listed are left out.
    """
    place = pl.int_range(pl.len()).over("x", "y") - (pl.len().over("x", "y") - 1) / 2
    most = max(nodes.group_by("x", "y").len()["len"].max() or 1, 1)
    placed = nodes.with_columns((pl.col("x") + 0.8 * place / most).alias("x"))
    spots = placed.select("name", "x", "y")
    lines = (
        edges.join(spots, left_on="source", right_on="name", how="inner")
        .join(spots.rename({"x": "x_to", "y": "y_to"}), left_on="receiver", right_on="name")
        .with_columns(pl.col("score").abs().alias("size"))
    )
    drawn = pick(lines, x="x", y="y", low="x_to", high="y_to", size="size", value="score")
    points = pick(
        placed.with_columns(pl.col("value").abs().alias("size")),
        x="x",
        y="y",
        value="value",
        size="size",
        **extra(tooltip),
    )
    colour = alt.condition("datum.value >= 0", alt.value(hue("blue")), alt.value(hue("vermilion")))
    x, y = alt.X("x:Q", title=x_title), alt.Y("y:Q", title=y_title)
    rules = (
        alt.Chart(drawn)
        .mark_rule(opacity=0.45)
        .encode(
            x=x,
            y=y,
            x2="low:Q",
            y2="high:Q",
            size=alt.Size("size:Q", scale=alt.Scale(range=[0.3, 4]), legend=None),
            color=colour,
            tooltip=[tip("value", "score")],
        )
    )
    marks = (
        alt.Chart(points)
        .mark_circle(opacity=1)
        .encode(
            x=x,
            y=y,
            size=alt.Size("size:Q", scale=alt.Scale(range=[30, 300]), legend=None),
            color=colour,
            tooltip=[*listed(points, tooltip), tip("value", "value")],
        )
    )
    chart = alt.layer(rules, marks).resolve_scale(size="independent")
    return finish(points, chart, title, height)
