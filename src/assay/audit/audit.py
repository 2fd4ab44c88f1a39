"""The audit of an attribution: exact ablations on a random sample, agreement, and a bar for
every part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from assay.attribution.exact import ablate
from assay.attribution.gradient import Gradient
from assay.attribution.scores import Scores
from assay.audit.agreement import Agreement, agreement, agreement_table
from assay.audit.bars import Bars, Rows, calibrate, split
from assay.audit.sampling import sample
from assay.charts.tables import notebook_html
from assay.core.values import at
from assay.errors import InputError


@dataclass(frozen=True)
class Audit:
    """How far to trust scores: `table` has a row for every ablated part (example, group, part,
    estimate, exact, fold, lower, upper).

    `pooled` is the agreement over all rows, `by_group` and `by_example` within groups and within
    inputs. `coverage` and `width` of the bars are measured on inputs that neither chose the scale
    nor calibrated, leaving out groups where the estimate is exact up to rounding; `constant_width`
    is the width there of a constant conformal bar around the first-order estimate."""

    scores: Scores
    table: pl.DataFrame
    pooled: Agreement
    by_group: pl.DataFrame
    by_example: pl.DataFrame
    bars: Bars
    coverage: float
    width: float
    constant_width: float
    held_out: int
    cpu_seconds: float
    scales: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    sampled: _Sampled = field(repr=False)

    def at_level(self, alpha: float, *, seed: int | None = None) -> Audit:
        """Return the audit with bars of another level, or with other random folds of the inputs,
        from the same ablations.
        """
        sampled = self.sampled if seed is None else replace(self.sampled, seed=seed)
        return replace(self, sampled=sampled, **_barred(self.scores, sampled, alpha))

    def half_widths(self) -> dict[str, Tensor]:
        """Return the half-width of every part's bar, (examples, *axes) by group; infinite where
        there is no bar.
        """
        found = {}
        for name, values in self.scores.values.items():
            scale = (
                self.scales[self.bars.scale][name]
                if self.bars.scale != "constant"
                else torch.ones_like(values)
            )
            found[name] = self.bars.quantile.get(name, math.inf) * scale.clamp_min(self.bars.floor)
        return found

    def top(self, count: int = 20) -> pl.DataFrame:
        """Return the parts with the largest mean |score|, the mean half-width of their bars, and,
        over the `sampled` inputs in which a part was ablated, the mean score and the mean exact
        effect there."""
        bars = {name: values.mean(0) for name, values in self.half_widths().items()}
        exact = self.table.group_by("group", "part").agg(
            pl.col("estimate").mean().alias("score_sampled"),
            pl.col("exact").mean().alias("exact_sampled"),
            pl.len().alias("sampled"),
        )
        top = self.scores.top(count).with_columns(
            pl.struct("group", "index")
            .map_elements(
                lambda row: float(bars[row["group"]][tuple(row["index"])]), return_dtype=pl.Float64
            )
            .alias("bar")
        )
        return top.join(exact, on=["group", "part"], how="left", maintain_order="left")

    def to_polars(self) -> pl.DataFrame:
        """Return the ablated rows."""
        return self.table

    def summary(self) -> dict[str, Any]:
        """Return the numbers that a report and `--json` show."""
        return {
            "method": self.scores.method,
            "estimand": self.scores.estimand,
            "agreement": self.pooled.to_dict(),
            "per_example_median": {
                key: float(value)
                for key in ("pearson", "spearman", "slope", "sign", "mae", "recall")
                if isinstance(value := self.by_example[key].drop_nans().median(), float)
            },
            "bars": {
                "alpha": self.bars.alpha,
                "scale": self.bars.scale,
                "coverage": self.coverage,
                "mean_width": self.width,
                "constant_first_order_width": self.constant_width,
                "held_out": self.held_out,
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
            f" {self.pooled.sign:.3f}; {self.bars.guarantee}; measured {self.coverage:.3f}</p>"
        )
        return line + notebook_html(self.top(20).drop("group", "index", "n", "size"))


def audit(
    scores: Scores,
    *,
    exact: int = 64,
    alpha: float = 0.1,
    seed: int = 0,
    against: Scores | None = None,
    scales: Mapping[str, Mapping[str, Tensor]] | None = None,
    scale: str | None = None,
    merge: bool = False,
    budget: int | None = None,
) -> Audit:
    """Ablate `exact` parts of every input exactly and say how far to trust `scores`.

    The scale of the bars is chosen on a quarter of the inputs among a constant, |score|, the norm
    of the part, |score - other score| when `against` is given, and further `scales` (examples,
    *axes by group; a certificate, say), or named by `scale`; half of the inputs calibrate; coverage
    and width are measured on the last quarter. `merge` gives all groups one stratum. Scores without
    a sign (AtP*) are compared with the sizes of the exact effects.

    Raises InputError when `exact` is smaller than the number of groups.
    """
    began = time.process_time()
    drawn = sample(scores.mechanisms, exact, torch.Generator().manual_seed(seed))
    candidates = _scales(scores, against, scales)
    first = scores if scores.method == Gradient.name else Gradient().scores(scores.mechanisms)
    table = _ablated(scores, first, candidates, drawn, budget)
    if table.height == 0:
        raise InputError("no active part to ablate: every part is zero on this batch")
    if scores.unsigned:
        table = table.with_columns(pl.col("exact", "first").abs())
    stratum = np.full(table.height, "all") if merge else table["group"].to_numpy().astype(str)
    named = {name: table[f"scale:{name}"].to_numpy() for name in candidates}
    inputs, truth = table["example"].to_numpy(), table["exact"].to_numpy()
    rows = Rows(table["estimate"].to_numpy(), truth, inputs, stratum, named)
    plain = Rows(table["first"].to_numpy(), truth, inputs, stratum, {})
    sampled = _Sampled(table.drop(f"scale:{name}" for name in candidates), rows, plain, seed, scale)
    return Audit(
        scores=scores,
        pooled=agreement(sampled.rows.estimate, truth),
        by_group=agreement_table(table, "group"),
        by_example=agreement_table(table, "example"),
        scales=candidates,
        sampled=sampled,
        **_barred(scores, sampled, alpha),
        cpu_seconds=time.process_time() - began,
    )


@dataclass(frozen=True)
class _Sampled:
    table: pl.DataFrame
    rows: Rows
    plain: Rows
    seed: int
    scale: str | None


def _barred(scores: Scores, sampled: _Sampled, alpha: float) -> dict[str, Any]:
    """Return the fields of an audit that depend on the level and on the folds."""
    rows, chance = sampled.rows, np.random.default_rng(sampled.seed)
    folds = [np.isin(rows.input, fold) for fold in split(rows.input, (0.25, 0.5, 0.25), chance)]
    bars = calibrate(
        rows.take(folds[1]), alpha, chance, tuning=rows.take(folds[0]), scale=sampled.scale
    )
    constant = calibrate(sampled.plain.take(folds[1]), alpha, chance)
    half = bars.half_width(rows.stratum, rows.scales.get(bars.scale, np.ones(len(rows))))
    error = np.abs(rows.exact - rows.estimate)
    # In strata where the estimate is exact up to rounding, covering proves nothing.
    wrong = np.unique(rows.stratum[error > 1e-12 * np.abs(rows.exact).max()])
    held = folds[2] & np.isin(rows.stratum, wrong)
    # The guarantee is about a random part of an input and stratum: inputs with more ablated parts
    # must not count more.
    _, place, count = np.unique(
        [rows.input[held].astype(str), rows.stratum[held]],
        axis=1,
        return_inverse=True,
        return_counts=True,
    )
    weight = 1 / count[place] if held.any() else np.ones(0)
    flat = constant.half_width(rows.stratum[held], np.ones(held.sum()))
    constant_width = float(2 * np.average(flat, weights=weight)) if held.any() else math.nan
    if set(rows.stratum) == {"all"}:
        names = scores.mechanisms.groups
        bars = replace(
            bars,
            quantile=dict.fromkeys(names, bars.quantile.get("all", math.inf)),
            points=dict.fromkeys(names, bars.points.get("all", 0)),
        )
    table = sampled.table.with_columns(
        pl.Series("fold", np.select(folds[:2], ["tuning", "calibration"], "test")),
        pl.Series("lower", rows.estimate - half),
        pl.Series("upper", rows.estimate + half),
    )
    return {
        "table": table,
        "bars": bars,
        "coverage": (
            float(np.average((error <= half)[held], weights=weight)) if held.any() else math.nan
        ),
        "width": float(2 * np.average(half[held], weights=weight)) if held.any() else math.nan,
        "constant_width": constant_width,
        "held_out": int(held.sum()),
    }


def _scales(
    scores: Scores, against: Scores | None, extra: Mapping[str, Mapping[str, Tensor]] | None
) -> dict[str, Mapping[str, Tensor]]:
    candidates: dict[str, Mapping[str, Tensor]] = {
        "magnitude": {name: values.abs() for name, values in scores.values.items()},
        "step": scores.mechanisms.norms(),
    }
    if against is not None:
        candidates["disagreement"] = {
            name: (values - against.values[name]).abs() for name, values in scores.values.items()
        }
    for key, values in (extra or {}).items():
        if missing := set(scores.values) - set(values):
            raise InputError(f"scale {key!r} lacks the groups {', '.join(sorted(missing))}")
        candidates[key] = values
    return candidates


def _ablated(
    scores: Scores,
    first: Scores,
    scales: Mapping[str, Mapping[str, Tensor]],
    drawn: Mapping[str, tuple[Tensor, Tensor]],
    budget: int | None,
) -> pl.DataFrame:
    mechanisms = scores.mechanisms
    record = cache(mechanisms.record)
    frames = []
    for name, (index, mask) in drawn.items():
        places = index if index.ndim == 3 else index[:, None].expand(-1, len(mechanisms.batch), -1)
        effects = ablate(mechanisms, name, index, record=record, budget=budget).cpu()
        rows, examples = mask.nonzero(as_tuple=True)
        chosen = places[rows, examples].tolist()
        columns: dict[str, Any] = {
            "example": examples.numpy(),
            "group": [name] * len(chosen),
            "part": [mechanisms.describe(name, tuple(place)) for place in chosen],
            "index": chosen,
            "estimate": _at(scores.values[name], places)[mask].numpy(),
            "exact": effects.double()[mask].numpy(),
            "first": _at(first.values[name], places)[mask].numpy(),
        }
        for key, values in scales.items():
            columns[f"scale:{key}"] = _at(values[name], places)[mask].numpy()
        frames.append(
            pl.DataFrame(
                columns,
                schema_overrides={
                    "index": pl.List(pl.Int64),
                    "group": pl.String,
                    "part": pl.String,
                },
            )
        )
    return pl.concat(frames)


def _at(values: Tensor, places: Tensor) -> Tensor:
    return at(values.detach().double().cpu(), places)


Scores.auditor = audit
