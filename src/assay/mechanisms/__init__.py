"""The kinds of part, one package each, and the registry of their unbound forms."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from assay.errors import unknown

if TYPE_CHECKING:
    from assay.core.kind import Kind

KINDS = {
    "channels": "assay.mechanisms.channels:Channels",
    "components": "assay.mechanisms.components:Decomposition",
    "crosscoder": "assay.mechanisms.crosscoder:Crosscoder",
    "directions": "assay.mechanisms.directions:Directions",
    "features": "assay.mechanisms.features:Features",
    "nodes": "assay.mechanisms.nodes:NodeSites",
}
"""Where the unbound form of each kind lives; adding a kind adds a line."""


def kind(name: str) -> type[Kind]:
    """Return the unbound form of a kind by its name; InputError with the nearest names."""
    if name not in KINDS:
        raise unknown("kind of part", name, KINDS)
    module, _, attribute = KINDS[name].partition(":")
    found: type[Kind] = getattr(importlib.import_module(module), attribute)
    return found
