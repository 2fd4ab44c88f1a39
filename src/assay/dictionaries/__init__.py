"""Dictionaries of features: one architecture per file, and their registry."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from assay.dictionaries.base import Dictionary, DictionarySet, Placed
from assay.errors import unknown

ARCHITECTURES = {
    "batchtopk": "assay.dictionaries.batchtopk:BatchTopK",
    "gated": "assay.dictionaries.gated:Gated",
    "identity": "assay.dictionaries.identity:Identity",
    "jumprelu": "assay.dictionaries.jumprelu:JumpReLU",
    "matryoshka": "assay.dictionaries.matryoshka:Matryoshka",
    "normalised": "assay.dictionaries.normalised:Normalised",
    "relu": "assay.dictionaries.relu:ReLU",
    "topk": "assay.dictionaries.topk:TopK",
}
"""Where each architecture lives; adding one adds a line."""


def architecture(name: str) -> type[Dictionary]:
    """Return an architecture by its name; InputError with the nearest names."""
    if name not in ARCHITECTURES:
        raise unknown("architecture of a dictionary", name, ARCHITECTURES)
    module, _, attribute = ARCHITECTURES[name].partition(":")
    found: type[Dictionary] = getattr(importlib.import_module(module), attribute)
    return found


def make(name: str, config: Mapping[str, Any]) -> Dictionary:
    """Return a dictionary of zeros of an architecture, from what its `config()` returned."""
    return architecture(name)(**config)


__all__ = ["ARCHITECTURES", "Dictionary", "DictionarySet", "Placed", "architecture", "make"]
