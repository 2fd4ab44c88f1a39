"""Nodes of any network: neurons, heads, MLPs and residual streams, patched with a
counterfactual, a mean or zero.
"""

from assay.mechanisms.nodes.kind import Nodes, Reference, Spot, nodes

__all__ = ["Nodes", "Reference", "Spot", "nodes"]
