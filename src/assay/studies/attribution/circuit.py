"""The circuit that the scores suggest: how many nodes carry the metric, what the others can still
do, and the edges between them.
"""

from __future__ import annotations

from typing import Any

import polars as pl
import torch

from assay.attribution import Exact, Gradient, attribute
from assay.audit import areas, curve, keep_top, scrub, worst_case
from assay.core.mechanisms import Mechanisms
from assay.core.target import Batch, Target
from assay.edges import edges
from assay.errors import InputError
from assay.io.circuits import write_circuit, write_graphml
from assay.io.prompts import Pairs
from assay.io.runs import Run
from assay.studies.attribution.config import Config

SHARES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def circuit(
    bound: Mechanisms | None, method: dict[str, Any], config: Config, pairs: Pairs
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Return the faithfulness of the largest nodes by exact effects (or by the gradient, where
    exact effects are not what is shown), the worst that the others can do, and how much of the
    metric scrubbing keeps; with a table of faithfulness by share.
    """
    if bound is None:
        return {}, pl.DataFrame({"share": [], "faithfulness": []})
    scores = attribute(bound, Exact() if method["taken"] == "exact" else Gradient())
    table = curve(scores, SHARES, per_example=True)
    keep = keep_top(scores, config.audit.kept, per_example=True)
    worst = worst_case(bound, keep, steps=8, restarts=2)
    labels = sorted(set(pairs.cases))
    classes = torch.tensor([labels.index(case) for case in pairs.cases])
    kept = scrub(bound, keep, classes, draws=4, seed=config.seed)
    flat = bool(table["faithfulness"].is_nan().any())
    return {
        **areas(table),
        "faithfulness_reason": "ablating every node leaves the mean metric as it is"
        if flat
        else "",
        "kept_share": config.audit.kept,
        "worst_damage_at_least": float(worst.damage.mean()),
        "worst_evaluations": worst.evaluations,
        "scrubbed_share_kept": kept.share,
        "scrubbed_error": kept.error,
        "scrubbed_reason": kept.reason,
        "alone_in_their_case": kept.alone,
    }, table


def save_edges(
    config: Config, target: Target, clean: Batch, patch: Batch, run: Run
) -> dict[str, Any]:
    """Score the edges between heads and MLPs and save the largest as circuit files, where the
    model's wiring is known.
    """
    if config.reference != "counterfactual":
        return {"not_available": "edges are scored against the patch run only"}
    try:
        found = edges(target, clean, patch)
    except InputError as error:
        return {"not_available": str(error)}
    chosen = found.to_circuit(found.keep_top(config.audit.kept))
    run.write("circuit.json", lambda new: write_circuit(new, chosen))
    run.write("circuit.graphml", lambda new: write_graphml(new, chosen))
    run.save_table("edges.parquet", found.table())
    return {
        "method": found.method,
        "edges": found.graph.edges,
        "gap": None if found.gap is None else found.gap.relative,
    }
