"""The report of a prompt graph study, built from the saved run alone."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table

_SHOWN_NODES, _SHOWN_EDGES = 60, 120


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    summary, config = run.json("summary.json"), run.json("config.json")["config"]
    words = ", ".join(repr(word) for word in summary["logits"])
    return (
        "The attribution graph of a prompt",
        f"How the transcoder features of {config['target']['path']} lead from the"
        f" {len(summary['tokens'])} tokens of the prompt to the logits of {words}, with attention"
        " patterns, norm scales and the errors of the transcoders held fixed; and how much of that"
        " holds when nodes are taken out of the network itself.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary, chosen = run.json("summary.json"), run.json("config.json")["config"]["graph"]
    scores, counts, kept = summary["scores"], summary["nodes"], summary["kept"]
    shown = f"of {summary['active_features']:,} that are active"
    facts = [
        Fact("replacement score", scores["replacement"], "share of influence that tokens have"),
        Fact("completeness score", scores["completeness"], "share of influence not from errors"),
        Fact("features", counts["features"], shown),
        Fact("nodes kept", kept["nodes"], f"and {kept['edges']:,} edges"),
    ]
    whole = next((row for row in summary["agreement"] if row["kind"] == "all"), None)
    if whole is not None:
        facts.append(
            Fact(
                "graph against network, r",
                whole["pearson"],
                f"slope {charts.show(whole['slope'])}, sign right in {charts.show(whole['sign'])},"
                f" {whole['n']:,} effects",
            )
        )
    found = [_graph(run, chosen)]
    if whole is not None:
        found.append(_held(run, summary))
    return facts, found


def _graph(run: Run, chosen: dict[str, Any]) -> Section:
    nodes, edges = run.table("nodes.parquet"), run.table("edges.parquet")
    depth = int(nodes.filter(pl.col("kind") == "logit")["layer"][0])
    ranked = nodes.sort(pl.col("influence"), descending=True, nulls_last=False)
    drawn = ranked.head(_SHOWN_NODES).select(
        pl.col("node").alias("name"),
        pl.col("position").alias("x"),
        pl.col("layer").alias("y"),
        pl.col("effect").fill_null(0.0).alias("value"),
        "kind",
        "word",
    )
    inside = edges.filter(
        pl.col("source").is_in(drawn["name"].to_list())
        & pl.col("receiver").is_in(drawn["name"].to_list())
    )
    largest = inside.sort(pl.col("score").abs(), descending=True).head(_SHOWN_EDGES)
    text = (
        "An edge is what a source writes times the gradient of its target's value there; it is "
        "exact while attention patterns, norm scales and errors stay and features stay active. The "
        "influence of a node is what reaches it from the logits, each with its probability, when "
        "every target hands its own on to its sources in the shares of |edge|. Nodes are kept that "
        f"carry {chosen['node_threshold']:.0%} of it, the largest first, and edges that carry "
        f"{chosen['edge_threshold']:.0%} of what goes through them. effect is what the graph says "
        "that the likeliest logit loses without the node, exact what it loses in the network."
        f"\n\nIn the picture a node stands at its position and layer, tokens at -1 and logits at "
        f"{depth}; the {_SHOWN_NODES} most influential nodes and the largest edges between them are"
        " drawn. graph.json is for Neuronpedia and circuit-tracer, graph.graphml for graph viewers."
    )
    return Section(
        "The graph",
        text,
        charts=[charts.graph(drawn, largest, tooltip=("name", "kind", "word"), title="The graph")],
        tables=[
            Table(ranked, "Nodes, the most influential first"),
            Table(
                edges.sort(pl.col("score").abs(), descending=True).head(500), "The largest edges"
            ),
        ],
    )


def _held(run: Run, summary: dict[str, Any]) -> Section:
    table = run.table("exact.parquet")
    agreement = pl.DataFrame(summary["agreement"], infer_schema_length=None)
    text = (
        "Each of the most influential nodes was taken out of the network, which then computed its "
        "attention, norms and MLPs again; exact is what a logit, less the mean over the "
        "vocabulary, lost. The estimate follows all ways through the graph. It cannot see that "
        "patterns and norms move, that features switch on or off, and that errors answer to the "
        "change."
    )
    return Section(
        "What holds in the network?",
        text,
        charts=[
            charts.scatter_identity(
                table,
                "exact",
                "estimate",
                colour="kind",
                tooltip=("node", "logit"),
                title="What logits lose without a node",
                x_title="in the network",
                y_title="in the graph",
            )
        ],
        tables=[
            Table(
                agreement.select("kind", "n", "pearson", "spearman", "slope", "sign", "mae"),
                "Agreement by kind of node",
            ),
            Table(table, "Every node that was taken out"),
        ],
    )
