"""Error bars whose promise is made for what is read: conformal control of the share of bars that
miss, for every selection at once.

Exchangeable are the inputs, each with all its parts, its scores and its random sample: those that
calibrate with a new one. A selection is fixed by the scores of other inputs (`selections`), so the
numbers of selected bars that miss are exchangeable too, and their mean is controlled.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from assay.audit.population import Population
from assay.audit.scale import Scale
from assay.audit.selections import TOP, TOP_BY_SCORE, Selections
from assay.errors import InputError

LISTS = ("largest", "listed")
"""The selections that simultaneous bars are made for."""


@dataclass(frozen=True)
class Tail:
    """The largest calibration residuals of one selection, distinct and descending, with the weight
    of the residuals `above` each; `weight` is that of all selected calibration rows, `inputs` the
    number of calibration inputs that have one.
    """

    residuals: np.ndarray
    above: np.ndarray
    weight: float
    inputs: int

    def quantile(self, alpha: float, count: np.ndarray, reach: np.ndarray) -> np.ndarray:
        """Return, for new inputs with `count` selected rows, the smallest q at which the share of
        selected rows with a residual above q is controlled at alpha.

        With L the weight of calibration residuals above q, q is the smallest residual with `L <=
        alpha (weight + count) - reach`, infinite where there is none: then E[missed rows] <= alpha
        E[selected rows] in a new input (conformal risk control, arXiv 2208.02814). `reach` is the
        largest weight that the sampled rows of the new input can have. One row of weight 1 an input
        gives the ceil((n + 1)(1 - alpha))-th smallest residual."""
        room = alpha * (self.weight + count) - reach
        if not len(self.residuals):
            return np.where(room >= 0, 0.0, math.inf)
        place = np.searchsorted(self.above, room + 1e-9, side="right") - 1
        return np.where(place >= 0, self.residuals[np.maximum(place, 0)], math.inf)


def tail(
    residuals: np.ndarray, weight: np.ndarray, alpha: float, total: float, inputs: int
) -> Tail:
    """Return what quantiles at alpha need of weighted residuals; `total` is the weight of all
    selected rows, sampled or not.
    """
    order = np.argsort(-residuals, kind="stable")
    values, first = np.unique(-residuals[order], return_index=True)
    cumulative = np.concatenate([[0.0], np.cumsum(weight[order])])
    above = cumulative[first]
    kept = above <= alpha * total + 1e-9
    if len(values) and kept.all():  # every residual may be exceeded
        values, above = np.append(values, 0.0), np.append(above, cumulative[-1])
        kept = above <= alpha * total + 1e-9
    return Tail(-values[kept], above[kept], total, inputs)


@dataclass(frozen=True)
class Bars:
    """Half-widths `max over selections of quantile * scale` around a score.

    `tails` has the calibration residuals of every selection, `together` the largest residual of
    each calibration input within a list. `caps` bounds how many rows of an input a selection above
    a |score| holds: few calibration inputs support few. `distinct` and `tuned` count the distinct
    inputs that calibrated and tuned; `shared` says that some gates are shared over the batch."""

    alpha: float
    scale: Scale
    selections: Selections
    tails: Mapping[str, Tail]
    together: Mapping[str, Tail]
    caps: Mapping[str, int]
    distinct: int
    tuned: int
    shared: bool = False

    def masks(self, parts: Population) -> dict[str, np.ndarray]:
        """Return by selection which rows have its promise."""
        return promised(self.selections, parts, self.tails, self.caps)

    def half_widths(self, parts: Population, reach: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the half-width of every row's bar; infinite where there is none.

        `reach` holds by selection the largest weight of a sample in each input."""
        factor = np.zeros(len(parts))
        covered = np.zeros(len(parts), dtype=bool)
        for name, mask in self.masks(parts).items():
            count = parts.per_input(mask.astype(float))
            quantile = self.tails[name].quantile(self.alpha, count, reach[name])
            factor = np.where(mask, np.maximum(factor, quantile[parts.example]), factor)
            covered |= mask
        return np.where(covered, _times(factor, self.scale.of(parts)), math.inf)

    def together_half_widths(self, parts: Population, name: str) -> np.ndarray:
        """Return half-widths of bars that hold at once for all rows of a list ("largest" or
        "listed") of an input; infinite for rows outside it.
        """
        if name not in self.together:
            raise InputError(f"no list {name!r}; the lists are {', '.join(LISTS)}")
        quantile = float(self.together[name].quantile(self.alpha, np.ones(1), np.ones(1))[0])
        inside = self.selections.masks(parts)[name]
        factor = np.where(inside, quantile, math.inf)
        return _times(factor, self.scale.of(parts))

    @property
    def least(self) -> int:
        """The least number of calibration inputs that a bar needs."""
        return math.ceil(round(1 / self.alpha, 9)) - 1

    @property
    def guarantee(self) -> str:
        """The promise in words, with the selections that it holds for."""
        level, count = f"{1 - self.alpha:.0%}", self.selections.count
        if self.distinct < self.least:
            return (
                f"no bar: {level} needs at least {self.least} calibration inputs, and there are"
                f" {self.distinct}"
            )
        where = ["all parts" if self.selections.merged else "all parts of each group"]
        if any(name.startswith("top of") for name in self.tails):
            where.append("the largest tenth of a group by |score|")
        if TOP_BY_SCORE in self.tails:
            where.append(
                f"the parts with |score| of at least {self.selections.level:.4g} (the top {TOP:.0%}"
                f" of the {self.tuned} inputs that tuned the bars; at most the"
                f" {self.caps[TOP_BY_SCORE]} largest of an input)"
            )
        where += [f"the {count} largest |scores| of an input"] * ("largest" in self.tails)
        where += [f"the {count} listed parts"] * ("listed" in self.tails)
        text = (
            f"coverage >= {level}: on average over new inputs drawn like the {self.distinct} that"
            f" calibrated, at least {level} of the bars contain the exact effect. This holds for"
            f" {_joined(where)}"
        )
        if self.together:
            text += (
                f". The simultaneous bars of all {count} parts of a list hold at once with"
                f" probability at least {level}"
            )
        if self.shared:
            text += ". For gates shared over the batch only parts that were ablated have a bar"
        return text + ". Nothing is promised for parts selected by their exact effect"


def promised(
    selections: Selections,
    parts: Population,
    names: Collection[str],
    caps: Mapping[str, int],
) -> dict[str, np.ndarray]:
    """Return the selections of these names, each held to its cap of rows of an input: the
    largest.
    """
    found = {}
    for name, mask in selections.masks(parts, names).items():
        if name in caps:
            mask = mask & (ranks(parts, name) < caps[name])
        found[name] = mask
    return found


def ranks(parts: Population, name: str) -> np.ndarray:
    """Return the ranks that the cap of a selection counts by."""
    return parts.rank if name == TOP_BY_SCORE else parts.rank_in_group


def conformal_quantile(residuals: np.ndarray, alpha: float) -> float:
    """Return the ceil((n + 1)(1 - alpha))-th smallest residual; infinite when n < ceil(1 /
    alpha) - 1 (arXiv 1604.04173).
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha must be between 0 and 1, got {alpha}")
    residuals = np.asarray(residuals, float)
    count = float(len(residuals))
    found = tail(residuals, np.ones(len(residuals)), alpha, count, len(residuals))
    return float(found.quantile(alpha, np.ones(1), np.ones(1))[0])


def split(
    inputs: np.ndarray, shares: tuple[float, ...], generator: np.random.Generator
) -> list[np.ndarray]:
    """Split the distinct inputs at random into folds of the given shares; no input is in two
    folds.
    """
    distinct = generator.permutation(np.unique(inputs))
    ends = np.round(np.cumsum(shares) / sum(shares) * len(distinct)).astype(int)
    return list(np.split(distinct, ends[:-1]))


def _times(factor: np.ndarray, scale: np.ndarray) -> np.ndarray:
    # An infinite bar stays infinite where the scale is zero.
    return np.where(np.isinf(factor), math.inf, np.where(np.isinf(factor), 0, factor) * scale)


def _joined(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"
