"""Summaries of what drives attribution patching: shares of its variance, trends with the layer,
whether it peaks in the norm, and what a threshold on it misses.

Sheet: features, "The error-node study"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy import stats

from assay.audit.drivers import FACTORS


def shares_of_variance(table: pl.DataFrame, by: str) -> pl.DataFrame:
    """Return what drives |atp| within each value of the column `by`: the share of the variance of
    log |atp| = log norm + log gradient norm + log |cosine| that each term has.

    The share of a term is cov(term, log |atp|) / var(log |atp|), so that the three add up to one;
    it is negative where a term works against the others. Rows with atp = 0 are left out."""
    rows = []
    for (key,), part in table.group_by([by], maintain_order=True):
        some = part.filter(pl.col("atp") != 0)
        logs = {name: np.log(np.abs(some[name].to_numpy())) for name in FACTORS}
        total = sum(logs.values(), np.zeros(len(some)))
        spread = float(np.var(total)) if len(some) > 1 else 0.0
        shares = {
            name: float(np.cov(log, total, bias=True)[0, 1]) / spread if spread > 0 else None
            for name, log in logs.items()
        }
        rows.append({by: key, **shares, "sd_of_log_atp": spread**0.5, "n": len(some)})
    schema = dict.fromkeys((*FACTORS, "sd_of_log_atp"), pl.Float64)
    return pl.DataFrame(rows, schema_overrides=schema, infer_schema_length=None)


def rank_with_layer(table: pl.DataFrame, columns: Sequence[str], by: str) -> pl.DataFrame:
    """Return the Spearman correlation of columns with the layer, within each value of `by`; null
    where there is one layer only.
    """
    rows = []
    for (key,), part in table.group_by([by], maintain_order=True):
        found = {
            name: _spearman(part["layer"].to_numpy(), part[name].abs().to_numpy())
            for name in columns
        }
        rows.append({by: key, **found, "layers": part["layer"].n_unique(), "n": len(part)})
    schema = dict.fromkeys(columns, pl.Float64)
    return pl.DataFrame(rows, schema_overrides=schema, infer_schema_length=None)


def _spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(stats.spearmanr(first, second).statistic)


@dataclass(frozen=True)
class Shape:
    """Whether |atp| rises, falls, or peaks with the norm: the slopes of log |atp| in log norm below
    and above a break, each with its 95 % interval.

    verdict: "peaked" where it rises before the break and falls behind it, "rising" or "falling"
    where neither slope contradicts it and one is certain, otherwise "undecided"."""

    break_at: float
    below: tuple[float, float, float]
    above: tuple[float, float, float]
    verdict: str
    n: int


def shape_of(table: pl.DataFrame, *, draws: int = 200, seed: int = 0) -> Shape | None:
    """Test whether |atp| as a function of the norm is peaked or monotone, by two lines (Simonsohn
    2018) with a bootstrap over examples; None for less than 20 rows or less than 2 examples.

    The break is the norm, between the 20th and the 80th percentile, at which two lines fit best, on
    the even examples; the slopes and their intervals are those of the odd ones, so that the choice
    of the break does not make a slope."""
    some = table.filter((pl.col("atp") != 0) & (pl.col("norm") > 0))
    x, y = (np.log(some[name].abs().to_numpy()) for name in ("norm", "atp"))
    example = some["example"].to_numpy()
    chosen, rest = example % 2 == 0, example % 2 == 1
    if len(some) < 20 or min(chosen.sum(), rest.sum()) < 10 or np.ptp(x) == 0:
        return None
    places = np.quantile(x[chosen], np.linspace(0.2, 0.8, 13))
    place = float(min(places, key=lambda c: _misfit(x[chosen], y[chosen], c)))
    x, y, example = x[rest], y[rest], example[rest]
    names = np.unique(example)
    if len(names) < 2:
        return None
    rows = {name: np.flatnonzero(example == name) for name in names}
    chance = np.random.default_rng(seed)
    drawn = np.array(
        [
            _slopes(x[again], y[again], place)
            for again in (
                np.concatenate([rows[name] for name in chance.choice(names, len(names))])
                for _ in range(draws)
            )
        ]
    )
    point = _slopes(x, y, place)
    ends, some = np.full((2, 2), np.nan), ~np.isnan(drawn).all(axis=0)
    ends[:, some] = np.nanquantile(drawn[:, some], [0.025, 0.975], axis=0)
    below, above = (
        (float(point[side]), float(ends[0, side]), float(ends[1, side])) for side in (0, 1)
    )
    return Shape(float(np.exp(place)), below, above, _verdict(below, above), len(x))


def _verdict(below: tuple[float, float, float], above: tuple[float, float, float]) -> str:
    if below[1] > 0 and above[2] < 0:
        return "peaked"
    if (below[1] > 0 and above[2] >= 0) or (above[1] > 0 and below[2] >= 0):
        return "rising"
    if (below[2] < 0 and above[1] <= 0) or (above[2] < 0 and below[1] <= 0):
        return "falling"
    return "undecided"


def _misfit(x: np.ndarray, y: np.ndarray, place: float) -> float:
    columns = np.stack([np.ones_like(x), np.minimum(x - place, 0), np.maximum(x - place, 0)], 1)
    rest = y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
    return float(rest @ rest)


def _slopes(x: np.ndarray, y: np.ndarray, place: float) -> np.ndarray:
    found = []
    for side in (x <= place, x > place):
        flat = side.sum() < 3 or np.ptp(x[side]) == 0
        found.append(np.nan if flat else float(np.polyfit(x[side], y[side], 1)[0]))
    return np.array(found)


def relative_sizes(table: pl.DataFrame, kind: str) -> pl.DataFrame:
    """Return how large the norms and gradients of one kind are beside those of the other kinds, by
    layer: ratios of geometric means.
    """
    logs = table.filter((pl.col("norm") > 0) & (pl.col("gradient_norm") > 0)).with_columns(
        (pl.col("kind") == kind).alias("own"),
        *(pl.col(name).log() for name in ("norm", "gradient_norm")),
    )
    # Without an order polars adds in any, and the last bits change from call to call.
    found = logs.group_by("layer", "own", maintain_order=True).agg(
        *(pl.col(name).mean() for name in ("norm", "gradient_norm"))
    )
    own, others = (found.filter(pl.col("own") == side) for side in (True, False))
    return (
        own.join(others, on="layer", suffix="_others")
        .select(
            "layer",
            *(
                (pl.col(name) - pl.col(f"{name}_others")).exp().alias(f"{name}_ratio")
                for name in ("norm", "gradient_norm")
            ),
        )
        .sort("layer")
    )


def missed_by_threshold(table: pl.DataFrame, threshold: float) -> pl.DataFrame:
    """Return the rows with |atp| under the threshold and |exact| at or above it, largest first,
    with the reason: which of norm, gradient norm and |cosine| is small there.

    Ranks are those among all rows of the table. "large gradient, small difference" and the reverse
    are differences of a quarter of all ranks or more; then "small cosine" is |cosine| among the
    lowest quarter."""
    count = max(table.height, 1)
    ranked = table.with_columns(
        *(
            (pl.col(name).abs().rank() / count).alias(f"{name}_rank")
            for name in ("norm", "gradient_norm", "cosine")
        )
    )
    gap = pl.col("gradient_norm_rank") - pl.col("norm_rank")
    reason = (
        pl.when(gap >= 0.25)
        .then(pl.lit("large gradient, small difference"))
        .when(gap <= -0.25)
        .then(pl.lit("small gradient, large difference"))
        .when(pl.col("cosine_rank") <= 0.25)
        .then(pl.lit("small cosine"))
        .otherwise(pl.lit("none of them"))
    )
    hidden = (pl.col("atp").abs() < threshold) & (pl.col("exact").abs() >= threshold)
    return (
        ranked.with_columns(reason.alias("reason"))
        .filter(hidden)
        .sort(pl.col("exact").abs(), descending=True)
    )
