"""How the pressure of every term of the objective changes with the number of sites, the batch, and
the number of processes.

For one component of one site, with values a_i at N positions, S = sum (a_i + eps)^p and M = S / N,
the penalty is `coeff M (1 + beta log2(1 + S))` and its pressure on one value

    dL/da_i = coeff (p / N) (a_i + eps)^(p - 1) [1 + beta (log2(1 + S) + S / ((1 + S) ln 2))].

docs/scaling.md derives it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import binom
from torch import Tensor

from assay.errors import InputError


def pressure(
    upper: Float[Tensor, "positions components"],
    *,
    coefficient: float,
    beta: float,
    p: float,
    eps: float = 1e-12,
    total: Float[Tensor, " components"] | None = None,
    count: int | None = None,
) -> Float[Tensor, "positions components"]:
    """Return dL/da of the L_p penalty in closed form, every entry of one site.

    `total` and `count` are S and N where the values are one process's share of them."""
    raised = upper + eps
    total = (raised**p).sum(0) if total is None else total
    count = len(upper) if count is None else count
    frequent = (1 + total).log2() + total / ((1 + total) * math.log(2))
    return coefficient * p / count * raised ** (p - 1) * (1 + beta * frequent)


@dataclass(frozen=True)
class BatchChange:
    """Relative changes when the number of positions goes from `before` to `after` at a fixed mean
    M of a^p: of the parts of the penalty, of the whole, and of its pressure on one component (all
    positions together).

    `share` is the part of the pressure that the entropy makes before the change, `beta` the
    coefficient that would keep the penalty at this M."""

    mean: float
    before: int
    after: int
    lp: float
    entropy: float
    penalty: float
    pressure: float
    share: float
    beta: float


def batch_change(mean: float, before: int, after: int, beta: float) -> BatchChange:
    """Return what another batch does to a component whose mean of a^p is M.

    The L_p part M does not change; the entropy part `beta M log2(1 + M N)` gains about
    `beta M log2(after / before)`. Raises InputError for numbers that are not positive."""
    if not mean > 0 or before < 1 or after < 1 or not beta >= 0:
        raise InputError(
            f"mean, before and after must be above 0 and beta at least 0, got {mean}, {before},"
            f" {after} and {beta}"
        )
    old, new = math.log2(1 + mean * before), math.log2(1 + mean * after)
    return BatchChange(
        mean,
        before,
        after,
        lp=0.0,
        entropy=new / old - 1,
        penalty=(1 + beta * new) / (1 + beta * old) - 1,
        pressure=_bracket(mean * after, beta) / _bracket(mean * before, beta) - 1,
        share=1 - 1 / _bracket(mean * before, beta),
        beta=beta * old / new,
    )


@dataclass(frozen=True)
class SiteChange:
    """Factors when the number of sites goes from `before` to `after` equal ones.

    `minimality` and `relative` (per-site relative faithfulness) are the pressure on one component,
    `faithful` that of the squared error over the number of entries, `together` the mean number of
    sites that uniform-k routing masks at once."""

    before: int
    after: int
    minimality: float
    faithful: float
    relative: float
    together: tuple[float, float]


def site_change(before: int, after: int) -> SiteChange:
    """Return what another number of sites does to every term; InputError below one site."""
    if min(before, after) < 1:
        raise InputError(f"sites must be at least 1, got {before} and {after}")
    return SiteChange(before, after, 1.0, before / after, 1.0, ((before + 1) / 2, (after + 1) / 2))


@dataclass(frozen=True)
class Floor:
    """What eps makes of components that are never important: each counts as `firings` firings, and
    a site of dead ones costs `loss` before the coefficient."""

    firings: float
    loss: float


def eps_floor(count: int, *, p: float, eps: float, beta: float, components: int) -> Floor:
    """Return `S = N eps^p` of a dead component and the penalty of a whole dead site."""
    if not eps > 0 or not p > 0 or min(count, components) < 1:
        raise InputError("eps, p, count and components must be above 0")
    firings = count * eps**p
    return Floor(firings, components * firings / count * (1 + beta * math.log2(1 + firings)))


@dataclass(frozen=True)
class ShardBias:
    """Expected value over the true one when every process takes the logarithm of its own estimate,
    `log2(1 + world S_local)`: of the log term and of the whole penalty."""

    log_term: float
    penalty: float


def shard_bias(*, rate: float, world: int, positions: int, beta: float) -> ShardBias:
    """Return the bias of a local estimator for a component that fires at a rate, a = 1 where it
    does.

    `M log2(1 + S)` is convex in S, so the mean over processes is too large (Jensen). The
    expectations are sums over binomial counts, exact up to rounding. Summing over processes before
    the logarithm has no bias, whatever their number."""
    if not 0 < rate <= 1 or min(world, positions) < 1 or not beta >= 0:
        raise InputError(
            "rate must lie in (0, 1], world and positions be at least 1 and beta at least 0, got"
            f" {rate}, {world}, {positions} and {beta}"
        )
    local = _expected_log(positions, rate, world)
    whole = _expected_log(world * positions, rate, 1)
    return ShardBias(local / whole, (1 + beta * local) / (1 + beta * whole))


def _expected_log(positions: int, rate: float, scale: int) -> float:
    """Return E[K log2(1 + scale K)] / E[K] of a binomial count K."""
    mean = positions * rate
    reach = int(min(positions, mean + 40 * math.sqrt(mean) + 60))
    counts = np.arange(1, reach + 1)
    weights = binom.pmf(counts, positions, rate) * counts
    return float((weights * np.log2(1 + scale * counts)).sum() / mean)


def _bracket(total: float, beta: float) -> float:
    return 1 + beta * (math.log2(1 + total) + total / ((1 + total) * math.log(2)))
