"""The part of the features report that is about error nodes."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Section, Table

_PLURAL = {"residual": "residual stream", "mlp": "MLPs", "attention": "attention"}


def error_sections(run: Run, summary: dict[str, Any]) -> list[Section]:
    """Return the sections of the error-node study."""
    return [
        _sizes(run),
        _drivers(summary),
        _bars(summary),
        _missed(run, summary),
        _restored(run),
    ]


def _sizes(run: Run) -> Section:
    parts = run.table("parts.parquet").with_columns(pl.col("atp").abs().alias("|AtP|"))
    pictures = []
    for kind in _PLURAL:
        some = parts.filter((pl.col("part") == "error") & (pl.col("kind") == kind))
        pictures += _pair(some, f"error nodes, {_PLURAL[kind]}")
    whole = run.table("whole.parquet")
    if whole.height:
        whole = whole.with_columns(pl.col("atp").abs().alias("|AtP|"))
        pictures += _pair(whole, "the whole residual stream")
    columns = ("group", "position", "norm", "gradient_norm", "cosine", "cosine_of_means", "atp")
    nodes = run.table("nodes.parquet").sort("size", descending=True)
    return Section(
        "Size, gradient and angle of error nodes",
        "An error node's attribution patching score is the product of three numbers: the norm of"
        " its difference between the patch and the clean run, the norm of the metric's gradient"
        " there, and the cosine between them. Each point is one error node of one pair, and below"
        " them the same for whole values of the residual stream. The table averages over pairs:"
        " cosine is the mean of cosines, cosine_of_means the mean score over the product of"
        " mean norms, as earlier work took it.",
        charts=pictures,
        tables=[Table(nodes.select(columns), "Error nodes, means over pairs")],
    )


def _pair(table: pl.DataFrame, words: str) -> list[Any]:
    if not table.filter((pl.col("norm") > 0) & (pl.col("gradient_norm") > 0)).height:
        return []
    tooltip = ["group", "position", "example"]
    return [
        charts.scatter(
            table,
            "norm",
            "gradient_norm",
            colour="|AtP|",
            tooltip=tooltip,
            log_x=True,
            log_y=True,
            title=f"Norm against gradient: {words}",
            x_title="norm of the difference",
            y_title="norm of the gradient",
        ),
        charts.scatter(
            table,
            "norm",
            "cosine",
            colour="|AtP|",
            tooltip=tooltip,
            log_x=True,
            title=f"Norm against cosine: {words}",
            x_title="norm of the difference",
        ),
    ]


def _drivers(summary: dict[str, Any]) -> Section:
    found = {**summary["drivers"], **summary["whole_residual"]}
    shares = [
        {"part": part, **{_words(key): value for key, value in row.items()}}
        for part, entry in found.items()
        for row in entry["shares"]
    ]
    ranks = [
        {"part": part, **{_words(key): value for key, value in row.items()}}
        for part, entry in found.items()
        for row in entry["rank_with_layer"]
    ]
    shapes = [
        {
            "part": part,
            "kind": kind,
            "verdict": shape["verdict"],
            "slope below": shape["below"][0],
            "slope above": shape["above"][0],
            "break at norm": shape["break_at"],
            "n": shape["n"],
        }
        for part, entry in found.items()
        for kind, shape in entry["shape"].items()
        if shape is not None
    ]
    attention = [
        {"part": part, **{_words(key): value for key, value in row.items()}}
        for part, entry in found.items()
        for row in entry["attention_beside_others"]
    ]
    words = [
        (shares, "Shares of the variance of log |AtP|"),
        (ranks, "Spearman correlation with the layer, of single examples"),
        (shapes, "Peaked or monotone: slopes of log |AtP| in log norm, below and above a break"),
        (attention, "Attention beside the other kinds of its layer, ratios of geometric means"),
    ]
    return Section(
        "What drives the scores",
        "log |AtP| = log norm + log gradient norm + log |cosine|, and a term's share of its"
        " variance is its covariance with the sum over the variance of the sum. Peaked means that"
        " |AtP| rises with the norm up to a break and falls behind it: two lines, the break chosen"
        " on the pairs of even number and the slopes, with bootstrap intervals over pairs, from the"
        " others.",
        tables=[
            Table(pl.DataFrame(rows, infer_schema_length=None), title)
            for rows, title in words
            if rows
        ],
    )


def _bars(summary: dict[str, Any]) -> Section:
    pictures, rows = [], []
    for kind, found in summary["error_bars"].items():
        listed = pl.DataFrame(found["listed"], infer_schema_length=None).drop_nulls(["low", "high"])
        if listed.height:
            pictures.append(
                charts.intervals(
                    listed,
                    "part",
                    "effect",
                    "low",
                    "high",
                    title=f"Largest error nodes, {_PLURAL[kind]}: mean exact effect",
                )
            )
        rows += [
            {
                "kind": kind,
                "selection": name,
                "covered": entry["share"],
                "low": entry["low"],
                "high": entry["high"],
                "n": entry["n"],
                "mean width": entry["mean_width"],
            }
            for name, entry in found["promises"].items()
        ]
    if not rows:
        return Section("Bars of error nodes", "Nothing is left to errors by these dictionaries.")
    return Section(
        "Bars of error nodes",
        "Bars around attribution patching of the error nodes of each kind alone, calibrated on half"
        " of the pairs and measured on a quarter that neither chose the lists nor calibrated. "
        + " ".join(
            f"{kind}: {found['guarantee']}." for kind, found in summary["error_bars"].items()
        ),
        charts=pictures,
        tables=[
            Table(
                pl.DataFrame(rows, infer_schema_length=None),
                "Share of bars that contain the exact effect, with 95 % intervals",
            )
        ],
    )


def _missed(run: Run, summary: dict[str, Any]) -> Section:
    hidden, counts = run.table("missed.parquet"), summary["missed"]
    said = "; ".join(
        f"{part}s: {counts[part]['missed']:,} of the {counts[part]['above_threshold']:,} effects"
        " above it"
        for part in ("feature", "error")
    )
    rows = [
        {"part": part, "reason": reason, "effects": count}
        for part in ("feature", "error")
        for reason, count in counts[part]["reasons"].items()
    ]
    tables = [Table(pl.DataFrame(rows), "Why they are missed")] if rows else []
    if hidden.height:
        columns = (
            "group",
            "position",
            "example",
            "exact",
            "atp",
            "norm",
            "gradient_norm",
            "cosine",
            "reason",
        )
        tables.append(Table(hidden.select(columns), "The largest effects that are missed"))
    return Section(
        "What a threshold misses",
        "Circuits keep the nodes whose |AtP| is above a threshold. At"
        f" {charts.show(counts['threshold'])} it misses {said}. A small norm, a small gradient or a"
        " right angle hides them; ranks are those among all parts whose exact effect is known.",
        tables=tables,
    )


def _restored(run: Run) -> Section:
    table = run.table("restored.parquet")
    if not table.height:
        return Section("Ablation and restoration", "There is one layer, and none later to restore.")
    drawn = table.drop_nulls("recovered").with_columns(
        pl.format("layers 0 to {}", pl.col("ablated to layer")).alias("ablated")
    )
    return Section(
        "Ablation and restoration",
        "Error nodes of the first layers were set to their reference at the last position, and the"
        " features of later layers with the largest |AtP| put back to what they are in the clean"
        " run. The share recovered is (restored - ablated) / (clean - ablated), of means over"
        " pairs, with a 95 % interval over pairs. Where the change by the ablation is not clear of"
        " zero there is no share.",
        charts=[]
        if not drawn.height
        else [
            charts.line(
                drawn,
                "features restored",
                "recovered",
                low="low",
                high="high",
                colour="ablated",
                title="How much of the metric comes back",
                reference=1.0,
            )
        ],
        tables=[Table(table, "Means over pairs")],
    )


def _words(key: str) -> str:
    return key.replace("_", " ")
