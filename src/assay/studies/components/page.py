"""The report of a components study, built from the saved run alone."""

from __future__ import annotations

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table

FLOOR = 1e-6
"""The lowest mean importance that a logarithmic picture shows."""


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    summary = run.json("summary.json")
    return (
        f"Components of {len(summary['sites'])} matrices of your {summary['family'] or 'own'} "
        "model",
        f"{summary['components']} rank-one components were trained so that few matter at any "
        "position and the rest can be removed in any combination. Everything below was measured "
        "on windows that training did not see.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary = run.json("summary.json")
    steps, worst = next(iter(summary["pgd"].items()))
    facts = [
        Fact(
            "alive components",
            f"{summary['alive']} of {summary['components']}",
            summary["alive_definition"],
        ),
        Fact("important per position", summary["l0"], "components above 0.1, over all sites"),
        Fact(
            "cross-entropy not recovered",
            summary["ce_unrecovered_ci"],
            "masks at the importances; 0 is the network, 1 is nothing",
        ),
        Fact("KL under attack", worst, f"{steps} steps, an estimate of the worst case from below"),
        Fact("CPU seconds", summary["seconds"]),
    ]
    return facts, [_masks(run), _attack(run), _spectrum(run), _tokens(run)]


def _masks(run: Run) -> Section:
    return Section(
        "What do the important components explain?",
        "KL from the clean network, and cross-entropy on the next token, with the masks at the "
        "importances (ci), at 0 or 1 (rounded), with everything (unmasked) or nothing (zero), "
        "and with drawn masks between importance and one (stochastic).",
        tables=[
            Table(run.table("reconstruction.parquet"), "Masks"),
            Table(run.table("importance.parquet"), "Components above a threshold per position"),
        ],
    )


def _attack(run: Run) -> Section:
    ladder = run.table("ladder.parquet")
    level = run.table("reconstruction.parquet").filter(pl.col("masks") == "ci")["divergence"].item()
    return Section(
        "Can the unimportant ones be removed in any combination?",
        "An adversary ascends the KL by projected gradient, one number per component for the "
        "whole batch, with steps times rate at 2. Its KL is an estimate of the worst case from "
        "below; a decomposition is robust only as far as the ladder was climbed. The dashed line "
        "is the KL at the importances.",
        charts=[
            charts.line(
                ladder,
                "steps",
                "divergence",
                log_x=True,
                reference=level,
                y_title="KL",
                title="KL against the adversary's steps",
            )
        ],
        tables=[Table(ladder, "Adversary")],
    )


def _spectrum(run: Run) -> Section:
    table = run.table("spectrum.parquet").with_columns(
        pl.col("mean importance").clip(lower_bound=FLOOR)
    )
    pictures = [
        charts.line(
            table.filter(pl.col("site") == site),
            "rank",
            "mean importance",
            colour="state",
            tooltip=("component",),
            log_y=True,
            points=True,
            title=site,
        )
        for site in table["site"].unique(maintain_order=True).to_list()[:12]
    ]
    return Section(
        "How many are alive?",
        "Mean importance over the held-out positions, sorted, with the cut between alive and "
        f"dead components; the first twelve matrices. What is below {FLOOR:g} is drawn there.",
        charts=pictures,
    )


def _tokens(run: Run) -> Section:
    return Section(
        "Where do they matter?",
        "For the components with the largest mean importance, the tokens at which importance "
        "times inner activation is largest.",
        tables=[Table(run.table("top.parquet"), "Strongest tokens")],
    )
