"""Prediction-powered intervals: totals of effects and recall, from all estimates and a random
sample of exact ablations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from scipy import stats

from assay.attribution.scores import Scores
from assay.audit.audit import Audit
from assay.errors import InputError


@dataclass(frozen=True)
class Interval:
    """An estimate with an interval that holds with probability at least 1 - alpha as the number of
    inputs grows.

    `sampled_only` is the width that the sampled exact effects give alone, without any estimate (NaN
    where it is not defined)."""

    estimate: float
    low: float
    high: float
    alpha: float
    inputs: int
    sampled_only: float = math.nan

    @property
    def width(self) -> float:
        return self.high - self.low

    def covers(self, value: float) -> bool:
        return self.low <= value <= self.high


def mean_interval(
    values: np.ndarray,
    alpha: float = 0.1,
    *,
    predicted: np.ndarray | None = None,
    more: np.ndarray | None = None,
) -> Interval:
    """Return Student's interval for the mean of independent values; with predictions, the
    prediction-powered one.

    `predicted` are predictions of the same values and `more` predictions of others that nobody
    measured. The estimate is `mean(values) + w (mean(more) - mean(predicted))` (arXiv 2301.09633),
    with the weight w that makes the variance `var(values - w predicted) / n + w^2 var(more) / N`
    smallest (arXiv 2311.01453).

    Raises InputError with fewer than two values, or predictions without further ones.
    """
    values = np.asarray(values, float)
    n = len(values)
    if not 0 < alpha < 1:
        raise InputError(f"alpha must be between 0 and 1, got {alpha}")
    if n < 2:
        raise InputError(f"an interval needs at least two inputs, got {n}")
    if (predicted is None) != (more is None):
        raise InputError(
            "predictions of the measured values and of further ones go together: give both or none"
        )
    reach = float(stats.t.ppf(1 - alpha / 2, n - 1))
    alone = 2 * reach * float(values.std(ddof=1)) / math.sqrt(n)
    if predicted is None or more is None or len(more) < 2 or np.ptp(predicted) == 0:
        middle = float(values.mean())
        return Interval(middle, middle - alone / 2, middle + alone / 2, alpha, n, alone)
    predicted, more = np.asarray(predicted, float), np.asarray(more, float)
    if len(predicted) != n:
        raise InputError(f"there are {n} measured values and {len(predicted)} predictions of them")
    covariance = np.cov(values, predicted)
    weight = float(np.clip(covariance[0, 1] / ((1 + n / len(more)) * covariance[1, 1]), 0.0, 1.0))
    middle = float(values.mean() + weight * (more.mean() - predicted.mean()))
    variance = float((values - weight * predicted).var(ddof=1)) / n + weight**2 * float(
        more.var(ddof=1)
    ) / len(more)
    half = reach * math.sqrt(variance)
    return Interval(middle, middle - half, middle + half, alpha, n, alone)


def ratio_interval(above: np.ndarray, below: np.ndarray, alpha: float = 0.1) -> Interval:
    """Return Fieller's interval for mean(above) / mean(below), clipped to [0, 1], over independent
    inputs.

    It holds every ratio r for which a test of `mean(above - r below) = 0` is not significant; where
    the denominator is not itself clear of zero that is all of [0, 1]."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    n = len(above)
    if n < 2 or len(below) != n:
        raise InputError(
            f"a ratio needs two arrays of one length, at least 2; got {n} and {len(below)}"
        )
    share = float(stats.t.ppf(1 - alpha / 2, n - 1)) ** 2 / n
    (s_aa, s_ab), (_, s_bb) = np.cov(above, below)
    a, b = above.mean(), below.mean()
    ratio = float(a / b) if b != 0 else math.nan
    lead, middle, rest = b * b - share * s_bb, a * b - share * s_ab, a * a - share * s_aa
    if lead <= 0:
        return Interval(ratio, 0.0, 1.0, alpha, n)
    root = math.sqrt(max(middle * middle - lead * rest, 0.0))
    low, high = ((middle - root) / lead, (middle + root) / lead)
    return Interval(ratio, float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1)), alpha, n)


def totals(
    audit: Audit, alpha: float | None = None, *, more: Scores | None = None
) -> dict[str, Interval]:
    """Return the sum of all effects F(ones) - F(gate at 0) in each group, and in "all" of them, as
    a mean over inputs.

    An input's total is the sum of its estimates plus its correction, the sampled `exact - estimate`
    scaled up to all its active parts: unbiased because the sample is random. The interval is
    Student's over inputs; scores of further inputs (`more`), of the same method and without exact
    ablations, make it narrower.

    Raises InputError for gates that are shared over the batch: their sample is the same in every
    input."""
    rows = _rows(audit)
    level = audit.bars.alpha if alpha is None else alpha
    further = (
        None
        if more is None
        else {name: values.flatten(1).sum(1).cpu().numpy() for name, values in more.values.items()}
    )
    found: dict[str, Interval] = {}
    predicted = _predicted(audit)
    for name in (*predicted, "all"):
        chosen = rows if name == "all" else rows.filter(pl.col("group") == name)
        known = _of(predicted, name)
        correction = _per_input(
            chosen, pl.col("weight") * (pl.col("exact") - pl.col("estimate")), len(known)
        )
        alone = _per_input(chosen, pl.col("weight") * pl.col("exact"), len(known))
        others = None if further is None else _of(further, name)
        interval = mean_interval(
            known + correction, level, predicted=None if others is None else known, more=others
        )
        sampled = mean_interval(alone, level)
        found[name] = Interval(
            interval.estimate, interval.low, interval.high, level, interval.inputs, sampled.width
        )
    return found


def top_recall(audit: Audit, k: int, alpha: float | None = None) -> Interval:
    """Return how many of the effects as large as an input's k-th largest |score| are among its k
    largest |scores|.

    That is a ratio of two totals over parts, of `|exact| >= t and |score| >= t` and of `|exact| >=
    t`, with t the k-th largest |score| of the input. Each is predicted by the scores, which know it
    for all parts, and corrected by the random sample. Where no sampled effect contradicts the
    scores the corrections say nothing of their own error; the interval is then the exact binomial
    one for one sampled large effect an input, none of them missed."""
    rows, parts = _rows(audit), _active_scores(audit)
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    sizes = [np.sort(np.abs(entry))[::-1] for entry in parts]
    fewest = min(map(len, sizes))
    if fewest < k:
        raise InputError(f"k={k} is more than the {fewest} active parts of an input")
    level = pl.Series("level", [float(entry[k - 1]) * (1 - 1e-9) for entry in sizes])
    kept = np.array(
        [float((entry >= limit).sum()) for entry, limit in zip(sizes, level, strict=True)]
    )
    rows = rows.join(pl.DataFrame({"example": range(len(sizes)), "level": level}), on="example")
    found, large = (
        pl.col("estimate").abs() >= pl.col("level"),
        pl.col("exact").abs() >= pl.col("level"),
    )
    above = kept + _per_input(
        rows, pl.col("weight") * ((found & large).cast(float) - found.cast(float)), len(kept)
    )
    below = kept + _per_input(
        rows, pl.col("weight") * (large.cast(float) - found.cast(float)), len(kept)
    )
    chance = audit.bars.alpha if alpha is None else alpha
    interval = ratio_interval(above, below, chance)
    if rows.filter(found != large).height == 0:
        trials = rows.filter(large)["example"].n_unique()
        return replace(interval, low=(chance / 2) ** (1 / trials) if trials else 0.0, high=1.0)
    return interval


def _rows(audit: Audit) -> pl.DataFrame:
    """Return the sampled rows with the number of active parts that each stands for."""
    mechanisms = audit.scores.mechanisms
    if shared := [name for name, group in mechanisms.groups.items() if not group.per_example]:
        raise InputError(
            f"the gates of {', '.join(shared)} are shared over the batch; intervals over inputs"
            " need a sample for each"
        )
    active = {
        name: (norm.flatten(1) > 0).sum(1).tolist() for name, norm in mechanisms.norms().items()
    }
    counts = pl.DataFrame(
        {
            "group": [name for name, entry in active.items() for _ in entry],
            "example": [place for entry in active.values() for place in range(len(entry))],
            "active": [count for entry in active.values() for count in entry],
        }
    )
    rows = audit.table.join(counts, on=["group", "example"])
    return rows.with_columns((pl.col("active") / pl.len().over("group", "example")).alias("weight"))


def _predicted(audit: Audit) -> dict[str, np.ndarray]:
    norms = audit.scores.mechanisms.norms()
    return {
        name: values.masked_fill(norms[name] == 0, 0.0).flatten(1).sum(1).cpu().numpy()
        for name, values in audit.scores.values.items()
    }


def _of(values: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return np.sum(list(values.values()), axis=0) if name == "all" else values[name]


def _active_scores(audit: Audit) -> list[np.ndarray]:
    norms = audit.scores.mechanisms.norms()
    pairs = [
        (values.flatten(1).cpu(), norms[name].flatten(1).cpu() > 0)
        for name, values in audit.scores.values.items()
    ]
    return [
        np.concatenate([values[row][mask[row]].numpy() for values, mask in pairs])
        for row in range(len(pairs[0][0]))
    ]


def _per_input(rows: pl.DataFrame, value: pl.Expr, inputs: int) -> np.ndarray:
    found = np.zeros(inputs)
    sums = rows.group_by("example").agg(value.sum().alias("sum"))
    found[sums["example"].to_numpy()] = sums["sum"].to_numpy()
    return found
