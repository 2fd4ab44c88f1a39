"""Dictionaries of features: one architecture per file, and their registry."""

from __future__ import annotations

import importlib

from assay.dictionaries.base import Dictionary, DictionarySet, Placed
from assay.errors import unknown

ARCHITECTURES = {
    "identity": "assay.dictionaries.identity:Identity",
    "relu": "assay.dictionaries.relu:ReLU",
}
"""Where each architecture lives; adding one adds a line."""


def architecture(name: str) -> type[Dictionary]:
    """Return an architecture by its name; InputError with the nearest names."""
    if name not in ARCHITECTURES:
        raise unknown("architecture of a dictionary", name, ARCHITECTURES)
    module, _, attribute = ARCHITECTURES[name].partition(":")
    found: type[Dictionary] = getattr(importlib.import_module(module), attribute)
    return found


__all__ = ["ARCHITECTURES", "Dictionary", "DictionarySet", "Placed", "architecture"]
