"""Confidence intervals for means and ratios over independent inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from assay.errors import InputError

LEAST = 5
"""The least number of inputs that a measured share, or a mean of values with ties, is given for."""


@dataclass(frozen=True)
class ConfidenceInterval:
    """An estimate with an interval that holds with probability at least 1 - alpha as the number of
    inputs grows, for values of finite variance.

    `sampled_only` is the width that the sampled exact effects give alone, without any estimate (NaN
    where it is not defined). Where the inputs do not support an interval, the estimate, `low` and
    `high` are None and `reason` says why."""

    estimate: float | None
    low: float | None
    high: float | None
    alpha: float
    inputs: int
    sampled_only: float = math.nan
    reason: str = ""

    @property
    def width(self) -> float:
        """The width of the interval; NaN where there is none."""
        return math.nan if self.low is None or self.high is None else self.high - self.low

    def covers(self, value: float) -> bool:
        """Return whether the interval contains a value; False where there is none."""
        return self.low is not None and self.high is not None and self.low <= value <= self.high


def mean_interval(
    values: np.ndarray,
    alpha: float = 0.1,
    *,
    predicted: np.ndarray | None = None,
    more: np.ndarray | None = None,
) -> ConfidenceInterval:
    """Return Student's interval for the mean of independent values; with predictions, the
    prediction-powered one.

    `predicted` are predictions of the same values and `more` predictions of others that nobody
    measured. The estimate is `mean(values) + w (mean(more) - mean(predicted))` (arXiv 2301.09633),
    with the weight w that makes the variance `var(values - w predicted) / n + w^2 var(more) / N`
    smallest (arXiv 2311.01453).

    The variance of a value that nearly all inputs share cannot be seen in them: where fewer than
    five of the inputs differ from the commonest value there is no interval.

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
    if reason := _unsupported(values):
        return ConfidenceInterval(None, None, None, alpha, n, reason=reason)
    reach = float(stats.t.ppf(1 - alpha / 2, n - 1))
    alone = 2 * reach * float(values.std(ddof=1)) / math.sqrt(n)
    if predicted is None or more is None or len(more) < 2 or np.ptp(predicted) == 0:
        middle = float(values.mean())
        return ConfidenceInterval(middle, middle - alone / 2, middle + alone / 2, alpha, n, alone)
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
    return ConfidenceInterval(middle, middle - half, middle + half, alpha, n, alone)


def _unsupported(values: np.ndarray) -> str:
    """Return why values show nothing of their variance; empty where they do."""
    common = int(np.unique(values, return_counts=True)[1].max())
    other = len(values) - common
    if common == 1 or other >= LEAST:
        return ""
    if not other:
        return f"all {common} inputs have the same value, which says nothing of its error"
    return (
        f"{other} of {len(values)} inputs differ from the others, and at least {LEAST} are needed"
    )


def ratio_interval(
    above: np.ndarray,
    below: np.ndarray,
    alpha: float = 0.1,
    limits: tuple[float, float] = (0.0, 1.0),
    unit: np.ndarray | None = None,
) -> ConfidenceInterval:
    """Return mean(above) / mean(below) with Fieller's interval over independent inputs, which
    `unit` numbers, clipped to the limits; without an interval where the denominator is not itself
    clear of zero."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    n = len(above)
    if n < 2 or len(below) != n:
        raise InputError(
            f"a ratio needs two arrays of one length, at least 2; got {n} and {len(below)}"
        )
    if not (np.isfinite(above).all() and np.isfinite(below).all()):
        raise InputError("a ratio needs finite numbers, and some are NaN or infinite")
    n = n if unit is None else len(np.unique(unit))
    ends = fieller(above, below, alpha, unit)
    if n < 2:
        reason = "one input says nothing of the error"
        return ConfidenceInterval(None, None, None, alpha, n, reason=reason)
    if ends is None:
        reason = "the denominator of the ratio is not clear of zero"
        return ConfidenceInterval(None, None, None, alpha, n, reason=reason)
    ratio = above.mean() / below.mean()
    found, low, high = (float(np.clip(end, *limits)) for end in (ratio, *ends))
    return ConfidenceInterval(found, low, high, alpha, n)


def fieller(
    above: np.ndarray, below: np.ndarray, alpha: float, unit: np.ndarray | None = None
) -> tuple[float, float] | None:
    """Return the ends of Fieller's interval for mean(above) / mean(below): every ratio r for which
    Student's test of `mean(above - r below) = 0` is not significant (Fieller 1954, J. R. Stat. Soc.
    B 16).

    None where the denominator is not itself clear of zero, so that the interval does not end, and
    with a single input. `unit` numbers the inputs: copies of one are one observation."""
    units = np.arange(len(above)) if unit is None else np.unique(unit, return_inverse=True)[1]
    n = int(units.max(initial=-1)) + 1
    if n < 2:
        return None
    a, b = float(np.mean(above)), float(np.mean(below))
    rest = np.stack([np.bincount(units, above - a), np.bincount(units, below - b)])
    spread = n / (n - 1) / len(above) ** 2 * rest @ rest.T
    (s_aa, s_ab), (_, s_bb) = float(stats.t.ppf(1 - alpha / 2, n - 1)) ** 2 * spread
    lead, middle, last = b * b - s_bb, a * b - s_ab, a * a - s_aa
    if lead <= 0:
        return None
    root = math.sqrt(max(middle * middle - lead * last, 0.0))
    return (middle - root) / lead, (middle + root) / lead


def binomial_interval(share: float, trials: float, alpha: float) -> tuple[float, float]:
    """Return the exact interval of a binomial probability from the `share` of `trials` that
    succeeded (Clopper and Pearson 1934); with weighted trials their effective number need not be
    whole.
    """
    found, missed = share * trials, (1 - share) * trials
    low = float(stats.beta.ppf(alpha / 2, found, missed + 1)) if share > 0 else 0.0
    high = float(stats.beta.ppf(1 - alpha / 2, found + 1, missed)) if share < 1 else 1.0
    return low, high
