"""Graphs of parts: nodes at their places, and the edges between them."""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import polars as pl

from assay.charts.encodings import extra, finish, groups, listed, pick, tip
from assay.charts.theme import CATEGORIES, hue


def graph(
    nodes: pl.DataFrame,
    edges: pl.DataFrame,
    *,
    tooltip: tuple[str, ...] = ("name",),
    title: str | None = None,
    x_title: str = "position",
    y_title: str = "layer",
    outline: str | None = None,
    height: int = 380,
) -> Any:
    """Draw nodes (columns name, x, y, value) and edges (source, receiver, score) between them; the
    width of an edge is |score|, its colour the sign, and the size of a node |value|. Nodes that
    have the same text in the column `outline` get an outline of one colour, those with none none.

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
        **({} if outline is None else {"group": outline}),
        **extra(tooltip),
    )
    colour = alt.condition("datum.value >= 0", alt.value(hue("blue")), alt.value(hue("vermilion")))
    x = alt.X("x:Q", title=x_title, **_whole(nodes["x"], 0.5))
    y = alt.Y("y:Q", title=y_title, **_whole(nodes["y"], 0.25))
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
            **_outlined(points),
        )
    )
    chart = alt.layer(rules, marks).resolve_scale(size="independent")
    return finish(points, chart, title, height)


def _whole(places: pl.Series, beside: float) -> dict[str, Any]:
    """Return an axis with ticks at whole numbers alone, as far as nodes stand and a bit more."""
    if places.is_empty():
        return {}
    low, high = float(places.min()), float(places.max())  # type: ignore[arg-type]
    step = max(math.ceil((high - low) / 12), 1)
    ticks = list(range(math.ceil(low), math.floor(high) + 1, step))
    return {
        "axis": alt.Axis(values=ticks, format="d"),
        "scale": alt.Scale(domain=[low - beside, high + beside], nice=False, zero=False),
    }


def _outlined(points: pl.DataFrame) -> dict[str, Any]:
    """Return the encoding that outlines nodes by their group."""
    names = [name for name in groups(points) if name]
    if not names:
        return {}
    palette = [CATEGORIES[(index + 2) % len(CATEGORIES)] for index in range(len(names))]
    alone = alt.datum.group != ""
    legend = alt.Legend(orient="bottom", columns=1, labelLimit=420, symbolType="stroke")
    return {
        "stroke": alt.Stroke(
            field="group",
            type="nominal",
            title=None,
            scale=alt.Scale(domain=names, range=palette),
            legend=legend,
        ),
        "strokeWidth": alt.condition(alone, alt.value(3), alt.value(0)),
    }
