"""Edges: what is scored between two parts, by estimates and by exact patching."""

from __future__ import annotations

from assay.edges.between import part_edges
from assay.edges.part_edges import PartEdges
from assay.edges.patching import exact_edges, patch_edges
from assay.edges.scores import EdgeScores, edges

__all__ = ["EdgeScores", "PartEdges", "edges", "exact_edges", "part_edges", "patch_edges"]
