"""The audit of an attribution: exact ablations of what is read and of a random sample, agreement,
and a bar for every part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from torch import Tensor

from assay.attribution.gradient import Gradient
from assay.attribution.scores import Scores
from assay.audit.agreement import Agreement, agreement, agreement_table
from assay.audit.bars import Bars
from assay.audit.calibration import FOLDS, Ablated, calibrate, folds, reaches
from assay.audit.coverage import Coverage
from assay.audit.effects import ExactEffects
from assay.audit.held_out import held_out
from assay.audit.means import mean_effects
from assay.audit.population import Population, population
from assay.audit.sampling import design, list_length, shared_parts
from assay.audit.selections import Selections, select
from assay.charts.tables import notebook_html
from assay.core.values import add
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
        """
        options = replace(self.options, alpha=alpha)
        options = options if seed is None else replace(options, seed=seed)
        return replace(self, options=options, **_barred(self, options))

    def half_widths(self, together: str | None = None) -> dict[str, Tensor]:
        """Return the half-width of every part's bar, (examples, *axes) by group: infinite where
        there is no bar, 0 for inactive parts.

        With `together` ("largest" or "listed") the bars hold at once for the parts of that list of
        an input, and the others have none. Large groups are sparse (`assay.core.values`)."""
        bars, bound = self.bars, self.ablated.parts
        if together is not None:
            found = bars.together_half_widths(bound, together)
        else:
            reach = reaches(bound, self.ablated.design, self.selections.masks(bound))
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
        """Return the largest |scores| of one input, as many as the lists have, with the bars
        [low, high] that hold for each and those that hold for all at once.
        """
        halves = self.half_widths()
        joint = self.half_widths("largest") if "largest" in self.bars.together else None
        rows = np.flatnonzero(
            (self.parts.example == example) & (self.parts.rank < max(self.selections.count, 1))
        )
        rows = rows[np.argsort(self.parts.rank[rows])]
        known = dict(zip(self.ablated_rows.tolist(), self.ablated.exact.tolist(), strict=True))
        shown = self.parts.take(rows)
        names = [shown.names[code] for code in shown.group]
        half = shown.column(halves)
        together = shown.column(joint) if joint is not None else np.full(len(rows), np.inf)
        return pl.DataFrame(
            {
                "example": shown.example,
                "part": [
                    shown.mechanisms.describe(
                        name, tuple(shown.index(np.array([place]), name)[0].tolist())
                    )
                    for place, name in enumerate(names)
                ],
                "score": shown.score,
                "low": shown.score - half,
                "high": shown.score + half,
                "together_low": shown.score - together,
                "together_high": shown.score + together,
                "exact": [known.get(row) for row in rows.tolist()],
            },
            schema_overrides={"exact": pl.Float64},
        )

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

    def _repr_html_(self) -> str:
        line = (
            f"<p><b>{self.scores.method}</b> against {self.table.height} exact ablations: r"
            f" {self.pooled.pearson:.3f}, slope {self.pooled.slope:.3f}, sign"
            f" {self.pooled.sign:.3f}. {self.promises['all'].sentence}."
            f" Promise: {self.bars.guarantee}. {self.scores.signs['score']}</p>"
        )
        shown = self.top(20, exact=False).drop("group", "index", "reason")
        return line + notebook_html(shown)


def audit(
    scores: Scores,
    *,
    exact: int = 64,
    top: int = 20,
    alpha: float = 0.1,
    seed: int = 0,
    against: Scores | None = None,
    scales: Mapping[str, Mapping[str, Tensor]] | None = None,
    scale: str | None = None,
    merge: bool = False,
    budget: int | None = None,
    effects: ExactEffects | Scores | None = None,
) -> Audit:
    """Ablate `exact` parts of every input exactly and say how far to trust `scores`.

    A quarter of the inputs tunes: from its scores come the list of the `top` parts by mean |score|,
    and from its ablations the scale of the bars, among a constant, |score|, the norm of the part,
    |score - other score| when `against` is given, and further `scales` (examples, *axes by group; a
    certificate, say), or the one named by `scale`. Half of the inputs calibrate; coverage and width
    are measured on the last quarter. Of the ablations the listed parts and the `top` largest scores
    of an input come first (fewer of them where `exact` is small), then random parts of every group.
    `merge` gives all groups one stratum. `effects` shares exact effects between audits: with exact
    scores of everything all parts are used and nothing is ablated. Scores without a sign (AtP*) are
    compared with the sizes of the exact effects.

    Raises InputError when `exact` is smaller than the number of groups."""
    began = time.process_time()
    mechanisms = scores.mechanisms
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}")
    if not 0 < alpha < 1:
        raise InputError(f"alpha must be between 0 and 1, got {alpha}")
    if isinstance(effects, Scores):
        effects = ExactEffects(mechanisms, everything=effects, budget=budget)
    known = effects or ExactEffects(mechanisms, budget=budget)
    if known.mechanisms is not mechanisms:
        raise InputError("effects must be those of the mechanisms that the scores are of")
    passes = None if known.complete else exact
    length = list_length(mechanisms, exact, top) if passes else top
    parts = population(scores, _scales(scores, against, scales))
    if not len(parts):
        raise InputError("no active part to ablate: every part is zero on this batch")
    chance = np.random.default_rng(seed)
    selections = select(parts, folds(parts, seed) == 0, length, merged=merge)
    kept, shared = shared_parts(parts, selections, passes, chance)
    bound = parts.take(np.flatnonzero(kept))
    plan = design(bound, selections, passes)
    rows = plan.draw(bound, chance)
    truth = known.of(bound, rows)
    ablated = Ablated(bound, plan, rows, np.abs(truth) if scores.unsigned else truth)
    table = _table(ablated, shared[kept], _first(scores, against), unsigned=scores.unsigned)
    weight = 1 / table["inclusion"].to_numpy()
    options = Options(alpha, seed, seed, passes, scale)
    found = Audit(
        scores=scores,
        table=table,
        pooled=agreement(table["estimate"].to_numpy(), ablated.exact, weight=weight),
        by_group=agreement_table(table, "group"),
        by_example=agreement_table(table, "example"),
        bars=None,  # type: ignore[arg-type]
        promises={},
        constant_width=math.nan,
        effects=known,
        cpu_seconds=0.0,
        parts=parts,
        ablated=ablated,
        selections=selections,
        options=options,
    )
    barred = _barred(found, options)
    return replace(found, **barred, cpu_seconds=time.process_time() - began)


def _barred(found: Audit, options: Options) -> dict[str, Any]:
    """Return the fields of an audit that depend on the level and on the folds."""
    ablated, selections, alpha = found.ablated, found.selections, options.alpha
    fold = folds(ablated.parts, options.seed)
    bars = calibrate(ablated, fold, selections, alpha, scale=options.scale)
    half, promises = held_out(ablated, bars, fold == 2)
    first_score = np.zeros(len(ablated.parts))
    first_score[ablated.rows] = found.table["first"].to_numpy()  # it is read nowhere else
    first = replace(ablated, parts=replace(ablated.parts, score=first_score))
    plain = calibrate(first, fold, selections, alpha, scale="constant", by_part=False, promises=())
    constant = held_out(first, plain, fold == 2)[1]["all"].width
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


def _scales(
    scores: Scores, against: Scores | None, extra: Mapping[str, Mapping[str, Tensor]] | None
) -> dict[str, Mapping[str, Tensor]]:
    """Return the further columns that may scale the bars."""
    found: dict[str, Mapping[str, Tensor]] = {}
    if against is not None:
        found["disagreement"] = disagreement(scores, against)
    for key, values in (extra or {}).items():
        if missing := set(scores.values) - set(values):
            raise InputError(f"scale {key!r} lacks the groups {', '.join(sorted(missing))}")
        found[key] = values
    return found


def disagreement(scores: Scores, against: Scores) -> dict[str, Tensor]:
    """Return |score - other score| of every part by group; InputError when the groups differ."""
    if set(scores.values) != set(against.values):
        raise InputError("against must score the same groups of parts")
    return {
        name: add(values, -against.values[name]).abs() for name, values in scores.values.items()
    }


def _first(scores: Scores, against: Scores | None) -> Scores:
    for found in (scores, against):
        if found is not None and found.method == Gradient.name:
            return found
    return Gradient().scores(scores.mechanisms)


def _table(ablated: Ablated, shared: np.ndarray, first: Scores, *, unsigned: bool) -> pl.DataFrame:
    """Return a row for every ablated part; `shared` are the inclusion probabilities of parts whose
    gates are shared over the batch.
    """
    parts, rows = ablated.parts, ablated.rows
    index = [
        tuple(place)
        for name in parts.names
        for place in parts.index(rows[parts.group[rows] == parts.names.index(name)], name).tolist()
    ]
    groups = [parts.names[code] for code in parts.group[rows]]
    first_order = parts.take(rows).column(first.values)
    return pl.DataFrame(
        {
            "example": parts.example[rows],
            "group": groups,
            "part": [
                parts.mechanisms.describe(name, place)
                for name, place in zip(groups, index, strict=True)
            ],
            "index": [list(place) for place in index],
            "estimate": parts.score[rows],
            "exact": ablated.exact,
            "first": np.abs(first_order) if unsigned else first_order,
            "inclusion": ablated.inclusion * shared[rows],
        },
        schema={
            "example": pl.Int64,
            "group": pl.String,
            "part": pl.String,
            "index": pl.List(pl.Int64),
            "estimate": pl.Float64,
            "exact": pl.Float64,
            "first": pl.Float64,
            "inclusion": pl.Float64,
        },
    )


Scores.auditor = audit
