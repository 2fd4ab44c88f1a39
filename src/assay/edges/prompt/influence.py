"""How much of the probability of the logits every node carries, and which nodes and edges carry
most of it.

The influence of a node is what reaches it from the logits, each with its probability, when every
target hands its own on to its sources in the shares of |edge| (Ameisen et al. 2025, Circuit
tracing, transformer-circuits.pub). It has no sign and is no effect: see `total_effects`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The order of nodes: `features` by layer (`ends` counts those up to each layer), `errors`,
    `tokens` and `logits`. Rows of edges are features and then logits, columns all but logits.
    """

    ends: tuple[int, ...]
    errors: int
    tokens: int
    logits: int

    @property
    def features(self) -> int:
        return self.ends[-1]

    @property
    def sources(self) -> int:
        return self.features + self.errors + self.tokens

    @property
    def layers(self) -> list[slice]:
        """The rows of every layer's features, in order."""
        return [slice(*pair) for pair in zip((0, *self.ends), self.ends, strict=False)]


def influence(
    edges: Float[Tensor, "rows sources"], weights: Float[Tensor, " logits"], layout: Layout
) -> Float[Tensor, " sources"]:
    """Return the influence of every source on the logits, in float64: `w S + w S^2 + ..` with S the
    shares |edge| / sum |edges into a target|. A feature feeds later layers alone, so that one pass
    from the last layer to the first is the whole series.
    """
    found = weights.double() @ shares(edges[layout.features :])
    for rows in reversed(layout.layers):
        if rows.stop > rows.start:
            found += found[rows] @ shares(edges[rows])
    return found


def shares(edges: Float[Tensor, "rows sources"]) -> Float[Tensor, "rows sources"]:
    """Return |edge| over the sum into each target, in float64."""
    size = edges.abs().double()
    return size / size.sum(1, keepdim=True).clamp_min(1e-10)


def total_effects(
    edges: Float[Tensor, "rows sources"], values: Float[Tensor, " features"], layout: Layout
) -> Float[Tensor, "sources logits"]:
    """Return what every logit loses when a source is removed, by all ways through the graph, in
    float64: the direct edge, and through every feature the share of its value that is lost. This is
    exact where attention, norms and errors stay and no feature switches on or off.
    """
    found = edges[layout.features :].double()
    for rows in reversed(layout.layers):
        if rows.stop > rows.start:
            carried = found[:, rows] / values[rows].double()
            found = found + carried @ edges[rows].double()
    return found.T


def scores(
    edges: Float[Tensor, "rows sources"], weights: Float[Tensor, " logits"], layout: Layout
) -> dict[str, float]:
    """Return the replacement score, the share of tokens in the influence of tokens and errors, and
    the completeness score, the share of influence into targets that comes from other sources than
    errors.
    """
    reached = influence(edges, weights, layout)
    errors = slice(layout.features, layout.features + layout.errors)
    from_tokens, from_errors = reached[errors.stop :].sum(), reached[errors].sum()
    explained, whole = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    # A source without edges into it hands nothing on, and counts as explained.
    ends = reached[layout.features :].sum()
    for rows, carried in _targets(edges, reached, weights, layout):
        lost = shares(edges[rows])[:, errors].sum(1)
        explained, whole = explained + ((1 - lost) * carried).sum(), whole + carried.sum()
    return {
        "replacement": float(from_tokens / (from_tokens + from_errors)),
        "completeness": float((explained + ends) / (whole + ends)),
    }


@dataclass(frozen=True)
class Kept:
    """What pruning keeps: masks over all nodes (sources, then logits) and over edges (rows,
    sources) as places, and the share of influence up to and with each node.
    """

    nodes: Bool[Tensor, " nodes"]
    rows: Tensor
    sources: Tensor
    cumulative: Float[Tensor, " nodes"]


def prune(
    edges: Float[Tensor, "rows sources"],
    weights: Float[Tensor, " logits"],
    layout: Layout,
    node_threshold: float,
    edge_threshold: float,
) -> Kept:
    """Keep the nodes that carry `node_threshold` of all influence, the largest first, and of the
    edges between them those that carry `edge_threshold` of what goes through edges; tokens and
    logits stay. A feature that is left without an edge into it or out of it goes, and an error
    without one out of it.
    """
    reached = torch.cat(
        [influence(edges, weights, layout), edges.new_zeros(layout.logits).double()]
    )
    order = reached.argsort(descending=True, stable=True)
    running = reached[order].cumsum(0) / reached.sum()
    cumulative = torch.zeros_like(reached).index_copy_(0, order, running)
    nodes = reached >= _bound(reached, node_threshold)
    always = slice(layout.features + layout.errors, None)
    nodes[always] = True
    features = nodes[: layout.features].nonzero().flatten()
    kept_rows = torch.cat(
        [features, layout.features + torch.arange(layout.logits, device=features.device)]
    )
    kept_sources = nodes[: layout.sources].nonzero().flatten()
    some = edges[kept_rows][:, kept_sources]
    ends = torch.searchsorted(features, torch.tensor(layout.ends, device=features.device))
    inner = Layout(
        tuple(ends.tolist()),
        len(kept_sources) - len(features) - layout.tokens,
        layout.tokens,
        layout.logits,
    )
    through = influence(some, weights, inner)
    carried = torch.cat([through[: len(features)], weights.double()])
    sizes = shares(some) * carried[:, None]
    wanted = (sizes >= _bound(sizes.flatten(), edge_threshold)) & (sizes > 0)
    own = torch.arange(len(features), device=features.device)
    leaving = slice(0, len(kept_sources) - layout.tokens)  # features and errors
    alive = torch.ones(len(kept_sources), dtype=torch.bool, device=features.device)
    while True:
        before = alive.clone()
        alive[leaving] &= wanted[:, leaving].any(0)
        alive[own] &= wanted[own].any(1)
        if bool((alive == before).all()):
            break
        wanted[:, ~alive] = False
        wanted[own] &= alive[own, None]
    nodes[kept_sources] = alive
    rows, sources = wanted.nonzero(as_tuple=True)
    return Kept(nodes, kept_rows[rows], kept_sources[sources], cumulative)


def _targets(
    edges: Tensor, reached: Tensor, weights: Tensor, layout: Layout
) -> Sequence[tuple[slice, Tensor]]:
    logits = slice(layout.features, layout.features + layout.logits)
    return [*((rows, reached[rows]) for rows in layout.layers), (logits, weights.double())]


def _bound(values: Tensor, share: float) -> Tensor:
    """Return the value down to which the largest values add up to a share of all."""
    ordered = values.sort(descending=True).values
    running = ordered.cumsum(0) / ordered.sum()
    place = int(torch.searchsorted(running, share))
    return ordered[min(place, len(ordered) - 1)]
