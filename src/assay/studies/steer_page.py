"""The report of steering, from what its folder holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from assay import charts
from assay.report.page import Fact, Section, Table, render


def page(of: str, summary: Mapping[str, Any], rows: pl.DataFrame, more: Sequence[Section]) -> str:
    """Return the report as one HTML text; `more` sections come last."""
    bar = summary["bar"]
    facts = [
        Fact("change, measured", summary["change_measured"], f"mean of {rows.height:,} examples"),
        Fact(
            "change, predicted",
            summary["change_second_order"],
            f"to second order; {charts.show(summary['change_first_order'])} to first",
        ),
        Fact("bar", "none" if bar is None else bar, summary["promise"]),
        Fact("bars that hold", summary["bars_that_hold"], "of the examples that have one"),
    ]
    lead = (
        f"Parts of the run {of} were set to other values in every example, and the metric was"
        " measured again. The prediction is made from derivatives where nothing is steered."
    )
    sections = [_set(summary), _measured(summary, rows)]
    if summary.get("continuations"):
        text = "Each prompt, and what the model says after it without the setting and with it."
        table = Table(pl.DataFrame(summary["continuations"]))
        sections.append(Section("What the model says", text, tables=[table]))
    return render("Steering", lead, facts, [*sections, *more])


def _set(summary: Mapping[str, Any]) -> Section:
    activity = summary["activity"]
    rows = [
        {
            "part": part,
            "set": what,
            "to": float(value),
            "active_share": activity.get(part, {}).get("share"),
            "mean_activation": activity.get(part, {}).get("mean"),
        }
        for what, given in (
            ("gate", summary.get("gates", {})),
            ("activation", summary.get("set_to", {})),
        )
        for part, value in given.items()
    ]
    kinds = {"active_share": pl.Float64, "mean_activation": pl.Float64}
    text = (
        "A gate is a multiple of what the part writes: 0 removes it, -1 turns it around. A feature"
        " that is set to an activation has it everywhere in its place, active there or not."
        " active_share is the share of examples and positions at which a feature is active without"
        " steering, mean_activation its mean there."
    )
    frame = pl.DataFrame(rows, schema_overrides=kinds)
    return Section("What was set", text, tables=[Table(frame)])


def _measured(summary: Mapping[str, Any], rows: pl.DataFrame) -> Section:
    promise = summary["promise"]
    drawn = rows.with_columns(
        (pl.col("second_order") - pl.col("bar")).alias("low"),
        (pl.col("second_order") + pl.col("bar")).alias("high"),
    )
    pictures = [
        charts.scatter_identity(
            drawn,
            "measured",
            "second_order",
            low="low",
            high="high",
            tooltip=("example",),
            title="Change of the metric: measured, and predicted with its bar",
            x_title="measured",
            y_title="predicted to second order",
        ),
        charts.scatter_identity(
            drawn,
            "measured",
            "first_order",
            tooltip=("example",),
            title="Predicted to first order",
            x_title="measured",
            y_title="predicted to first order",
        ),
    ]
    text = (
        f"The metric was {charts.show(summary['metric_before'])} in the mean and is"
        f" {charts.show(summary['metric_after'])} with the setting."
        f" {promise[0].upper()}{promise[1:]}."
    )
    shown = Table(rows.head(200), f"The first {min(200, rows.height)} of {rows.height:,} examples")
    return Section("Measured and predicted", text, charts=pictures, tables=[shown])
