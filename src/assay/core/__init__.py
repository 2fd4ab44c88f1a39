"""The gated sum: sites, parts, mechanisms, kinds, targets."""

from __future__ import annotations

from assay.core.kind import Kind, Reference
from assay.core.mechanisms import Mechanisms
from assay.core.parts import Atoms, Group, Parts, Shifts, Whole
from assay.core.sites import Seen
from assay.core.target import Batch, Target, target

__all__ = [
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
]
