"""Agreement of an estimate with the truth: scale and sign as well as correlation."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import polars as pl
from scipy import stats

from assay.errors import InputError


@dataclass(frozen=True)
class Agreement:
    """How an estimate agrees with the truth on `n` pairs.

    `slope` is the least-squares slope of the estimate on the truth (1: right scale; below 1:
    under-estimated), `sign` the share of non-zero truths whose sign is right, `mae` the mean
    absolute error, `recall` the share of the `k` largest |truth| found among the `k` largest
    |estimate|. A quantity that is undefined (a constant estimate, say) is NaN."""

    pearson: float
    spearman: float
    slope: float
    sign: float
    mae: float
    recall: float
    k: int
    n: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def agreement(estimate: np.ndarray, truth: np.ndarray, *, k: int | None = None) -> Agreement:
    """Return the agreement of two arrays of one shape (k defaults to a tenth of the pairs, at
    least 1).
    """
    estimate, truth = np.asarray(estimate, float).ravel(), np.asarray(truth, float).ravel()
    if estimate.shape != truth.shape:
        raise InputError(f"estimate and truth differ in size: {estimate.size} and {truth.size}")
    n = estimate.size
    if n == 0:
        raise InputError("agreement needs at least one pair of estimate and truth")
    k = min(max(1, n // 10) if k is None else k, n)
    # Of order one, so that the moments of tiny or huge values neither vanish nor overflow.
    (e, e_size), (t, t_size) = _unit(estimate), _unit(truth)
    flat = n < 2 or t.var() == 0
    varied = not flat and e.var() > 0
    decided = truth != 0
    found = np.intersect1d(
        np.argsort(-np.abs(estimate), kind="stable")[:k],
        np.argsort(-np.abs(truth), kind="stable")[:k],
    )
    return Agreement(
        pearson=float(np.corrcoef(e, t)[0, 1]) if varied else float("nan"),
        spearman=float(stats.spearmanr(estimate, truth).statistic) if varied else float("nan"),
        slope=float("nan")
        if flat
        else float(np.cov(e, t)[0, 1] / t.var(ddof=1)) * (e_size / t_size),
        sign=float((np.sign(estimate[decided]) == np.sign(truth[decided])).mean())
        if decided.any()
        else float("nan"),
        mae=float(np.abs(estimate - truth).mean()),
        recall=len(found) / k,
        k=k,
        n=n,
    )


def _unit(values: np.ndarray) -> tuple[np.ndarray, float]:
    size = float(np.abs(values).max())
    return (values / size, size) if size > 0 else (values, 1.0)


def agreement_table(table: pl.DataFrame, by: str) -> pl.DataFrame:
    """Return the agreement of columns `estimate` and `exact` within each value of the column
    `by`, one row each.
    """
    rows = []
    for (key,), part in table.group_by([by], maintain_order=True):
        rows.append(
            {by: key, **agreement(part["estimate"].to_numpy(), part["exact"].to_numpy()).to_dict()}
        )
    return pl.DataFrame(rows)
