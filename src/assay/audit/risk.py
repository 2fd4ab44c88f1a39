"""Selective risk: a threshold on a score below which estimates are right, with a guarantee from
held-out inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from assay.audit.bars import split
from assay.errors import InputError


@dataclass(frozen=True)
class SelectiveRisk:
    """A calibrated threshold, or None when the data do not support one.

    With probability at least `1 - eta` over the calibration inputs, among rows with score at most
    `threshold` (one random row an input, exact rows left out) at most a share `alpha` has a
    relative error above `tolerance`. `rows`, `failures` and `p_value` are those of the last
    rejected test, or of the first test where there is no threshold; `needed` is the least number of
    calibration rows below a threshold that can be tested. `reason` says why there is none."""

    threshold: float | None
    tolerance: float
    alpha: float
    eta: float
    rows: int
    failures: int
    p_value: float
    needed: int
    tuning: int
    calibration: int
    exact: int
    reason: str = ""


def calibrate_risk(
    score: np.ndarray,
    relative_error: np.ndarray,
    group: np.ndarray,
    *,
    tolerance: float = 0.1,
    alpha: float = 0.05,
    eta: float = 0.05,
    tuning: float = 0.3,
    steps: int = 20,
    seed: int = 0,
) -> SelectiveRisk:
    """Return the largest threshold whose risk `P(relative_error > tolerance | score <= threshold)`
    is below `alpha`.

    Inputs (`group`: which input a row comes from) are split into a tuning share and a calibration
    rest, and one row is drawn from each, so that rows are independent. Rows of score 0 are exact
    and left out. An increasing grid of thresholds is the tuning fold's score quantiles; on the
    calibration fold, from the first threshold with at least `ceil(log eta / log(1 - alpha))` rows
    below it, the hypothesis of a risk above `alpha` is tested with the exact binomial tail
    `P(Binomial(rows, alpha) <= failures) <= eta`, up to the first that is not rejected
    (fixed-sequence testing, arXiv 2110.01052). The last rejected threshold is returned.

    Raises InputError for arrays of different lengths, negative or NaN scores and errors, or levels
    outside (0, 1)."""
    score, relative_error, group = _checked(
        score, relative_error, group, tolerance, alpha, eta, tuning, steps
    )
    needed = math.ceil(math.log(eta) / math.log(1 - alpha))
    generator = np.random.default_rng(seed)
    kept = np.flatnonzero(score > 0)
    chosen = generator.permutation(kept)
    chosen = chosen[np.unique(group[chosen], return_index=True)[1]]
    tune, _ = split(group[chosen], (tuning, 1 - tuning), generator)
    tuned = np.isin(group[chosen], tune)
    scores, failed = score[chosen[~tuned]], relative_error[chosen[~tuned]] > tolerance
    finite = score[chosen[tuned]][np.isfinite(score[chosen[tuned]])]
    grid = (
        np.unique(np.quantile(finite, np.linspace(0, 1, steps + 1)[1:]))
        if len(finite)
        else np.empty(0)
    )

    def test(threshold: float) -> tuple[int, int, float]:
        below = scores <= threshold
        rows, failures = int(below.sum()), int((below & failed).sum())
        return rows, failures, float(binom.cdf(failures, rows, alpha))

    found, last = None, (0, 0, 1.0)
    reason = (
        f"no threshold has {needed} of the {len(scores)} calibration rows below it, the least that"
        " can be tested"
    )
    for threshold in grid:
        rows, failures, p_value = test(threshold)
        if rows < needed:
            continue
        if p_value > eta:
            if found is None:
                last = (rows, failures, p_value)
                reason = (
                    f"at the first threshold with enough rows {failures} of {rows} fail, so a risk"
                    f" above {alpha:g} cannot be ruled out"
                )
            break
        found, last, reason = float(threshold), (rows, failures, p_value), ""
    counts = {
        "tuning": int(tuned.sum()),
        "calibration": len(scores),
        "exact": len(score) - len(kept),
    }
    return SelectiveRisk(found, tolerance, alpha, eta, *last, needed, **counts, reason=reason)


def _checked(
    score: np.ndarray,
    relative_error: np.ndarray,
    group: np.ndarray,
    tolerance: float,
    alpha: float,
    eta: float,
    tuning: float,
    steps: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    score, relative_error, group = (
        np.asarray(score, float),
        np.asarray(relative_error, float),
        np.asarray(group),
    )
    if score.ndim != 1 or not score.shape == relative_error.shape == group.shape:
        raise InputError(
            f"score, relative_error and group must be rows of one length, got {score.shape},"
            f" {relative_error.shape} and {group.shape}"
        )
    for name, values in (("score", score), ("relative_error", relative_error)):
        bad = int((~(values >= 0)).sum())
        if bad:
            raise InputError(
                f"{name} must be at least 0 (infinity is allowed); {bad} of {len(values)} rows are"
                " negative or NaN"
            )
    for name, level in (("alpha", alpha), ("eta", eta), ("tuning", tuning)):
        if not 0 < level < 1:
            raise InputError(f"{name} must lie between 0 and 1, got {level}")
    if not tolerance > 0:
        raise InputError(f"tolerance must be above 0, got {tolerance}")
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    return score, relative_error, group
