"""Attribution: one entry function and one strategy object per method."""

from __future__ import annotations

from typing import Protocol

from assay.attribution.atp_star import AtPStar
from assay.attribution.edge_patching import exact_edges, patch_edges
from assay.attribution.edge_scores import EdgeScores, edges
from assay.attribution.exact import Exact, ablate, every
from assay.attribution.gradient import Gradient, gate_gradient
from assay.attribution.path import IntegratedGradients
from assay.attribution.probes import ProbedSecondOrder
from assay.attribution.rules import RelP
from assay.attribution.scores import Gap, Scores
from assay.attribution.second import SecondOrder, curvature
from assay.mechanisms.base import Mechanisms

__all__ = [
    "AtPStar",
    "EdgeScores",
    "Exact",
    "Gap",
    "Gradient",
    "IntegratedGradients",
    "Method",
    "ProbedSecondOrder",
    "RelP",
    "Scores",
    "SecondOrder",
    "ablate",
    "attribute",
    "curvature",
    "edges",
    "every",
    "exact_edges",
    "gate_gradient",
    "patch_edges",
]


class Method(Protocol):
    """A strategy that scores every part of a bound mechanism."""

    @property
    def name(self) -> str: ...

    def scores(self, mechanisms: Mechanisms) -> Scores: ...


def attribute(mechanisms: Mechanisms, method: Method | None = None) -> Scores:
    """Return how much each part matters to the metric, per example, by a method (default: the gradient in the gates)."""
    return (method or Gradient()).scores(mechanisms)
