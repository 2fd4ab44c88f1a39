"""The activations and probabilities that a graph states, beside the model's own on its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from assay.errors import InputError
from assay.io.attribution_graphs import FEATURE, AttributionGraph, GraphNode

_FITS = 0.1  # of an activation: what half precision and other kernels explain
_ODDS = 0.02  # of a probability


@dataclass(frozen=True)
class Stated:
    """How many stated activations `differ` from the model's own by more than a tenth, of how many
    that were `compared`; the largest difference as a share, the node that has it, with its two
    activations; the largest difference of probabilities; and the likely cause of both ("" where
    nothing differs). What was not stated is None.
    """

    compared: int
    differ: int
    largest: float | None
    node: str
    there: float | None
    here: float | None
    probability: float | None
    cause: str

    def sentence(self) -> str | None:
        """Say how the graph's numbers differ, or return None where they do not."""
        if not self.cause:
            return None
        said = []
        if self.differ and self.largest is not None:
            there = "active" if self.there is None else f"{self.there:.4g}"
            said.append(
                f"{self.differ} of {self.compared} stated activations differ from the model's own"
                f" by more than {_FITS:.0%}, most that of {self.node} (stated {there}, here"
                f" {self.here:.4g})"
            )
        if self.probability is not None and self.probability > _ODDS:
            said.append(f"the probabilities of tokens differ by up to {self.probability:.3f}")
        return f"{' and '.join(said)}: {self.cause}"


def compare_stated(
    path: str,
    graph: AttributionGraph,
    activations: Mapping[str, float],
    probabilities: Mapping[str, float],
) -> Stated:
    """Compare a graph's numbers with the model's, by the ids of nodes.

    Raises InputError, with the likely cause, where most activations are others."""

    def apart(node: GraphNode) -> float:
        here, there = activations[node.id], node.activation
        if there is None:
            return 0.0 if here != 0 else 1.0
        return abs(here - there) / max(abs(there), 1e-6)

    features = [node for node in graph.nodes if node.type == FEATURE]
    gaps = {node.id: apart(node) for node in features}
    odds = [
        abs(node.probability - probabilities[node.id])
        for node in graph.nodes
        if node.id in probabilities and node.probability
    ]
    probability = max(odds, default=None)
    differ = sum(gap > _FITS for gap in gaps.values())
    worst = max(features, key=lambda node: gaps[node.id], default=None)
    found = Stated(
        len(features),
        differ,
        None if worst is None else gaps[worst.id],
        "" if worst is None else worst.id,
        None if worst is None else worst.activation,
        None if worst is None else activations[worst.id],
        probability,
        _cause(features, gaps, probability),
    )
    if 2 * differ > len(features):
        raise InputError(f"{path} does not fit: {found.sentence()}")
    return found


def _cause(features: list[GraphNode], gaps: Mapping[str, float], probability: float | None) -> str:
    by_layer: dict[int, list[bool]] = {}
    for node in features:
        by_layer.setdefault(node.depth or 0, []).append(gaps[node.id] > _FITS)
    others = sorted(layer for layer, off in by_layer.items() if 2 * sum(off) > len(off))
    if probability is not None and probability > _ODDS:
        return "the model has other weights than the graph's, or reads another prompt"
    if others and len(others) < len(by_layer):
        numbers = ", ".join(map(str, others))
        return f"give the graph's own dictionaries of layer{'s' * (len(others) > 1)} {numbers}"
    if others:
        own = "the dictionaries are others than the graph's, or read another site"
        return own if probability is not None else f"the model is another one, or {own}"
    if any(any(off) for off in by_layer.values()):
        return "the graph was made in another precision, or was changed"
    return ""
