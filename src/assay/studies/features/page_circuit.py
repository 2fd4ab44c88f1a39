"""The section of a features report that shows circuits."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Section, Table

_SHOWN_EDGES = 60


def circuit_sections(run: Run, summary: dict[str, Any]) -> list[Section]:
    """Return the section, none for a run without circuits."""
    found = summary["circuits"]
    if not found:
        return []
    curves, parts, edges = (
        run.table(f"circuit-{name}.parquet") for name in ("curves", "parts", "edges")
    )
    pictures = []
    for one in found:
        tokens = one["tokens"]
        pictures.append(
            charts.line(
                curves.filter((pl.col("tokens") == tokens) & pl.col("faithfulness").is_finite()),
                "nodes",
                "faithfulness",
                colour="kept",
                reference=1.0,
                title=f"What is kept of the metric, prompts of {tokens} tokens",
                x_title="parts kept",
                y_title="faithfulness",
            )
        )
        here = parts.filter(pl.col("tokens") == tokens)
        between = edges.filter((pl.col("tokens") == tokens) & (pl.col("receiver") != "metric"))
        largest = between.sort(pl.col("score").abs(), descending=True).head(_SHOWN_EDGES)
        pictures.append(
            charts.graph(
                here.select(
                    pl.col("part").alias("name"),
                    pl.col("position").alias("x"),
                    pl.col("layer").alias("y"),
                    pl.col("help").alias("value"),
                ),
                largest,
                title=f"The circuit of prompts of {tokens} tokens",
            )
        )
    rows = [
        {
            "tokens": one["tokens"],
            "kept": name,
            "parts": one["nodes"],
            **{key: values[key] for key in ("faithfulness", "completeness", "cpr", "cmd")},
        }
        for one in found
        for name, values in one["kept"].items()
    ]
    text = (
        "A circuit is the parts whose removal loses most of the right answer; everything else is "
        "set to the reference, errors of dictionaries included unless they are said to be kept. "
        "faithfulness = (m(circuit) - m(nothing)) / (m(network) - m(nothing)), completeness the "
        "same without the circuit. CPR is the area under faithfulness f over the share of parts, "
        "CMD the area under |1 - f|. Parts were chosen on "
        f"{found[0]['chosen_on']} pairs and measured on {found[0]['measured_on']} others."
        " A part whose bar reached across the bound was patched exactly before it was taken or "
        f"left: {sum(one['patched_exactly'] for one in found)} were, beside those that were known."
        "\n\nAn edge is what is lost of the attribution of a part when the part before it is "
        "removed, to first order, by the direct way alone; for a part that is active on one side "
        "only it is the difference quotient. In the picture a part stands at its position and "
        "layer; blue raises, orange lowers."
    )
    return [
        Section(
            "The circuit",
            text,
            charts=pictures,
            tables=[
                Table(pl.DataFrame(rows), "What circuits keep, on pairs that did not choose them"),
                Table(parts.drop("index", "group"), "The parts"),
                Table(
                    edges.sort(pl.col("score").abs(), descending=True).head(_SHOWN_EDGES),
                    "The largest edges",
                ),
            ],
        )
    ]
