"""The report of an attribution study, built from the saved run alone."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table

_NAMES = {
    "gradient": "attribution patching",
    "ig": "integrated gradients",
    "atp-star": "AtP*",
    "relp": "RelP",
    "probes": "second order by probes",
}


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    summary, config = run.json("summary.json"), run.json("config.json")["config"]
    name = config["target"]["path"] or "a small model trained on subject-verb agreement"
    return (
        "Attribution on a language model",
        f"Which heads, MLPs and positions of {name} ({summary['model']['family']}) carry the metric {config['metric']}? Every node was scored "
        f"by {len(summary['methods'])} cheap methods on {summary['pairs']['kept']} pairs of prompts, and a random part of the nodes patched exactly, so that the "
        "scores come with an error.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary = run.json("summary.json")
    ig, gradient = summary["methods"]["ig"], summary["methods"]["gradient"]
    facts = [
        Fact(
            "integrated gradients, r",
            ig["agreement"]["pearson"],
            f"slope {_number(ig['agreement']['slope'])}, against exact patching",
        ),
        Fact(
            "attribution patching, r",
            gradient["agreement"]["pearson"],
            f"slope {_number(gradient['agreement']['slope'])}",
        ),
        Fact(
            "bars that contain the exact effect",
            ig["bars"]["coverage"],
            f"{1 - ig['bars']['alpha']:.0%} nominal; mean width {_number(ig['bars']['mean_width'])}",
        ),
        Fact(
            "pairs",
            summary["pairs"]["kept"],
            f"{sum(summary['pairs']['dropped'].values())} dropped",
        ),
    ]
    parts = [
        _heat(run),
        _agreement(run, summary),
        _bars(run, summary),
        _circuit(run, summary),
        _tables(run, summary),
    ]
    return facts, parts


def _heat(run: Run) -> Section:
    table = run.table("heat.parquet")
    picture = charts.heatmap(
        table,
        "position",
        "site",
        "score",
        tooltip=["bar", "exact", "sampled"],
        title="Where the patch acts: effect of patching each site at each position",
        value_title="indirect effect",
    )
    text = (
        "The indirect effect m(clean, with the node from the patch run) - m(clean), by integrated gradients, averaged over the pairs; heads of a "
        "layer are added up. Positive pulls towards the patch answer. Each cell's tooltip has the half-width of its error bar (heads' bars added up)."
    )
    return Section("Where it happens", text, charts=[picture])


def _agreement(run: Run, summary: dict[str, Any]) -> Section:
    pictures = [
        charts.scatter_identity(
            run.table(f"audit-{name}.parquet"),
            "exact",
            "estimate",
            colour="kind",
            tooltip=["part", "example"],
            title=f"{title[:1].upper()}{title[1:]} against exact patching",
        )
        for name, title in _NAMES.items()
        if name in summary["methods"]
    ]
    rows = [
        {
            "method": _NAMES[name],
            "kind": kind,
            **{key: found[key] for key in ("pearson", "spearman", "slope", "sign", "mae", "n")},
        }
        for name, method in summary["methods"].items()
        for kind, found in [("pooled", method["agreement"]), *method["by_kind"].items()]
    ]
    text = (
        "Each point is one node of one pair: what the cheap score says (up) against what patching it exactly does (across). Correlation says "
        "nothing of scale, so the slope is beside it; a slope below one means that effects are under-estimated."
    )
    return Section(
        "Is the score right?",
        text,
        charts=pictures,
        tables=[Table(pl.DataFrame(rows), "Agreement by kind of node")],
    )


def _bars(run: Run, summary: dict[str, Any]) -> Section:
    top = run.table("top.parquet").with_columns(
        (pl.col("score") - pl.col("bar")).alias("low"),
        (pl.col("score") + pl.col("bar")).alias("high"),
    )
    top = top.filter(pl.col("bar").is_finite())
    bars = summary["methods"]["ig"]["bars"]
    text = f"{bars['guarantee'][:1].upper()}{bars['guarantee'][1:]}."
    if bars["coverage"] is not None:
        text += (
            f" On {bars['held_out']:,} held-out rows the bars cover {bars['coverage']:.1%} at a mean width of {_number(bars['mean_width'])}; a "
            f"constant bar around attribution patching needs {_number(bars['constant_first_order_width'])}."
        )
    pictures = (
        [
            charts.intervals(
                top,
                "part",
                "score",
                "low",
                "high",
                title="The largest nodes, with the mean of their error bars",
            )
        ]
        if top.height
        else []
    )
    recall = summary["top_recall"]
    if recall is not None and recall["estimate"] is not None:
        text += (
            f" Of the nodes whose exact effect is as large as the {recall['k']}th score of their pair, {recall['estimate']:.0%} are among the "
            f"{recall['k']} largest scores ({recall['low']:.0%} to {recall['high']:.0%} at {1 - recall['alpha']:.0%} confidence)."
        )
    if summary["fixed"] is not None:
        fixed = summary["fixed"]
        text += (
            f" {fixed['patches']:,} further exact patches went to the most doubtful of the nodes that could be among the largest; "
            f"{fixed['share_exact']:.0%} of all values are then exact."
        )
    sums = pl.DataFrame(
        [
            {"site": name, **{key: entry[key] for key in ("estimate", "low", "high")}}
            for name, entry in summary["totals"].items()
        ]
    )
    tables = (
        [Table(sums, "Sum of all single effects, mean over pairs, with intervals")]
        if sums.height
        else []
    )
    return Section("Error bars", text, charts=pictures, tables=tables)


def _circuit(run: Run, summary: dict[str, Any]) -> Section:
    table, found = run.table("faithfulness.parquet"), summary["circuit"]
    if not table.height:
        return Section(
            "The circuit", "No heads or MLPs among the sites: there is no circuit to keep."
        )
    long = table.unpivot(
        index="share",
        on=["faithfulness", "completeness"],
        variable_name="measure",
        value_name="value",
    )
    picture = charts.line(
        long,
        "share",
        "value",
        colour="measure",
        reference=1.0,
        title="How many nodes carry the metric",
        x_title="share of nodes kept (or, for completeness, removed)",
        y_title="share of the effect",
    )
    text = (
        f"With {found['kept_share']:.0%} of the nodes kept on each pair, some combination of the others still moves the metric against the right answer by "
        f"{_number(found['worst_damage_at_least'])} on average (found in {found['worst_evaluations']} runs: a lower bound of the worst case). "
        f"Swapping the kept nodes between pairs of the same case, and all others between any pairs, keeps {_number(found['scrubbed_share_kept'])} of "
        "the metric (causal scrubbing)."
    )
    tables = []
    if run.has("edges.parquet"):
        largest = (
            run.table("edges.parquet")
            .sort(pl.col("score").abs(), descending=True)
            .head(20)
            .select("edge", "score", "sd", "n")
        )
        tables.append(
            Table(
                largest,
                f"Largest edges ({summary['edges']['method']}); circuit.json and circuit.graphml hold the circuit",
            )
        )
    return Section("The circuit, and its worst case", text, charts=[picture], tables=tables)


def _tables(run: Run, summary: dict[str, Any]) -> Section:
    gaps = pl.DataFrame(
        [{"site": name, "gap": gap} for name, gap in summary["completeness_gaps"].items()]
    )
    tables = [
        Table(run.table("top.parquet").drop("group", "index", "n", "size"), "Largest nodes"),
        Table(gaps, "Completeness gaps"),
    ]
    if summary["pairs"]["dropped"]:
        dropped = pl.DataFrame(
            [
                {"reason": reason, "pairs": count}
                for reason, count in summary["pairs"]["dropped"].items()
            ]
        )
        tables.append(Table(dropped, "Dropped pairs"))
    text = f"Scores are F(clean) - F(node patched), the negative of the indirect effect. Exact patching here: {summary['patching']}."
    return Section("The numbers", text, tables=tables)


def _number(value: float | None) -> str:
    return charts.show(value)
