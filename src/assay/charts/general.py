"""General pictures: each takes a polars frame and the names of its columns and returns a themed
Altair chart.

Columns are renamed inside the chart, so that no name from data is ever read as Vega code; NaN and
null are left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import polars as pl

from assay.charts.encodings import (
    agreement,
    axis_of,
    coloured,
    extent,
    extra,
    finish,
    group_tip,
    groups,
    level,
    listed,
    pick,
    pickable,
    positive,
    sample,
    scale_of,
    short,
    thin,
    tip,
    word,
)
from assay.charts.tables import show
from assay.charts.theme import DIVERGING, RAMP, hue

LIMIT = 1500


def scatter_identity(
    frame: pl.DataFrame,
    x: str,
    y: str,
    *,
    colour: str | None = None,
    tooltip: Sequence[str] = (),
    low: str | None = None,
    high: str | None = None,
    title: str | None = None,
    x_title: str | None = None,
    y_title: str | None = None,
    limit: int = LIMIT,
    height: int = 340,
) -> Any:
    """Draw the exact value (x) against the estimate (y) with the identity line, and bars `low` to
    `high` in y if given.

    The default title states Pearson r and the least-squares slope over all rows; at most `limit`
    rows are drawn, and the subtitle says so."""
    data = pick(frame, x=x, y=y, low=low, high=high, group=colour, **extra(tooltip)).drop_nulls(
        ["x", "y"]
    )
    ends = [float(value) for value in (*extent(data["x"]), *extent(data["y"]))]
    lower, upper = min(ends), max(ends)
    margin = 0.04 * (upper - lower) or 1.0
    scale = alt.Scale(domain=[lower - margin, upper + margin], nice=False, zero=False)
    drawn, note = sample(data, limit)
    identity = pl.DataFrame(
        {"x": [lower - margin, upper + margin], "y": [lower - margin, upper + margin]}
    )
    diagonal = (
        alt.Chart(identity)
        .mark_line(strokeDash=[5, 4], strokeWidth=1.25, color=hue("quiet"), clip=True)
        .encode(x="x:Q", y="y:Q")
    )
    base = alt.Chart(drawn).encode(
        x=alt.X("x:Q", title=x_title or x, scale=scale),
        y=alt.Y("y:Q", title=y_title or y, scale=scale),
        tooltip=[tip("x", x), tip("y", y), *group_tip(data, colour), *listed(data, tooltip)],
    )
    layers: list[Any] = [diagonal]
    if low and high:
        layers.append(
            base.mark_rule(opacity=0.35, strokeWidth=1).encode(
                y=alt.Y("low:Q", title=y_title or y), y2="high:Q", **coloured(data, colour)
            )
        )
    layers.append(
        pickable(base.mark_point().encode(**coloured(data, colour, shapes=True)), data, colour, 0.7)
    )
    return finish(
        data,
        alt.layer(*layers).properties(usermeta={"square": True}),
        title or agreement(data),
        height,
        note,
    )


def line(
    frame: pl.DataFrame,
    x: str,
    y: str,
    *,
    colour: str | None = None,
    low: str | None = None,
    high: str | None = None,
    tooltip: Sequence[str] = (),
    title: str | None = None,
    x_title: str | None = None,
    y_title: str | None = None,
    log_x: bool = False,
    log_y: bool = False,
    points: bool | None = None,
    reference: float | None = None,
    height: int = 280,
) -> Any:
    """Draw y over x, one line per value of `colour`, with a band `low` to `high` and a dashed
    `reference` level if given.
    """
    data = pick(frame, x=x, y=y, low=low, high=high, group=colour, **extra(tooltip)).drop_nulls(
        ["x", "y"]
    )
    data = positive(data, x="x" if log_x else None, y="y" if log_y else None)
    data, note = thin(data, 400, colour)
    if points is None:
        points = data.height <= 40 * max(1, data["group"].n_unique() if colour else 1)
    horizontal = alt.X(
        "x:Q", title=x_title or x, scale=scale_of(log_x), axis=axis_of(log_x, data["x"])
    )
    vertical = alt.Y(
        "y:Q", title=y_title or y, scale=scale_of(log_y), axis=axis_of(log_y, data["y"])
    )
    base = alt.Chart(data)
    layers: list[Any] = []
    if low and high:
        layers.append(
            base.mark_area(opacity=0.18).encode(
                x=horizontal,
                y=alt.Y("low:Q", title=y_title or y),
                y2="high:Q",
                **coloured(data, colour),
            )
        )
    if reference is not None:
        layers.append(level(reference))
    layers.append(
        pickable(
            base.mark_line().encode(x=horizontal, y=vertical, **coloured(data, colour)),
            data,
            colour,
            1.0,
        )
    )
    tips = [tip("x", x), tip("y", y), *group_tip(data, colour), *listed(data, tooltip)]
    size = 36 if points else 120
    layers.append(
        base.mark_point(size=size, opacity=1 if points else 0).encode(
            x=horizontal, y=vertical, tooltip=tips, **coloured(data, colour)
        )
    )
    return finish(data, alt.layer(*layers), title, height, note)


def bars(
    frame: pl.DataFrame,
    x: str,
    y: str,
    *,
    colour: str | None = None,
    low: str | None = None,
    high: str | None = None,
    tooltip: Sequence[str] = (),
    title: str | None = None,
    x_title: str | None = None,
    y_title: str | None = None,
    horizontal: bool | None = None,
    reference: float | None = None,
    height: int = 280,
) -> Any:
    """Draw one bar of length y per category x, in the order of the rows, grouped by `colour`,
    with error bars `low` to `high` if given.
    """
    data = pick(
        frame, "x", x=x, y=y, low=low, high=high, group=colour, **extra(tooltip)
    ).drop_nulls(["x", "y"])
    names = data["x"].unique(maintain_order=True).to_list()
    if horizontal is None:
        horizontal = len(names) > 8 or max((len(name) for name in names), default=0) > 10
    said = x_title or (None if horizontal else x)
    labels = alt.Axis(labelAngle=0, grid=False)
    category = (alt.Y if horizontal else alt.X)(
        "x:N", sort=names, title=said, axis=labels, scale=alt.Scale(paddingInner=0.3)
    )
    value = (alt.X if horizontal else alt.Y)("y:Q", title=y_title or y, axis=alt.Axis(grid=True))
    offset: dict[str, Any] = {}
    if colour:
        beside = (alt.YOffset if horizontal else alt.XOffset)("group:N", sort=groups(data))
        offset = {"yOffset" if horizontal else "xOffset": beside}
    across = {"y": category, "x": value} if horizontal else {"x": category, "y": value}
    tips = [word("x", x), tip("y", y), *group_tip(data, colour), *listed(data, tooltip)]
    base = alt.Chart(data)
    layers: list[Any] = [
        base.mark_bar(cornerRadiusEnd=2).encode(
            **across, **offset, tooltip=tips, **coloured(data, colour)
        )
    ]
    if low and high:
        ends: dict[str, Any] = (
            {"x": alt.X("low:Q", title=y_title or y), "x2": "high:Q"}
            if horizontal
            else {"y": alt.Y("low:Q", title=y_title or y), "y2": "high:Q"}
        )
        where: dict[str, Any] = {"y": category} if horizontal else {"x": category}
        layers.append(
            base.mark_rule(strokeWidth=1.5, color=hue("ink")).encode(**where, **ends, **offset)
        )
    if reference is not None:
        layers.append(level(reference, vertical=horizontal))
    tall = (
        max(
            120,
            26 * len(names) * (max(1, len(groups(data))) if colour else 1) // (2 if colour else 1),
        )
        if horizontal
        else height
    )
    return finish(data, alt.layer(*layers), title, tall)


def heatmap(
    frame: pl.DataFrame,
    x: str,
    y: str,
    value: str,
    *,
    text: bool | str = False,
    size: str | None = None,
    tooltip: Sequence[str] = (),
    title: str | None = None,
    x_title: str | None = None,
    y_title: str | None = None,
    value_title: str | None = None,
    height: int | None = None,
) -> Any:
    """Draw one cell per row at (x, y), coloured by value: diverging around zero if values have both
    signs, a ramp otherwise.

    `text` writes the value, or another column, into the cells; `size` (a column, such as certainty)
    scales the cells' area."""
    label = text if isinstance(text, str) else None
    data = pick(
        frame, "x", "y", "label", x=x, y=y, value=value, size=size, label=label, **extra(tooltip)
    ).drop_nulls(["x", "y"])
    across, down = (data[name].unique(maintain_order=True).to_list() for name in ("x", "y"))
    lower, upper = (float(end) for end in extent(data["value"]))
    signed = lower < 0 < upper
    reach = max(-lower, upper)
    domain, colours = ([-reach, reach], DIVERGING) if signed else ([lower, upper], RAMP)
    scale = alt.Scale(domain=domain, range=list(colours), interpolate="rgb")
    shade = alt.Color(
        "value:Q",
        title=value_title or value,
        scale=scale,
        legend=alt.Legend(format="~g", tickCount=5),
    )
    tips = [
        word("x", x),
        word("y", y),
        tip("value", value),
        *([tip("size", size)] if size else []),
        *listed(data, tooltip),
    ]
    base = alt.Chart(data).encode(
        x=alt.X(
            "x:N",
            sort=across,
            title=x_title or x,
            axis=alt.Axis(labelAngle=0 if short(across) else -60, ticks=False, domain=False),
        ),
        y=alt.Y("y:N", sort=down, title=y_title or y),
        tooltip=tips,
    )
    if size:
        legend = alt.Legend(
            format="~g",
            orient="bottom",
            columns=5,
            symbolFillColor=hue("quiet"),
            symbolStrokeWidth=0,
            tickCount=3,
        )
        area = alt.Size("size:Q", title=size, scale=alt.Scale(range=[10, 420]), legend=legend)
        layers: list[Any] = [base.mark_square(opacity=1).encode(color=shade, size=area)]
    else:
        layers = [
            base.mark_rect(stroke=hue("paper"), strokeWidth=1 if len(across) <= 40 else 0).encode(
                color=shade
            )
        ]
    if text:
        strong = (
            f"abs(datum.value) > {0.6 * reach!r}"
            if signed
            else f"datum.value > {lower + 0.6 * (upper - lower)!r}"
        )
        if label is None:
            places = max(0, 1 - math.floor(math.log10(max(abs(lower), abs(upper)) or 1.0)))
            texts = [_cell(number, places) for number in data["value"]]
            data = data.with_columns(pl.Series("label", texts, dtype=pl.String))
            base = base.properties(data=data)
        ink = alt.condition(strong, alt.value(hue("reverse")), alt.value(hue("ink")))
        layers.append(base.mark_text().encode(text="label:N", color=ink))
    return finish(
        data,
        alt.layer(*layers),
        title,
        height or min(560, max(90, (24 if len(down) <= 24 else 12) * len(down))),
    )


def _cell(number: float | None, places: int) -> str:
    if number is None:
        return ""
    return (
        show(0.0)
        if abs(number) < 0.5 * 10**-places
        else f"{number:.{places}f}".replace("-", "\u2212")
    )
