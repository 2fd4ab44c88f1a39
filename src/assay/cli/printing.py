"""What a verb prints: facts, lines of a summary and tables, or JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

_ROWS = 100  # of a table in a terminal


def printable(text: str) -> str:
    """Return a text with what would move a cursor, colour a terminal or turn a line around in its
    escaped form: labels and tokens of files are untrusted.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def print_lines(lines: list[str]) -> None:
    """Print lines, each as one."""
    print("\n".join(map(printable, lines)))


def print_facts(facts: list[Any], folder: Path) -> None:
    """Print a line for each fact of a report, and where the report is."""
    from assay.charts import show

    for fact in facts:
        print(printable(f"{fact.label:<28} {show(fact.value):>10}  {fact.note}".rstrip()))
    print(printable(f"report: {folder / 'report.html'}"))


def print_summary(summary: Any, as_json: bool) -> None:
    """Print a line for each entry, nested ones with their path, or the whole as JSON."""
    if as_json:
        from assay.io.files import plain

        print(json.dumps(plain(summary), indent=2, allow_nan=False))
        return
    for key, value in _flat(summary):
        shown = f"{value:.4g}" if isinstance(value, float) else printable(str(value))
        print(f"{printable(key):<44} {shown}")


def print_table(summary: dict[str, Any], table: Any, as_json: bool) -> None:
    """Print a summary and the first rows of a polars frame, or both as JSON."""
    if as_json:
        print_summary({**summary, "rows": table.to_dicts()}, True)
        return
    import polars as pl

    print_summary(summary, False)
    if "part" in table.columns:  # a part's name holds its group and index
        table = table.drop("group", "index", strict=False)
    empty = [
        name
        for name, kind in table.schema.items()
        if kind == pl.String and (table[name].fill_null("") == "").all()
    ]
    digits = pl.selectors.float().map_elements(lambda value: f"{value:.4g}", pl.String)
    words = pl.selectors.string().map_elements(printable, pl.String)
    with _unshortened(shutil.get_terminal_size((160, 24)).columns, 60):
        print(table.head(_ROWS).drop(empty).with_columns(digits, words))
    if table.height > _ROWS:
        print(f"the first {_ROWS} of {table.height:,} rows; --json gives all")


def print_tables(summary: dict[str, Any], as_json: bool) -> None:
    """Show what is no table as lines, then every list of rows as a table under its name."""
    if as_json:
        print_summary(summary, True)
        return
    import polars as pl

    from assay.charts import show

    print_summary(
        {key: entry for key, entry in summary.items() if not isinstance(entry, list)}, False
    )
    with _unshortened(200, 110):
        for key, rows in summary.items():
            if isinstance(rows, list):
                cells = [
                    {name: printable(show(value)) for name, value in row.items()} for row in rows
                ]
                print(f"\n{key.replace('_', ' ')}\n{pl.DataFrame(cells)}")


def _unshortened(width: int, words: int) -> Any:
    """Print tables with every row and column, texts up to a length, and no header of types."""
    import polars as pl

    return pl.Config(
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=width,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
        fmt_str_lengths=words,
    )


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and "sentence" in value:
        return [(prefix, value["sentence"])]  # numbers that say themselves what they mean
    if isinstance(value, dict):
        return [
            item
            for key, entry in value.items()
            for item in _flat(entry, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, value)]
