"""Second-order attribution: the gradient less half the curvature of each gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.attribution.exact import every
from assay.attribution.gradient import gate_gradient
from assay.attribution.method import Estimate, Method
from assay.core.mechanisms import Mechanisms, differentiable
from assay.core.sites import Record
from assay.core.values import add
from assay.memory import rows_within
from assay.progress import progress


@dataclass(frozen=True)
class SecondOrder(Method):
    """score_k = dF/dgate_k - 1/2 d2F/dgate_k^2 at all ones, exact when F is quadratic in each
    gate.
    """

    budget: int | None = None

    name = "second order"

    def estimate(self, mechanisms: Mechanisms) -> Estimate:
        baseline, first = gate_gradient(mechanisms)
        known = mechanisms.second_rule()
        record = mechanisms.record() if known is None else None
        values: dict[str, Tensor] = {}
        for name, group in progress(mechanisms.groups.items(), "second order"):
            if known is not None:
                second = known[name].double()
            else:
                rows = curvature(
                    mechanisms, name, every(mechanisms, name), record=record, budget=self.budget
                )
                second = rows.T.reshape(len(mechanisms.batch), *group.axes)
            values[name] = add(first[name], -second / 2)
        return Estimate(baseline, values)


def curvature(
    mechanisms: Mechanisms,
    name: str,
    index: Int[Tensor, "rows axes"],
    *,
    record: Record | None = None,
    budget: int | None = None,
) -> Float[Tensor, "rows examples"]:
    """Return d2F/dgate2 at all ones for rows of parts of one group, by two nested forward-mode
    derivatives a row.
    """
    group = mechanisms.group(name)
    record = mechanisms.record() if record is None else record
    ones = mechanisms.ones([name])[name]

    def row(place: Tensor) -> Tensor:
        tangent = torch.ones((), device=ones.device)
        for axis, size in enumerate(group.axes):
            here = (torch.arange(size, device=ones.device) == place[axis]).to(ones.dtype)
            tangent = tangent * here.reshape(
                [size if other == axis else 1 for other in range(len(group.axes))]
            )
        tangent = tangent.to(ones.dtype).expand(group.shape) if group.per_example else tangent

        def along(step: Tensor) -> Tensor:
            return mechanisms.values({name: ones + step * tangent}, record=record)

        zero, unit = torch.zeros((), dtype=ones.dtype), torch.ones((), dtype=ones.dtype)
        return torch.func.jvp(
            lambda step: torch.func.jvp(along, (step,), (unit,))[1], (zero,), (unit,)
        )[1]

    chunk = rows_within(
        12 * record.size_from(mechanisms.target.model, mechanisms.touched([name])),
        budget,
        device=ones.device,
    )
    rows = differentiable(lambda: torch.func.vmap(row, chunk_size=chunk)(index.to(ones.device)))
    return rows.detach().double()
