"""Integrated gradients of one part at a time: an estimate of what its removal alone does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.attribution.exact import every
from assay.attribution.method import Estimate, Method
from assay.core.mechanisms import Mechanisms, differentiable
from assay.core.sites import Record, Seen
from assay.core.values import active_rows, scatter
from assay.errors import InputError
from assay.memory import rows_within
from assay.progress import progress


@dataclass(frozen=True)
class NodePath(Method):
    """score_k = int_0^1 dF/dgate_k(a) da, where the gate of part k alone goes from one to zero: the
    gradient, averaged along the change of this part, times the change.

    The integral is F(ones) - F(gate k at 0); `points` Gauss-Legendre points are its only error.
    Every part costs that many forward and backward passes of what follows its site: where few parts
    are active, or where they all are ablated anyway, `Exact` is cheaper. `IntegratedGradients`
    moves the gates of a whole site together and estimates another quantity. Sheet: features."""

    points: int = 4
    budget: int | None = None

    name = "node-path integrated gradients"

    def estimate(self, mechanisms: Mechanisms) -> Estimate:
        values: dict[str, Tensor] = {}
        record = cache(mechanisms.record)
        norms = cache(mechanisms.norms)
        for name, group in mechanisms.groups.items():
            if group.per_example:
                index, active = active_rows(norms()[name])
            else:
                index = every(mechanisms, name)
            found = node_path(
                mechanisms, name, index, points=self.points, record=record, budget=self.budget
            )
            values[name] = (
                scatter(group.shape, index, active, found)
                if group.per_example
                else found.T.reshape(len(mechanisms.batch), *group.axes)
            )
        with torch.no_grad():
            return Estimate(mechanisms.values().double(), values)


def node_path(
    mechanisms: Mechanisms,
    name: str,
    index: Int[Tensor, "rows *examples axes"],
    *,
    points: int = 4,
    record: Record | Callable[[], Record] | None = None,
    budget: int | None = None,
    general: bool = False,
) -> Float[Tensor, "rows examples"]:
    """Return the path integral of `NodePath` for rows of parts of one group, in float64.

    `index` is (rows, axes) or (rows, examples, axes), as for `ablate`. Raises InputError for less
    than one point."""
    if points < 1:
        raise InputError(f"points must be at least 1, got {points}")
    mechanisms.require_unchanged()
    group = mechanisms.group(name)
    index = index.to(mechanisms.target.device)
    if group.per_example and index.ndim == 2:
        index = index[:, None].expand(-1, len(mechanisms.batch), -1)
    places, weights = np.polynomial.legendre.leggauss(points)
    total = torch.zeros(len(index), len(mechanisms.batch), dtype=torch.float64)
    total = total.to(mechanisms.target.device)
    for place, weight in progress(
        list(zip(((places + 1) / 2).tolist(), (weights / 2).tolist(), strict=True)), f"path {name}"
    ):
        known = None if general else mechanisms.slope_rule(name, index, place, budget)
        found = (
            known if known is not None else _slopes(mechanisms, name, index, place, record, budget)
        )
        total += weight * found.to(total)
    return total


def _slopes(
    mechanisms: Mechanisms,
    name: str,
    index: Tensor,
    gate: float,
    record: Record | Callable[[], Record] | None,
    budget: int | None,
) -> Tensor:
    """Return dF/dgate of rows of parts with their own gate at one value, by a forward-mode
    derivative a row from the group's first site on.
    """
    made = record if isinstance(record, Record) else (record or mechanisms.record)()
    touched = mechanisms.touched([name])
    start = torch.tensor(gate, dtype=torch.float64, device=mechanisms.target.device)

    def row(place: Tensor) -> Tensor:
        def metric(share: Tensor) -> Tensor:
            def scale(site: str, seen: Seen) -> Tensor:
                wide = torch.promote_types(seen.written.dtype, torch.float32)
                part = mechanisms.parts(site, seen)[name].one(place).to(wide)
                return (seen.written.to(wide) - (1 - share).to(wide) * part).to(seen.written.dtype)

            edits = mechanisms.edits_of([name], scale)
            return mechanisms.target.values(mechanisms.batch, edits, record=made, resume=touched)

        return torch.func.jvp(metric, (start,), (torch.ones_like(start),))[1]

    chunk = rows_within(
        8 * made.size_from(mechanisms.target.model, touched),
        budget,
        device=mechanisms.target.device,
    )
    if not len(index):
        return torch.zeros(0, len(mechanisms.batch), dtype=torch.float64)
    rows = differentiable(lambda: torch.func.vmap(row, chunk_size=chunk)(index))
    return rows.detach().double()
