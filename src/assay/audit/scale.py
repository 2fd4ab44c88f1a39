"""The scale of the error bars: chosen on inputs that do not calibrate, so that it can make bars
narrow and never make them wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from assay.audit.population import Population
from assay.errors import InputError

CONSTANT = "constant"
FLOORS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9)
"""Quantiles of a scale that are tried as its floor."""
PRIOR = 0.5
"""Inputs' worth of the mean ratio that a part's own ratio is shrunk with."""
MARK_UP = 20.0
"""By how much each share of missed large effects beyond alpha marks a scale up."""
HURDLE = 0.15
"""By how much factors by part must narrow the bars: with few inputs they can do so by chance."""


@dataclass(frozen=True)
class Scale:
    """The width of a bar before it is calibrated: `max(column, floor)`, times the factor of a part
    where it has one: by group, the flat indices of parts (ascending) and their factors.

    A part's factor is the mean ratio of |error| to scale that it had on the tuning inputs, against
    that of all parts: the same head at the same position errs alike from input to input."""

    name: str = CONSTANT
    floor: float = 0.0
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def by_part(self) -> bool:
        return bool(self.factors)

    @property
    def words(self) -> str:
        return f"{self.name}, by part" if self.by_part else self.name

    def of(self, parts: Population) -> np.ndarray:
        """Return the scale of every row."""
        base = column(parts, self.name)
        base = base if self.name == CONSTANT else np.maximum(base, self.floor)
        for name, (places, factors) in self.factors.items():
            rows = parts.rows_of(name)
            if len(rows) and len(places):
                found = np.minimum(np.searchsorted(places, parts.place[rows]), len(places) - 1)
                known = places[found] == parts.place[rows]
                base[rows] = base[rows] * np.where(known, factors[found], 1.0)
        return base


@dataclass(frozen=True)
class Tuning:
    """Ablated rows of the inputs that tune: the sampled rows of a population, their |error|,
    |exact| and weight, and which selections they are in.
    """

    parts: Population
    error: np.ndarray
    exact: np.ndarray
    weight: np.ndarray
    masks: Mapping[str, np.ndarray]

    def take(self, rows: np.ndarray) -> Tuning:
        return Tuning(
            self.parts.take(rows),
            self.error[rows],
            self.exact[rows],
            self.weight[rows],
            {name: mask[rows] for name, mask in self.masks.items()},
        )


def column(parts: Population, name: str) -> np.ndarray:
    """Return a scale by name: "constant", "magnitude" (|score|) or a further one.

    Raises InputError for an unknown name.
    """
    if name == CONSTANT:
        return np.ones(len(parts))
    if name == "magnitude":
        return np.abs(parts.score)
    if name not in parts.scales:
        known = ", ".join((CONSTANT, "magnitude", *parts.scales))
        raise InputError(f"no scale {name!r}; known: {known}")
    return parts.scales[name]


def choose_scale(
    tuning: Tuning, alpha: float, *, name: str | None = None, by_part: bool = True
) -> Scale:
    """Return the scale with the narrowest mean bar on the tuning inputs, among all columns (or the
    one named), floors, and with or without factors by part.

    Each candidate is fitted on one half of the inputs and measured on the other. Scales whose bars
    would cover fewer than 1 - alpha of the largest exact effects there are marked down: bars that
    are narrow on average because they miss what matters are no use."""
    names = [name] if name else [CONSTANT, "magnitude", *tuning.parts.scales]
    inputs = np.unique(tuning.parts.unit[tuning.parts.example])
    plain = Scale() if name is None else Scale(name, _floor(tuning.parts, name, 0.5))
    if len(inputs) < 2 or not (tuning.error > 0).any():
        return plain
    early = np.isin(tuning.parts.unit[tuning.parts.example], inputs[::2])
    halves = (tuning.take(np.flatnonzero(early)), tuning.take(np.flatnonzero(~early)))
    best, narrowest = plain, np.inf
    for candidate in names:
        for level in FLOORS if candidate != CONSTANT else (0.0,):
            for parted in (False, True) if by_part else (False,):
                whole, one, two = (
                    _fitted(part, candidate, level, by_part=parted) for part in (tuning, *halves)
                )
                if whole is None or one is None or two is None:
                    continue
                widths = np.empty(len(tuning.error))
                widths[~early], widths[early] = one.of(halves[1].parts), two.of(halves[0].parts)
                cost = _cost(widths, tuning, alpha) * (1 + HURDLE * parted)
                if cost < narrowest:
                    best, narrowest = whole, cost
    return best


def _floor(parts: Population, name: str, level: float) -> float:
    values = column(parts, name)
    return float(np.quantile(values, level)) if name != CONSTANT and len(values) else 0.0


def _fitted(tuning: Tuning, name: str, level: float, *, by_part: bool) -> Scale | None:
    """Return the scale with a floor at a quantile of the tuning rows; None where that is not
    positive.
    """
    floor = _floor(tuning.parts, name, level)
    if name != CONSTANT and not floor > 0:
        return None
    plain = Scale(name, floor)
    if not by_part:
        return plain
    ratio = tuning.error / plain.of(tuning.parts)
    mean = float(np.average(ratio, weights=tuning.weight))
    if not mean > 0:
        return None
    _, first, which = np.unique(tuning.parts.part, return_index=True, return_inverse=True)
    total = np.bincount(which, weights=tuning.weight * ratio)
    count = np.bincount(which, weights=tuning.weight)
    factors = (total + PRIOR * mean) / (count + PRIOR) / mean
    group, place = tuning.parts.group[first], tuning.parts.place[first]
    order = np.lexsort((place, group))
    return Scale(
        name,
        floor,
        {
            tuning.parts.names[code]: (place[rows], factors[rows])
            for code in np.unique(group)
            for rows in [order[group[order] == code]]
        },
    )


def _cost(widths: np.ndarray, tuning: Tuning, alpha: float) -> float:
    """Return the mean width of the bars that the rows themselves would calibrate, marked up where
    they miss the largest exact effects.
    """
    ratio = tuning.error / widths
    factor = np.zeros(len(ratio))
    for mask in tuning.masks.values():
        if mask.any():
            level = _quantile(ratio[mask], tuning.weight[mask], 1 - alpha)
            factor[mask] = np.maximum(factor[mask], level)
    half = factor * widths
    large = tuning.exact >= _quantile(tuning.exact, tuning.weight, 0.95)
    covered = np.average((tuning.error <= half)[large], weights=tuning.weight[large])
    short = max(0.0, (1 - alpha) - float(covered))
    return float(np.average(half, weights=tuning.weight)) * (1 + MARK_UP * short)


def _quantile(values: np.ndarray, weight: np.ndarray, level: float) -> float:
    """Return the smallest value with at least a share `level` of the weight at or below it."""
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(weight[order])
    place = np.searchsorted(cumulative, level * cumulative[-1] * (1 - 1e-12))
    return float(values[order[min(place, len(order) - 1)]])
