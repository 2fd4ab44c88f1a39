"""Where components start: at what the network does with inputs that it sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from assay.errors import InputError
from assay.mechanisms.components.decomposition import Decomposition, read_clean

JITTER = 0.05


@torch.no_grad()
def start_at_inputs(
    model: nn.Module, found: Decomposition, inputs: Any, generator: torch.Generator
) -> None:
    """Set every component to what its matrix does with one input: `V_c = x / |x|`, `U_c = V_c^T W`,
    in place.

    x is drawn from what the site reads on `inputs`; rows of an embedding are drawn as they are
    looked up. A component that repeats an earlier one is made small, by the sine of the angle
    between the two, so that duplicates do not share a mechanism; a random twentieth is added. All
    are scaled by one factor so that V U is as near W as it can be: faithfulness warm-up does the
    rest. Random starts, by contrast, often end with one component for two mechanisms.

    Raises InputError when a site reads nothing but zeros."""
    reading = read_clean(model, inputs, found.sites)
    for site, v, u in zip(found.sites, found.V, found.U, strict=True):
        seen = reading.inputs[site.name]
        if site.lookup:
            chosen = torch.unique(seen.flatten())
            rows = nn.functional.one_hot(
                chosen[torch.randint(len(chosen), (site.components,), generator=generator)],
                site.inputs,
            ).to(v)
        else:
            flat = seen.flatten(0, -2).to(v)
            flat = flat[flat.abs().amax(1) > 0]
            if not len(flat):
                raise InputError(f"{site.name!r} reads nothing but zeros on the inputs given")
            rows = flat[torch.randint(len(flat), (site.components,), generator=generator)]
        rows = rows / rows.norm(dim=1, keepdim=True)
        repeats = (rows @ rows.T).square().tril(-1).amax(1).clamp(max=1)
        jitter = JITTER * torch.rand(len(rows), generator=generator, dtype=v.dtype)
        matrix = site.matrix(model).detach().to(v)
        outputs = (rows @ matrix) * ((1 - repeats).sqrt() + jitter).unsqueeze(1)
        product = rows.T @ outputs
        scale = ((matrix * product).sum() / product.square().sum()).clamp(min=0).sqrt()
        v.copy_(scale * rows.T)
        u.copy_(scale * outputs)
