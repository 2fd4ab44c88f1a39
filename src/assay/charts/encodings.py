"""What the pictures share: safe columns, thinning, colour, scales, tooltips, titles."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import altair as alt
import polars as pl

from assay.charts.tables import show
from assay.charts.theme import CATEGORIES, DOTS, hue, themed
from assay.errors import InputError, unknown

_NUMBERS = ("x", "y", "low", "high", "truth", "promise", "value", "size")


def pick(frame: pl.DataFrame, *names: str, **columns: str | None) -> pl.DataFrame:
    """Return the named columns under the given safe names; NaN and infinities become null.

    The safe names of the axes hold numbers, unless `names` lists them as categories. Raises
    InputError for a missing column and for one that should hold numbers and does not."""
    wanted = {safe: name for safe, name in columns.items() if name is not None}
    for name in wanted.values():
        if name not in frame.columns:
            raise unknown("column", name, frame.columns)
    data = frame.select(**{safe: pl.col(name) for safe, name in wanted.items()})
    plain = []
    for safe, kind in data.schema.items():
        number = safe in _NUMBERS and safe not in names
        if number and not (kind.is_numeric() or kind in (pl.Null, pl.Boolean)):
            raise InputError(f"column {wanted[safe]!r} holds {kind}, not numbers")
        if number or (kind.is_float() and safe not in names):
            value = pl.col(safe).cast(pl.Float64)
            plain.append(pl.when(value.is_finite()).then(value).alias(safe))
        elif kind != pl.String and (safe in names or not kind.is_numeric()):
            texts = [
                value if value is None else str(value) if isinstance(value, int) else show(value)
                for value in data[safe].to_list()
            ]
            plain.append(pl.lit(pl.Series(texts, dtype=pl.String)).alias(safe))
    return data.with_columns(plain)


def extra(names: Sequence[str]) -> dict[str, str]:
    """Name the extra tooltip columns t0, t1, ..."""
    return {f"t{index}": name for index, name in enumerate(names)}


def tip(safe: str, name: str) -> alt.Tooltip:
    """Return the tooltip line of one numeric column."""
    return alt.Tooltip(field=safe, type="quantitative", title=name, format=".4~g")


def word(safe: str, name: str) -> alt.Tooltip:
    """Return the tooltip line of one column of names."""
    return alt.Tooltip(field=safe, type="nominal", title=name)


def listed(data: pl.DataFrame, names: Sequence[str]) -> list[alt.Tooltip]:
    """Return the tooltip lines of the extra columns."""
    lines = []
    for index, name in enumerate(names):
        kind = data.schema[f"t{index}"]
        if kind.is_float():
            lines.append(tip(f"t{index}", name))
        else:
            lines.append(word(f"t{index}", name))
    return lines


def group_tip(data: pl.DataFrame, name: str | None) -> list[alt.Tooltip]:
    """Return the tooltip line of the colour column, if there is one."""
    if name is None:
        return []
    return [tip("group", name)] if data.schema["group"].is_numeric() else [word("group", name)]


def groups(data: pl.DataFrame) -> list[Any]:
    """Return the values of the colour column: numbers and names that differ in a number only in
    order, others as the rows have them.
    """
    if "group" not in data.columns:
        return []
    values = data["group"].drop_nulls().unique(maintain_order=True).to_list()
    if data.schema["group"].is_numeric():
        return sorted(values)
    if len({re.sub(r"\d+", "", value) for value in values}) == 1:
        return sorted(
            values, key=lambda value: [int(number) for number in re.findall(r"\d+", value)]
        )
    return values


def coloured(data: pl.DataFrame, name: str | None, *, shapes: bool = False) -> dict[str, Any]:
    """Return the colour encoding: categories for text and few integers, a ramp for numbers;
    `shapes` repeats categories as shapes.
    """
    if name is None:
        return {}
    values = groups(data)
    if _is_ramp(data):
        lower, upper = extent(data["group"])
        wide = lower > 0 and upper > 100 * lower
        ends = alt.Scale(range=list(DOTS), type="log" if wide else "linear", interpolate="rgb")
        return {
            "color": alt.Color(
                field="group",
                type="quantitative",
                title=name,
                scale=ends,
                legend=alt.Legend(format="~s"),
            )
        }
    title = None if len(values) > 1 and name in ("phase", "group", "kind", "series") else name
    palette = [CATEGORIES[index % len(CATEGORIES)] for index in range(len(values))]
    scale = alt.Scale(domain=values, range=palette)
    encoding: dict[str, Any] = {
        "color": alt.Color(field="group", type="nominal", title=title, scale=scale)
    }
    if shapes and 1 < len(values) <= 6:
        forms = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"][
            : len(values)
        ]
        encoding["shape"] = alt.Shape(
            field="group", type="nominal", title=title, scale=alt.Scale(domain=values, range=forms)
        )
    return encoding


def pickable(mark: Any, data: pl.DataFrame, name: str | None, strong: float) -> Any:
    """Let a click on a legend entry bring out its category; a chart without categories is
    returned as it is.
    """
    if name is None or _is_ramp(data) or len(groups(data)) < 2:
        return mark
    chosen = alt.selection_point(name="chosen", fields=["group"], bind="legend")
    return (
        mark.encode(opacity=alt.condition(chosen, alt.value(strong), alt.value(0.1)))
        .add_params(chosen)
        .properties(name="marks")
    )


def _is_ramp(data: pl.DataFrame) -> bool:
    kind = data.schema["group"]
    return kind.is_float() or (kind.is_numeric() and len(groups(data)) > len(CATEGORIES))


def parts(data: pl.DataFrame, name: str | None) -> Iterator[tuple[str | None, pl.DataFrame]]:
    """Yield the rows of each value of the colour column, or all rows once; empty parts are left
    out.
    """
    for value in groups(data) if name else [None]:
        part = data.filter(pl.col("group") == value) if name else data
        if part.height:
            yield (None if value is None else str(value)), part


def scale_of(log: bool) -> alt.Scale:
    """Return a linear scale that need not include zero, or a log scale."""
    return alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)


def axis_of(log: bool, values: pl.Series) -> alt.Axis:
    """Return the axis of `scale_of`; on a log scale ticks at powers of ten, or at 1, 2, 5 times
    them for less than three decades.
    """
    if not log:
        return alt.Axis()
    lower, upper = extent(values)
    lower = lower if lower > 0 else 1.0
    upper = max(upper, lower)
    first, last = math.floor(math.log10(lower)), math.ceil(math.log10(upper))
    step = max(1, (last - first) // 8)
    steps = (1,) if last - first > 3 else (1, 2, 5)
    ticks = [factor * 10.0**power for power in range(first, last + 1, step) for factor in steps]
    said = (
        "datum.value >= 1000 ? format(datum.value, '~s') : datum.value >= .001 ?"
        " format(datum.value, '~g') : format(datum.value, '.0e')"
    )
    return alt.Axis(
        values=[tick for tick in ticks if lower <= tick * 1.0001 and tick <= upper * 1.0001]
        or [lower, upper],
        labelExpr=said,
    )


def positive(data: pl.DataFrame, **columns: str | None) -> pl.DataFrame:
    """Keep the rows whose columns (those not None) are positive, as a log scale needs."""
    for name in columns.values():
        if name is not None:
            data = data.filter(pl.col(name) > 0)
    return data


def extent(values: pl.Series) -> tuple[float, float]:
    """Return the smallest and largest value; (0, 1) for none."""
    known = values.drop_nulls()
    return (float(known.min()), float(known.max())) if known.len() else (0.0, 1.0)  # type: ignore[arg-type]


def short(labels: Sequence[Any]) -> bool:
    """Whether axis labels fit side by side."""
    return sum(len(str(label)) + 2 for label in labels) < 70


def sample(data: pl.DataFrame, limit: int) -> tuple[pl.DataFrame, str]:
    """Return at most `limit` rows, drawn with a fixed seed, and the note that says so."""
    if data.height <= limit:
        return data, ""
    return data.sample(limit, seed=0), f"a random {limit:,} of {data.height:,} points are drawn"


def thin(data: pl.DataFrame, limit: int, name: str | None = None) -> tuple[pl.DataFrame, str]:
    """Return at most about `limit` evenly spaced rows per value of the colour column, the last
    row kept, and the note that says so.
    """
    pieces, cut = [], False
    for _, part in parts(data, name):
        step = math.ceil(part.height / limit)
        cut = cut or step > 1
        kept = part.gather_every(step)
        pieces.append(pl.concat([kept, part.tail(1)]) if (part.height - 1) % step else kept)
    return (pl.concat(pieces) if pieces else data), (
        "every line is thinned to a few hundred points" if cut else ""
    )


def level(value: float, *, vertical: bool = False) -> Any:
    """Return a dashed line at a value of the y axis (or the x axis)."""
    mark = alt.Chart(pl.DataFrame({"at": [float(value)]})).mark_rule(
        strokeDash=[5, 4], strokeWidth=1.5, color=hue("quiet")
    )
    return mark.encode(x="at:Q") if vertical else mark.encode(y="at:Q")


def named_rules(marks: Sequence[tuple[str, float]], side: Literal["left", "right"]) -> list[Any]:
    """Return vertical lines with their names at the top, on the side where the picture is empty."""
    if not marks:
        return []
    lines = alt.Chart(
        pl.DataFrame({"name": [name for name, _ in marks], "at": [float(at) for _, at in marks]})
    )
    words = lines.mark_text(
        align="right" if side == "left" else "left", baseline="top", dx=-6 if side == "left" else 6
    )
    words = words.encode(x="at:Q", y=alt.value(2), text="name:N")
    return [
        lines.mark_rule(strokeWidth=1.5, color=hue("ink"), strokeDash=[5, 4]).encode(x="at:Q"),
        words,
    ]


def agreement(data: pl.DataFrame) -> str:
    """Say how y agrees with x: Pearson r and the least-squares slope; nothing where they are
    undefined.
    """
    x, y = data["x"], data["y"]
    spread = x.std()
    if data.height < 3 or not spread or not y.std():
        return ""
    r = data.select(pl.corr("x", "y")).item()
    slope = data.select(pl.cov("x", "y")).item() / x.var()
    return (
        f"Pearson r = {show(float(r), 3)}, slope {show(float(slope), 3)} over {data.height:,}"
        " points"
    )


def finish(
    data: pl.DataFrame, chart: Any, title: str | None, height: int | None = None, note: str = ""
) -> Any:
    """Give a chart its title, its note as subtitle, its height and the theme; without rows it
    says so instead of empty axes.
    """
    said: dict[str, Any] = {} if height is None else {"height": height}
    if not data.height:
        chart, said = (
            alt.Chart(pl.DataFrame({"text": ["nothing to draw"]}))
            .mark_text(color=hue("quiet"))
            .encode(text="text:N"),
            {"height": 60},
        )
    if title or note:
        said["title"] = {"text": title or "", "subtitle": note} if note else title
    return themed(chart.properties(**said) if said else chart)
