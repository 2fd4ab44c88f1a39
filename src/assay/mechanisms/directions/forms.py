"""Second derivatives of a divergence along parameter directions, from one forward-mode
derivative per direction.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from assay.errors import InputError
from assay.mechanisms.directions.divergence import Divergence, divergence
from assay.mechanisms.directions.local import Local
from assay.progress import progress

BUDGET = 2**29
CACHE = 2**26
"""Bytes of intermediates worth having at once on a CPU: larger chunks leave its cache, and each of
their results is fresh memory.
"""


def quadratic_forms(
    local: Local,
    directions: Tensor,
    measure: str | Divergence = "kl",
    *,
    budget: int = BUDGET,
    per_position: bool = False,
) -> Tensor:
    """Return `d_u(x) = u^T H_x u` for every sample and direction, `(samples, k)`.

    `H_x = J^T M J` is the Hessian at `W0` of the divergence between the outputs at `W` and at `W0`;
    with `t = J u` (one JVP) it is `Var_{c ~ p0}[t_c]` for KL and `(2/o) ||t||^2` for MSE. Sequence
    outputs are averaged over positions, or kept with `per_position`: `(samples, k, positions)`.
    `directions` is `(k, size)`; `budget` is the bytes that one chunk may take."""
    measure = divergence(measure)
    directions = _checked(local, directions)
    some, many = _chunks(local, directions, budget)
    found = []
    for begin in progress(range(0, directions.shape[0], some), "quadratic forms"):
        shifts = local.shifts(directions[begin : begin + some])
        rows = []
        for first in progress(range(0, local.samples, many), "samples"):
            with torch.no_grad():
                output, tangent = local.take(slice(first, first + many)).pushed(shifts)
                form = measure.form(tangent, output)
            rows.append(form if per_position or form.ndim == 2 else form.flatten(2).mean(2))
        found.append(torch.cat(rows, dim=1))
    return torch.cat(found).movedim(0, 1)


def products(
    local: Local, directions: Tensor, measure: str | Divergence = "kl", *, budget: int = BUDGET
) -> Tensor:
    """Return `H_x u = J^T (M J u)` for every sample and direction, `(samples, k, size)`: one JVP
    and one VJP each.
    """
    measure = divergence(measure)
    directions = _checked(local, directions)
    some, _ = _chunks(local.take(slice(0, 1)), directions, budget // 4)
    found = []
    for sample in progress(range(local.samples), "products with the Hessian"):
        part = local.take(slice(sample, sample + 1))
        rows = []
        for begin in range(0, directions.shape[0], some):
            with torch.no_grad():
                output, tangent = part.tangents(directions[begin : begin + some])
                cotangent = measure.metric(tangent, output) / output[..., 0].numel()
            pull = vjp(part.output, part.weights)[1]
            rows.append(local.space.join(vmap(lambda one: pull(one)[0])(cotangent)))
        found.append(torch.cat(rows))
    return torch.stack(found)


def jacobian(local: Local, *, budget: int = BUDGET) -> tuple[Tensor, Tensor]:
    """Return the outputs `(samples, ..., o)` and `J = dz/dW` at `W0`, `(samples, ..., o, size)`.

    One JVP per parameter: for small parameter counts, where the weights are fixed and `J` is used
    many times. Raises InputError when the result alone would not fit the budget."""
    weights = next(iter(local.weights.values()))
    with torch.no_grad():
        output = local.output()
    size = local.space.size
    needed = output.numel() * size * output.element_size()
    if needed > 4 * budget:
        raise InputError(
            f"the Jacobian of {output.numel()} outputs in {size} parameters takes"
            f" {needed / 2**30:.1f} GiB, over {4 * budget / 2**30:.1f}; use fewer samples, fewer"
            " parameters, or per-token gradients"
        )
    basis = torch.eye(size, dtype=weights.dtype, device=weights.device)
    some, many = _chunks(local, basis, budget)
    found = []
    for first in progress(range(0, local.samples, many), "Jacobians"):
        part = local.take(slice(first, first + many))
        with torch.no_grad():
            rows = [part.tangents(basis[begin : begin + some])[1] for begin in range(0, size, some)]
        found.append(torch.cat(rows).movedim(0, -1))
    return output, torch.cat(found)


def _checked(local: Local, directions: Tensor) -> Tensor:
    if directions.ndim != 2 or directions.shape[1] != local.space.size:
        raise InputError(
            f"directions must be (k, {local.space.size}), got {tuple(directions.shape)}"
        )
    return directions


def _chunks(local: Local, directions: Tensor, budget: int) -> tuple[int, int]:
    """Choose how many directions and how many samples to take at once.

    Directions first: the plain forward pass is shared by all directions of a chunk.
    """
    # A tangent pass holds a handful of batched intermediates at its widest operation.
    per_pair = 8 * _largest_intermediate(local.take(slice(0, 1)))
    per_direction = 4 * local.space.size * directions.element_size()
    pairs = max(1, (CACHE if directions.device.type == "cpu" else budget) // per_pair)
    some = max(1, min(directions.shape[0], pairs, budget // (per_direction + per_pair)))
    return some, max(
        1, min(local.samples, pairs // some, (budget - some * per_direction) // (per_pair * some))
    )


class _Largest(TorchDispatchMode):
    """Records the largest result of any operation, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def _largest_intermediate(local: Local) -> int:
    with torch.no_grad(), _Largest() as record:
        local.output()
    return record.bytes
