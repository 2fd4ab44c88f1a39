"""The graph of a transformer whose nodes are heads and MLPs: who writes to the residual stream,
and who reads from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from assay.errors import unknown
from assay.io.circuits import Circuit, Scored, edge_ends

SLOTS = ("q", "k", "v")


@dataclass(frozen=True)
class EdgeGraph:
    """All edges from what writes to the residual stream to what reads from it.

    Sources are `input`, `a{layer}.h{head}` and `m{layer}`, receivers `a{layer}.h{head}<q|k|v>`,
    `m{layer}` and `logits`, both in the order of the network. With `parallel`, attention and MLP of
    a block read the same residual stream."""

    layers: int
    heads: int
    width: int
    parallel: bool = False

    @cached_property
    def sources(self) -> tuple[str, ...]:
        blocks = [
            [*(f"a{layer}.h{head}" for head in range(self.heads)), f"m{layer}"]
            for layer in range(self.layers)
        ]
        return ("input", *(name for block in blocks for name in block))

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        found = []
        for layer in range(self.layers):
            found += [f"a{layer}.h{head}<{slot}>" for slot in SLOTS for head in range(self.heads)]
            found.append(f"m{layer}")
        return (*found, "logits")

    @cached_property
    def mask(self) -> Bool[Tensor, "sources receivers"]:
        """Which (source, receiver) pairs are edges: those whose source is computed before the
        receiver.
        """
        mask = torch.zeros(len(self.sources), len(self.receivers), dtype=torch.bool)
        for layer in range(self.layers):
            mask[: self.seen_by_heads(layer), self.of_heads(layer)] = True
            mask[: self.seen_by_mlp(layer), self.of_mlp(layer)] = True
        mask[:, -1] = True
        return mask

    @property
    def edges(self) -> int:
        return int(self.mask.sum())

    def seen_by_heads(self, layer: int) -> int:
        """Return how many sources, from the first on, a layer's heads read."""
        return 1 + layer * (self.heads + 1)

    def seen_by_mlp(self, layer: int) -> int:
        """Return how many sources, from the first on, a layer's MLP reads."""
        return self.seen_by_heads(layer) + (0 if self.parallel else self.heads)

    def from_heads(self, layer: int) -> slice:
        """Return where a layer's heads are among the sources; its MLP follows them."""
        return slice(1 + layer * (self.heads + 1), 1 + layer * (self.heads + 1) + self.heads)

    def of_heads(self, layer: int) -> slice:
        """Return where the q, k and v inputs of a layer's heads are among the receivers."""
        return slice(layer * (3 * self.heads + 1), layer * (3 * self.heads + 1) + 3 * self.heads)

    def of_mlp(self, layer: int) -> slice:
        """Return where a layer's MLP is among the receivers."""
        return slice(self.of_heads(layer).stop, self.of_heads(layer).stop + 1)

    def place(self, name: str) -> tuple[int, int]:
        """Return source and receiver of an edge by its name, such as `m0->a1.h2<q>`; InputError
        with the nearest names.
        """
        source, receiver, slot = edge_ends(name)
        reader = f"{receiver}<{slot}>" if slot else receiver
        if source not in self.sources or reader not in self.receivers:
            raise unknown("edge", name, self.names())
        place = self.sources.index(source), self.receivers.index(reader)
        if not self.mask[place]:
            raise unknown("edge", name, self.names())
        return place

    def names(self) -> list[str]:
        """Return the names of all edges, receiver by receiver."""
        return [
            f"{self.sources[source]}->{self.receivers[receiver]}"
            for receiver, source in self.mask.T.nonzero().tolist()
        ]

    def prune(self, keep: Bool[Tensor, "sources receivers"]) -> Bool[Tensor, "sources receivers"]:
        """Return the kept edges that lie on a path from the input to the logits; the others do
        not change the circuit's output.
        """
        keep = keep & self.mask
        node_of = torch.tensor(
            [self.sources.index(name.split("<")[0]) for name in self.receivers[:-1]]
        )
        reads = torch.zeros(len(self.sources), dtype=torch.bool)
        reads[0] = True
        for receiver, node in enumerate(
            node_of.tolist()
        ):  # sources of a receiver come before the receiver's own node
            reads[node] |= bool((keep[:, receiver] & reads).any())
        used = torch.zeros_like(reads)
        used |= keep[:, -1]
        for receiver in reversed(range(len(node_of))):
            if used[node_of[receiver]]:
                used |= keep[:, receiver]
        return keep & reads[:, None] & torch.cat([used[node_of], torch.ones(1, dtype=torch.bool)])

    def to_circuit(
        self,
        scores: Tensor,
        keep: Bool[Tensor, "sources receivers"],
        nodes: Mapping[str, float] | None = None,
    ) -> Circuit:
        """Return the graph as the contents of a circuit file: edge scores (sources, receivers),
        kept edges and node scores.
        """
        keep, known = keep & self.mask, nodes or {}
        present = {self.sources[place] for place in keep.any(1).nonzero().flatten().tolist()}
        present |= {
            self.receivers[place].split("<")[0]
            for place in keep.any(0).nonzero().flatten().tolist()
        }
        listed = {
            name: Scored(known.get(name), name in present) for name in (*self.sources, "logits")
        }
        places = self.mask.T.nonzero().tolist()
        edges = {
            f"{self.sources[source]}->{self.receivers[receiver]}": Scored(
                float(scores[source, receiver]), bool(keep[source, receiver])
            )
            for receiver, source in places
        }
        settings = {
            "n_layers": self.layers,
            "n_heads": self.heads,
            "parallel_attn_mlp": self.parallel,
            "d_model": self.width,
        }
        return Circuit(settings, listed, edges)


def from_circuit(circuit: Circuit) -> tuple[EdgeGraph, Tensor, Tensor]:
    """Return graph, edge scores (sources, receivers; NaN where the file has none) and kept edges of
    a circuit file.

    Raises InputError for a node or an edge that the file's own settings do not allow.
    """
    settings = circuit.settings
    graph = EdgeGraph(
        settings["n_layers"],
        settings["n_heads"],
        settings["d_model"],
        bool(settings["parallel_attn_mlp"]),
    )
    known = dict.fromkeys([*graph.sources, "logits"])
    for name in circuit.nodes:
        if name not in known:
            raise unknown("node", name, known)
    scores = torch.full(graph.mask.shape, float("nan"), dtype=torch.float64)
    keep = torch.zeros_like(graph.mask)
    for name, entry in circuit.edges.items():
        place = graph.place(name)
        scores[place] = float("nan") if entry.score is None else entry.score
        keep[place] = entry.in_graph
    return graph, scores, keep
