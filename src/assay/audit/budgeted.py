"""Screen, flag, fix: spend a budget of exact patches where the estimates are least certain and
matter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from jaxtyping import Bool
from torch import Tensor

from assay.attribution.scores import Scores
from assay.audit.audit import Audit
from assay.audit.effects import ExactEffects
from assay.audit.population import Population, population
from assay.core.values import columns, data, unravel
from assay.errors import InputError


@dataclass(frozen=True)
class Budgeted:
    """Scores with exact values where patches were spent: `exact[group]` (examples, *axes) says
    which values are exact; it is sparse where a group is large.

    `patches` counts the (example, part) pairs that were patched for this, `flagged` the pairs that
    could be among the `top` parts of their example and whose value is not exact."""

    scores: Scores
    exact: Mapping[str, Bool[Tensor, "examples ..."]]
    patches: int
    flagged: int
    cpu_seconds: float

    @property
    def share_exact(self) -> float:
        """The share of all values that is exact."""
        return sum(float(data(mask).sum()) for mask in self.exact.values()) / sum(
            mask.numel() for mask in self.exact.values()
        )

    def table(self) -> pl.DataFrame:
        """Return one row a part, as the scores' own table, with the share of examples in which
        its value is exact.
        """
        frames = []
        for name, mask in self.exact.items():
            found, places = columns(mask.double())
            axes = tuple(mask.shape[1:])
            index = unravel(places, axes).tolist()
            frames.append(
                pl.DataFrame(
                    {"group": [name] * len(index), "index": index, "share": found.mean(0).tolist()},
                    schema={"group": pl.String, "index": pl.List(pl.Int64), "share": pl.Float64},
                )
            )
        shares = pl.concat(frames).rename({"share": "share_exact"})
        table = self.scores.table().join(
            shares, on=["group", "index"], how="left", maintain_order="left"
        )
        return table.with_columns(pl.col("share_exact").fill_null(0.0))

    to_polars = table

    def top(self, count: int = 20) -> pl.DataFrame:
        """Return the parts with the largest mean |score|."""
        return self.table().sort("size", descending=True).head(count)


def budgeted(
    scores: Scores,
    patches: int,
    *,
    against: Scores | None = None,
    bars: Audit | None = None,
    top: int | None = None,
    budget: int | None = None,
) -> Budgeted:
    """Replace the least certain scores that matter by exact ablations, `patches` of them in every
    example (arXiv 2606.09899).

    A part's doubt is the half-width of its error bar (`bars`; exact values that the audit has are
    reused at no cost) or its difference from other scores (`against`). Screened in are the parts
    with |score| + doubt at least as large as the `top`-th largest |score| of the example (default:
    a tenth of its active parts): they could belong there. Of these the most doubtful are ablated,
    then the most doubtful of the others. Gates shared over the batch are chosen by means over
    examples.

    Raises InputError without exactly one source of doubt, and for counts below one.
    """
    if (against is None) == (bars is None):
        raise InputError(
            "give either against= (other scores of the same parts) or bars= (an audit of these"
            " scores)"
        )
    if bars is not None and bars.scores is not scores:
        raise InputError("bars must be an audit of the scores that are given")
    if against is not None and set(against.values) != set(scores.values):
        raise InputError("against must score the same groups of parts")
    for what, count in (("patches", patches), ("top", 1 if top is None else top)):
        if count < 1:
            raise InputError(f"{what} must be at least 1, got {count}")
    began = time.process_time()
    parts = population(scores)
    effects = ExactEffects(scores.mechanisms, budget=budget) if bars is None else bars.effects
    value, known = parts.score.copy(), np.zeros(len(parts), dtype=bool)
    if bars is not None:
        rows = bars.ablated_rows
        value[rows], known[rows] = bars.table["exact"].to_numpy(), True
        doubt = parts.column(bars.half_widths())
    else:
        assert against is not None
        doubt = np.abs(parts.score - parts.column(against.values))
    # Candidates per example; per part, by means over examples, where gates are shared.
    owner, unit = (
        (np.zeros(len(parts), dtype=np.int64), parts.part)
        if parts.shared
        else (parts.example, np.arange(len(parts)))
    )
    chosen, matters = _choose(parts, owner, unit, doubt, known, patches, top)
    rows = np.flatnonzero(chosen & ~known)
    if len(rows):
        found = effects.of(parts, rows)
        value[rows] = np.abs(found) if scores.unsigned else found
    known[rows] = True
    spent = time.process_time() - began
    fixed = replace(
        scores,
        values=parts.values(value),
        method=f"{scores.method}, {patches} exact patches",
        cpu_seconds=spent,
    )
    return Budgeted(fixed, parts.values(known), len(rows), int((matters & ~known).sum()), spent)


def _choose(
    parts: Population,
    owner: np.ndarray,
    unit: np.ndarray,
    doubt: np.ndarray,
    known: np.ndarray,
    patches: int,
    top: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows to ablate and which could be among the `top` of their owner: `patches`
    units of every owner, what matters before what does not, each by doubt.
    """
    keys, first, place = np.unique(unit, return_index=True, return_inverse=True)
    count = np.bincount(place)
    # A bar that is missing counts as the largest doubt.
    largest = doubt[np.isfinite(doubt)].max(initial=0.0)
    finite = np.where(np.isfinite(doubt), doubt, 2 * largest + 1.0)
    size, unsure, done = (
        np.bincount(place, weights=entry) / count
        for entry in (np.abs(parts.score), finite, known.astype(float))
    )
    group = owner[first]
    order = np.lexsort((-size, group))
    members = np.bincount(group, minlength=int(group.max()) + 1)
    starts = np.cumsum(members) - members
    wanted = np.maximum(members // 10, 1) if top is None else np.minimum(members, top)
    level = size[order][np.minimum(starts + wanted - 1, len(order) - 1)]
    matters = size + unsure >= level[group]
    rank = np.lexsort((-unsure, ~matters, done >= 1, group))
    within = np.empty(len(keys), dtype=np.int64)
    within[rank] = np.arange(len(keys)) - np.repeat(starts, members)
    chosen = (within < patches) & (done < 1)
    return chosen[place], matters[place]
