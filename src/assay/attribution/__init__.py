"""Attribution: one entry function and one strategy object per method."""

from __future__ import annotations

from assay.attribution.exact import Exact, ablate, every
from assay.attribution.gradient import Gradient, gate_gradient
from assay.attribution.method import Method
from assay.attribution.node_path import NodePath, node_path
from assay.attribution.path import IntegratedGradients
from assay.attribution.probes import ProbedSecondOrder
from assay.attribution.scores import Gap, Scores
from assay.attribution.second import SecondOrder, curvature
from assay.attribution.transformer.atp_star import AtPStar
from assay.attribution.transformer.relp import RelP
from assay.core.mechanisms import Mechanisms
from assay.errors import InputError, shown

__all__ = [
    "AtPStar",
    "Exact",
    "Gap",
    "Gradient",
    "IntegratedGradients",
    "Method",
    "NodePath",
    "ProbedSecondOrder",
    "RelP",
    "Scores",
    "SecondOrder",
    "ablate",
    "attribute",
    "curvature",
    "every",
    "gate_gradient",
    "node_path",
]


def attribute(mechanisms: Mechanisms, method: Method | None = None) -> Scores:
    """Return how much each part matters to the metric, per example, by a method (default: the
    gradient in the gates). Raises InputError when `method` is no method object.
    """
    if method is not None and not isinstance(method, Method):
        raise InputError(
            "method takes a method object, such as assay.IntegratedGradients(), got"
            f" {shown(getattr(method, '__name__', method))}"
        )
    return (method or Gradient()).scores(mechanisms)
