"""Pictures of how values are spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import polars as pl

from assay.charts.encodings import (
    axis_of,
    coloured,
    finish,
    group_tip,
    named_rules,
    parts,
    pick,
    pickable,
    positive,
    scale_of,
    tip,
)


def histogram(
    frame: pl.DataFrame,
    x: str,
    *,
    colour: str | None = None,
    bins: int = 40,
    marks: Sequence[tuple[str, float]] = (),
    log_y: bool = False,
    title: str | None = None,
    x_title: str | None = None,
    height: int = 240,
) -> Any:
    """Draw how often values fall in each of `bins` equal bins; `marks` are named vertical lines;
    only the counts enter the chart.
    """
    data = pick(frame, x=x, group=colour).drop_nulls(["x"])
    edges = (
        np.histogram_bin_edges(data["x"].to_numpy(), bins=bins)
        if data.height
        else np.array([0.0, 1.0])
    )
    rows: list[dict[str, Any]] = []
    for name, part in parts(data, colour):
        counts, _ = np.histogram(part["x"].to_numpy(), bins=edges)
        rows += [
            {"x": float(start), "end": float(end), "count": int(count), "group": name}
            for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True)
            if count
        ]
    schema = {"x": pl.Float64, "end": pl.Float64, "count": pl.Int64, "group": pl.String}
    counted = pl.DataFrame(rows, schema=schema)
    count_scale = alt.Scale(type="symlog") if log_y else alt.Scale()
    count_axis = (
        alt.Axis(values=[0, 1, 10, 100, 1000, 10**4, 10**5, 10**6]) if log_y else alt.Axis()
    )
    chart = (
        alt.Chart(counted)
        .mark_bar(orient="vertical", opacity=0.65 if colour else 0.9, binSpacing=0.5)
        .encode(
            x=alt.X("x:Q", title=x_title or x, scale=alt.Scale(zero=False)),
            x2="end:Q",
            y=alt.Y("count:Q", title="count", stack=None, scale=count_scale, axis=count_axis),
            tooltip=[
                tip("x", "from"),
                tip("end", "to"),
                alt.Tooltip("count:Q", format=","),
                *group_tip(counted, colour),
            ],
            **coloured(counted, colour),
        )
    )
    return finish(counted, alt.layer(chart, *named_rules(marks, "right")), title, height)


def ecdf(
    frame: pl.DataFrame,
    x: str,
    *,
    colour: str | None = None,
    log_x: bool = False,
    marks: Sequence[tuple[str, float]] = (),
    title: str | None = None,
    x_title: str | None = None,
    height: int = 260,
) -> Any:
    """Draw the share of values at or below x; at most 300 quantiles per curve enter the chart."""
    data = positive(pick(frame, x=x, group=colour).drop_nulls(["x"]), x="x" if log_x else None)
    rows: list[dict[str, Any]] = []
    for name, part in parts(data, colour):
        values = np.sort(part["x"].to_numpy())
        ranks = np.unique(
            np.linspace(0, len(values) - 1, min(300, len(values))).round().astype(int)
        )
        rows += [
            {"x": float(values[rank]), "y": (int(rank) + 1) / len(values), "group": name}
            for rank in ranks
        ]
    stepped = pl.DataFrame(rows, schema={"x": pl.Float64, "y": pl.Float64, "group": pl.String})
    chart = (
        alt.Chart(stepped)
        .mark_line(interpolate="step-after")
        .encode(
            x=alt.X(
                "x:Q", title=x_title or x, scale=scale_of(log_x), axis=axis_of(log_x, data["x"])
            ),
            y=alt.Y(
                "y:Q",
                title="share at or below",
                axis=alt.Axis(format="%"),
                scale=alt.Scale(domain=[0, 1]),
            ),
            tooltip=[
                tip("x", x),
                alt.Tooltip("y:Q", title="share", format=".1%"),
                *group_tip(stepped, colour),
            ],
            **coloured(stepped, colour),
        )
    )
    return finish(
        stepped,
        alt.layer(pickable(chart, stepped, colour, 1.0), *named_rules(marks, "left")),
        title,
        height,
    )
