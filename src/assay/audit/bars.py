"""Error bars for every part from a random, exactly ablated subset: split-conformal prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from assay.errors import InputError


@dataclass(frozen=True)
class Rows:
    """Ablated parts: estimate and exact effect, the input each row comes from, its stratum, and
    candidate scales of the error.
    """

    estimate: np.ndarray
    exact: np.ndarray
    input: np.ndarray
    stratum: np.ndarray
    scales: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.estimate)

    def take(self, keep: np.ndarray) -> Rows:
        scales = {name: values[keep] for name, values in self.scales.items()}
        return Rows(
            self.estimate[keep], self.exact[keep], self.input[keep], self.stratum[keep], scales
        )


@dataclass(frozen=True)
class Bars:
    """Half-widths `quantile[stratum] * max(scale, floor)` around an estimate.

    For a part drawn at random in its stratum, of an input drawn like the calibration inputs, the
    bar covers the exact effect with probability at least 1 - alpha (over the draw of both).
    `points` counts the calibration inputs of each stratum; below ceil(1 / alpha) - 1 of them the
    quantile is infinite."""

    alpha: float
    scale: str
    floor: float
    quantile: Mapping[str, float]
    points: Mapping[str, int]

    def half_width(self, stratum: np.ndarray, scale: np.ndarray) -> np.ndarray:
        factors = np.array([self.quantile.get(name, math.inf) for name in np.atleast_1d(stratum)])
        return factors * (1.0 if self.scale == "constant" else np.maximum(scale, self.floor))

    @property
    def guarantee(self) -> str:
        finite = [name for name, value in self.quantile.items() if math.isfinite(value)]
        least = math.ceil(1 / self.alpha) - 1
        if not finite:
            return (
                f"no bar: {1 - self.alpha:.0%} needs at least {least} calibration inputs in a"
                " stratum"
            )
        text = (
            f"coverage >= {1 - self.alpha:.0%} for a random part of a new input, by exchangeability"
            " of inputs"
        )
        missing = len(self.quantile) - len(finite)
        return text + (
            f"; {missing} strata have fewer than {least} calibration inputs and no bar"
            if missing
            else ""
        )


def conformal_quantile(residuals: np.ndarray, alpha: float) -> float:
    """Return the ceil((n + 1)(1 - alpha))-th smallest residual; infinite when n < ceil(1 /
    alpha) - 1 (arXiv 1604.04173).
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha must be between 0 and 1, got {alpha}")
    residuals = np.sort(np.asarray(residuals, float))
    # The product is rounded first: (n + 1)(1 - alpha) = 9.000000000000002 must not cost a rank.
    rank = math.ceil(round((len(residuals) + 1) * (1 - alpha), 9))
    return float(residuals[rank - 1]) if rank <= len(residuals) else math.inf


def split(
    inputs: np.ndarray, shares: tuple[float, ...], generator: np.random.Generator
) -> list[np.ndarray]:
    """Split the distinct inputs at random into folds of the given shares; no input is in two
    folds.
    """
    distinct = generator.permutation(np.unique(inputs))
    ends = np.round(np.cumsum(shares) / sum(shares) * len(distinct)).astype(int)
    return list(np.split(distinct, ends[:-1]))


def calibrate(
    rows: Rows,
    alpha: float,
    generator: np.random.Generator,
    *,
    tuning: Rows | None = None,
    scale: str | None = None,
) -> Bars:
    """Return conformal bars from calibration rows, one random row an input and stratum so that the
    rows are independent.

    The scale is named, or chosen on `tuning` rows (of other inputs) as the one with the narrowest
    mean bar there, floor included; without either it is constant."""
    name, floor = (
        (scale or "constant", 0.0)
        if tuning is None or not len(tuning)
        else _choose(tuning, alpha, scale)
    )
    if name != "constant" and name not in rows.scales:
        raise InputError(f"no scale {name!r}; known: constant, {', '.join(rows.scales)}")
    widths = _widths(rows, name, floor)
    if (widths <= 0).any():
        # A scale that vanishes where the estimate is wrong would divide by zero: such rows set an
        # infinite residual.
        widths = np.where(widths > 0, widths, np.where(rows.exact == rows.estimate, 1.0, 0.0))
    with np.errstate(divide="ignore"):
        residuals = np.abs(rows.exact - rows.estimate) / widths
    quantile, points = {}, {}
    for stratum in np.unique(rows.stratum):
        here = np.flatnonzero(rows.stratum == stratum)
        here = generator.permutation(here)
        _, first = np.unique(rows.input[here], return_index=True)
        quantile[str(stratum)] = conformal_quantile(residuals[here[first]], alpha)
        points[str(stratum)] = len(first)
    return Bars(alpha, name, floor, quantile, points)


def _widths(rows: Rows, name: str, floor: float) -> np.ndarray:
    return np.ones(len(rows)) if name == "constant" else np.maximum(rows.scales[name], floor)


def _choose(tuning: Rows, alpha: float, scale: str | None) -> tuple[str, float]:
    error = np.abs(tuning.exact - tuning.estimate)
    best = (
        scale or "constant",
        0.0,
        float(np.quantile(error, 1 - alpha)) if scale in (None, "constant") else math.inf,
    )
    for name, values in tuning.scales.items():
        if scale not in (None, name):
            continue
        for level in (0.05, 0.25, 0.5, 0.75, 0.9):
            floor = float(np.quantile(values, level))
            widths = np.maximum(values, floor)
            if floor > 0:
                mean = float(np.quantile(error / widths, 1 - alpha) * widths.mean())
                if mean < best[2]:
                    best = (name, floor, mean)
    return best[0], best[1]
