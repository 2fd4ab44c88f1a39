"""The report of a dictionaries study, built from the saved run alone."""

from __future__ import annotations

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    summary, config = run.json("summary.json"), run.json("config.json")["config"]
    count = len(summary["sites"])
    whose = "a small" if config["target"]["train"] else "your"
    return (
        f"Dictionaries at {count} {'sites' if count > 1 else 'site'} of {whose} {summary['family']}"
        " model",
        f"{summary['architecture']} dictionaries were trained on your text and saved in the format"
        f" of SAELens. Everything below was measured on {summary['positions']:,} positions that"
        " training did not see.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary = run.json("summary.json")
    worst, of_pca = summary["worst"], charts.show(summary["pca_loss_recovered_all"])
    if worst["site"] is None:
        where = "zeros raise the loss at no site for certain, so that there is none to recover"
    else:
        low, high = (charts.show(end) for end in worst["interval"])
        where = f"{worst['site']}, 95 % interval {low} to {high}"
    facts = [
        Fact(
            "loss recovered, all sites",
            summary["loss_recovered_all"],
            f"all spliced at once; PCA of the same rank {of_pca}",
        ),
        Fact("loss recovered, worst site", worst["loss_recovered"], where),
        Fact("active features", max(summary["l0"].values()), "per position, at most of a site"),
        Fact("dead features", max(summary["dead"].values()), "share, at most of a site"),
        Fact("CPU seconds", summary["seconds"]),
    ]
    return facts, [_recovered(run), _training(run)]


def _recovered(run: Run) -> Section:
    table = run.table("evaluation.parquet")
    absent = run.json("summary.json")["loss_recovered_absent"]
    reasons = "".join(f"\n\n{site}: {reason}." for site, reason in absent.items())
    long = table.unpivot(
        on=["loss recovered", "of PCA"], index="site", variable_name="what", value_name="share"
    ).with_columns(pl.col("what").replace({"loss recovered": "dictionary", "of PCA": "PCA"}))
    return Section(
        "How much of the network do they explain?",
        "Loss recovered is (zero - spliced) / (zero - clean): cross-entropies of the network with "
        "zeros, with what the dictionary rebuilds, and as it is. PCA has as many components as the "
        "dictionary has active features, fitted to the evaluated positions. The interval of 95 % is"
        " over windows; where zeros do not raise the loss for certain, the share is absent."
        + reasons,
        charts=[
            charts.bars(long, "site", "share", colour="what", title="Loss recovered"),
        ],
        tables=[Table(table, "Held-out windows")],
    )


def _training(run: Run) -> Section:
    metrics = run.metrics()
    names = [name for name in metrics.columns if name.startswith("losses/blocks")]
    names = names or [name for name in metrics.columns if name.startswith("losses/")][:12]
    long = (
        metrics.unpivot(on=names, index="step", variable_name="site", value_name="unexplained")
        .drop_nulls()
        .with_columns(pl.col("site").str.replace("losses/", ""))
    )
    return Section(
        "How did training go?",
        "The share of variance that is not explained, on training batches. The last steps train "
        "end to end and are not shown.",
        charts=[
            charts.line(
                long,
                "step",
                "unexplained",
                colour="site",
                y_title="variance not explained",
                title="Training",
            )
        ],
    )
