"""A guard that starts by rejecting everything: explanations, the acceptor, and its modes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Explanation": "assay.guard.explanations",
    "Guard": "assay.guard.guard",
    "Guarded": "assay.guard.wrapper",
    "Observed": "assay.guard.observed",
    "Settings": "assay.guard.settings",
    "Verdicts": "assay.guard.guard",
    "fit": "assay.guard.fitting",
    "of_mechanisms": "assay.guard.observed",
    "split": "assay.guard.observed",
}

__all__ = [
    "Explanation",
    "Guard",
    "Guarded",
    "Observed",
    "Settings",
    "Verdicts",
    "fit",
    "of_mechanisms",
    "split",
]

if TYPE_CHECKING:
    from assay.guard.explanations import Explanation
    from assay.guard.fitting import fit
    from assay.guard.guard import Guard, Verdicts
    from assay.guard.observed import Observed, of_mechanisms, split
    from assay.guard.settings import Settings
    from assay.guard.wrapper import Guarded


def __getattr__(name: str) -> Any:
    # Imported on first use, so that settings are checked without loading PyTorch.
    if name not in _HOMES:
        raise AttributeError(f"module 'assay.guard' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
