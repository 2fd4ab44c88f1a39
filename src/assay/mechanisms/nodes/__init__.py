"""Nodes of any network: neurons, heads, MLPs and residual streams, patched with a counterfactual, a mean or zero."""

from assay.mechanisms.nodes.kind import Nodes, Reference, Spot, indirect_effect, nodes

__all__ = ["Nodes", "Reference", "Spot", "indirect_effect", "nodes"]
