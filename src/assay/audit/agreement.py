"""Agreement of an estimate with the truth: scale and sign as well as correlation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import polars as pl

from assay.errors import InputError


@dataclass(frozen=True)
class Agreement:
    """How an estimate agrees with the truth on `n` pairs.

    `slope` is the least-squares slope of the estimate on the truth (1: right scale; below 1:
    under-estimated), `sign` the share of non-zero truths whose sign is right, `mae` the mean
    absolute error, `recall` the share of the `k` largest |truth| found among the `k` largest
    |estimate|. A quantity that is undefined (a constant estimate, say) is NaN, and `reason` says
    why."""

    pearson: float
    spearman: float
    slope: float
    sign: float
    mae: float
    recall: float
    k: int
    n: int
    reason: str = ""

    def to_dict(self) -> dict[str, float | int | str]:
        return asdict(self)


def agreement(
    estimate: np.ndarray,
    truth: np.ndarray,
    *,
    k: int | None = None,
    weight: np.ndarray | None = None,
) -> Agreement:
    """Return the agreement of two arrays of one shape.

    `k` defaults to a tenth of the pairs, at least 1. With a `weight` per pair (1 / inclusion
    probability) every quantity is that of the population that the pairs were sampled from, ranks
    and the k largest included."""
    estimate, truth = np.asarray(estimate, float).ravel(), np.asarray(truth, float).ravel()
    if estimate.shape != truth.shape:
        raise InputError(f"estimate and truth differ in size: {estimate.size} and {truth.size}")
    n = estimate.size
    if n == 0:
        raise InputError("agreement needs at least one pair of estimate and truth")
    weight = np.ones(n) if weight is None else np.asarray(weight, float).ravel()
    if weight.shape != truth.shape or not (weight > 0).all():
        raise InputError("agreement needs one positive weight per pair of estimate and truth")
    k = min(max(1, n // 10) if k is None else k, n)
    # Of order one, so that the moments of tiny or huge values neither vanish nor overflow.
    (e, e_size), (t, t_size) = _unit(estimate), _unit(truth)
    flat = n < 2 or np.ptp(t) == 0
    varied = not flat and np.ptp(e) > 0
    graded = np.ptp(np.abs(t)) > 0
    reason = "" if varied else "all estimates are equal"
    if flat:
        reason = "there is one exact effect" if n < 2 else "all exact effects are equal"
    decided = truth != 0
    right = np.sign(estimate[decided]) == np.sign(truth[decided])
    share = k / n * weight.sum()
    found, large = (_among_largest(np.abs(entry), weight, share) for entry in (estimate, truth))
    nan = float("nan")
    return Agreement(
        pearson=_correlation(e, t, weight) if varied else nan,
        spearman=_correlation(_ranks(e, weight), _ranks(t, weight), weight) if varied else nan,
        slope=nan
        if flat
        else _covariance(e, t, weight) / _covariance(t, t, weight) * (e_size / t_size),
        sign=float(np.average(right, weights=weight[decided])) if decided.any() else nan,
        mae=float(np.average(np.abs(estimate - truth), weights=weight)),
        recall=float((weight * np.minimum(found, large)).sum() / share) if graded else nan,
        k=k,
        n=n,
        reason=reason,
    )


def _covariance(one: np.ndarray, two: np.ndarray, weight: np.ndarray) -> float:
    first, second = (entry - np.average(entry, weights=weight) for entry in (one, two))
    return float(np.average(first * second, weights=weight))


def _correlation(one: np.ndarray, two: np.ndarray, weight: np.ndarray) -> float:
    size = math.sqrt(_covariance(one, one, weight)) * math.sqrt(_covariance(two, two, weight))
    return min(max(_covariance(one, two, weight) / size, -1.0), 1.0) if size > 0 else float("nan")


def _ranks(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return ranks in the population: the weight below a value and half of that of its ties."""
    _, place = np.unique(values, return_inverse=True)
    tied = np.bincount(place, weights=weight)
    return (np.cumsum(tied) - tied / 2)[place]


def _among_largest(size: np.ndarray, weight: np.ndarray, total: float) -> np.ndarray:
    """Return for every pair the share of its weight that is among the largest `total` weight."""
    order = np.argsort(-size, kind="stable")
    before = np.cumsum(weight[order]) - weight[order]
    found = np.empty(len(size))
    found[order] = np.clip((total - before) / weight[order], 0.0, 1.0)
    return found


def _unit(values: np.ndarray) -> tuple[np.ndarray, float]:
    size = float(np.abs(values).max())
    return (values / size, size) if size > 0 else (values, 1.0)


def agreement_table(table: pl.DataFrame, by: str) -> pl.DataFrame:
    """Return the agreement of columns `estimate` and `exact` within each value of the column
    `by`, one row each; rows of a table with a column `inclusion` weigh 1 / inclusion.
    """
    rows = []
    weighted = "inclusion" in table.columns
    for (key,), part in table.group_by([by], maintain_order=True):
        weight = 1 / part["inclusion"].to_numpy() if weighted else None
        found = agreement(part["estimate"].to_numpy(), part["exact"].to_numpy(), weight=weight)
        rows.append({by: key, **found.to_dict()})
    return pl.DataFrame(rows)
