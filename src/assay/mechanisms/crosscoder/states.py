"""The residual states that a crosscoder reads, and the network that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.core.sites import read_sites
from assay.core.target import evaluating
from assay.errors import InputError
from assay.io.files import require_finite
from assay.mechanisms.crosscoder.coder import Crosscoder


@torch.no_grad()
def residual_states(
    model: nn.Module, inputs: Any, sites: Sequence[str]
) -> Float[Tensor, "*rows layers width"]:
    """Return the values at the sites side by side, one forward pass.

    Raises InputError for unknown sites, sites in another order than that of the network, values of
    different shapes, NaN and infinities."""
    with evaluating(model):
        seen = read_sites(model, inputs, sites)
    if list(seen) != list(sites):
        raise InputError(
            f"the network reaches the sites in the order {', '.join(seen)}; a crosscoder has its"
            f" layers in that order, not as {', '.join(sites)}"
        )
    values = [seen[site].value for site in sites]
    for site, value in zip(sites, values, strict=True):
        require_finite(value, f"the activation at {site!r}")
        if value.shape != values[0].shape:
            raise InputError(
                f"the values at {sites[0]!r} and {site!r} have shapes {tuple(values[0].shape)} and"
                f" {tuple(value.shape)}; a crosscoder reads states of one shape"
            )
    return torch.stack(values, dim=-2)


@torch.no_grad()
def read_codes(found: Crosscoder, states: Tensor) -> Tensor:
    """Return the codes of residual states (examples, *positions, layers, width) after training, in
    the states' type or float32, whichever is wider: codes may leave the range of float16.
    """
    with evaluating(found):
        codes = found.encode(states.to(found.W_enc.dtype))
    return codes.to(torch.promote_types(states.dtype, torch.float32))
