"""Exact ablation: set one gate to zero and run, with the prefix computed once and many parts
side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.attribution.method import Estimate, Method
from assay.core.mechanisms import Mechanisms
from assay.core.sites import Record, Seen
from assay.core.values import active_rows, scatter, unravel
from assay.errors import InputError
from assay.memory import rows_within
from assay.progress import progress


@dataclass(frozen=True)
class Exact(Method):
    """score_k = F(ones) - F(gate k at 0), one ablation a part, under a memory budget in bytes
    (default: a quarter of what is free).
    """

    budget: int | None = None

    name = "exact"
    exact = True

    def estimate(self, mechanisms: Mechanisms) -> Estimate:
        values: dict[str, Tensor] = {}
        record = cache(mechanisms.record)  # made by the first group that needs it
        norms = cache(mechanisms.norms)
        for name, group in mechanisms.groups.items():
            if group.per_example:  # a part of norm zero has no effect
                index, active = active_rows(norms()[name])
                effects = ablate(mechanisms, name, index, record=record, budget=self.budget)
                values[name] = scatter(group.shape, index, active, effects)
            else:
                index = every(mechanisms, name)
                effects = ablate(mechanisms, name, index, record=record, budget=self.budget)
                values[name] = effects.T.reshape(len(mechanisms.batch), *group.axes)
        with torch.no_grad():
            return Estimate(mechanisms.values().double(), values)


def every(mechanisms: Mechanisms, name: str) -> Int[Tensor, "rows axes"]:
    """Return the index of every part of a group, one row each."""
    axes = mechanisms.group(name).axes
    count = int(torch.tensor(axes).prod()) if axes else 1
    return unravel(torch.arange(count), axes)


def ablate(
    mechanisms: Mechanisms,
    name: str,
    index: Int[Tensor, "rows *examples axes"],
    *,
    record: Record | Callable[[], Record] | None = None,
    budget: int | None = None,
    general: bool = False,
) -> Float[Tensor, "rows examples"]:
    """Return F(ones) - F(one gate at 0) for rows of parts of one group, in float64.

    `index` is (rows, axes), the same part in every example, or (rows, examples, axes), a part of
    its own for each (for gates with an example axis). A chunk of rows runs under vmap from the
    group's first site on, beside a row with every gate at one: a batched row differs from a single
    run by rounding, and inactive parts would otherwise show effects.

    Raises InputError when an index is out of range.
    """
    mechanisms.require_unchanged()
    group = mechanisms.group(name)
    index = index.to(mechanisms.target.device)
    limits = torch.tensor(group.axes, device=index.device)
    if index.shape[-1] != len(group.axes) or (index < 0).any() or (index >= limits).any():
        raise InputError(
            f"part index of {name!r} must have {len(group.axes)} entries within {group.axes}"
        )
    if group.per_example and index.ndim == 2:
        index = index[:, None].expand(-1, len(mechanisms.batch), -1)
    if not group.per_example and index.ndim == 3:
        raise InputError(f"the gates of {name!r} are shared over the batch: give one index a row")
    with torch.no_grad():
        known = None if general else mechanisms.ablate_rule(name, index, budget)
    if known is not None:
        return known.double()
    made = record if isinstance(record, Record) else (record or mechanisms.record)()

    touched = mechanisms.touched([name])

    def row(place: Tensor, weight: Tensor) -> Tensor:
        def remove(site: str, seen: Seen) -> Tensor:
            wide = torch.promote_types(seen.written.dtype, torch.float32)
            part = mechanisms.parts(site, seen)[name].one(place).to(wide)
            return (seen.written.to(wide) - weight * part).to(seen.written.dtype)

        edits = mechanisms.edits_of([name], remove)
        return mechanisms.target.values(mechanisms.batch, edits, record=made, resume=touched)

    chunk = rows_within(
        4 * made.size_from(mechanisms.target.model, touched),
        budget,
        device=mechanisms.target.device,
    )
    found = []
    with torch.no_grad():
        for rows in progress(index.split(chunk) if len(index) else (), f"ablating {name}"):
            places = torch.cat([rows[:1], rows])
            weights = torch.ones(len(places), device=index.device)
            weights[0] = 0
            values = _rows(row, places, weights).double()
            found.append(values[0] - values[1:])
    return torch.cat(found) if found else torch.zeros(0, len(mechanisms.batch), dtype=torch.float64)


def _rows(row, places: Tensor, weights: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    try:
        return torch.func.vmap(row)(places, weights)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        # A model with data-dependent control flow cannot be batched over parts; one part at a time
        # is the same number, later.
        return torch.stack(
            [row(place, weight) for place, weight in zip(places, weights, strict=True)]
        )
