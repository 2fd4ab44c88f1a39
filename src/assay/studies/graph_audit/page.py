"""The report of a graph's audit, from what its folder holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from assay import charts
from assay.report.page import Fact, Section, Table, render

_ROWS, _DRAWN = 200, 25
_HEAD = re.compile(r"a(\d+)\.h(\d+)|m(\d+)")


def page(
    summary: Mapping[str, Any], nodes: pl.DataFrame, edges: pl.DataFrame, more: Sequence[Section]
) -> str:
    """Return the report as one HTML text; `more` sections come last."""
    facts = [
        Fact(
            f"top {what} that hold",
            f"{counts['hold']} of {counts['listed']}",
            f"{counts['right_sign']} have the right sign, {counts['survive']} survive",
        )
        for what, counts in (("nodes", summary["of_nodes"]), ("edges", summary["of_edges"]))
    ]
    stated = summary.get("activations_compared")
    if stated:
        same = stated - summary["activations_that_differ"]
        note = (
            f"largest difference {summary['largest_activation_difference']:.2g} of what is stated"
        )
        facts.append(Fact("activations as stated", f"{same} of {stated}", note))
    if (kept := summary.get("faithfulness")) is not None:
        facts.append(Fact("faithfulness", kept, "the share of the metric that the circuit keeps"))
    lead = (
        f"The graph {summary['graph']}, of {summary['kind']}. Effects are of {summary['output']}."
        " An exact effect of a node is what is lost when what it writes is removed and everything"
        " behind it runs again; that of an edge is what its receiver loses along the direct way."
    )
    if summary.get("differences"):
        lead += f"\n\nThe graph's own numbers differ from the model's: {summary['differences']}."
    sections = [
        _whole(summary, nodes, edges),
        _section("Nodes", nodes, "node", summary["of_nodes"]),
        _section("Edges", edges, "edge", summary["of_edges"]),
    ]
    return render("Audit of a graph", lead, facts, [*sections, *more])


def _whole(summary: Mapping[str, Any], nodes: pl.DataFrame, edges: pl.DataFrame) -> Section:
    rows = []
    for what, counts in (("nodes", summary["of_nodes"]), ("edges", summary["of_edges"])):
        sign, hold, listed = (counts[key] for key in ("right_sign", "hold", "listed"))
        rows += [
            {"verdict": "holds", "of": what, "count": hold},
            {"verdict": "right sign alone", "of": what, "count": sign - hold},
            {"verdict": "wrong sign", "of": what, "count": listed - sign},
            {"verdict": "survives", "of": what, "count": counts["survive"]},
        ]
    counts = summary["of_nodes"]
    text = (
        f"{summary['verdict_nodes']}.\n\n{summary['verdict_edges']}.\n\nA claim holds when it has"
        f" the right sign and lies within {counts['within']:.0%} of the exact effect. A node or an"
        f" edge survives when its exact effect is at least {counts['threshold']:.0%} of the"
        " largest. The picture shows the listed ones that survive, with their exact effects: blue"
        " is positive, orange negative."
    )
    over_heads = "layer" not in nodes.columns
    if not over_heads:
        text += " Tokens stand at layer -1, logits behind the last layer."
    drawn = [
        charts.bars(
            pl.DataFrame(rows),
            "verdict",
            "count",
            colour="of",
            title="The listed nodes and edges by verdict",
            horizontal=False,
        )
    ]
    spots, lines = survivors(nodes, edges, counts["top"])
    if spots.height:
        drawn.append(
            charts.graph(
                spots,
                lines,
                title="What survives",
                x_title="head (MLPs at -1)" if over_heads else "position",
            )
        )
    return Section("What holds?", text, charts=drawn)


def survivors(
    nodes: pl.DataFrame, edges: pl.DataFrame, top: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the nodes to draw (name, x, y, value) and the edges between them (source, receiver,
    score): those of the first `top` rows that survive, and the ends of these edges.
    """
    alive = pl.col("survives").fill_null(False)
    bare = pl.col("receiver").str.replace(r"<[qkv]>$", "")
    lines = edges.head(top).filter(alive)
    lines = lines.select("source", bare, pl.col("exact").alias("score"))
    kept = nodes.head(top).filter(alive)["node"].to_list()
    wanted = dict.fromkeys([*kept, *lines["source"], *lines["receiver"]])
    known = {row["node"]: row for row in nodes.iter_rows(named=True) if row["node"] in wanted}
    places = {name: _place(name, known.get(name)) for name in wanted}
    # Outputs are no rows of the table: they stand behind everything, at the last position.
    whole = [_place(row["node"], row) for row in nodes.iter_rows(named=True)]
    depth = max((place[1] for place in whole if place is not None), default=0.0) + 1
    last = float(nodes["position"].max()) if "position" in nodes.columns else 0.0  # type: ignore[arg-type]
    rows = []
    for name in wanted:
        x, y = places[name] or (last, depth)
        exact = known[name]["exact"] if name in known else None
        rows.append({"name": name, "x": x, "y": y, "value": exact or 0.0})
    kinds = {"name": pl.String, "x": pl.Float64, "y": pl.Float64, "value": pl.Float64}
    return pl.DataFrame(rows, schema=kinds), lines


def _place(name: str, row: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """Return where a node stands: its position and layer, or its head and layer."""
    if row is not None and "layer" in row:
        return float(row["position"]), float(row["layer"]) if row["layer"].isdecimal() else -1.0
    if name == "input":
        return 0.0, -1.0
    match = _HEAD.fullmatch(name)
    if match is None:
        return None
    return (float(match[2]), float(match[1])) if match[1] else (-1.0, float(match[3]) + 0.5)


def _section(title: str, table: pl.DataFrame, name: str, counts: Mapping[str, Any]) -> Section:
    if name == "edge":
        both = pl.concat_str("source", "receiver", separator=" -> ")
        table = table.with_columns(both.alias("edge"))
    verdict = (
        pl.when(pl.col("holds"))
        .then(pl.lit("holds"))
        .when(pl.col("right_sign"))
        .then(pl.lit("right sign alone"))
        .otherwise(pl.lit("wrong sign"))
    )
    low, high = pl.col("claimed") - pl.col("bar"), pl.col("claimed") + pl.col("bar")
    table = table.with_columns(low.alias("low"), high.alias("high"))
    known = table.filter(pl.col("exact").is_not_null()).with_columns(verdict.alias("verdict"))
    unknown = table.filter(pl.col("exact").is_null() & pl.col("bar").is_not_null())
    pictures: list[Any] = [
        charts.scatter_identity(
            known,
            "exact",
            "claimed",
            colour="verdict",
            tooltip=(name,),
            title=f"{title}: claims against exact effects",
            x_title="exact effect",
            y_title="claim of the graph",
        ),
        charts.intervals(
            known.head(_DRAWN),
            name,
            "claimed",
            "low",
            "high",
            truth="exact",
            title=f"The first {min(_DRAWN, known.height)}: claims, and exact effects as diamonds",
            x_title="effect",
        ),
    ]
    text = f"{counts['measured']:,} of {counts['of']:,} were measured exactly."
    if unknown.height:
        pictures.append(
            charts.intervals(
                unknown.head(_DRAWN),
                name,
                "claimed",
                "low",
                "high",
                title=f"The first {min(_DRAWN, unknown.height)} that were not measured",
                x_title="claim with its bar",
            )
        )
        text += (
            " The others have a bar around their claim, from the errors of a random sample of those"
            " that are not listed."
        )
    shown = table.drop("low", "high", *(["edge"] if name == "edge" else [])).head(_ROWS)
    caption = f"The first {shown.height:,} of {table.height:,}"
    return Section(title, text, charts=pictures, tables=[Table(shown, caption)])
