"""A guard that starts by rejecting everything: explanations, the acceptor, and its modes."""

from assay.guard.explanations import Explanation
from assay.guard.fit import fit
from assay.guard.guard import Guard, Verdicts
from assay.guard.observed import Observed, of_mechanisms, split
from assay.guard.settings import Settings

__all__ = [
    "Explanation",
    "Guard",
    "Observed",
    "Settings",
    "Verdicts",
    "fit",
    "of_mechanisms",
    "split",
]
