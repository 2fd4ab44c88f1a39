"""Screen, flag, fix: spend a budget of exact patches where the estimates are least certain and
matter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import polars as pl
import torch
from jaxtyping import Bool
from torch import Tensor

from assay.attribution.exact import ablate
from assay.attribution.scores import Scores
from assay.audit.audit import Audit
from assay.core.values import unravel
from assay.errors import InputError


@dataclass(frozen=True)
class Budgeted:
    """Scores with exact values where patches were spent: `exact[group]` (examples, *axes) says
    which values are exact.

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
        return sum(float(mask.sum()) for mask in self.exact.values()) / sum(
            mask.numel() for mask in self.exact.values()
        )

    def table(self) -> pl.DataFrame:
        """Return one row a part, as the scores' own table, with the share of examples in which
        its value is exact.
        """
        shares = {name: mask.double().mean(0) for name, mask in self.exact.items()}
        return self.scores.table().with_columns(
            pl.struct("group", "index")
            .map_elements(
                lambda row: float(shares[row["group"]][tuple(row["index"])]),
                return_dtype=pl.Float64,
            )
            .alias("share_exact")
        )

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
    taken over for nothing) or its difference from other scores (`against`). Screened in are the
    parts with |score| + doubt at least as large as the `top`-th largest |score| of the example
    (default: a tenth of the parts): they could belong there. Of these the most doubtful are
    ablated, then the most doubtful of the others. Gates shared over the batch are chosen by means
    over examples.

    Raises InputError without exactly one source of doubt, and for counts below one.
    """
    if (against is None) == (bars is None):
        raise InputError(
            "give either against= (other scores of the same parts) or bars= (an audit of these"
            " scores)"
        )
    if bars is not None and bars.scores is not scores:
        raise InputError("bars must be an audit of the scores that are given")
    for what, count in (("patches", patches), ("top", 1 if top is None else top)):
        if count < 1:
            raise InputError(f"{what} must be at least 1, got {count}")
    began = time.process_time()
    mechanisms = scores.mechanisms
    doubt = _doubt(scores, against, bars)
    values = {name: entry.clone() for name, entry in scores.values.items()}
    known = {
        name: torch.zeros(entry.shape, dtype=torch.bool, device=entry.device)
        for name, entry in values.items()
    }
    if bars is not None:
        _take_over(bars, values, known)
    shared = not all(group.per_example for group in mechanisms.groups.values())
    size, unsure, done = (
        _flat(entry, shared)
        for entry in (scores.values, doubt, {k: v.double() for k, v in known.items()})
    )
    active = (
        _flat({name: (norm > 0).double() for name, norm in mechanisms.norms().items()}, shared) > 0
    )
    count = size.shape[1]
    place = min(count, max(1, count // 10) if top is None else top)
    matters = active & (size.abs() + unsure >= size.abs().topk(place, dim=1).values[:, -1:])
    open_ = active & (done < 1)
    # Ranks: what matters before what does not, each by doubt; a bar that is missing counts as the
    # largest doubt.
    finite = unsure.nan_to_num(
        posinf=2 * float(unsure[unsure.isfinite()].max() if unsure.isfinite().any() else 1.0) + 1.0
    )
    rank = (finite / finite.max().clamp_min(1e-300) + matters).masked_fill(~open_, -1.0)
    best = rank.topk(min(patches, count), dim=1)
    chosen = torch.zeros_like(open_).scatter(1, best.indices, best.values >= 0)
    spent, start = 0, 0
    for name, group in mechanisms.groups.items():
        width = values[name][0].numel()
        mask = chosen[:, start : start + width].expand(len(mechanisms.batch), -1)
        start += width
        if mask.any():
            spent += int(mask.sum())
            _fix(scores, name, mask, values[name], budget, shared=shared and not group.per_example)
            known[name] |= mask.reshape(known[name].shape)
            values[name] = values[name].abs() if scores.unsigned else values[name]
    left = matters & ~(_flat({name: mask.double() for name, mask in known.items()}, shared) >= 1)
    fixed = replace(
        scores,
        values=values,
        method=f"{scores.method}, {patches} exact patches",
        cpu_seconds=time.process_time() - began,
    )
    return Budgeted(
        fixed,
        known,
        spent,
        int(left.sum()) * (len(mechanisms.batch) if shared else 1),
        time.process_time() - began,
    )


def _doubt(scores: Scores, against: Scores | None, bars: Audit | None) -> dict[str, Tensor]:
    if bars is not None:
        return bars.half_widths()
    assert against is not None
    if set(against.values) != set(scores.values):
        raise InputError("against must score the same groups of parts")
    return {name: (entry - against.values[name]).abs() for name, entry in scores.values.items()}


def _take_over(bars: Audit, values: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
    for (name,), part in bars.table.group_by(["group"]):
        index = torch.tensor(part["index"].to_list()).reshape(part.height, -1)
        where = (torch.tensor(part["example"].to_list()), *index.unbind(-1))
        values[str(name)][where] = torch.tensor(part["exact"].to_list(), dtype=torch.float64).to(
            values[str(name)].device
        )
        known[str(name)][where] = True


def _flat(values: Mapping[str, Tensor], shared: bool) -> Tensor:
    flat = torch.cat([entry.flatten(1).double() for entry in values.values()], dim=1)
    return flat.mean(0, keepdim=True) if shared else flat


def _fix(
    scores: Scores, name: str, mask: Tensor, values: Tensor, budget: int | None, *, shared: bool
) -> None:
    """Write the exact effects of the chosen parts (examples, parts) of one group into `values`."""
    mechanisms = scores.mechanisms
    axes = mechanisms.group(name).axes
    flat = values.view(len(values), -1)
    if shared:
        parts = mask[0].nonzero().flatten()
        index = unravel(parts, axes)
        flat[:, parts] = ablate(mechanisms, name, index, budget=budget).T.to(flat.device)
        return
    rows = int(mask.sum(1).max())
    # The chosen parts of each example first; examples with fewer of them ablate others beside,
    # which are not used.
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :rows]
    index = unravel(order.T, axes)
    effects = ablate(mechanisms, name, index, budget=budget).T.to(flat.device)
    wanted = mask.gather(1, order)
    examples = torch.arange(len(flat), device=flat.device)[:, None].expand_as(order)
    flat[examples[wanted], order[wanted]] = effects[wanted]
