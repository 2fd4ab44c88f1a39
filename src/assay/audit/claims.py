"""What an attribution graph claims of its nodes and edges, beside what is measured exactly.

Influences and effects of links go by the names of nodes and in any order, as files hold them;
`assay.edges.prompt.influence` has the same of dense edges, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from assay.audit.agreement import Agreement, agreement
from assay.audit.bars import conformal_quantile
from assay.errors import InputError

Link = tuple[str, str, float]


def implied_effects(
    links: Sequence[Link], output: str, activations: Mapping[str, float]
) -> dict[str, float]:
    """Return what the graph says that an output loses without each node.

    effect(u) = w(u -> output) + sum_v w(u -> v) / a_v effect(v), with a_v the activation of the
    feature v: an edge moves what v reads, an active feature follows it, and everything that v does
    scales with it. Features whose activation is zero or not known pass nothing on. Raises
    InputError where the links form a circle."""
    found: dict[str, float] = {}
    for node, outgoing in _backwards(links):
        effect = 0.0
        for receiver, weight in outgoing:
            if receiver == output:
                effect += weight
            elif activations.get(receiver):
                effect += weight / activations[receiver] * found[receiver]
        found[node] = _finite(node, effect)
    return found


def influences(
    links: Sequence[Link], outputs: Mapping[str, float]
) -> tuple[dict[str, float], list[float]]:
    """Return the influence of every node and link on outputs of given weights.

    influence(u) = sum_v |w(u -> v)| / sum_x |w(x -> v)| (influence(v) + weight(v)), and a link's
    influence is its own term of the sum, as circuit-tracer prunes by. Over the links that the graph
    has. Raises InputError where the links form a circle."""
    incoming: dict[str, float] = {}
    for _, target, weight in links:
        incoming[target] = _finite(target, incoming.get(target, 0.0) + abs(weight))

    def share(target: str, weight: float) -> float:
        return abs(weight) / incoming[target] if incoming[target] else 0.0

    found: dict[str, float] = {}
    for node, outgoing in _backwards(links):
        found[node] = sum(
            share(receiver, weight) * (found[receiver] + outputs.get(receiver, 0.0))
            for receiver, weight in outgoing
        )
    of_links = [
        share(target, weight) * (found[target] + outputs.get(target, 0.0))
        for _, target, weight in links
    ]
    return found, of_links


def _finite(node: str, value: float) -> float:
    if not math.isfinite(value):
        raise InputError(f"the weights of the links at {node!r} add up to {value}")
    return value


def _backwards(links: Sequence[Link]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Return nodes with their outgoing links, each behind all that it points to."""
    outgoing: dict[str, list[tuple[str, float]]] = {}
    incoming: dict[str, list[str]] = {}
    for source, target, weight in links:
        outgoing.setdefault(source, []).append((target, weight))
        outgoing.setdefault(target, [])
        incoming.setdefault(target, []).append(source)
    waiting = {node: len(targets) for node, targets in outgoing.items()}
    ready = [node for node, count in waiting.items() if not count]
    order = []
    while ready:
        node = ready.pop()
        order.append((node, outgoing[node]))
        for source in incoming.get(node, ()):
            waiting[source] -= 1
            if not waiting[source]:
                ready.append(source)
    if len(order) < len(outgoing):
        around = _circle(outgoing, waiting)
        raise InputError(f"the links of the graph form a circle through {around!r}")
    return order


def _circle(outgoing: Mapping[str, Sequence[tuple[str, float]]], waiting: Mapping[str, int]) -> str:
    """Return a node on a circle: from a waiting node on, each points to one that waits too."""
    node, passed = next(node for node, count in waiting.items() if count), set[str]()
    while node not in passed:
        passed.add(node)
        node = next(target for target, _ in outgoing[node] if waiting[target])
    return node


@dataclass(frozen=True)
class Claims:
    """Claims beside exact effects, one row each, the most influential first.

    Columns behind those given: exact (null where it was not measured), bar (the half-width around
    the claim; 0 where the exact effect is known, null where there is none), right_sign, holds (the
    right sign, and the claim within a share `within` of the exact effect) and survives (an exact
    effect of at least a share `threshold` of the largest). `agreement` is over all measured rows,
    `listed` over the first `top`. A bar holds with probability 1 - alpha for a row drawn like the
    measured sample of its stratum, the rows of about the same rank."""

    table: pl.DataFrame
    agreement: Agreement | None
    listed: Agreement | None
    top: int
    within: float
    threshold: float

    def summary(self) -> dict[str, Any]:
        """Return counts of the first `top` rows, and the agreement, as plain values."""
        first = self.table.head(self.top)
        known = first.filter(pl.col("exact").is_not_null())
        return {
            "listed": known.height,
            "right_sign": int(known["right_sign"].sum()),
            "hold": int(known["holds"].sum()),
            "survive": int(known["survives"].sum()),
            "measured": int(self.table["exact"].is_not_null().sum()),
            "of": self.table.height,
            "top": self.top,
            "within": self.within,
            "threshold": self.threshold,
            "agreement": _shown(self.agreement),
            "agreement_of_listed": _shown(self.listed),
        }

    def sentence(self, what: str) -> str:
        """Say in words how many of the first rows hold."""
        found = self.summary()
        return (
            f"{found['hold']} of the top {found['listed']} {what} hold exactly (right sign, claim"
            f" within {self.within:.0%} of the exact effect); {found['right_sign']} have the right"
            f" sign, {found['survive']} have {self.threshold:.0%} of the largest exact effect or"
            " more"
        )


def judge(
    table: pl.DataFrame,
    *,
    top: int = 50,
    within: float = 0.25,
    threshold: float = 0.05,
    alpha: float = 0.1,
) -> Claims:
    """Compare the columns claimed and exact of a table that is ordered by what it claims.

    `sampled` marks rows that were drawn at random in their `stratum`, a number (null for rows that
    are in none): their residuals |claimed - exact| / scale give the rows of the stratum without an
    exact effect a bar (arXiv 1604.04173). The scale is |claimed|, at least its median in the
    stratum, since large claims err by more. Raises InputError where no row was measured."""
    claimed = table["claimed"].to_numpy()
    exact = table["exact"].cast(pl.Float64).fill_null(np.nan).to_numpy()
    known = np.isfinite(exact)
    if not known.any():
        raise InputError("no claim was measured: the graph has no node or edge that can be patched")
    drawn = known & table["sampled"].to_numpy()
    bars = np.where(known, 0.0, np.inf)
    strata = table["stratum"].cast(pl.Int64)
    for one in strata.drop_nulls().unique():
        inside = strata.eq_missing(one).to_numpy()
        sizes = np.abs(claimed)
        floor = np.median(sizes[inside]) or sizes[inside].max() or 1.0
        scale = np.maximum(sizes, floor)
        with np.errstate(over="ignore", invalid="ignore"):
            residuals = (np.abs(claimed - exact) / scale)[inside & drawn]
            bars[inside & ~known] = conformal_quantile(residuals, alpha) * scale[inside & ~known]
    largest = float(np.abs(exact[known]).max())
    right = np.sign(claimed) == np.sign(exact)
    with np.errstate(over="ignore"):
        close = np.abs(claimed - exact) <= within * np.abs(exact)
    survives = np.abs(exact) >= threshold * largest if largest else np.zeros(len(exact), bool)

    def told(values: np.ndarray) -> list[bool | None]:
        return [bool(value) if here else None for value, here in zip(values, known, strict=True)]

    judged = table.with_columns(
        pl.Series("bar", [bar if math.isfinite(bar) else None for bar in bars], dtype=pl.Float64),
        pl.Series("right_sign", told(right), dtype=pl.Boolean),
        pl.Series("holds", told(right & close), dtype=pl.Boolean),
        pl.Series("survives", told(survives), dtype=pl.Boolean),
    )
    first = known & (np.arange(len(exact)) < top)
    return Claims(
        judged.drop("sampled", "stratum"),
        agreement(claimed[known], exact[known]),
        agreement(claimed[first], exact[first]) if first.any() else None,
        top,
        within,
        threshold,
    )


def _shown(found: Agreement | None) -> dict[str, Any] | None:
    if found is None:
        return None
    kept = {key: value for key, value in found.to_dict().items() if key not in ("recall", "k")}
    return {key: value for key, value in kept.items() if key != "reason" or value}
