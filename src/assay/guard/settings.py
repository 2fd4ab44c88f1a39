"""What a guard is fitted with; known without loading PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from assay.errors import InputError, unknown

MODES = ("memorise", "single-edit", "prune", "constant", "marginal", "add")
"""`memorise` accepts laboratory inputs, `single-edit` those with one activation changed inside its
certified interval, `prune` needs no explanation of what provably changes nothing, `constant`,
`marginal` and `add` (edges and root tables) are explanations."""


@dataclass(frozen=True)
class Settings:
    """`theta`: the least probability of an accepted event; `delta`: the share of tables that may
    promise too much, over all events together; `alpha`: the level of the tests; `most`: the most
    explanations, None for all that pay.

    Raises InputError for unknown modes and shares outside of (0, 1)."""

    modes: tuple[str, ...] = ("constant", "marginal", "add")
    theta: float = 1e-5
    delta: float = 0.05
    alpha: float = 0.05
    bins: int = 6
    least: int = 20
    threshold: float = 0.0
    roots: int = 64
    most: int | None = None

    def __post_init__(self) -> None:
        require_modes(self.modes)
        for name in ("theta", "delta", "alpha"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < 1:
                raise InputError(f"{name} must lie between 0 and 1, both excluded, got {value}")
        for name, least in (("bins", 2), ("least", 1), ("roots", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, got {value}")
        if self.most is not None and (type(self.most) is not int or self.most < 0):
            raise InputError(f"most must be a whole number or None, got {self.most}")
        if not _is_number(self.threshold):
            raise InputError(f"threshold must be a number, got {self.threshold}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def require_modes(modes: Iterable[str]) -> None:
    """Raise InputError, with the nearest names, for an unknown mode."""
    for mode in modes:
        if mode not in MODES:
            raise unknown("guard mode", mode, MODES)
