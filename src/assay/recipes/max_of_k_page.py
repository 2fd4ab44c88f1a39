"""The report of a max-of-K study, built from the saved run alone."""

from __future__ import annotations

import polars as pl
import torch

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    target = run.json("config.json")["config"]["target"]
    total = run.json("summary.json")["total"]
    return (
        "What understanding proves: a max-of-K transformer",
        f"A one-layer attention-only transformer returns the largest of its input tokens. How much of its accuracy over all {total:,} inputs can be "
        f"proved from its weights, at what cost, and how much of the network does each proof leave unexplained? "
        + (
            f"The weights come from {target['weights']}."
            if target["weights"]
            else f"It was trained with seed {run.json('config.json')['config']['seed']}."
        ),
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary, table = run.json("summary.json"), run.table("proofs.parquet")
    short = table.filter(pl.col("strategy") != "brute_force")
    best = (short if short.height else table).sort("bound", descending=True).row(0, named=True)
    verdict = summary.get("check")
    facts = [
        Fact("proved accuracy", best["bound"], f"{best['strategy']}, level {summary['level']}"),
        Fact("of the true accuracy", best["normalised"] if best["normalised"] is not None else "unknown", "brute force is the truth"),
        Fact(
            "certificate",
            "accepted" if verdict and verdict["accepted"] else "none",
            "by the independent checker" if verdict else "float64 proves nothing",
        ),
    ]
    return facts, [_tradeoff(run, table), _circuits(run), _margin(summary["margin_shares"])]


def _tradeoff(run: Run, table: pl.DataFrame) -> Section:
    counted = table.filter(pl.col("operations").is_not_null())
    text = (
        "Each point is a proof: a lower bound of the accuracy over all inputs, against the operations its verifier needs. A proof that understands more "
        "of the mechanism leaves fewer dimensions unexplained and costs less, but proves less. No proof trusts the search that found its advice."
    )
    verdict = run.json("summary.json").get("check")
    if verdict:
        text += f"\n\nThe independent checker recomputed the certificate's claim: {verdict['reason']}."
    picture = charts.tradeoff(
        counted, "operations", "bound", colour="unexplained", label="strategy", title="What each proof costs and gives"
    )
    shown = table.sort("bound", descending=True).select("strategy", "bound", "normalised", "operations", "unexplained", "seconds")
    return Section("Proofs", text, charts=[picture], tables=[Table(shown, "Every strategy (seconds of CPU, search included)")])


def _circuits(run: Run) -> Section:
    found = run.tensors("circuits.safetensors")
    pictures = [
        _matrix(found["qk"], "query token", "key token", "Query-key circuit: larger tokens draw more attention"),
        _matrix(found["ov"], "token attended to", "output token", "Output-value circuit: attended tokens raise their own logit"),
        _matrix(found["direct"], "query token", "output token", "Direct path: what is left of the query token"),
        _matrix(found["qk_position"], "query token", "position", "Positional part of the query-key circuit"),
    ]
    text = "The three circuits in logits, split into what depends on tokens alone and what depends on positions. Large vocabularies are shown by every few tokens."
    return Section("The circuits", text, charts=pictures)


def _matrix(matrix: torch.Tensor, rows: str, columns: str, title: str) -> object:
    strides = [max(1, -(-size // 32)) for size in matrix.shape]
    small = matrix[:: strides[0], :: strides[1]]
    frame = pl.DataFrame(
        {
            "row": torch.arange(small.shape[0]).mul(strides[0]).repeat_interleave(small.shape[1]).tolist(),
            "column": torch.arange(small.shape[1]).mul(strides[1]).repeat(small.shape[0]).tolist(),
            "value": small.flatten().tolist(),
        }
    )
    return charts.heatmap(frame, "column", "row", "value", title=title, x_title=columns, y_title=rows, value_title="logits")


def _margin(shares: dict[str, float]) -> Section:
    frame = pl.DataFrame({"path": list(shares), "share": list(shares.values())})
    picture = charts.bars(
        frame, "path", "share", title="What each path adds to the margin of the right answer", y_title="mean part of the margin (logits)"
    )
    return Section(
        "Where the margin comes from",
        "Estimated on random sequences; the parts add up to the mean margin over the strongest competitor.",
        charts=[picture],
    )
