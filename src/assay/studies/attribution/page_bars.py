"""The part of the attribution report that is about error bars: promises, totals and recall."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.audit.coverage import percent
from assay.io.runs import Run
from assay.report.page import Section, Table


def bars_section(run: Run, summary: dict[str, Any], name: str) -> Section:
    """Return the section on the bars around a method (`name`: in words)."""
    bars = summary["methods"][summary["coverage"]["method"]]["bars"]
    promises = bars["promises"]
    text = (
        f"Bars around {name}. The promise: {bars['guarantee']}.\n\n{promises['all']['sentence']}."
    )
    if bars["mean_width"] is not None:
        text += f" Their mean width is {number(bars['mean_width'])}"
        constant = bars["constant_first_order_width"]
        text += (
            "."
            if constant is None
            else f"; a constant bar around attribution patching needs {number(constant)}."
        )
    pictures = []
    largest = run.table("input.parquet")
    drawn = largest.filter(pl.col("together_low").is_finite() & pl.col("together_high").is_finite())
    if drawn.height:
        pictures.append(
            charts.intervals(
                drawn,
                "part",
                "score",
                "together_low",
                "together_high",
                truth="exact",
                title="One held-out pair: bars that hold at once for its"
                f" {drawn.height} largest scores",
            )
        )
        if (joint := promises.get("largest, together")) is not None:
            text += f" {joint['sentence']}."
    recall = summary["top_recall"]
    if recall["estimate"] is None:
        text += f" The recall of the largest nodes is not given: {recall['reason']}."
    else:
        text += (
            f" Of the nodes whose exact effect is as large as the {recall['k']}th score of their"
            f" pair, {percent(recall['estimate'])} are among the {recall['k']} largest scores"
            f" ({percent(1 - recall['alpha'])} interval"
            f" {100 * recall['low']:.0f}-{percent(recall['high'])})."
        )
    if summary["fixed"] is not None:
        fixed = summary["fixed"]
        text += (
            f" {fixed['patches']:,} further exact patches went to the most doubtful of the nodes"
            f" that could be among the largest; {percent(fixed['share_exact'])} of all values are"
            " then exact."
        )
    rows = [
        {
            "selection": key,
            "covered": found["share"],
            "low": found["low"],
            "high": found["high"],
            "n": found["n"],
            "inputs": found["inputs"],
            "mean width": found["mean_width"],
            "not given because": found.get("reason", ""),
        }
        for key, found in promises.items()
    ]
    tables = [
        Table(
            pl.DataFrame(rows, infer_schema_length=None),
            "Share of bars that contain the exact effect, with 95 % intervals; nominal"
            f" {percent(1 - bars['alpha'])}",
        )
    ]
    sums = [
        {
            "site": site,
            **{key: entry[key] for key in ("estimate", "low", "high")},
            "not given because": entry.get("reason", ""),
        }
        for site, entry in summary["totals"].items()
    ]
    if sums:
        tables.append(
            Table(
                pl.DataFrame(sums, infer_schema_length=None),
                "Sum of all single effects, mean over pairs, with intervals",
            )
        )
    return Section("Error bars", text, charts=pictures, tables=tables)


def coverage_words(found: dict[str, Any]) -> str:
    """Return a measured share with its support and interval, for the line below a headline
    number.
    """
    if found["share"] is None:
        return f"not given: {found['reason']}"
    return (
        f"{found['covered']:,} of {found['n']:,}; 95 % interval"
        f" {100 * found['low']:.0f}-{percent(found['high'])}; nominal {percent(found['nominal'])}"
    )


def number(value: float | None) -> str:
    """Return a number as reports show it."""
    return charts.show(value)
