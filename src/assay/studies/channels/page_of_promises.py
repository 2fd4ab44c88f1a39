"""The section of a channels report on what is promised for new inputs."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Section, Table


def calibration(run: Run, summary: dict[str, Any]) -> Section:
    """Return the section on bars and thresholds, and how they fared."""
    coverage = run.table("coverage.parquet")
    bars = summary["bars"]["second" if "second" in summary["bars"] else "first"]
    pictures = [
        charts.calibration(
            coverage,
            "nominal",
            "measured",
            low="low",
            high="high",
            colour="estimate",
            title=f"Coverage of the bars against the promise (dashed): {coverage['resplits'][0]}"
            " resplits, two deviations",
        ),
        charts.line(
            coverage.filter(pl.col("width").is_finite()),
            "nominal",
            "width",
            colour="estimate",
            log_y=True,
            title="Scaling by the certificate makes the bars of the second-order estimate narrower",
            x_title="nominal coverage",
            y_title="mean width of a bar",
        ),
    ]
    text = f"Error bars from a random, exactly ablated subset: {bars['guarantee']}. "
    if bars["coverage"] is None:
        text += (
            "The estimate is exact up to rounding on every held-out row, so there is nothing for a"
            " bar to cover."
        )
    else:
        text += (
            f"On inputs that did not calibrate them, {bars['promises']['all']['sentence']}. Their"
            f" mean width is {bars['mean_width']:.3g}; a constant bar around the first-order"
            f" estimate needs {bars['constant_first_order_width']:.3g}."
        )
    promises, splits = summary["promises"], summary["over_resplits"]
    text += (
        f"\n\nFor the largest channels of an input together: {promises['bars']} Over"
        f" {splits['splits']} random halves of the inputs,"
        f" {splits['mean_share_of_inputs_in_bars']:.1%} of the inputs in the other half had all"
        " their effects in the bars.\n\nA threshold on the certificate over |attribution|:"
        f" {promises['threshold']}"
    )
    if splits.get("splits_with_a_threshold"):
        text += (
            f" Over {splits['splits_with_a_threshold']} random halves with a threshold it trusts"
            f" {splits['mean_share_of_trusted_channels']:.1%} of the channels that need a"
            f" certificate, and {splits['mean_share_of_inputs_wrong']:.2%} of the inputs in the"
            " other half have a wrong one among them."
        )
    rules = run.table("rules.parquet")
    tables = (
        [
            Table(
                rules,
                "What a rule accepts, and what of that is wrong, on the inputs that calibrated it",
            )
        ]
        if rules.height
        else []
    )
    return Section("What is promised for new inputs", text, charts=pictures, tables=tables)
