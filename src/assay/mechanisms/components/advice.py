"""Keep or change: what another number of sites, another batch or several processes do to the
pressure of every term of the objective, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from assay.errors import InputError
from assay.mechanisms.components.scaling import batch_change, eps_floor, site_change

MEANS = (0.1, 0.01, 0.001, 1e-4)
"""Means M of a^p that the tables show: from a component that is often important to a rare one."""


@dataclass(frozen=True)
class Setting:
    """Where coefficients hold: the number of sites, and a batch of `batch` sequences of `sequence`
    positions over all processes.

    Raises InputError below one of each."""

    sites: int
    batch: int
    sequence: int = 1

    def __post_init__(self) -> None:
        for name in ("sites", "batch", "sequence"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def positions(self) -> int:
        """N, the number of positions of one batch."""
        return self.batch * self.sequence


@dataclass(frozen=True)
class Advice:
    """One row of the keep / change table: the `factor` on what the term asks of one importance
    value or one matrix, whether its coefficient stays, what to do, and the formula."""

    term: str
    factor: float
    keep: bool
    do: str
    formula: str


def advise(
    before: Setting, after: Setting, *, beta: float, p: float, eps: float = 1e-12
) -> tuple[Advice, ...]:
    """Return the keep / change table between two settings; every factor is one where nothing
    changes.

    The factors of the penalty hold at fixed importances. Where more sites are masked together the
    equilibrium may move all the same: the rows of routing say by how much more."""
    sites = site_change(before.sites, after.sites)
    common, rare = (
        batch_change(mean, before.positions, after.positions, beta)
        for mean in (MEANS[0], MEANS[-1])
    )
    floors = [
        eps_floor(setting.positions, p=p, eps=eps, beta=beta, components=1)
        for setting in (before, after)
    ]
    share = [(count + 1) / (2 * count) for count in (before.sites, after.sites)]
    entropy = common.entropy == 0
    return (
        Advice(
            "importance minimality, sites",
            sites.minimality,
            True,
            f"keep the coefficient; dividing by the sites would be a {1 / sites.faithful:.3g}x"
            " under-penalty"
            if after.sites > before.sites
            else "keep the coefficient",
            "dL/da = coeff (p/N) (a+eps)^(p-1) [...]: no factor of sites or components",
        ),
        Advice(
            "importance minimality, L_p part, batch",
            1 + common.lp,
            True,
            "keep the coefficient",
            "M = S/N is a mean over positions",
        ),
        Advice(
            "importance minimality, entropy part, batch",
            1 + common.entropy,
            entropy,
            "keep beta"
            if entropy
            else f"beta x {common.beta / beta if beta else 1:.3f} at M = {MEANS[0]:g}, x"
            f" {rare.beta / beta if beta else 1:.3f} at M = {MEANS[-1]:g}; or smooth-L0 with its"
            f" reference count kept at {before.positions}",
            "M log2(1 + M N') = M log2(1 + M N) + about M log2(N'/N)",
        ),
        Advice(
            "eps floor, firings of a dead component",
            floors[1].firings / floors[0].firings,
            floors[1].firings == floors[0].firings,
            f"a dead component counts as {floors[1].firings:.3g} firings"
            + (f" instead of {floors[0].firings:.3g}" if floors[0] != floors[1] else ""),
            "S = N eps^p",
        ),
        Advice(
            "faithfulness, sum / numel",
            sites.faithful,
            sites.faithful == 1,
            "keep the coefficient"
            if sites.faithful == 1
            else f"coefficient x {1 / sites.faithful:.3g}, or use the relative form",
            "sum_s |W_s - V_s U_s|^2 / sum_s numel(W_s)",
        ),
        Advice(
            "faithfulness, relative per site",
            sites.relative,
            True,
            "keep the coefficient",
            "sum_s |W_s - V_s U_s|^2 / |W_s|^2",
        ),
        Advice(
            "recon, layerwise",
            sites.faithful,
            sites.faithful == 1,
            "keep the coefficient"
            if sites.faithful == 1
            else f"coefficient x {1 / sites.faithful:.3g}: the term is a mean over sites",
            "(1/n) sum_s D(clean || s masked)",
        ),
        Advice(
            "recon, subset: share of positions where one site is masked",
            share[1] / share[0],
            True,
            _together(*sites.together),
            "k uniform on 1..n: share (n + 1) / 2n, together (n + 1) / 2",
        ),
        Advice(
            "recon, all sites",
            1.0,
            True,
            _together(before.sites, after.sites),
            "mean over positions of D(clean || all masked)",
        ),
        Advice(
            "adversary",
            1.0,
            True,
            "keep its rate and steps: sign and Adam steps do not depend on the size of the loss",
            "r <- clip(r + rate sign(dD/dr))",
        ),
    )


def _together(before: float, after: float) -> str:
    if before == after:
        return f"keep the coefficient; {after:g} sites are masked together"
    return (
        f"keep the coefficient; {after:g} sites are masked together instead of {before:g}, so the"
        " equilibrium may move"
    )


def batch_table(
    before: Setting, after: Setting, beta: float, means: Sequence[float] = MEANS
) -> list[dict[str, float]]:
    """Return one row per mean M: relative changes of the L_p part alone (no beta), the entropy part
    alone, the whole penalty and its pressure, the share of the pressure that beta makes, and the
    beta that keeps the penalty."""
    rows = []
    for mean in means:
        found = batch_change(mean, before.positions, after.positions, beta)
        rows.append(
            {
                "M": mean,
                "lp": found.lp,
                "entropy": found.entropy,
                "penalty": found.penalty,
                "pressure": found.pressure,
                "beta_share": found.share,
                "beta": found.beta,
            }
        )
    return rows
