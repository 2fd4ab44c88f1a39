"""Graphs of parts: nodes at their places, and the edges between them."""

from __future__ import annotations

import json
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

    Nodes at the same place are set side by side, in a column that is as wide as they need; places
    x without a node take no room. Edges to nodes that are not listed are left out.
    """
    columns = _columns(nodes)
    place = pl.int_range(pl.len()).over("x", "y") - (pl.len().over("x", "y") - 1) / 2
    centre = pl.col("x").replace_strict(columns, return_dtype=pl.Float64)
    placed = nodes.with_columns((centre + place).alias("x"))
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
    x = alt.X("x:Q", title=x_title, **_labelled(columns, placed["x"]))
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
    return finish(points, chart.properties(usermeta={"wide": True}), title, height)


def _columns(nodes: pl.DataFrame) -> dict[float, float]:
    """Return the middle of the column of every place x, in units of one node: as wide as the most
    nodes at one place need, and no narrower than a sixth of the widest.
    """
    sizes = nodes.group_by("x", "y").len().group_by("x").agg(pl.col("len").max()).sort("x")
    widest = max(sizes["len"], default=1)
    found, start = {}, 0.0
    for where, most in sizes.iter_rows():
        wide = max(most, widest / 6)
        found[where] = start + wide / 2
        start += wide + 1
    return found


def _labelled(columns: dict[float, float], places: pl.Series) -> dict[str, Any]:
    """Return the axis of columns, with the places x that they stand for as labels."""
    if places.is_empty():
        return {}
    step = math.ceil(len(columns) / 13)
    shown = list(columns.items())[::step]
    names = {f"{middle:.6f}": f"{where:g}" for where, middle in shown}
    axis = alt.Axis(
        values=[middle for _, middle in shown],
        labelExpr=f"({json.dumps(names)})[format(datum.value, '.6f')]",
    )
    low, high = float(places.min()), float(places.max())  # type: ignore[arg-type]
    return {"axis": axis, "scale": alt.Scale(domain=[low - 1, high + 1], nice=False, zero=False)}


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
    room = alt.ExprRef("width - 30")
    legend = alt.Legend(orient="bottom", columns=1, labelLimit=room, symbolType="stroke")
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
