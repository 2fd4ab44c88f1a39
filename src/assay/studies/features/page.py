"""The report of a features study, built from the saved run alone."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.audit.selections import TOP_BY_SCORE
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table
from assay.studies.features.page_circuit import circuit_sections
from assay.studies.features.page_errors import error_sections
from assay.studies.features.page_labels import label_sections

_SOURCES = {
    "trained": "dictionaries trained on its sentences",
    "saved": "the dictionaries that were given",
    "identity": "its neurons (identity dictionaries)",
}


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    summary, config = run.json("summary.json"), run.json("config.json")["config"]
    name = config["target"]["path"] or "a small model trained on subject-verb agreement"
    return (
        "Features and what they miss",
        f"Which features of {name}, at which positions, carry the metric {config['metric']}; what"
        " do error nodes carry, the part that dictionaries do not explain; and how far do cheap"
        " scores agree with exact patching? Parts are features of"
        f" {_SOURCES[summary['dictionaries']['kind']]}, {summary['dictionaries']['count']} sites,"
        f" on {summary['pairs']['kept']} pairs of prompts.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary = run.json("summary.json")
    found = {(row["estimate"], row["over"], row["part"]): row for row in summary["agreement"]}
    facts = []
    for part in ("feature", "error"):
        row = found.get(("attribution patching", "example", part))
        if row is not None:
            facts.append(
                Fact(
                    f"AtP of {part}s, r",
                    row["pearson"],
                    f"slope {charts.show(row['slope'])}, sign right in {charts.show(row['sign'])},"
                    f" {row['n']:,} effects",
                )
            )
    row = found.get(("node paths", "example", "feature"))
    if row is not None:
        facts.append(Fact("node paths, r", row["pearson"], f"slope {charts.show(row['slope'])}"))
    measured = summary["dictionaries"]["evaluation"]
    if measured:
        low, high = (charts.show(end) for end in measured["worst_site_interval"] or (None, None))
        facts.append(
            Fact(
                "loss recovered, all sites",
                measured["loss_recovered_all_sites"],
                f"worst site alone {charts.show(measured['loss_recovered_worst_site'])} (95 %"
                f" interval {low} to {high}); at most {charts.show(measured['largest_l0'])} active"
                " features a position",
            )
        )
    if TOP_BY_SCORE in summary["bars"]:
        held = summary["bars"][TOP_BY_SCORE]
        facts.append(Fact("bars that hold, top 5 % by score", held["share"], held["sentence"]))
    return facts, [
        _dictionaries(run, summary),
        _listed(run, summary),
        _agreement(run, summary),
        *error_sections(run, summary),
        *circuit_sections(run, summary),
        *label_sections(run),
    ]


def _dictionaries(run: Run, summary: dict[str, Any]) -> Section:
    tables = [Table(run.table("fits.parquet"), "On the clean prompts, behind the first position")]
    text = (
        "A dictionary writes a value as a few active features and what they leave, the error. "
        "Explained variance is 1 - |error|^2 / |value - mean|^2."
    )
    if run.has("evaluation.parquet"):
        tables.append(Table(run.table("evaluation.parquet"), "On sentences never trained on"))
        text += (
            " Loss recovered is (zero - spliced) / (zero - clean): cross-entropies of the network"
            " with zeros, with what the dictionary rebuilds, and as it is, with its 95 % interval;"
            " beside it, PCA of as many components as features are active. Where zeros do not raise"
            " the loss for certain (zeros add, in nats, is within two of its standard errors)"
            " there is nothing to recover, and the share is absent."
        )
    return Section("The dictionaries", text, tables=tables)


def _listed(run: Run, summary: dict[str, Any]) -> Section:
    top = run.table("top.parquet")
    shown = top.drop_nulls(["low", "high"])
    pictures = (
        [
            charts.intervals(
                shown,
                "part",
                "effect",
                "low",
                "high",
                title="The largest parts: mean exact effect with its interval",
            )
        ]
        if shown.height
        else []
    )
    bars = summary["bars"]
    text = (
        "The features and error nodes with the largest mean |score| on a quarter of the pairs, "
        "patched exactly on all the others: list and means come from different pairs. "
        f"{summary['signs']['score']} The metric is {summary['signs']['metric']}; its mean is "
        f"{charts.show(summary['model']['metric_mean'])}, and the patch changes it by "
        f"{charts.show(summary['model']['mean_change'])}.\n\nBars around attribution patching: "
        f"{bars['all']['sentence']}. The promise: {bars['guarantee']}."
    )
    columns = [name for name in ("part", "effect", "low", "high", "inputs") if name in top.columns]
    return Section(
        "The largest parts",
        text,
        charts=pictures,
        tables=[Table(top.select(columns), "Mean exact effects of a removal")],
    )


def _agreement(run: Run, summary: dict[str, Any]) -> Section:
    table, nodes = run.table("audit.parquet"), run.table("nodes.parquet")
    pictures = [
        charts.scatter_identity(
            table.filter(pl.col("part_right") == part),
            "exact",
            "estimate",
            colour="kind",
            tooltip=["part", "example"],
            title=f"Attribution patching of {part}s against exact patching",
        )
        for part in ("feature", "error")
        if table.filter(pl.col("part_right") == part).height
    ]
    if "node_path" in nodes.columns and nodes["node_path"].is_not_null().any():
        pictures.append(
            charts.scatter_identity(
                nodes.filter(pl.col("part") == "error"),
                "exact",
                "node_path",
                colour="kind",
                tooltip=["group", "position"],
                title="Node paths of error nodes, means over pairs",
            )
        )
    rows = run.table("agreement.parquet").select(
        "estimate",
        "over",
        "part",
        "kind",
        pl.col("pearson").alias("r"),
        "spearman",
        "slope",
        "sign",
        pl.col("mae").alias("mean error"),
        "n",
    )
    text = (
        "Each point is one part of one pair: what the cheap score says (up) against what patching"
        " it exactly does (across). A correlation says nothing of scale: a slope below one means"
        " that effects are under-estimated, and sign is the share of effects whose sign is right."
        " Over node means, effects of a node are averaged over the pairs first, which hides"
        " single examples. Node paths (the gradient averaged along the change of one part alone)"
        f" were computed for {summary['node_paths']:,} effects."
    )
    shares = summary["site_paths"]
    if shares is not None:
        text += (
            " Integrated gradients along the path of a whole site give each part its share of the"
            " joint patch of the site; they scale the bars and are not compared with single"
            " patches. Their sums miss the joint effect by at most"
            f" {charts.show(shares['largest_gap'])} of it."
        )
    return Section(
        "Is a cheap score right?", text, charts=pictures, tables=[Table(rows, "Agreement")]
    )
