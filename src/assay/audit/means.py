"""The mean exact effect of the parts that a list shows, with confidence intervals."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch

from assay.attribution.scores import Scores
from assay.audit.calibration import folds
from assay.audit.effects import ExactEffects
from assay.audit.intervals import LEAST, mean_interval
from assay.audit.population import Population, population
from assay.audit.selections import largest_parts
from assay.core.values import unravel

SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "group": pl.String,
    "part": pl.String,
    "index": pl.List(pl.Int64),
    "effect": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "score": pl.Float64,
    "inputs": pl.Int64,
    "ablated": pl.Int64,
    "reason": pl.String,
}


def mean_effects(
    parts: Population,
    count: int,
    effects: ExactEffects,
    choosing: np.ndarray,
    alpha: float = 0.1,
    *,
    exact: bool = True,
    sampled: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    unsigned: bool = False,
) -> pl.DataFrame:
    """Return the `count` parts with the largest mean |score| over the inputs that choose (a mask of
    examples), with the mean exact effect over all other inputs and its 1 - alpha interval.

    The list and its means come from different inputs: the largest of many means, chosen and
    estimated on the same inputs, would be too large. A part counts with effect 0 in inputs in which
    it is inactive, and copies of an input count once. With `exact` the listed parts are ablated in
    every other input and the interval is Student's; else the mean is prediction-powered (arXiv
    2301.09633): the scores, plus the errors of the rows `sampled` (rows, exact effects, inclusion
    probabilities), each divided by its inclusion probability. `score` is the mean score over the
    same inputs as `effect`, `ablated` the number of inputs in which the part was ablated for it;
    `reason` says why an interval is absent."""
    others = ~choosing if choosing.any() and not choosing.all() else np.ones_like(choosing)
    chosen = ~others if (~others).any() else others
    listed = largest_parts(parts, chosen[parts.example], count)
    rows = []
    for name, place in listed:
        here = parts.rows_of(name)
        here = here[(parts.place[here] == place) & others[parts.example[here]]]
        index = unravel(torch.tensor(place), parts.mechanisms.group(name).axes).tolist()
        score, truth, ablated = _values(parts, here, effects, exact, sampled, unsigned=unsigned)
        score, truth = (_of_units(parts, here, entry, others) for entry in (score, truth))
        row = {
            "group": name,
            "part": parts.mechanisms.describe(name, tuple(index)),
            "index": index,
            "score": float(score.mean()),
            "effect": float(truth.mean()),
            "inputs": len(truth),
            "ablated": ablated,
        }
        if chosen is others:
            row["reason"] = "too few inputs to choose the list on some and estimate on others"
        elif len(truth) < 2:
            row["reason"] = f"an interval needs at least two inputs, got {len(truth)}"
        elif ablated < min(LEAST, len(here)):
            row["reason"] = f"{ablated} inputs have the part ablated, at least {LEAST} are needed"
        else:
            found = mean_interval(truth, alpha)
            row |= {"low": found.low, "high": found.high, "reason": found.reason}
        rows.append(row)
    return pl.DataFrame(rows, schema=SCHEMA)


def exact_top(
    scores: Scores, count: int = 20, *, seed: int = 0, alpha: float = 0.1
) -> pl.DataFrame:
    """Return the parts with the largest mean |effect| of exact scores, the list chosen on a quarter
    of the inputs and the means and intervals from the others; see `mean_effects`.
    """
    parts = population(scores)
    effects = ExactEffects(scores.mechanisms, everything=scores)
    return mean_effects(parts, count, effects, folds(parts, seed) == 0, alpha)


def _values(
    parts: Population,
    here: np.ndarray,
    effects: ExactEffects,
    exact: bool,
    sampled: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
    *,
    unsigned: bool,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the score and the unbiased effect of rows, and how many of them were ablated."""
    score = parts.score[here]
    if exact or sampled is None:
        truth = effects.of(parts, here)
        return score, np.abs(truth) if unsigned else truth, len(here)
    rows, known, inclusion = sampled
    order = np.argsort(rows)
    place = np.minimum(np.searchsorted(rows[order], here), len(rows) - 1)
    drawn = rows[order][place] == here
    source = order[place][drawn]
    truth = score.copy()
    truth[drawn] += (known[source] - score[drawn]) / inclusion[source]
    return score, truth, int(drawn.sum())


def _of_units(
    parts: Population, here: np.ndarray, values: np.ndarray, others: np.ndarray
) -> np.ndarray:
    """Return one value for every distinct input among `others`: the mean of its copies, 0 where the
    part is inactive.
    """
    each = np.zeros(parts.examples)
    each[parts.example[here]] = values
    _, place, counts = np.unique(parts.unit[others], return_inverse=True, return_counts=True)
    return np.bincount(place, weights=each[others]) / counts
