"""Prediction-powered intervals: totals of effects and recall, from all estimates and a random
sample of exact ablations.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import stats

from assay.attribution.scores import Scores
from assay.audit.audit import Audit
from assay.audit.intervals import ConfidenceInterval, mean_interval, ratio_interval
from assay.audit.population import Population
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
    Student's over distinct inputs; scores of further inputs (`more`), of the same method and
    without exact ablations, make it narrower.

    Raises InputError for gates that are shared over the batch: their sample is the same in every
    input."""
    parts, rows = _of_inputs(audit)
    level = audit.bars.alpha if alpha is None else alpha
    further = (
        None
        if more is None
        else {name: core_values.totals(v).cpu().numpy() for name, v in more.values.items()}
    )
    weight = 1 / audit.table["inclusion"].to_numpy()
    exact, estimate = audit.table["exact"].to_numpy(), audit.table["estimate"].to_numpy()
    found: dict[str, ConfidenceInterval] = {}
    for name in (*parts.names, "all"):
        own, drawn = (
            np.ones(len(entry), dtype=bool) if name == "all" else entry == parts.names.index(name)
            for entry in (parts.group, parts.group[rows])
        )

        def sums(values: np.ndarray, drawn: np.ndarray = drawn) -> np.ndarray:
            return np.bincount(
                parts.example[rows[drawn]], weights=values[drawn], minlength=parts.examples
            )

        known = _of_units(parts.unit, parts.per_input(np.where(own, parts.score, 0.0)))
        correction = _of_units(parts.unit, sums(weight * (exact - estimate)))
        alone = _of_units(parts.unit, sums(weight * exact))
        others = None
        if further is not None:
            others = np.sum(list(further.values()), axis=0) if name == "all" else further[name]
        interval = mean_interval(
            known + correction, level, predicted=None if others is None else known, more=others
        )
        sampled = mean_interval(alone, level)
        found[name] = replace(interval, sampled_only=sampled.width)
    return found


def top_recall(audit: Audit, k: int, alpha: float | None = None) -> ConfidenceInterval:
    """Return how many of the effects as large as an input's k-th largest |score| are among its k
    largest |scores|.

    That is a ratio of two totals over parts, of `|exact| >= t and |score| >= t` and of `|exact| >=
    t`, with t the k-th largest |score| of the input. Each is predicted by the scores, which know it
    for all parts, and corrected by the random sample. Where the corrections show no variance over
    inputs they say nothing of their own error; the interval is then the exact binomial one, each
    input with a sampled large effect counted once, and never reaches certainty.

    Raises InputError for k below 1 or above the number of active parts of an input, and for gates
    that are shared over the batch."""
    parts, rows = _of_inputs(audit)
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    counts = np.bincount(parts.example, minlength=parts.examples)
    if counts.min() < k:
        raise InputError(f"k={k} is more than the {counts.min()} active parts of an input")
    size = np.abs(parts.score)
    level = np.zeros(parts.examples)
    order = np.lexsort((-size, parts.example))
    level[:] = size[order][np.cumsum(counts) - counts + k - 1] * (1 - 1e-9)
    limit = level[parts.example]
    weight = 1 / audit.table["inclusion"].to_numpy()
    found = (size >= limit)[rows]
    large = np.abs(audit.table["exact"].to_numpy()) >= limit[rows]
    kept = parts.per_input((size >= limit).astype(float))

    def corrected(holds: np.ndarray) -> np.ndarray:
        change = weight * (holds.astype(float) - found)
        sums = np.bincount(parts.example[rows], weights=change, minlength=parts.examples)
        return _of_units(parts.unit, kept + sums)

    above, below = corrected(found & large), corrected(large)
    chance = audit.bars.alpha if alpha is None else alpha
    interval = ratio_interval(above, below, chance)
    if np.ptp(above - interval.estimate * below) <= 1e-12 * max(1.0, float(np.abs(below).max())):
        trials = len(np.unique(parts.unit[parts.example[rows[large]]]))
        low, high = _binomial(interval.estimate, trials, chance)
        return replace(interval, low=low, high=high)
    return interval


def _binomial(share: float, trials: int, alpha: float) -> tuple[float, float]:
    """Return the exact binomial interval of a share of trials, all of [0, 1] without a trial."""
    if not trials:
        return 0.0, 1.0
    found = share * trials
    low = stats.beta.ppf(alpha / 2, found, trials - found + 1) if share > 0 else 0.0
    high = stats.beta.ppf(1 - alpha / 2, found + 1, trials - found) if share < 1 else 1.0
    return float(low), float(high)


def _of_inputs(audit: Audit) -> tuple[Population, np.ndarray]:
    """Return all active parts and the sampled rows among them; InputError where the sample is the
    same in every input.
    """
    if audit.parts.shared:
        raise InputError(
            f"the gates of {', '.join(sorted(audit.parts.shared))} are shared over the batch;"
            " intervals over inputs need a sample for each"
        )
    return audit.parts, audit.ablated.rows


def _of_units(unit: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the mean over the copies of every distinct input."""
    return np.bincount(unit, weights=values) / np.bincount(unit)
