"""The share of a network's loss that dictionaries recover, and whether it can be told at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

LEVEL = 0.95
"""How often intervals hold the true share, for many windows."""


@dataclass(frozen=True)
class Losses:
    """Cross-entropies of next tokens, in nats: their sums over the tokens of every window, and how
    many tokens those are.
    """

    sums: Float[Tensor, " windows"]
    counts: Float[Tensor, " windows"]

    @property
    def mean(self) -> float:
        """The loss per token."""
        return float(self.sums.sum() / self.counts.sum().clamp(min=1))


@dataclass(frozen=True)
class Recovered:
    """`share` = (zero - spliced) / (zero - clean) with its 95 % interval from `low` to `high`.

    The denominator, `rise` (nats per token), is what zeros add to the loss; `rise_error` is its
    standard error over windows. The interval is Fieller's for a ratio of means of the same windows
    (Fieller 1954, J. R. Stat. Soc. B 16), with Student's quantile: it ends on both sides only where
    the rise is further from zero than its own interval is wide. Where it is not above zero by so
    much the share is None, and `reason` says why."""

    share: float | None
    low: float | None
    high: float | None
    rise: float
    rise_error: float
    reason: str = ""


def recovered(zero: Losses, spliced: Losses, clean: Losses) -> Recovered:
    """Return the share of the loss that is recovered, from losses of the same windows."""
    counts = clean.counts
    kept, of = zero.sums - spliced.sums, zero.sums - clean.sums
    total = float(counts.sum())
    windows = int((counts > 0).sum())
    if not windows:
        return Recovered(None, None, None, math.nan, math.nan, "no window has a token")
    rise, gain = float(of.sum()) / total, float(kept.sum()) / total
    if windows < 2:
        return Recovered(None, None, None, rise, math.nan, "one window says nothing of the error")
    residual = torch.stack([kept - gain * counts, of - rise * counts])
    covariance = residual @ residual.T * (windows / (windows - 1) / total**2)
    gain_square, both, rise_square = (float(covariance[i]) for i in ((0, 0), (0, 1), (1, 1)))
    error = math.sqrt(rise_square)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, windows - 1))
    if rise <= reach * error:
        words = (
            f"zeros change the loss by {rise:.5f} nats, standard error {error:.5f}: there is no"
            " loss to recover"
        )
        return Recovered(None, None, None, rise, error, words)
    # The shares for which gain - share * rise lies within its own interval around zero.
    square = reach**2
    a = rise**2 - square * rise_square
    b = gain * rise - square * both
    c = gain**2 - square * gain_square
    half = math.sqrt(max(b**2 - a * c, 0.0))
    return Recovered(gain / rise, (b - half) / a, (b + half) / a, rise, error)
