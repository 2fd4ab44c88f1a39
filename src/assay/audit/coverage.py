"""How many bars contain the exact effect on inputs that neither tuned nor calibrated, with an
interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from assay.audit.intervals import LEAST, binomial_interval

LEVEL = 0.95


@dataclass(frozen=True)
class Coverage:
    """The share of bars that contain the exact effect, on held-out inputs.

    `covered` of `rows` bars do, in `inputs` distinct inputs; `share` weights each by 1 / its
    inclusion probability, and [low, high] is a 95 % interval over inputs. `width` is their mean
    width. Where the share has no support it is None and `reason` says why."""

    selection: str
    share: float | None
    low: float | None
    high: float | None
    covered: int
    rows: int
    inputs: int
    nominal: float
    width: float | None
    reason: str = ""
    what: str = "bars contain the exact effect"

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "share": self.share,
            "low": self.low,
            "high": self.high,
            "n": self.rows,
            "covered": self.covered,
            "inputs": self.inputs,
            "nominal": self.nominal,
            "mean_width": self.width,
        }
        found |= {"reason": self.reason} if self.reason else {}
        return found | {"sentence": in_words(found, self.what)}

    @property
    def sentence(self) -> str:
        """The share in words."""
        return str(self.to_dict()["sentence"])


def in_words(found: Mapping[str, Any], what: str = "bars contain the exact effect") -> str:
    """Return a measured share, as `Coverage.to_dict` gives it, in words."""
    share, covered, rows = found["share"], found["covered"], found["n"]
    if share is None:
        return f"The share of {what.partition(' ')[0]} is not given: {found['reason']}"
    weighted = (
        ", each weighted by how rarely such a part is sampled"
        if abs(share - covered / rows) > 5e-4
        else ""
    )
    return (
        f"{covered:,} of {rows:,} {what} ({percent(share)}{weighted}, {percent(LEVEL)} interval"
        f" {100 * found['low']:.0f}-{percent(found['high'])}; nominal"
        f" {percent(found['nominal'])})"
    )


def percent(share: float) -> str:
    """Return a share as a whole percentage."""
    return f"{100 * share:.0f} %"


def measure(
    selection: str,
    covered: np.ndarray,
    weight: np.ndarray,
    unit: np.ndarray,
    nominal: float,
    half: np.ndarray,
    what: str = "bars contain the exact effect",
) -> Coverage:
    """Return the weighted share of rows that are `covered`, over distinct inputs `unit`; rows with
    an infinite `half` width have no bar and do not count.

    The interval is the exact binomial one for the effective number of rows, which the variance
    between inputs gives (Korn and Graubard 1998); where every row agrees each input counts once."""
    finite = np.isfinite(half)
    covered, weight, unit, half = (entry[finite] for entry in (covered, weight, unit, half))
    rows, inputs = len(covered), len(np.unique(unit))
    counts = int(covered.sum()), rows, inputs
    if inputs < LEAST:
        lost = int((~finite).sum())
        reason = (
            f"{lost:,} held-out rows have no bar: too few inputs calibrate it"
            if lost and not rows
            else f"{inputs} held-out inputs, and at least {LEAST} are needed"
        )
        return Coverage(selection, None, None, None, *counts, nominal, None, reason, what)
    share, low, high = share_interval(covered, weight, unit)
    width = float(2 * np.average(half, weights=weight))
    return Coverage(selection, share, low, high, *counts, nominal, width, "", what)


def share_interval(
    covered: np.ndarray, weight: np.ndarray, unit: np.ndarray, level: float = LEVEL
) -> tuple[float, float, float]:
    """Return a weighted share of rows with its interval over independent inputs; see `measure`."""
    total = weight.sum()
    share = float((weight * covered).sum() / total)
    distinct, place = np.unique(unit, return_inverse=True)
    inputs, rows = len(distinct), len(covered)
    surplus = np.bincount(place, weights=weight * (covered - share))
    variance = float((surplus**2).sum() / total**2) * inputs / max(inputs - 1, 1)
    if variance <= 1e-18 or not 1e-12 < share < 1 - 1e-12:
        effective = float(inputs)
    else:
        effective = min(share * (1 - share) / variance, float(rows))
        ratio = stats.t.ppf((1 + level) / 2, rows - 1) / stats.t.ppf((1 + level) / 2, inputs - 1)
        effective *= float(ratio) ** 2
    low, high = binomial_interval(share, effective, 1 - level)
    return share, 0.0 if math.isnan(low) else low, 1.0 if math.isnan(high) else high
