"""The report of a max-of-K study, built from the saved run alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table

_SHOWN = 40  # tokens along each side of a heat map at most


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    summary, config = run.json("summary.json"), run.json("config.json")["config"]
    source = config["model"]["path"] or "a network trained here"
    return (
        "How much does understanding prove?",
        f"A one-layer attention-only transformer ({source}) names the largest of "
        f"{summary['positions']} tokens out of {summary['vocabulary']}. Each strategy turns some "
        "understanding of its mechanism into a lower bound of its accuracy over all "
        f"{summary['total']:.4g} inputs, without running it on them. The bounds are proved, not "
        "estimated, and an independent checker has confirmed the certificates from the weights "
        "alone.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary = run.json("summary.json")
    certified = summary["certified"]
    facts = [
        Fact(
            "certified accuracy",
            certified["bound"],
            f"strategy {certified['strategy']}, {summary['level']} arithmetic, checked",
        ),
        Fact(*_truth(summary)),
        Fact(
            "estimated accuracy",
            summary["estimate"],
            "a heuristic estimate, not a bound: the smaller tokens as independent noise",
        ),
        Fact("certified sequences", certified["count"], f"of {summary['total']:,}"),
    ]
    if summary["executed"] is not None:
        facts.append(
            Fact("certified as executed", summary["executed"], "in float32, any order of summation")
        )
    if summary["cross_entropy"] is not None:
        facts.append(
            Fact(
                "cross-entropy at most",
                summary["cross_entropy"]["bound"],
                "mean over all inputs, in nats; proved and checked",
            )
        )
    return facts, [
        _bounds(run),
        _parts(run),
        _circuits(run),
        _shares(run),
        _measures(run),
        *_training(run),
    ]


def _truth(summary: dict[str, Any]) -> tuple[str, Any, str]:
    if summary["accuracy"] is not None:
        return "true accuracy", summary["accuracy"], "brute force over every input"
    return (
        "sampled accuracy",
        summary["sampled_accuracy"],
        "an estimate: the inputs are too many to run",
    )


def _bounds(run: Run) -> Section:
    table = (
        run.table("proofs.parquet")
        .drop_nulls("operations")
        .filter(pl.col("bound") >= 0.5 * pl.col("bound").max())
    )
    picture = charts.tradeoff(
        table,
        "operations",
        "bound",
        colour="unexplained dimensions",
        label="strategy",
        tooltip=["CPU seconds"],
        title="Better bounds cost more operations, cheaper ones explain more",
    )
    return Section(
        "Bound against cost",
        "Each point is a strategy: the share of all inputs that it proves right (up) against the "
        "operations that verifying the proof takes (across). The colour says how many numbers of "
        "the network the proof treats as a black box: brute force explains nothing, low-rank "
        "strategies explain most. What proves less than half of the best bound is in the table "
        "alone.",
        charts=[picture],
        tables=[
            Table(run.table("proofs.parquet").sort("bound", descending=True), "Every strategy")
        ],
    )


def _parts(run: Run) -> Section:
    table = run.table("proofs.parquet").filter(
        pl.col("strategy").str.starts_with("worst_") | (pl.col("strategy") == "box_exact")
    )
    if table.height < 2:
        return Section("What each part buys", "No strategy with an unknown part was asked for.")
    table = table.sort("bound", descending=True).with_columns(
        pl.col("strategy")
        .str.replace("worst_", "without ")
        .str.replace("box_exact", "everything understood")
        .str.replace_all("_", " "),
        (1 - pl.col("bound")).alias("not proved"),
    )
    picture = charts.bars(
        table, "strategy", "not proved", y_title="share of inputs not proved right", horizontal=True
    )
    return Section(
        "What each part buys",
        "One part of the network is replaced by the worst value that it takes anywhere. What the "
        "bound loses against full understanding is what knowing that part is worth.",
        charts=[picture],
    )


def _circuits(run: Run) -> Section:
    found = {name: tensor.numpy() for name, tensor in run.tensors("circuits.safetensors").items()}
    pictures = [
        _heat(
            found["qk"], "query token", "key token", "Attention scores (QK), position-independent"
        ),
        _heat(
            found["qk_position"], "query token", "position", "Attention scores (QK), by position"
        ),
        _heat(
            found["ov"],
            "attended token",
            "logit of",
            "What the head writes (OV), position-independent",
        ),
        _heat(
            found["ov_position"], "position", "logit of", "What the head writes (OV), by position"
        ),
        _heat(found["direct"], "query token", "logit of", "Direct path"),
    ]
    step = max(1, -(-len(found["qk"]) // _SHOWN))
    shown = "" if step == 1 else f" One token in {step} is shown."
    return Section(
        "The circuits",
        "The network attends to larger tokens (QK), and copies what it attends to (OV): a ramp "
        "along keys and a bright diagonal. Rows of QK are centred, since attention does not see "
        f"what all keys share.{shown}",
        charts=pictures,
    )


def _heat(values: np.ndarray, row: str, column: str, title: str) -> Any:
    rows, columns = (np.arange(0, size, max(1, -(-size // _SHOWN))) for size in values.shape)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    frame = pl.DataFrame(
        {row: y.ravel(), column: x.ravel(), "value": values[np.ix_(rows, columns)].ravel().round(3)}
    )
    return charts.heatmap(frame, column, row, "value", title=title)


def _shares(run: Run) -> Section:
    table = run.table("shares.parquet")
    return Section(
        "Where the margin comes from",
        "The mean lead of the right logit over the strongest other one on random inputs, split "
        "into the paths that add up to it.",
        charts=[
            charts.bars(table, "path", "margin", y_title="mean margin (logits)", horizontal=True)
        ],
    )


def _measures(run: Run) -> Section:
    return Section(
        "Other measures",
        "The same proof (exact boxes) weighed over some of the inputs: the certified share of "
        "each kind that is answered right.",
        tables=[Table(run.table("measures.parquet"), "Accuracy on predicates of the input")],
    )


def _training(run: Run) -> list[Section]:
    metrics = run.metrics()
    if not metrics.width:
        return []
    return [Section("Training", charts=[charts.training_curves(metrics)])]
