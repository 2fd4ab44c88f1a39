"""The verbs over files of other tools' graphs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import polars as pl

from assay.dictionaries.load import load_dictionaries
from assay.io.files import existing, plain, sha256
from assay.io.runs import Run, require_new, start
from assay.studies import runner
from assay.studies.graph_audit import GraphAudit, audit_graph
from assay.studies.graph_audit.page import page
from assay.studies.recipes import AUDIT
from assay.targets.load import load, pairs

SHOWN = 20
_FLAGS = ("target", "dictionaries", "pairs", "top", "exact", "within", "alpha", "seed")


def audit_file(
    path: Path | str,
    model: str,
    *,
    dictionaries: Path | str | None = None,
    reads: str | None = None,
    writes: str | None = None,
    prompts: Path | str | None = None,
    metric: str = "logit_difference",
    out: Path | str | None = None,
    rows: int | None = SHOWN,
    **options: Any,
) -> dict[str, Any]:
    """Audit a graph file on a model, see `audit_graph`; with `out`, save tables and a report there.

    Returns the summary with the first `rows` nodes and edges (None: all)."""
    existing(path)
    if out is not None:
        require_new(out)
    known = (
        None
        if dictionaries is None
        else load_dictionaries(dictionaries, reads=reads, writes=writes)
    )
    target = load(model, metric)
    batches = None if prompts is None else pairs(target, prompts)
    found = audit_graph(path, target, known, batches, **options)
    if out is not None:
        files = {"target": model, "dictionaries": dictionaries, "pairs": prompts}
        _save(out, found, path, files | options)
    shown = [
        claims.table if rows is None else _short(claims.table).head(rows)
        for claims in (found.nodes, found.edges)
    ]
    return {
        **found.summary(),
        **({} if out is None else {"report": str(Path(out) / "report.html")}),
        "nodes": shown[0].to_dicts(),
        "edges": shown[1].to_dicts(),
    }


def _short(table: pl.DataFrame) -> pl.DataFrame:
    """Leave out columns that say nothing in any row."""
    empty = [name for name in table.columns if table[name].null_count() == table.height]
    texts = [name for name, kind in table.schema.items() if kind == pl.String]
    empty += [name for name in texts if (table[name].fill_null("") == "").all()]
    return table.drop(dict.fromkeys(empty))


def _save(
    out: Path | str,
    found: GraphAudit,
    path: Path | str,
    given: dict[str, Any],
) -> None:
    config = {AUDIT: str(path), "sha256": sha256(Path(path)), **plain(given)}
    with start(out, config) as run:
        run.save_table("nodes.parquet", found.nodes.table)
        run.save_table("edges.parquet", found.edges.table)
        run.save_json("summary.json", found.summary())
        report(run)


def report(run: Run) -> Path:
    """Build `report.html` of an audit's folder from what it holds."""
    with runner.readable(run):
        config = run.json("config.json")
        words = ["assay", "audit", config[AUDIT]]
        for key in _FLAGS:
            if config.get(key) is not None:
                words += [f"--{key}", str(config[key])]
        again = shlex.join([*words, "-o", "NEW_FOLDER"])
        html = page(
            run.json("summary.json"),
            run.table("nodes.parquet"),
            run.table("edges.parquet"),
            [runner.provenance(run, again)],
        )
    return run.save_text("report.html", html)
