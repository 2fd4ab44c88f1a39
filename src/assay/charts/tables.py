"""Numbers and tables as text a person reads: sensible digits, a dash for what is missing, every
string escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import polars as pl

DASH = "–"  # noqa: RUF001
_MINUS = "\u2212"
_SUPERSCRIPT = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)


def show(value: Any, digits: int = 4) -> str:
    """Return a value as text, unescaped: `digits` significant digits for floats, grouped
    integers, a dash for None and NaN.
    """
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return _signed(f"{value:,}")
    if isinstance(value, float):
        if not math.isfinite(value):
            return DASH if math.isnan(value) else _signed(f"{'-' if value < 0 else ''}\u221e")
        if value == 0:
            return "0"
        if 1e-4 <= abs(value) < 1e6:
            places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
            text = f"{value:,.{places}f}"
            return _signed(text.rstrip("0").rstrip(".") if "." in text else text)
        return scientific(value, digits - 1)
    if isinstance(value, np.generic):
        return show(value.item(), digits)
    if isinstance(value, list | tuple | pl.Series):
        return ", ".join(show(entry, digits) for entry in value)
    return str(value)


def scientific(value: float, digits: int = 3) -> str:
    """Return `1.23x10^-5` with typographic signs."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{_signed(mantissa)}\u00d710{str(int(exponent)).translate(_SUPERSCRIPT)}"


def column(values: Sequence[Any], digits: int = 4) -> list[str]:
    """Return the cells of one column; floats share their number of decimals, so that they line
    up.
    """
    floats = [abs(value) for value in values if isinstance(value, float) and math.isfinite(value)]
    largest = max(floats, default=0.0)
    if not 1e-4 <= largest < 1e6:
        return [show(value, digits) for value in values]
    places = min(6, max(0, digits - 1 - math.floor(math.log10(largest))))
    while places and all(
        abs(value - round(value, places - 1)) < 1e-9 * largest for value in floats
    ):
        places -= 1
    cells = []
    for value in values:
        if not isinstance(value, float) or not math.isfinite(value):
            cells.append(show(value, digits))
        elif value and abs(value) < 0.5 * 10**-places:
            cells.append(scientific(value, 2))
        else:
            cells.append(_signed(f"{value + 0.0:,.{places}f}"))
    return cells


def table_html(frame: pl.DataFrame, *, title: str = "", limit: int = 200) -> str:
    """Return an escaped HTML table of the first `limit` rows; numbers to the right, NaN and null
    as a dash, cut rows counted.
    """
    if not frame.width:
        return '<p class="empty">No columns.</p>'
    shown = frame.head(limit)
    cells = [column(shown[name].to_list()) for name in frame.columns]
    kinds = [_kind(kind, texts) for kind, texts in zip(frame.dtypes, cells, strict=True)]
    head = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>'
        for name, kind in zip(frame.columns, kinds, strict=True)
    )
    rows = [
        "<tr>"
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in zip(*cells, strict=True)
    ]
    if not rows:
        rows = [f'<tr><td colspan="{frame.width}">no rows</td></tr>']
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    if frame.height > limit:
        table += f'<p class="cut">The first {limit:,} of {frame.height:,} rows.</p>'
    return table


def text_table(frame: pl.DataFrame) -> str:
    """Return a table as text with every row and column, and with names whole."""
    with pl.Config(
        tbl_rows=-1,
        tbl_cols=-1,
        fmt_str_lengths=100,
        tbl_width_chars=160,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
    ):
        return str(frame)


def notebook_html(frame: pl.DataFrame, *, title: str = "", limit: int = 20) -> str:
    """Return what a result's `_repr_html_` gives: a small escaped table with its title."""
    return (
        '<div style="overflow-x:auto;font-variant-numeric:tabular-nums">'
        f"{table_html(frame, title=title, limit=limit)}</div>"
    )


def _kind(kind: pl.DataType, cells: Sequence[str]) -> str:
    if kind.is_numeric():
        return ' class="number"'
    longest = max(map(len, cells), default=0)
    return ' class="short"' if longest <= 24 else ' class="long"' if longest > 60 else ""


def _signed(text: str) -> str:
    return text.replace("-", _MINUS)
