"""The section of a features report that shows circuits."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Section, Table

_SHOWN_EDGES = 60
_SHOWN_PARTS = 200
_KEPT = (
    *("faithfulness", "low", "high", "completeness"),
    *("cpr", "cpr_low", "cpr_high", "cmd", "cmd_low", "cmd_high"),
)


def circuit_sections(run: Run, summary: dict[str, Any]) -> list[Section]:
    """Return the section, none for a run without circuits."""
    found = summary["circuits"]
    if not found:
        return []
    by_hand = run.json("config.json")["config"]["circuit"].get("supernodes")
    grouped = "are active together and have the same effect"
    if by_hand is not None:
        grouped = f"were grouped by hand, in {by_hand}"
    curves, parts, edges = (
        run.table(f"circuit-{name}.parquet") for name in ("curves", "parts", "edges")
    )
    lines, circuits = [], []
    for one in found:
        name, words = one["circuit"], _words(one)
        curve = curves.filter((pl.col("circuit") == name) & pl.col("faithfulness").is_finite())
        lines.append(
            charts.line(
                curve.filter((pl.col("nodes") > 0) & (pl.col("nodes") <= _SHOWN_PARTS)),
                "nodes",
                "faithfulness",
                colour="kept",
                low="low",
                high="high",
                reference=1.0,
                title=f"What is kept of the metric, {words}",
                x_title="parts kept",
                y_title="faithfulness",
            )
        )
        here = parts.filter(pl.col("circuit") == name)
        between = edges.filter((pl.col("circuit") == name) & (pl.col("receiver") != "metric"))
        largest = between.sort(pl.col("score").abs(), descending=True).head(_SHOWN_EDGES)
        circuits.append(
            charts.graph(
                here.select(
                    pl.col("part").alias("name"),
                    pl.col("position").alias("x"),
                    pl.col("layer").alias("y"),
                    pl.col("help").alias("value"),
                    pl.col("supernode"),
                ),
                largest,
                tooltip=("name", "supernode"),
                outline="supernode",
                title=f"The circuit, {words}",
            )
        )
    rows = [
        {
            "circuit": one["circuit"],
            "kept": name,
            "parts": one["nodes"],
            **{key: values[key] for key in _KEPT},
        }
        for one in found
        for name, values in one["kept"].items()
    ]
    text = (
        "A circuit is the parts whose removal loses most of the right answer; everything else is "
        "set to the reference, errors of dictionaries included unless they are said to be kept. "
        "faithfulness = (m(circuit) - m(nothing)) / (m(network) - m(nothing)), completeness the "
        "same without the circuit. CPR is the area under faithfulness f over the share of parts, "
        "CMD the area under |1 - f|; 95 % intervals are Fieller's for ratios of means over pairs,"
        " absent where the network is not clear of nothing. Parts were chosen on "
        f"{found[0]['chosen_on']} pairs and measured on {found[0]['measured_on']} others."
        " A part whose bar reached across the bound was patched exactly before it was taken or "
        f"left: {sum(one['patched_exactly'] for one in found)} were, beside those that were known."
        " The refined circuit is shown: its parts were exchanged for others, on the same pairs, as "
        "long as that lowered the mean of (m(circuit) - m(network))^2 and did not raise the mean "
        "difference; "
        f"{sum(one['refinement']['exchanged'] for one in found)} were."
        "\n\nAn edge is what is lost of the attribution of a part when the part before it is "
        "removed, to first order, by the direct way alone; for a part that is active on one side "
        "only it is the difference quotient. In the picture a part stands at its position and "
        "layer; blue raises, orange lowers. A supernode, outlined in one colour, holds parts that "
        f"{grouped}."
    )
    return [
        Section(
            "The circuit",
            text,
            charts=[*lines, *circuits],
            tables=[
                Table(pl.DataFrame(rows), "What circuits keep, on pairs that did not choose them"),
                Table(_worst(found), "The worst that everything outside can do"),
                Table(parts.drop("index", "group"), "The parts"),
                Table(
                    edges.sort(pl.col("score").abs(), descending=True).head(_SHOWN_EDGES),
                    "The largest edges",
                ),
            ],
        )
    ]


def _words(one: dict[str, Any]) -> str:
    places = ", ".join(map(str, one["positions"]))
    return f"prompts of {one['tokens']} tokens that differ at position {places}"


def _worst(found: list[dict[str, Any]]) -> pl.DataFrame:
    """Return one row a circuit and what is kept beside it: the damage that was found, and the
    bound, or why there is none.
    """
    rows = []
    for one in found:
        for name, worst in one["worst"].items():
            if not worst:
                continue
            bracket = worst["bracket"]
            rows.append(
                {
                    "circuit": one["circuit"],
                    "kept": name,
                    "examples": worst["examples"],
                    "damage found": worst["damage"],
                    "of nothing kept": worst["damage_of_nothing_kept"],
                    "faithfulness at most": worst["faithfulness_at_most"],
                    "damage proved": bracket.get("proved_mean"),
                    "why no bound": bracket.get("refused", ""),
                }
            )
    schema = {"damage proved": pl.Float64, "faithfulness at most": pl.Float64}
    return pl.DataFrame(rows, schema_overrides=schema)
