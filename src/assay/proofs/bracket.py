"""Brackets [found, proved]: what a search found and what a proof allows, as different types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from assay.errors import InputError

Claim = Literal["damage", "same-answer"]


@dataclass(frozen=True)
class Searched:
    """What a search found, (examples,): a LOWER bound of the worst damage (an upper bound of the
    least margin), reached at `gates`. It proves nothing about other gates.

    elsewhere: the inputs and references there, where those move too."""

    values: Tensor
    gates: tuple[Mapping[str, Tensor], ...]
    evaluations: int
    elsewhere: tuple[Mapping[str, Tensor], ...] = ()


@dataclass(frozen=True)
class Proved:
    """What was proved, (examples,): an UPPER bound of the worst damage (a lower bound of the least
    margin) over every combination of gates in the boxes, at `level`, under `assumptions`.

    Infinite where no bound was reached."""

    values: Tensor
    level: str
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class Certified:
    """The bracket [found, proved] of a claim, example by example.

    claim: "damage", how far the metric falls (or rises, where lower is right) from the untouched
    network; or "same-answer", the least margin of the answer over any rival. full: the metric, or
    the margin, of the untouched network. free: how many gates move, on average. boxes, seconds: the
    work spent (CPU). vacuous: where the proof excludes nothing: the bound is `allowed`, what the
    last norm allows whatever the gates are, or there is none (infinite damage). certificate: where
    the proof was written, if it was."""

    claim: Claim
    found: Searched
    proved: Proved
    full: Tensor
    free: float
    boxes: tuple[int, ...]
    seconds: tuple[float, ...]
    vacuous: Tensor
    allowed: Tensor
    certificate: Path | None = None

    @property
    def certified(self) -> Tensor:
        """Where the answer provably stays ("same-answer"); InputError for another claim."""
        return self._margins(self.proved.values)

    @property
    def broken(self) -> Tensor:
        """Where gates were found that change the answer ("same-answer")."""
        return ~self._margins(self.found.values)

    @property
    def open(self) -> Tensor:
        """Where neither is known ("same-answer")."""
        return ~self.certified & ~self.broken

    @property
    def ratio(self) -> float:
        """The mean found damage over the mean proved one: 1 where the worst case is known."""
        if self.claim != "damage":
            raise InputError(f"the ratio is that of damages, not of the claim {self.claim!r}")
        proved = float(self.proved.values.mean())
        return 1.0 if proved == 0 else float(self.found.values.mean()) / proved

    def _margins(self, values: Tensor) -> Tensor:
        if self.claim != "same-answer":
            raise InputError(
                f"answers are certified by the claim 'same-answer', not {self.claim!r}"
            )
        return values > 0

    def summary(self) -> dict[str, Any]:
        """Return plain numbers for JSON; a bound that was not reached is null."""
        finite = bool(self.proved.values.isfinite().all())
        plain: dict[str, Any] = {
            "claim": self.claim,
            "examples": len(self.full),
            "free_gates": self.free,
            "level": self.proved.level,
            "assumptions": list(self.proved.assumptions),
            "boxes": sum(self.boxes),
            "cpu_seconds": sum(self.seconds),
            "vacuous": int(self.vacuous.sum()),
        }
        if self.claim == "damage":
            return plain | {
                "found_mean": float(self.found.values.mean()),
                "proved_mean": float(self.proved.values.mean()) if finite else None,
                "ratio": self.ratio if finite else None,
            }
        return plain | {
            "certified": int(self.certified.sum()),
            "broken": int(self.broken.sum()),
            "open": int(self.open.sum()),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return one row an example: the bracket, and what it says."""
        rows = []
        for index in range(len(self.full)):
            proved, allowed = float(self.proved.values[index]), float(self.allowed[index])
            row: dict[str, Any] = {
                "example": index,
                "full": float(self.full[index]),
                "found": float(self.found.values[index]),
                "proved": proved if np.isfinite(proved) else None,
                "vacuous": bool(self.vacuous[index]),
                "allowed": allowed if np.isfinite(allowed) else None,
                "boxes": self.boxes[index],
            }
            if self.claim == "same-answer":
                certified, broken = bool(self.certified[index]), bool(self.broken[index])
                row["verdict"] = "certified" if certified else "broken" if broken else "open"
            rows.append(row)
        return rows
