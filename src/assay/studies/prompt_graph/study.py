"""The prompt graph study: the attribution graph of one prompt, pruned, and which of its nodes hold
when they are taken out of the network.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from assay.audit.agreement import agreement_table
from assay.dictionaries.load import load_dictionaries
from assay.edges.prompt import PromptGraph, prompt_graph
from assay.io.attribution_graphs import write_graph
from assay.io.graphml import write_graphml
from assay.io.runs import Run
from assay.studies.prompt_graph.config import Config
from assay.studies.prompt_graph.page import headline, sections
from assay.targets.load import load as load_target

__all__ = ["Config", "check", "headline", "run", "sections"]


def check(config: Config) -> None:
    """Refuse nothing more than the config does."""


def run(config: Config, run: Run) -> dict[str, Any]:
    """Make the graph, prune it, save it for Neuronpedia and graph viewers, and compare what it says
    of its most influential nodes with the network without them.
    """
    given, chosen = config.dictionaries, config.graph
    assert config.target.path is not None
    assert given.path is not None
    assert config.prompt is not None
    target = load_target(config.target.path)
    dictionaries = load_dictionaries(
        given.path, reads=given.reads, writes=given.writes, scale=given.scale, stream=True
    )
    graph = prompt_graph(
        target,
        dictionaries,
        config.prompt,
        logits=chosen.logits,
        probability=chosen.probability,
        first=chosen.first,
        most=chosen.most,
        exact=chosen.exact,
    )
    pruned = graph.prune(chosen.node_threshold, chosen.edge_threshold)
    filed = pruned.to_graph("prompt")
    run.write("graph.json", lambda path: write_graph(path, filed))
    run.write("graph.graphml", lambda path: write_graphml(path, filed))
    nodes, edges = pruned.nodes(), pruned.edges()
    run.save_table("nodes.parquet", nodes)
    run.save_table("edges.parquet", edges)
    held = _agreement(run, graph)
    layout = graph.layout
    return {
        "tokens": list(graph.words),
        "logits": dict(zip(graph.logit_words, graph.probabilities.tolist(), strict=True)),
        "active_features": graph.active,
        "nodes": {
            "features": layout.features,
            "errors": layout.errors,
            "tokens": layout.tokens,
            "logits": layout.logits,
        },
        "kept": {"nodes": nodes.height, "edges": edges.height},
        "scores": graph.scores(),
        "unexplained": _unexplained(graph),
        "agreement": held,
        "seconds": graph.cpu_seconds,
    }


def _agreement(run: Run, graph: PromptGraph) -> list[dict[str, Any]]:
    """Save what was taken out, and return how far the graph agrees with it by kind of node."""
    if not graph.removed:
        return []
    table = graph.removals()
    run.save_table("exact.parquet", table)
    whole = table.with_columns(pl.lit("all").alias("kind"))
    return agreement_table(pl.concat([whole, table]), "kind").to_dicts()


def _unexplained(graph: PromptGraph) -> float:
    """Return the share of the logits that no node explains: |rest| over |rest| and |edges|."""
    rows = slice(graph.layout.features, None)
    rest = graph.rest[rows].abs().sum()
    return float(rest / (rest + graph.edges[rows].double().abs().sum()))
