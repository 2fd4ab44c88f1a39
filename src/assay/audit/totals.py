"""Prediction-powered intervals: totals of effects and recall, from all estimates and a random
sample of exact ablations.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.stats import chi2

from assay.attribution.scores import Scores
from assay.audit.audit import Audit
from assay.audit.calibration import Ablated
from assay.audit.intervals import (
    LEAST,
    ConfidenceInterval,
    binomial_interval,
    mean_interval,
    ratio_interval,
)
from assay.core import values as core_values
from assay.errors import InputError

__all__ = ["ConfidenceInterval", "top_recall", "totals"]


def totals(
    audit: Audit, alpha: float | None = None, *, more: Scores | None = None
) -> dict[str, ConfidenceInterval]:
    """Return the sum of all effects F(ones) - F(gate at 0) in each group, and in "all" of them, as
    a mean over inputs.

    An input's total is the sum of its estimates plus its correction, the sampled `exact - estimate`
    divided by the inclusion probability: unbiased because the sample is random. The interval is
    Student's over distinct inputs, absent for a single one; scores of further inputs (`more`), of
    the same method and without exact ablations, make it narrower.

    Raises InputError for gates that are shared over the batch: their sample is the same in every
    input."""
    ablated = _of_inputs(audit)
    parts, rows = ablated.parts, ablated.rows
    level = audit.bars.alpha if alpha is None else alpha
    inputs = len(np.unique(parts.unit))
    further = {} if more is None else {k: core_values.totals(v) for k, v in more.values.items()}
    found: dict[str, ConfidenceInterval] = {}
    for name in (*parts.names, "all"):
        if inputs < 2:
            reason = "an interval needs at least two inputs, got 1"
            found[name] = ConfidenceInterval(None, None, None, level, inputs, reason=reason)
            continue
        own = np.ones(len(parts)) if name == "all" else parts.group == parts.names.index(name)
        known = _of_units(parts.unit, parts.per_input(own * parts.score))
        exact = _of_units(parts.unit, _sampled_sums(ablated, own[rows] * ablated.exact))
        guess = _of_units(parts.unit, _sampled_sums(ablated, own[rows] * parts.score[rows]))
        predicted = others = None
        if more is not None:
            chosen = further.values() if name == "all" else [further[name]]
            predicted, others = known, np.sum([entry.cpu() for entry in chosen], axis=0)
        interval = mean_interval(known + exact - guess, level, predicted=predicted, more=others)
        found[name] = replace(interval, sampled_only=mean_interval(exact, level).width)
    return found


def top_recall(audit: Audit, k: int, alpha: float | None = None) -> ConfidenceInterval:
    """Return how many of the effects as large as an input's k-th largest |score| are among its k
    largest |scores|.

    That is a ratio of two totals over parts, of `|exact| >= t and |score| >= t` and of `|exact| >=
    t`, with t the k-th largest |score| of the input. Each is predicted by the scores, which know it
    for all parts, and corrected by the random sample. Where the corrections show no variance over
    inputs they say nothing of their own error; the interval is then the exact binomial one, each
    input with a sampled large effect counted once, and never reaches certainty. With fewer than
    five such inputs there is none. Where fewer than five inputs have a sampled large effect that
    the scores miss, the lower end also allows for those that the sample can have passed over: the
    upper Poisson limit of their number (Garwood 1936) over the smallest inclusion probability.

    Raises InputError for k below 1 or above the number of active parts of an input, and for gates
    that are shared over the batch."""
    ablated = _of_inputs(audit)
    parts, rows = ablated.parts, ablated.rows
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    counts = np.bincount(parts.example, minlength=parts.examples)
    if counts.min() < k:
        raise InputError(f"k={k} is more than the {counts.min()} active parts of an input")
    size = np.abs(parts.score)
    order = np.lexsort((-size, parts.example))
    level = size[order][np.cumsum(counts) - counts + k - 1] * (1 - 1e-9)
    limit = level[parts.example]
    found = (size >= limit)[rows]
    large = np.abs(ablated.exact) >= limit[rows]
    kept = parts.per_input((size >= limit).astype(float))
    chance = audit.bars.alpha if alpha is None else alpha
    trials = len(np.unique(ablated.unit[large]))
    if trials < LEAST:
        reason = (
            f"{trials} inputs have an ablated part with an effect as large as their {k}-th largest"
            f" score, and at least {LEAST} are needed"
        )
        return ConfidenceInterval(None, None, None, chance, trials, reason=reason)

    def corrected(holds: np.ndarray) -> np.ndarray:
        change = _sampled_sums(ablated, holds.astype(float) - found)
        return _of_units(parts.unit, kept + change)

    above, below = corrected(found & large), corrected(large)
    interval = ratio_interval(above, below, chance)
    share, low, high = interval.estimate, interval.low, interval.high
    if share is None or low is None:
        return interval
    if np.ptp(above - share * below) <= 1e-12 * max(1.0, np.abs(below).max()):
        low, high = binomial_interval(share, trials, chance)
    inclusion = ablated.design.inclusion(parts)
    hidden = (size < limit) & (inclusion < 1)
    seen = large & hidden[rows]
    if hidden.any() and (times := len(np.unique(ablated.unit[seen]))) < LEAST:
        least = np.full(len(above), np.inf)
        np.minimum.at(least, parts.unit[parts.example[hidden]], inclusion[hidden])
        least = least[np.isfinite(least)]
        expected = float(chi2.ppf(1 - chance / 2, 2 * (times + 1))) / 2
        most = expected / least.mean() / len(above)
        low = min(low, above.mean() / (corrected(large & ~seen).mean() + most))
    return replace(interval, low=low, high=high)


def _of_inputs(audit: Audit) -> Ablated:
    """Return the ablated parts; InputError where the sample is the same in every input."""
    if audit.parts.shared:
        raise InputError(
            f"the gates of {', '.join(sorted(audit.parts.shared))} are shared over the batch;"
            " intervals over inputs need a sample for each"
        )
    return audit.ablated


def _sampled_sums(ablated: Ablated, values: np.ndarray) -> np.ndarray:
    """Return the sum over the drawn rows of every input, each divided by its inclusion
    probability.
    """
    return np.bincount(
        ablated.parts.example[ablated.rows],
        weights=values / ablated.inclusion,
        minlength=ablated.parts.examples,
    )


def _of_units(unit: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the mean over the copies of every distinct input."""
    return np.bincount(unit, weights=values) / np.bincount(unit)
