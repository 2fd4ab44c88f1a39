"""The report of a toy-components study, built from the saved run alone."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table

NAMES = {"tms": "features in superposition", "residual": "a residual MLP"}


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    summary = run.json("summary.json")
    sites = ", ".join(summary["sites"])
    return (
        f"Components of {NAMES[summary['network']]}",
        f"The matrices {sites} were split into {summary['components_per_site']} rank-one "
        "components each, of which few matter on any input and the rest can be removed in any "
        "combination. Nothing but the network and its inputs was used.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary = run.json("summary.json")
    parts = [
        _importances(run),
        _factors(run),
        _spectrum(run),
        _reconstruction(run),
        _clusters(run),
    ]
    if run.has("comparison.parquet"):
        parts.append(_comparison(run, summary))
    return _facts(summary), parts


def _facts(summary: dict[str, Any]) -> list[Fact]:
    facts = []
    if summary["network"] == "tms":
        facts += [
            Fact(
                "wrong importances",
                summary["identity_error"],
                "entries off the identity by more than 0.1 on single-feature probes, worst run",
            ),
            Fact("MMCS", summary["mmcs"], "cosine with the true features, worst run and matrix"),
            Fact(
                "ML2R",
                f"{summary['ml2r'][0]:.3f} to {summary['ml2r'][1]:.3f}",
                "length over the true one, encoder",
            ),
        ]
    else:
        low, high = summary["monosemantic_w_in"]
        facts.append(
            Fact(
                "monosemantic W_in components",
                str(low) if low == high else f"{low} to {high}",
                "important on the probe of exactly one feature",
            )
        )
    steps, worst = next(iter(summary["pgd"].items()))
    facts += [
        Fact(
            "error under importance masks",
            summary["divergence"]["ci"],
            f"mean squared error; {summary['divergence']['zero']:.2g} with everything removed",
        ),
        Fact(
            "error under attack",
            worst,
            f"{steps} steps of an adversary: an estimate of the worst case from below",
        ),
        Fact("CPU seconds", summary["seconds"], "slowest network, its own training included"),
    ]
    return facts


def _importances(run: Run) -> Section:
    table = run.table("importance.parquet")
    pictures = [
        charts.heatmap(
            table.filter(pl.col("site") == site),
            "component",
            "feature",
            "importance",
            title=f"{site}: importance of components on single features",
        )
        for site in table["site"].unique(maintain_order=True).to_list()
    ]
    return Section(
        "Which components matter where?",
        "Each row is a probe with one feature at 0.75, each column a component, in the order in "
        "which the matrix is nearest to the identity (Hungarian matching). One component per "
        "feature is the identity; an identity layer of the network has as many components as "
        "dimensions and they matter for every feature.",
        charts=pictures,
        tables=[Table(run.table("runs.parquet"), "All networks and decompositions")],
    )


def _factors(run: Run) -> Section:
    table = run.table("factors.parquet")
    pictures = []
    for site in table["site"].unique(maintain_order=True).to_list():
        for side, words in (("V", "what it reads"), ("U", "what it writes")):
            own = table.filter((pl.col("site") == site) & (pl.col("side") == side))
            if own.height:
                pictures.append(
                    charts.heatmap(
                        own, "entry", "component", "value", title=f"{site}: {side}, {words}"
                    )
                )
    return Section(
        "What do they read and write?",
        "The factors V and U of the alive components, both at the same length; sides of a "
        "residual stream are shown feature by feature. A component is alive when its largest "
        "importance over the probes is above 0.1.",
        charts=pictures,
    )


def _spectrum(run: Run) -> Section:
    table = run.table("spectrum.parquet")
    counts = table.group_by("site", maintain_order=True).agg(
        (pl.col("state") == "alive").sum().alias("alive")
    )
    pictures = []
    for site, living in counts.iter_rows():
        pictures.append(
            charts.line(
                table.filter(pl.col("site") == site),
                "rank",
                "mean importance",
                colour="state",
                tooltip=("component",),
                points=True,
                title=f"{site}: {living} alive",
            )
        )
    return Section(
        "How many are alive?",
        "Mean importance over a batch, sorted, with the cut between alive and dead components.",
        charts=pictures,
    )


def _reconstruction(run: Run) -> Section:
    ladder = run.table("ladder.parquet")
    first = run.table("reconstruction.parquet")
    level = first.filter(pl.col("masks") == "ci")["divergence"].item()
    return Section(
        "What if the unimportant ones are removed?",
        "The squared error of the masked network: with the masks at the importances (ci), at 0 "
        "or 1 (rounded), with everything (unmasked) or nothing (zero), with drawn masks between "
        "importance and one (stochastic). An adversary ascends the error by projected gradient, "
        "one number per component for the whole batch, with steps times rate at 2; its error is "
        "an estimate of the worst case from below, and more steps may find more. The dashed line "
        "is the error at the importances.",
        charts=[
            charts.line(
                ladder,
                "steps",
                "divergence",
                log_x=True,
                reference=level,
                title="Error against the adversary's steps",
            )
        ],
        tables=[Table(first, "Masks"), Table(ladder, "Adversary")],
    )


def _clusters(run: Run) -> Section:
    table = run.table("clusters.parquet")
    return Section(
        "Which components go together?",
        "Components of all sites, merged as long as the description of what is active gets "
        "shorter (description length). In these networks a mechanism is one component at every "
        "matrix.",
        tables=[Table(table, "Clusters and the share of inputs where they are active")],
    )


def _comparison(run: Run, summary: dict[str, Any]) -> Section:
    agreement = summary["agreement_of_seeds"]
    return Section(
        "Does another seed find the same?",
        f"The first network was decomposed again from another seed. Of {agreement['components']} "
        f"alive components of either, {agreement['matched_above_0.9']} have a partner whose "
        "rank-one matrix has a cosine above 0.9; components without a partner have no cosine.",
        tables=[Table(run.table("comparison.parquet"), "Matched components")],
    )
