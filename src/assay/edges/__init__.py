"""Edges: what is scored between two parts, by estimates and by exact patching."""

from __future__ import annotations

from assay.edges.between import part_edges
from assay.edges.part_edges import PartEdges
from assay.edges.patching import exact_edges, patch_edges, patch_sets
from assay.edges.query_key import QueryKey, query_key
from assay.edges.scores import EdgeScores, edges
from assay.edges.supernodes import Likeness, measure_likeness, suggest_supernodes

__all__ = [
    "EdgeScores",
    "Likeness",
    "PartEdges",
    "QueryKey",
    "edges",
    "exact_edges",
    "measure_likeness",
    "part_edges",
    "patch_edges",
    "patch_sets",
    "query_key",
    "suggest_supernodes",
]
