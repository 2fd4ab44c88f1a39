"""The audit of a graph file that another tool made: exact effects beside its claims."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from assay.audit.claims import implied_effects, influences, judge
from assay.audit.strata import draw_by_rank, strata_of_links
from assay.core.target import Batch, Target
from assay.dictionaries import DictionarySet
from assay.edges.direct import remove_pieces
from assay.errors import InputError, shown
from assay.io.attribution_graphs import LOGIT, AttributionGraph, parse_graph
from assay.io.circuits import parse_circuit
from assay.io.files import is_finite, read_json
from assay.studies.graph_audit.circuit import audit_circuit
from assay.studies.graph_audit.nodes import Matched, match
from assay.studies.graph_audit.result import GraphAudit
from assay.targets.load import LanguageTarget
from assay.targets.metrics import last_logits


def audit_graph(
    path: Path | str,
    target: LanguageTarget,
    dictionaries: DictionarySet | None = None,
    pairs: tuple[Batch, Batch] | None = None,
    *,
    top: int = 50,
    exact: int = 2000,
    within: float = 0.25,
    threshold: float = 0.05,
    alpha: float = 0.1,
    seed: int = 0,
) -> GraphAudit:
    """Measure what a graph file of circuit-tracer, Neuronpedia or EAP-IG claims.

    A graph over features needs its `dictionaries`, one over heads and MLPs a clean and a patch
    batch. An effect of a node is what the likeliest logit of the graph, less the mean of all
    logits, loses when what the node writes is removed and everything downstream runs again; that of
    an edge is what the receiver reads, or the logit, loses along the direct way, on which the
    outputs of all MLPs stay but no attention pattern and no norm is frozen. The claim of a node is
    what the graph's own edges add up to. Of heads and MLPs, effects are those of patching.

    Up to `exact` nodes are removed: the `top` most influential ones, those of the `top` edges, and
    a random choice of the others by strata of their influence, which gives the rest their bars at
    level 1 - alpha. See `Claims`
    for `within` and `threshold`. Raises InputError for a damaged file, a graph of another model,
    and dictionaries that do not fit."""
    data = read_json(path)
    options: dict[str, Any] = {"top": top, "within": within, "threshold": threshold, "alpha": alpha}
    if isinstance(data, dict) and {"cfg", "edges"} <= set(data):
        circuit = parse_circuit(path, data)
        _require_numbers(path, data)
        if pairs is None:
            raise InputError(
                f"{path} is a circuit over heads and MLPs, found on pairs of prompts: give them"
                " with --pairs"
            )
        if dictionaries:
            raise InputError(f"{path} is a circuit over heads and MLPs: it takes no --dictionaries")
        return audit_circuit(path, circuit, target, *pairs, exact=exact, seed=seed, **options)
    if pairs is not None:
        raise InputError(
            f"{path} is a graph over features, of the prompt that it names: it takes no --pairs"
        )
    graph = parse_graph(path, data)
    matched = match(str(path), graph, target, dictionaries or {})
    return _audit(path, graph, matched, target, exact=exact, seed=seed, **options)


def _require_numbers(path: Path | str, data: Mapping[str, Any]) -> None:
    for part in ("nodes", "edges"):
        for name, entry in data[part].items():
            score = entry.get("score")
            if score is not None and not is_finite(score):
                raise InputError(f"{path}: the score of {name!r} is {shown(score)}, not a number")


def _audit(
    path: Path | str,
    graph: AttributionGraph,
    matched: Matched,
    target: Target,
    *,
    exact: int,
    seed: int,
    **options: Any,
) -> GraphAudit:
    if not graph.links:
        raise InputError(f"{path} has no links, so that there is nothing that it claims")
    top = options["top"]
    logits = [node for node in graph.nodes if node.type == LOGIT and node.id in matched.outputs]
    chosen = max(logits, key=lambda node: node.probability or 0.0)
    weights = {node.id: node.probability or 0.0 for node in logits}
    if not any(weights.values()):
        weights = {chosen.id: 1.0}
    influence, of_links = influences(graph.links, weights)
    claims = implied_effects(graph.links, chosen.id, matched.activations)
    ranked = sorted(matched.pieces, key=lambda name: -influence.get(name, 0.0))
    links = sorted(range(len(graph.links)), key=lambda place: -of_links[place])
    first = [graph.links[place][0] for place in links[:top]]
    must = list(dict.fromkeys([*ranked[:top], *first]))
    taken = set(must)
    others = [name for name in ranked if name not in taken]
    strata = draw_by_rank(len(others), exact - len(must), options["alpha"], seed)
    drawn = [name for place, name in enumerate(others) if place in strata.drawn]
    measured, at_random = [*must, *drawn], set(drawn)
    of_others = dict(zip(others, strata.stratum.tolist(), strict=True))
    needed = set(measured)
    read = dict.fromkeys(
        receiver
        for source, receiver, _ in graph.links
        if source in needed and receiver in matched.readings
    )
    effects = _measure(matched, target, measured, list(read))
    row_of = {name: row for row, name in enumerate(measured)}
    column_of = {name: column for column, name in enumerate([*matched.outputs, *read])}
    total = effects["total"][:, column_of[chosen.id]].tolist()
    kinds = {node.id: node for node in graph.nodes}
    nodes = [kinds[name] for name in ranked]
    rows = {
        "node": ranked,
        "type": [node.type for node in nodes],
        "layer": [node.layer for node in nodes],
        "position": [node.position for node in nodes],
        "label": [node.label for node in nodes],
        "influence": [influence.get(name, 0.0) for name in ranked],
        "claimed": [claims.get(name, 0.0) for name in ranked],
        "exact": [total[row_of[name]] if name in row_of else None for name in ranked],
        "sampled": [name in at_random for name in ranked],
        "stratum": [of_others.get(name) for name in ranked],
    }
    ends = [graph.links[place][:2] for place in links]
    rank = {name: place for place, name in enumerate(others)}
    cells, sampled = strata_of_links(
        [rank.get(source) for source, _ in ends], strata, options["alpha"], seed
    )
    along = effects["along"].numpy(force=True)
    lines = {
        "source": [source for source, _ in ends],
        "receiver": [receiver for _, receiver in ends],
        "influence": [of_links[place] for place in links],
        "claimed": [graph.links[place][2] for place in links],
        "exact": [
            float(along[row_of[source], column_of[receiver]]) if source in row_of else None
            for source, receiver in ends
        ],
        "sampled": [row in sampled for row in range(len(links))],
        "stratum": cells,
    }
    token, stated = matched.outputs[chosen.id], matched.stated
    about = {
        "graph": str(path),
        "kind": "features",
        "prompt": graph.prompt,
        "output": f"logit of token {token} less the mean logit ({chosen.label or chosen.id})",
        "nodes_removed": len(measured),
        "activations_compared": stated.compared,
        "activations_that_differ": stated.differ,
        "largest_activation_difference": stated.largest,
        "largest_probability_difference": stated.probability,
        "differences": stated.sentence(),
    }
    schema = {"exact": pl.Float64, "stratum": pl.Int64}
    return GraphAudit(
        judge(pl.DataFrame(rows, schema_overrides=schema), **options),
        judge(pl.DataFrame(lines, schema_overrides=schema), **options),
        about,
    )


def _measure(
    matched: Matched, target: Target, measured: list[str], read: list[str]
) -> Mapping[str, Tensor]:
    """Return what logits lose in all, and what logits and then readings lose along the direct way,
    a row for each node that is removed.
    """
    tokens = torch.tensor(list(matched.outputs.values()), device=target.device)
    last = int(matched.batch.labels["last"])

    def outputs(found: Any) -> Tensor:
        rows = (found if isinstance(found, Tensor) else found.logits).shape[0]
        logits = last_logits(found, torch.full((rows,), last, device=target.device))
        return logits[:, tokens] - logits.mean(-1, keepdim=True)

    removed = remove_pieces(
        target,
        matched.batch,
        [matched.pieces[name] for name in measured],
        [matched.readings[name] for name in read],
        matched.held,
        outputs,
    )
    return {"total": removed.total, "along": torch.cat([removed.straight, removed.direct], 1)}
