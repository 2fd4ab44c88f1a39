"""Bars on inputs that were not there when they were calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from torch import Tensor

from assay.attribution.scores import Scores
from assay.audit.bars import Bars
from assay.audit.calibration import Ablated, reaches
from assay.audit.coverage import Coverage
from assay.audit.effects import ExactEffects
from assay.audit.held_out import held_out
from assay.audit.population import population
from assay.audit.sampling import design
from assay.errors import InputError


@dataclass(frozen=True)
class Applied:
    """Bars on new inputs: `table` has the largest |scores| of each input (example, group, part,
    score, low, high, together_low, together_high, exact).

    [low, high] is a part's bar; the bars [together_low, together_high] hold at once for all rows of
    an input. `exact` is the exact effect where it was computed, and `promises` the coverage
    measured there: it falls short where the new inputs are unlike those that calibrated."""

    table: pl.DataFrame
    promises: Mapping[str, Coverage]
    guarantee: str

    def summary(self) -> dict[str, Any]:
        """Return the numbers that `--json` shows."""
        return {
            "guarantee": self.guarantee,
            "promises": {name: found.to_dict() for name, found in self.promises.items()},
        }


def apply_bars(
    bars: Bars,
    scores: Scores,
    *,
    exact: int | None,
    scales: Mapping[str, Mapping[str, Tensor]] | None = None,
    check: bool = True,
    seed: int = 0,
) -> Applied:
    """Put calibrated bars on the scores of new inputs, which are to be computed by the same method.

    `exact` is the number of ablations of an input that the bars were calibrated with (None: all
    parts). With `check` as many are spent on every new input, to measure whether the promise holds
    there. Raises InputError when the groups differ, or a scale of the bars is not given."""
    parts = population(scores, scales)
    wanted = {name.removeprefix("site ") for name in bars.tails if name.startswith("site ")}
    if missing := wanted - set(parts.names):
        raise InputError(f"the bars are for groups {', '.join(sorted(missing))}, which are absent")
    if bars.shared:
        raise InputError(
            "the gates are shared over the batch: bars hold for the parts that were ablated, and"
            " new inputs need an audit of their own"
        )
    plan = design(parts, bars.selections, exact)
    half = bars.half_widths(parts, reaches(parts, plan, bars.selections.masks(parts)))
    together = (
        bars.together_half_widths(parts, "largest")
        if "largest" in bars.together
        else np.full(len(parts), np.inf)
    )
    truth = np.full(len(parts), np.nan)
    promises: Mapping[str, Coverage] = {}
    if check:
        rows = plan.draw(parts, np.random.default_rng(seed))
        found = ExactEffects(scores.mechanisms).of(parts, rows)
        truth[rows] = np.abs(found) if scores.unsigned else found
        everyone = np.ones(parts.examples, dtype=bool)
        promises = held_out(Ablated(parts, plan, rows, truth[rows]), bars, everyone)[1]
    shown = np.flatnonzero(parts.rank < max(bars.selections.count, 1))
    shown = shown[np.lexsort((parts.rank[shown], parts.example[shown]))]
    names = [parts.names[code] for code in parts.group[shown]]
    places = [
        parts.index(np.array([row]), name)[0].tolist()
        for row, name in zip(shown, names, strict=True)
    ]
    score = parts.score[shown]
    table = pl.DataFrame(
        {
            "example": parts.example[shown],
            "group": names,
            "part": [
                scores.mechanisms.describe(name, tuple(place))
                for name, place in zip(names, places, strict=True)
            ],
            "score": score,
            "low": score - half[shown],
            "high": score + half[shown],
            "together_low": score - together[shown],
            "together_high": score + together[shown],
            "exact": truth[shown],
        }
    )
    return Applied(table, promises, bars.guarantee)
