"""The report of a crosscoder study, built from the saved run alone."""

from __future__ import annotations

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    summary = run.json("summary.json")
    made = "was loaded" if run.json("config.json")["config"]["path"] else "was trained on your text"
    return (
        f"A crosscoder over {len(summary['sites'])} layers of your {summary['family']} model",
        f"A crosscoder of {summary['features']:,} features ({summary['activation']}) {made}."
        f" Everything below was measured on {summary['positions']:,} positions that training did"
        " not see.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary = run.json("summary.json")
    facts = [
        Fact("variance unexplained, worst layer", max(summary["fvu"].values())),
        Fact("loss recovered, worst layer", min(summary["loss_recovered"].values())),
        Fact("active features", summary["l0"], "per position, of all layers together"),
        Fact("dead features", summary["dead"], "share"),
        Fact("CPU seconds", summary["seconds"]),
    ]
    return facts, [_layers(run), *_training(run)]


def _layers(run: Run) -> Section:
    table = run.table("evaluation.parquet")
    return Section(
        "Layer by layer",
        "Loss recovered is (mean - rebuilt) / (mean - clean): cross-entropies of the model with one"
        " layer's states at their mean, rebuilt by the crosscoder, and as they are. A feature"
        " begins at the first layer where the norm of its decoder reaches a share of its largest;"
        " its gate acts there.",
        charts=[
            charts.bars(table, "name", "recovered", y_title="loss recovered"),
            charts.bars(table, "name", "unexplained", y_title="variance unexplained"),
            charts.bars(
                table.with_columns(pl.col("features that begin here").cast(pl.Float64)),
                "name",
                "features that begin here",
            ),
        ],
        tables=[Table(table.select("name", pl.exclude("name", "site")), "Held-out windows")],
    )


def _training(run: Run) -> list[Section]:
    metrics = run.metrics()
    if not metrics.width:
        return []
    return [Section("Training", charts=[charts.training_curves(metrics)])]
