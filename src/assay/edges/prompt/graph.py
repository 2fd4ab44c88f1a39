"""The attribution graph of one prompt: its nodes, edges, influence and scores, and what is left of
it after pruning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.edges.prompt.influence import Kept, Layout, influence, prune, scores, total_effects
from assay.errors import InputError
from assay.io.attribution_graphs import (
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    AttributionGraph,
    GraphNode,
    error_id,
    feature_id,
)


@dataclass(frozen=True)
class Node:
    """A node by its place: `kind` feature, error, embedding or logit; `layer` is -1 for embeddings,
    `index` the feature or the token.
    """

    kind: str
    layer: int
    position: int
    index: int
    name: str


@dataclass(frozen=True)
class PromptGraph:
    """Features, errors, tokens and logits of one prompt, and the direct linear effects between
    them.

    `edges` has a row per target (features, then logits) and a column per source (features, errors
    by layer and position, tokens): the product of what the source writes with the gradient of the
    target's value, attention patterns, norm scales and MLPs held fixed. The value of a feature is
    its activation, that of a logit is less the mean over the vocabulary.
    `values` are these values, and `rest` what no node explains of them: biases, position embeddings
    and the first positions, which have no nodes. `edges` summed over sources and `rest` make
    `values`.

    `exact` (nodes, logits) is what logits lose when the nodes of columns `removed` are taken out of
    the network itself. `active` counts the active features, also those beyond `most`."""

    name: str
    prompt: str
    tokens: Int[Tensor, " positions"]
    words: tuple[str, ...]
    depth: int
    dictionaries: dict[int, str]
    features: Int[Tensor, "features 3"]
    activations: Float[Tensor, " features"]
    logits: Int[Tensor, " logits"]
    logit_words: tuple[str, ...]
    probabilities: Float[Tensor, " logits"]
    edges: Float[Tensor, "rows sources"]
    values: Float[Tensor, " rows"]
    rest: Float[Tensor, " rows"]
    active: int
    removed: tuple[int, ...] = ()
    exact: Float[Tensor, "nodes logits"] | None = None
    cpu_seconds: float = 0.0

    @cached_property
    def layout(self) -> Layout:
        """How many nodes of each kind there are, in the order of rows and columns."""
        counts = torch.bincount(self.features[:, 0], minlength=self.depth).cumsum(0)
        positions = len(self.tokens)
        return Layout(tuple(counts.tolist()), self.depth * positions, positions, len(self.logits))

    @cached_property
    def influence(self) -> Float[Tensor, " sources"]:
        """The influence of every source on the logits; see `assay.edges.prompt.influence`."""
        return influence(self.edges, self.probabilities, self.layout)

    @cached_property
    def effects(self) -> Float[Tensor, "sources logits"]:
        """What the graph says that logits lose without each source, by all its ways."""
        return total_effects(self.edges, self.values, self.layout)

    def scores(self) -> dict[str, float]:
        """Return the replacement and the completeness score, both between 0 and 1."""
        return scores(self.edges, self.probabilities, self.layout)

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> PrunedGraph:
        """Return the graph of the nodes and edges that carry these shares of the influence.

        Raises InputError for thresholds outside of [0, 1]."""
        for name, share in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
            if not 0 <= share <= 1:
                raise InputError(f"{name} must be between 0 and 1, got {share}")
        kept = prune(self.edges, self.probabilities, self.layout, node_threshold, edge_threshold)
        return PrunedGraph(self, kept, node_threshold, edge_threshold)

    def node(self, place: int) -> Node:
        """Return a node by its place: sources in the order of columns, then logits."""
        layout, positions = self.layout, len(self.tokens)
        if place < layout.features:
            layer, position, index = self.features[place].tolist()
            return Node("feature", layer, position, index, feature_id(layer, index, position))
        place -= layout.features
        if place < layout.errors:
            layer, position = divmod(place, positions)
            name = error_id(f"blocks.{layer}.hook_mlp_out", position)
            return Node("error", layer, position, -1, name)
        place -= layout.errors
        if place < positions:
            token = int(self.tokens[place])
            return Node("embedding", -1, place, token, f"E_{token}_{place}")
        token, last = int(self.logits[place - positions]), positions - 1
        return Node("logit", self.depth, last, token, feature_id(self.depth + 1, token, last))

    def removals(self) -> pl.DataFrame:
        """Return the nodes that were taken out, a row for every logit: what the graph says that is
        lost, and what is lost in the network.
        """
        rows = []
        for row, place in enumerate(self.removed):
            node = self.node(place)
            for column, word in enumerate(self.logit_words):
                assert self.exact is not None
                rows.append(
                    {
                        "node": node.name,
                        "kind": node.kind,
                        "logit": word,
                        "influence": float(self.influence[place]),
                        "estimate": float(self.effects[place, column]),
                        "exact": float(self.exact[row, column]),
                    }
                )
        return pl.DataFrame(rows, infer_schema_length=None)


@dataclass(frozen=True)
class PrunedGraph:
    """What pruning keeps of a prompt's graph."""

    graph: PromptGraph
    kept: Kept
    node_threshold: float
    edge_threshold: float

    def nodes(self) -> pl.DataFrame:
        """Return a row for every node: name, kind, layer, position, index, word, activation,
        influence, the share of all influence up to it, and for the logit of highest probability
        what the graph says is lost without the node, and what is (where it was taken out).
        """
        graph, exact = self.graph, self.graph.exact
        taken = {place: row for row, place in enumerate(graph.removed)}
        rows = []
        for place in self.kept.nodes.nonzero().flatten().tolist():
            node, source = graph.node(place), place < graph.layout.sources
            rows.append(
                {
                    "node": node.name,
                    "kind": node.kind,
                    "layer": node.layer,
                    "position": node.position,
                    "index": node.index,
                    "word": self._word(node, place),
                    "activation": self._activation(place),
                    "influence": float(graph.influence[place]) if source else None,
                    "cumulative": float(self.kept.cumulative[place]),
                    "effect": float(graph.effects[place, 0]) if source else None,
                    "exact": float(exact[taken[place], 0])
                    if exact is not None and place in taken
                    else None,
                }
            )
        return pl.DataFrame(rows, infer_schema_length=None)

    def edges(self) -> pl.DataFrame:
        """Return a row for every edge: source, receiver, score."""
        graph, layout = self.graph, self.graph.layout
        moved = torch.where(
            self.kept.rows < layout.features,
            self.kept.rows,
            self.kept.rows - layout.features + layout.sources,
        )
        names = {
            place: graph.node(place).name
            for place in torch.cat([moved, self.kept.sources]).unique().tolist()
        }
        return pl.DataFrame(
            {
                "source": [names[place] for place in self.kept.sources.tolist()],
                "receiver": [names[place] for place in moved.tolist()],
                "score": graph.edges[self.kept.rows, self.kept.sources].double().tolist(),
            },
            schema={"source": pl.String, "receiver": pl.String, "score": pl.Float64},
        )

    def to_graph(self, slug: str = "prompt", scan: str | None = None) -> AttributionGraph:
        """Return the graph as its files hold it; see `assay.io.attribution_graphs`."""
        graph = self.graph
        nodes = []
        for place in self.kept.nodes.nonzero().flatten().tolist():
            node = graph.node(place)
            kind, layer, index = _FILED[node.kind], str(node.layer), node.index
            if node.kind == "embedding":
                layer, index = "E", node.position
            if node.kind == "logit":
                layer = str(graph.depth + 1)
            nodes.append(
                GraphNode(
                    node.name,
                    layer,
                    None if node.kind == "error" else index,
                    node.position,
                    kind,
                    self._word(node, place),
                    self._activation(place),
                    float(self.kept.cumulative[place]),
                    float(graph.probabilities[place - graph.layout.sources])
                    if node.kind == "logit"
                    else None,
                )
            )
        thresholds = {"node_threshold": self.node_threshold, "edge_threshold": self.edge_threshold}
        return AttributionGraph(
            re.sub(r"[^a-zA-Z0-9_-]+", "-", slug) or "prompt",
            graph.name if scan is None else scan,
            graph.prompt,
            graph.words,
            tuple(nodes),
            tuple(self.edges().iter_rows()),
            {"node_threshold": self.node_threshold, "pruning_settings": thresholds},
        )

    def _activation(self, place: int) -> float | None:
        graph = self.graph
        return float(graph.activations[place]) if place < graph.layout.features else None

    def _word(self, node: Node, place: int) -> str:
        graph = self.graph
        if node.kind == "logit":
            return graph.logit_words[place - graph.layout.sources]
        return graph.words[node.position] if node.kind == "embedding" else ""


_FILED: dict[str, Any] = {
    "feature": FEATURE,
    "error": ERROR,
    "embedding": EMBEDDING,
    "logit": LOGIT,
}
