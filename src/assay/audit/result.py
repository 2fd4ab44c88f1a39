"""The result of an audit: agreement, bars, and the means of what is listed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import polars as pl
from torch import Tensor

from assay.attribution.scores import Scores
from assay.audit.agreement import Agreement
from assay.audit.bars import Bars
from assay.audit.calibration import FOLDS, Ablated, calibrate, folds, reaches
from assay.audit.coverage import Coverage
from assay.audit.effects import ExactEffects
from assay.audit.held_out import held_out
from assay.audit.lists import largest_table
from assay.audit.means import mean_effects
from assay.audit.population import Population
from assay.audit.selections import Selections
from assay.charts.tables import notebook_html, text_table
from assay.errors import InputError


@dataclass(frozen=True)
class Options:
    """The level of the bars, the seed of the folds and that of the lists, the ablations of an input
    (None: all of its parts), and the named scale.
    """

    alpha: float
    seed: int
    listing: int
    exact: int | None
    scale: str | None = None


@dataclass(frozen=True)
class Audit:
    """How far to trust scores: `table` has a row for every ablated part (example, group, part,
    index, estimate, exact, first, inclusion, fold, lower, upper).

    `inclusion` is the probability with which a row was sampled: the parts that are listed and the
    largest of every input are ablated for certain. `pooled` is the agreement over all rows,
    `by_group` and `by_example` within groups and within inputs, each row weighted by 1 / inclusion.
    `promises` are the measured coverages of the bars by selection, on inputs that neither tuned the
    bars nor calibrated them, leaving out groups where the estimate is exact up to rounding;
    `constant_width` is the width there of a constant conformal bar around the first-order estimate.
    """

    scores: Scores
    table: pl.DataFrame
    pooled: Agreement
    by_group: pl.DataFrame
    by_example: pl.DataFrame
    bars: Bars
    promises: Mapping[str, Coverage]
    constant_width: float
    effects: ExactEffects
    cpu_seconds: float
    parts: Population = field(repr=False)
    ablated: Ablated = field(repr=False)
    selections: Selections = field(repr=False)
    options: Options = field(repr=False)

    @property
    def coverage(self) -> float:
        """The measured coverage of all bars; NaN where it has no support."""
        share = self.promises["all"].share
        return math.nan if share is None else share

    @property
    def width(self) -> float:
        """The mean width of all bars on the inputs where coverage is measured; NaN where there are
        none.
        """
        width = self.promises["all"].width
        return math.nan if width is None else width

    @property
    def held_out(self) -> int:
        """The number of rows that coverage is measured on."""
        return self.promises["all"].rows

    def at_level(self, alpha: float, *, seed: int | None = None) -> Audit:
        """Return the audit with bars of another level, or with other random folds of the inputs,
        from the same ablations and with the same lists.

        With other folds the inputs that fixed the lists can calibrate: what is measured on all
        parts is comparable, and the promise for lists and largest scores is that of the first
        folds."""
        options = replace(self.options, alpha=alpha)
        options = options if seed is None else replace(options, seed=seed)
        return replace(self, options=options, **barred(self, options))

    def half_widths(self, together: str | None = None) -> dict[str, Tensor]:
        """Return the half-width of every part's bar, (examples, *axes) by group: infinite where
        there is no bar, 0 for inactive parts.

        With `together` ("largest" or "listed") the bars hold at once for the parts of that list of
        an input, and the others have none. Large groups are sparse (`assay.core.values`)."""
        bars, bound = self.bars, self.ablated.parts
        if together is not None:
            found = bars.together_half_widths(bound, together)
        else:
            reach = reaches(bound, self.ablated.design, bars.masks(bound))
            found = bars.half_widths(bound, reach)
        if len(bound) == len(self.parts):
            return self.parts.values(found)
        every = np.full(len(self.parts), math.inf)
        every[self._bound_rows] = found
        return self.parts.values(every)

    @cached_property
    def _bound_rows(self) -> np.ndarray:
        """The rows of all parts that can have a bar."""
        bound = self.ablated.parts
        size = int(self.parts.part.max()) + 1
        keys, known = (entry.example * size + entry.part for entry in (self.parts, bound))
        return np.flatnonzero(np.isin(keys, known))

    def largest_of(self, example: int) -> pl.DataFrame:
        """Return the largest |scores| of one input, as many as the lists have; see
        `largest_table`. A part's own bar holds on average over the list, and its simultaneous bar
        for each of its places. Raises InputError when there is no such input.
        """
        size = len(self.scores.mechanisms.batch)
        if not 0 <= example < size:
            raise InputError(f"example must lie between 0 and {size - 1}, got {example}")
        parts = self.parts
        rows = np.flatnonzero(
            (parts.example == example) & (parts.rank < max(self.selections.count, 1))
        )
        truth = np.full(len(parts), math.nan)
        truth[self.ablated_rows] = self.ablated.exact
        half = parts.column(self.half_widths())
        together = (
            parts.column(self.half_widths("largest"))
            if "largest" in self.bars.together
            else np.full(len(parts), math.inf)
        )
        return largest_table(parts, rows, half, together, truth)

    def top(self, count: int = 20, *, exact: bool = True) -> pl.DataFrame:
        """Return the parts with the largest mean |score| over the inputs that tuned, with their
        mean exact `effect` over all other inputs and its interval [low, high]; see `mean_effects`.

        With `exact` the listed parts are ablated in all of these inputs."""
        return mean_effects(
            self.parts,
            count,
            self.effects,
            folds(self.parts, self.options.listing) == 0,
            self.bars.alpha,
            exact=exact,
            sampled=(
                self.ablated_rows,
                self.table["exact"].to_numpy(),
                self.table["inclusion"].to_numpy(),
            ),
            unsigned=self.scores.unsigned,
        )

    @cached_property
    def ablated_rows(self) -> np.ndarray:
        """The rows of `parts` that the table is about, in its order."""
        rows = self.ablated.rows
        return rows if len(self.ablated.parts) == len(self.parts) else self._bound_rows[rows]

    def to_polars(self) -> pl.DataFrame:
        """Return the ablated rows."""
        return self.table

    def summary(self) -> dict[str, Any]:
        """Return the numbers that a report and `--json` show."""
        medians = {
            key: self.by_example[key].drop_nans().median()
            for key in ("pearson", "spearman", "slope", "sign", "mae", "recall")
        }
        return {
            "method": self.scores.method,
            "estimand": self.scores.estimand,
            **self.scores.signs,
            "agreement": self.pooled.to_dict(),
            "per_example_median": {
                key: float(value) for key, value in medians.items() if isinstance(value, float)
            },
            "exact_ablations": self.table.height,
            "bars": {
                "alpha": self.bars.alpha,
                "scale": self.bars.scale.words,
                "coverage": self.promises["all"].share,
                "mean_width": self.promises["all"].width,
                "constant_first_order_width": self.constant_width,
                "held_out": self.held_out,
                "promises": {name: found.to_dict() for name, found in self.promises.items()},
                "guarantee": self.bars.guarantee,
            },
        }

    def plot(self) -> Any:
        """Return the picture of estimate against exact effect, an Altair chart."""
        from assay.charts import scatter_identity

        return scatter_identity(self.table, "exact", "estimate", colour="group")

    def __repr__(self) -> str:
        return f"{self.scores.method} {self._words()}\n{text_table(self._shown())}"

    def _repr_html_(self) -> str:
        words = f"<p><b>{self.scores.method}</b> {escape(self._words())}</p>"
        return words + notebook_html(self._shown())

    def _words(self) -> str:
        return (
            f"against {self.table.height} exact ablations: r"
            f" {self.pooled.pearson:.3f}, slope {self.pooled.slope:.3f}, sign"
            f" {self.pooled.sign:.3f}. {self.promises['all'].sentence}."
            f" Promise: {self.bars.guarantee}. {self.scores.signs['score']}"
        )

    def _shown(self) -> pl.DataFrame:
        return self.top(20, exact=False).drop("group", "index", "reason")


def barred(found: Audit, options: Options) -> dict[str, Any]:
    """Return the fields of an audit that depend on the level and on the folds."""
    ablated, selections, alpha = found.ablated, found.selections, options.alpha
    fold = folds(ablated.parts, options.seed)
    bars = calibrate(ablated, fold, selections, alpha, scale=options.scale)
    half, promises = held_out(ablated, bars, fold == 2)
    first_score = np.zeros(len(ablated.parts))
    first_score[ablated.rows] = found.table["first"].to_numpy()  # it is read nowhere else
    first = replace(ablated, parts=replace(ablated.parts, score=first_score))
    plain = calibrate(first, fold, selections, alpha, scale="constant", by_part=False, promises=())
    constant = held_out(first, plain, fold == 2, only_all=True)[1]["all"].width
    drawn = half[ablated.rows]
    estimate = found.table["estimate"].to_numpy()
    table = found.table.with_columns(
        pl.Series("fold", np.array(FOLDS)[fold[ablated.parts.example[ablated.rows]]]),
        pl.Series("lower", estimate - drawn),
        pl.Series("upper", estimate + drawn),
    )
    return {
        "table": table,
        "bars": bars,
        "promises": promises,
        "constant_width": math.nan if constant is None else constant,
    }
