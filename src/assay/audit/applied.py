"""Bars on inputs that were not there when they were calibrated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import norm
from torch import Tensor

from assay.attribution.scores import Scores
from assay.audit.bars import Bars
from assay.audit.calibration import Ablated, reaches
from assay.audit.coverage import LEVEL, Coverage
from assay.audit.effects import ExactEffects
from assay.audit.held_out import BY_EXACT, held_out
from assay.audit.lists import largest_table
from assay.audit.population import population
from assay.audit.sampling import design
from assay.errors import InputError

TAIL = (1 - LEVEL) / 2


@dataclass(frozen=True)
class Applied:
    """Bars on new inputs: `table` has the largest |scores| of each input, see `largest_table`.

    `promises` is the coverage that was measured on them: it falls short where the new inputs are
    unlike those that calibrated, of which there were `calibrated`. For the selections `unpromised`
    it is measured and nothing was promised."""

    table: pl.DataFrame
    promises: Mapping[str, Coverage]
    guarantee: str
    calibrated: int
    unpromised: frozenset[str] = frozenset({BY_EXACT})

    def summary(self) -> dict[str, Any]:
        """Return the numbers that `--json` shows."""
        return {
            "guarantee": self.guarantee,
            "verdict": self.verdict,
            "promises": {name: found.to_dict() for name, found in self.promises.items()},
        }

    @property
    def broken(self) -> list[str]:
        """The selections whose measured coverage lies below the promise by more than chance.

        The promise is about a random calibration, so chance is that of the new inputs and that of
        those that calibrated; the selections together are called broken by chance with probability
        2.5 % at most (Bonferroni's bound)."""
        tested = {
            name: (found.share, found.high, found)
            for name, found in self.promises.items()
            if name not in self.unpromised and found.share is not None and found.high is not None
        }
        strict = norm.isf(TAIL / max(len(tested), 1)) / norm.isf(TAIL)
        return [
            name
            for name, (share, high, found) in tested.items()
            if share + strict * math.sqrt(1 + found.inputs / self.calibrated) * (high - share)
            < found.nominal
        ]

    @property
    def verdict(self) -> str:
        """Whether the promise holds on the new inputs, in words."""
        if not self.promises:
            return "the promise was not checked on these inputs"
        if not self.broken:
            return "nothing measured on these inputs speaks against the promise"
        return (
            "these inputs are unlike those that calibrated: fewer bars than promised contain the"
            f" exact effect in {'; '.join(self.broken)}"
        )


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
    wanted |= {name for name, _ in bars.selections.listed} | set(bars.scale.factors)
    if missing := wanted - set(parts.names):
        raise InputError(f"the bars are for groups {', '.join(sorted(missing))}, which are absent")
    if bars.shared:
        raise InputError(
            "the gates are shared over the batch: bars hold for the parts that were ablated, and"
            " new inputs need an audit of their own"
        )
    plan = design(parts, bars.selections, exact)
    half = bars.half_widths(parts, reaches(parts, plan, bars.masks(parts)))
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
    table = largest_table(parts, shown, half, together, truth)
    kept = {"all", *bars.tails, *(f"{name}, together" for name in bars.together)}
    unpromised = frozenset({BY_EXACT, *promises}) - kept
    return Applied(table, promises, bars.guarantee, bars.distinct, unpromised)
