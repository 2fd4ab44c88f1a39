"""The report of a toy-directions study, built from the saved run alone."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table

METHODS = {
    "power": "orthogonal power iteration",
    "refinement": "low-rank refinement of pair gradients",
    "bilevel": "the bi-level steepness / interference method",
    "npeff": "non-negative factors of per-sample Fisher matrices",
}


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    summary, method = run.json("summary.json"), run.json("config.json")["config"]["method"]
    known = (
        f" It has {summary['circuits']} known circuits; the question is whether they are found."
        if "circuits" in summary
        else ""
    )
    return (
        f"Directions of {summary['network']}",
        f"A small network with {summary['parameters']} parameters was taken apart into directions "
        f"in parameter space by {METHODS[method['name']]}.{known} Nothing but the network, its "
        "inputs and the gradients was used.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary = run.json("summary.json")
    facts = []
    if "circuits" in summary:
        facts.append(
            Fact(
                "circuits recovered",
                f"{summary['clean_circuits']} of {summary['circuits']}",
                "the worst of all runs",
            )
        )
        facts.append(
            Fact("purity", summary["purity"], "lowest share of a direction on its own circuit")
        )
    if "coefficient_r2" in summary:
        facts.append(
            Fact(
                "coefficient r2",
                summary["coefficient_r2"],
                f"the network itself reaches {summary['network_r2']:.2f}",
            )
        )
    facts.append(
        Fact(
            "gradient left out",
            summary["error"],
            "share of squared gradient outside the span, worst run",
        )
    )
    facts.append(Fact("CPU seconds", summary["seconds"], "slowest run, gradients included"))
    parts = [_found(run, summary), _number(run, summary)]
    if run.table("curves.parquet").height:
        parts.append(_curves(run))
    if "steepness" in summary:
        parts.append(_steepness(summary["steepness"]))
    return facts, parts


def _found(run: Run, summary: dict[str, Any]) -> Section:
    pictures = []
    if run.has("shares.parquet"):
        title = "Share of each direction's squared length on each circuit's parameters"
        pictures.append(
            charts.heatmap(
                run.table("shares.parquet"), "circuit", "direction", "share", title=title
            )
        )
    text = (
        "A direction is clean when more than nine tenths of its squared length lie on the "
        "parameters of one circuit. Rows are directions, strongest first."
        if "circuits" in summary
        else "No circuits are known here; the table says how much of the gradients the directions"
        " hold and how many are active at once."
    )
    return Section(
        "Which circuits were found?",
        text,
        charts=pictures,
        tables=[Table(run.table("runs.parquet"), "All runs")],
    )


def _number(run: Run, summary: dict[str, Any]) -> Section:
    scores = run.tensors("directions.safetensors")["scores"].tolist()
    frame = pl.DataFrame(
        {"direction": [str(index) for index in range(len(scores))], "score": scores}
    )
    last = run.table("runs.parquet").filter(pl.col("network") == 0).tail(1).to_dicts()[0]
    most = "at least" if last["high"] is None else f"{last['low']} to"
    interval = f"{most} {last['low'] if last['high'] is None else last['high']}"
    return Section(
        "How many are there?",
        "A direction's score is the mean squared share of a sample's curvature along it. A "
        "direction counts when it comes back in fits to resampled inputs, and holds a larger "
        "share of an input's curvature, where it is active, than any direction of independent "
        f"gradients with the same covariance. {last['k chosen']} of the {last['k']} directions "
        f"count (95 % over refits: {interval}). {summary['factors']}",
        charts=[charts.bars(frame, "direction", "score", title="Scores, sorted", horizontal=False)],
    )


def _curves(run: Run) -> Section:
    table = run.table("curves.parquet")
    pictures = [
        charts.line(
            table.filter(pl.col("direction") == index),
            "step",
            "divergence",
            colour="inputs",
            title=f"Moving along direction {index}",
        )
        for index in table["direction"].unique(maintain_order=True).to_list()
    ]
    return Section(
        "What does moving along one do?",
        "The weights are moved along a direction and the change of the outputs measured, on the "
        "inputs where the direction holds more than half of the curvature and on all others. A "
        "circuit of its own changes the first and leaves the second alone.",
        charts=pictures,
    )


def _steepness(values: dict[str, float]) -> Section:
    more = "higher" if values["steepest"] > values["circuits"] else "not higher"
    rows = [
        {
            "directions": "the circuits that were found",
            "mean squared curvature": values["circuits"],
            "mean purity": values["purity of circuits"],
        },
        {
            "directions": "the steepest orthogonal ones",
            "mean squared curvature": values["steepest"],
            "mean purity": values["purity of steepest"],
        },
    ]
    return Section(
        "Why not simply the steepest directions?",
        "Without normalising each sample, the mean squared curvature (the objective of the "
        f"bi-level method) is dominated by inputs with several active circuits. Here it is {more} "
        "at the steepest orthogonal directions than at the circuits.",
        tables=[Table(pl.DataFrame(rows), "What the bi-level method maximises")],
    )
