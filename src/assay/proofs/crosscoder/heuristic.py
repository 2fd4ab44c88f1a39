"""A heuristic estimate beside every bound: what is not explained is treated as independent noise.

It is an estimate and never a bound; its type has no name in common with a proof's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import norm

from assay.errors import InputError
from assay.proofs.crosscoder.arithmetic import Array
from assay.proofs.crosscoder.problem import Problem


@dataclass(frozen=True)
class HeuristicEstimate:
    """What margins would be if `r_1 - rhat_1` were noise, independent over coordinates, with the
    variances that were measured at some points. NOT a bound: nothing is proved.

    margins, deviations (points,): the margin of rhat_1 to the nearest rival and the noise's
    standard deviation along it. right: the estimated share of right answers."""

    margins: Float[Array, " points"]
    deviations: Float[Array, " points"]
    right: float

    def stretch(self, true: Float[Array, " points"], coverage: float = 0.95) -> float:
        """Return by what factor the bars must be widened to hold the true margins of a share
        `coverage` of the points: 1 where the noise is what it was taken for.
        """
        if true.shape != self.margins.shape:
            raise InputError(
                f"true margins have shape {true.shape}, the estimate {self.margins.shape}"
            )
        wanted = np.abs(true - self.margins) / np.maximum(self.deviations, 1e-300)
        return float(np.quantile(wanted, coverage) / norm.ppf(0.5 + coverage / 2))

    def width(self, coverage: float = 0.95) -> float:
        """Return half the mean width of the bars."""
        return float(norm.ppf(0.5 + coverage / 2) * self.deviations.mean())


def heuristic_estimate(problem: Problem, measured: Array) -> HeuristicEstimate:
    """Return the heuristic estimate of all points, with the variances of the residual measured at
    the points `measured` (indices).
    """
    n, f, x = problem.network, problem.features, problem.points.inputs
    state = x @ n.E.T + n.b_e
    state = state + np.maximum(state @ n.W_in.T + n.b_in, 0) @ n.W_out.T + n.b_out
    rebuilt = f.codes @ f.decoder[:, 1] + f.bias[1]
    variance = ((state - rebuilt)[measured] ** 2).mean(0)
    logits = rebuilt @ n.U.T + n.b_u
    labels = problem.points.labels
    rows = np.arange(len(labels))
    away = n.U[labels][:, None] - n.U
    spread = np.sqrt((away**2) @ variance)
    leads = logits[rows, labels][:, None] - logits
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(spread > 0, leads / spread, np.sign(leads) * np.inf)
    ratio[rows, labels] = np.inf
    nearest = ratio.argmin(1)
    right = norm.cdf(ratio).min(1)
    return HeuristicEstimate(
        leads[rows, nearest], np.maximum(spread[rows, nearest], 0.0), float(right.mean())
    )
