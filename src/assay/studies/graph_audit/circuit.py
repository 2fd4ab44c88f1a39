"""The audit of a circuit over heads and MLPs, as EAP-IG writes it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from assay.audit.claims import judge
from assay.audit.edges import edge_faithfulness
from assay.audit.strata import draw_by_rank
from assay.core.target import Batch, Target
from assay.edges.graph import EdgeGraph, from_circuit
from assay.edges.patching import patch_sets
from assay.edges.wiring import wire
from assay.errors import InputError
from assay.io.circuits import Circuit
from assay.studies.graph_audit.result import GraphAudit


def audit_circuit(
    path: Path | str,
    circuit: Circuit,
    target: Target,
    clean: Batch,
    patch: Batch,
    *,
    exact: int,
    seed: int,
    top: int,
    within: float,
    threshold: float,
    alpha: float,
) -> GraphAudit:
    """Patch the nodes and edges of a circuit file exactly, and compare the means over pairs with
    its scores; what the circuit keeps of the metric is in `about`.

    The claim of a node is its own score, or else the sum over its edges. All nodes are patched,
    and of the edges the `top` largest scores and a random choice by strata of the score, `exact`
    together. Raises
    InputError for a circuit of another model, for one without scores, and for scores whose sum is
    not finite."""
    graph = wire(target.model).graph
    stated, scores, keep = from_circuit(circuit)
    _require_same(path, stated, graph)
    options: dict[str, Any] = {"top": top, "within": within, "threshold": threshold, "alpha": alpha}
    known = scores.isfinite() & graph.mask
    if not bool(known.any()):
        raise InputError(f"{path} has no scores, so that there is nothing that it claims")
    rows = _nodes(circuit, graph, scores.where(known, torch.zeros_like(scores)))
    masks = [_outgoing(graph, name) for name, _ in rows]
    effects = patch_sets(target, clean, patch, masks).mean(0)
    nodes = pl.DataFrame(
        {
            "node": [name for name, _ in rows],
            "claimed": [claim for _, claim in rows],
            "exact": effects.tolist(),
            "sampled": [False] * len(rows),
            "stratum": [None] * len(rows),
        }
    )
    places = known.nonzero()
    places = places[scores[known].abs().argsort(descending=True, stable=True)]
    listed = min(top, len(places))
    strata = draw_by_rank(len(places) - listed, exact - listed, alpha, seed)
    at_random = {listed + place for place in strata.drawn}
    measured = [*range(listed), *sorted(at_random)]
    sets = []
    for place in measured:
        mask = torch.zeros_like(graph.mask)
        mask[tuple(places[place].tolist())] = True
        sets.append(mask)
    found = dict(
        zip(measured, patch_sets(target, clean, patch, sets).mean(0).tolist(), strict=True)
    )
    edges = pl.DataFrame(
        {
            "source": [graph.sources[int(source)] for source, _ in places],
            "receiver": [graph.receivers[int(receiver)] for _, receiver in places],
            "claimed": scores[places[:, 0], places[:, 1]].tolist(),
            "in_graph": keep[places[:, 0], places[:, 1]].tolist(),
            "exact": [found.get(place) for place in range(len(places))],
            "sampled": [place in at_random for place in range(len(places))],
            "stratum": [None] * listed + strata.stratum.tolist(),
        },
        schema_overrides={"exact": pl.Float64, "stratum": pl.Int64},
    )
    kept = edge_faithfulness(target, clean, patch, keep)
    about = {
        "graph": str(path),
        "kind": "heads and MLPs",
        "output": "the metric, patched less clean, in the mean over pairs",
        "pairs": len(clean),
        "edges_in_circuit": int((keep & graph.mask).sum()),
        "faithfulness": kept.faithfulness,
        "completeness": kept.completeness,
    }
    return GraphAudit(judge(nodes, **options), judge(edges, **options), about)


def _require_same(path: Path | str, stated: EdgeGraph, graph: EdgeGraph) -> None:
    for words, theirs, ours in (
        ("layers", stated.layers, graph.layers),
        ("heads in a layer", stated.heads, graph.heads),
        ("columns in its residual stream", stated.width, graph.width),
    ):
        if theirs != ours:
            raise InputError(
                f"{path} is a circuit of another model: it has {theirs} {words}, and the model"
                f" {ours}"
            )
    if stated.parallel != graph.parallel:
        raise InputError(
            f"{path} is a circuit of another model: attention and MLP run side by side in one of"
            " the two"
        )


def _nodes(circuit: Circuit, graph: EdgeGraph, scores: Tensor) -> list[tuple[str, float]]:
    """Return sources with their claims, the largest first."""
    sums = (scores * graph.mask).sum(1).tolist()
    found = []
    for name, total in zip(graph.sources, sums, strict=True):
        if not math.isfinite(total):
            raise InputError(f"the scores of the edges of {name!r} add up to {total}")
        entry = circuit.nodes.get(name)
        found.append((name, total if entry is None or entry.score is None else entry.score))
    return sorted(found, key=lambda row: -abs(row[1]))


def _outgoing(graph: EdgeGraph, name: str) -> Tensor:
    found = torch.zeros_like(graph.mask)
    place = graph.sources.index(name)
    found[place] = graph.mask[place]
    return found
