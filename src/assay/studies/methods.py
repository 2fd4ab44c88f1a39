"""The attribution methods by their names on the command line, known without loading PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from assay.errors import unknown

if TYPE_CHECKING:
    from assay.attribution import Method

METHODS = {
    "gradient": "Gradient",
    "ig": "IntegratedGradients",
    "second-order": "SecondOrder",
    "exact": "Exact",
}
"""The class in `assay.attribution` by name."""


def require_method(name: str) -> str:
    """Return the name of a method; InputError, with the nearest names, for an unknown one."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return name


def method(name: str) -> Method:
    """Return an attribution method by its command-line name."""
    import assay.attribution as attribution

    chosen: Method = getattr(attribution, METHODS[require_method(name)])()
    return chosen
