"""Which parts a promise is made for: sites, the top of each, and the lists that are read.

A selection is a rule that is fixed by the scores of the inputs that tune and never by an exact
effect, so that what it selects in a calibration input and in a new one is exchangeable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from assay.audit.population import Population

TOP = 0.05
"""The share of parts that the selection TOP_BY_SCORE holds on the inputs that tune."""
TOP_BY_SCORE = "top 5 % by score"
SITE_TOP = 0.1
"""The share of a site's parts that "the largest of the site" holds."""


@dataclass(frozen=True)
class Selections:
    """Rules that select rows of a population by their scores.

    `listed` are the `count` parts with the largest mean |score| over the tuning inputs, as (group,
    flat index); `level` and `levels` the |score| above which a part is in the top 5 % of all, and
    in the top tenth of its group. With `merged` all groups are one stratum."""

    count: int
    listed: tuple[tuple[str, int], ...]
    level: float
    levels: Mapping[str, float]
    merged: bool = False

    def masks(
        self, parts: Population, names: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Return by selection which rows it holds: every stratum ("site NAME", or "all" when
        merged), "top of NAME", `TOP_BY_SCORE`, "largest" (of their input) and "listed"; of all
        selections or the named ones.
        """
        size = np.abs(parts.score)
        rules: dict[str, Callable[[], np.ndarray]] = {}
        if self.merged:
            rules["all"] = lambda: np.ones(len(parts), dtype=bool)
        for code, name in enumerate(parts.names):
            if not self.merged:
                rules[f"site {name}"] = partial(np.equal, parts.group, code)
            if name in self.levels:
                rules[f"top of {name}"] = partial(self._top_of, parts, code)
        rules[TOP_BY_SCORE] = lambda: size >= self.level
        rules["largest"] = lambda: parts.rank < self.count
        rules["listed"] = lambda: self.in_list(parts)
        return {name: rule() for name, rule in rules.items() if names is None or name in names}

    def _top_of(self, parts: Population, code: int) -> np.ndarray:
        return (parts.group == code) & (np.abs(parts.score) >= self.levels[parts.names[code]])

    def in_list(self, parts: Population) -> np.ndarray:
        """Return which rows are listed parts."""
        codes = {name: code for code, name in enumerate(parts.names)}
        found = np.zeros(len(parts), dtype=bool)
        for name in {name for name, _ in self.listed}:
            places = [place for group, place in self.listed if group == name]
            found |= (parts.group == codes[name]) & np.isin(parts.place, places)
        return found


def select(
    parts: Population, tuning: np.ndarray, count: int, *, merged: bool = False
) -> Selections:
    """Return the selections that the scores of the `tuning` inputs (a mask of examples) fix, with
    lists of `count` parts; without a tuning input all inputs do.
    """
    chosen = tuning if tuning.any() else np.ones(parts.examples, dtype=bool)
    rows = chosen[parts.example]
    size = np.abs(parts.score)
    tuned = size[rows]
    levels = {}
    for code, name in enumerate(parts.names):
        own = tuned[parts.group[rows] == code]
        if len(own):
            levels[name] = float(np.quantile(own, 1 - SITE_TOP))
    listed = largest_parts(parts, rows, count)
    return Selections(
        min(count, len(listed)),
        listed,
        float(np.quantile(tuned, 1 - TOP)) if len(tuned) else np.inf,
        levels,
        merged,
    )


def largest_parts(parts: Population, rows: np.ndarray, count: int) -> tuple[tuple[str, int], ...]:
    """Return the parts with the largest sum of |score| over rows, as (group, flat index)."""
    keys, first, place = np.unique(parts.part[rows], return_index=True, return_inverse=True)
    total = np.bincount(place, weights=np.abs(parts.score[rows]), minlength=len(keys))
    order = np.argsort(-total, kind="stable")[:count]
    groups, places = parts.group[rows][first[order]], parts.place[rows][first[order]]
    return tuple(
        (parts.names[group], int(place)) for group, place in zip(groups, places, strict=True)
    )
