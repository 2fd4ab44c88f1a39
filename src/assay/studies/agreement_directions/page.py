"""The report of an agreement-directions study, built from the saved run alone."""

from __future__ import annotations

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    summary = run.json("summary.json")
    return (
        "The direction of agreement",
        "A small language model that makes verbs agree with their subjects was searched, in the "
        f"{summary['parameters']:,} weights of {summary['block']}, for directions that change its "
        "prediction at few positions each. One of them moves the number of the verb.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary = run.json("summary.json")
    low, high = summary["k_interval"]
    facts = [
        Fact(
            "number direction moves the metric",
            summary["number_effect"],
            f"nats of logit difference at a KL of {summary['kl']}",
        ),
        Fact("the next direction", summary["next_effect"], "at the same KL"),
        Fact(
            "the steepest direction",
            summary["eigenvector_effect"],
            "top eigenvector of the mean Fisher, at the same KL",
        ),
        Fact(
            "KL away from the verb",
            f"{summary['number_away']:.1%}",
            "of the number direction's step",
        ),
        Fact(
            "directions that stand out",
            summary["k_chosen"],
            f"95 %: at least {low}" if high is None else f"95 %: {low} to {high}",
        ),
    ]
    steps = run.table("steps.parquet")
    best = steps.sort("effect", descending=True).group_by("direction", maintain_order=True).first()
    number = summary["number_direction"]
    return facts, [
        Section(
            "What does each direction move?",
            f"Steps along every direction are sized to the same KL, {summary['kl']} nats per "
            "sentence over all positions, on prompts that the directions were not found on. "
            f"Direction {number} was chosen because the same step moves the logit difference most "
            "on the prompts that the directions were found on.",
            charts=[
                charts.bars(
                    best,
                    "direction",
                    "effect",
                    title="Mean change of the logit difference",
                    horizontal=True,
                ),
                charts.bars(
                    best,
                    "direction",
                    "away",
                    title="Share of KL away from the verb",
                    horizontal=True,
                ),
            ],
            tables=[Table(steps, "Both signs of every step")],
        ),
        Section(
            "Where do they act?",
            "Mean share of the gradient that each direction holds, by position in the prompt, "
            "and the contexts where it holds most. The contexts are its label.",
            charts=[
                charts.heatmap(
                    run.table("activity.parquet"),
                    "position",
                    "direction",
                    "share",
                    title="Share by position",
                )
            ],
            tables=[Table(run.table("contexts.parquet"), "Strongest contexts")],
        ),
    ]
