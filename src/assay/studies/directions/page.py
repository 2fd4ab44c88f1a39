"""The report of a directions study, built from the saved run alone."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    summary = run.json("summary.json")
    names = summary["parameters"]["names"]
    where = names[0] if len(names) == 1 else f"{len(names)} parameters ({names[0]} and others)"
    return (
        "Directions of a language model",
        f"{summary['parameters']['count']:,} weights of a model of the {summary['family']} "
        f"family, {where}, were searched for directions that change what the model says in a few "
        f"of {summary['windows']} contexts each.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary, config = run.json("summary.json"), run.json("config.json")["config"]
    low, high = summary["k_interval"]
    facts = [
        Fact(
            "directions that are clear",
            summary["k_chosen"],
            f"of {summary['k']} asked for; 95 % interval: "
            + (f"at least {low}" if high is None else f"{low} to {high}"),
        ),
        Fact(
            "gradient left out",
            summary["error"],
            "mean share of a context's gradient outside the span",
        ),
        Fact("active per context", summary["active_per_context"], "effective number of directions"),
        Fact(
            "selectivity",
            summary["selectivity"],
            "share of a step's KL on its own contexts, against an equal number of others",
        ),
    ]
    if summary["stability"] is not None:
        facts.append(Fact("stability over seeds", summary["stability"], "mean matched cosine"))
    table = run.table("directions.parquet")
    scores = table.with_columns(pl.col("direction").cast(pl.String))
    return facts, [
        Section(
            "Which directions are there?",
            "Each context's gradients point from the model's own prediction towards those in "
            "other contexts. A direction's score is the mean squared share of such gradients "
            "along it; the words are those that a step raises and lowers most on its strongest "
            "context. " + _clear(summary),
            charts=[
                charts.bars(scores, "direction", "score", title="Scores, sorted", horizontal=False)
            ],
            tables=[
                Table(
                    table,
                    f"Directions; steps are sized to change predictions by {config['kl']} nats on "
                    "average",
                )
            ],
        ),
        Section(
            "Where do they act?",
            "The contexts on which each direction holds the largest share of the gradient, with "
            "the word that follows.",
            tables=[Table(run.table("contexts.parquet"), "Strongest contexts")],
        ),
    ]


def _clear(summary: dict[str, Any]) -> str:
    """Say how many of the listed directions count, so that the others are not taken for found."""
    chosen, asked = summary["k_chosen"], summary["k"]
    if chosen == asked:
        return f"All {asked} are clear."
    if not chosen:
        return (
            f"None of the {asked} is clear: none comes back in fits to resampled contexts and "
            "stands out from independent gradients, so the table shows where the search ended and "
            "no finding."
        )
    return (
        f"{chosen} of the {asked} are clear: they come back in fits to resampled contexts and stand"
        " out from independent gradients. The others are listed and do not count."
    )
