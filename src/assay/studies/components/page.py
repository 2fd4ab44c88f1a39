"""The report of a components study, built from the saved run alone."""

from __future__ import annotations

from collections.abc import Callable

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table
from assay.studies import runner

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
        Fact(
            "important per position",
            summary["l0"],
            f"components above 0.1, over all sites; {summary['l0_share_of_ranks']:.1%} of the"
            f" summed ranks, {summary['ranks']}",
        ),
        Fact(
            "cross-entropy not recovered",
            summary["ce_unrecovered_ci"],
            "masks at the importances; 0 is the network, 1 is nothing",
        ),
        Fact("KL under attack", worst, f"{steps} steps, an estimate of the worst case from below"),
        Fact("CPU seconds", summary["seconds"]),
    ]
    parts = [_masks(run), _attack(run), _spectrum(run), _tokens(run)]
    for name, section in OPTIONAL.items():
        if run.has(name):
            parts.append(section(run))
    return facts, parts


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


def _singular(run: Run) -> Section:
    table = run.table("singular.parquet")
    column = next(name for name in table.columns if name.startswith("kl_pgd"))
    ours = run.table("ladder.parquet")["divergence"][0]
    return Section(
        "Are singular vectors as good?",
        "The singular parts of the same matrices, kept where a simple importance is largest, as "
        "many as there are important components: the size of what a part writes, its share of the "
        "site's value, or the gradient of its gate; by site or over all sites. The first "
        f"adversary reaches a KL of {ours:.3g} with the components and of "
        f"{min(table[column].to_list()):.3g} with the best of these.",
        tables=[Table(table, "Gated singular parts")],
    )


def _split(run: Run) -> Section:
    table = run.table("split.parquet")
    return Section(
        "Which numbers count parts, and which measure them?",
        f"Every number again, with the component {table['component'][0]} split into two equal "
        "halves that have the importance of the whole. Numbers under fixed masks must stay; those "
        "that count parts change by one part; the penalty pays for the part twice; what is drawn "
        "or climbed to is an estimate of its own.",
        tables=[Table(table.drop("component"), "Before and after")],
    )


def _frontier(run: Run) -> Section:
    table = run.table("frontier.parquet")
    picture = charts.line(
        table,
        "l0",
        "kl_ci",
        log_y=True,
        points=True,
        tooltip=("coefficient",),
        title="KL at the importances against the number of important components",
    )
    return Section(
        "What does a component less cost?",
        "One decomposition for each coefficient of the penalty. "
        f"Alive: {run.json('summary.json')['alive_definition']}.",
        charts=[picture],
        tables=[Table(table, "Coefficients")],
    )


def _seeds(run: Run) -> Section:
    table = run.table("seeds.parquet")
    counts = [
        pl.len().alias("alive in either"),
        pl.col("cosine").count().alias("matched"),
        pl.col("cosine").mean().alias("mean cosine"),
        pl.col("cosine").median().alias("median"),
        (pl.col("cosine") > 0.9).sum().alias("above 0.9"),
    ]
    pairs = table.group_by("seeds", maintain_order=True).agg(counts)
    sites = table.group_by("seeds", "site", maintain_order=True).agg(counts)
    shared = {
        "singular": " All seeds start at the same singular parts; they differ in batches and draws,"
        " so that this says less than seeds that start apart."
    }
    start = runner.config_of(run).components.start
    return Section(
        "Do other seeds find the same?",
        "Alive components of every two seeds, matched one to one by the cosine of their rank-one "
        f"matrices.{shared.get(start, '')}",
        tables=[Table(pairs, "All sites together"), Table(sites, "Matched components")],
    )


OPTIONAL: dict[str, Callable[[Run], Section]] = {
    "singular.parquet": _singular,
    "split.parquet": _split,
    "frontier.parquet": _frontier,
    "seeds.parquet": _seeds,
}
"""Sections of what a run measured when it was asked to."""
