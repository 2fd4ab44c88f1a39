"""Calibration of the bars: inputs are split into folds that tune, calibrate and test; the bars of
every selection are calibrated on the second.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from assay.audit.bars import LISTS, Bars, Tail, promised, ranks, split, tail
from assay.audit.population import Population
from assay.audit.sampling import Design
from assay.audit.scale import Scale, Tuning, choose_scale
from assay.audit.selections import Selections

FOLDS = ("tuning", "calibration", "test")
SHARES = (0.25, 0.5, 0.25)


@dataclass(frozen=True)
class Ablated:
    """A population with its sampling design, the rows that were drawn, and their exact effects.

    `weight` is 1 / inclusion probability, divided by the number of copies of a row's input: copies
    are one observation."""

    parts: Population
    design: Design
    rows: np.ndarray
    exact: np.ndarray

    @cached_property
    def error(self) -> np.ndarray:
        return np.abs(self.exact - self.parts.score[self.rows])

    @cached_property
    def inclusion(self) -> np.ndarray:
        return self.design.inclusion(self.parts)[self.rows]

    @cached_property
    def weight(self) -> np.ndarray:
        return 1 / (self.inclusion * self.parts.copies[self.rows])

    @property
    def unit(self) -> np.ndarray:
        """The distinct input of every drawn row."""
        return self.parts.unit[self.parts.example[self.rows]]


def folds(parts: Population, seed: int) -> np.ndarray:
    """Return the fold of every example, as places in `FOLDS`; copies of an input share one."""
    chosen = split(parts.unit, SHARES, np.random.default_rng(seed))
    return np.select([np.isin(parts.unit, fold) for fold in chosen[:2]], [0, 1], 2)


def reaches(
    parts: Population, design: Design, masks: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return by selection the largest weight that a sample of each input can have in it."""
    return {name: design.reach(parts, mask) for name, mask in masks.items()}


def calibrate(
    ablated: Ablated,
    fold: np.ndarray,
    selections: Selections,
    alpha: float,
    *,
    scale: str | None = None,
    by_part: bool = True,
    promises: Collection[str] | None = None,
) -> Bars:
    """Return bars of level 1 - alpha from the inputs whose fold is calibration, with a scale that
    the tuning inputs choose (or the column named).

    `promises` names the selections that bars are made for, by default all that the tuning inputs
    say can be calibrated; a group's stratum is always one of them."""
    parts = ablated.parts
    strata = ["all", *(f"site {name}" for name in parts.names)]
    every = selections.masks(parts, None if promises is None else {*strata, *promises})
    names = list(every)
    caps = {
        name: _cap(parts, every[name], ranks(parts, name), ablated.design, fold, alpha)
        for name in names
        if not _stratum(name) and name not in LISTS
    }
    lists = [name for name in LISTS if name in names and every[name].any()]
    enough = math.ceil(round(1 / alpha, 9)) - 1 <= len(np.unique(parts.unit[fold == 1]))
    kept = [name for name in names if _stratum(name) or caps.get(name, 0) > 0]
    kept += lists if enough else []
    caps = {name: cap for name, cap in caps.items() if cap > 0}
    usable = promised(selections, parts, kept, caps)
    drawn = fold[parts.example[ablated.rows]]
    chosen = choose_scale(_tuning(ablated, drawn == 0, usable), alpha, name=scale, by_part=by_part)
    calibrating = drawn == 1
    residual = residuals(ablated, chosen)
    tails = {
        name: _tail(ablated, mask, calibrating, residual, fold == 1, alpha)
        for name, mask in usable.items()
    }
    return Bars(
        alpha,
        chosen,
        selections,
        tails,
        {name: _together(ablated, every[name], calibrating, residual, alpha) for name in lists},
        caps=caps,
        distinct=len(np.unique(parts.unit[fold == 1])),
        tuned=len(np.unique(parts.unit[fold == 0])),
        shared=bool(parts.shared),
    )


def residuals(ablated: Ablated, scale: Scale) -> np.ndarray:
    """Return |exact - score| / scale of the drawn rows; infinite where the scale is zero and the
    score is wrong.
    """
    widths = scale.of(ablated.parts)[ablated.rows]
    error = ablated.error
    return np.where(
        widths > 0, error / np.where(widths > 0, widths, 1.0), np.where(error > 0, np.inf, 0.0)
    )


def largest_residuals(
    ablated: Ablated, mask: np.ndarray, chosen: np.ndarray, residual: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the examples that have drawn rows in a selection among those `chosen`, and the largest
    residual of each there.
    """
    rows = np.flatnonzero(chosen & mask[ablated.rows])
    examples, place = np.unique(ablated.parts.example[ablated.rows[rows]], return_inverse=True)
    largest = np.zeros(len(examples))
    np.maximum.at(largest, place, residual[rows])
    return examples, largest


def _stratum(name: str) -> bool:
    return name == "all" or name.startswith("site ")


def _cap(
    parts: Population,
    mask: np.ndarray,
    rank: np.ndarray,
    plan: Design,
    fold: np.ndarray,
    alpha: float,
) -> int:
    """Return how many rows of a selection, the first by `rank`, an input may have for the
    calibration inputs to give them finite bars: `alpha (weight + rows) >= reach` of the rows that
    are left, as far as the scores of the tuning inputs tell; 0 where no number will do.

    The weight of the calibration rows is taken two standard errors below its estimate."""
    tuning = np.flatnonzero(mask & (fold == 0)[parts.example])
    copies = np.bincount(parts.unit)[parts.unit]
    known = np.unique(parts.unit[fold == 0])
    units, calibrating = len(known), len(np.unique(parts.unit[fold == 1]))
    if units < 2 or not len(tuning):
        return 0
    most = cap = int(rank[tuning].max()) + 1
    while cap > 0:
        rows = tuning[rank[tuning] < cap]
        count = np.bincount(parts.example[rows], minlength=parts.examples)
        each = np.bincount(parts.unit, weights=count / copies)[known]
        spread = each.std(ddof=1) * math.sqrt(calibrating + calibrating**2 / units)
        weight = calibrating * each.mean() - 2 * spread
        present = count > 0
        count, reach = count[present], plan.reach(parts, rows)[present]
        if (alpha * (weight + count) - reach).min() >= -1e-9:
            beyond = math.floor(alpha * weight / (float((reach / count).max()) - alpha) + 1e-9)
            return max(cap, beyond) if cap == most else cap
        cap = min(cap - 1, cap - cap // 8)
    return 0


def _tuning(ablated: Ablated, chosen: np.ndarray, masks: Mapping[str, np.ndarray]) -> Tuning:
    rows = ablated.rows[chosen]
    return Tuning(
        ablated.parts.take(rows),
        ablated.error[chosen],
        np.abs(ablated.exact[chosen]),
        ablated.weight[chosen],
        {name: mask[rows] for name, mask in masks.items()},
    )


def _tail(
    ablated: Ablated,
    mask: np.ndarray,
    calibrating: np.ndarray,
    residual: np.ndarray,
    examples: np.ndarray,
    alpha: float,
) -> Tail:
    inside = calibrating & mask[ablated.rows]
    selected = mask & examples[ablated.parts.example]
    total = float((1 / ablated.parts.copies[selected]).sum())
    inputs = len(np.unique(ablated.parts.unit[ablated.parts.example[selected]]))
    return tail(residual[inside], ablated.weight[inside], alpha, total, inputs)


def _together(
    ablated: Ablated,
    mask: np.ndarray,
    calibrating: np.ndarray,
    residual: np.ndarray,
    alpha: float,
) -> Tail:
    examples, largest = largest_residuals(ablated, mask, calibrating, residual)
    unit = ablated.parts.unit
    weight = 1 / np.bincount(unit)[unit[examples]]
    inputs = len(np.unique(unit[examples]))
    return tail(largest, weight, alpha, float(inputs), inputs)
