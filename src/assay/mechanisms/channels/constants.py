"""The constant C of the error budget `|error| = C L delta^2`, realised and certified."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.channels.ablation import Ablation
from assay.mechanisms.channels.attribution import measure_steps
from assay.mechanisms.channels.certify import Certificates
from assay.mechanisms.channels.clean import Clean


@dataclass(frozen=True)
class Constants:
    """`realised = |error| / delta^2` of every channel and `certified`, its first-order bound over
    `delta^2`, (examples, blocks, hidden), NaN for channels that are off; `norms` is the mean of
    `||L_m|| ||R_m||` over the `later` blocks behind each block, (blocks,).

    A budget that takes the product of norms for C leaves out what the later blocks write, and in
    which direction the gradient looks."""

    steps: Float[Tensor, "examples blocks hidden"]
    realised: Float[Tensor, "examples blocks hidden"]
    certified: Float[Tensor, "examples blocks hidden"]
    norms: Float[Tensor, " blocks"]
    later: Float[Tensor, " blocks"]


@torch.no_grad()
def error_constants(clean: Clean, ablation: Ablation, certificates: Certificates) -> Constants:
    """Return the constants of every channel, from its exact error and its certificate."""
    steps = measure_steps(clean)
    squares = torch.where(steps > 0, steps.square(), torch.nan)
    products = [
        float(torch.linalg.matrix_norm(layer.left, 2) * torch.linalg.matrix_norm(layer.right, 2))
        for layer in clean.weights.layers
    ]
    count = len(products)
    later = [count - 1 - block for block in range(count)]
    norms = [
        sum(products[block + 1 :]) / later[block] if later[block] else 0.0 for block in range(count)
    ]
    return Constants(
        steps,
        ablation.errors.abs() / squares,
        (certificates.first - certificates.rounding) / squares,
        torch.tensor(norms, dtype=torch.float64),
        torch.tensor(later, dtype=torch.float64),
    )


def closed_form_steps(
    attribution: Float[Tensor, "examples blocks hidden"],
    constant: Float[Tensor, " blocks"] | float,
    later: Float[Tensor, " blocks"],
    tolerance: float = 0.1,
) -> Float[Tensor, "examples blocks hidden"]:
    """Return `sqrt(tolerance |attribution| / (C L))`, the step below which a budget `C L delta^2`
    calls an attribution right; L is the number of later blocks, and it is infinite behind none.

    Raises InputError when the tolerance is not positive."""
    if not tolerance > 0:
        raise InputError(f"tolerance must be above 0, got {tolerance}")
    budget = (torch.as_tensor(constant, dtype=attribution.dtype) * later)[:, None]
    return (tolerance * attribution.abs() / budget).sqrt()
