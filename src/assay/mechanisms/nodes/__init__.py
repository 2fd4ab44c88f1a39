"""Nodes: activations of any network, gated between their value and a reference."""

from assay.mechanisms.nodes.bind import NodeSites, nodes
from assay.mechanisms.nodes.kind import Nodes, Spot

__all__ = ["NodeSites", "Nodes", "Spot", "nodes"]
