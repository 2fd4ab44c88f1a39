"""Assay takes a neural network apart into mechanisms and measures how far to trust the result."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Batch": "assay.targets.base",
    "Target": "assay.targets.base",
    "target": "assay.targets.base",
    "channels": "assay.mechanisms.channels",
    "attribute": "assay.attribution",
    "ablate": "assay.attribution",
    "Gradient": "assay.attribution",
    "IntegratedGradients": "assay.attribution",
    "SecondOrder": "assay.attribution",
    "Exact": "assay.attribution",
    "Scores": "assay.attribution",
    "Audit": "assay.audit",
    "faithfulness": "assay.audit",
    "curve": "assay.audit",
    "keep_top": "assay.audit",
    "worst_case": "assay.audit",
    "scrub": "assay.audit",
    "AssayError": "assay.errors",
    "InputError": "assay.errors",
}

__all__ = sorted(_PUBLIC)  # noqa: PLE0605

if TYPE_CHECKING:
    from assay.attribution import Exact, Gradient, IntegratedGradients, Scores, SecondOrder, ablate, attribute
    from assay.audit import Audit, scrub, worst_case
    from assay.audit.faithfulness import curve, faithfulness, keep_top
    from assay.errors import AssayError, InputError
    from assay.mechanisms.channels import channels
    from assay.targets.base import Batch, Target, target


def __getattr__(name: str) -> Any:
    # Names are imported on first use, so that `assay --help` does not wait for torch.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'assay' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
