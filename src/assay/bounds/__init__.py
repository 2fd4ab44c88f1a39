"""Interval and linear bounds: outward rounding, bound propagation, bound functions of the
mechanism kinds.
"""

from assay.bounds.certify import CertifiedAccuracy, certified_accuracy
from assay.bounds.convert import bilinear_graph, graph_of
from assay.bounds.graph import Graph
from assay.bounds.propagate import Bounds, LinearLower, bound, linear_lower
from assay.bounds.regions import Ball, ball
from assay.bounds.rounding import Interval

__all__ = [
    "Ball",
    "Bounds",
    "CertifiedAccuracy",
    "Graph",
    "Interval",
    "LinearLower",
    "ball",
    "bilinear_graph",
    "bound",
    "certified_accuracy",
    "graph_of",
    "linear_lower",
]
