"""Two quantities against one another, coloured by a third."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import polars as pl

from assay.charts.encodings import (
    axis_of,
    coloured,
    extra,
    finish,
    group_tip,
    listed,
    pick,
    pickable,
    positive,
    sample,
    scale_of,
    tip,
)
from assay.charts.general import LIMIT


def scatter(
    frame: pl.DataFrame,
    x: str,
    y: str,
    *,
    colour: str | None = None,
    tooltip: Sequence[str] = (),
    log_x: bool = False,
    log_y: bool = False,
    title: str | None = None,
    x_title: str | None = None,
    y_title: str | None = None,
    limit: int = LIMIT,
    height: int = 300,
) -> Any:
    """Draw y over x, a point for every row; `colour` is a column of names or of numbers.

    On a log scale only positive values are drawn; at most `limit` points are, and the subtitle says
    so."""
    data = pick(frame, x=x, y=y, group=colour, **extra(tooltip)).drop_nulls(["x", "y"])
    data = positive(data, x="x" if log_x else None, y="y" if log_y else None)
    drawn, note = sample(data, limit)
    chart = (
        alt.Chart(drawn)
        .mark_point()
        .encode(
            x=alt.X(
                "x:Q", title=x_title or x, scale=scale_of(log_x), axis=axis_of(log_x, drawn["x"])
            ),
            y=alt.Y(
                "y:Q", title=y_title or y, scale=scale_of(log_y), axis=axis_of(log_y, drawn["y"])
            ),
            tooltip=[tip("x", x), tip("y", y), *group_tip(data, colour), *listed(data, tooltip)],
            **coloured(data, colour, shapes=True),
        )
    )
    return finish(data, pickable(chart, data, colour, 0.7), title, height, note)
