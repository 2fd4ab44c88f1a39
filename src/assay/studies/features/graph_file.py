"""A circuit of features as an attribution graph, for Neuronpedia and for graph viewers."""

from __future__ import annotations

import polars as pl

from assay.io.attribution_graphs import (
    ERROR,
    FEATURE,
    LOGIT,
    AttributionGraph,
    GraphNode,
    error_id,
    feature_id,
)
from assay.io.prompts import Pairs
from assay.mechanisms.features import FeatureParts
from assay.targets.language import LanguageModel


def as_graph(
    model: LanguageModel,
    bound: FeatureParts,
    pairs: Pairs,
    parts: pl.DataFrame,
    edges: pl.DataFrame,
) -> AttributionGraph:
    """Return parts (part, group, index, layer, position, help, supernode) and the edges between
    them as a graph over the tokens of the first prompt.

    Dictionaries of one layer are numbered one behind the other, so that an id means one feature."""
    layers = len(model.site_names("mlp"))
    starts: dict[str, int] = {}
    after: dict[int, int] = {}
    for name, spot in bound.spots.items():
        layer = max(model.site(site).layer for site in bound.dictionaries[name].writes)
        starts[name] = after.get(layer, 0)
        after[layer] = starts[name] + spot.size
    ids, nodes = {}, []
    for row in parts.iter_rows(named=True):
        group, index = row["group"], row["index"]
        whole = group not in starts
        feature = -1 if whole else starts[group] + index[-1]
        name = (
            error_id(group.replace(" ", "-"), row["position"])
            if whole
            else feature_id(row["layer"], feature, row["position"])
        )
        ids[row["part"]] = name
        nodes.append(
            GraphNode(
                name,
                str(row["layer"]),
                feature,
                row["position"],
                ERROR if whole else FEATURE,
                row["part"],
                influence=row["help"],
            )
        )
    answer, last = int(pairs.answers[0, 0]), int(pairs.lengths[0]) - 1
    ids["metric"] = feature_id(layers + 1, answer, last)
    nodes.append(
        GraphNode(ids["metric"], str(layers + 1), answer, last, LOGIT, "difference of answers")
    )
    tokens = model.tokenizer.convert_ids_to_tokens(pairs.clean[0, : last + 1].tolist())
    links = [
        (ids[row["source"]], ids[row["receiver"]], row["score"])
        for row in edges.iter_rows(named=True)
    ]
    return AttributionGraph(
        f"circuit-of-{last + 1}-tokens",
        model.family,
        pairs.texts[0].clean_prefix,
        tuple(tokens),
        tuple(nodes),
        tuple(links),
        supernodes=[
            [name, *(ids[part] for part in some["part"])]
            for (name,), some in parts.group_by("supernode", maintain_order=True)
            if name
        ],
    )
