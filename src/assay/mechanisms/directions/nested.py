"""The same quadratic forms by nested forward-mode derivatives: slower, and independent of the
output metric.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import jvp, vmap

from assay.core.norms import PlainNorms
from assay.mechanisms.directions.divergence import Divergence, divergence
from assay.mechanisms.directions.local import Local


def nested_quadratic_forms(
    local: Local, directions: Tensor, measure: str | Divergence = "kl"
) -> Tensor:
    """Return `u^T H_x u`, `(samples, k)`, as the second derivative of `D(f(x, W0 + a u), f(x, W0))`
    in `a` at 0.

    The exact twin of `quadratic_forms` for checks: everything is evaluated in one batch.
    """
    measure = divergence(measure)
    weights = local.weights
    # Under nested forward mode `no_grad` around a dual value drops its tangent; the reference is a
    # plain constant instead.
    reference = local.output().detach()

    def along(shift: dict[str, Tensor], amount: Tensor) -> Tensor:
        output = local.output(
            {name: value + amount * shift[name] for name, value in weights.items()}
        )
        return measure.value(output, reference)

    def second(shift: dict[str, Tensor]) -> Tensor:
        def first(amount: Tensor) -> Tensor:
            return jvp(lambda a: along(shift, a), (amount,), (torch.ones_like(amount),))[1]

        zero = torch.zeros((), dtype=directions.dtype, device=directions.device)
        return jvp(first, (zero,), (torch.ones_like(zero),))[1]

    with PlainNorms():
        forms = vmap(second)(local.space.split(directions)).movedim(0, 1)
    return forms if forms.ndim == 2 else forms.flatten(2).mean(2)
