"""The attribution methods by their names on the command line, known without loading PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from assay.errors import InputError, unknown

if TYPE_CHECKING:
    from assay.attribution import Method
    from assay.core.mechanisms import Mechanisms

AUTO = "auto"
CLASSES = {
    "gradient": "Gradient",
    "ig": "IntegratedGradients",
    "second-order": "SecondOrder",
    "exact": "Exact",
    "atp-star": "AtPStar",
    "relp": "RelP",
    "probes": "ProbedSecondOrder",
}
"""The class in `assay.attribution` by the name that commands, configs and tables use."""

METHODS = ("gradient", "ig", "second-order", "exact", AUTO)
"""What commands take, for mechanisms of every kind; auto is the cheaper of exact and ig, by a
probe."""

ESTIMATES = ("gradient", "ig", "atp-star", "relp", "probes")
"""What the attribution study compares with exact effects, for nodes of language models."""


def require_method(name: str) -> str:
    """Return the name of a method; InputError, with the nearest names, for an unknown one."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return name


def method(name: str, **options: Any) -> Method:
    """Return an attribution method by its name, with options of its class; InputError for a name
    without a class.
    """
    import assay.attribution as attribution

    if name == AUTO:
        raise InputError("auto needs mechanisms to probe: use method_for")
    if name not in CLASSES:
        raise unknown("method", name, CLASSES)
    chosen: Method = getattr(attribution, CLASSES[name])(**options)
    return chosen


def method_for(mechanisms: Mechanisms, name: str) -> tuple[Method, str]:
    """Return the method of a command-line name, and why it was taken where a probe on the
    mechanisms decides between exact effects and integrated gradients.
    """
    from assay.audit import choose_method

    if require_method(name) != AUTO:
        return method(name), ""
    found = choose_method(mechanisms, method("ig"))
    return method("exact" if found.exact else "ig"), found.reason
