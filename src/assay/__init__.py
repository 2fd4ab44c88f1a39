"""Assay takes a neural network apart into mechanisms and measures how far to trust the result."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "assay.attribution": (
        "AtPStar",
        "Exact",
        "Gradient",
        "IntegratedGradients",
        "NodePath",
        "ProbedSecondOrder",
        "RelP",
        "Scores",
        "SecondOrder",
        "ablate",
        "attribute",
    ),
    "assay.edges": ("edges",),
    "assay.edges.prompt": ("prompt_graph",),
    "assay.audit": ("Audit", "ExactEffects", "scrub", "worst_case"),
    "assay.audit.budgeted": ("budgeted",),
    "assay.audit.steering": ("continue_steered", "steer"),
    "assay.audit.totals": ("top_recall", "totals"),
    "assay.audit.faithfulness": ("curve", "faithfulness", "keep_top"),
    "assay.core": (
        "Atoms",
        "Batch",
        "Group",
        "Kind",
        "Mechanisms",
        "Parts",
        "Reference",
        "Seen",
        "Shifts",
        "Target",
        "Whole",
        "target",
    ),
    "assay.errors": ("AssayError", "InputError"),
    "assay.learn.language": ("agreement",),
    "assay.mechanisms.channels": ("channels",),
    "assay.mechanisms.components": ("components", "decomposition"),
    "assay.mechanisms.crosscoder": ("crosscoder",),
    "assay.mechanisms.directions": ("directions",),
    "assay.mechanisms.features": ("features",),
    "assay.mechanisms.nodes": ("nodes",),
    "assay.proofs.circuits": ("certified_circuit",),
    "assay.proofs.gates": ("certify",),
    "assay.studies.graph_audit": ("audit_graph",),
    "assay.targets.load": ("load", "pairs"),
}
_PUBLIC = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AssayError",
    "AtPStar",
    "Atoms",
    "Audit",
    "Batch",
    "Exact",
    "ExactEffects",
    "Gradient",
    "Group",
    "InputError",
    "IntegratedGradients",
    "Kind",
    "Mechanisms",
    "NodePath",
    "Parts",
    "ProbedSecondOrder",
    "Reference",
    "RelP",
    "Scores",
    "SecondOrder",
    "Seen",
    "Shifts",
    "Target",
    "Whole",
    "ablate",
    "agreement",
    "attribute",
    "audit_graph",
    "budgeted",
    "certified_circuit",
    "certify",
    "channels",
    "components",
    "continue_steered",
    "crosscoder",
    "curve",
    "decomposition",
    "directions",
    "edges",
    "faithfulness",
    "features",
    "keep_top",
    "load",
    "nodes",
    "pairs",
    "prompt_graph",
    "scrub",
    "steer",
    "target",
    "top_recall",
    "totals",
    "worst_case",
]

if TYPE_CHECKING:
    from assay.attribution import (
        AtPStar,
        Exact,
        Gradient,
        IntegratedGradients,
        NodePath,
        ProbedSecondOrder,
        RelP,
        Scores,
        SecondOrder,
        ablate,
        attribute,
    )
    from assay.audit import Audit, ExactEffects, scrub, worst_case
    from assay.audit.budgeted import budgeted
    from assay.audit.faithfulness import curve, faithfulness, keep_top
    from assay.audit.steering import continue_steered, steer
    from assay.audit.totals import top_recall, totals
    from assay.core import Atoms, Group, Kind, Mechanisms, Parts, Reference, Seen, Shifts, Whole
    from assay.core.target import Batch, Target, target
    from assay.edges import edges
    from assay.edges.prompt import prompt_graph
    from assay.errors import AssayError, InputError
    from assay.learn.language import agreement
    from assay.mechanisms.channels import channels
    from assay.mechanisms.components import components, decomposition
    from assay.mechanisms.crosscoder import crosscoder
    from assay.mechanisms.directions import directions
    from assay.mechanisms.features import features
    from assay.mechanisms.nodes import nodes
    from assay.proofs.circuits import certified_circuit
    from assay.proofs.gates import certify
    from assay.studies.graph_audit import audit_graph
    from assay.targets.load import load, pairs


def __getattr__(name: str) -> Any:
    # Names are imported on first use, so that `assay --help` does not wait for torch.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'assay' has no attribute {name!r}")
    if _PUBLIC[name].startswith("assay.attribution"):
        importlib.import_module("assay.audit")  # gives scores their `audit`
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
