"""Pictures of how far to trust a result: training, calibration, intervals, and what a bound
costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import polars as pl

from assay.charts.encodings import (
    axis_of,
    coloured,
    extent,
    extra,
    finish,
    group_tip,
    listed,
    pick,
    positive,
    thin,
    tip,
    word,
)
from assay.charts.general import line
from assay.charts.theme import hue
from assay.errors import unknown


def training_curves(
    metrics: pl.DataFrame,
    *,
    keys: Sequence[str] | None = None,
    phases: Sequence[str] | None = None,
    title: str | None = None,
    columns: int = 3,
) -> Any:
    """Draw one small picture per metric over steps, one line per phase; columns: `step`,
    optionally `phase`, one per metric.
    """
    if not metrics.width:
        metrics = pl.DataFrame(schema={"step": pl.Int64})
    if "step" not in metrics.columns:
        raise unknown("column", "step", metrics.columns)
    if "phase" not in metrics.columns:
        metrics = metrics.with_columns(pl.lit("training").alias("phase"))
    if phases is not None:
        metrics = metrics.filter(pl.col("phase").is_in(list(phases)))
    if keys is None:
        keys = [
            name for name, kind in metrics.schema.items() if kind.is_numeric() and name != "step"
        ]
    for name in keys:
        if name not in metrics.columns:
            raise unknown("metric", name, metrics.columns)
    curves = [
        metrics.select(
            "step",
            y=pl.col(name).cast(pl.Float64),
            key=pl.lit(name),
            group=pl.col("phase").cast(pl.String),
        )
        for name in keys
    ]
    empty = pl.DataFrame(
        schema={"step": pl.Int64, "y": pl.Float64, "key": pl.String, "group": pl.String}
    )
    long = pl.concat(curves) if curves else empty
    long = long.filter(pl.col("y").is_finite())
    parts = [thin(part, 300)[0] for part in long.partition_by("key", "group", maintain_order=True)]
    long = pl.concat(parts) if parts else long
    steps = alt.Axis(
        tickCount=3, labelExpr="datum.value < 1000 ? datum.value : format(datum.value, '~s')"
    )
    phase = "phase" if long["group"].n_unique() > 1 else None
    chart = (
        alt.Chart(long)
        .mark_line(strokeWidth=1.75)
        .encode(
            x=alt.X("step:Q", title="step", axis=steps),
            y=alt.Y(
                "y:Q",
                title=None,
                scale=alt.Scale(zero=False, nice=False, padding=6),
                axis=alt.Axis(tickCount=4, format=".4~g"),
            ),
            tooltip=[
                alt.Tooltip("key:N", title="metric"),
                alt.Tooltip("step:Q", format=","),
                tip("y", "value"),
                *group_tip(long, phase),
            ],
            **coloured(long, phase),
        )
        .properties(width=190, height=120)
        .facet(
            facet=alt.Facet("key:N", sort=list(keys), title=None),
            columns=columns,
            spacing={"column": 60, "row": 70},
            bounds="flush",
        )
        .resolve_scale(y="independent")
        .resolve_axis(x="independent")
    )
    return finish(long, chart, title)


def calibration(
    frame: pl.DataFrame,
    nominal: str,
    measured: str,
    *,
    guarantee: str | None = None,
    low: str | None = None,
    high: str | None = None,
    colour: str | None = None,
    title: str | None = None,
    x_title: str = "nominal coverage",
    y_title: str = "measured coverage",
    height: int = 320,
) -> Any:
    """Draw measured against nominal coverage; the guarantee is the dashed line: a column if
    given, the diagonal otherwise.
    """
    data = (
        pick(frame, x=nominal, y=measured, promise=guarantee, low=low, high=high, group=colour)
        .drop_nulls(["x", "y"])
        .sort("x")
    )
    if guarantee is None:
        data = data.with_columns(pl.col("x").alias("promise"))
    ends = [float(value) for name in ("x", "y", "promise") for value in extent(data[name])]
    scale = alt.Scale(
        domain=[max(0.0, min(ends) - 0.03), min(1.0, max(ends) + 0.01)], zero=False, nice=False
    )
    percent = alt.Axis(format="%")
    horizontal = alt.X("x:Q", title=x_title, scale=alt.Scale(zero=False, nice=False), axis=percent)
    vertical = alt.Y("y:Q", title=y_title, scale=scale, axis=percent)
    base = alt.Chart(data)
    layers: list[Any] = [
        base.mark_line(strokeDash=[5, 4], strokeWidth=1.5, color=hue("quiet")).encode(
            x=horizontal, y=alt.Y("promise:Q", title=y_title, scale=scale)
        )
    ]
    if low and high:
        layers.append(
            base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(
                x=horizontal,
                y=alt.Y("low:Q", title=y_title, scale=scale),
                y2="high:Q",
                **coloured(data, colour),
            )
        )
    layers.append(base.mark_line().encode(x=horizontal, y=vertical, **coloured(data, colour)))
    tips = [
        alt.Tooltip(f"{name}:Q", title=said, format=".2%")
        for name, said in (("x", "nominal"), ("y", "measured"), ("promise", "guarantee"))
    ]
    layers.append(
        base.mark_point(size=55, opacity=1).encode(
            x=horizontal,
            y=vertical,
            tooltip=[*tips, *group_tip(data, colour)],
            **coloured(data, colour),
        )
    )
    if title is None and data.height:
        kept = int((data["y"] >= data["promise"]).sum())
        title = f"Coverage meets the guarantee (dashed) at {kept} of {data.height} levels"
    return finish(data, alt.layer(*layers), title, height)


def intervals(
    frame: pl.DataFrame,
    item: str,
    estimate: str,
    low: str,
    high: str,
    *,
    truth: str | None = None,
    colour: str | None = None,
    tooltip: Sequence[str] = (),
    title: str | None = None,
    x_title: str | None = None,
    limit: int = 40,
) -> Any:
    """Draw each item's estimate with its interval, in the order of the rows, and the truth as a
    diamond; the first `limit` items.
    """
    data = pick(
        frame,
        "x",
        x=item,
        y=estimate,
        low=low,
        high=high,
        truth=truth,
        group=colour,
        **extra(tooltip),
    ).drop_nulls(["x", "y"])
    if truth and title is None and data.height:
        known = data.drop_nulls(["truth", "low", "high"])
        inside = int(((known["low"] <= known["truth"]) & (known["truth"] <= known["high"])).sum())
        title = f"The interval holds the true value for {inside:,} of {known.height:,}"
    drawn = data.head(limit)
    note = f"the first {limit:,} of {data.height:,} are drawn" if data.height > limit else ""
    names = drawn["x"].unique(maintain_order=True).to_list()
    rows = alt.Y("x:N", sort=names, title=None)
    base = alt.Chart(drawn)
    said = x_title or estimate
    tips = [
        word("x", item),
        tip("y", estimate),
        tip("low", low),
        tip("high", high),
        *([tip("truth", truth)] if truth else []),
    ]
    tips += [*group_tip(data, colour), *listed(data, tooltip)]
    layers: list[Any] = [
        base.mark_rule(strokeWidth=2.5, opacity=0.45, color=hue("blue")).encode(
            y=rows,
            x=alt.X("low:Q", title=said, axis=alt.Axis(grid=True)),
            x2="high:Q",
            tooltip=tips,
            **coloured(data, colour),
        ),
        base.mark_point(size=50, opacity=1).encode(
            y=rows,
            x=alt.X("y:Q", title=said, scale=alt.Scale(zero=False)),
            tooltip=tips,
            **coloured(data, colour),
        ),
    ]
    if truth:
        layers.append(
            base.mark_point(
                shape="diamond", size=55, filled=False, strokeWidth=1.5, opacity=1, color=hue("ink")
            ).encode(y=rows, x=alt.X("truth:Q", title=said), tooltip=tips)
        )
    return finish(data, alt.layer(*layers), title, max(100, 22 * len(names)), note)


def faithfulness(frame: pl.DataFrame, parts: str, title: str) -> Any:
    """Draw faithfulness and completeness over the share of parts; `parts` names them."""
    long = frame.unpivot(
        index="share",
        on=["faithfulness", "completeness"],
        variable_name="measure",
        value_name="value",
    )
    return line(
        long,
        "share",
        "value",
        colour="measure",
        reference=1.0,
        title=title,
        x_title=f"share of {parts} kept (or, for completeness, removed)",
        y_title="share of the effect",
    )


def tradeoff(
    frame: pl.DataFrame,
    operations: str,
    bound: str,
    *,
    colour: str | None = None,
    label: str | None = None,
    tooltip: Sequence[str] = (),
    title: str | None = None,
    x_title: str | None = None,
    y_title: str | None = None,
    height: int = 340,
) -> Any:
    """Draw each bound against its cost in operations (log scale), coloured by what stays
    unexplained; the line joins the best so far.
    """
    data = pick(
        frame, x=operations, y=bound, group=colour, label=label, **extra(tooltip)
    ).drop_nulls(["x", "y"])
    data = positive(data, x="x").sort("x", "y", descending=[False, True])
    frontier = data.filter(pl.col("y") > pl.col("y").cum_max().shift(1).fill_null(float("-inf")))
    horizontal = alt.X(
        "x:Q",
        title=x_title or operations,
        scale=alt.Scale(type="log", nice=False, padding=24),
        axis=axis_of(True, data["x"]),
    )
    vertical = alt.Y("y:Q", title=y_title or bound, scale=alt.Scale(zero=False, padding=16))
    steps = (
        alt.Chart(frontier)
        .mark_line(
            interpolate="step-after", color=hue("quiet"), strokeWidth=1.25, strokeDash=[5, 4]
        )
        .encode(x=horizontal, y=vertical)
    )
    tips = [
        *([tip("label", label)] if label else []),
        alt.Tooltip("x:Q", title=operations, format=",.4~g"),
        tip("y", bound),
    ]
    tips += [*group_tip(data, colour), *listed(data, tooltip)]
    base = alt.Chart(data).encode(x=horizontal, y=vertical, tooltip=tips)
    layers: list[Any] = [
        steps,
        base.mark_point(size=110, opacity=0.95, stroke=hue("quiet"), strokeWidth=1).encode(
            **coloured(data, colour)
        ),
    ]
    if label and frontier.height:
        frontier = _apart(frontier)
        lower, upper = extent(data["x"])
        right = pl.col("x") > (lower * upper) ** 0.5
        words = (
            alt.Chart(frontier.filter(~right)).mark_text(align="left", dx=9, dy=11),
            alt.Chart(frontier.filter(right)).mark_text(align="right", dx=-9, dy=11),
        )
        layers += [side.encode(x=horizontal, y=vertical, text="label:N") for side in words]
    return finish(data, alt.layer(*layers), title, height)


def _apart(points: pl.DataFrame) -> pl.DataFrame:
    """Keep the points whose labels do not overlap the label kept before; x counts on a log
    scale.
    """
    (left, right), (bottom, top) = extent(points["x"].log()), extent(points["y"])
    kept: list[dict[str, Any]] = []
    for row in points.iter_rows(named=True):
        near_y = kept and row["y"] - kept[-1]["y"] < 0.07 * (top - bottom)
        if not near_y or math.log(row["x"] / kept[-1]["x"]) > 0.35 * (right - left):
            kept.append(row)
    return pl.DataFrame(kept, schema=points.schema)
