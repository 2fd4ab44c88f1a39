"""Selective risk and bars for the parts that a user reads: promises about a new input, calibrated
on held-out ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from scipy.stats import binom

from assay.errors import InputError, shown, unknown

Promise = Literal["input", "channel"]


@dataclass(frozen=True)
class SelectiveRisk:
    """A calibrated threshold, or None when the data do not support one.

    With probability at least `1 - eta` over the calibration inputs, the share of failures below the
    threshold among new inputs is at most `alpha`. With the promise "input", an input that has rows
    of score at most `threshold` fails when the relative error of any of them is above `tolerance`:
    all its trusted rows are right together. With "channel", one row drawn at random from each input
    counts alone. Exact rows need no threshold and are left out.

    `rows`, `failures` and `p_value` are those of the last rejected test, or of the first test where
    there is no threshold; `needed` is the least number of calibration inputs below a threshold that
    can be tested. `reason` says why there is none."""

    threshold: float | None
    promise: Promise
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

    @property
    def guarantee(self) -> str:
        """The promise in one sentence, for a report."""
        if self.threshold is None:
            return f"No threshold is returned: {self.reason}."
        subject = {
            "input": "Of new inputs that have scores below the threshold, at most"
            f" {self.alpha:.0%} have one there that is wrong by more than {self.tolerance:.0%}",
            "channel": "A score drawn at random from a new input, if it is below the threshold, is"
            f" wrong by more than {self.tolerance:.0%} with probability at most {self.alpha:.0%}",
        }[self.promise]
        return f"{subject}. This holds with probability {1 - self.eta:.0%} over the calibration."

    def trusts(self, score: np.ndarray, exact: np.ndarray | None = None) -> np.ndarray:
        """Return which rows of new inputs are trusted: exact ones and those below the threshold."""
        score = np.asarray(score, float)
        below = np.zeros(score.shape, bool) if self.threshold is None else score <= self.threshold
        return below if exact is None else below | np.asarray(exact, bool)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> SelectiveRisk:
        """Return what `to_dict` saved; InputError for anything else."""
        try:
            found = SelectiveRisk(**saved)
            right = (
                (found.threshold is None or 0 <= found.threshold < math.inf)
                and found.promise in get_args(Promise)
                and 0 < found.tolerance < math.inf
                and 0 < found.alpha < 1
                and 0 < found.eta < 1
                and isinstance(found.reason, str)
            )
        except TypeError as error:
            raise InputError(f"no calibrated threshold in {shown(saved)}") from error
        if not right:
            raise InputError(f"no calibrated threshold in {shown(saved)}")
        return found


@dataclass(frozen=True)
class ListBars:
    """Half-widths `quantile * scale` that hold for all rows of an input at once.

    For an input drawn like the calibration inputs, all its bars contain their exact effects with
    probability at least `1 - alpha`. `inputs` counts the calibration inputs; below `ceil(1 / alpha)
    - 1` of them the quantile is infinite (arXiv 1604.04173)."""

    alpha: float
    quantile: float
    inputs: int

    @property
    def rank(self) -> int:
        """Which calibration residual the quantile is, in ascending order from 1."""
        # The product is rounded first: (n + 1)(1 - alpha) = 9.000000000000002 must not cost a rank.
        return math.ceil(round((self.inputs + 1) * (1 - self.alpha), 9))

    @property
    def guarantee(self) -> str:
        """The promise in one sentence, for a report."""
        if math.isinf(self.quantile):
            least = math.ceil(1 / self.alpha) - 1
            return (
                f"There are no bars: {1 - self.alpha:.0%} takes at least {least} calibration"
                f" inputs, and there are {self.inputs}."
            )
        return (
            f"All bars of a new input contain their exact effects with probability at least"
            f" {1 - self.alpha:.0%}."
        )

    def half_width(self, scale: np.ndarray) -> np.ndarray:
        """Return the bars' half-widths, zero where the scale is."""
        scale = np.asarray(scale, float)
        if math.isinf(self.quantile):
            return np.where(scale > 0, np.inf, 0.0)
        return self.quantile * scale


def calibrate_risk(
    score: np.ndarray,
    relative_error: np.ndarray,
    group: np.ndarray,
    *,
    exact: np.ndarray | None = None,
    promise: Promise = "input",
    tolerance: float = 0.1,
    alpha: float = 0.05,
    eta: float = 0.05,
    tuning: float = 0.3,
    steps: int = 20,
    seed: int = 0,
) -> SelectiveRisk:
    """Return the largest threshold whose risk `P(failure | score <= threshold)` is below `alpha`,
    see `SelectiveRisk` for what fails.

    `group` says which input a row comes from; copies of one input must share it, or rows that are
    copies of one another are taken for independent ones and the promise does not hold. Inputs are
    split into a tuning share and a calibration rest. Rows marked `exact`, and rows of score 0, are
    left out. An increasing grid of thresholds is the tuning fold's score quantiles; on the
    calibration fold, from the first threshold with at least `ceil(log eta / log(1 - alpha))` inputs
    below it, the hypothesis of a risk above `alpha` is tested with the exact binomial tail
    `P(Binomial(inputs, alpha) <= failures) <= eta`, up to the first that is not rejected
    (fixed-sequence testing, arXiv 2110.01052). The last rejected threshold is returned.

    Raises InputError for arrays of different lengths, negative or NaN scores and errors, an unknown
    promise, or levels outside (0, 1)."""
    if promise not in ("input", "channel"):
        raise unknown("promise", str(promise), ("input", "channel"))
    left_out = np.zeros(np.shape(score), bool) if exact is None else np.asarray(exact, bool)
    score, relative_error, group = _checked(score, relative_error, group, left_out)
    _check_levels(tolerance, steps, alpha=alpha, eta=eta, tuning=tuning)
    needed = math.ceil(math.log(eta) / math.log(1 - alpha))
    generator = np.random.default_rng(seed)
    kept = generator.permutation(np.flatnonzero((score > 0) & ~left_out))
    if promise == "channel":
        kept = kept[np.unique(group[kept], return_index=True)[1]]
    distinct = generator.permutation(np.unique(group[kept]))
    tuned = np.isin(group[kept], distinct[: round(tuning * len(distinct))])
    grid = _grid(score[kept[tuned]], steps)
    held = kept[~tuned]
    scores, failed, owner = score[held], relative_error[held] > tolerance, group[held]
    calibration = len(np.unique(owner))

    def test(threshold: float) -> tuple[int, int, float]:
        below = scores <= threshold
        inputs = len(np.unique(owner[below]))
        failures = len(np.unique(owner[below & failed]))
        return inputs, failures, float(binom.cdf(failures, inputs, alpha))

    found, last = None, (0, 0, 1.0)
    reason = (
        f"no threshold has {needed} of the {calibration} calibration inputs below it, the least"
        " that can be tested"
    )
    for threshold in grid:
        inputs, failures, p_value = test(threshold)
        if inputs < needed:
            continue
        if p_value > eta:
            if found is None:
                last = (inputs, failures, p_value)
                reason = (
                    f"at the first threshold with enough inputs {failures} of {inputs} fail, so a"
                    f" risk above {alpha:g} cannot be ruled out"
                )
            break
        found, last, reason = float(threshold), (inputs, failures, p_value), ""
    counts = {
        "tuning": len(distinct) - calibration,
        "calibration": calibration,
        "exact": int((left_out | (score == 0)).sum()),
    }
    return SelectiveRisk(
        found, promise, tolerance, alpha, eta, *last, needed, **counts, reason=reason
    )


def calibrate_list_bars(
    error: np.ndarray, scale: np.ndarray, group: np.ndarray, *, alpha: float = 0.1
) -> ListBars:
    """Return bars that hold for all rows of a new input at once: the conformal quantile, over
    inputs, of the largest `|error| / scale` of an input.

    Copies of one input must share a group. Rows without error are right with any bar, and a row
    with an error and no scale makes its input's residual infinite. Raises InputError as
    `calibrate_risk`."""
    error, scale, group = _checked(
        np.abs(error), scale, group, np.zeros(np.shape(error), bool), ("error", "scale")
    )
    _check_levels(alpha=alpha)
    residual = np.where(error == 0, 0.0, np.inf)
    np.divide(error, scale, out=residual, where=(scale > 0) & (error > 0))
    inputs, place = np.unique(group, return_inverse=True)
    largest = np.zeros(len(inputs))
    np.maximum.at(largest, place, residual)
    found = ListBars(alpha, math.inf, len(inputs))
    if found.rank > found.inputs:
        return found
    return replace(found, quantile=float(np.sort(largest)[found.rank - 1]))


def _grid(scores: np.ndarray, steps: int) -> np.ndarray:
    finite = scores[np.isfinite(scores)]
    if not len(finite):
        return np.empty(0)
    return np.unique(np.quantile(finite, np.linspace(0, 1, steps + 1)[1:]))


def _checked(
    score: np.ndarray,
    relative_error: np.ndarray,
    group: np.ndarray,
    left_out: np.ndarray,
    names: tuple[str, str] = ("score", "relative_error"),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    score, relative_error, group = (
        np.asarray(score, float),
        np.asarray(relative_error, float),
        np.asarray(group),
    )
    if score.ndim != 1 or not (
        score.shape == relative_error.shape == group.shape == left_out.shape
    ):
        raise InputError(
            f"{names[0]}, {names[1]}, group and exact must be rows of one length, got"
            f" {score.shape}, {relative_error.shape}, {group.shape} and {left_out.shape}"
        )
    for name, values in zip(names, (score, relative_error), strict=True):
        bad = int((~(values >= 0) & ~left_out).sum())
        if bad:
            raise InputError(
                f"{name} must be at least 0 (infinity is allowed); {bad} of {len(values)} rows are"
                " negative or NaN"
            )
    return score, relative_error, group


def _check_levels(tolerance: float = 1.0, steps: int = 1, **levels: float) -> None:
    for name, level in levels.items():
        if not 0 < level < 1:
            raise InputError(f"{name} must lie between 0 and 1, got {level}")
    if not tolerance > 0:
        raise InputError(f"tolerance must be above 0, got {tolerance}")
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
